"""Several sets of samples against one reference: how far the metrics of one draw can be trusted."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from ditkernels.evaluation.evaluate import Evaluation
from ditkernels.evaluation.record import WEIGHTS, differences

NUMBERS = ("fid", "sfid", "inception_score", "precision", "recall")


class Spread(NamedTuple):
    """Mean and standard deviation (over n − 1) of a metric over sets."""

    mean: float
    std: float


def spreads_of(sets: Sequence[Evaluation]) -> dict[str, Spread]:
    """Of each metric that all sets have, by name. Raises ValueError for fewer than two sets."""
    if len(sets) < 2:
        raise ValueError(f"samples: got {len(sets)} set, a standard deviation needs at least 2")
    found = {name: [getattr(one, name) for one in sets] for name in NUMBERS}
    return {
        name: Spread(statistics.fmean(values), statistics.stdev(values)) for name, values in found.items() if None not in values
    }


def notes_on(sets: Sequence[Evaluation]) -> list[str]:
    """What makes a spread something else than that of the draws, in sentences; sets are numbered from 1."""
    records = [one.measured_with for one in sets]
    notes = []
    for number, record in enumerate(records[1:], start=2):
        found = differences(_but_seed(records[0]), _but_seed(record))
        if found:
            notes.append(f"set {number} was drawn otherwise than set 1: {'; '.join(found)}")
    for (first, a), (second, b) in itertools.combinations(enumerate(records, start=1), 2):
        if None not in (a[WEIGHTS], a["seed"]) and (a[WEIGHTS], a["seed"]) == (b[WEIGHTS], b["seed"]):
            notes.append(f"sets {first} and {second} are of the same weights and seed, {a['seed']}: they are one draw")
    return notes


def _but_seed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seed"}
