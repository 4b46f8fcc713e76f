"""Draws every figure of README and docs from the JSON in benchmarks/results; one without its data is not drawn, and named.

    python -m benchmarks.figures                        all that have data
    python -m benchmarks.figures --only training.png    one

Speeds come from the latest folder of a GPU that holds the file, and the figure says which GPU, when, at which commit; those of
cpu.png come from a CPU's own file. Results of a benchmark that was cut short are not drawn. Predictions are no data:
`communication.py` draws its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed import measure
from benchmarks.studies import digits as study
from tools.tree import ROOT

Rows = list[dict[str, Any]]
COLOURS = {
    "ours": "tab:blue",
    "sampler": "tab:blue",
    "cuda": "tab:blue",
    "triton": "tab:cyan",
    "eager": "tab:grey",
}
OTHERS = "tab:orange"


class Figure(NamedTuple):
    """One picture.

    Attributes:
        file: in docs/figures.
        source: file in benchmarks/results, or in the folder of a GPU there if ``measured``.
        made_by: the command that makes the source.
        draw: from rows, a path and a line that says where they are from.
        measured: whether it shows speeds of a GPU.
    """

    file: str
    source: str
    made_by: str
    draw: Callable[[Rows, Path, str], None]
    measured: bool = False


# ---- Speeds ----------------------------------------------------------------------------------------------------------


def draw_ops(rows: Rows, path: Path, origin: str) -> None:
    """Share of the copy bandwidth, forward and backward, in the precision of training."""
    figure = study.new_figure(9, 4.2)
    timed = [row for row in rows if "median_ms" in row and row["precision"] == "fp32+bf16"]
    contenders = list(dict.fromkeys(row["contender"] for row in timed))
    width = 0.8 / max(1, len(contenders))
    for axes, phase in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward")):
        names = list(dict.fromkeys(row["op"] for row in timed if row["pass"] == phase))
        for place, contender in enumerate(contenders):
            shares = {r["op"]: r["of_copy"] for r in timed if (r["contender"], r["pass"]) == (contender, phase)}
            at = [index + width * (place - (len(contenders) - 1) / 2) for index in range(len(names))]
            heights = [100 * shares.get(name, 0) for name in names]
            axes.bar(at, heights, width, label=contender, color=_colour(contender))
        axes.axhline(90, color="black", linewidth=0.6, linestyle=":")
        axes.set_xticks(range(len(names)), names, rotation=20, fontsize=7)
        axes.set(title=phase, ylabel="% of the measured copy bandwidth" if phase == "forward" else None)
    axes.legend(frameon=False, fontsize=7)
    _finish(figure, path, f"bytes an op must move over its time; {origin}")


def draw_training(rows: Rows, path: Path, origin: str) -> None:
    """Images a second of each contender on DiT-XL/2 at 256 px, at the largest batch that fits."""
    timed = [r for r in rows if "median_ms" in r and (r["model"], r["input_size"]) == ("DiT-XL/2", 32)]
    best = {row["contender"]: row for row in timed}
    ordered = sorted(best.values(), key=lambda row: row["images_per_s"])
    figure = study.new_figure(7, 0.5 + 0.35 * max(1, len(ordered)) + 0.8)
    axes = figure.add_subplot()
    names = [f"{row['contender']}, batch {row['batch']}" for row in ordered]
    colours = [_colour(row["contender"]) for row in ordered]
    bars = axes.barh(names, [row["images_per_s"] for row in ordered], color=colours)
    axes.bar_label(bars, [f"{row['images_per_s']:.0f}" for row in ordered], padding=3, fontsize=8)
    axes.margins(x=0.12)
    axes.set(xlabel="images/s", title="Training DiT-XL/2 at 256 px, a whole step")
    _finish(figure, path, origin)


def draw_sampling(rows: Rows, path: Path, origin: str) -> None:
    """Guided images a second over the batch, a line a contender, and milliseconds a step at batch 1."""
    timed = [r for r in rows if "median_ms" in r and (r["model"], r["input_size"], r["steps"]) == ("DiT-XL/2", 32, 50)]
    figure = study.new_figure(9, 4)
    speeds, steps = figure.subplots(1, 2, width_ratios=(3, 2))
    for name in dict.fromkeys(row["contender"] for row in timed):
        mine = sorted((r["batch"], r["images_per_s"]) for r in timed if r["contender"] == name)
        speeds.loglog(*zip(*mine), marker="o", markersize=3, label=name)
    speeds.set(xlabel="batch", ylabel="images/s, 50 guided steps", title="Sampling DiT-XL/2 at 256 px")
    speeds.legend(frameon=False, fontsize=7)
    alone = [row for row in timed if row["batch"] == 1]
    bars = steps.barh([row["contender"] for row in alone], [row["median_ms"] for row in alone], color=OTHERS)
    steps.margins(x=0.15)
    steps.bar_label(bars, [f"{row['median_ms']:.2f}" for row in alone], padding=3, fontsize=8)
    steps.set(xlabel="ms a step, batch 1")
    steps.tick_params(axis="y", labelsize=7)
    _finish(figure, path, origin)


def draw_attention(rows: Rows, path: Path, origin: str) -> None:
    """TFLOP/s over the length at head_dim 72, a line a backend."""
    timed = [row for row in rows if "median_ms" in row and row["shape"][4] == 72]
    figure = study.new_figure(9, 4)
    for axes, phase in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward")):
        for name in dict.fromkeys(row["backend"] for row in timed):
            mine = sorted((r["shape"][1], r["tflops"]) for r in timed if (r["backend"], r["pass"]) == (name, phase))
            if mine:
                axes.loglog(*zip(*mine), marker="o", markersize=3, label=name)
        axes.set(xlabel="tokens", title=f"{phase}, 72 channels a head")
    axes.legend(frameon=False, fontsize=7)
    figure.axes[0].set(ylabel="TFLOP/s")
    _finish(figure, path, origin)


def draw_cpu(rows: Rows, path: Path, origin: str) -> None:
    """How many times as fast as plain PyTorch our ops are on one thread of a CPU, a bar a shape; torch.compile's is a tick."""
    figure = study.new_figure(9, 6)
    timed = [row for row in rows if "median_ms" in row and row["threads"] == 1]
    names = list(dict.fromkeys(row["op"] for row in timed))
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in timed))
    width = 0.8 / max(1, len(shapes))
    every_axes = figure.subplots(2, 2, sharey=True).flat
    panels = [(which, precision) for which in ("inference", "forward+backward") for precision in ("fp32", "bf16")]
    for axes, panel in zip(every_axes, panels):
        gains = {
            (r["contender"], tuple(r["shape"]), r["op"]): r["over_eager"] for r in timed if (r["pass"], r["precision"]) == panel
        }
        for place, shape in enumerate(shapes):
            at = [index + width * (place - (len(shapes) - 1) / 2) for index in range(len(names))]
            label = "x".join(map(str, shape))
            axes.bar(at, [gains.get(("cpu", shape, name), 0) for name in names], width, label=label, color=f"C{place}")
            heights = [gains.get(("compiled", shape, name), float("nan")) for name in names]
            axes.plot(at, heights, "_", color="black", label=None if place else "torch.compile")
        axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
        axes.set_xticks(range(len(names)), [name.replace("residual_", "residual\n_") for name in names], fontsize=7)
        axes.set(title=", ".join(panel), ylabel="times as fast as plain PyTorch" if panel[1] == "fp32" else None)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    _finish(figure, path, f"one thread; {origin}")


