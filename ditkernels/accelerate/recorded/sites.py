"""Norms with their modulations and residual sums with their gates, in the graph of a block.

They are told by what is computed: a norm is a module that computes one, a modulation multiplies its rows by 1 + scale and adds a
shift, and a residual sum adds rows of the same shape, one of them multiplied by a gate if there is one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ditkernels.accelerate.parts import Kind, kind_of_norm
from ditkernels.accelerate.recorded.tracing import value_of
from ditkernels.accelerate.refusals import Refused

SUMS = (operator.add, operator.iadd, torch.add, "add")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul")
_FUSED_SUMS = (torch.addcmul, "addcmul")


class Norm(NamedTuple):
    """A norm of rows and its modulation.

    Attributes:
        path: of the module.
        x: the rows.
        out: the modulated rows.
        shift, scale: vectors; None where there is none.
        inner: nodes that nobody else needs.
    """

    path: str
    x: fx.Node
    out: fx.Node
    shift: fx.Node | None
    scale: fx.Node | None
    inner: tuple[fx.Node, ...]


class Residual(NamedTuple):
    """A residual sum: x + gate · branch, or x + branch."""

    x: fx.Node
    branch: fx.Node
    gate: fx.Node | None
    out: fx.Node
    inner: tuple[fx.Node, ...]


class Sites(NamedTuple):
    """All of a block."""

    norms: tuple[Norm, ...]
    residuals: tuple[Residual, ...]
    kinds: dict[str, Kind]


def found(graph: fx.Graph, block: nn.Module) -> Sites:
    """The sites in the graph of a call of ``block``."""
    kinds: dict[str, Kind] = {}
    norms = tuple(_norms(graph, block, kinds))
    modulated = {node for norm in norms for node in (norm.out, *norm.inner)}
    sums = (_residual(node) for node in graph.nodes if node not in modulated)
    return Sites(norms, tuple(residual for residual in sums if residual is not None), kinds)


# ---- Norms -----------------------------------------------------------------------------------------------------------


def _norms(graph: fx.Graph, block: nn.Module, kinds: dict[str, Kind]) -> Iterator[Norm]:
    for node in graph.nodes:
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs and is_rows(node.args[0]):
            kind = kind_at(block, str(node.target), value_of(node.args[0]).shape[-1], kinds)
            if kind is not None and value_of(node).shape == value_of(node.args[0]).shape:
                kinds[str(node.target)] = kind
                yield _with_modulation(node)


def kind_at(block: nn.Module, path: str, width: int, known: Mapping[str, Kind]) -> Kind | None:
    """Which norm the module at ``path`` is, if it is one."""
    module = block.get_submodule(path)
    if path in known or any(module.children()) or isinstance(module, (nn.Linear, nn.Dropout, nn.Identity)):
        return known.get(path)
    try:
        return kind_of_norm(path, module, width)
    except Refused:
        return None


def _with_modulation(norm: fx.Node) -> Norm:
    path, x = str(norm.target), norm.args[0]
    assert isinstance(x, fx.Node)
    plain = Norm(path, x, norm, None, None, ())
    behind = only_user(norm)
    if behind is None:
        return plain
    if behind.target in _FUSED_SUMS and len(behind.args) == 3 and not behind.kwargs:
        shift, *factors = behind.args
        scale = _scale_of(_other(tuple(factors), norm), norm)
        return plain if scale is None or not is_vector(shift, norm) else Norm(path, x, behind, peeled(shift), scale, (norm,))
    scale = _scale_of(_other(behind.args, norm), norm) if is_call(behind, PRODUCTS) else None
    if scale is None:
        return plain
    added = only_user(behind)
    shift = _other(added.args, behind) if added is not None and is_call(added, SUMS) else None
    if added is None or not is_vector(shift, norm):
        return Norm(path, x, behind, None, scale, (norm,))
    return Norm(path, x, added, peeled(shift), scale, (norm, behind))


def _scale_of(factor: Any, rows: fx.Node) -> fx.Node | None:
    """The vector s of a factor 1 + s of rows."""
    if not isinstance(factor, fx.Node) or not is_call(factor, SUMS):
        return None
    scale = next((arg for arg in factor.args if isinstance(arg, fx.Node)), None)
    ones = [arg for arg in factor.args if not isinstance(arg, fx.Node)]
    return peeled(scale) if scale is not None and ones == [1] and is_vector(scale, rows) else None


# ---- Residual sums ---------------------------------------------------------------------------------------------------


def _residual(node: fx.Node) -> Residual | None:
    if not is_rows(node):
        return None
    if node.target in _FUSED_SUMS and len(node.args) == 3 and not node.kwargs:
        x, *factors = node.args
        return _gated(node, x, *_gate_first(tuple(factors), node), ())
    if not is_call(node, SUMS) or not all(is_rows(arg, node) for arg in node.args):
        return None
    first: Any
    second: Any
    first, second = node.args
    for x, branch in ((first, second), (second, first)):
        if is_call(branch, PRODUCTS) and only_user(branch) is node:
            gated = _gated(node, x, *_gate_first(branch.args, node), (branch,))
            if gated is not None:
                return gated
    return Residual(first, second, None, node, ()) if first is not second else None


def _gated(out: fx.Node, x: Any, gate: Any, branch: Any, inner: tuple[fx.Node, ...]) -> Residual | None:
    if not is_rows(x, out) or not is_rows(branch, out) or not is_vector(gate, out):
        return None
    return Residual(x, branch, peeled(gate), out, inner)


def _gate_first(factors: tuple[Any, ...], rows: fx.Node) -> tuple[Any, Any]:
    """Gate and branch. Where every token has a gate of its own it is the one that was cut out of the modulation."""
    first, second = factors
    swapped = is_rows(first, rows) and (not is_rows(second, rows) or _is_cut(second))
    return (second, first) if swapped and not (_is_cut(first) and is_rows(second, rows)) else (first, second)


def _is_cut(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is operator.getitem


# ---- Nodes -----------------------------------------------------------------------------------------------------------


def is_rows(node: Any, like: fx.Node | None = None) -> bool:
    """Whether a node is (B, N, D), of the same sizes as another if that is given."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 3 or not value.is_floating_point():
        return False
    return like is None or value.shape == value_of(like).shape


