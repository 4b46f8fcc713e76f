"""Latents as LightningDiT stores them (Yao et al., arXiv 2501.01423): drawn once, of images and of their mirror images.

    *.safetensors       latents, latents_flip (n, C, h, w); labels (n,), in the order of the files' names
    latents_stats.pt    mean and std (1, C, 1, 1) of all of them

The model sees (latent − mean) / std. The autoencoder is not known here, so nothing is decoded.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ditkernels.data.latents import LatentsError
from ditkernels.data.order import Batch, ShuffledStream, mirrored
from ditkernels.files import first_line, printable

STATISTICS = "latents_stats.pt"
KEYS = ("latents", "latents_flip", "labels")


def is_lightning(root: Path) -> bool:
    """Whether a folder holds such latents: pieces of that suffix, or the statistics."""
    return root.is_dir() and ((root / STATISTICS).exists() or any(root.glob("*.safetensors")))


class LightningFolder:
    """The latents of a folder.

    Attributes:
        shape: (C, h, w) of a latent.
        labels: (N,) int64 of all of them.

    Raises:
        LatentsError: there are none, or a file is missing, damaged or of another layout; it is named.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = sorted(root.glob("*.safetensors"))
        if not self.files:
            raise LatentsError(f"{printable(str(root))} holds {STATISTICS} and no *.safetensors beside it")
        self._mapped: dict[int, dict[str, Tensor]] = {}
        pieces = [self._tensors(number) for number in range(len(self.files))]
        self.shape: tuple[int, int, int] = tuple(pieces[0]["latents"].shape[1:])  # type: ignore[assignment]
        for file, piece in zip(self.files, pieces, strict=True):
            _check_piece(file, piece, self.shape)
        self.labels = torch.cat([piece["labels"].long() for piece in pieces])
        self._ends = torch.tensor([len(piece["labels"]) for piece in pieces]).cumsum(0)
        self.mean, self.std = _statistics(root / STATISTICS, self.shape[0])

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        # A process that reads maps the files itself.
        return {**self.__dict__, "_mapped": {}}

    def read(self, indices: Tensor, flipped: Tensor) -> Tensor:
        """What the model sees of the latents at ``indices`` (B,) int64, (B, C, h, w) fp32; mirrored where ``flipped`` (B,) is."""
        found = torch.empty(len(indices), *self.shape)
        pieces = torch.searchsorted(self._ends, indices, right=True).tolist()
        for row, (index, piece, side) in enumerate(zip(indices.tolist(), pieces, flipped.tolist(), strict=True)):
            before = int(self._ends[piece - 1]) if piece else 0
            found[row] = self._tensors(piece)["latents_flip" if side else "latents"][index - before]
        return (found - self.mean) / self.std

    def _tensors(self, number: int) -> dict[str, Tensor]:
        if number not in self._mapped:
            path = self.files[number]
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    self._mapped[number] = {name: file.get_tensor(name) for name in KEYS}
            except (safetensors.SafetensorError, OSError) as error:
                raise LatentsError(f"{printable(str(path))} holds no {', '.join(KEYS)}: {first_line(error)}") from error
        return self._mapped[number]


def _check_piece(path: Path, piece: dict[str, Tensor], shape: tuple[int, int, int]) -> None:
    count = len(piece["labels"])
    expected = {"latents": (count, *shape), "latents_flip": (count, *shape), "labels": (count,)}
    found = {name: tuple(tensor.shape) for name, tensor in piece.items()}
    if len(shape) != 3 or found != expected or piece["labels"].is_floating_point():
        raise LatentsError(f"{printable(str(path))}: got {found}, allowed is {expected} with labels of whole numbers")


def _statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (C, 1, 1); errors as of :class:`LightningFolder`."""
    shown = printable(str(path))
    if not path.is_file():
        raise LatentsError(f"{shown} is missing, which says what the latents beside it are divided by")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise LatentsError(f"{shown} is no file of plain tensors: {first_line(error)}") from error
    found = [content.get(name) if isinstance(content, dict) else None for name in ("mean", "std")]
    if not all(isinstance(tensor, Tensor) and tensor.numel() == channels for tensor in found):
        raise LatentsError(f"{shown}: allowed are mean and std of {channels} numbers each")
    mean, std = (tensor.float().reshape(channels, 1, 1) for tensor in found)  # type: ignore[union-attr]
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise LatentsError(f"{shown}: got a mean or std that is not finite, or a std that is not above 0")
    return mean, std


class LightningBatches:
    """Batches of a :class:`LightningFolder`; arguments as of :class:`LatentBatches`."""

    def __init__(self, folder: LightningFolder, batch_size: int, seed: int, *, flip: bool, unconditional: bool) -> None:
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
        labels = self.folder.labels[chosen]
        return Batch(self.folder.read(chosen, flipped), 0 * labels if self.unconditional else labels)
