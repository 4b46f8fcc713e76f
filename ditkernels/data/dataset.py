"""A data set of one's own: any map-style ``torch.utils.data.Dataset`` of (image, label).

Augmentations draw from Python's, numpy's and torch's generators. These are seeded for each item by a key of (seed, step, position)
and put back after, in this process or in another that reads: so the number of processes and a restart change no byte.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ditkernels.data.folder import as_floats
from ditkernels.data.images import Picture
from ditkernels.data.order import Batch, ShuffledStream
from ditkernels.rng import Stream, words

CHANNELS = (1, 3, 4)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")  # of bytes
LIMIT = 1.0 + 1e-5  # of a float: a resize may go a rounding beyond


class ItemError(ValueError):
    """An item of a data set is no image with a label, or could not be had; its index is named."""


class DatasetBatches:
    """Batches of the items of a data set.

    Args:
        dataset: items are (image, label). An image is PIL's, cropped and resized as a folder's are; or a tensor or array, uint8
            (C, H, W) or (H, W, C), or float (C, H, W) in [-1, 1]. Mirroring is left to the data set.
        image_size: edge of a PIL image's crop.
        classes: labels are below it; None: every image is of class 0, whatever its label.
        batch_size, seed: as of :class:`ShuffledStream`.

    Raises:
        ValueError: the data set has no length, or is one that can only be iterated; its first item is of another kind.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, seed: int, *, image_size: int, classes: int | None) -> None:
        self.dataset = dataset
        self.image_size = image_size
        self.classes = classes
        self.stream = ShuffledStream(length_of(dataset), batch_size, seed)
        self.shape = tuple(self.item(0, key=0)[0].shape)

    def __getitem__(self, step: int) -> Batch:
        return self.at(step, torch.arange(self.stream.batch_size))

    def at(self, step: int, positions: Tensor) -> Batch:
        """As :meth:`Batches.at`."""
        chosen = self.stream.batch(step)[positions].tolist()
        keys = words(self.stream.seed, Stream.ITEM, step, positions, 1).flatten().tolist()
        items = [self.item(index, key) for index, key in zip(chosen, keys, strict=True)]
        images = [image for image, _ in items]
        if len({image.dtype for image in images}) > 1:
            images = [as_floats(image) if image.dtype == torch.uint8 else image for image in images]
        for index, image in zip(chosen, images, strict=True):
            if image.shape != self.shape:
                raise ItemError(f"data: item {index}: got shape {tuple(image.shape)}, item 0 has {self.shape}")
        return Batch(torch.stack(images), torch.tensor([label for _, label in items]))

    def item(self, index: int, key: int) -> tuple[Tensor, int]:
        """The image (C, H, W), uint8 or float32 in [-1, 1], and the label of an item, with every generator seeded by ``key``.

        Raises:
            ItemError: the data set raised something, or the item is of another kind; the index is named.
        """
        with _seeded(key):
            try:
                image, label = self.dataset[index]
            except Exception as error:
                raise ItemError(f"data: item {index}: {type(error).__name__}: {error}") from error
        try:
            return self._image(image), self._label(label)
        except ValueError as error:
            raise ItemError(f"data: item {index}: {error}") from error

    def _image(self, image: Any) -> Tensor:
        if hasattr(image, "getbands"):
            if image.mode not in MODES:
                raise ValueError(f"got a PIL image of mode {image.mode}, allowed are {', '.join(MODES)}")
            picture = Picture(image, orientation=1, transparency=image.info.get("transparency"), frames=False)
            return torch.from_numpy(picture.cropped(self.image_size)).permute(2, 0, 1)
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image))
        if not isinstance(image, Tensor):
            raise ValueError(f"got an image of {type(image).__name__}, allowed are PIL's, tensors and arrays")
        if image.ndim != 3:
            raise ValueError(f"got an image of shape {tuple(image.shape)}, allowed are (C, H, W), and (H, W, C) of bytes")
        if image.dtype == torch.uint8:
            channels_last = image.shape[0] not in CHANNELS and image.shape[2] in CHANNELS
            return image.permute(2, 0, 1).contiguous() if channels_last else image
        if not image.is_floating_point():
            raise ValueError(f"got an image of {image.dtype}, allowed are uint8 and floats in [-1, 1]")
        image = image.float()
        low, high = (float(end) for end in image.aminmax())
        if not -LIMIT <= low <= high <= LIMIT:
            raise ValueError(f"got floats from {low:g} to {high:g}, allowed are -1 to 1")
        return image

    def _label(self, label: Any) -> int:
        if self.classes is None:
            return 0
        known = isinstance(label, (Tensor, np.ndarray, np.generic)) and len(np.asarray(label).reshape(-1)) == 1
        number = label.item() if known else label
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"got label {label!r}, allowed are whole numbers")
        if not 0 <= number < self.classes:
            raise ValueError(f"got label {number}, allowed are 0..{self.classes - 1}")
        return number


def length_of(dataset: Any) -> int:
    """How many items there are. Raises ValueError where that is not known."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"data: got {type(dataset).__name__}, an IterableDataset, which cannot go on at a step; "
            "allowed are map-style data sets, with __getitem__ and __len__"
        )
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"data: got {type(dataset).__name__}, allowed are map-style data sets, with __getitem__ and __len__")
    if not len(dataset):
        raise ValueError("data: the data set is empty, allowed is one item or more")
    return len(dataset)


@contextmanager
def _seeded(key: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators begin at ``key``, and are put back."""
    pythons, numpys, torchs = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(key)
    np.random.seed(key)
    torch.random.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)
        torch.random.set_rng_state(torchs)
