"""A run that is killed, stopped or finds its checkpoints damaged goes on and ends bit for bit where an unbroken one does.

Training runs in processes forked from a server that has imported everything, so that fifty of them take seconds.
"""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # an optimizer imports it when it is made
from sklearn.datasets import load_digits as _warm  # noqa: F401 (the server imports this module once for all)

from ditkernels.checkpoints.format import load_checkpoint, save_checkpoint
from ditkernels.checkpoints.run import CONFIG, ENVIRONMENT, LOG, checkpoints_of
from ditkernels.checkpoints.writer import CheckpointWriter
from ditkernels.cli import main
from ditkernels.data.order import ShuffledStream
from ditkernels.files import FolderInUseError, FolderLock
from ditkernels.ops import _native
from ditkernels.rng import permutation
from ditkernels.training import trainer  # noqa: F401 (likewise)
from ditkernels.training.config import TrainConfig
from ditkernels.training.optimizer import resolved
from tests.helpers.forked import assert_same_end, child, rows
from tests.helpers.runs import newest_checkpoint
from tests.helpers.sabotage import KILLED, flip_a_bit, kill_at_call, slow_reads, slow_steps

STEPS = 10
TRAIN = [
    *("train", "--data-path", "digits", "--vae", "none", "--image-size", "8", "--num-classes", "10"),
    *("--model", "DiT-S/2", "--hidden-size", "16", "--depth", "1", "--num-heads", "2", "--steps", str(STEPS)),
    *("--global-batch-size", "4", "--learning-rate", "1e-2", "--ema-decay", "0.9", "--num-workers", "0"),
    *("--device", "cpu", "--log-every", "3", "--resume", "auto", "--ckpt-every", "2", "--keep-last", "2"),
]


# ---- Processes -------------------------------------------------------------------------------------------------------


def start(context, folder, *flags, sabotage=None):
    here, there = context.Pipe()
    argv = [*TRAIN, "--results-dir", str(folder), *flags]
    process = context.Process(target=child, args=(argv, {}, f"{folder}.log", there, sabotage))
    process.start()
    there.close()
    here.recv()
    return process


def finish(process):
    process.join(timeout=120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def complete(context, folder, *flags, sabotage=None):
    return finish(start(context, folder, *flags, sabotage=sabotage))


def told(folder):
    return Path(f"{folder}.log").read_text(encoding="utf-8")


# ---- Where a run ends ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(forked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert complete(forked, folder) == 0
    last = newest_checkpoint(folder).checkpoint
    assert (last.step, last.parts.keys()) == (STEPS, {"model", "ema", "optimizer"})
    return folder


# ---- Killed ----------------------------------------------------------------------------------------------------------


def test_killed_at_fifty_random_moments_it_ends_where_an_unbroken_run_does(forked, unbroken, tmp_path):
    begin = time.perf_counter()
    assert complete(forked, tmp_path / "clock") == 0
    duration = time.perf_counter() - begin
    moments = random.Random(0)
    kills = ended = 0
    while kills < 50:
        folder = tmp_path / str(ended)
        while True:
            process = start(forked, folder)
            process.join(timeout=moments.uniform(0, duration))
            if process.exitcode is None:
                process.kill()
            if finish(process) == 0:
                break
            assert process.exitcode == KILLED, told(folder)
            kills += 1
            if kills == 50:
                assert complete(forked, folder) == 0, told(folder)
                break
        assert_same_end(folder, unbroken)
        ended += 1


def killed_with_workers(context, folder, moment):
    """Kills a run while its four workers read, sees its folder free within a second, and lets it end."""
    process = start(context, folder, "--num-workers", "4", sabotage=(slow_reads, 1.0, 0))
    process.join(timeout=moment)
    process.kill()
    assert finish(process) == KILLED, told(folder)
    time.sleep(1)
    FolderLock(folder).release()


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_with_four_workers_its_folder_is_free_within_a_second(forked, unbroken, tmp_path, kills):
    moments = random.Random(0)
    for number in range(kills):
        killed_with_workers(forked, tmp_path / str(number), moments.uniform(0.1, 2.0))
        assert complete(forked, tmp_path / str(number)) == 0, told(tmp_path / str(number))
        assert_same_end(tmp_path / str(number), unbroken)


def test_killed_in_the_middle_of_a_read_its_folder_is_free_at_once(forked, tmp_path):
    folder = tmp_path / "run"
    process = start(forked, folder, "--num-workers", "4", sabotage=(slow_reads, 20, 4))
    wait_for_step(folder)
    process.kill()
    assert finish(process) == KILLED
    time.sleep(1)
    lock = FolderLock(folder)
    with pytest.raises(FolderInUseError):
        FolderLock(folder)
    lock.release()


# ---- One owner -------------------------------------------------------------------------------------------------------


def test_a_second_training_in_a_folder_is_refused_by_name_of_the_first(forked, tmp_path, capsys):
    folder = tmp_path / "run"
    process = start(forked, folder, sabotage=(slow_steps, 0.3))
    wait_for_step(folder)
    assert main([*TRAIN, "--results-dir", str(folder)]) == 2
    assert f"{folder} is in use by process {process.pid} on " in capsys.readouterr().err
    assert finish(process) == 0


def test_a_start_that_fails_leaves_nothing(unbroken, tmp_path, capsys):
    assert main([*TRAIN, "--results-dir", str(tmp_path / "new/run"), "--image-size", "9"]) == 2
    assert list(tmp_path.iterdir()) == []
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    assert main([*TRAIN, "--results-dir", str(unbroken), "--global-seed", "9"]) == 2
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()} == before


