"""``exact=True``: the modulation behind the library's own norm, and the gate with the residual, each in one pass with eager's bits.

Forward only. A site is fused where its bits agree with the block's own forward in a trial on this device, at the model's dtypes.
Under gradients, under autocast, in a compiler, and for a call of other ranks or dtypes than the trial's, the original runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ditkernels.accelerate import proof
from ditkernels.accelerate.diffusers.block import Given, called_in
from ditkernels.accelerate.example import Calls
from ditkernels.accelerate.plans import Planned
from ditkernels.accelerate.recorded import sites
from ditkernels.accelerate.recorded.part import (
    PROGRAM,
    WITHOUT_SITES,
    Recorded,
    Recording,
    recording_of,
    refuse_hidden,
)
from ditkernels.accelerate.recorded.program import Site, program_of
from ditkernels.accelerate.recorded.tracing import value_of
from ditkernels.accelerate.refusals import Refused, attempted
from ditkernels.accelerate.swap import BEYOND, CALLED, WATCHED, Swap, rewire, unwire
from ditkernels.accelerate.watch import Trace, watched
from ditkernels.ops import dispatch
from ditkernels.ops.product_sum import product_sum, server

SERVER, WEIGHTS = "server", "weights"
"""Settings: the backend whose bits were compared, and the dtypes of the block's parameters then."""

_CASTS = ("to", "float", "bfloat16", "half", "type_as")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Exact(Recorded):
    """A block whose own operations run, but for products that are summed in the same pass."""

    def fits(self, given: Given) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not super().fits(given):
            return False
        settings = self._ditkernels
        if _dtypes(self) != settings[WEIGHTS]:
            return False
        x = next(value for value in given.values() if isinstance(value, Tensor))
        return dispatch.autocast_dtype(x) is None and server(x.device) == settings[SERVER]

    def ditkernels_summed(self, value: Tensor, factor: Tensor, addend: Tensor, *rounded: torch.dtype) -> Tensor:
        """value · factor + addend, rounded as recorded; in separate operations where a call has shapes that no kernel takes."""
        of_product, of_sum, of_result = rounded
        if value.dim() == 3 and all(_broadcasts(tensor, value) for tensor in (factor, addend)):
            return product_sum(value, factor, addend, of_product, of_sum, of_result)
        product = value.to(of_product) * factor.to(of_product)
        return (product.to(of_sum) + addend.to(of_sum)).to(of_result)


def _dtypes(block: nn.Module) -> tuple[torch.dtype, ...]:
    return tuple([parameter.dtype for parameter in block.parameters()])


def _broadcasts(tensor: Tensor, rows: Tensor) -> bool:
    sizes = zip(reversed(tensor.shape), reversed(rows.shape))
    return tensor.dim() <= rows.dim() and all(size in (1, full) for size, full in sizes) and tensor.shape[-1] == rows.shape[-1]


# ---- Sites -----------------------------------------------------------------------------------------------------------


class Sum(NamedTuple):
    """A sum of rows with a product, and the dtypes that product, sum and result are rounded to."""

    value: fx.Node
    factor: fx.Node
    addend: fx.Node
    out: fx.Node
    rounded: tuple[torch.dtype, torch.dtype, torch.dtype]
    inner: tuple[fx.Node, ...]

    @property
    def site(self) -> Site:
        return Site("ditkernels_summed", (self.value, self.factor, self.addend, *self.rounded), (self.out,), self.inner)


def _sums(graph: fx.Graph) -> Iterator[Sum]:
    for node in graph.nodes:
        if sites.is_rows(node) and sites.is_call(node, sites.SUMS):
            first, second = node.args
            found = _sum(node, first, second) or _sum(node, second, first)
            if found is not None:
                yield found


