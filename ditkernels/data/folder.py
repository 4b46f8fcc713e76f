"""Folders of images: one subfolder a class, as ImageNet has them; read, cropped as ADM crops, and mirrored by chance."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ditkernels.data.formats import FORMATS, UnreadableImageError
from ditkernels.data.images import MAX_PIXELS, read_crop
from ditkernels.data.order import Batch, ShuffledStream, Unreadable, mirrored
from ditkernels.data.tree import class_folders, images_under, notes_of
from ditkernels.files import printable

# Folders of these names that hold folders are no classes.
SPLITS = {"train", "val", "valid", "test"}


class UnreadableImagesError(ValueError):
    """More images are unreadable than the run allows."""


class ReadImage(NamedTuple):
    """What :meth:`ImageFolder.read` found.

    Attributes:
        image: (3, image_size, image_size) uint8.
        at: the index that it was found at.
        unreadable: the files before it that were passed over.
        animated: whether its file holds more frames than this one.
    """

    image: Tensor
    at: int
    unreadable: tuple[Unreadable, ...]
    animated: bool


@dataclass(frozen=True)
class ImageFolder:
    """The images under a folder: one subfolder a class, as ImageNet has them, or all of one class.

    Attributes:
        root: the folder.
        files: paths under it, sorted within each class.
        labels: (len(files),) int64.
        class_to_idx: label by name of subfolder, in sorted order; empty if unconditional.
        notes: what was passed over, in sentences.
    """

    root: Path
    files: list[str]
    labels: Tensor
    class_to_idx: dict[str, int]
    notes: tuple[str, ...] = ()

    @staticmethod
    def scan(
        root: str | os.PathLike[str], *, unconditional: bool = False, keep_empty: bool = False, name: str = "data_path"
    ) -> ImageFolder:
        """Finds the images; none is opened.

        Args:
            root: the folder. Hidden folders and files, and those that systems leave behind, are no classes and no images.
            unconditional: all images are of one class.
            keep_empty: a folder without images is a class that no image is of.
            name: the setting that names the folder, for the errors.

        Raises:
            ValueError: the folder is missing, holds no images, or a class without images; it is named.
            OSError: the disk did not list it.
        """
        root = Path(root)
        shown = printable(str(root))
        if not root.is_dir():
            raise ValueError(f"{name}: {shown} is no folder")
        passed_over: Counter[str] = Counter()
        folders = [""] if unconditional else class_folders(root, passed_over)
        if not unconditional and folders and set(folders) <= SPLITS and all(_holds_folders(root / folder) for folder in folders):
            raise ValueError(
                f"{name}: {shown} holds {', '.join(folders)}, which are parts of a data set and no classes; give one of them, "
                f"as {printable(str(root / folders[0]))}"
            )
        found = [images_under(root, folder) for folder in folders]
        files = [file for part in found for file in part.files]
        if not files:
            expected = "no image" if unconditional else "no subfolder with images"
            raise ValueError(f"{name}: {shown} holds {expected} ({', '.join(FORMATS)})")
        empty = [printable(folder) for folder, part in zip(folders, found, strict=True) if not part.files]
        if empty and not keep_empty:
            raise ValueError(
                f"{name}: {shown} holds classes without images: {', '.join(empty[:8])}; "
                "remove them, or --keep-empty-classes keeps their numbers"
            )
        for part in found:
            passed_over += part.passed_over
        labels = torch.repeat_interleave(torch.arange(len(folders)), torch.tensor([len(part.files) for part in found]))
        names = {} if unconditional else {folder: label for label, folder in enumerate(folders)}
        return ImageFolder(root, files, labels, names, tuple(notes_of(root, passed_over, files)))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, image_size: int, max_unreadable: int, max_pixels: int = MAX_PIXELS) -> ReadImage:
        """The image at ``index``, cropped, or the next readable one.

        Raises:
            UnreadableImagesError: more than ``max_unreadable`` in a row are unreadable, or all there are.
            OSError, MemoryError: as :func:`read_crop`; no other image stands in then.
        """
        attempts = min(max_unreadable + 1, len(self))
        unreadable: list[Unreadable] = []
        for attempt in range(attempts):
            at = (index + attempt) % len(self)
            path = self.root / self.files[at]
            try:
                pixels, animated = read_crop(path, image_size, max_pixels)
            except UnreadableImageError as error:
                unreadable.append(Unreadable(self.files[at], str(error)))
                continue
            return ReadImage(torch.from_numpy(pixels).permute(2, 0, 1), at, tuple(unreadable), animated)
        last = printable(str(self.root / unreadable[-1].file))
        raise UnreadableImagesError(f"unreadable images: got {attempts} in a row, the last {last}: {unreadable[-1].reason}")


def _holds_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() for entry in entries)


class FolderBatches:
    """Batches of an :class:`ImageFolder`: cropped, mirrored by chance, uint8.

    Args:
        folder: the images.
        image_size: edge of the crop.
        flip: mirror an image with probability 1/2, keyed by (seed, step, position in the batch).
        max_unreadable: files in a row that may be unreadable.
        max_pixels: of an image that is decoded; a larger one is unreadable.
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
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise ImportError("image folders need Pillow: pip install ditkernels[vae]")
        self.folder = folder
        self.image_size = image_size
        self.flip = flip
        self.max_unreadable = max_unreadable
        self.max_pixels = max_pixels
        self.stream = ShuffledStream(len(folder), batch_size, seed)

    def __getitem__(self, step: int) -> Batch:
        return self.at(step, torch.arange(self.stream.batch_size))

    def at(self, step: int, positions: Tensor) -> Batch:
        """As :meth:`Batches.at`."""
        chosen = self.stream.batch(step)[positions]
        batch = read_batch(self.folder, chosen.tolist(), self.image_size, self.max_unreadable, self.max_pixels)
        if not self.flip:
            return batch
        flipped = mirrored(self.stream.seed, step, positions)[:, None, None, None]
        return batch._replace(images=torch.where(flipped, batch.images.flip(-1), batch.images))


def read_batch(
    folder: ImageFolder, indices: Sequence[int], image_size: int, max_unreadable: int, max_pixels: int = MAX_PIXELS
) -> Batch:
    """The images at ``indices``, none mirrored, uint8; other arguments and errors as of :meth:`ImageFolder.read`."""
    read = [folder.read(index, image_size, max_unreadable, max_pixels) for index in indices]
    return Batch(
        torch.stack([found.image for found in read]),
        folder.labels[[found.at for found in read]],
        tuple(Unreadable(str(folder.root / file), reason) for found in read for file, reason in found.unreadable),
        tuple(str(folder.root / folder.files[found.at]) for found in read if found.animated),
    )


def as_floats(images: Tensor) -> Tensor:
    """Images of bytes, in [-1, 1]."""
    return images.float() / 127.5 - 1
