"""Samples against a reference: images pass once, features are summed, and the metrics come out. docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditkernels.data.images import MAX_PIXELS
from ditkernels.evaluation import images as sources
from ditkernels.evaluation import statistics
from ditkernels.evaluation.config import METRICS, NEIGHBOURS, SPLIT_SIZE
from ditkernels.evaluation.features import Extractor, Features, as_features
from ditkernels.evaluation.manifold import precision_recall
from ditkernels.evaluation.metrics import Gaussian, GaussianSum, InceptionScore, frechet_distance

Source = str | Path | Features | Iterable[Tensor]
"""A path (``.npz`` or folder), feature arrays, or batches of images (B, 3, H, W) uint8."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; None for what the reference does not hold.

    Args:
        pool, spatial: Gaussians of the features.
        pool_features: (M, F), for precision and recall.
        count: how many images; None where only statistics are known.
        notes: what was passed over among its files, in sentences.
    """

    pool: Gaussian | None
    spatial: Gaussian | None
    pool_features: Tensor | None
    count: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The metrics, each None where it was not computed, and what a reader must know to compare them.

    Args:
        fid, sfid, inception_score, inception_score_std, precision, recall: the metrics; shares in 0..1.
        count: images evaluated.
        reference_count: images of the reference whose features were seen; None where only statistics are known.
        split_size: images in a split of the Inception Score.
        order: "mixed", "by class" (which lowers the Inception Score), or "unknown" with fewer than two splits.
        labels: the label scheme that the sampler recorded beside the samples, or None.
        absent: for each metric not computed, why.
        notes: what makes the numbers incomparable, in sentences.
    """

    fid: float | None
    sfid: float | None
    inception_score: float | None
    inception_score_std: float | None
    precision: float | None
    recall: float | None
    count: int
    reference_count: int | None
    split_size: int
    order: str
    labels: dict[str, Any] | None = None
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


class _Totals:
    """What is kept of the images that have passed: sums, and the pool features if asked for."""

    def __init__(self, split_size: int, *, keep_pool: bool) -> None:
        self.pool = GaussianSum("fid")
        self.spatial: GaussianSum | None = GaussianSum("sfid")
        self.score: InceptionScore | None = InceptionScore(split_size)
        self.kept: list[Tensor] | None = [] if keep_pool else None

    def add(self, features: Features) -> None:
        self.pool.add(features.pool)
        if self.kept is not None:
            self.kept.append(features.pool.cpu())
        if features.spatial is None:
            self.spatial = None
        elif self.spatial is not None:
            self.spatial.add(features.spatial)
        if features.logits is None:
            self.score = None
        elif self.score is not None:
            self.score.add(features.logits)

    @property
    def pool_features(self) -> Tensor | None:
        return None if self.kept is None else torch.cat(self.kept)


def evaluate(
    samples: Source,
    reference: Source | Reference,
    *,
    extractor: Extractor | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 64,
    split_size: int = SPLIT_SIZE,
    neighbours: int = NEIGHBOURS,
    max_pixels: int = MAX_PIXELS,
) -> Evaluation:
    """Compares samples with a reference.

    Images pass once, batch by batch; beside sums, only pool features are kept (4·F bytes an image, 400 MB for 50,000
    with Inception), and those only for precision and recall.

    Args:
        samples: an ``.npz`` with images (arr_0: (N, H, W, 3) uint8) or features (pool, spatial, logits), a folder of image
            files in the order of their paths, batches (B, 3, H, W) uint8, or Features.
        reference: the same, statistics (an ``.npz`` of mu, sigma, and mu_s, sigma_s for sFID, or torch-fidelity's ``.pt``), or
            what ``load_reference`` returned. Where an ``.npz`` has both statistics and images, FID and sFID use the statistics, as
            the ADM suite does.
        extractor: images (B, 3, H, W) uint8 -> features; needed unless features are given.
        metrics: names out of METRICS; each must then be computable. None computes what can be.
        batch_size: images an extractor sees at once.
        split_size: images in a split of the Inception Score.
        neighbours: k of precision and recall.
        max_pixels: of an image file that is decoded.

    Raises:
        ValueError, TypeError: an unknown metric, one that cannot be computed, too few samples for one, images or arrays of
            another layout or dtype, features of different width, no extractor where one is needed.
    """
    unknown = sorted(set(metrics or ()) - set(METRICS))
    if unknown:
        raise ValueError(f"metrics: got {', '.join(unknown)}, allowed are {', '.join(METRICS)}")
    reading = _Reading(extractor, batch_size, max_pixels)
    known = reference if isinstance(reference, Reference) else _read_reference(reference, reading)
    totals = _Totals(split_size, keep_pool=known.pool_features is not None)
    reading = replace(reading, notes=[*known.notes])
    for features in _features_of(samples, reading):
        totals.add(features)
    absent = _why_absent(totals, known)
    for name in METRICS:
        if metrics is not None and name in metrics and name in absent:
            raise ValueError(f"metrics: {name} cannot be computed: {absent[name]}")
        if metrics is not None and name not in metrics:
            absent[name] = "not asked for"
    described = sources.described_by(Path(samples)) if isinstance(samples, (str, Path)) else None
    found = _evaluation(totals, known, absent, split_size, neighbours, (described or {}).get("labels"))
    return replace(found, notes=[*reading.notes, *found.notes])


