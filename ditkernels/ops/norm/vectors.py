"""Vectors of a modulation that are not per sample: such a call is made of calls of ops that take them.

    (D,)                 shared by the batch: seen as (B, D). Autograd adds its gradients over the batch.
    (B, S, D)            per segment: each of the S equal segments of a sample's tokens is seen as a sample of its own.
    (B, N, D)            per token: ``by_token.py``. So are segments of several sizes in one call, where one token is the largest
                         that lies in one segment of each.
    (K, D), (B, K, D)    with an index (B, N): ``by_token.py``.

Views cost no pass over the tokens, if the tokens of a sample lie evenly apart and samples follow each other; x and the branch are
copied otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops.choice import OPS, Op
from ditkernels.ops.spec import Declaration, check_tensor
from ditkernels.reference import check_range, same_size

Tensors = Sequence["Tensor | None"]

# ---- Without an index ------------------------------------------------------------------------------------------------


def wider(name: str, by_token: Callable[..., Any] | None = None) -> Callable[[Tensors], Callable[..., Any] | None]:
    """For the op of this name: what makes a call whose vectors are not all (B, D) of calls that are; see ``Declaration.wider``.

    Args:
        by_token: (tensors with vectors (B, N, D), options, asked) -> the outputs; by default ``name``'s op by token makes them.
    """

    def find(tensors: Tensors) -> Callable[..., Any] | None:
        declaration = OPS[name].declaration
        vectors = _vectors(declaration, tensors)
        if all(vector.dim() == 2 for vector in vectors.values()):
            return None
        tokens = _check_tokens(declaration, tensors)
        rows = _common(_rows(which, vector, tokens) for which, vector in vectors.items())
        if rows == tokens.shape[1] != 1:
            make = by_token or functools.partial(_by_token, name)
            return lambda given, options, asked: make(_of_rows(name, given, rows), options, asked)
        return lambda given, options, asked: _by_segment(name, given, options, asked, rows)

    return find


def _vectors(declaration: Declaration, tensors: Tensors) -> dict[str, Tensor]:
    """Those per sample, by name, as far as they are there."""
    pairs = zip(declaration.inputs, tensors)
    return {given.name: tensor for given, tensor in pairs if given.axes == "BD" and tensor is not None}


def _check_tokens(declaration: Declaration, tensors: Tensors) -> Tensor:
    """Checks the tensors of tokens, and returns the first."""
    first = tensors[0]
    assert first is not None
    shape: tuple[int | None, ...] = (None, None, None)
    for given, tensor in zip(declaration.inputs, tensors):
        if given.axes == "BND" and tensor is not None:
            check_tensor(given.name, tensor, shape, first)
            shape = tuple(tensor.shape)
    return first


def _rows(name: str, vector: Tensor, x: Tensor) -> int:
    """How many rows of a vector belong to a sample.

    Raises:
        ValueError: it is no vector of the tokens x.
    """
    batch, length, width = x.shape
    right = vector.dim() in (1, 2, 3) and same_size(vector.shape[-1], width)
    right = right and (vector.dim() == 1 or same_size(vector.shape[0], batch))
    rows = vector.shape[1] if right and vector.dim() == 3 else 1
    if not right or (length % rows if rows else length):
        shapes = f"({width},), ({batch}, {width}) or ({batch}, S, {width}) where S divides {length}"
        raise ValueError(f"{name}: got shape {tuple(vector.shape)}, expected {shapes}")
    return rows


def _common(counts: Iterable[int]) -> int:
    """The least number of rows of which each vector's is a divisor."""
    rows = 1
    for count in counts:
        if rows == 1:
            rows = count
        elif count not in (1, rows):
            rows = math.lcm(rows, count)
    return rows


def _as_samples(vector: Tensor, batch: int, rows: int) -> Tensor:
    """A vector as (B·rows, D). Each view costs the host microseconds, and autograd a node."""
    if vector.dim() == 1:
        return vector.expand(batch * rows, vector.shape[0])
    if vector.dim() == 2 and rows == 1:
        return vector
    return _spread(vector, batch, rows).flatten(0, 1)


