"""Master weights: bf16 matrices compute, and every number, saved ones too, is that of fp32 weights under autocast, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from ditkernels import models, reference, use_backend
from ditkernels.checkpoints.format import load_checkpoint
from ditkernels.checkpoints.run import Run
from ditkernels.data.order import Batch
from ditkernels.training import optimizer
from ditkernels.training.config import TrainConfig
from ditkernels.training.ema import EMA
from ditkernels.training.master_weights import make_bf16_copies, move_grads_to_masters, refresh
from ditkernels.training.optimizer import AdamWEMA, gradient_norm, optimizer_tensors
from ditkernels.training.start import find_start
from ditkernels.training.trainer import Trainer, process_settings, train
from tests.training.test_trainer import config, make_trainer, same_bits, small_model, some_data

BF16, F32 = torch.bfloat16, torch.float32
PLAIN = {"precision": "bf16", "optimizer": "fused", "ema_decay": 0.9}
MASTERS = {**PLAIN, "master_weights": True}


def trained(tmp_path, model, steps=6, poisoned=(2,), **settings):
    """A trainer after some steps, of which the poisoned ones are skipped, and their losses, norms and skips."""
    trainer = make_trainer(tmp_path, model=model, **settings)
    numbers = []
    with process_settings(trainer.config, torch.device("cpu")):
        for step in range(steps):
            images, labels, *_ = trainer.data.train[step]
            batch = Batch(images * (math.nan if step in poisoned else 1), labels)
            numbers.append(torch.stack(trainer.train_step(batch, step, 1e-2 / (step + 1))))
    return trainer, torch.stack(numbers)


def assert_same_run(first, second):
    (mine, found), (theirs, wanted) = first, second
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert found.isfinite().all(1).tolist() == wanted.isfinite().all(1).tolist()
    assert same_bits(mine.model, theirs.model)
    assert same_bits(mine.ema.model, theirs.ema.model)
    assert not same_bits(mine.ema.model, mine.model)
    states = [optimizer_tensors(trainer.optimizer, trainer.model) for trainer in (mine, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


# ---- The numbers of fp32 weights under autocast ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "library, arguments, changes",
    [
        (models, {}, {}),
        (
            models,
            {},
            {"backend": "torch", "grad_clip": 0.5, "weight_decay": 0.1},
        ),  # biases go to the fused ops
        (models, {"conditioning": "adaln", "checkpointing": "selective"}, {"residual_dtype": "bf16"}),
        (
            models,
            {"conditioning": "cross_attention"},
            {"backend": "torch", "grad_clip": 0.5, "weight_decay": 0.1},
        ),
        (
            models,
            {"conditioning": "in_context", "checkpointing": "full"},
            {"accumulation": 3, "grad_clip": 0.5},
        ),
        (reference, {"conditioning": "cross_attention"}, {"accumulation": 2}),
    ],
)
def test_every_number_is_that_of_fp32_weights_under_autocast(tmp_path, library, arguments, changes):
    def run(settings):
        return trained(tmp_path, small_model(library, random=True, **arguments), **settings, **changes)

    with_masters, without = run(MASTERS), run(PLAIN)
    assert without[1][:, 2].tolist() == [0, 0, 1, 0, 0, 0]
    assert_same_run(with_masters, without)


def test_a_norm_of_gradients_in_bf16_and_fp32_is_that_of_the_same_in_fp32():
    gradients = [torch.randn(7, 5), torch.randn(300).to(BF16), torch.randn(3), torch.randn(9, 2).to(BF16)]
    assert torch.equal(gradient_norm(gradients), gradient_norm([gradient.float() for gradient in gradients]))
    wide = [gradient.double() for gradient in gradients]
    assert gradient_norm(wide).dtype == torch.float64


@use_backend("torch")
def test_the_benchmarks_contender_takes_the_steps_of_the_one_it_is_compared_with():
    from benchmarks.speed import training

    network, cpu = training.Network("DiT-S/8", 16), torch.device("cpu")
    masters, plain = (
        kind(training.RECIPES[name], network, cpu, 1)
        for kind, name in (
            (training.MasterStep, "ours-bf16-residual-masters"),
            (training.Step, "ours-bf16-residual"),
        )
    )
    masters.batches = plain.batches
    for step in (masters, plain):
        torch.manual_seed(0)  # of the noise
        step(0)
    assert same_bits(masters.model, plain.model)
    assert masters.computing.blocks[0].mlp.fc1.weight.dtype == BF16


# ---- What computes, and what is saved by it --------------------------------------------------------------------------


def matrices(model):
    return [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def test_matrices_compute_in_bf16_and_all_else_is_the_masters_own():
    model = small_model(random=True)
    computing, copies = make_bf16_copies(model)
    pairs = dict(zip(model.parameters(), computing.parameters(), strict=True))
    assert {id(weight) for weight in copies} == {id(weight) for weight in matrices(model)}
    for master, used in pairs.items():
        assert master.dtype == F32
        assert used is copies.get(master, master)
        assert used.dtype == (BF16 if master in copies else F32)
        assert torch.equal(used, master.to(used.dtype))
    refreshed = copies[model.blocks[0].mlp.fc1.weight]
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(1)
    refresh(copies)
    assert torch.equal(refreshed, model.blocks[0].mlp.fc1.weight.to(BF16))
    assert computing.blocks[0].mlp.fc1.weight is refreshed


def test_a_weight_that_is_computed_and_one_that_is_frozen_have_no_copy():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    model[1].weight.requires_grad_(False)
    computing, copies = make_bf16_copies(model)
    assert [id(master) for master in copies] == [id(model[2].weight)]
    with torch.autocast("cpu", BF16):
        computing(torch.ones(2, 4)).sum().backward()
    assert model[0].parametrizations.weight.original.grad.dtype == F32


@pytest.mark.parametrize("parts, dtype", [(1, BF16), (2, F32)])
def test_gradients_reach_the_optimizer_as_they_come_and_their_sums_in_fp32(tmp_path, monkeypatch, parts, dtype):
    seen = []

    def spy(weights, gradients, *rest, **numbers):
        copies = rest[4]
        seen.append((len(weights), {g.dtype for g in gradients}, {c.dtype for c in copies}, len(copies)))

    monkeypatch.setattr(optimizer, "adamw_ema", spy)
    trainer, _ = trained(tmp_path, small_model(), 1, (), accumulation=parts, **MASTERS)
    count = len(matrices(trainer.model))
    others = sum(weight.requires_grad for weight in trainer.model.parameters()) - count
    assert sorted(seen, key=str) == sorted([(count, {dtype}, {BF16}, count), (others, {F32}, set(), 0)], key=str)


class Casts(TorchDispatchMode):
    """Counts the casts of given weights to bf16, and those from bf16 to fp32 of anything that has one of their shapes."""

    def __init__(self, weights):
        super().__init__()
        self.addresses = {weight.data_ptr() for weight in weights}
        self.shapes = {weight.shape for weight in weights}
        self.lowered = self.widened = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if op.overloadpacket.__name__ == "_to_copy" and made.dtype != args[0].dtype:
            self.lowered += made.dtype == BF16 and args[0].data_ptr() in self.addresses
            self.widened += made.dtype == F32 and made.shape in self.shapes
        return made


def test_no_matrix_is_cast_and_no_gradient_of_one(tmp_path):
    def casts(settings):
        trainer = make_trainer(tmp_path, model=small_model(random=True), **settings)
        images, labels, *_ = trainer.data.train[0]
        weights = matrices(trainer.model)
        with Casts(weights) as count:
            trainer._loss(images, labels, 0, trainer._positions).backward()
        return count, len(weights)

    plain, masters = casts(PLAIN), casts(MASTERS)
    assert plain[0].lowered == plain[1]
    assert masters[0].lowered == 0
    # The fused ops' plain twins widen some of what they multiply, here as there.
    assert plain[0].widened - masters[0].widened == plain[1]


def test_the_model_that_computes_is_the_one_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    trainer = make_trainer(tmp_path, model=small_model(), compile=True, **MASTERS)
    assert [type(module).__name__ for module in compiled] == ["DiTBlock", "DiTBlock", "FinalLayer"]
    assert compiled[1].mlp.fc1.weight is trainer._copies[trainer.model.blocks[1].mlp.fc1.weight]


def test_without_a_gradient_a_master_and_its_copy_stay(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    computing, copies = make_bf16_copies(model)
    stepping = AdamWEMA(model.parameters(), EMA(model, 0.5), copies, lr=0.1, weight_decay=0.0)
    before = [weight.detach().clone() for weight in computing.parameters()]
    computing[1].weight.grad = torch.ones(2, 3, dtype=BF16)
    move_grads_to_masters(copies)
    assert computing[1].weight.grad is None
    stepping.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, computing.parameters(), strict=True)]
    assert moved == [False, False, True, False]
    assert torch.equal(computing[1].weight, model[1].weight.to(BF16))
    stepping.zero_grad()
    assert model[1].weight.grad is None


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def run(tmp_path, **changes):
    settings = config(tmp_path, **changes)
    return train(settings, model=small_model(random=True), data=some_data(settings))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return run(folder, steps=6, **PLAIN), folder / "run" / "checkpoints" / "step-00000006"


@pytest.mark.parametrize("first, second", [(PLAIN, MASTERS), (MASTERS, PLAIN), (MASTERS, MASTERS)])
def test_a_checkpoint_of_either_setting_goes_on_with_the_other(tmp_path, unbroken, first, second):
    run(tmp_path, steps=3, **first)
    result = run(tmp_path, steps=6, resume="auto", **second)
    assert same_bits(result.model, unbroken[0].model)
    assert same_bits(result.ema, unbroken[0].ema)
    mine, theirs = (
        load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000006"),
        load_checkpoint(unbroken[1]),
    )
    for part, tensors in theirs.parts.items():
        found = mine.parts[part]
        assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in tensors.items()}
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert {tensor.dtype for tensor in mine.model.values()} == {F32}


def test_given_weights_reach_the_copies(tmp_path, unbroken):
    trainer = make_trainer(tmp_path, init_from=str(unbroken[1]), **MASTERS)
    trainer.begin(find_start(trainer.config, Run(trainer.config.results_dir), trainer.world))
    assert same_bits(trainer.model, unbroken[0].ema)
    for master, made in trainer._copies.items():
        assert torch.equal(made, master.to(BF16))


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": "torch"}, "master_weights: got optimizer torch, allowed is fused"),
        ({"precision": "fp16"}, "master_weights: got precision fp16, allowed is bf16"),
        ({"precision": "fp32"}, "master_weights: got precision fp32, allowed is bf16"),
        ({"parallel": "fsdp"}, "master_weights: got parallel fsdp, allowed is ddp"),
    ],
)
def test_what_does_not_go_with_them_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**MASTERS, **changes})


def test_automatic_precision_must_turn_out_to_be_bf16(tmp_path):
    settings = config(tmp_path, **{**MASTERS, "precision": "auto"})
    with pytest.raises(ValueError, match=r"master_weights: got precision auto, which is fp32 on cpu"):
        Trainer(settings, some_data(settings), None, small_model())
