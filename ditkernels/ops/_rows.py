"""Helpers that the Triton kernels of several families share: pieces of rows of (B, N, D) tensors, and sums over samples.

A kernel takes a tensor and its strides as separate arguments (``_triton.with_strides``). An absent tensor is None, and Triton does
not compile the code that uses it. A helper takes the tensor and its strides as one tuple, which the kernel builds. Kernels call a
helper only for a tensor that is present, because a helper cannot return None in Triton 3.6.

A piece is a (ROWS, channels) tile. Its ``columns``, (1, channels), are 64-bit channel indices below END. Where END <= D, all of the
piece lies in the row, and its columns need no mask. Arithmetic is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.ops._triton import jit, tl

# ---- Pieces of rows --------------------------------------------------------------------------------------------------


@jit
def rows_of(tensor, sample, rows):  # type: ignore[no-untyped-def]
    """Rows of one sample of a (B, N, D) tensor, given with its strides: (pointers to their first channels, stride of channels)."""
    return tensor[0] + sample * tensor[1] + rows * tensor[2], tensor[3]


@jit
def of_sample(vector, sample):  # type: ignore[no-untyped-def]
    """A pointer to one sample's vector in a (B, D) tensor, given with its batch stride; the channels are contiguous."""
    return vector[0] + sample * vector[1]


@jit
def mask_of(live, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mask of a piece. Its columns are compared with D only where the piece reaches beyond the row."""
    mask = live
    if END > D:
        mask = live & (columns < D)
    return mask


@jit
def channels_of(vector, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector's channels in fp32, in the shape of ``columns``; zero beyond D."""
    if END > D:
        return tl.load(vector + columns, columns < D, 0.0).to(tl.float32)
    else:
        return tl.load(vector + columns).to(tl.float32)


@jit
def load_piece(lines, columns, mask):  # type: ignore[no-untyped-def]
    """One piece of the rows that ``rows_of`` returned, in the tensor's dtype; zero where masked."""
    return tl.load(lines[0] + columns * lines[1], mask, 0.0)


@jit
def stream_piece(  # type: ignore[no-untyped-def]
    x, u, gate, branch_bias, columns, mask, END: tl.constexpr, D: tl.constexpr
):
    """One piece of x1 = x + gate·(u + branch_bias) in fp32, rounded to x's dtype as when it is stored. u: the branch's piece."""
    value = load_piece(x, columns, mask).to(tl.float32)
    if u is not None:
        through = u.to(tl.float32)
        if branch_bias is not None:
            through += channels_of(branch_bias, columns, END, D)
        if gate is not None:
            through *= channels_of(gate, columns, END, D)
        value = (value + through).to(x[0].dtype.element_ty).to(tl.float32)
    return value


@jit
def centred(value, mean, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """value - mean; zero beyond D, so that the squares can be summed."""
    result = value - mean
    if END > D:
        result = tl.where(columns < D, result, 0.0)
    return result


@jit
def modulated(normed, shift, scale, weight, bias, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of h = (x̂·weight + bias)·(1 + scale) + shift; ``normed`` is x̂."""
    if weight is not None:
        normed *= channels_of(weight, columns, END, D)
    if bias is not None:
        normed += channels_of(bias, columns, END, D)
    if scale is not None:
        normed *= 1.0 + channels_of(scale, columns, END, D)
    if shift is not None:
        normed += channels_of(shift, columns, END, D)
    return normed


@jit
def over_rows(piece):  # type: ignore[no-untyped-def]
    """The sum over the rows of a piece, (1, channels)."""
    return tl.sum(piece, 0, keep_dims=True)


# ---- Sums over samples -----------------------------------------------------------------------------------------------


@jit
def add_samples(  # type: ignore[no-untyped-def]
    terms, batch, out_0, out_1, out_2, D: tl.constexpr, KINDS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Adds fp32 terms (batch, KINDS, D) over the batch. out_0, out_1 and out_2, (D,), take the sum of one kind each.

    A program owns ``COLUMNS`` channels and adds their terms in a fixed order. Nothing is added atomically.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < D
    for kind in tl.static_range(KINDS):
        total = tl.zeros([SAMPLES, COLUMNS], tl.float32)
        for start in range(0, batch, SAMPLES):
            samples = (start + tl.arange(0, SAMPLES)).to(tl.int64)[:, None]
            at = terms + (samples * KINDS + kind) * D + columns
            total += tl.load(at, (samples < batch) & inside, 0.0)
        out = out_0
        if kind == 1:
            out = out_1
        if kind == 2:
            out = out_2
        tl.store(out + columns, tl.sum(total, 0, keep_dims=True).to(out.dtype.element_ty), inside)


# ---- Outputs ---------------------------------------------------------------------------------------------------------


def contiguous(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of ``like``'s shape. ``empty_like`` is torch's fastest way to make one."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