def test_a_run_tells_its_settings_and_goes_on_from_them(unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    told_before = (folder / LOG).read_text(encoding="utf-8")
    assert "starting at step 0" in told_before
    assert "step 10/10" in told_before
    command = ["train", "--config", str(folder / CONFIG), "--results-dir", str(folder), "--steps", "12"]
    assert main(command) == 0
    assert "resumed from step 10" in (folder / LOG).read_text(encoding="utf-8").removeprefix(told_before)
    assert newest_checkpoint(folder).checkpoint.step == 12
    assert json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))["host"]


def test_with_master_weights_a_killed_run_ends_where_one_without_them_does(forked, tmp_path):
    flags = ("--precision", "bf16", "--optimizer", "fused")
    assert complete(forked, tmp_path / "plain", *flags) == 0
    flags = (*flags, "--master-weights")
    begin = time.perf_counter()
    assert complete(forked, tmp_path / "unbroken", *flags) == 0
    duration = time.perf_counter() - begin
    assert_same_end(tmp_path / "unbroken", tmp_path / "plain")
    moments = random.Random(0)
    kills = ended = 0
    while kills < 3:
        folder = tmp_path / str(ended)
        while kills < 3:
            process = start(forked, folder, *flags)
            process.join(timeout=moments.uniform(0, duration))
            if process.exitcode is None:
                process.kill()
            if finish(process) == 0:
                break
            assert process.exitcode == KILLED, told(folder)
            kills += 1
        assert complete(forked, folder, *flags) == 0, told(folder)
        assert_same_end(folder, tmp_path / "plain")
        ended += 1


def test_killed_in_every_stage_of_a_checkpoint_write_it_ends_where_an_unbroken_run_does(forked, unbroken, tmp_path):
    # The first three steps are common to all. The second checkpoint removes the first.
    common = tmp_path / "common"
    flags = ("--ckpt-every", "3", "--keep-last", "1")
    assert complete(forked, common, *flags, "--steps", "3") == 0
    for number in range(200):
        folder = tmp_path / str(number)
        shutil.copytree(common, folder)
        status = complete(forked, folder, *flags, "--steps", "6", sabotage=(kill_at_call, number))
        if status == 0:
            break
        assert status == KILLED, told(folder)
        found = newest_checkpoint(folder)
        assert not found.broken or all(not (path / "manifest.json").exists() for path in found.broken)
        assert found.checkpoint.step in (3, 6)
        assert complete(forked, folder) == 0, told(folder)
        assert_same_end(folder, unbroken)
    assert 12 < number < 60


