"""What the Triton kernels of several families share: pieces of rows of (B, N, D) tensors, and sums over samples.

A launched kernel takes a tensor and its strides as arguments of their own (``_triton.with_strides``), and None for what is absent;
code for absent arguments is not compiled. The helpers take a tensor with its strides as a tuple that the kernel makes. A helper is
called for what is there only: in Triton 3.6 none can return None.

A piece is a tile of some rows, (ROWS, channels); its ``columns`` are (1, channels), 64-bit, and END is
the channel it ends before: where END <= D nothing sticks out of the row and nothing is masked. Arithmetic is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.ops._triton import jit, tl

# ---- Pieces of rows --------------------------------------------------------------------------------------------------


@jit
def rows_of(tensor, sample, rows):  # type: ignore[no-untyped-def]
    """Some rows of a sample of a (B, N, D) tensor, given with its strides: (where they start, stride of the channels)."""
    return tensor[0] + sample * tensor[1] + rows * tensor[2], tensor[3]


@jit
def of_sample(vector, sample):  # type: ignore[no-untyped-def]
    """The vector of a sample of a (B, D) tensor, given with the stride of its samples; its channels lie side by side."""
    return vector[0] + sample * vector[1]


@jit
def mask_of(live, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mask of a piece; its columns are tested only where it sticks out of the row."""
    mask = live
    if END > D:
        mask = live & (columns < D)
    return mask


@jit
def channels_of(vector, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector's channels in fp32, (1, piece)."""
    if END > D:
        return tl.load(vector + columns, columns < D, 0.0).to(tl.float32)
    else:
        return tl.load(vector + columns).to(tl.float32)


@jit
def load_piece(lines, columns, mask):  # type: ignore[no-untyped-def]
    """One piece of ``rows_of`` a tensor in the tensor's dtype, zero outside."""
    return tl.load(lines[0] + columns * lines[1], mask, 0.0)


@jit
def stream_piece(  # type: ignore[no-untyped-def]
    x, u, gate, branch_bias, columns, mask, END: tl.constexpr, D: tl.constexpr
):
    """One piece of x1 = x + gate·(branch + branch_bias) in fp32, rounded to x's dtype as the stored stream is; u: the branch."""
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
    """value - mean, zero outside the row so that squares can be summed."""
    result = value - mean
    if END > D:
        result = tl.where(columns < D, result, 0.0)
    return result


@jit
def modulated(normed, shift, scale, weight, bias, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of h = (x̂·weight + bias)·(1 + scale) + shift."""
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
    """The sum of a piece's rows, (1, channels)."""
    return tl.sum(piece, 0, keep_dims=True)


# ---- Sums over samples -----------------------------------------------------------------------------------------------


@jit
def add_samples(  # type: ignore[no-untyped-def]
    terms, batch, out_0, out_1, out_2, D: tl.constexpr, KINDS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program owns ``COLUMNS`` channels: adds the terms (batch, KINDS, D) of all samples in order, writes each kind's sum (D,).

    The stages before this one leave their sums in fp32. Nothing is added atomically.
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
    """An output of the shape of ``like``, whatever the strides of that are; ``empty_like`` is the cheapest way to one."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
