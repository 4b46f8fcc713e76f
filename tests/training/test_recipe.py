"""What is averaged, what decays and what is trained, against loops of fp64; and what a resumed run makes of another set."""

import dataclasses

import numpy as np
import pytest
import torch

from ditkernels.checkpoints.format import CheckpointError, load_checkpoint, save_checkpoint
from ditkernels.training.ema import EMA, decay_of_update, share_of_start
from ditkernels.training.optimizer import make_optimizer
from ditkernels.training.trainer import Trainer
from tests.helpers.runs import newest_checkpoint
from tests.training.test_trainer import config, make_trainer, run, same_bits, small_model, some_data

OPTIMIZERS = ["torch", "fused"]

# ---- The moving average ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_a_warmup_the_average_is_that_of_a_loop(tmp_path, optimizer):
    trainer = make_trainer(tmp_path, model=small_model(random=True), ema_decay=0.75, ema_warmup=True, optimizer=optimizer)
    name = "blocks.0.mlp.fc1.weight"
    expected = trainer.model.state_dict()[name].double().clone()
    for step in range(40):
        trainer.train_step(trainer.data.train[step], step, 1e-2)
        decay = min(0.75, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.model.state_dict()[name].double()
    # From update 26 on the decay is 0.75.
    torch.testing.assert_close(trainer.ema.model.state_dict()[name].double(), expected, rtol=0, atol=1e-6)


def test_the_share_of_the_start_is_what_the_average_keeps_of_it():
    model = torch.nn.Linear(1, 1, bias=False)
    for decay, warmup in ((0.9, False), (0.9, True), (0.9999, True)):
        with torch.no_grad():
            model.weight.fill_(1.0)
            ema = EMA(model.double(), decay)
            model.weight.fill_(0.0)
        for number in range(60):
            ema.decay = decay_of_update(decay, number, warmup=warmup)
            ema.update()
        assert ema.model.weight.item() == pytest.approx(share_of_start(decay, 60, warmup=warmup), rel=1e-9)


def test_an_average_of_starting_weights_is_told_of(tmp_path, caplog):
    run(tmp_path / "slow", ema_decay=0.9999)
    assert (
        "after 4 steps at ema_decay 0.9999 the moving average, which samples are drawn from, will be 100% starting" in caplog.text
    )
    caplog.clear()
    run(tmp_path / "quick", ema_decay=0.1)
    assert "starting weights" not in caplog.text


# ---- Decay -----------------------------------------------------------------------------------------------------------


def test_matrices_of_blocks_and_of_the_final_layer_decay_alone(tmp_path):
    weights = dict(small_model(class_dropout_prob=0.1).named_parameters())
    optimizer = make_optimizer(weights, config(tmp_path, weight_decay=0.1))
    names = {id(weight): name for name, weight in weights.items()}
    decay = {names[id(weight)]: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert decay.keys() == weights.keys()
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight"):
        assert decay.pop(name) == 0.1
    for name in (
        "blocks.0.attn.qkv.bias",
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "t_embedder.mlp.0.weight",
    ):
        assert decay.pop(name) == 0.0
    assert all(
        (value > 0) == (name.endswith("weight") and name.split(".")[0] in ("blocks", "final_layer"))
        for name, value in decay.items()
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_what_does_not_decay_moves_as_without_decay_and_the_rest_as_with(tmp_path, optimizer, clip):
    """One step: AdamW's own decay multiplies a weight by 1 - rate * decay before the step that is the same for all."""
    moved = {}
    for name, changes in {
        "none": {},
        "all": {"weight_decay": 0.5, "weight_decay_on": "all"},
        "matrices": {"weight_decay": 0.5},
    }.items():
        trainer = make_trainer(tmp_path / name, model=small_model(random=True), optimizer=optimizer, grad_clip=clip, **changes)
        trainer.train_step(trainer.data.train[0], 0, 1e-2)
        moved[name] = trainer.model.state_dict()
    for name, found in moved["matrices"].items():
        matrix = found.ndim > 1 and name.split(".")[0] in ("blocks", "final_layer")
        assert torch.equal(found, moved["all" if matrix else "none"][name]), name


def without(folder, *fields, state=()):
    """The newest checkpoint of a run as a version wrote it that did not know these fields."""
    found = newest_checkpoint(folder)
    checkpoint = load_checkpoint(found.path)
    training = {name: value for name, value in checkpoint.config["training"].items() if name not in fields}
    kept = {name: value for name, value in checkpoint.state.items() if name not in state}
    older = dataclasses.replace(checkpoint, config={**checkpoint.config, "training": training}, state=kept)
    for path in found.path.iterdir():
        path.unlink()
    save_checkpoint(found.path, older)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_older_run_goes_on_as_it_decayed_bit_for_bit(tmp_path, clip):
    older = {"weight_decay": 0.5, "weight_decay_on": "all", "grad_clip": clip}
    whole = run(tmp_path / "whole", steps=4, **older)
    run(tmp_path / "cut", steps=2, **older)
    without(tmp_path / "cut/run", "weight_decay_on", "ema_warmup", state=("trainable",))
    resumed = run(tmp_path / "cut", steps=4, weight_decay=0.5, grad_clip=clip, resume="auto")
    assert same_bits(whole.model, resumed.model)
    assert newest_checkpoint(tmp_path / "cut/run").checkpoint.config["training"]["weight_decay_on"] == "all"


# ---- What is trained -------------------------------------------------------------------------------------------------


def half_frozen(*, blocks):
    model = small_model(random=True)
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad and (name.startswith("blocks") == blocks))
    return model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("old", [False, True])
def test_another_set_of_trained_parameters_must_be_named(tmp_path, caplog, optimizer, old):
    caplog.set_level("INFO", "ditkernels")
    run(tmp_path, model=half_frozen(blocks=True), steps=2, optimizer=optimizer)
    before = newest_checkpoint(tmp_path / "run").checkpoint
    if old:
        without(tmp_path / "run", state=("trainable",))
    other = {"steps": 4, "resume": "auto", "optimizer": optimizer}
    with pytest.raises(CheckpointError, match=r"another recipe: trainable: .*final_layer.* here; --override trainable"):
        run(tmp_path, model=small_model(random=True), **other)
    fresh = []
    genuine = Trainer.train_step

    def spied(self, *args):
        if not fresh:
            name = "final_layer.linear.weight"
            weight = dict(self.model.named_parameters())[name]
            fresh.append((weight in self.optimizer.state, torch.equal(weight, self.ema.model.state_dict()[name])))
        return genuine(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", spied)
        run(tmp_path, model=small_model(random=True), override="trainable", **other)
    assert fresh == [(False, True)]
    assert "from step 2 on: trainable" in caplog.text
    after = newest_checkpoint(tmp_path / "run").checkpoint
    assert after.optimizer["final_layer.linear.weight.step"].item() == 2
    assert after.optimizer["blocks.0.mlp.fc1.weight.step"].item() == 4
    assert not torch.equal(after.model["final_layer.linear.weight"], before.model["final_layer.linear.weight"])


def test_what_is_dropped_loses_its_moments_and_keeps_its_average(tmp_path):
    run(tmp_path, model=small_model(random=True), steps=2)
    before = newest_checkpoint(tmp_path / "run").checkpoint
    run(tmp_path, model=half_frozen(blocks=True), steps=4, resume="auto", override="trainable")
    after = newest_checkpoint(tmp_path / "run").checkpoint
    assert not any(name.startswith("final_layer") for name in after.optimizer)
    for name in ("final_layer.linear.weight", "t_embedder.mlp.0.weight"):
        assert torch.equal(after.ema[name], before.ema[name])
        assert torch.equal(after.model[name], before.model[name])


def test_the_gradients_norm_is_summed_in_the_models_order_whatever_decays(tmp_path):
    norms = []
    for changes in ({}, {"weight_decay": 1e-30}):
        trainer = Trainer(config(tmp_path, **changes), some_data(config(tmp_path)), None, small_model(random=True))
        norms.append(trainer.train_step(trainer.data.train[0], 0, 1e-2)[1].item())
    assert np.float32(norms[0]) == np.float32(norms[1])
