"""Data sets, and the order in which training sees them.

A batch is a pure function of (seed, step): which images, which of them are mirrored. So no number of worker processes and no
restart changes what a run trains on, and a checkpoint needs to remember the step alone.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ditkernels.config import TrainConfig
from ditkernels.latents import INDEX, LatentFolder
from ditkernels.random import Stream, below, permutation
from ditkernels.vae import LatentSpace

if TYPE_CHECKING:
    from PIL.Image import Image

HELD_OUT_EVERY = 5
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SHIELDED = (signal.SIGINT, signal.SIGTERM)
VALIDATION_SEED = 0  # every run is measured on the same images


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, H, W) float32 in [-1, 1] and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"images, labels: got shapes {tuple(self.images.shape)} and {tuple(self.labels.shape)}, "
                "allowed are (N, C, H, W) and (N,)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> LabelledImages:
        """The same images on `device`."""
        return LabelledImages(self.images.to(device), self.labels.to(device))


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """The handwritten digits inside scikit-learn, as (train, held_out).

    1,797 grey 8 x 8 images in ten classes (UCI Optical Recognition of Handwritten Digits, Alpaydin and
    Kaynak 1998). Intensities 0..16 become [-1, 1]: images (N, 1, 8, 8) float32, labels (N,) int64 on the CPU.
    Every fifth image of each class is held out; the split never changes.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra that brings it.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ImportError(f"the handwritten digits need scikit-learn ({error}): pip install ditkernels[demo]") from error

    pixels, targets = sklearn_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(targets).long()
    held_out = _every_nth_of_each_class(labels, HELD_OUT_EVERY)
    return (
        LabelledImages(images[~held_out], labels[~held_out]),
        LabelledImages(images[held_out], labels[held_out]),
    )


def _every_nth_of_each_class(labels: Tensor, n: int) -> Tensor:
    # The file cycles through the classes for long stretches, so a plain stride would hold out two of them.
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        chosen[(labels == label).nonzero().flatten()[::n]] = True
    return chosen


class ShuffledStream:
    """An endless stream of sample indices: every epoch a fresh permutation, keyed by (seed, epoch).

    Batches are addressed by step and run across the ends of epochs, so a run that resumes at step k sees what
    an unbroken run would have seen, with nothing to restore.

    Args:
        length: samples in the data set.
        batch_size: indices a step.
        seed: fixes every permutation, together with the epoch.

    Raises:
        ValueError: `length` or `batch_size` is not positive, or `seed` is negative.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed: got {seed}, allowed is 0 or more")
        if length < 1:
            raise ValueError(f"length: got {length}, the data set must hold at least one sample")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, allowed is 1 or more")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """Indices (batch_size,) int64 of the samples of `step`, counted from 0."""
        position = step * self.batch_size
        end = position + self.batch_size
        pieces = []
        while position < end:
            epoch, start = divmod(position, self.length)
            piece = self._permutation(epoch)[start : start + end - position]
            pieces.append(piece)
            position += len(piece)
        return torch.cat(pieces)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._order = permutation(self.seed, epoch, self.length)
            self._epoch = epoch
        return self._order


class Batch(NamedTuple):
    """What a step trains on.

    Attributes:
        images: (B, C, H, W), float32 in [-1, 1] or uint8; where the data is latents, their moments (B, 2·C, h, w): mean, then
            standard deviation, fp32, bf16 or fp16.
        labels: (B,) int64.
        unreadable: files that should have been among them; the next readable ones stand in their place.
    """

    images: Tensor
    labels: Tensor
    unreadable: tuple[str, ...] = ()


class Steps(Protocol):
    """Something whose item k is the batch of step k."""

    def __getitem__(self, step: int) -> Batch: ...


class Batches(Steps, Protocol):
    """A data set in the order of training: item k is the batch of step k, a pure function of the seed and k."""

    def at(self, step: int, positions: Tensor) -> Batch:
        """The samples at ``positions`` (n,) int64 of the batch of ``step``; no others are read."""


class InMemoryBatches:
    """Batches of images that fit in memory; arguments as of :class:`ShuffledStream`."""

    def __init__(self, data: LabelledImages, batch_size: int, seed: int) -> None:
        self.data = data
        self.stream = ShuffledStream(len(data), batch_size, seed)

    def __getitem__(self, step: int) -> Batch:
        return self.at(step, torch.arange(self.stream.batch_size))

    def at(self, step: int, positions: Tensor) -> Batch:
        """As :meth:`Batches.at`."""
        chosen = self.stream.batch(step)[positions]
        return Batch(self.data.images[chosen], self.data.labels[chosen])


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
        mirrored = _mirrored(self.stream.seed, step, positions)[:, None, None, None]
        return batch._replace(images=torch.where(mirrored, batch.images.flip(-1), batch.images))


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


def _mirrored(seed: int, step: int, positions: Tensor) -> Tensor:
    """Which of the positions (n,) of a batch are mirrored, (n,) bool."""
    return below(2, seed, Stream.FLIP, step, positions) == 1


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
        mirrored = _mirrored(self.stream.seed, step, positions) & self.flip
        moments, labels = self.folder.read(chosen, mirrored)
        return Batch(moments, 0 * labels if self.unconditional else labels)


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


def stream_batches(batches: Steps, steps: Sequence[int], *, workers: int, pin_memory: bool) -> Generator[Batch, None, None]:
    """The batches of ``steps`` in order, made by ``workers`` processes, or in this one if 0; the same batches either way.

    Signals do not reach the workers: they end when the generator does, which should therefore be closed.
    """
    loader: DataLoader[Batch] = DataLoader(
        batches,  # type: ignore[arg-type]
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # A fork server would be one more process of the group; a signal would end it, and its workers with it.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # Otherwise it would draw a seed from the caller's.
        generator=torch.Generator(),
    )
    # Workers inherit the mask, and are born with signals held back until they ignore them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from iterator
    finally:
        if workers:
            # At the interpreter's exit they would be sent the SIGTERM that they ignore, and waited for.
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(_worker: int) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach the whole group; the trainer decides when its workers stop.
    for number in SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)
    torch.set_num_threads(1)


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is measured by.

    Attributes:
        train: batches of ``global_batch_size`` images.
        validation: batches of the images the validation loss is taken of, or None.
        length: images in an epoch.
        shape: (C, H, W) of an image, or of a latent.
        class_to_idx: label by name of class.
        latents: what they mean, where batches hold moments of latents; None where they hold images.
    """

    train: Batches
    validation: Batches | None
    length: int
    shape: tuple[int, int, int]
    class_to_idx: dict[str, int]
    latents: LatentSpace | None = None


