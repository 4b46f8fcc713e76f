"""Several processes train what one does: the same numbers up to the order of sums, the same bits after a crash, one decision.

Ranks are forked from a server that has imported everything and meet at a store of the test's own, as torchrun's meet at its
agent's; two tests start torchrun itself. All of it runs over gloo on a CPU.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.fsdp  # imported once, in the server
from sklearn.datasets import load_digits as _warm  # noqa: F401 (likewise)
from torch.distributed.launcher.api import LaunchConfig

from ditkernels.checkpoints.format import MANIFEST, Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from ditkernels.checkpoints.model import load_model
from ditkernels.checkpoints.run import checkpoints_of
from ditkernels.checkpoints.sharded import Peers
from ditkernels.cli import main
from ditkernels.data.digits import InMemoryBatches, LabelledImages
from ditkernels.files import json_sha256
from ditkernels.runtime import StopSignal, local_device, place
from ditkernels.training import distributed as distributed_module
from ditkernels.training import trainer
from ditkernels.training.config import TrainConfig
from ditkernels.training.distributed import ManyRanks, Parallel
from ditkernels.training.factory import build_model
from ditkernels.training.log import METRICS, read_metrics
from ditkernels.training.trainer import Trainer
from tests.helpers.forked import assert_same_end, child
from tests.helpers.runs import newest_checkpoint
from tests.helpers.sabotage import KILLED, flip_a_bit, kill_at_call, slow_steps
from tests.helpers.worlds import Among
from tests.numerics import REORDERING_FACTOR
from tests.training.test_trainer import CountSynchronisations

STEPS = 20
HIDDEN = 32
SIZES = {"model": "DiT-S/2", "hidden_size": HIDDEN, "depth": 2, "num_heads": 2, "num_classes": 10}
TRAIN = [
    *("train", "--data-path", "digits", "--vae", "none", "--image-size", "8", "--num-classes", "10"),
    *("--model", "DiT-S/2", "--hidden-size", str(HIDDEN), "--depth", "2", "--num-heads", "2"),
    *("--steps", str(STEPS), "--global-batch-size", "12", "--learning-rate", "1e-3", "--ema-decay", "0.9"),
    *("--num-workers", "0", "--device", "cpu", "--log-every", "1", "--resume", "auto", "--ckpt-every", "4"),
]
DDP, FSDP = ("--parallel", "ddp"), ("--parallel", "fsdp")


# ---- Ranks -----------------------------------------------------------------------------------------------------------


class World:
    """``size`` ranks that train in ``folder``; ``sabotage``: what is called in a rank before, by rank; ``own``: its own flags."""

    def __init__(self, forked, size, folder, *flags, sabotage=(), own=()):
        self.folder = folder
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        sabotage, own = dict(sabotage), dict(own)
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            here, there = forked.Pipe()
            argv = [*TRAIN, "--results-dir", str(folder), *flags, *own.get(rank, ())]
            process = forked.Process(target=child, args=(argv, environment, self.log(rank), there, sabotage.get(rank)))
            process.start()
            there.close()
            here.recv()
            self.processes.append(process)

    def log(self, rank):
        return f"{self.folder}.{rank}.log"

    def told(self, rank):
        return Path(self.log(rank)).read_text(encoding="utf-8")

    def end(self):
        """The exit statuses."""
        deadline = time.monotonic() + 120
        for process in self.processes:
            process.join(timeout=max(0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in hanging:
            self.processes[rank].kill()
        assert not hanging, [self.told(rank)[-2000:] for rank in hanging]
        return [process.exitcode for process in self.processes]

    def complete(self):
        statuses = self.end()
        told = "\n".join(self.told(rank) for rank in range(len(self.processes)))
        assert statuses == [0] * len(self.processes), told
        return self.folder


def wait_for(what, world):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, world.told(0)
        time.sleep(0.02)


def wait_for_checkpoint(world):
    wait_for(lambda: list(world.folder.glob("checkpoints/step-*/manifest.json")), world)


# ---- Where a run ends ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights to start from, none of them zero: a fresh DiT returns zero, whatever its blocks do."""
    model = build_model(TrainConfig(**SIZES), (1, 8, 8))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder, Checkpoint(model.state_dict()))
    return ("--init-from", str(folder))


