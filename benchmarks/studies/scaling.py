"""The two questions of the DiT paper, in small: does quality follow a model's Gflops, and can more sampling steps replace them?

    python -m benchmarks.studies.scaling --figures docs/figures    minutes on a CPU
    python -m benchmarks.studies.scaling --sizes 64x4,128x6,256x8 --patches 4,2,1 --train-steps 20000 --device cpu

Every size (width x depth) is trained with every patch size on the handwritten digits, for the same number of steps. Quality is
the Fréchet distance between features of samples and of real digits, in a small network trained on the real ones: lower is
better, and nothing but this study compares with it. Gflops are multiply-adds of one forward, as in the paper; sampling compute
is that times the model calls. Figure 1: distance over Gflops, at the most steps. Figure 2: distance over sampling compute, a
line a model, a point a number of steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.speed import measure
from benchmarks.studies import digits as study
from ditkernels.evaluation.evaluate import Reference, evaluate
from ditkernels.models import DiT, count
from ditkernels.sampling.config import SampleConfig


def sizes(text: str) -> list[tuple[int, int]]:
    """An argparse type: WIDTHxDEPTH, separated by commas; widths are multiples of 16."""
    found = [tuple(measure.positive(number) for number in size.split("x")) for size in text.split(",")]
    for size in found:
        if len(size) != 2 or size[0] % 16:
            raise argparse.ArgumentTypeError(f"got {text}, allowed is WIDTHxDEPTH with a width in multiples of 16")
    return [(size[0], size[1]) for size in found]


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--sizes", type=sizes, default=[(16, 2), (32, 3), (64, 4)], help="widths x depths")
    parser.add_argument("--patches", type=measure.numbers, default=[4, 2, 1], help="patch sizes, divisors of 8")
    parser.add_argument("--train-steps", type=measure.positive, default=300)
    parser.add_argument("--batch-size", type=measure.positive, default=64)
    parser.add_argument("--sampling-steps", type=measure.numbers, default=[4, 8, 16, 32], help="of DDPM")
    parser.add_argument("--count", type=measure.positive, default=300, help="samples a point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, metavar="DIR")
    args = parser.parse_args()
    digits, judge, reference = study.real_digits()
    rows = []
    for width, depth in args.sizes:
        for patch_size in args.patches:
            model = study.train(
                study.new_model(width, depth, patch_size, args.seed),
                digits,
                steps=args.train_steps,
                batch_size=args.batch_size,
                seed=args.seed,
            )
            rows += sampled(model, f"{width}x{depth}/{patch_size}", judge, reference, args)
    measure.report("scaling", args, rows, ["model", "gflops", "sampling_steps", "sampling_gflops", "distance"])
    if args.figures is not None:
        draw_models(rows, args.figures / "scaling-models.png")
        draw_steps(rows, args.figures / "scaling-steps.png")


def sampled(model: DiT, name: str, judge: study.Judge, reference: Reference, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every number of sampling steps."""
    gflops = count(model).macs / 1e9
    rows = []
    for steps in args.sampling_steps:
        config = SampleConfig("ddpm", 1.0, None, clip_denoised=True, seed=args.seed)
        pixels, _ = study.drawn(model, str(steps), config, count=args.count)
        found = evaluate(iter([pixels]), reference, extractor=judge, metrics=["fid"])
        rows.append(
            {
                "model": name,
                "gflops": gflops,
                "sampling_steps": steps,
                "sampling_gflops": gflops * steps,
                "distance": found.fid,
            }
        )
    return rows


def draw_models(rows: list[dict[str, Any]], path: Path) -> None:
    """Distance over Gflops at the most sampling steps; models of one patch size share a colour."""
    most = max(row["sampling_steps"] for row in rows)
    figure = study.new_figure(6.5, 4.2)
    axes = figure.add_subplot()
    for patch_size in sorted({row["model"].split("/")[1] for row in rows}, key=int):
        shown = [r for r in rows if r["sampling_steps"] == most and r["model"].endswith(f"/{patch_size}")]
        axes.loglog([r["gflops"] for r in shown], [r["distance"] for r in shown], "o-", label=f"patch {patch_size}")
        for row in shown:
            axes.annotate(
                row["model"],
                (row["gflops"], row["distance"]),
                fontsize=7,
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.set(
        xlabel="Gflops (multiply-adds) of a forward",
        ylabel="Fréchet distance",
        title="Quality and model compute",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False)
    study.save(figure, path)


def draw_steps(rows: list[dict[str, Any]], path: Path) -> None:
    """Distance over sampling compute, a line a model."""
    figure = study.new_figure(6.5, 4.2)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["model"] for row in rows):
        shown = [row for row in rows if row["model"] == name]
        axes.loglog(
            [r["sampling_gflops"] for r in shown],
            [r["distance"] for r in shown],
            "o-",
            markersize=3,
            label=name,
        )
    axes.set(xlabel="sampling Gflops an image", ylabel="Fréchet distance", title="Quality and sampling compute")
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=7)
    study.save(figure, path)


if __name__ == "__main__":
    main()
