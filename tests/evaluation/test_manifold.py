"""Precision and recall, as counts, against scipy's distances in fp64 where those by products cancel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor

from ditkernels.evaluation import manifold
from ditkernels.evaluation.manifold import precision_recall

Set = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def by_scipy(samples: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    a, b = (features.double().numpy() for features in (samples, reference))

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(cdist(centres, centres), 1)[:, neighbours]
        return float((cdist(points, centres) <= radii).any(1).mean())

    return share(a, b), share(b, a)


def repeated(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    return samples.repeat(5, 1), reference.repeat_interleave(5, 0)


def copied(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the samples are images of the reference."""
    half = len(samples) // 2
    return torch.cat([samples[:half], reference[:half]]), reference


SETS: dict[str, Set] = {
    "as_they_are": lambda samples, reference: (samples, reference),
    "collapsed": lambda samples, reference: (samples[:1] + 1e-4 * (samples - samples[:1]), reference),
    "collapsed_to_one": lambda samples, reference: (samples[:1].repeat(len(samples), 1), reference),
    "every_row_five_times": repeated,
    "copied": copied,
    "apart": lambda samples, reference: (samples + 1000, reference),
    "whole_numbers": lambda samples, reference: (samples.round(), reference.round()),
}


def drawn(count: int, width: int, offset: float, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    samples, reference = (torch.randn(n, width, generator=generator) for n in (count, count * 4 // 5))
    return (0.9 * samples * spread + offset), reference * spread + offset


def assert_counts(samples: Tensor, reference: Tensor) -> None:
    assert precision_recall(samples, reference) == by_scipy(samples, reference)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("offset, spread, width", [(0, 1, 64), (100, 1e-3, 64), (1000, 1e-4, 64), (0, 1e-4, 2048), (1000, 1, 2048)])
def test_counts_are_those_of_fp64(kind: str, offset: float, spread: float, width: int) -> None:
    count = 100 if kind == "every_row_five_times" else 500
    assert_counts(*SETS[kind](*drawn(count, width, offset, spread)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("offset, spread", [(0, 1), (100, 1e-3), (1000, 1e-4)])
def test_counts_of_ten_thousand(kind: str, offset: float, spread: float) -> None:
    count = 2000 if kind == "every_row_five_times" else 10_000
    assert_counts(*SETS[kind](*drawn(count, 2048, offset, spread)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_points_on_a_small_grid_are_full_of_ties(data: st.DataObject) -> None:
    width, neighbours = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    coordinate = st.integers(-2, 2)
    sets = [
        torch.tensor(data.draw(st.lists(st.lists(coordinate, min_size=width, max_size=width), min_size=5, max_size=30)))
        for _ in range(2)
    ]
    samples, reference = (0.1 * points.float() for points in sets)
    assert precision_recall(samples, reference, neighbours=neighbours) == by_scipy(samples, reference, neighbours)


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = drawn(90, 5, 0.0, 1.0)
    whole = precision_recall(samples, reference)
    for name, size in (("POINTS", 7), ("CENTRES", 11), ("PAIRS", 3)):
        monkeypatch.setattr(manifold, name, size)
    assert precision_recall(samples, reference) == whole == by_scipy(samples, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_dtype_count_as_they_are(dtype: torch.dtype) -> None:
    samples, reference = (features.to(dtype) for features in drawn(200, 8, 3.0, 1.0))
    assert_counts(samples, reference)


def test_precision_and_recall_are_not_each_other() -> None:
    narrow, wide = torch.randn(200, 4) * 0.3, torch.randn(300, 4)
    assert_counts(narrow, wide)
    precision, recall = precision_recall(narrow, wide)
    assert precision > 0.9 > 0.5 > recall
