"""Loss, speed and FID of training runs, side by side in one picture, and the figures of `ditkernels demo`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkernels.evaluation.record import differences
from ditkernels.training.log import MEASURED_WITH, METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BACKGROUND, TEXT, MUTED, ACCENT, WRONG = "#101418", "#f2f5f7", "#9fb0c0", "#7cc4ff", "#ff5a4f"
COLOURS = (ACCENT, "#ffb454", "#9ae58a", "#ff7eb6", "#c3a6ff", "#f2f5f7", "#5fd7d7", "#e5d36a")

Rows = Sequence[Mapping[str, Any]]


def draw_runs(folders: Sequence[Path], out: Path) -> None:
    """Draws losses and speeds of the runs in ``folders`` as one picture, and their FID where one has any.

    Args:
        out: the picture, .png, .svg or .pdf.

    Raises:
        ValueError: a folder holds no metrics; ``out`` is a folder, or a file of another kind.
        ImportError: matplotlib is not installed.
    """
    if out.is_dir() or out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out: got {out}, allowed is a file that ends in .png, .svg or .pdf")
    runs = {str(folder): read_metrics(folder / METRICS) for folder in folders}
    evaluated = any(row.get("fid") is not None for rows in runs.values() for row in rows)
    drawn = [draw_losses, draw_speeds, *([draw_evaluations] if evaluated else [])]
    figure = new_figure(width=6.0 * len(drawn), height=4.6)
    figure.subplots_adjust(left=0.12 / len(drawn), right=0.985, top=0.91, bottom=0.12, wspace=0.16)
    for draw, axes in zip(drawn, figure.subplots(1, len(drawn)), strict=True):
        draw(axes, runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(figure, out)


def draw_losses(axes: Axes, runs: Mapping[str, Rows]) -> None:
    """Training losses, and validation losses dashed, of runs by name."""
    for (name, rows), colour in zip(runs.items(), _colours(runs), strict=True):
        axes.plot(*_series(rows, "loss"), color=colour, linewidth=1.6, label=name)
        steps, values = _series(rows, "validation_loss")
        if steps:
            label = f"{name}, validation"
            axes.plot(steps, values, color=colour, linewidth=1.2, linestyle="--", label=label)
    axes.set_yscale("log")
    _dress(axes, "training loss: noise error + variance term")


def draw_speeds(axes: Axes, runs: Mapping[str, Rows]) -> None:
    """Images per second of runs by name."""
    for (name, rows), colour in zip(runs.items(), _colours(runs), strict=True):
        axes.plot(*_series(rows, "images_per_second"), color=colour, linewidth=1.6, label=name)
    axes.set_ylim(bottom=0)
    _dress(axes, "images per second")


def draw_evaluations(axes: Axes, runs: Mapping[str, Rows]) -> None:
    """FID of runs by name; a line breaks where an evaluation was measured otherwise than the one before it."""
    for (name, rows), colour in zip(runs.items(), _colours(runs), strict=True):
        axes.plot(
            *_broken_series([row for row in rows if row.get("fid") is not None]),
            color=colour,
            linewidth=1.6,
            marker="o",
            markersize=3,
            label=name,
        )
    _dress(axes, "FID; a line breaks where it was measured otherwise")


def _broken_series(rows: Rows) -> tuple[list[float], list[float]]:
    steps: list[float] = []
    values: list[float] = []
    for before, row in zip([*rows[:1], *rows], rows, strict=False):
        if _measured_otherwise(before, row):
            steps.append(math.nan)
            values.append(math.nan)
        steps.append(row["step"])
        values.append(row["fid"])
    return steps, values


def _measured_otherwise(before: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    one, other = before.get(MEASURED_WITH), row.get(MEASURED_WITH)
    if one is None or other is None:
        return one is not other
    return bool(differences(one, other))


def new_figure(*, width: float, height: float) -> Figure:
    """A dark figure; sizes in inches.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    try:
        # Not through pyplot: it would look for a display and leave global state behind.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install ditkernels[demo]") from error

    return Figure(figsize=(width, height), dpi=150, facecolor=BACKGROUND)


def save(figure: Figure, path: Path) -> None:
    """Writes the picture; a PNG without the version of the software in it, so that equal pictures are equal files."""
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)


def _series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    kept = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def _colours(runs: Mapping[str, Rows]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(runs))]


def _dress(axes: Axes, title: str) -> None:
    axes.set_facecolor(BACKGROUND)
    axes.set_title(title, color=TEXT, fontsize=11)
    axes.set_xlabel("step", color=MUTED)
    axes.tick_params(which="both", colors=MUTED)
    axes.grid(which="both", color=MUTED, alpha=0.15, linewidth=0.5)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=TEXT)
