"""The training loop: a function of config and data, averaging what it should, waiting for nothing, and loud about NaN."""

import dataclasses
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ditkernels import models, reference, use_backend
from ditkernels.checkpoints.format import Checkpoint, CheckpointError, load_checkpoint
from ditkernels.checkpoints.run import Run
from ditkernels.cli import main
from ditkernels.data.digits import InMemoryBatches, LabelledImages
from ditkernels.data.source import TrainingData
from ditkernels.pretrained import arguments_of
from ditkernels.sampling.outputs import grid_of, pixels_of, write_png
from ditkernels.training import trainer as trainer_module
from ditkernels.training.config import TrainConfig
from ditkernels.training.ema import EMA
from ditkernels.training.factory import build_model
from ditkernels.training.log import METRICS, OneStepLate, StepMetrics, read_metrics
from ditkernels.training.optimizer import LossScale, gradient_norm, gradients, learning_rate, make_optimizer, update
from ditkernels.training.start import find_start
from ditkernels.training.trainer import NonFiniteGradientError, Trainer, process_settings, train
from tests.helpers.native_cpu import needs_library
from tests.helpers.runs import newest_checkpoint
from tests.numerics import ACCUMULATION_ULPS, assert_drift

CLASSES = 3


def config(tmp_path, **changes):
    small = {
        "data_path": "in memory",
        "vae": "none",
        "steps": 4,
        "global_batch_size": 6,
        "learning_rate": 1e-2,
        "ema_decay": 0.5,
        "global_seed": 5,
        "num_workers": 0,
        "log_every": 1,
        "device": "cpu",
        "results_dir": str(tmp_path / "run"),
        "num_classes": CLASSES,
        "image_size": 4,
    }
    return TrainConfig(**{**small, **changes})


def small_model(library=models, *, random=False, **arguments):
    torch.manual_seed(0)
    model = library.DiT(
        **{
            "input_size": 4,
            "in_channels": 1,
            "hidden_size": 16,
            "depth": 2,
            "num_heads": 2,
            "num_classes": CLASSES,
            **arguments,
        }
    )
    if random:
        # A fresh DiT returns exactly zero.
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad and not weight.any():
                    weight.normal_(std=0.1)
    return model


def some_data(settings, n=10, images=None):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, 1, 4, 4, generator=generator) * 2 - 1 if images is None else images
    data = LabelledImages(images, torch.arange(n) % CLASSES)
    batches = InMemoryBatches(data, settings.global_batch_size, settings.global_seed)
    return TrainingData(batches, InMemoryBatches(data, 4, 0), n, (1, 4, 4), 4, {"a": 0, "b": 1, "c": 2})


def run(tmp_path, *, model=None, **changes):
    settings = config(tmp_path, **changes)
    return train(settings, model=model or small_model(), data=some_data(settings))


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / METRICS) if "loss" in row]


def record(module, into, what):
    """Keeps ``what(args, out)`` of every call, but those on the meta device, by which operations are counted."""

    def hook(_module, args, out):
        if not out.is_meta:
            into.append(what(args, out))

    module.register_forward_hook(hook)


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def make_trainer(tmp_path, *, model=None, **changes):
    settings = config(tmp_path, **changes)
    return Trainer(settings, some_data(settings), None, model or small_model())


# ---- A run is a function of its config and data ----------------------------------------------------------------------


def test_same_seed_same_bits_whatever_the_callers_random_state(tmp_path):
    first = run(tmp_path / "a")
    torch.rand(17)
    second = run(tmp_path / "b")
    assert losses(tmp_path / "a" / "run") == losses(tmp_path / "b" / "run")
    assert same_bits(first.model, second.model)
    assert same_bits(first.ema, second.ema)
    other = run(tmp_path / "c", global_seed=6)
    assert not same_bits(first.ema, other.ema)