def _why_absent(totals: _Totals, reference: Reference) -> dict[str, str]:
    reasons = {
        "fid": "the reference has no pool features" if reference.pool is None else None,
        "sfid": "the samples have no spatial features"
        if totals.spatial is None
        else ("the reference has no spatial features" if reference.spatial is None else None),
        "inception_score": "the samples have no logits" if totals.score is None else None,
        "precision_recall": "the reference has statistics only" if reference.pool_features is None else None,
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _evaluation(
    totals: _Totals,
    reference: Reference,
    absent: dict[str, str],
    split_size: int,
    neighbours: int,
    labels: dict[str, Any] | None,
) -> Evaluation:
    count, fid, sfid, score, precision, recall = totals.pool.count, None, None, None, None, None
    notes: list[str] = []
    order = "unknown"
    if "fid" not in absent and reference.pool is not None:
        fid = frechet_distance(totals.pool.gaussian(), reference.pool)
        width = len(reference.pool.mu)
        if count <= width:
            notes.append(f"FID of {count} images with {width} features each: the covariance is singular and FID too large")
    if "sfid" not in absent and totals.spatial is not None and reference.spatial is not None:
        sfid = frechet_distance(totals.spatial.gaussian(), reference.spatial)
    if "inception_score" not in absent and totals.score is not None:
        score = totals.score.score()
        ordered = totals.score.ordered_by_class()
        order = "unknown" if count <= split_size else "by class" if ordered else "mixed"
        if ordered:
            notes.append(
                "the images are ordered by class, which lowers the Inception Score: its splits are consecutive; "
                "sample with interleaved labels, or shuffle"
            )
    pool_features = totals.pool_features
    if "precision_recall" not in absent and pool_features is not None and reference.pool_features is not None:
        precision, recall = precision_recall(pool_features, reference.pool_features, neighbours=neighbours)
    return Evaluation(
        fid=fid,
        sfid=sfid,
        inception_score=None if score is None else score[0],
        inception_score_std=None if score is None else score[1],
        precision=precision,
        recall=recall,
        count=count,
        reference_count=reference.count,
        split_size=split_size,
        order=order,
        labels=labels,
        absent=absent,
        notes=notes,
    )


# ---- Sources ---------------------------------------------------------------------------------------------------------


def load_reference(
    reference: Source, *, extractor: Extractor | None = None, batch_size: int = 64, max_pixels: int = MAX_PIXELS
) -> Reference:
    """Reads a reference once, to compare several sets of samples with it. Arguments and errors as of ``evaluate``."""
    return _read_reference(reference, _Reading(extractor, batch_size, max_pixels))


@dataclass(frozen=True)
class _Reading:
    """How a source is read; ``notes`` gathers what was passed over."""

    extractor: Extractor | None
    batch_size: int
    max_pixels: int
    notes: list[str] = field(default_factory=list)


def _read_reference(reference: Source, reading: _Reading) -> Reference:
    gaussians: dict[str, Gaussian] = {}
    path = Path(reference) if isinstance(reference, (str, Path)) else Path()
    statistics.refuse_pickle(path)
    if path.suffix.lower() == ".pt":
        return Reference(statistics.of_pt(path)["mu"], None, None, None)
    if path.suffix.lower() == ".npz":
        held = sources.headers(path)
        gaussians = statistics.of_npz(path, held)
        with_features = "pool" in held or (sources.IMAGES in held and reading.extractor is not None)
        if gaussians and not with_features:
            return Reference(gaussians.get("mu"), gaussians.get("mu_s"), None, None)
    totals = _Totals(SPLIT_SIZE, keep_pool=True)
    for features in _features_of(reference, reading):
        totals.add(features)
    if gaussians:
        return Reference(gaussians.get("mu"), gaussians.get("mu_s"), totals.pool_features, totals.pool.count)
    spatial = None if totals.spatial is None else totals.spatial.gaussian()
    return Reference(totals.pool.gaussian(), spatial, totals.pool_features, totals.pool.count, tuple(reading.notes))


def _features_of(source: Source, reading: _Reading) -> Iterator[Features]:
    extractor, batch_size = reading.extractor, reading.batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, allowed is 1 or more")
    if isinstance(source, Features):
        yield as_features(source)
        return
    if isinstance(source, (str, Path)) and "pool" in _held_by(Path(source)):
        yield _stored_features(Path(source))
        return
    if extractor is None:
        raise ValueError(
            "extractor: got none, but images need features: --weights with Inception's weights, or --extractor; "
            "in Python extractor=Inception(weights)"
        )
    batches = _batches(Path(source), reading) if isinstance(source, (str, Path)) else source
    for images in batches:
        _check_batch(images)
        for part in images.split(batch_size):
            with torch.no_grad():
                yield as_features(extractor(part), len(part))


def _held_by(path: Path) -> dict[str, sources.Header]:
    return {} if path.is_dir() else sources.headers(path)


def _stored_features(path: Path) -> Features:
    with np.load(path) as arrays:
        held = {name: torch.from_numpy(arrays[name]) for name in Features._fields if name in arrays}
    return as_features(held)


def _batches(path: Path, reading: _Reading) -> Iterator[Tensor]:
    if path.is_dir():
        return sources.folder_batches(path, reading.batch_size, reading.max_pixels, reading.notes)
    held = sources.headers(path)
    if sources.IMAGES not in held:
        raise ValueError(
            f"{path}: got {', '.join(sorted(held)) or 'nothing'}, allowed are {sources.IMAGES} (images) or pool (features)"
        )
    sources.check_images(path, held[sources.IMAGES])
    return sources.npz_batches(path, reading.batch_size)


def _check_batch(images: Any) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        came = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: got {came}, allowed is a uint8 tensor")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: got shape {tuple(images.shape)}, allowed is (B, 3, H, W)")
