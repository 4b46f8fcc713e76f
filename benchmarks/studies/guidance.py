"""What guidance buys and what it costs, on the handwritten digits: class accuracy rises with the scale, diversity falls.

    python -m benchmarks.studies.guidance --figure docs/figures/guidance.png

Trains one small DiT, then draws the same images, from the same noise, at every scale. Accuracy: how many a network trained on
real digits reads as the class asked for. Diversity: the mean distance of two samples of one class in that network's features,
over that of two real digits of one class. Recall: the share of real digits inside the samples' manifold. Two minutes on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import measure
from benchmarks.studies import digits as study
from ditkernels.evaluation.evaluate import evaluate
from ditkernels.sampling.config import SampleConfig


def numbers(text: str) -> list[float]:
    """An argparse type: numbers separated by commas."""
    return [float(number) for number in text.split(",")]


def spread_within_classes(features: Tensor, labels: Tensor) -> float:
    """Mean distance of two features (N, F) of one class, over the classes."""
    spreads = [torch.pdist(features[labels == label]).mean() for label in labels.unique()]
    return torch.stack(spreads).mean().item()


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--scales", type=numbers, default=[0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    parser.add_argument("--train-steps", type=measure.positive, default=700)
    parser.add_argument("--batch-size", type=measure.positive, default=64)
    parser.add_argument("--sampling-steps", type=measure.positive, default=25, help="of DDPM")
    parser.add_argument("--count", type=measure.positive, default=300, help="samples a scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, metavar="FILE")
    args = parser.parse_args()
    digits, judge, reference = study.real_digits()
    model = study.train(
        study.new_model(64, 4, 2, args.seed),
        digits,
        steps=args.train_steps,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    real_pixels = torch.from_numpy(study.pixels_of(digits.images))
    real_spread = spread_within_classes(judge(real_pixels).pool, digits.labels)
    rows = []
    for scale in args.scales:
        config = SampleConfig("ddpm", scale, None, clip_denoised=True, seed=args.seed)
        pixels, labels = study.drawn(model, str(args.sampling_steps), config, count=args.count)
        features = judge(pixels)
        found = evaluate(iter([pixels]), reference, extractor=judge)
        rows.append(
            {
                "scale": scale,
                "accuracy": (features.logits.argmax(1) == labels).double().mean().item(),
                "diversity": spread_within_classes(features.pool, labels) / real_spread,
                "recall": found.recall,
                "precision": found.precision,
                "fid": found.fid,
            }
        )
    measure.report("guidance", args, rows, ["scale", "accuracy", "diversity", "recall", "precision", "fid"])
    if args.figure is not None:
        draw(rows, args.figure)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy, diversity and recall over the scale."""
    figure = study.new_figure(6.5, 4)
    axes = figure.add_subplot()
    for name, label in (
        ("accuracy", "class accuracy"),
        ("diversity", "diversity within a class (real digits: 1)"),
        ("recall", "recall"),
    ):
        axes.plot([row["scale"] for row in rows], [row[name] for row in rows], marker="o", markersize=3, label=label)
    axes.set(xlabel="guidance scale (1: none)", title="Guidance on the handwritten digits")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    study.save(figure, path)


if __name__ == "__main__":
    main()
