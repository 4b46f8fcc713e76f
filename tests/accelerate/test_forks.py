"""Random forks are fused right or refused; and those that change nothing that matters are fused in every place."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditkernels import accelerate, ops
from ditkernels.accelerate import proof
from tests.helpers.counting import counted
from tests.helpers.forks import fork

SITES = 9
"""Norms, five, and residual sums, four, of two blocks and a final layer."""


@contextmanager
def sites() -> Iterator[Callable[[], int]]:
    """How many norms and residual sums ran in ops."""
    ends = []
    final_layer = ops.final_layer

    def ending(*args: Any, **options: Any) -> Tensor:
        ends.append(1 + (options["branch"] is not None))
        return final_layer(*args, **options)

    with counted() as calls, mock.patch.object(ops, "final_layer", ending):
        yield lambda: calls["modulate_norm"] + 2 * calls["gated_residual_norm"] + calls["gated_residual"] + sum(ends)


def ran(model: nn.Module, size: int, training: bool) -> tuple[Any, tuple]:
    """What a call gives, and what it leaves in the generators."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 4, 8, 8, generator=generator)
    t, y = (torch.randint(0, high, (size,), generator=generator) for high in (1000, 10))
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(size)
    with torch.no_grad():
        out = model.train(training)(x, t, y)
    return out, (torch.rand(()).item(), np.random.rand(), random.random())


def assert_right(number: int) -> int:
    """Asserts that the fork of this number computes what it did before; returns how many sites of it are fused."""
    made = fork(number)
    fused = copy.deepcopy(made.model)
    accelerate(fused, file=io.StringIO())
    for change in (lambda model: None, *made.changes):
        change(made.model)
        change(fused)
        for size, training in ((3, False), (1, False), (2, True)):
            (got, left), (want, expected) = (ran(model, size, training) for model in (fused, made.model))
            assert left == expected, made.source
            assert proof.structure(got) == proof.structure(want), made.source
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4, msg=lambda text: f"{text}\n{made.source}")
            assert got.abs().max() > 1e-3
    with sites() as fused_sites:
        ran(fused, 3, False)
    if not made.kind:
        assert fused_sites() == SITES, made.source
    return fused_sites()


FEW = 28


@pytest.mark.parametrize("number", range(FEW))
def test_a_fork_is_fused_right_or_refused(number: int) -> None:
    assert_right(number)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FEW, 500, 59))
def test_many_forks_are_fused_right_or_refused(first: int) -> None:
    found = [assert_right(number) for number in range(first, min(first + 59, 500))]
    assert found.count(SITES) >= len(found) / 3
