"""What keeps figures from being compared with others, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditkernels.evaluation.plan import FEATURE, Plan
from ditkernels.evaluation.record import classes_shown
from ditkernels.evaluation.sources import Shown

ADM_COUNTS = (50_000, 10_000)
"""Samples and reference images of published precision and recall."""

_CALLED = {"fid": "FID", "sfid": "sFID"}


def what_does_not_compare(
    samples: Shown, reference: Shown, plan: Plan, absent: Mapping[str, str], described: Mapping[str, Any] | None
) -> list[str]:
    """The notes on an evaluation.

    Args:
        samples, reference: what was seen of both sides.
        plan: of the evaluation.
        absent: the metrics that were not computed.
        described: how the samples were drawn, as the sampler's ``metadata.json`` tells it.
    """
    count = samples.count or 0
    return [
        *_few_for_features(samples, reference, absent),
        *_few_for_metrics(count, reference.count, plan, absent),
        *_few_for_classes(count, described),
        *_other_images(samples, reference),
        *_duplicates(samples, reference),
    ]


def _few_for_features(samples: Shown, reference: Shown, absent: Mapping[str, str]) -> list[str]:
    found = []
    for name, called in _CALLED.items():
        width = samples.widths.get(FEATURE[name], 0)
        for preposition, count in (("of", samples.count), ("against", reference.count)):
            if name not in absent and count is not None and count <= width:
                found.append(
                    f"{called} {preposition} {count} images with {width} features each: "
                    f"the covariance is singular and {called} too large"
                )
    return found


def _few_for_metrics(count: int, of_reference: int | None, plan: Plan, absent: Mapping[str, str]) -> list[str]:
    found = []
    if "inception_score" not in absent and count < plan.split_size:
        found.append(
            f"the Inception Score is of {count} images, less than one split of {plan.split_size}: it rises with the images"
        )
    if "precision_recall" not in absent and (count, of_reference) != ADM_COUNTS:
        found.append(
            f"precision and recall are of {count} images against {of_reference}, ADM's of 50,000 against 10,000: "
            "with other counts they do not compare"
        )
    return found


def _few_for_classes(count: int, described: Mapping[str, Any] | None) -> list[str]:
    classes = classes_shown(described)
    if described is None or classes is None or count >= classes:
        return []
    in_turn = described["labels"]["scheme"] == "balanced"
    shown = f"the first {count} alone; --labels spread shows classes from all over" if in_turn else "some are missing"
    return [f"{count} images of {classes} classes: {shown}"]


def _other_images(samples: Shown, reference: Shown) -> list[str]:
    found = []
    if samples.sizes and reference.sizes and samples.sizes != reference.sizes:
        found.append(
            f"the samples are {_sizes(samples)}, the reference is {_sizes(reference)}: images of another size have other features"
        )
    if samples.lossy is not None and reference.lossy is not None and samples.lossy != reference.lossy:
        found.append(
            f"the samples' files are {_formats(samples.lossy)}, the reference's {_formats(reference.lossy)}: "
            "compression changes features"
        )
    return found


def _sizes(side: Shown) -> str:
    return ", ".join(f"{width} x {height}" for height, width in sorted(side.sizes))


def _formats(lossy: frozenset[str]) -> str:
    return ", ".join(sorted(lossy)) or "without loss"


def _duplicates(samples: Shown, reference: Shown) -> list[str]:
    found = []
    for name, side in (("samples", samples), ("reference", reference)):
        repeated = (side.count or 0) - len(side.digests)
        if side.digests and repeated:
            found.append(f"{repeated} of the {side.count} images of the {name} repeat others of them")
    shared = len(samples.digests & reference.digests)
    return [*found, *([f"{shared} different images of the samples are in the reference too"] if shared else [])]
