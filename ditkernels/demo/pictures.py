"""The demo's picture: grids of digits with what was misread framed, and digits that emerge from noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkernels.sampling.config import SampleConfig
from ditkernels.training.plot import MUTED, TEXT, WRONG, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES = 10
PER_CLASS = 10
ENLARGED = 8
STRIP_LENGTH = 32
STRIP_DIGITS = (3, 8)


@dataclass(frozen=True)
class Read:
    """Images (N, 1, 8, 8) on the CPU, the labels they should show (N,), and those the classifier saw (N,)."""

    images: Tensor
    labels: Tensor
    readings: Tensor

    @property
    def accuracy(self) -> float:
        """The share of images that are read as what they should show."""
        return (self.readings == self.labels).double().mean().item()

    def first_of_each_class(self, count: int) -> Read:
        """`count` of each class, ordered by class."""
        chosen = torch.cat([(self.labels == label).nonzero().flatten()[:count] for label in range(CLASSES)])
        return Read(self.images[chosen], self.labels[chosen], self.readings[chosen])


def picture_of_samples(guided: Read, unguided: Read, real: Read, guided_steps: Sequence[Tensor], sampling: SampleConfig) -> Figure:
    """Three grids, a row a class, with what the classifier misread framed; below, two digits emerging."""
    figure = new_figure(width=12.0, height=5.55)
    layout = figure.add_gridspec(
        2,
        3,
        height_ratios=[10, 2.05],
        left=0.035,
        right=0.985,
        top=0.94,
        bottom=0.025,
        wspace=0.07,
        hspace=0.14,
    )
    panels = {
        f"drawn with guidance {sampling.guidance_scale:g}": guided,
        "drawn without guidance": unguided,
        "real, never seen in training": real,
    }
    for column, (title, read) in enumerate(panels.items()):
        axes = figure.add_subplot(layout[0, column])
        shown = read.first_of_each_class(PER_CLASS)
        _show_grid(axes, shown.images, [str(label) for label in range(CLASSES)])
        _frame_misread(axes, shown)
        axes.set_title(f"{title}: {read.accuracy:.0%} recognised", color=TEXT, fontsize=11)
    # More frames from the end, where a digit emerges from the noise.
    fraction = 1 - (1 - np.linspace(0, 1, STRIP_LENGTH)) ** 1.6
    frames = np.round(fraction * (len(guided_steps) - 1)).astype(int)
    strip = torch.stack([guided_steps[frame][digit * PER_CLASS] for digit in STRIP_DIGITS for frame in frames])
    axes = figure.add_subplot(layout[1, :])
    _show_grid(axes, strip, [str(digit) for digit in STRIP_DIGITS])
    axes.set_title("from noise to digit", color=TEXT, fontsize=11)
    return figure


def _show_grid(axes: Axes, images: Tensor, row_names: Sequence[str]) -> None:
    rows = len(row_names)
    grid = _grid(images, rows)
    cell = grid.shape[0] // rows
    axes.imshow(grid, cmap="bone", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([cell * (row + 0.5) for row in range(rows)], row_names)
    axes.tick_params(length=0, colors=MUTED, labelsize=10)
    axes.spines[:].set_visible(False)


def _grid(images: Tensor, rows: int) -> np.ndarray:
    """Images (rows·columns, 1, 8, 8), row by row, as one enlarged picture (height, width) in [-1, 1]."""
    with_border = F.pad(images, (1, 1, 1, 1), value=-1)
    enlarged = F.interpolate(with_border, scale_factor=ENLARGED, mode="bicubic").clamp(-1, 1)
    cells = enlarged[:, 0].unflatten(0, (rows, -1))
    return cells.permute(0, 2, 1, 3).flatten(0, 1).flatten(1).numpy()


def _frame_misread(axes: Axes, read: Read) -> None:
    from matplotlib.patches import Rectangle

    cell = ENLARGED * (read.images.shape[-1] + 2)
    for index in (read.readings != read.labels).nonzero().flatten().tolist():
        row, column = divmod(index, PER_CLASS)
        corner = (column * cell + 2, row * cell + 2)
        axes.add_patch(Rectangle(corner, cell - 4, cell - 4, fill=False, edgecolor=WRONG, linewidth=1.2))
