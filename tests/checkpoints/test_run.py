"""A run's folder has one owner at a time, tells what it is, and is found by whatever path names it."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ditkernels.checkpoints.format import Checkpoint, CheckpointError, save_checkpoint
from ditkernels.checkpoints.run import CONFIG, ENVIRONMENT, LOG, Run, checkpoint_directory, read, resolve
from ditkernels.files import LOCK, FolderInUseError, FolderLock
from ditkernels.options import read_yaml
from ditkernels.runtime import World, environment
from ditkernels.training.config import TrainConfig
from tests.helpers.sabotage import flip_a_bit

# ---- One owner -------------------------------------------------------------------------------------------------------


def test_the_second_is_told_who_the_first_is(tmp_path):
    first = FolderLock(tmp_path / "run")
    with pytest.raises(FolderInUseError, match=rf"run is in use by process {os.getpid()} on \S+; a folder has one owner"):
        FolderLock(tmp_path / "run")
    first.release()
    FolderLock(tmp_path / "run").release()


HOLDER = """
import os, sys, time
from pathlib import Path
from ditkernels.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
for _ in range(4):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def test_killed_it_lets_go_at_once_though_its_children_live(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as holder:
        try:
            assert holder.stdout.readline() == b"locked\n"
            with pytest.raises(FolderInUseError, match=f"process {holder.pid} on"):
                FolderLock(tmp_path)
            holder.kill()
            time.sleep(1)
            FolderLock(tmp_path).release()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_who_locked_a_file_that_was_removed_before_tries_again(tmp_path, monkeypatch):
    import fcntl

    genuine, calls = fcntl.flock, []

    def flock(descriptor, operation):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(operation)
        genuine(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path)
    assert len(calls) == 2
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path)
    lock.release()


def test_only_its_holder_removes_the_file(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path)
    assert (tmp_path / LOCK).exists()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_flock_it_is_done_without_and_said(tmp_path, monkeypatch, caplog):
    import fcntl

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(tmp_path)
    assert "knows no locks" in caplog.text
    assert list(tmp_path.iterdir()) == []
    lock.release()
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.read(-1, 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        FolderLock(tmp_path)


def test_folders_that_it_made_go_with_it_if_nothing_came_into_them(tmp_path):
    FolderLock(tmp_path / "a/b").release()
    assert list(tmp_path.iterdir()) == []
    lock = FolderLock(tmp_path / "a/b")
    (tmp_path / "a/kept").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


# ---- What it tells of itself -----------------------------------------------------------------------------------------


def test_an_open_run_tells_its_settings_its_environment_and_what_was_said(tmp_path):
    run, settings = Run(tmp_path / "run"), TrainConfig(learning_rate=1e-5, compile=True, vae="none", grad_clip=None)
    package = logging.getLogger("ditkernels")
    level = package.level
    run.lock(World())
    run.begin(vars(settings), environment(torch.device("cpu"), World()))
    package.info("a word")
    run.close()
    package.warning("another")
    assert TrainConfig(**read_yaml(TrainConfig, tmp_path / "run" / CONFIG)) == settings
    assert json.loads((tmp_path / "run" / ENVIRONMENT).read_text(encoding="utf-8"))["torch"] == torch.__version__
    (line,) = (tmp_path / "run" / LOG).read_text(encoding="utf-8").splitlines()
    assert time.strptime(line.split(",")[0], "%Y-%m-%d %H:%M:%S")
    assert line.endswith("INFO a word")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([CONFIG, ENVIRONMENT, LOG])
    assert (package.level, package.handlers) == (level, [])


def test_a_run_that_never_opens_leaves_nothing(tmp_path):
    run = Run(tmp_path / "run")
    run.lock(World())
    run.close()
    assert list(tmp_path.iterdir()) == []


# ---- What a path stands for ------------------------------------------------------------------------------------------


def checkpoint(step):
    return Checkpoint({"weight": torch.full((2,), float(step))}, step=step)


@pytest.fixture
def run(tmp_path):
    for step in (2, 4):
        save_checkpoint(checkpoint_directory(tmp_path / "run", step), checkpoint(step))
    return tmp_path / "run"


def test_a_path_names_a_run_a_checkpoint_or_a_file(run, tmp_path):
    torch.save(checkpoint(8).model, tmp_path / "public.pt")
    for path, step in ((run, 4), (checkpoint_directory(run, 2), 2), (tmp_path / "public.pt", 8)):
        assert read(resolve(path)).model["weight"][0] == step


def test_a_run_falls_back_past_a_broken_checkpoint_and_says_so(run, caplog):
    flip_a_bit(next(checkpoint_directory(run, 4).glob("model-*")))
    assert resolve(run) == checkpoint_directory(run, 2)
    assert "passed over a broken checkpoint" in caplog.text
    assert "step-00000004" in caplog.text
    flip_a_bit(next(checkpoint_directory(run, 2).glob("model-*")))
    with pytest.raises(CheckpointError, match=r"holds no whole checkpoint: .*step-00000004.*step-00000002"):
        resolve(run)
    with pytest.raises(CheckpointError, match="is damaged"):
        resolve(checkpoint_directory(run, 2))


def test_what_is_none_of_these_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        read(resolve(Path("nowhere")))