def _spread(vector: Tensor, batch: int, rows: int) -> Tensor:
    """A vector as (B, rows, D)."""
    if vector.dim() < 3:
        vector = vector.unsqueeze(-2)
    if vector.dim() == 3 and vector.shape[1] not in (1, rows):
        return vector.repeat_interleave(rows // vector.shape[1], 1)
    return vector.expand(batch, rows, vector.shape[-1])


def _by_segment(name: str, tensors: Tensors, options: tuple[Any, ...], asked: str, rows: int) -> Any:
    """The op, with each segment seen as a sample of its own."""
    x = tensors[0]
    assert x is not None
    batch, length, width = x.shape
    made = list(tensors)
    for at, given in enumerate(OPS[name].declaration.inputs):
        tensor = tensors[at]
        if tensor is not None and given.axes == "BD":
            made[at] = _as_samples(tensor, batch, rows)
        elif tensor is not None and given.axes == "BND" and rows != 1:
            made[at] = tensor.reshape(batch * rows, length // rows, width)
    outputs = OPS[name](tuple(made), options, asked)  # type: ignore[operator]
    if rows == 1:
        return outputs
    return outputs.view(x.shape) if isinstance(outputs, Tensor) else tuple(out.view(x.shape) for out in outputs)


def _by_token(name: str, tensors: Tensors, options: tuple[Any, ...], asked: str) -> Any:
    return OPS[f"{name}_by_token"]((*tensors, None, None, None), options, asked)  # type: ignore[operator]


def _of_rows(name: str, tensors: Tensors, rows: int) -> list[Tensor | None]:
    """The tensors of a call with the vectors as (B, rows, D)."""
    first = tensors[0]
    assert first is not None
    pairs = zip(OPS[name].declaration.inputs, tensors)
    return [_spread(t, first.shape[0], rows) if given.axes == "BD" and t is not None else t for given, t in pairs]


# ---- By index --------------------------------------------------------------------------------------------------------


def by_index(op: Op, tensors: Tensors, options: tuple[Any, ...], index: Tensor) -> Any:
    """The op with vectors of which token n of sample b takes row index[b, n].

    Raises:
        ValueError, TypeError: an index or a vector that does not fit, named; an index out of range.
    """
    vectors = _vectors(op.declaration, tensors)
    tokens = _check_tokens(op.declaration, tensors)
    batch, length, width = tokens.shape
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index: got dtype {index.dtype}, allowed are torch.int64, torch.int32")
    index = index.long().contiguous()
    check_tensor("index", index, (batch, length), tokens, (torch.int64,))
    shapes = {
        name: (width,) if v.dim() == 1 else (None, width) if v.dim() == 2 else (batch, None, width) for name, v in vectors.items()
    }
    for name, vector in vectors.items():
        check_tensor(name, vector, shapes[name], tokens)
    counts = {name: v.shape[-2] for name, v in vectors.items() if v.dim() > 1}
    if not counts:
        raise ValueError(f"index: given without a vector of several rows, (K, {width}) or ({batch}, K, {width})")
    rows = next(iter(counts.values()))
    for name, count in counts.items():
        if not same_size(count, rows):
            raise ValueError(f"{name}: got {count} rows, but an earlier vector has {rows}")
    check_range("index", "row", index, rows)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    groups = grouped(index, rows) if differentiable else (None, None)
    spread = [
        t.expand(batch, rows, width) if given.axes == "BD" and t is not None else t
        for given, t in zip(op.declaration.inputs, tensors)
    ]
    return OPS[f"{op.name}_by_token"]((*spread, index, *groups), options)  # type: ignore[operator]


def grouped(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The tokens of each sample in the order of their rows, (B, N), and where each row's begin, (B, rows + 1) with the end.

    So the gradient of a row is a sum over tokens that follow each other, in the order of the tokens.
    """
    ordered, order = index.sort(dim=1, stable=True)
    first = torch.arange(rows + 1, device=index.device).expand(index.shape[0], rows + 1).contiguous()
    return order, torch.searchsorted(ordered, first)
