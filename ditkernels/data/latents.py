"""Latents on disk: the posterior of every image and of its mirror image, in safetensors shards beside an index.

    latents.json                 what they are, by which VAE, and every shard with its SHA-256
    latents-00000.safetensors    moments (n, 2, 2·C, h, w): image, mirrored; mean, then standard deviation; labels (n,) int64

A draw from a posterior needs one normal a number, keyed as if the image were encoded while training, so mean and standard deviation
are stored and not z. What is read of a sample lies in one piece, 16 KiB for an image of 256 px in fp16, in files mapped
into memory: a batch costs one copy of what it holds, and processes that read share the pages. A disk that fails under a mapped file
kills the process, so on a network disk an error of reading has no name here, as it has for images.

Opening looks at the index's own checksum and at every shard's presence, size and header. Their SHA-256 would read all of them,
tens of gigabytes, at every start: `ditkernels encode --verify` does that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ditkernels.data.order import Batch, ShuffledStream, mirrored
from ditkernels.data.vae import LatentSpace
from ditkernels.files import read_signed, sha256, signed

INDEX = "latents.json"
FORMAT, FORMAT_VERSION = "ditkernels-latents", 1
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
IMAGE, MIRRORED = 0, 1


class LatentsError(ValueError):
    """Latents are missing, damaged or not what they claim to be; the message names the file."""


@dataclass(frozen=True)
class Shard:
    """A file of latents: its name, how many images it holds, its size and its SHA-256."""

    name: str
    count: int
    bytes: int
    sha256: str


class LatentFolder:
    """Latents as ``ditkernels encode`` wrote them.

    Args:
        root: the folder.
        index: the content of its index.

    Attributes:
        image_size: edge of the images, in pixels.
        shape: (C, h, w) of a latent.
        dtype: of the stored moments.
        class_to_idx: label by name of class; empty if they have none.
        space: what the latents mean.
        image_reader: the version of the reader that the images were read with.
        shards: all hold equally many images but the last.
    """

    def __init__(self, root: Path, index: Mapping[str, Any]) -> None:
        self.root = root
        self.image_size: int = index["image_size"]
        channels, height, width = index["shape"]
        self.shape: tuple[int, int, int] = (channels, height, width)
        self.dtype = DTYPES[index["dtype"]]
        self.class_to_idx: dict[str, int] = index["class_to_idx"]
        self.space = LatentSpace(**index["vae"])
        self.image_reader: int = index.get("made_with", {}).get("image_reader", 1)
        self.shards = [Shard(**shard) for shard in index["shards"]]
        self.length: int = index["count"]
        self._mapped: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def open(root: str | os.PathLike[str]) -> LatentFolder:
        """The latents at ``root``, every shard there, of the right size and header; their content is not read.

        Raises:
            LatentsError: there are none, or a file is missing, cut short or altered; it is named.
        """
        folder = LatentFolder(Path(root), read_index(Path(root) / INDEX))
        for number in range(len(folder.shards)):
            folder._check_header(number)
        return folder

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        # A process that reads maps the files itself; a mapped tensor would be sent as a copy.
        return {**self.__dict__, "_mapped": {}}

    def read(self, indices: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """The moments (B, 2·C, h, w) in the stored dtype, and labels (B,) int64, of the images at ``indices`` (B,) int64.

        Args:
            mirrored: (B,) bool, where the mirrored image is wanted.
        """
        channels, height, width = self.shape
        moments = torch.empty(len(indices), 2 * channels, height, width, dtype=self.dtype)
        labels = torch.empty(len(indices), dtype=torch.int64)
        sides = mirrored.long().tolist()
        for row, (index, side) in enumerate(zip(indices.tolist(), sides, strict=True)):
            number, offset = divmod(index, self.shards[0].count)
            held, held_labels = self._tensors(number)
            moments[row], labels[row] = held[offset, side], held_labels[offset]
        return moments, labels

    def labels(self) -> Tensor:
        """The labels (N,) int64 of all images; of the shards nothing else is read.

        Raises:
            LatentsError: as of :meth:`open`.
        """
        found = []
        for number in range(len(self.shards)):
            with self._opened(number) as file:
                found.append(file.get_tensor("labels"))
        return torch.cat(found)

    def verify(self, number: int) -> None:
        """Reads a whole shard.

        Raises:
            LatentsError: its SHA-256 is not the one in the index.
        """
        shard = self.shards[number]
        if sha256(self.root / shard.name) != shard.sha256:
            raise LatentsError(f"{self.root / shard.name} is altered: its SHA-256 is not the one in {INDEX}")

    def _tensors(self, number: int) -> tuple[Tensor, Tensor]:
        if number not in self._mapped:
            with self._opened(number) as file:
                self._mapped[number] = file.get_tensor("moments"), file.get_tensor("labels")
        return self._mapped[number]

    def _check_header(self, number: int) -> None:
        shard = self.shards[number]
        path = self.root / shard.name
        if not path.is_file():
            raise LatentsError(f"{path} is missing, though {INDEX} lists it")
        size = path.stat().st_size
        if size != shard.bytes:
            raise LatentsError(f"{path} has {size} bytes, {INDEX} says {shard.bytes}")
        channels, height, width = self.shape
        expected = {
            "moments": ([shard.count, 2, 2 * channels, height, width], self.dtype),
            "labels": ([shard.count], torch.int64),
        }
        with self._opened(number) as file:
            found = {name: _header_of(file, name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if found != expected:
            raise LatentsError(f"{path} is altered: it holds {found}, {INDEX} says {expected}")

    def _opened(self, number: int) -> Any:
        path = self.root / self.shards[number].name
        try:
            return safetensors.safe_open(path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise LatentsError(f"{path} is no safetensors file: {error}") from error


def _header_of(file: Any, name: str) -> tuple[list[int], torch.dtype]:
    # A mapped tensor has its shape and dtype before any of it is read.
    tensor = file.get_tensor(name)
    return list(tensor.shape), tensor.dtype


def make_index(content: Mapping[str, Any], shards: list[Shard]) -> dict[str, Any]:
    """The index of ``shards``, in order, and of what else is known of them; it carries its own checksum."""
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **content,
        "shards": [asdict(shard) for shard in shards],
    }
    return signed(body)


def read_index(path: Path) -> dict[str, Any]:
    """What :func:`make_index` made, without its checksum.

    Raises:
        LatentsError: there is no index, or it is damaged.
    """
    if not path.is_file():
        raise LatentsError(f"{path.parent} holds no latents: {path.name} is not there")
    try:
        return read_signed(path, f"the index of {FORMAT}", {"format": FORMAT}, (FORMAT_VERSION,))
    except ValueError as error:
        raise LatentsError(str(error)) from error


# ---- In the order of training ----------------------------------------------------------------------------------------


class LatentBatches:
    """Batches of a :class:`LatentFolder`: the moments of images, or by chance of mirrored ones.

    A mirrored latent is not the latent of the mirrored image, so both were encoded, and the draw that would mirror the image
    chooses among them. An epoch has every image once.

    Args:
        folder: the latents.
        flip: take the mirrored image with probability 1/2, keyed as in :class:`FolderBatches`.
        unconditional: all labels are 0.
        batch_size, seed: as of :class:`ShuffledStream`.
    """

    def __init__(self, folder: LatentFolder, batch_size: int, seed: int, *, flip: bool, unconditional: bool) -> None:
        self.folder = folder
        self.flip = flip
        self.unconditional = unconditional
        self.stream = ShuffledStream(len(folder), batch_size, seed)

    def __getitem__(self, step: int) -> Batch:
        return self.at(step, torch.arange(self.stream.batch_size))

    def at(self, step: int, positions: Tensor) -> Batch:
        """As :meth:`Batches.at`."""
        chosen = self.stream.batch(step)[positions]
        flipped = mirrored(self.stream.seed, step, positions) & self.flip
        moments, labels = self.folder.read(chosen, flipped)
        return Batch(moments, 0 * labels if self.unconditional else labels)
