"""Images that fit in memory, and the handwritten digits among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditkernels.data.order import Batch, ShuffledStream

HELD_OUT_EVERY = 5


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
