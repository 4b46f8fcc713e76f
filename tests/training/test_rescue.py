"""An error ends a run with its last whole step saved, and is raised as it was; what may be of two steps is not saved."""

import pytest
from sklearn.datasets import load_digits as _warm  # noqa: F401 (likewise)

from ditkernels.checkpoints.format import MANIFEST
from ditkernels.checkpoints.run import checkpoints_of, error_checkpoints_of
from ditkernels.checkpoints.writer import CheckpointWriter
from ditkernels.data.digits import InMemoryBatches
from ditkernels.training import rescue
from ditkernels.training import trainer as trainer_module
from ditkernels.training.distributed import Parallel
from ditkernels.training.ema import EMA
from ditkernels.training.evaluations import Evaluations
from ditkernels.training.log import RunLog
from ditkernels.training.optimizer import NonFiniteGradientError
from ditkernels.training.trainer import Trainer
from tests.helpers.forked import assert_same_end, steps_of
from tests.helpers.runs import newest_checkpoint
from tests.training.test_distributed import DDP, FSDP, World
from tests.training.test_trainer import run, same_bits

# Where the fourth call is an error, and the step that is saved; None for none. A call of the update, or after it, is of the fourth
# step; the first validation and the first grid are the rehearsal's.
SITES = {
    "data": ((InMemoryBatches, "at"), 3),
    "forward": ((Trainer, "_loss"), 3),
    "reduce": ((Parallel, "reduce"), 3),
    "update": ((trainer_module, "update"), None),
    "average": ((EMA, "update"), None),
    "record": ((Trainer, "record"), 2),  # it is asked before an evaluation, too
    "log": ((RunLog, "step"), 4),
    "validation": ((Evaluations, "validate"), 3),
    "samples": ((Evaluations, "grid"), 3),
    "checkpoint": ((Trainer, "checkpoint"), None),  # the saving fails alike
    "save": ((CheckpointWriter, "save"), 4),
}


class InjectedError(OSError):
    """The error of a test."""


def strike(owner, name, *, at):
    """Every call of a function from the ``at``-th on raises; returns what puts it back."""
    genuine, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) >= at:
            raise InjectedError("injected")
        return genuine(*args, **kwargs)

    setattr(owner, name, call)
    return lambda: setattr(owner, name, genuine)


WATCHED = {"val_every": 1, "val_images": 4, "sample_every": 1, "sample_steps": 2, "ckpt_every": 1, "optimizer": "torch", "steps": 6}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder, **{**WATCHED, "ckpt_every": 100})


def end_like(folder, unbroken, **changes):
    result = run(folder, **{**WATCHED, "ckpt_every": 100, "resume": "auto", **changes})
    assert same_bits(result.model, unbroken[1].model)
    assert same_bits(result.ema, unbroken[1].ema)
    assert steps_of(folder / "run") == steps_of(unbroken[0] / "run")


@pytest.mark.parametrize("site", SITES)
def test_an_error_saves_the_last_whole_step_and_is_raised_as_it_was(tmp_path, unbroken, caplog, site):
    (owner, name), saved = SITES[site]
    # Held-out images are batches, too.
    every = {"val_every": 0 if site == "data" else 1, "ckpt_every": 1 if site in ("checkpoint", "save") else 100}
    put_back = strike(owner, name, at=4)
    try:
        with pytest.raises(InjectedError, match=r"^injected$"):
            run(tmp_path, **{**WATCHED, **every})
    finally:
        put_back()
    found = [step for step, path in error_checkpoints_of(tmp_path / "run").items() if (path / MANIFEST).exists()]
    assert found == ([] if saved is None else [saved]), caplog.text
    if site in ("update", "average"):
        assert "inside the update of step 4" in caplog.text
    assert "an error ends the run" in caplog.text
    if site not in ("record", "log", "data"):  # numbers of a step are lost with the log
        end_like(tmp_path, unbroken)


def test_an_error_before_the_first_step_saves_nothing(tmp_path):
    put_back = strike(Trainer, "_loss", at=1)
    try:
        with pytest.raises(InjectedError):
            run(tmp_path)
    finally:
        put_back()
    assert not (tmp_path / "run/checkpoints").exists()