def brightness(images):
    """Two features of an image."""
    pixels = images.float().flatten(1)
    return torch.stack([pixels.mean(1), pixels.std(1)], dim=1)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Validation losses, a grid, and an evaluation of ten samples, in three batches."""
    reference = tmp_path_factory.mktemp("reference") / "images.npz"
    np.savez(reference, arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8))
    return (
        *("--val-every", "10", "--val-images", "40", "--sample-every", "20", "--sample-steps", "2"),
        *("--eval-every", "20", "--eval-reference", str(reference), "--eval-images", "10"),
        *("--eval-batch-size", "4", "--eval-extractor", f"{__name__}:brightness"),
    )


@pytest.fixture(scope="module")
def alone(forked, weights, watched, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return World(forked, 1, folder, *weights, *watched).complete()


def losses(folder, name="loss"):
    return torch.tensor([row[name] for row in read_metrics(folder / METRICS) if name in row]).double()


def compared(folder):
    """The tensors of model and moving average at the end, without the keys' bias.

    Attention does not change when all keys are moved alike, so that bias has no gradient but rounding, which AdamW turns into
    steps; what it may do shows in the losses.
    """
    found = newest_checkpoint(folder).checkpoint
    assert found.step == STEPS
    tensors = {}
    for part in ("model", "ema"):
        for name, tensor in found.parts[part].items():
            if name.endswith("qkv.bias"):
                tensor = torch.cat([tensor[:HIDDEN], tensor[2 * HIDDEN :]])
            tensors[part, name] = tensor.double()
    return tensors


@pytest.fixture(scope="module")
def tolerance(forked, weights, alone, tmp_path_factory):
    """How far runs of one process that add the same numbers in another order lie from it, as of :func:`distances`.

    One distance for all tensors: whatever a gradient's size, AdamW makes steps of the same size of it.
    """
    folder = tmp_path_factory.mktemp("reordered")
    parts = ("2", "3", "4", "6")
    worlds = [World(forked, 1, folder / part, *weights, "--accumulation", part) for part in parts]
    apart = [distances(world.complete(), alone) for world in worlds]
    return [REORDERING_FACTOR * max(column) for column in zip(*apart, strict=True)]


def distances(folder, other):
    """The largest differences of two runs' weights, losses and gradient norms."""
    mine, theirs = compared(folder), compared(other)
    assert mine.keys() == theirs.keys()
    return (
        max((mine[key] - theirs[key]).abs().max().item() for key in theirs),
        *((losses(folder, name) - losses(other, name)).abs().max().item() for name in ("loss", "grad_norm")),
    )


def assert_as_alone(folder, alone, tolerance):
    apart = distances(folder, alone)
    assert all(found <= allowed for found, allowed in zip(apart, tolerance, strict=True)), (apart, tolerance)


# ---- Against one process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, flags",
    [
        (2, DDP),
        (3, (*DDP, "--accumulation", "2", "--checkpointing", "full")),
        (2, (*FSDP, "--accumulation", "2", "--backend", "torch")),  # biases are left to the next block
        (3, (*FSDP, "--checkpointing", "selective")),
        (4, (*FSDP, "--shard-size", "2", "--optimizer", "fused")),
    ],
    ids=["ddp2", "ddp3", "fsdp2", "fsdp3", "hsdp2x2"],
)
def test_many_processes_train_what_one_does(forked, weights, watched, alone, tolerance, tmp_path, size, flags):
    folder = World(forked, size, tmp_path / "run", *weights, *flags, *watched).complete()
    assert_as_alone(folder, alone, tolerance)
    assert len(losses(folder, "validation_loss")) == 2
    difference = (losses(folder, "validation_loss") - losses(alone, "validation_loss")).abs().max()
    assert difference <= tolerance[1]
    assert (folder / "samples" / "step-00000020.png").exists()
    assert losses(folder, "evaluated_images").tolist() == [10]
    # Here and there a pixel is rounded to its other neighbour.
    assert losses(folder, "fid").item() == pytest.approx(losses(alone, "fid").item(), rel=1e-3)


# ---- A rank dies, the run resumes ------------------------------------------------------------------------------------

# With three ranks the order of a sum depends on how DDP groups gradients; with two it cannot.
SPREAD = pytest.mark.parametrize("size, flags", [(3, DDP), (2, FSDP)], ids=["ddp3", "fsdp2"])


@pytest.fixture(scope="module")
def unbroken(forked, weights, tmp_path_factory):
    """The unbroken run of so many ranks with those flags."""
    made = {}

    def run(size, flags):
        if (size, flags) not in made:
            folder = tmp_path_factory.mktemp("unbroken") / "run"
            made[size, flags] = World(forked, size, folder, *weights, *flags).complete()
        return made[size, flags]

    return run


