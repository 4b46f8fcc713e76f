"""What planning a part comes to, in every family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ditkernels.accelerate import parts, proof
from ditkernels.accelerate.example import Calls
from ditkernels.accelerate.refusals import Refused, attempted, compiled, refuse_intercepted, refuse_random
from ditkernels.accelerate.report import Part
from ditkernels.accelerate.same import description
from ditkernels.accelerate.swap import CALLED, SIGNATURE, WATCHED, Signature, Swap
from ditkernels.accelerate.watch import watched
from ditkernels.ops.mlp import asked_for

Planned = tuple[tuple[str, ...], list[Swap]]
"""The names of the ops that a part will run, and the swaps that make it so."""

Found = tuple[Part, list[Swap]]
"""A line of the report, and the swaps behind it."""

WITHOUT_GRADIENTS = (
    "it runs its blocks without gradients, as checkpointing with use_reentrant=True does; each closes its own residual"
)


def found(name: str, attempt: Callable[[], Planned]) -> Found:
    """What ``attempt`` finds out about the part called ``name``, or the reason it refuses with."""
    try:
        fused, swaps = attempted("it cannot be read", attempt)
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
    return [*beside, replace(own, settings={**own.settings, WATCHED: watched(module, own.called, read)})]


class Once:
    """Equal modules are planned once: of the same classes with the same attributes, with parameters of the same shapes.

    Where calls of them are known, these have to be alike too.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._found: dict[Any, list[Found]] = {}

    def planned(self, name: str, module: nn.Module, attempt: Callable[[str], Iterable[Found]]) -> Iterator[Found]:
        """What ``attempt`` finds out about the module called ``name`` and about parts of it."""
        key = description((module, self._calls.within(module)))
        if key not in self._found:
            self._found[key] = list(attempt(""))
        for part, swaps in self._found[key]:
            yield replace(part, name=joined(name, part.name)), [swap.under(name) for swap in swaps]


def joined(*names: str) -> str:
    """Paths, one inside the other."""
    return ".".join(filter(None, names))


def uncompiled(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """``module`` and its path; where ``torch.compile`` has wrapped it, those of what is in it: the wrapper stays around that."""
    if compiled(module):
        return uncompiled(joined(name, "_orig_mod"), module._orig_mod)  # type: ignore[arg-type]
    return name, module


def plan_mlp(mlp: nn.Module, tokens: int, calls: Calls) -> Planned:
    """The plan of an MLP, in every family."""
    refuse_intercepted(mlp)
    refuse_random(mlp)
    linears = parts.check_mlp(mlp)
    first = next(iter(linears.values()))
    signature = Signature.of(mlp, 1)
    swap = Swap("", parts.Mlp, {CALLED: tuple(linears), SIGNATURE: signature})
    guess: proof.Inputs = lambda draw: ((draw.normal(draw.batch, draw.tokens, first.in_features),), {})  # noqa: E731
    inputs = calls.inputs(mlp, guess, signature.names)
    return ("mlp" if asked_for(first.weight.device) else "bias_gelu",), proven(mlp, [swap], inputs, tokens=tokens)


def refuse_around(root: nn.Module, lists: Sequence[str], known_as: str, fused_blocks: int) -> None:
    """Raises Refused where there is nothing to gain across blocks, or where somebody listens in around them."""
    if not fused_blocks:
        raise Refused("none of its blocks is fused")
    if len(lists) > 1:
        raise Refused(f"its blocks stand in several lists, {' and '.join(lists)}, where one list called {known_as} is known")
    if lists[0] != known_as:
        raise Refused(f"its blocks are called {lists[0]}, where {known_as} is known")
    refuse_intercepted(root, below=False)
    for name, child in root.named_children():
        if name != known_as:
            refuse_intercepted(child, name)
