"""`ditkernels eval`: the metrics of samples against a reference."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkernels.commands import DEFAULT, DEVICE
from ditkernels.evaluation.config import METRICS, NEIGHBOURS, SPLIT_SIZE

if TYPE_CHECKING:
    from torch import Tensor

    from ditkernels.evaluation.evaluate import Evaluation
    from ditkernels.evaluation.features import Extractor

LINES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels eval`."""
    parser.add_argument("samples", type=Path, help=".npz of images or features, or a folder of images")
    parser.add_argument("reference", type=Path, help="the same, or statistics: an .npz of mu and sigma, or torch-fidelity's .pt")
    features = parser.add_mutually_exclusive_group()
    features.add_argument("--weights", type=Path, help="Inception's weights for torch-fidelity; nothing is downloaded")
    features.add_argument("--extractor", metavar="MODULE:NAME", help="a function from images to features")
    parser.add_argument(
        "--metrics", help=f"metrics to compute, comma-separated, out of {', '.join(METRICS)} (default: all that can be)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help=f"images at once {DEFAULT}")
    parser.add_argument("--split-size", type=int, default=SPLIT_SIZE, help=f"images in a split of the Inception Score {DEFAULT}")
    parser.add_argument("--neighbours", type=int, default=NEIGHBOURS, help=f"nearest neighbours of precision and recall {DEFAULT}")
    parser.add_argument("--max-pixels", type=int, default=1 << 28, help=f"pixels of an image that is read {DEFAULT}")
    parser.add_argument("--device", default="auto", help=DEVICE)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints, and writes the JSON. Returns 0.

    Raises:
        ValueError, ImportError: as ``evaluate`` and ``Inception``; an extractor that is not there.
    """
    from ditkernels.evaluation.evaluate import evaluate
    from ditkernels.evaluation.features import load_extractor
    from ditkernels.runtime import resolve_device

    features = load_extractor(args.weights, args.extractor, resolve_device(args.device))
    extractor = None if features is None else _Counting(features)
    result = evaluate(
        args.samples,
        args.reference,
        extractor=extractor,
        metrics=None if args.metrics is None else args.metrics.split(","),
        batch_size=args.batch_size,
        split_size=args.split_size,
        neighbours=args.neighbours,
        max_pixels=args.max_pixels,
    )
    print(report(result))
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    return 0


def report(result: Evaluation) -> str:
    """The numbers, one a line, and what they were computed on."""
    scheme = "unknown" if result.labels is None else str(result.labels.get("scheme"))
    reference = "statistics" if result.reference_count is None else f"{result.reference_count:,} images"
    lines = [f"{result.count:,} images against {reference}; labels: {scheme}, order: {result.order}"]
    for name, title in LINES.items():
        value = getattr(result, name)
        if value is not None:
            spread = (
                f" ± {result.inception_score_std:.4f}"
                if name == "inception_score" and result.inception_score_std is not None
                else ""
            )
            lines.append(f"{title:16}{value:.4f}{spread}")
    lines += [f"{name} not computed: {reason}" for name, reason in result.absent.items()]
    return "\n".join(lines)


class _Counting:
    """An extractor that shows how far it is and how fast."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        from tqdm import tqdm

        self.bar = tqdm(unit=" images", desc="features", mininterval=0.1 if sys.stderr.isatty() else 10.0)

    def __call__(self, images: Tensor) -> Any:
        features = self.extractor(images)
        self.bar.update(len(images))
        return features
