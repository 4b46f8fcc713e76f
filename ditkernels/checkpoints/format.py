"""The format of a checkpoint, which survives a crash at any instant.

A checkpoint is a directory: tensors in safetensors files, and `manifest.json`, which names those files with
their SHA-256. A file is named after its content and the manifest is written last, so until the instant the
new manifest takes the old one's name the directory still holds the old checkpoint, whole.

A tensor may lie in pieces in several files, as `sharded.py` writes them; readers put them together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditkernels._version import __version__
from ditkernels.files import make_directory, read_signed, sha256, signed, sync_directory, sync_file, temporary_name, write_json

FORMAT = "ditkernels-checkpoint"
FORMAT_VERSION = 1
SHARDED_VERSION = 2
MANIFEST = "manifest.json"
PARTS = ("model", "ema", "optimizer")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not what it claims to be; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        model: state dict of the model; empty where a file of another program holds an average alone.
        ema: state dict of the moving average of its weights; None where there is none.
        step: training steps taken; None where a public file does not say.
        config: whatever made the run, as JSON values.
        optimizer: the optimizer's tensors by name; None where there are none.
        state: what else a run needs to go on, as JSON values.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None = None
    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] | None = None
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors that are there, by part: model, ema, optimizer."""
        found = {part: getattr(self, part) for part in PARTS}
        return {part: tensors for part, tensors in found.items() if tensors is not None}

    def snapshot(self) -> Checkpoint:
        """The same with copies of all tensors, on the CPU, which no further step of training changes."""
        copies: dict[str, Any] = {
            part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for part, tensors in self.parts.items()
        }
        return replace(self, **copies)

    @property
    def sampling_weights(self) -> Mapping[str, Tensor]:
        """The moving average where there is one, else the model's own weights."""
        return self.model if self.ema is None else self.ema


def save_checkpoint(directory: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write `checkpoint` into `directory`, in place of the checkpoint there, if any.

    A crash at any instant, of the process or of the machine, leaves either the old checkpoint or the new one.

    Args:
        directory: made if it is not there. Other files in it are left alone.
        checkpoint: its tensors may lie on any device; its config must be JSON.

    Raises:
        TypeError: the config or the state is not JSON.
        OSError: the disk refused, because it is full for instance; the old checkpoint is untouched.
    """
    # Through JSON first: it refuses what a manifest cannot hold, before anything is written.
    config = json.loads(json.dumps(dict(checkpoint.config)))
    state = json.loads(json.dumps(dict(checkpoint.state)))
    directory = Path(directory)
    make_directory(directory)
    try:
        _write(directory, checkpoint, config, state)
    except OSError:
        remove_unused(directory)
        raise


def _write(directory: Path, checkpoint: Checkpoint, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    files = {part: write_tensors(directory, part, tensors) for part, tensors in checkpoint.parts.items()}
    write_manifest(
        directory,
        {
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "config": config,
            "state": state,
            "files": files,
        },
    )


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Makes the files it names the checkpoint of the directory, and removes the others."""
    body = {"format": FORMAT, "ditkernels": __version__, **content}
    # The new files must be on the disk before a manifest that names them is.
    sync_directory(directory)
    write_json(directory / MANIFEST, signed(body))
    sync_directory(directory)
    remove_unused(directory)


def load_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Read the checkpoint in `directory` onto the CPU, verifying every checksum.

    Raises:
        CheckpointError: there is none, or a file of it is missing, cut short or altered; it is named.
    """
    verify_checkpoint(directory)
    return open_checkpoint(directory)


def verify_checkpoint(directory: str | os.PathLike[str]) -> None:
    """Raises CheckpointError as :func:`load_checkpoint`, without keeping the tensors."""
    directory = Path(directory)
    for entry in _files_of(_read_manifest(directory / MANIFEST)):
        path = _path_of(directory, entry)
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """As :func:`load_checkpoint`, of a checkpoint that has been verified: the files are not read through for it.

    Tensors in pieces are put together when they are asked for, each time anew.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory / MANIFEST)
    parts: dict[str, Mapping[str, Tensor]] = {
        part: _Assembled(directory, entry) if "shards" in entry else _read_tensors(directory, entry)
        for part, entry in manifest["files"].items()
    }
    if "model" not in parts:
        raise CheckpointError(f"{directory / MANIFEST} lists no model weights, only {sorted(parts)}")
    return Checkpoint(
        parts["model"],
        parts.get("ema"),
        manifest["step"],
        manifest["config"],
        parts.get("optimizer"),
        manifest["state"],
    )


def write_tensors(directory: Path, label: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file named after ``label`` and its content; returns its entry in a manifest: name, bytes, sha256."""
    temporary = temporary_name(directory / f"{label}.safetensors")
    save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    sync_file(temporary)
    digest = sha256(temporary)
    name = f"{label}-{digest[:16]}.safetensors"
    os.replace(temporary, directory / name)
    return {"name": name, "bytes": (directory / name).stat().st_size, "sha256": digest}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous tensors as a safetensors file. Raises OSError where the disk refuses."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    # safetensors makes files that only their owner can read; the user's umask should decide.
    path.chmod(mode)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, whatever file it came from."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()


def _files_of(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Name, size and SHA-256 of every file."""
    for entry in manifest["files"].values():
        yield from entry.get("shards", [entry])


def _path_of(directory: Path, entry: Mapping[str, Any]) -> Path:
    """A file of the manifest, which is there and has the right size."""
    name = entry["name"]
    path = directory / name
    if Path(name).name != name:
        raise CheckpointError(f"{directory / MANIFEST}: file name {name!r} leaves the directory")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though {MANIFEST} lists it")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {entry['bytes']}")
    return path


def _read_tensors(directory: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    path = _path_of(directory, entry)
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


class _Assembled(Mapping[str, Tensor]):
    """The tensors of a part whose pieces lie in several files."""

    def __init__(self, directory: Path, entry: Mapping[str, Any]) -> None:
        self._shapes: dict[str, list[int]] = entry["tensors"]
        found: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in self._shapes}
        for shard in entry["shards"]:
            tensors = _read_tensors(directory, shard)
            for name, start in shard["rows"].items():
                found[name].append((start, tensors[name]))
        self._pieces = {name: [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])] for name, pieces in found.items()}
        for name, shape in self._shapes.items():
            pieces = self._pieces[name]
            rows = [sum(map(len, pieces))] if shape else []
            if not pieces or [*rows, *pieces[0].shape[1:]] != shape:
                raise CheckpointError(f"{directory / MANIFEST} does not list all of tensor {name!r}, {shape}")

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no checkpoint: {path.name} is not there")
    try:
        return read_signed(path, f"the manifest of a {FORMAT}", {"format": FORMAT}, (FORMAT_VERSION, SHARDED_VERSION))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def remove_unused(directory: Path) -> None:
    """Removes the files of checkpoints that the manifest does not name, those half written among them."""
    used = _files_in_use(directory)
    tensors = [f"{part}-*.safetensors" for part in PARTS]
    for pattern in (*tensors, ".*.safetensors.*.tmp", f".{MANIFEST}.*.tmp"):
        for path in directory.glob(pattern):
            if path.name not in used:
                path.unlink()


def _files_in_use(directory: Path) -> set[str]:
    """The files of the checkpoint that is there, if one is."""
    try:
        manifest = _read_manifest(directory / MANIFEST)
    except CheckpointError:
        return set()
    return {entry["name"] for entry in _files_of(manifest)}