def test_the_callers_random_state_and_settings_are_left_alone(tmp_path):
    model = small_model()
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(tmp_path, model=model, precision="tf32", backend="torch", deterministic=True)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_config_makes_the_model(tmp_path):
    settings = config(tmp_path, model="DiT-S/2", hidden_size=16, depth=2, num_heads=2, steps=1)
    torch.manual_seed(3)
    first = build_model(settings, (1, 4, 4))
    torch.manual_seed(4)
    assert same_bits(first, build_model(settings, (1, 4, 4)))
    other = build_model(dataclasses.replace(settings, global_seed=6), (1, 4, 4))
    assert not same_bits(first, other)
    arguments = arguments_of(first)
    assert arguments["hidden_size"] == 16
    again = models.DiT(**arguments)
    again.load_state_dict(first.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_that_steps_are_lost_in_are_refused(tmp_path, dtype):
    model = small_model()
    model.blocks[1].to(dtype)
    with pytest.raises(ValueError, match=rf"model: blocks\.1\.\S+ is {dtype}, .*model\.float\(\), and --precision"):
        make_trainer(tmp_path, model=model)
    model.blocks[1].requires_grad_(False)
    make_trainer(tmp_path, model=model)


def test_both_halves_of_a_large_seed_make_the_initial_weights():
    seeds = [0, 1, 1 << 32, (1 << 32) + 1, 1 << 63, (1 << 64) - 1]
    config = TrainConfig(vae="none", model="DiT-S/2", hidden_size=16, depth=1, num_heads=2, num_classes=3)
    made = [build_model(dataclasses.replace(config, global_seed=seed), (1, 4, 4)) for seed in seeds]
    weights = {model.state_dict()["x_embedder.proj.weight"].numpy().tobytes() for model in made}
    assert len(weights) == len(seeds)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert same_bits(made[1], type(made[1])(**arguments_of(made[1])))


def test_the_loss_falls(tmp_path):
    run(tmp_path, steps=120, global_batch_size=32, learning_rate=3e-3)
    found = losses(tmp_path / "run")
    assert len(found) == 120
    assert sum(found[-20:]) < 0.8 * sum(found[:20])


def test_every_trainable_tensor_is_trained_and_frozen_ones_are_not(tmp_path):
    before, result = small_model(), run(tmp_path)
    for (name, old), new, average in zip(
        before.named_parameters(), result.model.parameters(), result.ema.parameters(), strict=True
    ):
        moved = not torch.equal(old, new)
        assert moved == (name != "pos_embed"), name
        assert torch.equal(average, old) == (not moved), name


def test_labels_reach_the_table_dropped_once(tmp_path):
    rows = []
    model = small_model()
    record(model.y_embedder.embedding_table, rows, lambda args, _out: args[0])
    run(tmp_path, steps=200, global_batch_size=30, model=model, log_every=100)
    dropped = (torch.cat(rows) == model.num_classes).double().mean().item()
    # 6,000 draws at 10%: the standard deviation is 0.4%; dropping twice would give 19%.
    assert 0.08 < dropped < 0.12


def test_no_label_is_dropped_where_none_shall_be(tmp_path):
    rows = []
    model = small_model()
    record(model.y_embedder.embedding_table, rows, lambda args, _out: args[0])
    run(tmp_path, steps=20, model=model, label_dropout=0.0)
    assert (torch.cat(rows) < CLASSES).all()


def test_dropping_labels_of_a_model_without_a_null_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_dropout: got 0\.1.*no null class"):
        run(tmp_path, model=small_model(class_dropout_prob=0.0))


class Recorder:
    """Stands in for a diffusion and keeps what it is given."""

    num_timesteps = 1000

    def __init__(self):
        self.calls = []

    def training_losses(self, model, x, t, model_kwargs, noise):
        self.calls.append((x, t, model_kwargs["y"], noise))
        return {"loss": model(x, t, **model_kwargs).square().flatten(1).mean(1)}


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_batch_is_the_same_in_however_many_parts(tmp_path, accumulation):
    def recorded(parts):
        trainer = make_trainer(tmp_path, accumulation=parts)
        trainer.diffusion = Recorder()
        for step in range(3):
            trainer.train_step(trainer.data.train[step], step, 0.0)
        return [torch.cat(column) for column in zip(*trainer.diffusion.calls, strict=True)]

    for mine, whole in zip(recorded(accumulation), recorded(1), strict=True):
        assert torch.equal(mine, whole)


def test_accumulation_equals_one_big_batch(tmp_path):
    def gradients(parts):
        trainer = make_trainer(tmp_path, model=small_model(random=True), accumulation=parts)
        loss, norm, _ = trainer.train_step(trainer.data.train[0], 0, 0.0)
        return [loss, norm, *(w.grad for w in trainer.model.parameters() if w.requires_grad)]

    for mine, whole in zip(gradients(3), gradients(1), strict=True):
        bound = ACCUMULATION_ULPS * torch.finfo(torch.float32).eps * whole.abs().max().clamp(min=1e-3)
        assert (mine - whole).abs().max() <= bound


def test_timesteps_span_the_chain_and_epochs_are_shuffled(tmp_path):
    settings = config(tmp_path, global_batch_size=5, steps=40)
    shades = torch.arange(10).float().reshape(10, 1, 1, 1).expand(10, 1, 4, 4)
    trainer = Trainer(settings, some_data(settings, images=shades), None, small_model())
    trainer.diffusion = Recorder()
    for step in range(40):
        trainer.train_step(trainer.data.train[step], step, 0.0)
    x, t, _, noise = (torch.cat(column) for column in zip(*trainer.diffusion.calls, strict=True))
    seen = x[:, 0, 0, 0].long().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert t.min() < 100
    assert t.max() >= 900
    assert noise.unique().numel() == noise.numel()


# ---- Ours against the reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fused_model_trains_as_the_reference_does(tmp_path, precision):
    def drift(library, precision, dtype=torch.float32):
        model = small_model(library, random=True, learn_sigma=True)
        settings = config(
            tmp_path,
            steps=200,
            precision=precision,
            learning_rate=1e-3,
            ema_decay=0.9,
            log_every=200,
            backend="torch",
        )
        images = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1
        data = some_data(settings, images=images)
        trainer = Trainer(settings, data, None, model)
        trainer.model.to(dtype)
        trainer.ema.model.to(dtype)
        with process_settings(settings, torch.device("cpu")):
            return [trainer.train_step(data.train[step], step, 1e-3)[0].item() for step in range(200)]

    exact = drift(reference, "fp32", torch.float64)
    assert_drift(drift(models, precision), drift(reference, precision), exact)


# ---- Nothing waits for the host --------------------------------------------------------------------------------------

SYNCHRONISING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "unique_dim",
    "_unique2",
}


