"""What samples and references are read from: opened by headers and names alone, then read once, batch by batch."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ditkernels.data.folder import ImageFolder
from ditkernels.data.formats import FORMAT_OF
from ditkernels.data.images import MAX_PIXELS
from ditkernels.evaluation import images as stored
from ditkernels.evaluation.features import Extractor, Features, as_features, widths_of
from ditkernels.evaluation.metrics import GaussianSum, InceptionScore
from ditkernels.evaluation.plan import Side

Source = str | Path | Features | Iterable[Tensor]
"""A path (``.npz`` or folder), feature arrays, or batches of images (B, 3, H, W) uint8."""

LOSSY = {"JPEG", "WEBP", "AVIF", "JPEG2000", "GIF"}
"""Formats that may keep other pixels than those that were drawn."""


@dataclass(frozen=True)
class Reading:
    """How images become features: by whom, how many at once, and of how many pixels at most.

    Raises:
        ValueError: a batch size below 1.
    """

    extractor: Extractor | None
    batch_size: int
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, allowed is 1 or more")


class Piece(NamedTuple):
    """Features of some images, and the images (B, 3, H, W) uint8 where they were not given as features."""

    features: Features
    images: Tensor | None


@dataclass(frozen=True)
class Opened:
    """A source of which no image has been read.

    Attributes:
        side: what headers and names tell.
        pieces: reads it, once.
        extractor: what its features come from; None where they are stored.
        lossy: the formats out of LOSSY among its files; None where it is not known what files they were.
        notes: what was passed over, in sentences; reading may add some.
    """

    side: Side
    pieces: Callable[[], Iterator[Piece]]
    extractor: Extractor | None = None
    lossy: frozenset[str] | None = None
    notes: list[str] = field(default_factory=list)


def open_source(source: Source, reading: Reading) -> Opened:
    """Opens samples, or a reference that is more than statistics.

    Raises:
        ValueError, TypeError: no such file, one of another kind or layout, no extractor where one is needed; it is named.
    """
    if isinstance(source, Features):
        features = as_features(source)
        return Opened(Side(len(features.pool), widths_of(features)), lambda: iter([Piece(features, None)]))
    if not isinstance(source, (str, Path)):
        return _of_images(None, lambda: source, reading)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, reading)
    held = stored.headers(path)
    if "pool" in held:
        promised = _promised(path, held)
        return Opened(Side(len(promised.pool), widths_of(promised)), lambda: iter([Piece(_load(path), None)]))
    if stored.IMAGES not in held:
        raise ValueError(
            f"{path}: got {', '.join(sorted(held)) or 'nothing'}, allowed are {stored.IMAGES} (images) or pool (features)"
        )
    stored.check_images(path, held[stored.IMAGES])
    count = held[stored.IMAGES].shape[0]
    return _of_images(count, lambda: stored.npz_batches(path, reading.batch_size), reading, lossy=frozenset())


def _of_folder(path: Path, reading: Reading) -> Opened:
    folder = ImageFolder.scan(path, unconditional=True, name="images")
    formats = {FORMAT_OF[Path(file).suffix.lower()] for file in folder.files}
    notes = [*folder.notes]
    return _of_images(
        len(folder),
        lambda: stored.folder_batches(folder, reading.batch_size, reading.max_pixels, notes),
        reading,
        lossy=frozenset(formats & LOSSY),
        notes=notes,
    )


def _of_images(
    count: int | None,
    batches: Callable[[], Iterable[Tensor]],
    reading: Reading,
    *,
    lossy: frozenset[str] | None = None,
    notes: list[str] | None = None,
) -> Opened:
    extractor = reading.extractor
    if extractor is None:
        raise ValueError(
            "extractor: got none, but images need features: --weights with Inception's weights, or --extractor; "
            "in Python extractor=Inception(weights)"
        )

    def pieces() -> Iterator[Piece]:
        for images in batches():
            _check_batch(images)
            for part in images.split(reading.batch_size):
                with torch.no_grad():
                    yield Piece(as_features(extractor(part), len(part)), part)

    return Opened(Side(count, getattr(extractor, "widths", None)), pieces, extractor, lossy, [] if notes is None else notes)


def _promised(path: Path, held: Mapping[str, stored.Header]) -> Features:
    """Features without values, of the shapes that headers tell."""
    shapes = {}
    for name in set(Features._fields) & set(held):
        header = held[name]
        if header.dtype.kind != "f":
            raise TypeError(f"{path}: {name}: got {header.dtype}, allowed is floating point")
        shapes[name] = torch.empty(header.shape, device="meta")
    return as_features(shapes)


def _load(path: Path) -> Features:
    with np.load(path) as arrays:
        return as_features({name: torch.from_numpy(arrays[name]) for name in Features._fields if name in arrays})


def _check_batch(images: Any) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        came = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: got {came}, allowed is a uint8 tensor")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: got shape {tuple(images.shape)}, allowed is (B, 3, H, W)")


# ---- What is kept of what has passed ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What one side has shown of itself.

    Attributes:
        count: images; None where only statistics are known.
        widths: of the features by name; empty where only statistics are known.
        sizes: (height, width) of the images.
        lossy: formats of the files that may keep other pixels than were drawn; None where that is not known.
        digests: one of each different image, or of its pool features where there are no images.
    """

    count: int | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    sizes: frozenset[tuple[int, int]] = frozenset()
    lossy: frozenset[str] | None = None
    digests: frozenset[bytes] = frozenset()