def test_gradients_that_are_not_finite_save_nothing(tmp_path, monkeypatch, caplog):
    genuine = Trainer._loss

    def loss(self, images, labels, step, positions):
        return genuine(self, images, labels, step, positions) * (float("nan") if step > 1 else 1)

    monkeypatch.setattr(Trainer, "_loss", loss)
    with pytest.raises(NonFiniteGradientError):
        run(tmp_path, max_skipped=1, steps=8)
    assert "the last good checkpoint is kept" in caplog.text
    assert not error_checkpoints_of(tmp_path / "run")


def broken_at(folder, step, **changes):
    put_back = strike(Trainer, "_loss", at=step + 1)
    try:
        with pytest.raises(InjectedError):
            run(folder, **{**WATCHED, "resume": "auto", **changes})
    finally:
        put_back()


def kept(folder):
    return list(checkpoints_of(folder / "run")), list(error_checkpoints_of(folder / "run"))


def test_the_next_error_replaces_it_and_a_later_periodic_save_removes_it(tmp_path, unbroken):
    often = {"ckpt_every": 2, "keep_last": 1}
    broken_at(tmp_path, 3, **often)
    assert kept(tmp_path) == ([2], [3])
    # From step 3 on; the periodic one of step 4 comes in between.
    broken_at(tmp_path, 2, **often)
    assert kept(tmp_path) == ([4], [5])
    broken_at(tmp_path, 0, **often)
    assert kept(tmp_path) == ([4], [5])
    end_like(tmp_path, unbroken, **often)
    assert kept(tmp_path) == ([6], [])


def test_an_error_right_behind_a_save_makes_no_second_one(tmp_path):
    broken_at(tmp_path, 2, ckpt_every=2)
    assert kept(tmp_path) == ([2], [])


# ---- Several ranks ---------------------------------------------------------------------------------------------------


def strike_on_rank(site, at):
    """For a rank of its own process."""
    rescue.TOGETHER = 3.0
    (owner, name), _ = SITES[site]
    strike(owner, name, at=at)


FLAGS = ("--val-every", "1", "--val-images", "8", "--steps", "10", "--optimizer", "torch", "--ckpt-every", "4")


@pytest.fixture(scope="module")
def whole(forked, tmp_path_factory):
    made = {}

    def run_of(flags):
        if flags not in made:
            made[flags] = World(forked, 2, tmp_path_factory.mktemp("whole") / "run", *flags, *FLAGS).complete()
        return made[flags]

    return run_of


@pytest.mark.parametrize(
    "flags, site, ranks, saved",
    [
        (DDP, "data", (0,), 2),  # four of the calls are held-out batches, of the rehearsal and of two validations
        (DDP, "forward", (1,), 5),
        (DDP, "update", (1,), 6),  # the first rank has ended that update
        (DDP, "update", (0,), None),
        (DDP, "validation", (0, 1), 5),
        (DDP, "validation", (1,), 5),
        (FSDP, "forward", (1,), None),
        (FSDP, "update", (0,), None),
        (FSDP, "validation", (0, 1), 5),
        (FSDP, "validation", (1,), None),
        (FSDP, "save", (0, 1), 8),
    ],
)
def test_of_two_ranks_those_save_that_can_and_all_name_rank_and_cause(forked, whole, tmp_path, flags, site, ranks, saved):
    folder = tmp_path / "run"
    at = 2 if site == "save" else 6
    world = World(forked, 2, folder, *flags, *FLAGS, sabotage=dict.fromkeys(ranks, (strike_on_rank, site, at)))
    assert world.end() == [2, 2], (world.told(0), world.told(1))
    for rank in (0, 1):
        if rank in ranks:
            assert "ditkernels: error: injected" in world.told(rank)
        else:
            assert f"rank {rank}: rank {ranks[0]} failed after step" in world.told(rank), world.told(rank)
            assert "(InjectedError: injected)" in world.told(rank)
    found = newest_checkpoint(folder)
    assert not [path for path in found.broken if (path / MANIFEST).exists()]
    assert found.checkpoint.step == (saved or 4), world.told(0)
    assert list(error_checkpoints_of(folder)) == ([] if saved is None else [saved])
    World(forked, 2, folder, *flags, *FLAGS).complete()
    assert_same_end(folder, whole(flags), steps_of)