def _sum(node: fx.Node, product: Any, addend: Any) -> Sum | None:
    if not sites.is_call(product, sites.PRODUCTS) or sites.only_user(product) is not node or not sites.is_rows(product, node):
        return None
    value, factor = product.args if sites.is_rows(product.args[0], node) else product.args[::-1]  # type: ignore[misc]
    value, factor, addend = (_uncast(operand) for operand in (value, factor, addend))
    operands = all(_is_operand(operand, node) for operand in (value, factor, addend))
    if not sites.is_rows(value, node) or not operands:
        return None
    behind = sites.only_user(node)
    cast = behind is not None and _is_cast(behind) and sites.is_rows(behind, node)
    out, inner = (behind, (product, node)) if cast else (node, (product,))
    assert out is not None
    rounded = (value_of(product).dtype, value_of(node).dtype, value_of(out).dtype)
    return Sum(value, factor, addend, out, rounded, inner) if set(rounded) <= set(_DTYPES) else None


def _is_operand(node: Any, rows: fx.Node) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in _DTYPES and _broadcasts(value, value_of(rows))


def _uncast(node: Any) -> Any:
    """What was widened, which a kernel does as it reads."""
    if not isinstance(node, fx.Node) or not _is_cast(node):
        return node
    before, after = value_of(node.args[0]), value_of(node)
    widened = before.is_floating_point() and torch.promote_types(before.dtype, after.dtype) == after.dtype
    return node.args[0] if widened and before.shape == after.shape else node


def _is_cast(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in _CASTS


# ---- Planning --------------------------------------------------------------------------------------------------------


def plan_exact(block: Any, calls: Calls) -> Planned:
    """The plan of a block of which a call is known."""
    backend = server(proof.device_of(block))
    if backend is None:
        raise Refused("no kernel serves its device")
    recording = recording_of(block, calls)
    found = [each.site for each in _sums(recording.graph)]
    if not found:
        raise Refused(WITHOUT_SITES)
    refuse_hidden(block)
    with proof.isolated(block):
        trial = _Trial(recording, backend)
        kept = found if trial.agrees(found) else [site for site in found if trial.agrees([site])]
        if not kept or not trial.agrees(kept):
            raise Refused(f"the bits of {backend} kernels differ from its own forward's")
    swap = trial.swap(kept, block)
    noticed = watched(block, swap.called, trial.trace.read)
    told = "product_sum" if len(kept) == len(found) else f"product_sum at {len(kept)} of {len(found)} sites"
    return (told,), [replace(swap, settings={**swap.settings, WATCHED: noticed})]


class _Trial:
    """A copy of a block that runs beside its own forward, at its own dtypes and without gradients."""

    def __init__(self, recording: Recording, backend: str) -> None:
        self._recording, self._backend = recording, backend
        self.copy = proof.duplicate(recording.block, recording.stand_ins)
        self.called = tuple(called_in(recording.block, ()))
        self.trace = Trace(self.copy, self.called)
        proof.randomise(self.copy)
        self._want = [self._run(training, self.trace) for training in (False, True)]
        if self.trace.written:
            raise Refused(f"its own forward writes {', '.join(sorted(self.trace.written))}, which a fused one would not")

    def swap(self, kept: Sequence[Site], block: nn.Module) -> Swap:
        """What rewires ``block``, or the copy of it, whose branches have other weights."""
        recording = self._recording
        settings = {**recording.settings, PROGRAM: program_of(recording.graph, kept), CALLED: self.called}
        return Swap("", Exact, {**settings, SERVER: self._backend, WEIGHTS: _dtypes(block)})

    def agrees(self, kept: Sequence[Site]) -> bool:
        """Whether the bits are the original's with these sites fused."""
        own: Any = self.copy
        rewire(own, [self.swap(kept, own)])
        beyond: list[bool] = []
        own._ditkernels[BEYOND] = beyond
        try:
            got = [self._run(training) for training in (False, True)]
        finally:
            unwire(own)
        return not beyond and all(proof.same_bits(mine, theirs) for mine, theirs in zip(got, self._want))

    def _run(self, training: bool, trace: Trace | None = None) -> proof.Outcome:
        own = proof.dtype_of(self._recording.block)
        setting = proof.Setting(training, gradients=False)
        return attempted(proof.OWN_FAILS, lambda: proof.ran_once(self.copy, self._recording.inputs, own, setting, trace))
