"""The fused forward of a block that was recorded, how it is proven, and which modules of a model are tried."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from ditkernels.accelerate import proof
from ditkernels.accelerate.diffusers.block import NORMS, ByClass, Given, Paths, Probe, called_in, parameters_of
from ditkernels.accelerate.example import Calls
from ditkernels.accelerate.parts import Stream
from ditkernels.accelerate.plans import Planned, proven
from ditkernels.accelerate.recorded import sites
from ditkernels.accelerate.recorded.program import Program, Site, program_of
from ditkernels.accelerate.recorded.tracing import plain_forward, recorded
from ditkernels.accelerate.refusals import Refused, attempted, refuse_intercepted
from ditkernels.accelerate.swap import CALLED, READ, Fused, Swap
from ditkernels.accelerate.watch import is_plain

PROGRAM, FIXED, RANKS, DTYPES = "program", "fixed", "ranks", "dtypes"
"""Settings: the program; the plain arguments, which a call has to repeat; the ranks of the others by name, None for one that is no
tensor; and their dtypes, where the program holds for these alone."""

WITHOUT_SITES = "no norm with a modulation and no residual sum was found in it"
"""Why a module is left that is no block."""


class Recorded(ByClass):
    """A block that closes its residuals itself, with ops in the place of the sites that were found in it."""

    def fits(self, given: Given) -> bool:
        settings = self._ditkernels
        if any(not _same(given.get(name), value) for name, value in settings[FIXED].items()):
            return False
        if any(_rank(given[name]) != rank for name, rank in settings[RANKS].items()):
            return False
        return all(given[name].dtype == dtype for name, dtype in settings[DTYPES].items())

    def fused(self, given: Given) -> Any:
        program: Program = self._ditkernels[PROGRAM]
        return program.run(self, *(given[name] for name in self._ditkernels[RANKS]))

    def ditkernels_normed(self, path: str, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """The modulated norm of rows."""
        return self.ditkernels_closed_and_normed(path, x, None, None, shift, scale)[1]

    def ditkernels_closed(self, x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        """x + gate · branch."""
        if not _together(x, branch, gate):
            return x + (branch if gate is None else _wide(gate) * branch)
        return self.closed(Stream(x, branch, gate))

    def ditkernels_closed_and_normed(
        self, path: str, x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both in one op; one after the other where a call has other shapes than the ops take."""
        if branch is not None and not _together(x, branch, gate):
            x, branch, gate = self.ditkernels_closed(x, branch, gate), None, None
        if not _together(x, None, shift, scale):
            x = x if branch is None else self.ditkernels_closed(x, branch, gate)
            return x, _modulated(self.get_submodule(path)(x), shift, scale)
        return self.normed(Stream(x, branch, gate), path, shift, scale)


def _same(value: Any, proven: Any) -> bool:
    return type(value) is type(proven) and value == proven


def _rank(value: Any) -> int | None:
    return value.dim() if isinstance(value, Tensor) else None


def _together(x: Tensor, branch: Tensor | None, *vectors: Tensor | None) -> bool:
    """Whether the ops take these."""
    rows = x.dim() == 3 and (branch is None or branch.shape == x.shape)
    return rows and all(vector is None or sites.fits(x, vector) for vector in vectors)


def _wide(vector: Tensor) -> Tensor:
    return vector.unsqueeze(1) if vector.dim() == 2 else vector


