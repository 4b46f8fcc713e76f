"""Which metrics two sides allow, as far as is known of them: from headers, then after a batch, then at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ditkernels.evaluation.config import METRICS, NEIGHBOURS, SPLIT_SIZE

FEATURE = {"fid": "pool", "sfid": "spatial", "inception_score": "logits", "precision_recall": "pool"}
"""The features that a metric looks at."""


@dataclass(frozen=True)
class Side:
    """What is known of samples or of a reference.

    Attributes:
        count: images whose features are had; None where that is not known, or where there are statistics alone.
        widths: of the features by name; None where they are not known yet, empty where there are statistics alone.
        gaussians: of a reference, widths of the statistics that it has; None where they will be made of its features.
    """

    count: int | None
    widths: Mapping[str, int] | None
    gaussians: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Args:
        metrics: names out of METRICS, each of which must then be computable; None: what can be.
        neighbours: k of precision and recall.
        split_size: images in a split of the Inception Score.

    Raises:
        ValueError: an unknown metric, or a number below 1.
    """

    metrics: Sequence[str] | None = None
    neighbours: int = NEIGHBOURS
    split_size: int = SPLIT_SIZE

    def __post_init__(self) -> None:
        unknown = sorted(set(self.metrics or ()) - set(METRICS))
        if unknown:
            raise ValueError(f"metrics: got {', '.join(unknown)}, allowed are {', '.join(METRICS)}")
        for name in ("neighbours", "split_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is 1 or more")

    def check(self, samples: Side, reference: Side) -> dict[str, str]:
        """Why metrics are not computed, by name, as far as it is known.

        Raises:
            ValueError: one that was asked for is among them; features of different width; no samples.
        """
        if samples.count == 0:
            raise ValueError("samples: got no images, allowed is 1 or more")
        absent = {name: reason for name in METRICS if (reason := self._why_absent(name, samples, reference)) is not None}
        for name in self.metrics or ():
            if name in absent:
                raise ValueError(f"metrics: {name} cannot be computed: {absent[name]}")
        if self.metrics is not None:
            absent |= {name: "not asked for" for name in METRICS if name not in self.metrics}
        check_widths(samples, reference, {FEATURE[name] for name in METRICS if name not in absent})
        return absent

    def least(self, name: str) -> int:
        """The fewest images that a metric can be taken of."""
        return {"precision_recall": self.neighbours + 1, "inception_score": 1}.get(name, 2)

    def least_of_all(self, reference: Side) -> tuple[int, str]:
        """The fewest images for every metric that a reference allows, and the metric that needs them."""
        unknown = Side(None, None)
        allowed = [name for name in METRICS if self._why_absent(name, unknown, reference) is None]
        return max((self.least(name), name) for name in allowed)

    def _why_absent(self, name: str, samples: Side, reference: Side) -> str | None:
        feature, least = FEATURE[name], self.least(name)
        if samples.widths is not None and feature not in samples.widths:
            return f"the samples have no {_called(feature)}"
        if samples.count is not None and samples.count < least:
            return f"got {samples.count} samples, needs at least {least}"
        if name == "inception_score":
            return None
        return self._why_not_against(name, reference)

    def _why_not_against(self, name: str, reference: Side) -> str | None:
        feature, least = FEATURE[name], self.least(name)
        missing = f"the reference has no {_called(feature)}"
        if name == "precision_recall":
            if reference.widths is not None and not reference.widths:
                return "the reference has statistics only"
        elif reference.gaussians:
            return None if feature in reference.gaussians else missing
        if reference.count is not None and reference.count < least:
            return f"the reference has {reference.count} images, needs at least {least}"
        return missing if reference.widths is not None and feature not in reference.widths else None


def check_widths(samples: Side, reference: Side, features: set[str]) -> None:
    """Raises ValueError where the width of one of the features is known of both sides and differs."""
    for feature in sorted(features):
        mine = (samples.widths or {}).get(feature)
        for known in (reference.gaussians, reference.widths):
            theirs = (known or {}).get(feature, mine)
            if mine is not None and mine != theirs:
                of_what = "features" if feature == "pool" else f"{feature} features"
                raise ValueError(f"{of_what}: got {mine} per image, but the reference has {theirs}")


def _called(feature: str) -> str:
    return feature if feature == "logits" else f"{feature} features"
