"""`ditkernels eval`: the metrics of samples against a reference."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkernels.commands import DEFAULT, DEVICE
from ditkernels.evaluation.config import METRICS, NEIGHBOURS, SPLIT_SIZE

if TYPE_CHECKING:
    from ditkernels.evaluation.evaluate import Evaluation

LINES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ditkernels eval`."""
    parser.add_argument(
        "samples",
        nargs="+",
        type=Path,
        help=".npz of images or features, or a folder of images; several sets with --reference, else one, and then the reference",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="what samples are compared with: the same, or statistics: an .npz of mu and sigma, or torch-fidelity's .pt",
    )
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
        ValueError, ImportError: as ``evaluate`` and ``Inception``; an extractor that is not there; no reference.
    """
    from ditkernels.evaluation.evaluate import evaluate_sets
    from ditkernels.evaluation.features import load_extractor
    from ditkernels.runtime import resolve_device

    paths, reference = _sides(args)
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"--json: got {args.json}, but {args.json.parent} is no folder")
    found = evaluate_sets(
        paths,
        reference,
        extractor=load_extractor(args.weights, args.extractor, resolve_device(args.device)),
        metrics=None if args.metrics is None else args.metrics.split(","),
        batch_size=args.batch_size,
        split_size=args.split_size,
        neighbours=args.neighbours,
        max_pixels=args.max_pixels,
        progress=True,
    )
    written = _one(found[0]) if len(found) == 1 else _several(paths, found)
    if args.json is not None:
        args.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0


def _sides(args: argparse.Namespace) -> tuple[list[Path], Path]:
    if args.reference is not None:
        return args.samples, args.reference
    if len(args.samples) != 2:
        raise ValueError(
            f"--reference: got none and {len(args.samples)} paths, allowed are samples and their reference, or sets of samples "
            "with --reference"
        )
    return args.samples[:1], args.samples[1]


def _one(result: Evaluation) -> dict[str, Any]:
    print(report(result))
    _note(result.notes)
    return result.to_json()


def _several(paths: Sequence[Path], sets: Sequence[Evaluation]) -> dict[str, Any]:
    from ditkernels.evaluation.sets import notes_on, spreads_of

    for path, result in zip(paths, sets, strict=True):
        print(f"{path}: {report(result)}\n")
        _note([f"{path}: {note}" for note in result.notes])
    spreads, notes = spreads_of(sets), notes_on(sets)
    print(f"mean ± standard deviation over {len(sets)} sets")
    for name, (mean, std) in spreads.items():
        print(f"{LINES[name]:16}{mean:.4f} ± {std:.4f}")
    _note(notes)
    return {
        "sets": [{"samples": str(path), **result.to_json()} for path, result in zip(paths, sets, strict=True)],
        "mean": {name: spread.mean for name, spread in spreads.items()},
        "std": {name: spread.std for name, spread in spreads.items()},
        "notes": notes,
    }


def _note(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


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
