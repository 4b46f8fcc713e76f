"""Checkpoints that survive a crash at any instant, and the public ones people already have.

A checkpoint is a directory: tensors in safetensors files, and `manifest.json`, which names those files with
their SHA-256. A file is named after its content and the manifest is written last, so until the instant the
new manifest takes the old one's name the directory still holds the old checkpoint, whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditkernels._version import __version__

FORMAT = "ditkernels-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not what it claims to be; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        model: state dict of the model.
        ema: state dict of the moving average of its weights; None where there is none.
        step: training steps taken; None where a public file does not say.
        config: whatever made the run, as JSON values.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None = None
    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

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
        TypeError: the config is not JSON.
        OSError: the disk refused; the old checkpoint is untouched.
    """
    # Through JSON first: it refuses what a manifest cannot hold, before anything is written.
    config = json.loads(json.dumps(dict(checkpoint.config)))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parts = {"model": checkpoint.model}
    if checkpoint.ema is not None:
        parts["ema"] = checkpoint.ema
    files = {part: _write_tensors(directory, part, tensors) for part, tensors in parts.items()}
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "ditkernels": __version__,
        "step": checkpoint.step,
        "config": config,
        "files": files,
    }
    # The new files must be on the disk before a manifest that names them is.
    _sync_directory(directory)
    manifest = {**body, "sha256": _digest_of_body(body)}
    _write_atomically(
        directory / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n")
    )
    _sync_directory(directory)
    _remove_leftovers(directory, keep={entry["name"] for entry in files.values()})


def load_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Read the checkpoint in `directory` onto the CPU, verifying every checksum.

    Raises:
        CheckpointError: there is none, or a file of it is missing, cut short or altered; it is named.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory / MANIFEST)
    parts = {part: _read_tensors(directory, part, entry) for part, entry in manifest["files"].items()}
    if "model" not in parts:
        raise CheckpointError(f"{directory / MANIFEST} lists no model weights, only {sorted(parts)}")
    return Checkpoint(parts["model"], parts.get("ema"), manifest["step"], manifest["config"])


def load_public_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a `.pt` file of the public DiT code onto the CPU: a bare state dict, or {model, ema, opt, args}.

    Nothing in the file is executed: only tensors, plain containers and the argparse.Namespace that the public
    trainer stores as `args` are let in. `args` becomes the config; the optimizer's state is not returned.

    Raises:
        CheckpointError: the file is missing or damaged, holds other objects, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a torch file of plain weights and was not loaded: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is truncated or not a torch file: {_first_line(error)}") from error
    if _is_state_dict(content):
        return Checkpoint(model=content)
    if isinstance(content, dict) and _is_state_dict(content.get("model")):
        return _from_public_trainer(path, content)
    raise CheckpointError(
        f"{path} holds neither a state dict nor {{model, ema, opt, args}}: {_describe(content)}"
    )


def _from_public_trainer(path: Path, content: dict[str, Any]) -> Checkpoint:
    ema = content.get("ema")
    if ema is not None and not _is_state_dict(ema):
        raise CheckpointError(f"{path}: 'ema' is no state dict but {_describe(ema)}")
    args = content.get("args")
    config = vars(args) if isinstance(args, argparse.Namespace) else {}
    return Checkpoint(model=content["model"], ema=ema, config=config)


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with keys {sorted(map(str, value))[:8]}"
    return f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _write_tensors(directory: Path, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = _temporary(directory / f"{part}.safetensors")
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(on_cpu, temporary)
    # safetensors makes files that only their owner can read; the user's umask should decide.
    temporary.chmod(mode)
    _sync_file(temporary)
    digest = _sha256(temporary)
    name = f"{part}-{digest[:16]}.safetensors"
    os.replace(temporary, directory / name)
    return {"name": name, "bytes": (directory / name).stat().st_size, "sha256": digest}


def _read_tensors(directory: Path, part: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    name = entry["name"]
    path = directory / name
    if Path(name).name != name:
        raise CheckpointError(f"{directory / MANIFEST}: file name {name!r} of {part!r} leaves the directory")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though {MANIFEST} lists it as {part!r}")
    if path.stat().st_size != entry["bytes"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {entry['bytes']}")
    if _sha256(path) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no checkpoint: {path.name} is not there")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.get('format_version')}, allowed is {FORMAT_VERSION}"
        )
    if manifest.pop("sha256", None) != _digest_of_body(manifest):
        raise CheckpointError(f"{path} is damaged: it does not match its own SHA-256")
    return manifest


def _digest_of_body(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    temporary = _temporary(path)
    write(temporary)
    _sync_file(temporary)
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _remove_leftovers(directory: Path, keep: set[str]) -> None:
    for pattern in ("model-*.safetensors", "ema-*.safetensors", ".*.safetensors.*.tmp", f".{MANIFEST}.*.tmp"):
        for path in directory.glob(pattern):
            if path.name not in keep:
                path.unlink()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