# ---- Stopped ---------------------------------------------------------------------------------------------------------


def wait_for_step(folder):
    """Waits until a checkpoint shows that the loop is running."""
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline, told(folder)
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_sets_the_status(forked, unbroken, tmp_path, number):
    folder = tmp_path / "run"
    process = start(forked, folder, "--num-workers", "2", sabotage=(slow_steps, 0.2))
    wait_for_step(folder)
    os.killpg(process.pid, number)
    assert finish(process) == 128 + number
    assert f"stopped by {number.name}" in told(folder)
    stopped = newest_checkpoint(folder).checkpoint.step
    assert 2 <= stopped < STEPS
    assert complete(forked, folder) == 0
    assert f"resumed from step {stopped}" in told(folder)
    assert_same_end(folder, unbroken)


def test_a_second_signal_exits_at_once(forked, tmp_path):
    folder = tmp_path / "run"
    process = start(forked, folder, "--ckpt-every", "1", sabotage=(slow_steps, 1.0))
    wait_for_step(folder)
    steps = set(checkpoints_of(folder))
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    begin = time.monotonic()
    assert finish(process) == 128 + signal.SIGINT
    assert time.monotonic() - begin < 0.7
    assert set(checkpoints_of(folder)) == steps


# ---- Damaged, another run's, a full disk -----------------------------------------------------------------------------


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
@pytest.mark.parametrize("pattern", ["model-*", "ema-*", "optimizer-*", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_and_said(forked, unbroken, tmp_path, damage, pattern):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (victim,) = checkpoints_of(folder)[STEPS].glob(pattern)
    damage(victim)
    assert complete(forked, folder) == 0
    shown = told(folder)
    assert "passed over a broken checkpoint" in shown
    assert victim.name in shown
    assert "resumed from step 8" in shown
    assert_same_end(folder, unbroken)


def test_a_run_without_a_whole_checkpoint_starts_over(forked, unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    for path in checkpoints_of(folder).values():
        flip_a_bit(path / "manifest.json")
    assert complete(forked, folder) == 0
    assert "starting at step 0" in told(folder)
    assert len(list(folder.glob("checkpoints/broken-step-*"))) == 2
    assert_same_end(folder, unbroken)


def limit_files(size, step):
    """When the checkpoint of ``step`` is to be written, a file of more than ``size`` bytes finds the disk full."""
    genuine = CheckpointWriter.save

    def save(self, checkpoint):
        if checkpoint.step == step:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        genuine(self, checkpoint)

    CheckpointWriter.save = save


def test_on_a_full_disk_the_old_checkpoint_survives(forked, unbroken, tmp_path):
    folder = tmp_path / "run"
    assert complete(forked, folder, sabotage=(limit_files, 20_000, 6)) == 2
    shown = told(folder)
    assert "error: " in shown
    assert "could not be written" in shown
    assert "Traceback" not in shown
    found = newest_checkpoint(folder)
    assert found.checkpoint.step == 4
    left = [path.name for path in folder.rglob("*") if ".tmp" in path.name or path.stat().st_size == 20_000]
    assert left == []
    assert complete(forked, folder) == 0
    assert_same_end(folder, unbroken)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--global-seed", "3", "--no-flip"), "flip: True there, False here; global_seed: 0 there, 3 here"),
        (("--hidden-size", "32"), "hidden_size: 16 there, 32 here"),
        (("--unconditional", "--label-dropout", "0"), "class_to_idx: other data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(unbroken, tmp_path, capsys, flags, message):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    before = rows(folder)
    assert main([*TRAIN, "--results-dir", str(folder), *flags]) == 2
    shown = capsys.readouterr().err
    assert "is of another run" in shown
    assert message in shown
    assert rows(folder) == before


def test_how_a_run_is_watched_and_how_long_it_is_may_change(unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    flags = ("--steps", "12", "--ckpt-every", "5", "--log-every", "1", "--keep-last", "1")
    assert main([*TRAIN, "--results-dir", str(folder), *flags]) == 0
    assert newest_checkpoint(folder).checkpoint.step == 12
    assert main([*TRAIN, "--results-dir", str(folder), "--lr-schedule", "cosine"]) == 2
    assert "lr_schedule" in capsys.readouterr().err


def test_another_recipe_is_refused_until_it_is_named(unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    run = [*TRAIN, "--results-dir", str(folder), "--steps", "12", "--learning-rate", "0.5", "--grad-clip", "1"]
    assert main([*run, "--override", "grad_clip"]) == 2
    shown = capsys.readouterr().err
    assert "another recipe: learning_rate: 0.01 there, 0.5 here; --override grad_clip,learning_rate goes on by this one" in shown
    assert main([*run, "--override", "grad_clip,learning_rate"]) == 0
    shown = capsys.readouterr().out
    assert "from step 10 on: learning_rate 0.5, was 0.01" in shown
    assert "from step 10 on: grad_clip 1.0, was None" in shown
    assert "bits may differ" not in shown
    assert newest_checkpoint(folder).checkpoint.config["training"]["learning_rate"] == 0.5
    assert main([*TRAIN, "--results-dir", str(folder), "--steps", "13", "--learning-rate", "0.5", "--grad-clip", "1"]) == 0


def test_how_long_a_run_is_belongs_to_the_recipe_where_the_rate_depends_on_it(tmp_path, capsys):
    run = [*TRAIN, "--results-dir", str(tmp_path / "run"), "--lr-schedule", "cosine"]
    assert main([*run, "--steps", "4"]) == 0
    assert main([*run, "--steps", "6"]) == 2
    assert "steps: 4 there, 6 here; --override steps" in capsys.readouterr().err
    assert main([*run, "--steps", "6", "--override", "steps"]) == 0


def test_how_it_is_computed_may_change_and_that_is_said(unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    assert main([*TRAIN, "--results-dir", str(folder), "--steps", "12", "--accumulation", "2", "--precision", "bf16"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "bits may differ" in line]
    assert line == "from step 10 on bits may differ: accumulation: 1 there, 2 here; precision: 'fp32' there, 'bf16' here"


def test_where_fp16_begins_its_loss_scale_is_fresh(unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    assert newest_checkpoint(folder).checkpoint.state["loss_scale"] is None
    assert main([*TRAIN, "--results-dir", str(folder), "--steps", "11", "--precision", "fp16"]) == 0
    assert newest_checkpoint(folder).checkpoint.state["loss_scale"]["value"] in (2.0**16, 2.0**15)


def test_another_batch_size_neither_repeats_nor_skips_an_image(tmp_path, monkeypatch):
    seen, genuine = [], ShuffledStream.batch

    def batch(self, step):
        seen.extend(genuine(self, step).tolist())
        return genuine(self, step)

    monkeypatch.setattr(ShuffledStream, "batch", batch)
    run = [*TRAIN, "--results-dir", str(tmp_path / "run")]
    assert main([*run, "--steps", "3"]) == 0
    for size, steps in ((6, 5), (5, 7)):
        changed = ("--global-batch-size", str(size), "--override", "global_batch_size", "--steps", str(steps))
        assert main([*run, *changed]) == 0
    images = 3 * 4 + 2 * 6 + 2 * 5
    assert seen == permutation(0, 0, 1433)[:images].tolist()
    assert newest_checkpoint(tmp_path / "run").checkpoint.state["images_seen"] == images


def test_what_auto_became_is_recorded(unbroken):
    recorded = newest_checkpoint(unbroken).checkpoint.config["training"]
    assert (recorded["precision"], recorded["device"]) == ("fp32", "cpu")
    assert recorded["optimizer"] in ("torch", "fused")


def test_a_named_checkpoint_is_resumed_in_another_folder(unbroken, tmp_path, capsys):
    path = checkpoints_of(unbroken)[8]
    assert main([*TRAIN, "--results-dir", str(tmp_path / "run"), "--resume", str(path)]) == 0
    assert f"resumed from step 8, {path}" in capsys.readouterr().out
    mine, theirs = (
        load_checkpoint(checkpoints_of(tmp_path / "run")[STEPS]),
        load_checkpoint(checkpoints_of(unbroken)[STEPS]),
    )
    assert all(torch.equal(mine.model[name], theirs.model[name]) for name in theirs.model)
    assert main([*TRAIN, "--results-dir", str(unbroken), "--resume", str(path)]) == 2
    assert "holds checkpoints newer than" in capsys.readouterr().err


def test_weights_alone_are_no_run_to_resume(unbroken, tmp_path, capsys):
    from ditkernels.checkpoints.format import Checkpoint, save_checkpoint

    found = load_checkpoint(checkpoints_of(unbroken)[STEPS])
    save_checkpoint(tmp_path / "weights", Checkpoint(found.model, found.ema, 10, found.config))
    assert main([*TRAIN, "--results-dir", str(tmp_path / "run"), "--resume", str(tmp_path / "weights")]) == 2
    assert "no training state" in capsys.readouterr().err


def test_the_last_ones_and_every_mth_are_kept(tmp_path, capsys):
    flags = ("--ckpt-every", "1", "--keep-last", "2", "--keep-every", "4", "--resume", "none")
    assert main([*TRAIN, "--results-dir", str(tmp_path / "run"), *flags]) == 0
    assert list(checkpoints_of(tmp_path / "run")) == [4, 8, 9, 10]


def test_the_manifest_tells_what_the_run_was(unbroken):
    manifest = json.loads((checkpoints_of(unbroken)[STEPS] / "manifest.json").read_text(encoding="utf-8"))
    assert TrainConfig(**manifest["config"]["training"]).steps == STEPS
    assert manifest["state"]["images_seen"] == 4 * STEPS
    assert sorted(manifest["files"]) == ["ema", "model", "optimizer"]


def recorded_optimizer(folder):
    return newest_checkpoint(folder).checkpoint.config["training"]["optimizer"]


def test_a_run_records_what_auto_became_and_keeps_it(unbroken, tmp_path, capsys):
    became = resolved("auto", torch.zeros(1))
    assert became == ("torch" if _native.CPU.absence else "fused")
    assert recorded_optimizer(unbroken) == became
    for optimizer in ("torch", "fused"):
        run = [*TRAIN, "--results-dir", str(tmp_path / optimizer)]
        assert main([*run, "--steps", "4", "--optimizer", optimizer]) == 0
        assert main(run) == 0
        assert recorded_optimizer(tmp_path / optimizer) == optimizer
    assert main([*run, "--steps", "12", "--optimizer", "torch"]) == 0
    assert "bits may differ: optimizer: 'fused' there, 'torch' here" in capsys.readouterr().out


def test_a_run_from_before_the_choice_goes_on_with_torchs(tmp_path, capsys):
    run = [*TRAIN, "--results-dir", str(tmp_path / "run")]
    assert main([*run, "--steps", "4", "--optimizer", "torch"]) == 0
    older = newest_checkpoint(tmp_path / "run").checkpoint
    del older.config["training"]["optimizer"]
    save_checkpoint(checkpoints_of(tmp_path / "run")[4], older)
    assert main(run) == 0
    assert recorded_optimizer(tmp_path / "run") == "torch"