class CountSynchronisations(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        boolean_index = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in SYNCHRONISING or boolean_index:
            self.found.append(name)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """On a CPU labels and timesteps are checked by reading them; on a GPU the device itself asserts."""
    monkeypatch.setattr(reference, "check_labels", lambda *_: None)
    monkeypatch.setattr("ditkernels.diffusion.gaussian.check_timesteps", lambda *_: None)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16", "grad_clip": 1.0, "accumulation": 2},
        {"precision": "bf16", "optimizer": "fused", "master_weights": True},
    ],
)
def test_the_steady_step_makes_no_host_synchronisation(tmp_path, changes):
    trainer = make_trainer(tmp_path, **changes)
    batches = [trainer.data.train[step] for step in range(3)]
    trainer.train_step(batches[0], 0, 1e-3)
    late = OneStepLate()
    with CountSynchronisations() as count:
        for step in (1, 2):
            late.push(step, 1e-3, trainer.train_step(batches[step], step, 1e-3))
    assert count.found == []


def test_the_count_sees_a_synchronisation(tmp_path):
    x = torch.tensor([1.0, 2.0])
    with CountSynchronisations() as count:
        x.sum().item()
        x[x > 1]
    assert count.found[0] == "_local_scalar_dense"
    assert len(count.found) >= 2


def test_metrics_reach_the_host_one_step_late():
    late = OneStepLate()
    assert late.push(1, 0.1, [torch.tensor(value) for value in (2.0, 3.0, 0.0)]) is None
    first = late.push(2, 0.2, [torch.tensor(value) for value in (4.0, 5.0, 1.0)])
    assert first == StepMetrics(1, 0.1, 2.0, 3.0, False)
    assert late.pop() == StepMetrics(2, 0.2, 4.0, 5.0, True)
    assert late.pop() is None


# ---- Optimizer, moving average, schedule -----------------------------------------------------------------------------


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([8.0, 16.0]))
        self.frozen = nn.Parameter(torch.tensor([1.0]), requires_grad=False)
        self.register_buffer("table", torch.tensor([3.0]))


