"""What a figure was measured with, as JSON values, so that two of them are compared only where they can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ditkernels.checkpoints.format import state_sha256
from ditkernels.evaluation.features import Extractor
from ditkernels.sampling.config import SampleConfig
from ditkernels.sampling.generate import METADATA
from ditkernels.sampling.labels import Labels, parse_classes

WEIGHTS = "weights_sha256"
"""The entry that tells what is measured; all others tell with what."""


def describe_samples(
    config: SampleConfig, labels: Labels, *, in_channels: int, steps: int, sha256: str | None, weights: str
) -> dict[str, Any]:
    """What the sampler's ``metadata.json`` tells of samples, for samples that are in no file.

    Args:
        config, labels: they were drawn with.
        in_channels: of the model.
        steps: of the solver.
        sha256: of the model's weights, as ``load_model`` takes it; None where it is not known yet.
        weights: "ema", the moving average, or "raw".
    """
    settings = config.for_channels(in_channels)
    return {
        "labels": labels.describe(),
        "sampling": {
            "solver": settings.solver,
            "guidance_scale": settings.guidance_scale,
            "guided_channels": settings.guided_channels,
            "guidance_interval": settings.guidance_interval,
            "seed": settings.seed,
        },
        "steps": str(steps),
        "checkpoint": {"sha256": sha256, "weights": weights},
    }


def described_beside(samples: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What ``ditkernels sample`` wrote beside samples, and a note where something else lies there under that name."""
    path = samples.parent / METADATA
    if not path.is_file():
        return None, None
    try:
        described = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError:
        described = None
    labels = described.get("labels") if isinstance(described, dict) else None
    if isinstance(labels, dict) and isinstance(labels.get("scheme"), str):
        return described, None
    return None, f"{path} is not what ditkernels sample writes, and is passed over"


def record(
    *,
    reference_sha256: str | None,
    extractor: Extractor | None,
    count: int,
    reference_count: int | None,
    neighbours: int,
    split_size: int,
    samples: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What was measured with what; None for what is not known.

    Args:
        reference_sha256: of the reference's file; of a folder or a stream, over its images in their order.
        extractor: what the samples' features come from; None where they were stored.
        count, reference_count: images of both sides.
        neighbours: k of precision and recall.
        split_size: images in a split of the Inception Score.
        samples: as of :func:`describe_samples`.
    """
    told = samples or {}
    checkpoint, sampling, labels = (_mapping(told.get(name)) for name in ("checkpoint", "sampling", "labels"))
    return {
        "reference_sha256": reference_sha256,
        "extractor": None if extractor is None else _name_of(extractor),
        "extractor_sha256": None if extractor is None else _sha256_of(extractor),
        "count": count,
        "reference_count": reference_count,
        "neighbours": neighbours,
        "split_size": split_size,
        WEIGHTS: checkpoint.get("sha256"),
        "weights": checkpoint.get("weights"),
        "steps": told.get("steps"),
        **{name: sampling.get(name) for name in ("solver", "guidance_scale", "guided_channels", "guidance_interval", "seed")},
        "labels": labels.get("scheme"),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two records differ beside the weights that were measured, in words; entries that one of them lacks do not count."""
    common = [name for name in now if name in before and name != WEIGHTS]
    return [f"{name} {_shown(now[name])}, was {_shown(before[name])}" for name in common if now[name] != before[name]]


def classes_shown(samples: Mapping[str, Any] | None) -> int | None:
    """How many classes samples were drawn of; None where that is not known."""
    classes = _mapping((samples or {}).get("labels")).get("classes")
    try:
        return len(set(parse_classes(classes))) if isinstance(classes, str) else None
    except ValueError:
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shown(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _name_of(extractor: Extractor) -> str:
    named = extractor if hasattr(extractor, "__qualname__") else type(extractor)
    return f"{named.__module__}:{named.__qualname__}"


def _sha256_of(extractor: Extractor) -> str | None:
    """Of the file of weights where the extractor tells it, else of its weights; a function has none that are known."""
    told: str | None = getattr(extractor, "sha256", None)
    if told is not None or not isinstance(extractor, nn.Module):
        return told
    return state_sha256({name: value for name, value in extractor.state_dict().items() if isinstance(value, Tensor)})
