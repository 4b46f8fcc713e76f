"""Checkpoints: exact, whole at every instant, and honest about damage."""

import argparse
import dataclasses
import json
import os
import stat
import subprocess
import threading
from collections import OrderedDict

import pytest
import safetensors
import torch

from ditkernels import files
from ditkernels.checkpoints import format as checkpoint_module
from ditkernels.checkpoints import writer as writer_module
from ditkernels.checkpoints.format import MANIFEST, Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from ditkernels.checkpoints.public import load_public_checkpoint
from ditkernels.checkpoints.run import checkpoint_directory, checkpoints_of, remove_old_checkpoints, set_aside
from ditkernels.checkpoints.writer import CheckpointWriter
from tests.helpers.runs import newest_checkpoint


def make(seed, *, ema=True):
    generator = torch.Generator().manual_seed(seed)

    def state():
        return {
            "blocks.0.weight": torch.randn(8, 4, generator=generator),
            "half": torch.randn(3, generator=generator).bfloat16(),
            "transposed": torch.randn(5, 3, generator=generator).t(),
            "count": torch.tensor(seed),
        }

    return Checkpoint(state(), state() if ema else None, step=seed, config={"model": {"depth": 4}, "lr": 1e-3})


def assert_same(loaded, saved):
    assert (loaded.step, loaded.config) == (saved.step, saved.config)
    assert (loaded.ema is None) == (saved.ema is None)
    for mine, theirs in ((loaded.model, saved.model), (loaded.ema or {}, saved.ema or {})):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name])


@pytest.mark.parametrize("ema", [True, False])
def test_what_is_loaded_is_what_was_saved(tmp_path, ema):
    saved = make(1, ema=ema)
    save_checkpoint(tmp_path / "new" / "folder", saved)
    loaded = load_checkpoint(tmp_path / "new" / "folder")
    assert_same(loaded, saved)
    assert loaded.sampling_weights is (loaded.ema if ema else loaded.model)


def test_a_new_checkpoint_takes_the_old_ones_place_and_leaves_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    save_checkpoint(tmp_path, make(1))
    save_checkpoint(tmp_path, make(2))
    assert_same(load_checkpoint(tmp_path), make(2))
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_files_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        save_checkpoint(tmp_path, make(1))
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


class Crash(BaseException):
    """Stands for the process dying: nothing in the package catches it."""


SYSTEM_CALLS = ("fsync", "replace", "unlink")


def crash_at(monkeypatch, call_number):
    """Let the process die instead of making the system call with that number."""
    calls = []

    def intercept(name):
        genuine = getattr(os, name)

        def call(*args, **kwargs):
            if len(calls) == call_number:
                raise Crash
            calls.append(name)
            return genuine(*args, **kwargs)

        return call

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(os, name, intercept(name))


def test_a_crash_at_any_system_call_leaves_the_old_checkpoint_or_the_new_one(tmp_path, monkeypatch):
    survivors = []
    for call_number in range(100):
        directory = tmp_path / str(call_number)
        save_checkpoint(directory, make(1))
        with monkeypatch.context() as patch:
            crash_at(patch, call_number)
            try:
                save_checkpoint(directory, make(2))
            except Crash:
                pass
            else:
                break
        survivor = load_checkpoint(directory)
        assert_same(survivor, make(survivor.step))
        survivors.append(survivor.step)
        save_checkpoint(directory, make(3))
        assert_same(load_checkpoint(directory), make(3))
        assert len(list(directory.iterdir())) == 3, "leftovers of the crash"
    assert survivors == sorted(survivors)
    assert {1, 2} == set(survivors)


def test_everything_is_on_the_disk_before_the_manifest_takes_its_name(tmp_path, monkeypatch):
    events = []
    genuine_fsync, genuine_replace = os.fsync, os.replace

    def fsync(descriptor):
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"fsync {kind}")
        genuine_fsync(descriptor)

    def replace(source, target):
        events.append(f"rename {os.path.basename(target).split('-')[0]}")
        genuine_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_checkpoint(tmp_path, make(1))
    assert events == [
        *("fsync file", "rename model"),
        *("fsync file", "rename ema"),
        "fsync directory",
        *("fsync file", f"rename {MANIFEST}"),
        "fsync directory",
    ]


