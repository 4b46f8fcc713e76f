"""Samples against a reference: images pass once, features are summed, and the metrics come out. docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ditkernels.data.images import MAX_PIXELS
from ditkernels.evaluation import images as stored
from ditkernels.evaluation import statistics
from ditkernels.evaluation.config import NEIGHBOURS, SPLIT_SIZE
from ditkernels.evaluation.features import Extractor
from ditkernels.evaluation.manifold import precision_recall
from ditkernels.evaluation.metrics import Gaussian, frechet_distance
from ditkernels.evaluation.notes import what_does_not_compare
from ditkernels.evaluation.plan import Plan, Side
from ditkernels.evaluation.record import described_beside, record
from ditkernels.evaluation.sources import Opened, Reading, Shown, Source, Totals, open_source, read_into
from ditkernels.files import sha256

BY_CLASS = (
    "the images are ordered by class, which lowers the Inception Score: its splits are consecutive; "
    "sample with interleaved labels, or shuffle"
)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; None for what the reference does not hold.

    Args:
        pool, spatial: Gaussians of the features.
        pool_features: (M, F), for precision and recall.
        count: how many images; None where only statistics are known.
        notes: what was passed over among its files, in sentences.
        sha256: of its file; of a folder or a stream, over its images in their order.
        shown: what its images have shown of themselves.
    """

    pool: Gaussian | None
    spatial: Gaussian | None
    pool_features: Tensor | None
    count: int | None
    notes: tuple[str, ...] = ()
    sha256: str | None = None
    shown: Shown = field(default_factory=Shown)

    @property
    def side(self) -> Side:
        """Which metrics it allows."""
        held = {"pool": self.pool, "spatial": self.spatial}
        return Side(self.count, self.shown.widths, {name: len(found.mu) for name, found in held.items() if found is not None})


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
        measured_with: what they were measured with, by name; docs/evaluation.md lists it.
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
    measured_with: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


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
    described: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compares samples with a reference.

    Images pass once, batch by batch; beside sums, only pool features are kept (4·F bytes an image, 400 MB for 50,000
    with Inception), and those only for precision and recall. What headers and names tell is refused before the first image.

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
        described: how the samples were drawn, as the sampler's ``metadata.json`` tells it, its ``labels`` with their ``scheme``
            among it. None: what lies beside their file.
        progress: show a bar.

    Raises:
        ValueError, TypeError: an unknown metric, one that was asked for and cannot be computed, no samples, images or arrays of
            another layout or dtype, features of different width, no extractor where one is needed.
    """
    plan = Plan(metrics, neighbours, split_size)
    return _evaluated([samples], reference, plan, Reading(extractor, batch_size, max_pixels), described, progress)[0]


def evaluate_sets(
    sets: Sequence[Source],
    reference: Source | Reference,
    *,
    extractor: Extractor | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 64,
    split_size: int = SPLIT_SIZE,
    neighbours: int = NEIGHBOURS,
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
) -> list[Evaluation]:
    """:func:`evaluate` of several sets of samples; the reference is read once. All are opened before the first image of any."""
    plan = Plan(metrics, neighbours, split_size)
    return _evaluated(sets, reference, plan, Reading(extractor, batch_size, max_pixels), None, progress)


def _evaluated(
    sets: Sequence[Source],
    reference: Source | Reference,
    plan: Plan,
    reading: Reading,
    described: Mapping[str, Any] | None,
    progress: bool,
) -> list[Evaluation]:
    opened = [open_source(samples, reading) for samples in sets]
    theirs = reference if isinstance(reference, Reference) else OpenedReference.of(reference, reading)

    def check(side: Side) -> None:
        for one in opened:
            plan.check(one.side, side)

    check(theirs.side)
    known = theirs if isinstance(theirs, Reference) else theirs.read(check, progress=progress)
    found = []
    for samples, one in zip(sets, opened, strict=True):
        beside, note = described, None
        if described is None and isinstance(samples, (str, Path)):
            beside, note = described_beside(Path(samples))
        one.notes.extend([] if note is None else [note])
        found.append(_evaluation(one, known, plan, beside, progress))
    return found


def _evaluation(
    opened: Opened, reference: Reference, plan: Plan, described: Mapping[str, Any] | None, progress: bool
) -> Evaluation:
    totals = Totals(plan.split_size, keep_pool=reference.pool_features is not None)
    read_into(totals, opened, lambda side: plan.check(side, reference.side), name="features", progress=progress)
    absent = plan.check(totals.side, reference.side)
    count, fid, sfid, score, precision, recall = totals.pool.count, None, None, None, None, None
    order = "unknown"
    if "fid" not in absent and reference.pool is not None:
        fid = frechet_distance(totals.pool.gaussian(), reference.pool)
    if "sfid" not in absent and reference.spatial is not None:
        sfid = frechet_distance(totals.spatial.gaussian(), reference.spatial)
    if "inception_score" not in absent and totals.score is not None:
        score = totals.score.score()
        order = "unknown" if count <= plan.split_size else "by class" if totals.score.ordered_by_class() else "mixed"
    pool_features = totals.pool_features
    if "precision_recall" not in absent and pool_features is not None and reference.pool_features is not None:
        precision, recall = precision_recall(pool_features, reference.pool_features, neighbours=plan.neighbours)
    notes = what_does_not_compare(totals.shown(opened.lossy), reference.shown, plan, absent, described)
    if order == "by class":
        notes.append(BY_CLASS)
    labels = None if described is None else described.get("labels")
    return Evaluation(
        fid=fid,
        sfid=sfid,
        inception_score=None if score is None else score[0],
        inception_score_std=None if score is None else score[1],
        precision=precision,
        recall=recall,
        count=count,
        reference_count=reference.count,
        split_size=plan.split_size,
        order=order,
        labels=labels,
        absent=absent,
        notes=[*reference.notes, *opened.notes, *notes],
        measured_with=record(
            reference_sha256=reference.sha256,
            extractor=opened.extractor,
            count=count,
            reference_count=reference.count,
            neighbours=plan.neighbours,
            split_size=plan.split_size,
            samples=described,
        ),
    )


# ---- The reference ---------------------------------------------------------------------------------------------------


def load_reference(
    reference: Source, *, extractor: Extractor | None = None, batch_size: int = 64, max_pixels: int = MAX_PIXELS
) -> Reference:
    """Reads a reference once, to compare several sets of samples with it. Arguments and errors as of ``evaluate``."""
    return OpenedReference.of(reference, Reading(extractor, batch_size, max_pixels)).read()


@dataclass(frozen=True)
class OpenedReference:
    """A reference of which no image has been read: statistics, a source, or both.

    Attributes:
        path: where it is a file.
        gaussians: its statistics, by the name of the mean.
        source: its images or features; None where there are none.
    """

    path: Path | None
    gaussians: Mapping[str, Gaussian]
    source: Opened | None

    @staticmethod
    def of(reference: Source, reading: Reading) -> OpenedReference:
        """Opens one; arguments and errors as of ``evaluate``."""
        if not isinstance(reference, (str, Path)) or Path(reference).is_dir():
            return OpenedReference(None, {}, open_source(reference, reading))
        path = Path(reference)
        statistics.refuse_pickle(path)
        if path.suffix.lower() == ".pt":
            return OpenedReference(path, statistics.of_pt(path), None)
        held = stored.headers(path)
        gaussians = statistics.of_npz(path, held)
        with_features = "pool" in held or (stored.IMAGES in held and reading.extractor is not None)
        return OpenedReference(path, gaussians, open_source(path, reading) if with_features or not gaussians else None)

    @property
    def side(self) -> Side:
        """What headers and names tell."""
        named = {"pool": self.gaussians.get("mu"), "spatial": self.gaussians.get("mu_s")}
        widths = {name: len(found.mu) for name, found in named.items() if found is not None}
        return replace(Side(None, {}) if self.source is None else self.source.side, gaussians=widths or None)

    def read(self, check: Callable[[Side], object] | None = None, *, progress: bool = False) -> Reference:
        """Reads it.

        Args:
            check: is shown what is known after the first batch and at the end, and may raise.
            progress: show a bar.

        Raises:
            ValueError: as of ``evaluate``; there are no images.
        """
        given = self.side.gaussians
        whole = None if self.path is None else sha256(self.path)
        if self.source is None:
            return Reference(self.gaussians.get("mu"), self.gaussians.get("mu_s"), None, None, sha256=whole)
        totals = Totals(None, keep_pool=True)
        checked = check or (lambda _: None)
        read_into(totals, self.source, lambda side: checked(replace(side, gaussians=given)), name="reference", progress=progress)
        pool, spatial = self.gaussians.get("mu"), self.gaussians.get("mu_s")
        if totals.pool.count == 0:
            raise ValueError("reference: got no images, allowed is 1 or more")
        if not self.gaussians and totals.pool.count > 1:
            pool = totals.pool.gaussian()
            spatial = totals.spatial.gaussian() if totals.spatial.count else None
        return Reference(
            pool,
            spatial,
            totals.pool_features,
            totals.pool.count,
            tuple(self.source.notes),
            whole or totals.sha256,
            totals.shown(self.source.lossy),
        )
