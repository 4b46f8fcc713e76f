"""What planning a part comes to, in every family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ditkernels.accelerate import proof
from ditkernels.accelerate.refusals import Refused, refuse_intercepted
from ditkernels.accelerate.report import Part
from ditkernels.accelerate.same import description
from ditkernels.accelerate.swap import WATCHED, Swap
from ditkernels.accelerate.watch import watched

Planned = tuple[tuple[str, ...], list[Swap]]
"""The names of the ops that a part will run, and the swaps that make it so."""

Found = tuple[Part, list[Swap]]
"""A line of the report, and the swaps behind it."""


def found(name: str, attempt: Callable[[], Planned]) -> Found:
    """What ``attempt`` finds out about the part called ``name``, or the reason it refuses with."""
    try:
        fused, swaps = attempt()
    except Refused as refused:
        return Part(name, reason=str(refused)), []
    watched = [name for swap in swaps for name in swap.settings[WATCHED].names]
    return Part(name, fused=fused, watched=tuple(watched)), [swap.under(name) for swap in swaps]


def proven(
    module: nn.Module,
    swaps: Sequence[Swap],
    inputs: proof.Inputs,
    stand_ins: dict[int, nn.Module] | None = None,
    tokens: int = 0,
) -> list[Swap]:
    """The swaps, if the module computes with them what it did before; else raises Refused.

    Args:
        swaps: last the module's own, which is told what to watch; before it those of modules in it, proven already.
        tokens: how many tokens a call is given, for inputs that have any.
    """
    *beside, own = swaps
    read = proof.prove(module, swaps, inputs, stand_ins, tokens)
    return [*beside, replace(own, settings={**own.settings, WATCHED: watched(module, own.mixin.called, read)})]


class Once:
    """Equal modules are planned once: of the same classes with the same attributes, and with parameters of the same shapes."""

    def __init__(self) -> None:
        self._found: dict[Any, list[Found]] = {}

    def planned(self, name: str, module: nn.Module, attempt: Callable[[str], Iterable[Found]]) -> Iterator[Found]:
        """What ``attempt`` finds out about the module called ``name`` and about parts of it."""
        key = description(module)
        if key not in self._found:
            self._found[key] = list(attempt(""))
        for part, swaps in self._found[key]:
            yield replace(part, name=joined(name, part.name)), [swap.under(name) for swap in swaps]


def joined(*names: str) -> str:
    """Paths, one inside the other."""
    return ".".join(filter(None, names))


def refuse_around(root: nn.Module, blocks: str, known_as: str, fused_blocks: int) -> None:
    """Raises Refused where there is nothing to gain across blocks, or where somebody listens in around them."""
    if not fused_blocks:
        raise Refused("none of its blocks is fused")
    if blocks != known_as:
        raise Refused(f"its blocks are called {blocks}")
    refuse_intercepted(root, below=False)
    for name, child in root.named_children():
        if name != blocks:
            refuse_intercepted(child, name)