@SPREAD
def test_where_one_rank_is_killed_the_others_say_so_and_the_run_resumes(forked, weights, unbroken, tmp_path, size, flags):
    folder = tmp_path / "run"
    for victim in (size - 1, 0):
        shutil.rmtree(folder, ignore_errors=True)
        world = World(forked, size, folder, *weights, *flags, sabotage={0: (slow_steps, 0.03)})
        wait_for_checkpoint(world)
        time.sleep(random.Random(victim).uniform(0, 0.2))
        world.processes[victim].kill()
        statuses = world.end()
        assert statuses.pop(victim) == KILLED
        for rank in range(size):
            if rank != victim:
                shown = world.told(rank)
                assert f"ditkernels: error: rank {rank}: another rank is gone" in shown
                assert "--resume auto goes on" in shown
                assert "Traceback" not in shown
        assert statuses == [2] * (size - 1)
        stopped = newest_checkpoint(folder)
        # A rank may be killed while it writes: then there is a folder that never became a checkpoint.
        assert not [path for path in stopped.broken if (path / MANIFEST).exists()]
        assert 0 < stopped.checkpoint.step < STEPS
        world = World(forked, size, folder, *weights, *flags)
        world.complete()
        assert f"resumed from step {stopped.checkpoint.step}" in world.told(0)
        assert_same_end(folder, unbroken(size, flags))


def killed_while_writing(forked, common, folder, rank, number):
    """Whether ``rank`` got as far as its ``number``-th call; then an older checkpoint is whole, or the new one."""
    shutil.copytree(common, folder)
    flags = (*FSDP, "--ckpt-every", "3", "--keep-last", "1", "--steps", "6")
    world = World(forked, 2, folder, *flags, sabotage={rank: (kill_at_call, number)})
    status = world.end()[rank]
    found = newest_checkpoint(folder)
    assert all(not (path / "manifest.json").exists() for path in found.broken)
    assert found.checkpoint.step in (3, 6)
    if status == 0:
        return False
    assert status == KILLED, world.told(rank)
    return True


@pytest.fixture(scope="module")
def common(forked, tmp_path_factory):
    """The first three steps of a run of two ranks."""
    folder = tmp_path_factory.mktemp("common") / "run"
    return World(forked, 2, folder, *FSDP, "--steps", "3").complete()


@pytest.mark.parametrize("rank, number", [(0, 9), (0, 11), (1, 5)])
def test_a_rank_killed_while_it_writes_leaves_a_whole_checkpoint(forked, common, tmp_path, rank, number):
    assert killed_while_writing(forked, common, tmp_path / "run", rank, number)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_every_stage_of_a_write_leaves_a_whole_checkpoint(forked, common, tmp_path, rank):
    number = 0
    while killed_while_writing(forked, common, tmp_path / str(number), rank, number):
        number += 1
    assert 6 < number < 60


def test_a_rank_that_hangs_ends_the_run(forked, tmp_path):
    world = World(forked, 2, tmp_path / "run", "--collective-timeout", "3", sabotage={0: (slow_steps, 0.05)})
    wait_for_checkpoint(world)
    os.kill(world.processes[1].pid, signal.SIGSTOP)
    world.processes[0].join(timeout=30)
    ended = world.processes[0].exitcode
    world.processes[1].kill()
    assert world.end() == [2, KILLED]
    assert ended == 2, "it waited for the other to die"
    assert "another rank is gone or does not answer" in world.told(0)


# ---- Resumed by another number of ranks ------------------------------------------------------------------------------


def test_a_run_goes_on_with_another_number_of_ranks(forked, weights, alone, tolerance, tmp_path):
    folder = tmp_path / "run"
    World(forked, 2, folder, *weights, *FSDP, "--steps", "7").complete()
    World(forked, 3, folder, *FSDP, "--steps", "13").complete()
    World(forked, 2, folder, *DDP, "--steps", "16").complete()
    World(forked, 1, folder).complete()
    assert_as_alone(folder, alone, tolerance)


# ---- Checkpoints in pieces -------------------------------------------------------------------------------------------