def test_ema_is_the_exponential_moving_average():
    model = Affine()
    ema = EMA(model, decay=0.75)
    with torch.no_grad():
        model.trained.add_(4)
        ema.update()
        # Dyadic numbers, so the arithmetic is exact.
        assert ema.model.trained.tolist() == [9.0, 17.0]
        model.trained.add_(4)
        ema.update()
    assert ema.model.trained.tolist() == [0.75 * 9 + 0.25 * 16, 0.75 * 17 + 0.25 * 24]
    assert model.trained.tolist() == [16.0, 24.0]


def test_ema_leaves_frozen_tensors_and_is_for_inference():
    model = Affine().train()
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.frozen.add_(1)
    ema.update()
    assert ema.model.frozen.tolist() == [1.0]
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_ema_update_is_one_foreach_pass():
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            calls.append(op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))

    calls = []
    ema = EMA(small_model(), decay=0.5)
    with Count():
        ema.update()
    assert calls == ["_foreach_lerp_"]


def test_the_optimizer_is_fused_adamw(tmp_path):
    optimizer = make_optimizer(dict(small_model().named_parameters()), config(tmp_path, weight_decay=0.1, weight_decay_on="all"))
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    found = (group["fused"], group["lr"], group["betas"], group["weight_decay"])
    assert found == (True, 1e-2, (0.9, 0.999), 0.1)


