"""Which class each image shows, as a function of the image's index."""

from __future__ import annotations

import codecs
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditkernels.rng import Stream, below
from ditkernels.sampling.config import SCHEMES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """A label for every image index, interleaved: never class by class, on which the Inception Score depends.

    Args:
        scheme: "balanced": ``classes`` in turn. "random": one of ``classes`` by chance, keyed by (seed, image index).
            "spread": ``classes`` by a fixed stride, each once a round, so that any few images in a row show classes from all
            over; image i has its label whatever the count. "data": one of ``classes`` by chance, as likely as it has images
            in ``weights``, keyed like "random". "listed": entry i of ``classes`` for image i.
        classes: class ids.
        seed: of "random" and "data".
        weights: of "data": how many images each of ``classes`` has.

    Raises:
        ValueError: an unknown scheme, no classes, or weights that are not one for each class, or none above 0.
    """

    scheme: str
    classes: tuple[int, ...]
    seed: int = 0
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"labels: got {self.scheme!r}, allowed are {', '.join(SCHEMES)}")
        if not self.classes:
            raise ValueError("classes: got none, allowed is 1 or more")
        if self.scheme == "data" and len(self.weights) != len(self.classes):
            raise ValueError(f"weights: got {len(self.weights)} for {len(self.classes)} classes, allowed is one for each")
        if self.scheme == "data" and not sum(self.weights):
            raise ValueError(f"classes: got {as_ranges(self.classes)}, which have no images in the training data")

    @staticmethod
    def of_data(images_per_class: Sequence[int], classes: tuple[int, ...] | None, seed: int) -> Labels:
        """Labels as the training data has them.

        Args:
            images_per_class: by class id, as a checkpoint records them; those beyond its end have none.
            classes: that are drawn from; None: all that have images.
            seed: of the draws.

        Raises:
            ValueError: none of the classes has images.
        """
        ids = tuple(range(len(images_per_class))) if classes is None else classes
        held = dict(enumerate(images_per_class))
        return Labels("data", ids, seed, tuple(held.get(label, 0) for label in ids))

    def of(self, indices: Tensor) -> Tensor:
        """Labels (B,) int64 of the images ``indices`` (B,) int64, on the CPU.

        Raises:
            ValueError: an index beyond a list.
        """
        classes = torch.tensor(self.classes)
        if self.scheme == "random":
            return classes[below(len(classes), self.seed, Stream.SAMPLING_LABEL, 0, indices)]
        if self.scheme == "data":
            ends = torch.tensor(self.weights).cumsum(0)
            image = below(int(ends[-1]), self.seed, Stream.SAMPLING_LABEL, 0, indices)
            return classes[torch.searchsorted(ends, image, right=True)]
        if self.scheme == "listed" and int(indices.max()) >= len(classes):
            raise ValueError(f"labels: got image {int(indices.max())}, but the list has {len(classes)} labels")
        if self.scheme == "spread":
            indices = indices * _stride(len(classes))
        return classes[indices % len(classes)]

    def check(self, num_classes: int) -> None:
        """Raises ValueError, naming it, for a label outside 0..num_classes-1."""
        for label in self.classes:
            if not 0 <= label < num_classes:
                raise ValueError(f"labels: got {label}, allowed are 0..{num_classes - 1}")

    def tell_unseen(self, count: int) -> None:
        """Says so where ``count`` images in turn show the first classes alone."""
        if self.scheme == "balanced" and count < len(self.classes):
            logger.info(
                "labels: %d images in turn show the first %d of %d classes; --labels spread shows classes from all over",
                count,
                count,
                len(self.classes),
            )

    def describe(self) -> dict[str, Any]:
        """What is written beside the samples."""
        described: dict[str, Any] = {"scheme": self.scheme, "classes": as_ranges(self.classes)}
        described["order"] = "as listed" if self.scheme == "listed" else "interleaved"
        if self.scheme == "data":
            described["images_per_class"] = ",".join(map(str, self.weights))
        return described | ({"seed": self.seed} if self.scheme in ("random", "data") else {})


def _stride(count: int) -> int:
    """A step through a round of ``count`` that meets each once: near its golden section, without a common factor."""
    wanted = round(count * (math.sqrt(5) - 1) / 2)
    return min((step for step in range(1, count + 1) if math.gcd(step, count) == 1), key=lambda step: abs(step - wanted))


def parse_classes(text: str) -> tuple[int, ...]:
    """Class ids from "207,360" and ranges "0-9", ends included. Raises ValueError for anything else."""
    classes: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"classes: got {part!r}, allowed are ids and ranges, as in 207,360 or 0-9")
        end = int(last) if dash else int(first)
        if end < int(first):
            raise ValueError(f"classes: got {part!r}, an empty range; allowed is low-high")
        classes.extend(range(int(first), end + 1))
    return tuple(classes)


def read_labels(path: Path) -> tuple[int, ...]:
    """One class id a line, image i's on line i, in UTF-8 or, where a mark says so, UTF-16; blank lines at the end do not count.

    Raises ValueError, naming the line, for anything else.
    """
    if not path.is_file():
        raise ValueError(f"labels: {path}: no such file")
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        lines = content.decode(encoding).rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"labels: {path} is no text of UTF-8 or UTF-16: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip().isdecimal():
            raise ValueError(f"labels: {path}, line {number}: got {line!r}, allowed is one class id")
    return tuple(int(line) for line in lines)


def as_ranges(classes: Sequence[int]) -> str:
    """The shortest text that ``parse_classes`` reads as ``classes``: runs of consecutive ids become ranges."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(classes) + 1):
        if end < len(classes) and classes[end] == classes[end - 1] + 1:
            continue
        first, last = classes[start], classes[end - 1]
        parts.append(str(first) if first == last else f"{first}-{last}")
        start = end
    return ",".join(parts)