def test_a_consolidated_checkpoint_holds_the_same_and_goes_on(forked, unbroken, tmp_path, capsys):
    run, out = unbroken(2, FSDP), tmp_path / "out"
    assert main(["consolidate", str(run), str(out)]) == 0
    pieces, whole = newest_checkpoint(run).checkpoint, load_checkpoint(out)
    assert sorted(path.name.split("-")[0] for path in out.iterdir()) == [
        *("ema", "manifest.json", "model", "optimizer"),
    ]
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["format_version"] == 1
    assert (pieces.step, pieces.config, pieces.state) == (whole.step, whole.config, whole.state)
    for part, tensors in pieces.parts.items():
        assert all(torch.equal(tensor, whole.parts[part][name]) for name, tensor in tensors.items())
        assert tensors.keys() == whole.parts[part].keys()
    assert load_model(run).digest == load_model(out).digest
    World(forked, 1, tmp_path / "run", "--resume", str(out), "--steps", "21").complete()
    assert main(["consolidate", str(run), str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path / "nothing"), str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_each_rank_holds_and_writes_its_share(unbroken):
    newest = checkpoints_of(unbroken(2, FSDP))[STEPS]
    sizes = sorted(path.stat().st_size for path in newest.glob("optimizer-*"))
    assert len(sizes) == 2
    # Tensors with an odd number of rows, and AdamW's step counts, lie with the first.
    assert sizes[0] > 0.9 * sizes[1]


@pytest.mark.parametrize("damage", [flip_a_bit, os.unlink])
def test_a_missing_or_altered_shard_is_named_and_passed_over(forked, unbroken, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(unbroken(2, FSDP), folder)
    newest = checkpoints_of(folder)[STEPS]
    (victim,) = newest.glob("ema-00001-of-00002-*")
    damage(victim)
    with pytest.raises(CheckpointError, match=victim.name):
        load_checkpoint(newest)
    world = World(forked, 2, folder, *FSDP)
    world.complete()
    shown = world.told(0)
    assert "passed over a broken checkpoint" in shown
    assert victim.name in shown
    assert "resumed from step 16" in shown
    assert "resumed" not in world.told(1)
    assert_same_end(folder, unbroken(2, FSDP))


def test_a_tensor_of_which_a_piece_is_not_listed_is_named(unbroken, tmp_path):
    shutil.copytree(checkpoints_of(unbroken(2, FSDP))[STEPS], tmp_path / "cut")
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["model"]["shards"][1]["rows"]["final_layer.linear.weight"]
    del manifest["sha256"]
    digest = json_sha256(manifest)
    (tmp_path / "cut" / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"does not list all of tensor 'final_layer\.linear\.weight'"):
        load_checkpoint(tmp_path / "cut")


def limit_files(size):
    """Later writes of more than ``size`` bytes find the disk full."""
    genuine = Trainer.checkpoint

    def checkpoint(self, *args):
        if self.step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return genuine(self, *args)

    Trainer.checkpoint = checkpoint


def test_where_one_ranks_disk_is_full_all_end_and_the_old_checkpoint_survives(forked, tmp_path):
    folder = tmp_path / "run"
    world = World(forked, 2, folder, *FSDP, sabotage={1: (limit_files, 20_000)})
    assert world.end() == [2, 2]
    assert "rank 1: " in world.told(1)
    assert "could not be written" in world.told(1)
    found = newest_checkpoint(folder)
    assert found.checkpoint.step == 4
    left = [path.name for path in folder.rglob("*") if ".tmp" in path.name or path.stat().st_size == 20_000]
    assert left == []


def test_what_fails_on_one_peer_is_raised_on_all():
    def fail():
        raise OSError("the disk is full")

    other = Peers(1, 2, lambda mine: [(None, "no space"), mine])
    with pytest.raises(OSError, match="rank 0: no space; rank 1: the disk is full"):
        other.all_do(fail)
    assert Peers(0, 2, lambda mine: [mine, (5, None)]).all_do(lambda: 4) == [4, 5]


# ---- One decision for all --------------------------------------------------------------------------------------------


def record_digests(bad_step):
    """On this rank loss and gradient are NaN at ``bad_step``, and the loss alone two steps later; at every checkpoint it prints a
    digest of all its tensors."""
    genuine_loss, genuine_checkpoint = Trainer._loss, Trainer.checkpoint

    def loss(self, images, labels, step, positions):
        found = genuine_loss(self, images, labels, step, positions)
        if bad_step is not None and step in (bad_step, bad_step + 2):
            return found * float("nan") if step == bad_step else found + float("nan")
        return found

    def checkpoint(self, log):
        made = genuine_checkpoint(self, log)
        digest = hashlib.sha256()
        for tensors in made.parts.values():
            for tensor in tensors.values():
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                digest.update(whole.detach().numpy().tobytes())
        print(f"digest {self.step} {digest.hexdigest()}", flush=True)
        return made

    Trainer._loss, Trainer.checkpoint = loss, checkpoint


@SPREAD
def test_a_nan_on_one_rank_is_skipped_by_all(forked, weights, tmp_path, size, flags):
    sabotage = {rank: (record_digests, 4 if rank == 1 else None) for rank in range(size)}
    often = ("--ckpt-every", "1", "--keep-last", "10", "--steps", "8")
    world = World(forked, size, tmp_path / "run", *weights, *flags, *often, sabotage=sabotage)
    folder = world.complete()
    digests = [[line for line in world.told(rank).splitlines() if line.startswith("digest")] for rank in range(size)]
    assert len(set(digests[0])) == 8
    assert all(found == digests[0] for found in digests)
    assert [row["skipped"] for row in read_metrics(folder / METRICS)] == [0, 0, 0, 0, 1, 1, 2, 2]
    before, after, later, latest = (load_checkpoint(checkpoints_of(folder)[step]) for step in (4, 5, 6, 7))
    for one, other in ((before, after), (later, latest)):
        for part in ("model", "optimizer"):
            pairs = [(tensor, other.parts[part][name]) for name, tensor in one.parts[part].items()]
            assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(after.model["blocks.0.mlp.fc1.weight"], later.model["blocks.0.mlp.fc1.weight"])


@SPREAD
def test_a_signal_to_one_rank_stops_all_after_the_same_step(forked, weights, unbroken, tmp_path, size, flags):
    folder = tmp_path / "run"
    # After a checkpoint there is no step that the host has yet to hear of.
    often = ("--num-workers", "1", "--ckpt-every", "1" if flags == FSDP else "4")
    world = World(forked, size, folder, *weights, *flags, *often, sabotage={0: (slow_steps, 0.05)})
    wait_for_checkpoint(world)
    # To the group, workers included, and twice, as a scheduler and torchrun would.
    for _ in range(2):
        os.killpg(world.processes[1].pid, signal.SIGTERM)
        time.sleep(0.02)
    assert world.end() == [128 + signal.SIGTERM] * size, world.told(0)
    stopped = newest_checkpoint(folder).checkpoint.step
    assert stopped < STEPS
    assert f"stopped by SIGTERM; {checkpoints_of(folder)[stopped]} is whole" in world.told(0)
    assert "stopped" not in world.told(1)
    World(forked, size, folder, *weights, *flags).complete()
    assert_same_end(folder, unbroken(size, flags))


def count_synchronisations():
    """Prints what makes the host wait for a device in a steady step, as on a GPU, where the device checks labels and timesteps."""
    from ditkernels import reference
    from ditkernels.diffusion import gaussian

    reference.check_labels = gaussian.check_timesteps = lambda *_: None
    genuine = Trainer.train_step

    def train_step(self, batch, step, *rest):
        if step == 0:
            return genuine(self, batch, step, *rest)
        with CountSynchronisations() as counted:
            scalars = genuine(self, batch, step, *rest)
        print(f"synchronisations {counted.found}", flush=True)
        return scalars

    Trainer.train_step = train_step


@SPREAD
def test_the_steady_step_of_many_makes_no_host_synchronisation(forked, tmp_path, size, flags):
    sabotage = dict.fromkeys(range(size), (count_synchronisations,))
    world = World(forked, size, tmp_path / "run", *flags, "--steps", "3", "--grad-clip", "1", sabotage=sabotage)
    world.complete()
    assert all(world.told(rank).count("synchronisations []") == 2 for rank in range(size)), world.told(0)


def test_only_the_first_rank_talks(unbroken):
    folder = unbroken(3, DDP)
    assert Path(f"{folder}.0.log").read_text(encoding="utf-8").count("images/s") == STEPS
    assert Path(f"{folder}.1.log").read_text(encoding="utf-8") == ""
    assert [row["step"] for row in read_metrics(folder / METRICS)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "flags, own, message",
    [
        (
            (),
            ("--learning-rate", "0.5", "--parallel", "fsdp"),
            "the ranks disagree: parallel: 'ddp' on rank 0, 'fsdp' on rank 1; learning_rate|"
            "the ranks disagree: learning_rate: 0.001 on rank 0, 0.5 on rank 1; parallel: 'ddp' on rank 0, 'fsdp' on rank 1",
        ),
        (
            ("--global-batch-size", "12", "--accumulation", "4"),
            (),
            "global_batch_size: got 12, which is no multiple of 2 processes x accumulation 4",
        ),
        (
            (*FSDP, "--shard-size", "3"),
            (),
            "shard_size: got 3, which does not divide the number of processes, 2",
        ),
        ((), ("--resume", "none"), "the ranks disagree: resume: 'auto' on rank 0, 'none' on rank 1"),
    ],
    ids=["config", "batch", "shard_size", "resume"],
)
def test_what_does_not_fit_is_said_before_the_first_step(forked, tmp_path, flags, own, message):
    world = World(forked, 2, tmp_path / "run", *flags, own={1: own})
    assert world.end() == [2, 2]
    for rank in range(2):
        shown = world.told(rank)
        assert any(one in shown for one in message.split("|")), shown
        assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_ranks_that_read_other_data_are_told_apart(forked, pictures, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pictures[1], other)
    (other / "b").rename(other / "c")
    (other / "a" / "0.png").unlink()
    world = World(forked, 2, tmp_path / "run", *pictures, own={1: ("--data-path", str(other))})
    assert world.end() == [2, 2]
    for rank in range(2):
        assert "the ranks disagree: data_length: 8 on rank 0, 7 on rank 1; class_to_idx: " in world.told(rank)
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_settings_is_refused_by_all(forked, unbroken):
    world = World(forked, 2, unbroken(2, FSDP), "--weight-decay", "0.1")
    assert world.end() == [2, 2]
    assert all("weight_decay: 0.0 there, 0.1 here" in world.told(rank) for rank in range(2))
    world = World(forked, 2, unbroken(2, FSDP), "--resume", "none")
    assert world.end() == [2, 2]
    assert all("holds a run" in world.told(rank) for rank in range(2))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight images of two classes; one of each cannot be read."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    for label in ("a", "b"):
        (root / label).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8), (number * 60, 0, 0)).save(root / label / f"{number}.png")
    for number in (1, 2):
        (root / ("a", "b")[number - 1] / "2.png").write_bytes(b"not an image")
    return ("--data-path", str(root), "--global-batch-size", "8", "--steps", "6", "--ckpt-every", "2")


