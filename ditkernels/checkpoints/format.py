"""Checkpoints that survive a crash at any instant, and the public ones people already have.

A checkpoint is a directory: tensors in safetensors files, and `manifest.json`, which names those files with
their SHA-256. A file is named after its content and the manifest is written last, so until the instant the
new manifest takes the old one's name the directory still holds the old checkpoint, whole.

A run keeps its checkpoints side by side, `checkpoints/step-00001000` and so on. They are written from a
snapshot by a thread of their own while training goes on (`CheckpointWriter`).

Where ranks hold pieces of the tensors, each writes its own into files of its own, and the first one names them all in
the manifest once they are on the disk (`ShardWriter`, format version 2). Readers put the pieces together, so they
need not know how many ranks wrote; `ditkernels consolidate` does it for good.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditkernels._version import __version__

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
        model: state dict of the model.
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
    _make_directory(directory)
    try:
        _write(directory, checkpoint, config, state)
    except OSError:
        _remove_leftovers(directory, keep=_files_in_use(directory))
        raise


def _write(directory: Path, checkpoint: Checkpoint, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    files = {part: _write_tensors(directory, part, tensors) for part, tensors in checkpoint.parts.items()}
    _write_manifest(
        directory,
        {
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "config": config,
            "state": state,
            "files": files,
        },
    )


def _write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Makes the files it names the checkpoint of the directory, and removes the others."""
    body = {"format": FORMAT, "ditkernels": __version__, **content}
    # The new files must be on the disk before a manifest that names them is.
    _sync_directory(directory)
    manifest = {**body, "sha256": _digest_of_body(body)}
    _write_atomically(directory / MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8"))
    _sync_directory(directory)
    _remove_leftovers(directory, keep={entry["name"] for entry in _files_of(body)})


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
        if _sha256(path) != entry["sha256"]:
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
        raise CheckpointError(f"{path} is not a torch file of plain weights and was not loaded: {_first_line(error)}") from error
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is truncated or not a torch file: {_first_line(error)}") from error
    if _is_state_dict(content):
        return Checkpoint(model=content)
    if isinstance(content, dict) and _is_state_dict(content.get("model")):
        return _from_public_trainer(path, content)
    raise CheckpointError(f"{path} holds neither a state dict nor {{model, ema, opt, args}}: {_describe(content)}")


def _from_public_trainer(path: Path, content: dict[str, Any]) -> Checkpoint:
    ema = content.get("ema")
    if ema is not None and not _is_state_dict(ema):
        raise CheckpointError(f"{path}: 'ema' is no state dict but {_describe(ema)}")
    args = content.get("args")
    config = vars(args) if isinstance(args, argparse.Namespace) else {}
    return Checkpoint(model=content["model"], ema=ema, config=config)


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict) and len(value) > 0 and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with keys {sorted(map(str, value))[:8]}"
    return f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _write_tensors(directory: Path, label: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = _temporary(directory / f"{label}.safetensors")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file(on_cpu, temporary)
    except safetensors.SafetensorError as error:
        raise OSError(f"{temporary} could not be written: {error}") from error
    # safetensors makes files that only their owner can read; the user's umask should decide.
    temporary.chmod(mode)
    _sync_file(temporary)
    digest = _sha256(temporary)
    name = f"{label}-{digest[:16]}.safetensors"
    os.replace(temporary, directory / name)
    return {"name": name, "bytes": (directory / name).stat().st_size, "sha256": digest}


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
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a {FORMAT}")
    if manifest.get("format_version") not in (FORMAT_VERSION, SHARDED_VERSION):
        raise CheckpointError(
            f"{path}: format version {manifest.get('format_version')}, allowed are {FORMAT_VERSION} and {SHARDED_VERSION}"
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
    tensors = [f"{part}-*.safetensors" for part in PARTS]
    for pattern in (*tensors, ".*.safetensors.*.tmp", f".{MANIFEST}.*.tmp"):
        for path in directory.glob(pattern):
            if path.name not in keep:
                path.unlink()


def _files_in_use(directory: Path) -> set[str]:
    """The files of the checkpoint that is there, if one is."""
    try:
        manifest = _read_manifest(directory / MANIFEST)
    except CheckpointError:
        return set()
    return {entry["name"] for entry in _files_of(manifest)}


def _make_directory(path: Path) -> None:
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    # The name of a new folder is on the disk once its parent is.
    for made in missing:
        _sync_directory(made.parent)


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


# ---- The checkpoints of a run ----------------------------------------------------------------------------------------

FOLDER = "checkpoints"


class Found(NamedTuple):
    """The newest whole checkpoint of a run, None if there is none, and why newer ones were passed over."""

    path: Path | None
    checkpoint: Checkpoint | None
    broken: dict[Path, str]


def checkpoint_directory(run: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of that step."""
    return run / FOLDER / f"step-{step:08d}"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints by step, in order, whole or not."""
    found = {int(path.name.removeprefix("step-")): path for path in (run / FOLDER).glob("step-*[0-9]")}
    return dict(sorted(found.items()))


def newest_checkpoint(run: Path) -> Found:
    """The newest checkpoint of a run whose every checksum is right."""
    broken: dict[Path, str] = {}
    for path in reversed(checkpoints_of(run).values()):
        try:
            return Found(path, load_checkpoint(path), broken)
        except CheckpointError as error:
            broken[path] = str(error)
    return Found(None, None, broken)


def set_aside(path: Path) -> Path:
    """Renames a broken checkpoint, so that it is neither found nor counted again; returns where it now lies."""
    target = path.with_name(f"broken-{path.name}-{secrets.token_hex(4)}")
    os.replace(path, target)
    return target


def remove_old_checkpoints(run: Path, step: int, *, keep_last: int, keep_every: int) -> None:
    """Removes the checkpoints up to ``step`` that are neither among the last ones nor at a multiple of ``keep_every``."""
    upto = {at: path for at, path in checkpoints_of(run).items() if at <= step}
    whole = [at for at, path in upto.items() if (path / MANIFEST).exists()]
    kept = {*whole[-keep_last:], *(at for at in whole if keep_every and at % keep_every == 0)}
    for at, path in upto.items():
        if at not in kept:
            # Without its manifest it is no checkpoint, even if the rest of it should outlive a crash.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread of its own, one at a time, and removes old ones.

    Args:
        run: the run's folder.
        keep_last, keep_every: as of :func:`remove_old_checkpoints`.
    """

    def __init__(self, run: Path, *, keep_last: int, keep_every: int) -> None:
        self.run = run
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Takes a snapshot and returns; the writing goes on. Waits for the one before; errors as of :meth:`wait`."""
        self.wait()
        self._writing = self._thread.submit(self._write_snapshot(checkpoint))

    def wait(self) -> None:
        """Returns once the last one is on the disk.

        Raises:
            OSError: it could not be written; the ones before are untouched.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def raise_failure(self) -> None:
        """:meth:`wait`, but only if the writing is over."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        """Lets a write in progress end, and the thread with it; raises nothing."""
        self._thread.shutdown(wait=True)

    def _write_snapshot(self, checkpoint: Checkpoint) -> Callable[[], None]:
        """Takes the snapshot; returns what writes it."""
        return partial(self._write, checkpoint.snapshot())

    def _write(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.step is not None
        save_checkpoint(checkpoint_directory(self.run, checkpoint.step), checkpoint)
        self._remove_old(checkpoint.step)

    def _remove_old(self, step: int) -> None:
        remove_old_checkpoints(self.run, step, keep_last=self.keep_last, keep_every=self.keep_every)


class IdleWriter(CheckpointWriter):
    """The writer of a rank that has nothing to write."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, keep_last=1, keep_every=0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Nothing."""


# ---- Checkpoints that several ranks write together -------------------------------------------------------------------


class Piece(NamedTuple):
    """What a rank holds of a tensor: its rows from ``start`` on; a scalar is whole.

    Attributes:
        tensor: those rows.
        shape: of the whole tensor.
        start: the first of them.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    start: int


Pieces = Mapping[str, Mapping[str, Piece]]


@dataclass(frozen=True)
class Peers:
    """The ranks that write a checkpoint together, as one of them sees them.

    Attributes:
        index: of this one; 0 writes the manifest.
        count: how many there are.
        exchange: gives its argument to all, and returns those of all in order.
    """

    index: int
    count: int
    exchange: Callable[[Any], list[Any]]

    def all_do(self, action: Callable[[], Any]) -> list[Any]:
        """What ``action`` returns on each. Raises OSError on every one if it did on any."""
        result, failure = None, None
        try:
            result = action()
        except OSError as error:
            failure = str(error)
        everyone = self.exchange((result, failure))
        failed = [f"rank {index}: {text}" for index, (_, text) in enumerate(everyone) if text is not None]
        if failed:
            raise OSError(f"the checkpoint could not be written: {'; '.join(failed)}")
        return [result for result, _ in everyone]


def save_pieces(directory: Path, checkpoint: Checkpoint, pieces: Pieces, peers: Peers) -> None:
    """As :func:`save_checkpoint`, by all of ``peers`` at once.

    Args:
        directory: the same on all of them, on a disk they share.
        checkpoint: its step, config and state are written, those of the first rank.
        pieces: what this rank holds of its tensors, by part and name.
        peers: of this rank.

    Raises:
        OSError: on every rank, where any of them could not write; the old checkpoint is untouched.
    """
    _make_directory(directory)
    try:
        shards = peers.all_do(lambda: _write_pieces(directory, pieces, peers))
        finish = partial(_write_sharded_manifest, directory, checkpoint, shards)
        peers.all_do(finish if peers.index == 0 else _nothing)
    except OSError:
        if peers.index == 0:
            _remove_leftovers(directory, keep=_files_in_use(directory))
        raise


def _nothing() -> None:
    pass


def _write_pieces(directory: Path, pieces: Pieces, peers: Peers) -> dict[str, Any]:
    """Writes a file a part; returns for each the file's entry in the manifest and the shapes of the whole tensors."""
    written = {}
    for part, tensors in pieces.items():
        label = f"{part}-{peers.index:05d}-of-{peers.count:05d}"
        entry = _write_tensors(directory, label, {name: piece.tensor for name, piece in tensors.items()})
        entry["rows"] = {name: piece.start for name, piece in tensors.items()}
        written[part] = {"shard": entry, "shapes": {name: piece.shape for name, piece in tensors.items()}}
    _sync_directory(directory)
    return written


def _write_sharded_manifest(directory: Path, checkpoint: Checkpoint, shards: list[dict[str, Any]]) -> None:
    files = {
        part: {"tensors": shards[0][part]["shapes"], "shards": [shard[part]["shard"] for shard in shards]} for part in shards[0]
    }
    for part in files.values():
        for index, entry in enumerate(part["shards"]):
            if not (directory / entry["name"]).is_file():
                raise OSError(
                    f"{directory / entry['name']}, written by rank {index}, is not seen by rank 0: "
                    "results_dir must be a folder that all ranks share"
                )
    content = {"step": checkpoint.step, "config": checkpoint.config, "state": checkpoint.state}
    # Through JSON first, for the digest is of what will be read.
    content = json.loads(json.dumps({"format_version": SHARDED_VERSION, **content, "files": files}))
    _write_manifest(directory, content)


class ShardWriter(CheckpointWriter):
    """The writer of one of several ranks that hold pieces of the tensors; errors reach all of them.

    Args:
        run, keep_last, keep_every: as of :class:`CheckpointWriter`.
        peers: the ranks that write; their exchange is called in the writer's thread.
        piece: what of a tensor is this rank's to write; None: nothing.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep_last: int,
        keep_every: int,
        peers: Peers,
        piece: Callable[[Tensor], Piece | None],
    ) -> None:
        super().__init__(run, keep_last=keep_last, keep_every=keep_every)
        self._peers = peers
        self._piece = piece

    def _write_snapshot(self, checkpoint: Checkpoint) -> Callable[[], None]:
        pieces: dict[str, dict[str, Piece]] = {}
        for part, tensors in checkpoint.parts.items():
            mine = {name: self._piece(tensor) for name, tensor in tensors.items()}
            pieces[part] = {
                name: piece._replace(tensor=piece.tensor.detach().to("cpu", copy=True))
                for name, piece in mine.items()
                if piece is not None
            }
        return partial(self._write_pieces, replace(checkpoint, model={}, ema=None, optimizer=None), pieces)

    def _write_pieces(self, checkpoint: Checkpoint, pieces: Pieces) -> None:
        assert checkpoint.step is not None
        save_pieces(checkpoint_directory(self.run, checkpoint.step), checkpoint, pieces, self._peers)
        if self._peers.index == 0:
            self._remove_old(checkpoint.step)
