"""Precision and recall of Kynkäänniemi et al. 2019 (arXiv 1904.06991), each pair of features decided as fp64 differences decide it.

A manifold is the union of balls around its points, each reaching to the k-th nearest other point. A point is inside where its
distance to a centre is at most that centre's radius. Distances by products, |a|² + |b|² − 2·a·b, cancel: beside an offset or in a
cloud that has collapsed nothing of them is left. So features are shifted by the centres' mean, products in fp64 come with the bound
of their rounding, and the pairs within that bound of a decision are taken again as the root of the sum of squared differences.

Memory: some 500 MB above the features (measured: 10,000 on each side, 2048 wide), and a copy of them where rows are equal.
Time: of N samples and M references of F features, two products of N x M x F in fp64, one of N x N x F and one of M x M x F.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditkernels.evaluation.config import NEIGHBOURS

Array = npt.NDArray[Any]

POINTS, CENTRES, PAIRS = 1024, 4096, 4096
"""How many of each are held at once."""

_UNIT = 2.0**-53


class Cloud(NamedTuple):
    """Different points (U, F), and how often each stands in the set."""

    points: Tensor
    counts: Array


def precision_recall(samples: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Shares of the samples inside the reference's manifold, and of the reference inside the samples'.

    Args:
        samples: (N, F) features of any floating dtype; reference: (M, F).
        neighbours: k; the k-th nearest other point is the radius.

    Raises:
        ValueError: fewer than neighbours + 1 on either side, features of different width or not finite.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= neighbours:
            raise ValueError(
                f"precision_recall: got {len(features)} {name}, needs at least {neighbours + 1} for {neighbours} neighbours"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"precision_recall: got {name} with features that are not finite")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features: got {samples.shape[1]} per image, but the reference has {reference.shape[1]}")
    ours, theirs = _cloud(samples), _cloud(reference)
    return _share_inside(ours, theirs, neighbours), _share_inside(theirs, ours, neighbours)


def _cloud(features: Tensor) -> Cloud:
    """Equal rows once: a generator that repeats itself would have every pair taken by differences."""
    rows = features.detach().cpu()
    rows = (rows.float() if rows.dtype == torch.bfloat16 else rows).contiguous()
    digests = np.array([hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows.numpy()])
    _, first, counts = np.unique(digests, return_index=True, return_counts=True)
    return Cloud(rows if len(first) == len(rows) else rows[torch.from_numpy(first)], counts)


def _share_inside(cloud: Cloud, centres: Cloud, neighbours: int) -> float:
    inside = _inside(cloud.points, centres.points, _radii(centres, neighbours))
    return float(cloud.counts[inside].sum() / cloud.counts.sum())


def _radii(cloud: Cloud, neighbours: int) -> Array:
    """How far each point's ball reaches. A point is its own nearest, so that the k-th other one comes k + 1st."""
    wanted = neighbours + 1
    found = [_nth_distance(cloud, rows, wanted) for rows in torch.arange(len(cloud.points)).split(POINTS)]
    return np.concatenate(found)


def _nth_distance(cloud: Cloud, rows: Tensor, wanted: int) -> Array:
    reach = torch.full((len(rows), wanted), torch.inf, dtype=torch.float64)
    near: list[tuple[Array, Array, Array]] = []
    for first, squares, bound in _products(cloud.points[rows], cloud.points):
        reach = torch.cat([reach, squares + bound], 1).topk(wanted, largest=False).values
        low = squares - bound
        row, column = np.nonzero((low <= reach[:, -1:]).numpy())
        near.append((row, column + first, low.numpy()[row, column]))
    row, column, lowest = (np.concatenate(each) for each in zip(*near))
    kept = lowest <= reach[:, -1].numpy()[row]
    row, column = row[kept], column[kept]
    distance = _distances(cloud.points, rows.numpy()[row], cloud.points, column)
    order = np.lexsort((distance, row))
    row, column, distance = row[order], column[order], distance[order]
    # How many points lie no further than this one, counted from the first of its row.
    reached = np.cumsum(cloud.counts[column])
    start = np.searchsorted(row, np.arange(len(rows)))
    reached -= (reached[start] - cloud.counts[column[start]])[row]
    enough = np.flatnonzero(reached >= wanted)
    return distance[enough[np.unique(row[enough], return_index=True)[1]]]


def _inside(points: Tensor, centres: Tensor, radii: Array) -> Array:
    found = [_inside_any(part, centres, radii) for part in points.split(POINTS)]
    return np.concatenate(found)


def _inside_any(points: Tensor, centres: Tensor, radii: Array) -> Array:
    inside = torch.zeros(len(points), dtype=torch.bool)
    squared = torch.from_numpy(radii).square()
    close: list[tuple[Array, Array]] = []
    for first, squares, bound in _products(points, centres):
        limit = squared[first : first + squares.shape[1]]
        bound += 4 * _UNIT * limit
        inside |= (squares + bound <= limit).any(1)
        row, column = np.nonzero(((squares - bound <= limit) & ~inside[:, None]).numpy())
        close.append((row, column + first))
    row, column = (np.concatenate(each) for each in zip(*close))
    found = inside.numpy()
    open_ = ~found[row]
    row, column = row[open_], column[open_]
    within = _distances(points, row, centres, column) <= radii[column]
    found[row[within]] = True
    return found


def _products(points: Tensor, centres: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Squared distances to some centres at a time, from products: the first centre's index, values and bounds (points, centres).

    The bound: a product of F terms errs by at most F units of |a|·|b| (Higham 2002, 3.5), the two squares likewise, and
    2·|a|·|b| ≤ |a|² + |b|²; 16 units more are for the shift and for the sums.
    """
    shift = _mean(centres)
    a = points.double() - shift
    of_a = a.square().sum(1, keepdim=True)
    for first in range(0, len(centres), CENTRES):
        b = centres[first : first + CENTRES].double() - shift
        sizes = of_a + b.square().sum(1)
        yield first, torch.addmm(sizes, a, b.T, alpha=-2), (2 * a.shape[1] + 16) * _UNIT * sizes


def _mean(points: Tensor) -> Tensor:
    return torch.stack([part.double().sum(0) for part in points.split(CENTRES)]).sum(0) / len(points)


def _distances(points: Tensor, rows: Array, centres: Tensor, columns: Array) -> Array:
    """The root of the sum of squared differences of so many pairs, in fp64: the same for a pair wherever it stands."""
    found = np.empty(len(rows))
    a, b = points.numpy(), centres.numpy()
    for first in range(0, len(rows), PAIRS):
        part = slice(first, first + PAIRS)
        apart = a[rows[part]].astype(np.float64) - b[columns[part]]
        found[part] = np.sqrt(np.square(apart, out=apart).sum(1))
    return found