def test_unreadable_images_are_counted_over_all_ranks(forked, pictures, tmp_path):
    world = World(forked, 2, tmp_path / "few", *pictures, "--max-unreadable", "1")
    assert world.end() == [2, 2]
    assert all("unreadable images: got 2, allowed are 1" in world.told(rank) for rank in range(2))
    # In one step each rank sees one of the two.
    world = World(forked, 2, tmp_path / "enough", *pictures, "--max-unreadable", "4", "--steps", "1")
    recorded = newest_checkpoint(world.complete()).checkpoint.state["unreadable"]
    assert [Path(path).relative_to(pictures[1]) for path in recorded] == [Path("a/2.png"), Path("b/2.png")]


# ---- What a rank is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, parts", [(1, 1), (1, 3), (2, 1), (3, 2), (2, 6)])
def test_ranks_share_every_part_of_the_batch(size, parts):
    shares = []
    for rank in range(size):
        shares.append(Parallel(Among(rank, size)).positions(12, parts))
    for number, part in enumerate(torch.arange(12).chunk(parts)):
        together = torch.cat([share.chunk(parts)[number] for share in shares])
        assert torch.equal(together, part)


def test_a_rank_reads_its_own_images_alone():
    data = LabelledImages(torch.arange(40.0).reshape(40, 1, 1, 1), torch.arange(40))
    batches = InMemoryBatches(data, 12, 3)
    mine = ManyRanks.batches(Parallel(Among(1, 3)), batches, 12, 2)[5]
    assert torch.equal(mine.labels, batches[5].labels[[2, 3, 8, 9]])
    assert torch.equal(mine.images.flatten(), mine.labels.float())