def stepped(gradient, *, clip=None, scale=None, loss=1.0):
    """A weight after an update by ``gradient``, and what the update said."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, fused=True)
    weight.grad = torch.tensor(gradient)
    norm = gradient_norm(gradients([weight]))
    found = update(optimizer, torch.tensor(loss), norm, scale, clip)
    return weight.detach(), optimizer.state[weight], found


def test_the_norm_is_the_whole_gradients_and_clipping_divides_by_its_excess():
    _, state, found = stepped([3.0, 4.0])
    assert (found.norm.item(), found.skipped.item()) == (5.0, 0.0)
    _, clipped, found = stepped([3.0, 4.0], clip=2.5)
    assert found.norm.item() == 5.0
    assert torch.equal(clipped["exp_avg"], state["exp_avg"] / 2)
    _, untouched, _ = stepped([3.0, 4.0], clip=6.0)
    assert torch.equal(untouched["exp_avg"], state["exp_avg"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_non_finite_gradient_or_loss_changes_nothing(bad, where):
    arguments = {"gradient": [bad, 4.0]} if where == "gradient" else {"gradient": [3.0, 4.0], "loss": bad}
    weight, state, found = stepped(**arguments)
    assert found.skipped.item() == 1.0
    assert weight.tolist() == [1.0, -2.0]
    assert state["step"].item() == 0
    assert not state["exp_avg"].any()


def test_the_loss_scale_is_taken_out_and_halves_after_an_overflow():
    scale = LossScale(torch.device("cpu"))
    _, state, found = stepped([3.0 * 2**16, 4.0 * 2**16], scale=scale)
    assert found.norm.item() == 5.0
    assert torch.allclose(state["exp_avg"], torch.tensor([0.3, 0.4]))
    assert scale.state() == {"value": 2.0**16, "good_steps": 1}
    stepped([float("inf"), 1.0], scale=scale)
    assert scale.state() == {"value": 2.0**15, "good_steps": 0}
    other = LossScale(torch.device("cpu"))
    other.load(scale.state())
    assert other.state() == scale.state()


def test_the_rate_warms_up_and_follows_its_schedule(tmp_path):
    constant = config(tmp_path, learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(constant, step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    cosine = config(tmp_path, learning_rate=1.0, warmup_steps=10, lr_schedule="cosine")
    rates = [learning_rate(cosine, step, 110) for step in range(110)]
    assert rates[9] == rates[10] == 1
    assert abs(rates[60] - 0.5) < 1e-12
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_the_rate_reaches_the_optimizer(tmp_path):
    run(tmp_path, warmup_steps=4)
    found = [row["learning_rate"] for row in read_metrics(tmp_path / "run" / METRICS)]
    assert found == [0.0025, 0.005, 0.0075, 0.01]


# ---- Steps that are skipped ------------------------------------------------------------------------------------------


class Poisoned:
    """A diffusion whose loss is NaN at some steps."""

    num_timesteps = 10

    def __init__(self, steps):
        self.steps, self.calls = steps, 0

    def training_losses(self, model, x, t, model_kwargs, noise):
        loss = (model(x, t, **model_kwargs) - 1).square().flatten(1).mean(1)
        loss = loss * float("nan") if self.calls in self.steps else loss
        self.calls += 1
        return {"loss": loss}


def poison(monkeypatch, *steps):
    monkeypatch.setattr(trainer_module, "create_diffusion", lambda *_, **__: Poisoned(steps))


def test_a_skipped_step_is_counted_and_spares_the_weights(tmp_path, monkeypatch):
    poison(monkeypatch, 2)
    run(tmp_path, steps=5, ckpt_every=1, keep_last=9)
    before, after, later = (load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08d}") for step in (2, 3, 4))
    for name in before.model:
        assert torch.equal(before.model[name], after.model[name])
    assert any(not torch.equal(after.model[name], later.model[name]) for name in after.model)
    moments = [name for name in before.optimizer if name.endswith(("exp_avg", "step"))]
    assert all(torch.equal(before.optimizer[name], after.optimizer[name]) for name in moments)
    # The moving average takes its usual step, towards the weights that stayed.
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(after.ema[name], before.ema[name].lerp(before.model[name], 0.5))
    assert [row["skipped"] for row in read_metrics(tmp_path / "run" / METRICS)] == [0, 0, 1, 1, 1]
    assert [row["loss"] is None for row in read_metrics(tmp_path / "run" / METRICS)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert (after.state["skipped"], later.state["skipped"], later.state["skipped_in_a_row"]) == (1, 1, 0)


def test_too_many_in_a_row_stop_the_run_with_the_last_good_checkpoint_kept(tmp_path, monkeypatch):
    poison(monkeypatch, *range(3, 100))
    with pytest.raises(NonFiniteGradientError, match=r"3 steps in a row up to step 6.*lower learning rate"):
        run(tmp_path, steps=50, ckpt_every=3, keep_last=1, max_skipped=2)
    found = newest_checkpoint(tmp_path / "run")
    assert found.checkpoint.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in found.checkpoint.model.values())


def test_scattered_skips_do_not_stop_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, 1, 3, 5)
    assert run(tmp_path, steps=7, max_skipped=1).step == 7


# ---- Precision, recomputation, compilation ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_products_run_in_the_precision_asked_for(tmp_path, precision, dtype):
    seen = []
    model = small_model()
    record(model.blocks[0].mlp.fc1, seen, lambda _args, out: out.dtype)
    result = run(tmp_path, model=model, precision=precision)
    assert set(seen) == {dtype}
    assert {weight.dtype for weight in result.ema.parameters()} == {torch.float32}
    assert all(abs(loss) < 10 for loss in losses(tmp_path / "run"))


@needs_library
def test_deciding_by_op_what_is_recomputed_changes_no_bit(tmp_path):
    plain = run(tmp_path / "a", model=small_model(checkpointing="none"))
    recomputed = run(tmp_path / "b", model=small_model(checkpointing="selective"))
    assert same_bits(plain.model, recomputed.model)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputing_activations_changes_no_more_than_roundings(tmp_path, checkpointing):
    """A block that is recomputed whole ends with a residual of its own, where one op would round once less.

    Under selective checkpointing calls take the whole way, where the torch backend runs its kernels and not plain PyTorch.
    """
    with use_backend("torch"):
        run(tmp_path / "a", model=small_model(checkpointing="none"))
        run(tmp_path / "b", model=small_model(checkpointing=checkpointing))
    assert losses(tmp_path / "b" / "run") == pytest.approx(losses(tmp_path / "a" / "run"), rel=1e-5)


def test_compiling_compiles_every_block_and_the_final_layer(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    run(tmp_path, compile=True)
    assert compiled == ["DiTBlock", "DiTBlock", "FinalLayer"]


# ---- Starting from weights -------------------------------------------------------------------------------------------


def test_weights_of_a_checkpoint_start_a_run(tmp_path):
    first = run(tmp_path / "a")
    source = tmp_path / "a" / "run" / "checkpoints" / "step-00000004"
    trainer = make_trainer(tmp_path / "b", init_from=str(source))
    trainer.begin(find_start(trainer.config, Run(trainer.config.results_dir), trainer.world))
    assert same_bits(trainer.model, first.ema)
    assert same_bits(trainer.ema.model, first.ema)
    assert trainer.step == 0
    assert not trainer.optimizer.state


def test_another_size_fits(tmp_path):
    given = small_model(random=True)
    torch.save(given.state_dict(), tmp_path / "public.pt")
    other = small_model(input_size=8)
    settings = config(tmp_path, init_from=str(tmp_path / "public.pt"))
    trainer = Trainer(settings, some_data(settings), None, other)
    positions = other.pos_embed.clone()
    trainer.begin(find_start(settings, Run(settings.results_dir), trainer.world))
    assert torch.equal(other.pos_embed, positions)
    assert torch.equal(other.blocks[1].mlp.fc1.weight, given.blocks[1].mlp.fc1.weight)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    torch.save(small_model(hidden_size=32).state_dict(), tmp_path / "public.pt")
    trainer = make_trainer(tmp_path, init_from=str(tmp_path / "public.pt"))
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*\(32,\), here \(16,\)"):
        trainer.begin(find_start(trainer.config, Run(trainer.config.results_dir), trainer.world))


# ---- Validation and samples ------------------------------------------------------------------------------------------


def test_the_validation_loss_is_that_of_the_moving_average_on_fixed_noise(tmp_path):
    trainer = make_trainer(tmp_path, model=small_model(random=True), val_images=7)
    first = trainer.evaluations.validate().average
    assert trainer.evaluations.validate().average == first
    with torch.no_grad():
        trainer.model.final_layer.linear.weight.add_(1)
    assert trainer.evaluations.validate().average == first
    with torch.no_grad():
        trainer.ema.model.final_layer.linear.weight.add_(1)
    assert trainer.evaluations.validate().average != first
    other = make_trainer(tmp_path, model=small_model(random=True), val_images=7, global_seed=99)
    assert other.evaluations.validate().average == first


def test_a_zero_model_validates_at_the_variance_of_the_noise(tmp_path):
    trainer = make_trainer(tmp_path, model=small_model(learn_sigma=False), val_images=400)
    # Mean of squares of 6,400 normals.
    assert abs(trainer.evaluations.validate().average - 1) < 0.1


def test_validation_without_images_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.data = dataclasses.replace(trainer.data, validation=None)
    with pytest.raises(ValueError, match=r"val_every.*val_path"):
        trainer.evaluations.validate()


def test_samples_are_drawn_every_so_often(tmp_path):
    from PIL import Image

    run(tmp_path, sample_every=2, sample_steps=2, val_every=2, val_images=4)
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step-00000002.png", "step-00000004.png"]
    with Image.open(tmp_path / "run" / "samples" / names[0]) as picture:
        assert picture.size == (16, 16)
    rows = read_metrics(tmp_path / "run" / METRICS)
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]


def brightness(images):
    """Two features of an image that a test can compute by hand."""
    pixels = images.float().flatten(1)
    return torch.stack([pixels.mean(1), pixels.std(1)], dim=1)


def evaluated(tmp_path, **changes):
    np.savez(tmp_path / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8))
    settings = {
        "eval_every": 2,
        "eval_reference": str(tmp_path / "reference.npz"),
        "eval_extractor": f"{__name__}:brightness",
        "eval_images": 10,
        "eval_batch_size": 4,
        "sample_steps": 2,
    }
    return {**settings, **changes}


def test_the_moving_average_is_evaluated_every_so_often(tmp_path):
    result = run(tmp_path, **evaluated(tmp_path))
    rows = [row for row in read_metrics(tmp_path / "run" / METRICS) if "fid" in row]
    assert [(row["step"], row["evaluated_images"]) for row in rows] == [(2, 10), (4, 10)]
    assert {"precision", "recall"} <= set(rows[0])
    assert "inception_score" not in rows[0]  # it needs logits
    settings = config(tmp_path, **evaluated(tmp_path))
    again = Trainer(settings, some_data(settings), None, small_model())
    again.ema.model.load_state_dict(result.ema.state_dict())
    assert again.evaluations.evaluate(again.evaluations.monitor) == {k: v for k, v in rows[1].items() if k != "step"}
    assert rows[0]["fid"] != rows[1]["fid"]


def test_evaluation_changes_no_weight(tmp_path):
    plain = run(tmp_path / "plain")
    (tmp_path / "watched").mkdir()
    watched = run(tmp_path / "watched", **evaluated(tmp_path))
    assert same_bits(plain.model, watched.model)
    assert same_bits(plain.ema, watched.ema)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"eval_reference": None}, "eval_every.*eval_reference"),
        ({"eval_extractor": None}, "eval_every.*eval_weights or eval_extractor"),
        ({"eval_extractor": "math:nothing"}, "extractor: got 'math:nothing'"),
        ({"eval_weights": "inception.pth"}, "allowed is one of the two"),
        ({"eval_reference": "nowhere.npz"}, "nowhere.npz"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_the_first_step(tmp_path, changes, named):
    with pytest.raises((ValueError, OSError), match=named):
        run(tmp_path, **evaluated(tmp_path, **changes))
    assert not (tmp_path / "run" / METRICS).exists()


def test_a_grid_lies_row_by_row(tmp_path):
    from PIL import Image

    shades = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    write_png(tmp_path / "grid.png", grid_of(pixels_of(shades)))
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4, 4)
        assert [picture.getpixel(at) for at in ((0, 0), (2, 0), (0, 2), (3, 3))] == [
            (0, 0, 0),
            (128, 128, 128),
            (255, 255, 255),
            (255, 255, 255),
        ]


# ---- The command -----------------------------------------------------------------------------------------------------

DIGITS = [
    *("--data-path", "digits", "--vae", "none", "--image-size", "8", "--num-classes", "10"),
    *("--model", "DiT-S/2", "--hidden-size", "16", "--depth", "1", "--num-heads", "2"),
    *("--global-batch-size", "4", "--num-workers", "0", "--log-every", "1", "--device", "cpu"),
]


def test_the_command_trains_and_prints_a_line_an_interval(tmp_path, capsys):
    assert main(["train", *DIGITS, "--steps", "2", "--results-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in shown if line.startswith("step")] == ["step 1/2", "step 2/2"]
    for part in ("step 2/2", "loss", "grad norm", "images/s", "GFLOP/s", "GiB", "left"):
        assert part in shown[-1]
    assert newest_checkpoint(tmp_path / "run").checkpoint.step == 2


def test_a_second_run_does_not_overwrite_the_first(tmp_path, capsys):
    command = ["train", *DIGITS, "--steps", "1", "--results-dir", str(tmp_path)]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 2
    assert "--resume auto goes on with it" in capsys.readouterr().err


def test_the_public_trainers_flags_work(tmp_path, capsys):
    public = (
        "--data-path digits --results-dir {} --model DiT-S/2 --image-size 8 --num-classes 10 --epochs 1 "
        "--global-batch-size 1433 --global-seed 3 --vae none --num-workers 0 --log-every 1 --ckpt-every 1"
    )
    small = ["--hidden-size", "16", "--depth", "1", "--num-heads", "2", "--device", "cpu"]
    assert main(["train", *public.format(tmp_path / "run").split(), *small]) == 0
    recorded = newest_checkpoint(tmp_path / "run").checkpoint
    assert (recorded.step, recorded.config["training"]["global_seed"]) == (1, 3)


def test_importing_the_trainer_is_light():
    import subprocess

    code = (
        "import sys, ditkernels.training.trainer, torch; assert not torch.cuda.is_initialized(); "
        "found = {'PIL', 'diffusers', 'wandb', 'tensorboard', 'yaml', 'matplotlib'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_checkpoint_holds_what_a_run_needs(tmp_path):
    run(tmp_path)
    found = newest_checkpoint(tmp_path / "run").checkpoint
    assert isinstance(found, Checkpoint)
    assert found.state["images_seen"] == 24
    assert found.state["class_to_idx"] == {"a": 0, "b": 1, "c": 2}
    assert found.config["training"]["learning_rate"] == 1e-2
