"""What the Triton kernels of ``adaln`` and ``final_layer`` share: pieces of rows of (B, N, D) tensors, and sums over tokens.

A kernel takes a tensor together with its strides, as a tuple (``with_strides``), and None for one that is absent; code for absent
arguments is not compiled. A helper is called for what is there only: in Triton 3.6 none can return None.

A piece is a tile of some rows, (ROWS, channels); its ``columns`` are (1, channels), 64-bit, and END is
the channel it ends before: where END <= D nothing sticks out of the row and nothing is masked. Arithmetic is fp32.

The sums P, Q, R, S of adaln.py are added up in two stages, in a fixed order and without atomics. Walking kernels leave the sums of
each chunk of tokens in ``partial`` (B, chunks, sums, D), fp32, and then

    add_chunks     a program owns ``COLUMNS`` channels of one sample: adds the chunks in order, writes dshift, dscale,
                   dgate (B, D), and the sample's terms of dweight, dbias, dbranch_bias (B, terms, D), fp32.

    add_samples    a program owns ``COLUMNS`` channels: adds the samples' terms in order, writes dweight, dbias, dbranch_bias (D,).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ditkernels.ops import _triton
from ditkernels.ops._triton import Tile, ceil_div, jit, per_sample, tl

# ------------------------------------------------------------------------------------------------------------------
# Pieces of rows
# ------------------------------------------------------------------------------------------------------------------


@jit
def rows_of(tensor, sample, rows):  # type: ignore[no-untyped-def]
    """Some rows of a sample of a (B, N, D) tensor: (where they start, stride of the channels)."""
    return tensor[0] + sample * tensor[1] + rows * tensor[2], tensor[3]


@jit
def of_sample(vector, sample):  # type: ignore[no-untyped-def]
    """The vector of a sample of a (B, D) tensor; its channels lie side by side."""
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
def slope_of(scale, weight, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """a = (1 + scale)·weight, (1, piece)."""
    slope = tl.full(columns.shape, 1.0, tl.float32)
    if scale is not None:
        slope += channels_of(scale, columns, END, D)
    if weight is not None:
        slope *= channels_of(weight, columns, END, D)
    return slope


@jit
def through_norm(dnormed, normed, r, along_mean, along_normed):  # type: ignore[no-untyped-def]
    """One piece of rstd·(dx̂ - mean_d(dx̂) - x̂·mean_d(dx̂·x̂)); along_mean is None for rmsnorm."""
    dx = dnormed - normed * along_normed
    if along_mean is not None:
        dx -= along_mean
    return dx * r


@jit
def over_rows(piece):  # type: ignore[no-untyped-def]
    return tl.sum(piece, 0, keep_dims=True)


# ------------------------------------------------------------------------------------------------------------------
# Sums over tokens
# ------------------------------------------------------------------------------------------------------------------


@jit
def add_chunks(  # type: ignore[no-untyped-def]
    partial,
    chunks,
    gate,
    scale,
    branch_bias,
    weight,
    bias,
    dgate,
    dshift,
    dscale,
    terms,
    D: tl.constexpr,
    SUM_P: tl.constexpr,
    SUM_Q: tl.constexpr,
    SUM_R: tl.constexpr,
    SUM_S: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    sample = (program // blocks).to(tl.int64)
    columns = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    sums: tl.constexpr = (SUM_P >= 0) + (SUM_Q >= 0) + (SUM_R >= 0) + (SUM_S >= 0)

    p = tl.zeros([COLUMNS], tl.float32)
    q = tl.zeros([COLUMNS], tl.float32)
    r = tl.zeros([COLUMNS], tl.float32)
    s = tl.zeros([COLUMNS], tl.float32)
    for chunk in range(chunks):
        at = partial + (sample * chunks + chunk) * (sums * D) + columns
        if SUM_P >= 0:
            p += tl.load(at + SUM_P * D, inside, 0.0)
        if SUM_Q >= 0:
            q += tl.load(at + SUM_Q * D, inside, 0.0)
        if SUM_R >= 0:
            r += tl.load(at + SUM_R * D, inside, 0.0)
        if SUM_S >= 0:
            s += tl.load(at + SUM_S * D, inside, 0.0)

    out = sample * D + columns
    if dshift is not None:
        tl.store(dshift + out, p.to(dshift.dtype.element_ty), inside)
    if dscale is not None:
        through_weight = q
        if weight is not None:
            through_weight *= channels_of(weight, columns, D + 1, D)
        if bias is not None:
            through_weight += channels_of(bias, columns, D + 1, D) * p
        tl.store(dscale + out, through_weight.to(dscale.dtype.element_ty), inside)
    if dgate is not None:
        through_gate = r
        if branch_bias is not None:
            through_gate += channels_of(branch_bias, columns, D + 1, D) * s
        tl.store(dgate + out, through_gate.to(dgate.dtype.element_ty), inside)

    if terms is not None:
        kinds: tl.constexpr = (weight is not None) + (bias is not None) + (branch_bias is not None)
        terms += sample * (kinds * D) + columns
        if scale is not None:
            slope = 1.0 + channels_of(of_sample(scale, sample), columns, D + 1, D)
            p *= slope
            q *= slope
        if gate is not None:
            s *= channels_of(of_sample(gate, sample), columns, D + 1, D)
        if weight is not None:
            tl.store(terms, q, inside)
            terms += D
        if bias is not None:
            tl.store(terms, p, inside)
            terms += D
        if branch_bias is not None:
            tl.store(terms, s, inside)


@jit
def add_samples(  # type: ignore[no-untyped-def]
    terms,
    batch,
    out_0,
    out_1,
    out_2,
    D: tl.constexpr,
    KINDS: tl.constexpr,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
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


# ------------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------------

_PROGRAMS = 1024
_SHORTEST_CHUNK = 16
_COLUMNS = 128
_SAMPLES, _SAMPLE_COLUMNS = 32, 32


def chunking(batch: int, length: int, rows: int) -> tuple[int, int]:
    """(chunks of a sample, rows of a chunk) of a backward that walks through tokens, from shapes alone.

    About ``_PROGRAMS`` programs in all, so that a GPU is filled, but no chunk so short that its partial sums would outweigh it.
    """
    wanted = max(1, min(ceil_div(_PROGRAMS, max(batch, 1)), ceil_div(length, _SHORTEST_CHUNK)))
    chunk_rows = ceil_div(max(ceil_div(length, wanted), 1), rows) * rows
    return ceil_div(length, chunk_rows), chunk_rows


class Vectors(NamedTuple):
    """The vectors of a residual and a norm, channels side by side: (B, D) the first three, (D,) the others."""

    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    branch_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def packed(cls, *vectors: Tensor | None) -> Vectors:
        """Of the vectors in this order; one with strided channels is copied."""
        return cls(*map(_triton.packed, vectors))

    def sums(self) -> dict[str, int]:
        """Where each of the sums P, Q, R, S lies among those whose gradients need them; -1: it is not needed."""
        needed = {
            "SUM_P": self.shift is not None or self.bias is not None,
            "SUM_Q": self.scale is not None or self.weight is not None,
            "SUM_R": self.gate is not None,
            "SUM_S": self.branch_bias is not None,
        }
        names = [name for name, need in needed.items() if need]
        return {name: names.index(name) if need else -1 for name, need in needed.items()}

    def partial_sums(self, like: Tensor, chunks: int) -> Tensor | None:
        """The buffer of the sums of each chunk, (B, chunks, sums, D) for a (B, N, D) tensor, or None if none is needed."""
        count = max(self.sums().values()) + 1
        shape = (like.shape[0], chunks, count, like.shape[2])
        return like.new_empty(shape, dtype=torch.float32) if count else None

    def gradients(self, partial: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the vectors, in their order, None for an absent one."""
        if partial is None:
            return (None,) * 6
        batch, chunks, _, width = partial.shape
        dgate, dshift, dscale = (None if v is None else contiguous(v) for v in self[:3])
        summed = [v for v in (self.weight, self.bias, self.branch_bias) if v is not None]
        terms = partial.new_empty((batch, len(summed), width)) if summed else None
        _triton.launch(
            add_chunks,
            batch * ceil_div(width, _COLUMNS),
            Tile(1, 4),
            partial.device,
            *(partial, chunks, per_sample(self.gate), per_sample(self.scale), self.branch_bias),
            *(self.weight, self.bias, dgate, dshift, dscale, terms),
            **self.sums(),
            D=width,
            COLUMNS=_COLUMNS,
        )
        sums = _add_samples(terms, summed)
        dweight, dbias, dbranch_bias = (
            None if v is None else next(sums) for v in (self.weight, self.bias, self.branch_bias)
        )
        return dgate, dshift, dscale, dbranch_bias, dweight, dbias