def test_alone_no_process_group_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: pytest.fail("a group was made"))
    assert main([*TRAIN, "--results-dir", str(tmp_path / "run"), "--steps", "1", *FSDP]) == 0


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def set_variables(monkeypatch, **changes):
    """Those that torchrun sets for rank 1 of 4, but for ``changes``; None takes one away."""
    right = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (right | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("two_gpus")
def test_each_rank_takes_the_gpu_of_its_local_rank(monkeypatch):
    assert local_device("cuda:1") == "cuda:1"
    set_variables(monkeypatch)
    assert [local_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="device: got 'cuda:0', allowed with several processes"):
        local_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU, it has 2"):
        local_device("auto")


WRONG = [
    ("WORLD_SIZE", None, "it is missing, allowed is a whole number, 1 or more"),
    ("WORLD_SIZE", "", "got '', allowed is a whole number, 1 or more"),
    ("WORLD_SIZE", "four", "got 'four', allowed is a whole number, 1 or more"),
    ("WORLD_SIZE", "-4", "got '-4', allowed is 1 or more"),
    ("RANK", None, "it is missing, allowed is a whole number, 0..3, for WORLD_SIZE is 4"),
    ("RANK", "4", "got '4', allowed is 0..3, for WORLD_SIZE is 4"),
    ("RANK", "-1", "got '-1', allowed is 0..3, for WORLD_SIZE is 4"),
    ("LOCAL_RANK", None, "it is missing, allowed is a whole number, 0..3, for WORLD_SIZE is 4"),
    ("LOCAL_RANK", "1.0", "got '1.0', allowed is a whole number, 0..3, for WORLD_SIZE is 4"),
    ("MASTER_ADDR", None, "it is missing, allowed is a name or an address of the machine of rank 0"),
    ("MASTER_ADDR", "", "got '', allowed is a name or an address of the machine of rank 0"),
    ("MASTER_PORT", None, "it is missing, allowed is a whole number, 1..65535"),
    ("MASTER_PORT", "65536", "got '65536', allowed is 1..65535"),
]
COMMANDS = {
    "train": [*TRAIN, "--device", "auto"],
    "sample": ["sample", "no checkpoint"],
    "encode": ["encode", "--data-path", "nowhere", "--out", "nowhere", "--image-size", "8"],
}


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name, value, told", WRONG)
def test_what_torchrun_should_have_said_is_named(monkeypatch, capsys, tmp_path, command, name, value, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: pytest.fail("a group was made"))
    set_variables(monkeypatch, **{name: value})
    assert main(COMMANDS[command]) == 2
    assert capsys.readouterr().err == f"ditkernels: error: environment variable {name}: {told}; torchrun sets it\n"


def test_a_single_process_needs_no_more_than_its_size(monkeypatch):
    assert place() == (1, 0, 0)
    for alone in ({}, {"RANK": "0"}, {"RANK": "0", "LOCAL_RANK": "0"}):
        nothing = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
        set_variables(monkeypatch, **{**nothing, "WORLD_SIZE": "1", **alone})
        assert place() == (1, 0, 0)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=r"RANK: got '1', allowed is 0\.\.0, for WORLD_SIZE is 1"):
        place()