def open_data(config: TrainConfig) -> TrainingData:
    """The data that ``config.data_path`` names: 'digits', a folder of images, or one of latents, known by its index.

    Raises:
        ValueError: no such data, or it does not fit ``image_size`` or ``num_classes``.
        ImportError: the extra that reads it is not installed.
    """
    if not config.data_path:
        raise ValueError("data_path: got nothing, allowed are a folder of images or of latents, and 'digits'")
    if config.data_path == "digits" and not Path("digits").is_dir():
        return _open_digits(config)
    if (Path(config.data_path) / INDEX).is_file():
        return _open_latents(config)
    folder = ImageFolder.scan(config.data_path, unconditional=config.unconditional)
    _check_classes(len(folder.class_to_idx), config)
    reading = {"image_size": config.image_size, "max_unreadable": config.max_unreadable}
    train = FolderBatches(folder, config.global_batch_size, config.global_seed, flip=config.flip, **reading)
    validation = None
    if config.val_path is not None:
        held_out = ImageFolder.scan(config.val_path, unconditional=config.unconditional)
        if held_out.class_to_idx != folder.class_to_idx:
            raise ValueError(f"val_path: the classes of {config.val_path} are not those of {config.data_path}")
        validation = FolderBatches(held_out, _validation_batch(config), VALIDATION_SEED, flip=False, **reading)
    shape = (3, config.image_size, config.image_size)
    return TrainingData(train, validation, len(folder), shape, folder.class_to_idx)


def _open_latents(config: TrainConfig) -> TrainingData:
    folder = _latents_for("data_path", config.data_path, config)
    _check_classes(len(folder.class_to_idx), config)
    batches = partial(LatentBatches, unconditional=config.unconditional)
    train = batches(folder, config.global_batch_size, config.global_seed, flip=config.flip)
    validation = None
    if config.val_path is not None:
        held_out = _latents_for("val_path", config.val_path, config)
        different = folder.space.differences(held_out.space)
        if different:
            raise ValueError(f"val_path: {config.val_path} is of another VAE: {'; '.join(different)}")
        if held_out.class_to_idx != folder.class_to_idx:
            raise ValueError(f"val_path: the classes of {config.val_path} are not those of {config.data_path}")
        validation = batches(held_out, _validation_batch(config), VALIDATION_SEED, flip=False)
    names = {} if config.unconditional else folder.class_to_idx
    return TrainingData(train, validation, len(folder), folder.shape, names, folder.space)


def _latents_for(name: str, path: str, config: TrainConfig) -> LatentFolder:
    """The latents at ``path``, which the setting ``name`` gives, if they fit the config."""
    folder = LatentFolder.open(path)
    if folder.image_size != config.image_size:
        raise ValueError(f"image_size: got {config.image_size}, {name} {path} holds latents of images of {folder.image_size}")
    if not folder.class_to_idx and not config.unconditional:
        raise ValueError(f"{name}: {path} holds latents without classes; allowed with --unconditional")
    return folder


def _open_digits(config: TrainConfig) -> TrainingData:
    train, held_out = load_digits()
    channels, height, width = train.images.shape[1:]
    if config.image_size != height:
        raise ValueError(f"image_size: got {config.image_size}, the digits have {height}")
    if config.vae != "none":
        raise ValueError(f"vae: got {config.vae!r}, the digits are trained on as pixels: --vae none")
    names = {} if config.unconditional else {str(digit): digit for digit in range(10)}
    _check_classes(len(names), config)
    if config.unconditional:
        train, held_out = (LabelledImages(part.images, 0 * part.labels) for part in (train, held_out))
    return TrainingData(
        InMemoryBatches(train, config.global_batch_size, config.global_seed),
        InMemoryBatches(held_out, _validation_batch(config), VALIDATION_SEED),
        len(train),
        (channels, height, width),
        names,
    )


def _validation_batch(config: TrainConfig) -> int:
    return min(config.val_images, config.global_batch_size // config.accumulation)


def _check_classes(found: int, config: TrainConfig) -> None:
    if found > config.num_classes:
        raise ValueError(f"num_classes: got {config.num_classes}, but {config.data_path} has {found} classes")