def _add_samples(terms: Tensor | None, vectors: list[Tensor]) -> Iterator[Tensor]:
    """The gradients of the (D,) vectors, from every sample's terms (B, vectors, D)."""
    if terms is None:
        return iter(())
    batch, kinds, width = terms.shape
    outs = [contiguous(v) for v in vectors]
    _triton.launch(
        add_samples,
        ceil_div(width, _SAMPLE_COLUMNS),
        Tile(1, 4),
        terms.device,
        *(terms, batch, *outs, *[None] * (3 - kinds)),
        D=width,
        KINDS=kinds,
        SAMPLES=_SAMPLES,
        COLUMNS=_SAMPLE_COLUMNS,
    )
    return iter(outs)


def contiguous(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def statistics(x: Tensor, norm: str) -> tuple[Tensor | None, Tensor]:
    """Buffers of the mean (none for rmsnorm) and rstd of each row, fp32."""
    mean = None if norm == "rmsnorm" else x.new_empty(x.shape[:2], dtype=torch.float32)
    return mean, x.new_empty(x.shape[:2], dtype=torch.float32)


def saved_statistics(mean: Tensor, rstd: Tensor, norm: str) -> tuple[Tensor | None, Tensor]:
    return None if norm == "rmsnorm" else mean.contiguous(), rstd.contiguous()


def or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a schema returns for an absent tensor: one of shape (0,)."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor
