"""What a run trains on: the data that a path names, opened and held against the run's config."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ditkernels.data.dataset import DatasetBatches
from ditkernels.data.digits import InMemoryBatches, LabelledImages, load_digits
from ditkernels.data.folder import FolderBatches, ImageFolder
from ditkernels.data.images import READER
from ditkernels.data.latents import INDEX, LatentBatches, LatentFolder
from ditkernels.data.lightning import LightningBatches, LightningFolder, is_lightning
from ditkernels.data.order import Batches
from ditkernels.data.vae import LatentSpace

IMAGE_SIZE = 256  # of images, where the config says nothing
VALIDATION_SEED = 0  # every run is measured on the same images


class DataConfig(Protocol):
    """What decides which data a run sees: fields of a ``TrainConfig``, explained there."""

    @property
    def data_path(self) -> str: ...
    @property
    def val_path(self) -> str | None: ...
    @property
    def unconditional(self) -> bool: ...
    @property
    def keep_empty_classes(self) -> bool: ...
    @property
    def max_pixels(self) -> int: ...
    @property
    def image_size(self) -> int | None: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def flip(self) -> bool: ...
    @property
    def vae(self) -> str: ...
    @property
    def max_unreadable(self) -> int: ...
    @property
    def global_batch_size(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def global_seed(self) -> int: ...
    @property
    def val_images(self) -> int: ...


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is measured by.

    Attributes:
        train: batches of ``global_batch_size`` images.
        validation: batches of the images the validation loss is taken of, or None.
        length: images in an epoch.
        shape: (C, H, W) of an image, or of a latent.
        image_size: edge of an image, or of that which a latent was made of.
        class_to_idx: label by name of class.
        latents: what they mean, where batches hold moments of latents; None where they hold images.
        encoded: batches hold latents as the model sees them, of an autoencoder that is not known here.
        image_reader: the version of what has read the images; None where they came from no files.
        notes: what was passed over, in sentences.
        images_per_class: how many images each class has, by label; None where that is not known without reading them.
    """

    train: Batches
    validation: Batches | None
    length: int
    shape: tuple[int, int, int]
    image_size: int
    class_to_idx: dict[str, int]
    latents: LatentSpace | None = None
    encoded: bool = False
    image_reader: int | None = None
    notes: tuple[str, ...] = ()
    images_per_class: tuple[int, ...] | None = None


def opened(config: DataConfig, data: TrainingData | Dataset[Any] | None, held_out: Dataset[Any] | None) -> TrainingData:
    """What is trained on: what is given, or what ``config.data_path`` names; errors as of those two.

    Raises:
        ValueError: held-out data beside something else than a data set.
    """
    if held_out is not None and (data is None or isinstance(data, TrainingData)):
        raise ValueError("val_data: got a data set, allowed beside a data set as data; val_path names held-out files")
    if data is None:
        return open_data(config)
    return data if isinstance(data, TrainingData) else open_dataset(config, data, held_out)


def open_data(config: DataConfig) -> TrainingData:
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
    if is_lightning(Path(config.data_path)):
        return _open_lightning(config)
    size = config.image_size or IMAGE_SIZE
    scan = partial(ImageFolder.scan, unconditional=config.unconditional, keep_empty=config.keep_empty_classes)
    folder = scan(config.data_path)
    _check_classes(len(folder.class_to_idx), config)
    reading = partial(FolderBatches, image_size=size, max_unreadable=config.max_unreadable, max_pixels=config.max_pixels)
    train = reading(folder, config.global_batch_size, config.global_seed, flip=config.flip)
    validation, notes = None, folder.notes
    if config.val_path is not None:
        held_out = scan(config.val_path, name="val_path")
        if held_out.class_to_idx != folder.class_to_idx:
            raise ValueError(f"val_path: the classes of {config.val_path} are not those of {config.data_path}")
        validation = reading(held_out, _validation_batch(config), VALIDATION_SEED, flip=False)
        notes += held_out.notes
    shape = (3, size, size)
    return TrainingData(
        train,
        validation,
        len(folder),
        shape,
        size,
        folder.class_to_idx,
        image_reader=READER,
        notes=notes,
        images_per_class=_per_class(folder.labels, len(folder.class_to_idx)),
    )


def open_dataset(config: DataConfig, dataset: Dataset[Any], held_out: Dataset[Any] | None = None) -> TrainingData:
    """Training data of a map-style data set of (image, label); see :class:`DatasetBatches`.

    Args:
        held_out: what the validation loss is taken of.

    Raises:
        ValueError: it is no such data set, its items do not fit the config, or nothing says how many classes there are.
    """
    names = {} if config.unconditional else _names_of(dataset)
    _check_classes(len(names), config)
    classes = None if config.unconditional else config.num_classes or len(names)
    if classes == 0:
        raise ValueError("num_classes: got none, and the data set has no .classes that tell; allowed is 1 or more")
    batches = partial(DatasetBatches, image_size=config.image_size or IMAGE_SIZE, classes=classes)
    train = batches(dataset, config.global_batch_size, config.global_seed)
    validation = None if held_out is None else batches(held_out, _validation_batch(config), VALIDATION_SEED)
    channels, height, width = train.shape
    if validation is not None and validation.shape != train.shape:
        raise ValueError(f"val_data: got images of shape {validation.shape}, those of data have {train.shape}")
    counts = (train.stream.length,) if config.unconditional else _per_class_of(dataset, classes or 0)
    return TrainingData(train, validation, train.stream.length, (channels, height, width), height, names, images_per_class=counts)


def _per_class(labels: Tensor, classes: int) -> tuple[int, ...]:
    return tuple(torch.bincount(labels, minlength=classes).tolist())


def _per_class_of(dataset: Any, classes: int) -> tuple[int, ...] | None:
    """What ``.targets`` tells, as torchvision's data sets have them: not where they are other than the labels of the items."""
    targets = getattr(dataset, "targets", None)
    if targets is None or getattr(dataset, "target_transform", None) is not None:
        return None
    try:
        labels = np.asarray(targets)
    except (TypeError, ValueError):
        return None
    if labels.dtype.kind not in "iu" or labels.shape != (len(dataset),) or labels.min() < 0 or labels.max() >= classes:
        return None
    return _per_class(torch.from_numpy(labels.astype(np.int64)), classes)


def _names_of(dataset: Any) -> dict[str, int]:
    """Label by name of class, as torchvision's data sets tell it; empty where they do not."""
    known = getattr(dataset, "class_to_idx", None)
    if isinstance(known, dict):
        return {str(name): int(label) for name, label in known.items()}
    return {str(name): label for label, name in enumerate(getattr(dataset, "classes", ()))}


def _open_latents(config: DataConfig) -> TrainingData:
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
    return TrainingData(
        train,
        validation,
        len(folder),
        folder.shape,
        folder.image_size,
        names,
        folder.space,
        image_reader=folder.image_reader,
        images_per_class=(len(folder),) if config.unconditional else _per_class(folder.labels(), len(names)),
    )


def _open_lightning(config: DataConfig) -> TrainingData:
    folder = LightningFolder(Path(config.data_path))
    classes = 0 if config.unconditional else int(folder.labels.max()) + 1
    _check_classes(classes, config)
    batches = partial(LightningBatches, unconditional=config.unconditional)
    train = batches(folder, config.global_batch_size, config.global_seed, flip=config.flip)
    validation = None
    if config.val_path is not None:
        held_out = LightningFolder(Path(config.val_path))
        if held_out.shape != folder.shape or not (
            torch.equal(held_out.mean, folder.mean) and torch.equal(held_out.std, folder.std)
        ):
            raise ValueError(f"val_path: the latents of {config.val_path} are not made as those of {config.data_path}")
        validation = batches(held_out, _validation_batch(config), VALIDATION_SEED, flip=False)
    names = {str(label): label for label in range(classes)}
    size = config.image_size or folder.shape[1]
    counts = (len(folder),) if config.unconditional else _per_class(folder.labels, classes)
    return TrainingData(train, validation, len(folder), folder.shape, size, names, encoded=True, images_per_class=counts)


def _latents_for(name: str, path: str, config: DataConfig) -> LatentFolder:
    """The latents at ``path``, which the setting ``name`` gives, if they fit the config."""
    folder = LatentFolder.open(path)
    if config.image_size not in (None, folder.image_size):
        raise ValueError(f"image_size: got {config.image_size}, {name} {path} holds latents of images of {folder.image_size}")
    if not folder.class_to_idx and not config.unconditional:
        raise ValueError(f"{name}: {path} holds latents without classes; allowed with --unconditional")
    return folder


def _open_digits(config: DataConfig) -> TrainingData:
    train, held_out = load_digits()
    channels, height, width = train.images.shape[1:]
    if config.image_size not in (None, height):
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
        height,
        names,
        images_per_class=_per_class(train.labels, len(names)),
    )


def _validation_batch(config: DataConfig) -> int:
    return min(config.val_images, config.global_batch_size // config.accumulation)


def _check_classes(found: int, config: DataConfig) -> None:
    if config.num_classes is not None and found > config.num_classes:
        raise ValueError(f"num_classes: got {config.num_classes}, but {config.data_path} has {found} classes")
