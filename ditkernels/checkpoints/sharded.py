"""Checkpoints that several ranks write together: each writes its own pieces of the tensors, the first one the manifest.

The manifest names the files of all ranks, and is written once they are on the disk (format version 2). Readers put the pieces
together, so they need not know how many ranks wrote; `ditkernels consolidate` does it for good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ditkernels.checkpoints.format import SHARDED_VERSION, Checkpoint, remove_unused, write_manifest, write_tensors
from ditkernels.checkpoints.writer import CheckpointWriter
from ditkernels.files import make_directory, sync_directory


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
    make_directory(directory)
    try:
        shards = peers.all_do(lambda: _write_pieces(directory, pieces, peers))
        finish = partial(_write_sharded_manifest, directory, checkpoint, shards)
        peers.all_do(finish if peers.index == 0 else _nothing)
    except OSError:
        if peers.index == 0:
            remove_unused(directory)
        raise


def _nothing() -> None:
    pass


def _write_pieces(directory: Path, pieces: Pieces, peers: Peers) -> dict[str, Any]:
    """Writes a file a part; returns for each the file's entry in the manifest and the shapes of the whole tensors."""
    written = {}
    for part, tensors in pieces.items():
        label = f"{part}-{peers.index:05d}-of-{peers.count:05d}"
        entry = write_tensors(directory, label, {name: piece.tensor for name, piece in tensors.items()})
        entry["rows"] = {name: piece.start for name, piece in tensors.items()}
        written[part] = {"shard": entry, "shapes": {name: piece.shape for name, piece in tensors.items()}}
    sync_directory(directory)
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
    write_manifest(directory, content)


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

    def _write_snapshot(self, checkpoint: Checkpoint, directory: Path, then: Callable[[int], None]) -> Callable[[], None]:
        pieces: dict[str, dict[str, Piece]] = {}
        for part, tensors in checkpoint.parts.items():
            mine = {name: self._piece(tensor) for name, tensor in tensors.items()}
            pieces[part] = {
                name: piece._replace(tensor=piece.tensor.detach().to("cpu", copy=True))
                for name, piece in mine.items()
                if piece is not None
            }
        bare = replace(checkpoint, model={}, ema=None, optimizer=None)
        return partial(self._write_pieces, bare, pieces, directory, then)

    def _write_pieces(self, checkpoint: Checkpoint, pieces: Pieces, directory: Path, then: Callable[[int], None]) -> None:
        save_pieces(directory, checkpoint, pieces, self._peers)
        assert checkpoint.step is not None
        if self._peers.index == 0:
            then(checkpoint.step)
