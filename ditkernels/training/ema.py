"""The exponential moving average of a model's weights: what samples are drawn from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger(__name__)


def copy_for_average(model: Model) -> Model:
    """A copy in eval mode that is not trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def decay_of_update(decay: float, number: int, *, warmup: bool) -> float:
    """The decay of an update, counted from 0; with ``warmup`` min(decay, (1 + n) / (10 + n)), as TensorFlow's averages have it."""
    return min(decay, (1 + number) / (10 + number)) if warmup else decay


def share_of_start(decay: float, updates: int, *, warmup: bool) -> float:
    """What the starting weights are of the average after so many updates: the product of the decays."""
    share, number = 1.0, 0
    while warmup and number < updates and (1 + number) / (10 + number) < decay:
        share *= decay_of_update(decay, number, warmup=True)
        number += 1
    return float(share * decay ** (updates - number))


def tell_share_of_start(decay: float, updates: int, *, warmup: bool) -> None:
    """Says so where the average will be of the starting weights, more than a hundredth of it."""
    share = share_of_start(decay, updates, warmup=warmup)
    if share > 0.01:
        logger.warning(
            "after %d steps at ema_decay %g the moving average, which samples are drawn from, will be %.0f%% starting weights; "
            "a smaller --ema-decay or --ema-warmup lets go of them",
            updates,
            decay,
            100 * share,
        )


class EMA(Generic[Model]):
    """The exponential moving average of a model's weights, as a model in eval mode.

    Frozen parameters and buffers are copied once, at the start, and never touched again.

    Args:
        model: that is trained.
        decay: see :meth:`update`.
        average: a :func:`copy_for_average` of the model, if it has been made before; by default one is made here.
    """

    def __init__(self, model: Model, decay: float, average: Model | None = None) -> None:
        self.decay = decay
        self.model = copy_for_average(model) if average is None else average
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        trainable = [(average, weight) for average, weight in pairs if weight.requires_grad]
        self._averages: list[Tensor] = [average for average, _ in trainable]
        self._weights: list[Tensor] = [weight for _, weight in trainable]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every trained weight and its average."""
        return zip(self._weights, self._averages, strict=True)

    @torch.no_grad()
    def update(self) -> None:
        """average ← decay·average + (1 − decay)·weight, over all trainable tensors in one foreach pass."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