def is_vector(node: Any, rows: fx.Node) -> bool:
    """Whether a node is (D,), (B, 1, D) or (B, N, D) beside rows (B, N, D)."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() not in (1, 3) or not value.is_floating_point():
        return False
    return fits(value_of(rows), value)


def fits(x: Tensor, vector: Tensor) -> bool:
    """Whether the ops take a vector (D,), (B, D), (B, 1, D) or (B, N, D) beside rows x (B, N, D)."""
    batch, length, width = x.shape
    if vector.dim() == 3 and vector.shape[1] not in (1, length):
        return False
    return vector.shape[-1] == width and (vector.dim() == 1 or vector.shape[0] == batch)


def peeled(node: Any) -> Any:
    """The vector (B, D) of which a node is (B, 1, D), if that is how it was made; else the node."""
    if node is None or value_of(node).dim() != 3:
        return node
    inner = node.args[0] if node.args else None
    alone = node.target == "unsqueeze" and node.args[1:] == (1,)
    alone |= node.target is operator.getitem and node.args[1:] in (((slice(None), None),), ((slice(None), None, slice(None)),))
    return inner if alone and value_of(inner).dim() == 2 else node


def is_call(node: Any, targets: tuple[Any, ...]) -> bool:
    """Whether a node is a call of one of these functions or methods, of two arguments."""
    return isinstance(node, fx.Node) and node.target in targets and len(node.args) == 2 and not node.kwargs


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses another, once, if there is just one."""
    users = list(node.users)
    return users[0] if len(users) == 1 and list(users[0].all_input_nodes).count(node) == 1 else None


def _other(args: tuple[Any, ...], one: fx.Node) -> Any:
    """Of two arguments the one that is not ``one``."""
    rest = [arg for arg in args if arg is not one]
    return rest[0] if len(rest) == 1 else None
