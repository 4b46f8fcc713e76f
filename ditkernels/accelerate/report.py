"""What ``accelerate`` did, part by part."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from itertools import groupby

_WIDTH = 100
EXACTLY = "with the bits of the original, which runs under gradients"

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        name: its path in the model; "" for the model itself.
        fused: the ops it runs now; empty where it was left as it was.
        reason: why it was left; empty where it was fused.
        watched: attributes, as seen from the part, that its own forward reads; change one, and that forward runs again.
    """

    name: str
    fused: tuple[str, ...] = ()
    reason: str = ""
    watched: tuple[str, ...] = ()

    @property
    def _said(self) -> tuple[str, ...]:
        if not self.fused:
            return (f"left: {self.reason}",)
        watched = textwrap.wrap(f"watched: {', '.join(self.watched)}", _WIDTH) if self.watched else []
        return (f"fused: {', '.join(self.fused)}", *watched)


@dataclass(frozen=True)
class Report:
    """What was fused, and what was left and why. ``str()`` gives a line a part, equal neighbours of a list in one.

    Attributes:
        promise: what is kept beyond agreement to rounding.
    """

    model: str
    parts: tuple[Part, ...]
    promise: str = ""

    @property
    def fused(self) -> tuple[Part, ...]:
        """The parts that run fused ops now."""
        return tuple(part for part in self.parts if part.fused)

    @property
    def left(self) -> tuple[Part, ...]:
        """The parts that stayed as they were."""
        return tuple(part for part in self.parts if not part.fused)

    def __str__(self) -> str:
        rows = [(_range([p.name for p in parts]), said) for said, parts in self._runs()]
        width = max((len(name) for name, _ in rows), default=0)
        counts = f"{self.model}, {len(self.fused)} parts fused, {len(self.left)} left"
        head = f"ditkernels.accelerate: {', '.join(filter(None, (counts, self.promise)))}"
        lines = [(name if first else "", line) for name, said in rows for first, line in zip([True, *[False] * len(said)], said)]
        return "\n".join([head, *(f"  {name:<{width}}  {line}" for name, line in lines)])

    def _runs(self) -> list[tuple[tuple[str, ...], list[Part]]]:
        """Parts of the same kind, consecutive in their list and with the same said of them. A part of no list is one on its own."""
        by_kind: dict[str | int, list[Part]] = {}
        for position, part in enumerate(self.parts):
            kind, listed = _INDEX.subn(".*", part.name, count=1)
            by_kind.setdefault(kind if listed else position, []).append(part)
        return [(said, list(run)) for parts in by_kind.values() for said, run in groupby(parts, key=lambda part: part._said)]


def _range(names: list[str]) -> str:
    if len(names) == 1:
        return names[0] or "(across blocks)"
    first, last = (_INDEX.search(name) for name in (names[0], names[-1]))
    assert first is not None
    assert last is not None
    return f"{names[0][: first.start()]}.{first[1]}-{last[1]}{names[0][first.end() :]}"