class Totals:
    """Sums over the images that have passed, and a digest of each.

    Args:
        split_size: of the Inception Score; None: it is not taken.
        keep_pool: keep the pool features too.

    Attributes:
        widths: of the features; None before the first batch.
    """

    def __init__(self, split_size: int | None, *, keep_pool: bool) -> None:
        self.pool, self.spatial = GaussianSum("fid"), GaussianSum("sfid")
        self.score = None if split_size is None else InceptionScore(split_size)
        self.widths: Mapping[str, int] | None = None
        self._sizes: set[tuple[int, int]] = set()
        self._digests: set[bytes] = set()
        self._kept: list[Tensor] | None = [] if keep_pool else None
        self._sha256 = hashlib.sha256()

    @property
    def side(self) -> Side:
        """What is known by now."""
        return Side(self.pool.count, self.widths)

    def shown(self, lossy: frozenset[str] | None) -> Shown:
        """What has passed has shown; ``lossy`` of the source."""
        return Shown(self.pool.count, self.widths or {}, frozenset(self._sizes), lossy, frozenset(self._digests))

    @property
    def pool_features(self) -> Tensor | None:
        """(N, F), where they were kept."""
        return torch.cat(self._kept) if self._kept else None

    @property
    def sha256(self) -> str:
        """SHA-256 over all that has passed, in its order, however it was cut into batches."""
        return self._sha256.hexdigest()

    def add(self, piece: Piece) -> None:
        """Raises ValueError for features that are not finite, or of another width than those before."""
        features, widths = piece.features, widths_of(piece.features)
        if widths != (self.widths or widths):
            raise ValueError(f"features: got widths {widths}, the images before have {self.widths}")
        self.widths = widths
        self.pool.add(features.pool)
        if self._kept is not None:
            self._kept.append(features.pool.cpu())
        if features.spatial is not None:
            self.spatial.add(features.spatial)
        if features.logits is not None and self.score is not None:
            self.score.add(features.logits)
        if piece.images is not None:
            self._sizes.add((piece.images.shape[2], piece.images.shape[3]))
        self._digest(features.pool if piece.images is None else piece.images)

    def _digest(self, rows: Tensor) -> None:
        rows = rows.detach().cpu()
        rows = (rows.float() if rows.dtype == torch.bfloat16 else rows).contiguous()
        what = f"{rows.dtype} {tuple(rows.shape[1:])} ".encode()
        for row in rows.numpy():
            digest = hashlib.sha256(what + row.tobytes()).digest()
            self._digests.add(digest)
            self._sha256.update(digest)


def read_into(totals: Totals, opened: Opened, check: Callable[[Side], object], *, name: str, progress: bool = False) -> Totals:
    """Adds all of a source.

    Args:
        totals: what it is added to.
        opened: it is read once.
        check: is shown what is known after the first batch and at the end, and may raise.
        name: for the bar.
        progress: show a bar.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=opened.side.count, unit=" images", desc=name, mininterval=interval, disable=not progress) as bar:
        for number, piece in enumerate(opened.pieces()):
            totals.add(piece)
            bar.update(len(piece.features.pool))
            if number == 0:
                check(Side(opened.side.count, totals.widths))
    check(totals.side)
    return totals