def test_an_error_that_is_not_of_the_connection_keeps_its_name(monkeypatch):
    assert distributed_module._LOST.search("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    assert not distributed_module._LOST.search("mat1 and mat2 shapes cannot be multiplied (4x3 and 5x6)")


def test_shard_size_is_for_fsdp():
    with pytest.raises(ValueError, match="shard_size: got 2, allowed with parallel fsdp only"):
        TrainConfig(shard_size=2)


def test_many_ranks_take_a_signal_once():
    with StopSignal(once=True) as stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert stop.number == signal.SIGTERM


# ---- torchrun --------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(port, log, folder, *flags):
    """A node of two, with one process."""
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}")
    patience = ("--shutdown-timeout", "60") if hasattr(LaunchConfig, "shutdown_timeout") else ()
    node = (*launcher, *rendezvous, *patience, "--local-addr", "127.0.0.1", "-m", "ditkernels")
    command = [sys.executable, *node, *TRAIN, "--results-dir", str(folder), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(log, "w", encoding="utf-8") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


def test_two_nodes_train_what_two_ranks_do_and_a_launchers_sigterm_stops_both(forked, weights, tmp_path):
    folder, port = tmp_path / "run", free_port()
    flags = (*weights, *FSDP, "--steps", "100000", "--ckpt-every", "5", "--keep-every", "20")
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    nodes = [torchrun(port, log, folder, *flags) for log in logs]
    try:
        deadline = time.monotonic() + 120
        while not (checkpoints_of(folder).get(STEPS, folder) / "manifest.json").exists():
            assert time.monotonic() < deadline, [log.read_text(encoding="utf-8")[-2000:] for log in logs]
            assert all(node.poll() is None for node in nodes), [log.read_text(encoding="utf-8")[-2000:] for log in logs]
            time.sleep(0.1)
        nodes[1].send_signal(signal.SIGTERM)
        assert all(node.wait(timeout=60) != 0 for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    told = "".join(log.read_text(encoding="utf-8") for log in logs)
    newest = list(checkpoints_of(folder))[-1]
    assert f"stopped by SIGTERM; {checkpoints_of(folder)[newest]} is whole" in told
    mine = load_checkpoint(checkpoints_of(folder)[STEPS])
    there = World(forked, 2, tmp_path / "forked", *weights, *FSDP).complete()
    theirs = load_checkpoint(checkpoints_of(there)[STEPS])
    assert all(torch.equal(mine.model[name], theirs.model[name]) for name in theirs.model)


def alone_under_torchrun(log, folder, *flags, launcher=()):
    """torchrun with one process, as a job of its own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        *launcher,
        "-m",
        "ditkernels",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w", encoding="utf-8") as out:
        return subprocess.Popen([*command, *TRAIN, "--results-dir", str(folder), *flags], stdout=out, stderr=out, env=environment)


def test_torchrun_hands_on_sigusr1_where_it_is_told_to(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = ("--steps", "100000", "--ckpt-every", "5")
    job = alone_under_torchrun(log, folder, *flags, launcher=("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"))
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("checkpoints/step-*/manifest.json")):
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-2000:]
            assert job.poll() is None, log.read_text(encoding="utf-8")[-2000:]
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) != 0
    finally:
        job.kill()
    newest = checkpoints_of(folder)[max(checkpoints_of(folder))]
    assert f"stopped by SIGUSR1; {newest} is whole" in log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_torchruns_summary_shows_the_error(tmp_path):
    log = tmp_path / "log"
    job = alone_under_torchrun(log, tmp_path / "run", "--steps", "1", "--ckpt-every", "1", "--image-size", "9")
    assert job.wait(timeout=120) != 0
    summary = log.read_text(encoding="utf-8").split("FAILED")[-1]
    assert "image_size: got 9, the digits have 8" in summary
    assert "exitcode  : 2" in summary


# ---- Other models, other precisions ----------------------------------------------------------------------------------


# Reduced precisions round products of the same samples alike; only sums over samples differ, in their last places.
LAST_PLACES = {"fp32": 1e-5, "fp16": 2**-11, "bf16": 2**-8}
MADE_OF = [
    ("bf16", ()),
    ("fp32", ("--conditioning", "in_context", "--grad-clip", "0.1")),
    *(
        pytest.param(precision, flags, marks=pytest.mark.slow)
        for precision, flags in [
            ("fp32", ("--conditioning", "adaln")),
            ("fp32", ("--conditioning", "cross_attention")),
            ("fp32", ("--unconditional", "--label-dropout", "0")),
            ("bf16", ("--conditioning", "in_context", "--residual-dtype", "fp32")),
            ("fp16", ("--grad-clip", "1", "--accumulation", "2")),
            ("fp32", ("--compile",)),
            ("fp32", ("--compile", "--checkpointing", "full", "--accumulation", "2")),
        ]
    ),
]


@pytest.mark.parametrize("parallel", [DDP, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("precision, flags", MADE_OF)
def test_whatever_a_model_is_made_of_two_ranks_train_it_as_one_does(forked, tmp_path, precision, flags, parallel):
    short = ("--steps", "5", "--learning-rate", "1e-2", "--precision", precision)
    lone = World(forked, 1, tmp_path / "lone", *short, *flags)
    pair = World(forked, 2, tmp_path / "pair", *short, *flags, *parallel)
    expected, found = losses(lone.complete()), losses(pair.complete())
    assert len(found) == 5
    assert (found - expected).abs().max() <= LAST_PLACES[precision] * expected.max()


def test_master_weights_of_two_ranks_are_those_of_fp32_weights(forked, weights, tmp_path):
    flags = (*DDP, "--precision", "bf16", "--optimizer", "fused", "--grad-clip", "0.5")
    for parts in ("1", "3"):
        plain = World(forked, 2, tmp_path / f"plain-{parts}", *weights, *flags, "--accumulation", parts)
        masters = World(forked, 2, tmp_path / parts, *weights, *flags, "--accumulation", parts, "--master-weights")
        assert_same_end(masters.complete(), plain.complete())


def build_others():
    """Lets a rank begin with weights of its own."""
    genuine = trainer.build_model

    def build_model(*args):
        model = genuine(*args)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1)
        return model

    trainer.build_model = build_model


def test_masters_and_average_of_all_ranks_begin_as_the_first_ones(forked, tmp_path):
    flags = (*DDP, "--precision", "bf16", "--optimizer", "fused", "--master-weights")
    short = (*flags, "--steps", "3", "--val-every", "3", "--val-images", "40")
    alike = World(forked, 2, tmp_path / "alike", *short).complete()
    mixed = World(forked, 2, tmp_path / "mixed", *short, sabotage={1: (build_others,)}).complete()
    assert_same_end(mixed, alike)
    assert torch.equal(losses(mixed, "validation_loss"), losses(alike, "validation_loss"))