def _modulated(rows: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    rows = rows if scale is None else rows * (1 + _wide(scale))
    return rows if shift is None else rows + _wide(shift)


# ---- Planning --------------------------------------------------------------------------------------------------------


def is_candidate(module: nn.Module, calls: Calls) -> bool:
    """Whether a module is worth recording: it was called, and holds a norm of its own beside other layers."""
    if module not in calls or isinstance(module, (Fused, nn.ModuleList, nn.Sequential)):
        return False
    children = list(module.children())
    return len(children) > 1 and any("norm" in type(child).__name__.lower() for child in children)


class Recording(NamedTuple):
    """A block of which one call was recorded.

    Attributes:
        graph: of the call.
        found: the sites in it.
        by_dtype: whether the graph holds for the dtypes of that call alone.
        inputs: draws the arguments of a call like it.
        settings: what a fused forward has to know of its arguments.
        stand_ins: of its branches in trials, by the id of these.
    """

    block: Any
    graph: fx.Graph
    found: sites.Sites
    by_dtype: bool
    inputs: proof.Inputs
    settings: dict[str, Any]
    stand_ins: dict[int, nn.Module]


def recording_of(block: Any, calls: Calls) -> Recording:
    """Records the call of ``block`` that is known. Raises Refused where its forward cannot be told from that."""
    refuse_intercepted(block)
    inputs = calls.inputs(block, _unknown, [p.name for p in inspect.signature(block.forward).parameters.values()])
    with proof.isolated(block):
        trial = _as_written(proof.duplicate(block))
        given, fixed = _parted(trial, *inputs(proof.Draw(proof.dtype_of(block), proof.device_of(block))))
        failing = "its forward cannot be told from one call of it"
        graph, by_dtype = attempted(failing, lambda: recorded(trial, given, fixed))
        found = sites.found(graph, trial)
    settings = {
        **parameters_of(block),
        FIXED: fixed,
        RANKS: {name: _rank(value) for name, value in given.items()},
        DTYPES: {name: value.dtype for name, value in given.items() if isinstance(value, Tensor)},
    }
    probes = _probes(graph, block, tuple(found.kinds))
    stand_ins: dict[int, nn.Module] = {id(block.get_submodule(path)): probe for path, probe in probes}
    return Recording(block, graph, found, by_dtype, inputs, settings, stand_ins)


def plan_recorded(block: Any, calls: Calls) -> Planned:
    """The plan of a block of which a call is known."""
    recording = recording_of(block, calls)
    found, norms = recording.found, tuple(recording.found.kinds)
    if not found.residuals and all(norm.scale is None for norm in found.norms):
        raise Refused(WITHOUT_SITES)
    placed = list(_placed(recording.graph, found))
    settings = {
        **recording.settings,
        DTYPES: recording.settings[DTYPES] if recording.by_dtype else {},
        PROGRAM: program_of(recording.graph, placed),
        NORMS: found.kinds,
        READ: norms,
        CALLED: tuple(called_in(block, norms)),
    }
    refuse_hidden(block)
    return _fuses(placed), proven(block, [Swap("", Recorded, settings)], recording.inputs, recording.stand_ins)


def _unknown(draw: proof.Draw) -> tuple[tuple[Any, ...], dict[str, Any]]:
    raise Refused("no call of it is known")


def _as_written(trial: nn.Module) -> nn.Module:
    """The copy, whose forward is run without the compiler that decorates it."""
    kind = type(trial)
    trial.__class__ = type(kind.__name__, (kind,), {"forward": plain_forward(trial), "__module__": kind.__module__})
    return trial


def _parted(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call that are values, and those that are plain, defaults included."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    variable = [p.name for p in bound.signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(bound.arguments[name] for name in variable):
        raise Refused(f"it is given further arguments as {', '.join(variable)}")
    named = {name: value for name, value in bound.arguments.items() if name not in variable}
    fixed = {name: value for name, value in named.items() if is_plain(value)}
    return {name: value for name, value in named.items() if name not in fixed}, fixed


def _placed(graph: fx.Graph, found: sites.Sites) -> Iterator[Site]:
    """The calls of ops: one for a residual and the norm behind it, where the vectors of the norm are there by then."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    closed = set()
    residuals = {residual.out: residual for residual in found.residuals}
    for norm in found.norms:
        residual = residuals.get(norm.x)
        vectors = [order[vector] for vector in (norm.shift, norm.scale) if vector is not None]
        if residual is None or residual.out in closed or any(place > order[residual.out] for place in vectors):
            yield Site("ditkernels_normed", (norm.path, norm.x, norm.shift, norm.scale), (norm.out,), norm.inner)
            continue
        closed.add(residual.out)
        reads = (norm.path, residual.x, residual.branch, residual.gate, norm.shift, norm.scale)
        yield Site("ditkernels_closed_and_normed", reads, (residual.out, norm.out), (*residual.inner, *norm.inner))
    for residual in found.residuals:
        if residual.out not in closed:
            yield Site("ditkernels_closed", (residual.x, residual.branch, residual.gate), (residual.out,), residual.inner)


_OPS = {
    "ditkernels_normed": "modulate_norm",
    "ditkernels_closed": "gated_residual",
    "ditkernels_closed_and_normed": "gated_residual_norm",
}


def _fuses(placed: list[Site]) -> Paths:
    return tuple(dict.fromkeys(_OPS[site.method] for site in placed))


def refuse_hidden(block: nn.Module) -> None:
    """Raises Refused where a name of the fused class would hide one of the block's."""
    ours = {name for base in Recorded.__mro__ if issubclass(base, Fused) for name in vars(base) if not name.startswith("__")}
    theirs = {*block._modules, *block._parameters, *block._buffers, *vars(block), *dir(type(block))} - set(dir(nn.Module))
    if hidden := sorted(ours & (theirs - {"forward"})):
        raise Refused(f"it has {', '.join(hidden)}, which the fused class has too")


def _probes(graph: fx.Graph, block: nn.Module, norms: Paths) -> Iterator[tuple[str, nn.Module]]:
    """Stand-ins for the branches, which are called as they are."""
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        branch = node.op == "call_module" and node.target not in norms and sites.is_rows(first)
        if branch and sites.is_rows(node, first) and any(True for _ in block.get_submodule(node.target).children()):
            yield node.target, Probe(block.get_submodule(node.target), joint=False)
