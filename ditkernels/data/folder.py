"""Folders of images: one subfolder a class, as ImageNet has them; read, cropped as ADM crops, and mirrored by chance."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ditkernels.data.order import Batch, ShuffledStream, mirrored

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class UnreadableImagesError(ValueError):
    """More images are unreadable than the run allows."""


@dataclass(frozen=True)
class ImageFolder:
    """The images under a folder: one subfolder a class, as ImageNet has them, or all of one class.

    Attributes:
        root: the folder.
        files: paths under it, sorted within each class.
        labels: (len(files),) int64.
        class_to_idx: label by name of subfolder, in sorted order; empty if unconditional.
    """

    root: Path
    files: list[str]
    labels: Tensor
    class_to_idx: dict[str, int]

    @staticmethod
    def scan(root: str | os.PathLike[str], *, unconditional: bool = False) -> ImageFolder:
        """Finds the images; none is opened.

        Raises:
            ValueError: the folder is missing, or holds no images.
        """
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"data_path: {root} is no folder")
        folders = [""] if unconditional else sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        found = [_images_under(root, folder) for folder in folders]
        kept = [(folder, files) for folder, files in zip(folders, found, strict=True) if files]
        if not kept:
            expected = "no image" if unconditional else "no subfolder with images"
            raise ValueError(f"data_path: {root} holds {expected} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        labels = torch.repeat_interleave(torch.arange(len(kept)), torch.tensor([len(files) for _, files in kept]))
        names = {} if unconditional else {folder: label for label, (folder, _) in enumerate(kept)}
        return ImageFolder(root, [file for _, files in kept for file in files], labels, names)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, image_size: int, max_unreadable: int) -> tuple[Tensor, int]:
        """The image at ``index``, or the next readable one.

        Returns:
            the image (3, image_size, image_size) uint8, cropped, and the index it was found at.

        Raises:
            UnreadableImagesError: more than ``max_unreadable`` in a row are unreadable, or all there are.
        """
        from PIL import Image, UnidentifiedImageError

        # What Pillow raises on files cut short or altered, whatever their format.
        damaged = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
        attempts = min(max_unreadable + 1, len(self))
        for attempt in range(attempts):
            at = (index + attempt) % len(self)
            try:
                with Image.open(self.root / self.files[at]) as image:
                    pixels = center_crop(image.convert("RGB"), image_size)
            except damaged:
                continue
            return torch.from_numpy(pixels).permute(2, 0, 1), at
        raise UnreadableImagesError(f"unreadable images: got {attempts} in a row, the last {self.root / self.files[at]}")

    def unreadable(self, index: int, found: int) -> list[str]:
        """The files that :meth:`read` passed over from ``index`` on, when it found an image at ``found``."""
        return [self.files[(index + ahead) % len(self)] for ahead in range((found - index) % len(self))]


def _images_under(root: Path, folder: str) -> list[str]:
    found = []
    for path, _, names in os.walk(root / folder, followlinks=True):
        inside = os.path.relpath(path, root)
        found += [os.path.join(inside, name) for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


class FolderBatches:
    """Batches of an :class:`ImageFolder`: cropped, mirrored by chance, uint8.

    Args:
        folder: the images.
        image_size: edge of the crop.
        flip: mirror an image with probability 1/2, keyed by (seed, step, position in the batch).
        max_unreadable: files in a row that may be unreadable.
        batch_size, seed: as of :class:`ShuffledStream`.

    Raises:
        ImportError: Pillow is not installed.
    """

    def __init__(
        self,
        folder: ImageFolder,
        batch_size: int,
        seed: int,
        *,
        image_size: int,
        flip: bool,
        max_unreadable: int,
    ) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise ImportError("image folders need Pillow: pip install ditkernels[vae]")
        self.folder = folder
        self.image_size = image_size
        self.flip = flip
        self.max_unreadable = max_unreadable
        self.stream = ShuffledStream(len(folder), batch_size, seed)

    def __getitem__(self, step: int) -> Batch:
        return self.at(step, torch.arange(self.stream.batch_size))

    def at(self, step: int, positions: Tensor) -> Batch:
        """As :meth:`Batches.at`."""
        chosen = self.stream.batch(step)[positions]
        batch = read_batch(self.folder, chosen.tolist(), self.image_size, self.max_unreadable)
        if not self.flip:
            return batch
        flipped = mirrored(self.stream.seed, step, positions)[:, None, None, None]
        return batch._replace(images=torch.where(flipped, batch.images.flip(-1), batch.images))


def read_batch(folder: ImageFolder, indices: Sequence[int], image_size: int, max_unreadable: int) -> Batch:
    """The images at ``indices``, none mirrored, uint8; other arguments and errors as of :meth:`ImageFolder.read`."""
    read = [folder.read(index, image_size, max_unreadable) for index in indices]
    passed = [folder.unreadable(index, found) for index, (_, found) in zip(indices, read, strict=True)]
    return Batch(
        torch.stack([image for image, _ in read]),
        folder.labels[[found for _, found in read]],
        tuple(str(folder.root / file) for files in passed for file in files),
    )


def as_floats(images: Tensor) -> Tensor:
    """Images of bytes, in [-1, 1]."""
    return images.float() / 127.5 - 1


def center_crop(image: Image, size: int) -> np.ndarray:
    """The square centre of a Pillow image, (size, size, channels) uint8, as ADM prepares ImageNet.

    Halved by box averages while both edges stay at least twice ``size``, then resized bicubically until the shorter
    edge is ``size``, then cropped (Dhariwal & Nichol, arXiv 2105.05233; the crop every DiT number rests on).
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    resized = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    pixels = np.array(resized)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]