def test_a_refused_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make(1))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, make(2))
    assert_same(load_checkpoint(tmp_path), make(1))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    # Near the end: in a tensors file among the numbers, where only a checksum can notice.
    content[-4] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    "pattern, damage, message",
    [
        ("model-*", flip_a_bit, "is damaged: its SHA-256"),
        ("ema-*", flip_a_bit, "is damaged: its SHA-256"),
        (MANIFEST, flip_a_bit, "is damaged"),
        ("model-*", cut_short, "bytes"),
        ("ema-*", cut_short, "bytes"),
        (MANIFEST, cut_short, "is damaged"),
        ("model-*", os.unlink, "is missing"),
        ("ema-*", os.unlink, "is missing"),
        (MANIFEST, os.unlink, "is not there"),
    ],
)
def test_damage_is_found_and_the_file_named(tmp_path, pattern, damage, message):
    save_checkpoint(tmp_path, make(1))
    (victim,) = tmp_path.glob(pattern)
    damage(victim)
    with pytest.raises(CheckpointError, match=f"{victim.name} .*{message}"):
        load_checkpoint(tmp_path)


def test_an_edited_manifest_is_refused(tmp_path):
    save_checkpoint(tmp_path, make(1))
    path = tmp_path / MANIFEST
    path.write_text(path.read_text(encoding="utf-8").replace('"depth": 4', '"depth": 5'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not match its own SHA-256"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, "not the manifest"),
        ({"format_version": 99}, "format version 99"),
        ({"files": {}}, "no model weights"),
        ({"files": {"model": {"name": "../secret", "bytes": 1, "sha256": ""}}}, "leaves the directory"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path, change, message):
    save_checkpoint(tmp_path, make(1))
    body = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    del body["sha256"]
    body.update(change)
    body["sha256"] = files.json_sha256(body)
    (tmp_path / MANIFEST).write_text(json.dumps(body), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_a_config_that_is_not_json_is_refused_before_the_old_checkpoint_is_touched(tmp_path):
    save_checkpoint(tmp_path, make(1))
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, Checkpoint(make(2).model, config={"device": torch.device("cpu")}))
    assert len(list(tmp_path.iterdir())) == 3
    assert_same(load_checkpoint(tmp_path), make(1))


def test_tuples_and_integer_keys_in_the_config_come_back_as_json(tmp_path):
    save_checkpoint(tmp_path, Checkpoint(make(1).model, config={"betas": (0.9, 0.999), "table": {3: "x"}}))
    assert load_checkpoint(tmp_path).config == {"betas": [0.9, 0.999], "table": {"3": "x"}}


def test_a_bare_public_state_dict_loads(tmp_path):
    state = OrderedDict(make(1).model)
    torch.save(state, tmp_path / "DiT.pt")
    loaded = load_public_checkpoint(tmp_path / "DiT.pt")
    assert_same(loaded, Checkpoint(state))
    assert loaded.sampling_weights is loaded.model


def test_a_public_training_checkpoint_loads(tmp_path):
    saved = make(7)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, vae="ema")
    content = {"model": saved.model, "ema": saved.ema, "opt": optimizer.state_dict(), "args": args}
    torch.save(content, tmp_path / "0400000.pt")
    loaded = load_public_checkpoint(tmp_path / "0400000.pt")
    assert_same(loaded, Checkpoint(saved.model, saved.ema, config=vars(args)))


class Exploit:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EXPLOIT_TARGET"],))


def test_a_public_file_with_code_is_refused_and_the_code_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPLOIT_TARGET", str(tmp_path / "owned"))
    torch.save({"model": make(1).model, "args": Exploit()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt.*was not loaded"):
        load_public_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_the_allowed_namespace_stays_local_to_the_load(tmp_path):
    torch.save({"model": make(1).model, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    load_public_checkpoint(tmp_path / "a.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weights": {"a": torch.ones(1)}}, "neither a state dict"),
        ({}, "neither a state dict"),
        ([torch.ones(1)], "a list"),
        ({"model": {"a": torch.ones(1)}, "ema": [1]}, "'ema' is no state dict"),
    ],
)
def test_a_public_file_without_weights_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=rf"odd\.pt.*{message}"):
        load_public_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize("content", [b"", b"not a torch file", None])
def test_a_damaged_public_file_is_named(tmp_path, content):
    path = tmp_path / "broken.pt"
    if content is None:
        torch.save(make(1).model, path)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.pt"):
        load_public_checkpoint(path)


def test_a_missing_public_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pt: no such file"):
        load_public_checkpoint(tmp_path / "absent.pt")


# ---- The checkpoints of a run ----------------------------------------------------------------------------------------


def whole(step):
    """A checkpoint with everything in it."""
    made = make(step)
    state = {"pending": {"loss": 0.1 + step}, "names": ["a"]}
    return dataclasses.replace(made, optimizer={"w.exp_avg": torch.full((4,), float(step))}, state=state)


def save_steps(run, *steps):
    for step in steps:
        save_checkpoint(checkpoint_directory(run, step), whole(step))


def test_optimizer_and_state_come_back(tmp_path):
    save_checkpoint(tmp_path, whole(3))
    loaded = load_checkpoint(tmp_path)
    assert_same(loaded, make(3))
    assert loaded.optimizer.keys() == {"w.exp_avg"}
    assert torch.equal(loaded.optimizer["w.exp_avg"], torch.full((4,), 3.0))
    assert loaded.state == {"pending": {"loss": 3.1}, "names": ["a"]}


def test_new_folders_are_on_the_disk_before_what_they_hold_counts(tmp_path, monkeypatch):
    synced = []
    genuine = files.sync_directory

    def sync(path):
        synced.append(path)
        genuine(path)

    for module in (files, checkpoint_module):
        monkeypatch.setattr(module, "sync_directory", sync)
    directory = checkpoint_directory(tmp_path / "run", 7)
    save_checkpoint(directory, whole(7))
    assert sorted(synced[:3]) == [tmp_path, tmp_path / "run", tmp_path / "run" / "checkpoints"]
    assert synced[3:] == [directory, directory]


def test_the_newest_whole_checkpoint_is_found_and_the_broken_ones_named(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, None, {})
    save_steps(tmp_path, 2, 10, 9)
    assert list(checkpoints_of(tmp_path)) == [2, 9, 10]
    flip_a_bit(next(checkpoint_directory(tmp_path, 10).glob("optimizer-*")))
    found = newest_checkpoint(tmp_path)
    assert (found.path, found.checkpoint.step) == (checkpoint_directory(tmp_path, 9), 9)
    ((path, reason),) = found.broken.items()
    assert path == checkpoint_directory(tmp_path, 10)
    assert "is damaged" in reason
    assert set_aside(path).is_dir()
    assert list(checkpoints_of(tmp_path)) == [2, 9]


@pytest.mark.parametrize("keep_last, keep_every, kept", [(2, 0, [4, 5, 7]), (1, 2, [2, 4, 5, 7]), (9, 0, [1, 2, 3, 4, 5, 7])])
def test_old_checkpoints_are_removed_but_the_last_and_every_mth(tmp_path, keep_last, keep_every, kept):
    save_steps(tmp_path, 1, 2, 3, 4, 5, 7)
    remove_old_checkpoints(tmp_path, 5, keep_last=keep_last, keep_every=keep_every)
    assert list(checkpoints_of(tmp_path)) == kept


def test_what_has_no_manifest_is_removed_and_not_counted(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    (checkpoint_directory(tmp_path, 2) / MANIFEST).unlink()
    remove_old_checkpoints(tmp_path, 3, keep_last=2, keep_every=0)
    assert list(checkpoints_of(tmp_path)) == [1, 3]


def test_the_writer_saves_what_was_there_when_it_was_asked(tmp_path, monkeypatch):
    gate = threading.Event()
    genuine = writer_module.save_checkpoint

    def slow(*arguments):
        gate.wait(timeout=60)
        genuine(*arguments)

    monkeypatch.setattr(writer_module, "save_checkpoint", slow)
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_every=0)
    checkpoint = whole(1)
    writer.save(checkpoint)
    for tensors in checkpoint.parts.values():
        for tensor in tensors.values():
            tensor.zero_()
    assert checkpoints_of(tmp_path) == {}, "training would have waited for the disk"
    gate.set()
    writer.wait()
    assert_same(newest_checkpoint(tmp_path).checkpoint, make(1))
    writer.save(whole(2))
    writer.close()
    assert list(checkpoints_of(tmp_path)) == [2]


def test_a_failure_of_the_writer_is_raised_and_the_old_checkpoint_kept(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_every=0)
    writer.save(whole(1))
    writer.wait()

    def full_disk(*_):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    writer.save(whole(2))
    writer.close()
    with pytest.raises(OSError, match="No space left"):
        writer.raise_failure()
    writer.raise_failure()
    assert newest_checkpoint(tmp_path).checkpoint.step == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not allowed here; RLIMIT_FSIZE stands for it elsewhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_file_system_the_old_checkpoint_survives_and_nothing_is_left_over(small_disk):
    save_steps(small_disk, 1)
    before = sorted(small_disk.rglob("*"))
    large = Checkpoint({"a": torch.zeros(30_000)}, ema={"a": torch.ones(60_000)}, step=2)
    with pytest.raises(OSError, match=r"could not be written.*No space left"):
        save_checkpoint(checkpoint_directory(small_disk, 2), large)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(checkpoint_directory(small_disk, 1), large)
    assert newest_checkpoint(small_disk).checkpoint.step == 1
    left = set(small_disk.rglob("*")) - set(before)
    assert left == {checkpoint_directory(small_disk, 2)}


def test_a_save_raises_the_failure_of_the_one_before(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        writer.save(whole(1))
        with pytest.raises(OSError, match="full"):
            writer.save(whole(2))
    writer.save(whole(3))
    writer.wait()
    writer.close()
    assert list(checkpoints_of(tmp_path)) == [3]
