"""What is due at a step comes after the step's checkpoint, is made up for where it is missing, and is left at once where asked."""

import dataclasses
import os
import signal
import time

import pytest
import torch
from sklearn.datasets import load_digits as _warm  # noqa: F401 (the server imports this module once for all)

from ditkernels.checkpoints.run import checkpoints_of, is_checkpoint
from ditkernels.checkpoints.writer import CheckpointWriter
from ditkernels.data.digits import InMemoryBatches, LabelledImages
from ditkernels.training.evaluations import Evaluations
from ditkernels.training.log import METRICS, read_metrics
from ditkernels.training.trainer import Trainer
from tests.helpers.forked import assert_same_end
from tests.helpers.sabotage import KILLED
from tests.training import test_distributed
from tests.training.test_train_resume import complete, finish, start, told
from tests.training.test_trainer import make_trainer, run, small_model

WATCHED = ("--val-every", "2", "--val-images", "8", "--sample-every", "2", "--sample-steps", "2")


def all_rows(folder):
    """The rows of a run, without what was measured of speed and memory."""
    measured = ("second", "memory", "mfu")
    return [
        {name: value for name, value in row.items() if not any(word in name for word in measured)}
        for row in read_metrics(folder / METRICS)
    ]


@pytest.fixture(scope="module")
def unbroken(forked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert complete(forked, folder, *WATCHED) == 0, told(folder)
    return folder


def assert_as_unbroken(folder, unbroken):
    assert_same_end(folder, unbroken, all_rows)
    grids = [sorted((path.name, path.read_bytes()) for path in (some / "samples").glob("*.png")) for some in (folder, unbroken)]
    assert grids[0] == grids[1]
    assert len(grids[0]) == 5


# ---- Save, then look -------------------------------------------------------------------------------------------------


def slow_writer(seconds):
    genuine = CheckpointWriter._write

    def write(self, *args):
        time.sleep(seconds)
        genuine(self, *args)

    CheckpointWriter._write = write


def strike(kind, step, action, seconds=0.0):
    """At the first batch of what is due at a step, this process is killed, or gets a signal; the writer is slow."""
    slow_writer(seconds)
    owner, name = {"validation": (Evaluations, "_losses"), "samples": (Evaluations, "_draw_grid")}[kind]
    genuine = getattr(owner, name)

    def struck(self, *args):
        if self.trainer.step == step:
            os.kill(os.getpid(), action)
        return genuine(self, *args)

    setattr(owner, name, struck)


@pytest.mark.parametrize("kind", ["validation", "samples"])
def test_killed_in_an_evaluation_the_checkpoint_is_whole_and_the_evaluation_is_made_up_for(forked, unbroken, tmp_path, kind):
    folder = tmp_path / "run"
    assert complete(forked, folder, *WATCHED, sabotage=(strike, kind, 4, signal.SIGKILL, 2.0)) == KILLED
    assert is_checkpoint(checkpoints_of(folder)[4])
    assert complete(forked, folder, *WATCHED) == 0, told(folder)
    assert "resumed from step 4" in told(folder)
    assert_as_unbroken(folder, unbroken)


@pytest.mark.parametrize("kind", ["validation", "samples"])
@pytest.mark.parametrize("often", ["2", "5"])
def test_a_signal_in_an_evaluation_is_heard_before_its_end(forked, unbroken, tmp_path, kind, often):
    folder = tmp_path / "run"
    flags = (*WATCHED, "--ckpt-every", often)
    assert complete(forked, folder, *flags, sabotage=(strike, kind, 4, signal.SIGTERM)) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in told(folder)
    assert max(checkpoints_of(folder)) == 4
    assert complete(forked, folder, *WATCHED) == 0, told(folder)
    assert_as_unbroken(folder, unbroken)


def test_a_finished_run_makes_up_for_the_evaluation_of_its_last_step(forked, unbroken, tmp_path):
    folder = tmp_path / "run"
    assert complete(forked, folder, *WATCHED, sabotage=(strike, "validation", 10, signal.SIGTERM)) == 128 + signal.SIGTERM
    assert max(checkpoints_of(folder)) == 10
    assert complete(forked, folder, *WATCHED) == 0, told(folder)
    assert_as_unbroken(folder, unbroken)
    assert complete(forked, folder, *WATCHED) == 0
    assert_as_unbroken(folder, unbroken)


@pytest.mark.parametrize("kind", ["validation", "samples"])
def test_a_signal_to_one_of_two_ranks_ends_an_evaluation_on_both(forked, tmp_path, kind):
    flags = (*test_distributed.DDP, *WATCHED, "--val-images", "24", "--steps", "8")
    whole = test_distributed.World(forked, 2, tmp_path / "whole", *flags).complete()
    struck = 0 if kind == "samples" else 1
    world = test_distributed.World(forked, 2, tmp_path / "run", *flags, sabotage={struck: (strike, kind, 4, signal.SIGTERM)})
    assert world.end() == [128 + signal.SIGTERM] * 2, (world.told(0), world.told(1))
    assert max(checkpoints_of(world.folder)) == 4
    test_distributed.World(forked, 2, world.folder, *flags).complete()
    assert_same_end(world.folder, whole, all_rows)


# ---- The loss on held-out images -------------------------------------------------------------------------------------


def test_the_loss_of_the_weights_is_that_of_a_model_of_these_weights(tmp_path):
    trainer = make_trainer(tmp_path, model=small_model(random=True), val_images=7)
    with torch.no_grad():
        trainer.model.final_layer.linear.weight.add_(1)
    found = trainer.evaluations.validate()
    other = make_trainer(tmp_path, model=small_model(random=True), val_images=7)
    other.load(trainer.model.state_dict(), trainer.model.state_dict())
    assert (found.raw, found.raw) == other.evaluations.validate()[:2]
    assert found.average != found.raw
    assert (found.images, found.passes) == (7, 1)


def test_few_held_out_images_are_read_whole_so_often_that_there_are_enough(tmp_path):
    trainer = make_trainer(tmp_path, model=small_model(random=True), val_images=10)
    images = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    few = InMemoryBatches(LabelledImages(images, torch.zeros(4, dtype=torch.int64)), 3, 0)
    trainer.data = dataclasses.replace(trainer.data, validation=few)
    seen = []
    genuine = trainer.evaluations._losses
    trainer.evaluations._losses = lambda models, batch, at: seen.append((at, len(batch.labels))) or genuine(models, batch, at)
    found = trainer.evaluations.validate()
    assert (found.images, found.passes) == (12, 3)
    assert seen == [(0, 3), (3, 3), (6, 3), (9, 3)]
    indices = torch.cat([few.stream.batch(step) for step in range(4)])
    assert torch.equal(indices.bincount(), torch.full((4,), 3))


def test_another_validation_is_said_once(tmp_path, caplog):
    caplog.set_level("INFO", "ditkernels")
    run(tmp_path, val_every=2, val_images=4)
    (row, _) = (row for row in read_metrics(tmp_path / "run" / METRICS) if "validation_loss" in row)
    assert (row["validation_images"], row["validation_passes"]) == (4, 1)
    run(tmp_path, val_every=2, val_images=4, resume="auto", steps=6)
    assert "do not compare" not in caplog.text
    run(tmp_path, val_every=2, val_images=5, resume="auto", steps=8)
    assert caplog.text.count("validation is of 5 images in 1 passes from here on, was of 4 in 1") == 1
    run(tmp_path, val_every=2, val_images=5, resume="auto", steps=10)
    assert caplog.text.count("do not compare") == 1


def test_a_grid_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ditkernels.training.evaluations.write_png", full)
    assert run(tmp_path, sample_every=1, sample_steps=2).step == 4
    assert caplog.text.count("samples: [Errno 28] No space left on device; training goes on without it") == 1
    assert "samples: it is incomplete, 4 writes failed" in caplog.text


# ---- Waiting for data ------------------------------------------------------------------------------------------------


def stuck_reads(step):
    """From ``step`` on no batch comes for a minute."""
    from tests.helpers.sabotage import slow_reads

    slow_reads(60, step)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_heard_at_once_while_data_is_waited_for(forked, tmp_path, workers, number):
    folder = tmp_path / "run"
    process = start(forked, folder, "--num-workers", workers, sabotage=(stuck_reads, 3))
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline, told(folder)
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, number)
    begin = time.monotonic()
    assert finish(process) == 128 + number, told(folder)
    assert time.monotonic() - begin < 5
    assert f"stopped by {number.name}" in told(folder)
    assert max(checkpoints_of(folder)) == 3