def _colour(contender: str) -> str:
    return COLOURS.get(contender.partition("-")[0], OTHERS)


def _finish(figure: Any, path: Path, origin: str) -> None:
    for axes in figure.axes:
        axes.grid(which="major", alpha=0.2)
    figure.supxlabel(origin, fontsize=7, color="grey")
    study.save(figure, path)


# ---- Which, and from what --------------------------------------------------------------------------------------------


def of_study(name: str, function: str) -> Callable[[Rows, Path, str], None]:
    """A figure that a study draws itself."""

    def draw(rows: Rows, path: Path, origin: str) -> None:
        getattr(importlib.import_module(f"benchmarks.studies.{name}"), function)(rows, path)

    return draw


FIGURES = (
    Figure("ops.png", "ops.json", "make gpu", draw_ops, measured=True),
    Figure("training.png", "training.json", "make gpu", draw_training, measured=True),
    Figure("sampling.png", "sampling.json", "make gpu", draw_sampling, measured=True),
    Figure("attention.png", "attention.json", "make gpu", draw_attention, measured=True),
    Figure("cpu.png", "cpu-ops.json", "python -m benchmarks.speed.cpu", draw_cpu),
    *(
        Figure(
            file,
            f"{name}.json",
            f"python -m benchmarks.studies.{name} --json benchmarks/results/{name}.json",
            of_study(name, draw),
        )
        for file, name, draw in (
            ("guidance.png", "guidance", "draw"),
            ("solvers.png", "solvers", "draw"),
            ("scaling-models.png", "scaling", "draw_models"),
            ("scaling-steps.png", "scaling", "draw_steps"),
        )
    ),
)


def data_of(figure: Figure, results: Path) -> dict[str, Any] | None:
    """The latest result that the figure can be drawn from, or None."""
    places = results.glob(f"*/{figure.source}") if figure.measured else [results / figure.source]
    found = [
        result
        for result in (json.loads(path.read_text(encoding="utf-8")) for path in places if path.exists())
        if result.get("complete", True)
    ]
    if figure.measured:
        found = [result for result in found if result["environment"]["compute_capability"] is not None]
    return max(found, key=lambda result: result["environment"]["date"], default=None)


def origin_of(result: dict[str, Any]) -> str:
    """Where numbers are from."""
    of = result["environment"]
    return f"{of['device']}, torch {of['torch']}, {of['date'][:10]}, commit {of['commit']}"


def main(argv: list[str] | None = None) -> None:
    """Draws, and says what is not drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [figure.file for figure in FIGURES]
    parser.add_argument("--only", type=measure.names_among(names), default=names, help=", ".join(names))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures", metavar="DIR")
    args = parser.parse_args(argv)
    for figure in FIGURES:
        if figure.file not in args.only:
            continue
        result = data_of(figure, args.results)
        if result is None:
            whose = "whole, of a GPU: " if figure.measured else ""
            print(f"{figure.file}: not drawn, there is no {figure.source} ({whose}{figure.made_by})")
            continue
        figure.draw(result["rows"], args.out / figure.file, origin_of(result))
        print(f"{figure.file}: {origin_of(result)}")


if __name__ == "__main__":
    main()
