"""What planning a part comes to, in every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ditkernels.accelerate import proof
from ditkernels.accelerate.refusals import Refused, refuse_intercepted
from ditkernels.accelerate.report import Part
from ditkernels.accelerate.swap import Swap

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
    return Part(name, fused=fused), [swap.under(name) for swap in swaps]


def proven(
    module: nn.Module,
    swaps: Sequence[Swap],
    inputs: proof.Inputs,
    stand_ins: dict[int, nn.Module] | None = None,
) -> list[Swap]:
    """The swaps, if the module computes with them what it did before; raises Refused if not."""
    reason = proof.disagreement(module, swaps, inputs, stand_ins)
    if reason is not None:
        raise Refused(reason)
    return list(swaps)


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