def kill_reader(step):
    """The worker that should read batch ``step`` is killed, as the system does where memory is short."""
    from ditkernels.data.digits import InMemoryBatches

    genuine = InMemoryBatches.at

    def at(self, number, positions):
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(self, number, positions)

    InMemoryBatches.at = at


def no_room(step):
    """From the ``step``-th tensor on shared memory is full."""
    genuine, shared = torch.Tensor.share_memory_, []

    def share(self):
        shared.append(None)
        if len(shared) > step:
            raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")
        return genuine(self)

    torch.Tensor.share_memory_ = share


@pytest.mark.parametrize(
    "sabotage, message", [((kill_reader, 4), "fewer num_workers, or more memory"), ((no_room, 2), "docker run --shm-size")]
)
def test_a_reader_that_is_gone_or_finds_no_room_says_what_to_do(forked, tmp_path, sabotage, message):
    folder = tmp_path / "run"
    begin = time.monotonic()
    assert complete(forked, folder, "--num-workers", "2", sabotage=sabotage) == 2
    assert time.monotonic() - begin < 30
    assert message in told(folder)
    assert "Traceback" not in told(folder)


def test_an_error_of_training_is_the_trainers(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no matter")

    monkeypatch.setattr(Trainer, "_loss", broken)
    with pytest.raises(RuntimeError, match=r"^no matter$"):
        run(tmp_path)
