"""The Triton kernel of ``product_sum``. A program owns ``ROWS`` rows of one sample and reads and writes them once."""

from __future__ import annotations

import torch
from torch import Tensor

from ditkernels.ops import _triton
from ditkernels.ops._triton import Tile, ceil_div, jit, tl

reason = _triton.device_reason

_TILE = Tile(4, 4, contracts=False)


@jit
def _rounded(values, like):  # type: ignore[no-untyped-def]
    """fp32 values that the dtype of ``like`` holds, to the nearest, ties to even."""
    if like.dtype.element_ty == tl.bfloat16:
        # Triton's interpreter cuts the lower half off.
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(values != values, values, nearest.to(tl.float32, bitcast=True))
    else:
        return values.to(like.dtype.element_ty).to(tl.float32)


@jit
def _load(tensor, s_b, s_n, s_c, sample, rows, columns, mask):  # type: ignore[no-untyped-def]
    return tl.load(tensor + sample * s_b + rows * s_n + columns * s_c, mask, 0.0).to(tl.float32)


@jit
def sum_rows(  # type: ignore[no-untyped-def]
    value, value_b, value_n, value_c, factor, factor_b, factor_n, factor_c, addend, addend_b, addend_n, addend_c,
    out, product, total, N, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = (N + ROWS - 1) // ROWS
    sample = (program // blocks).to(tl.int64)
    rows = ((program % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, WIDTH).to(tl.int64)[None, :]
    mask = (rows < N) & (columns < D)
    left = _load(value, value_b, value_n, value_c, sample, rows, columns, mask)
    right = _load(factor, factor_b, factor_n, factor_c, sample, rows, columns, mask)
    more = _load(addend, addend_b, addend_n, addend_c, sample, rows, columns, mask)
    made = _rounded(_rounded(left * right, product) + more, total)
    tl.store(out + (sample * N + rows) * D + columns, _rounded(made, out).to(out.dtype.element_ty), mask)


def product_sum(
    value: Tensor, factor: Tensor, addend: Tensor, product: torch.dtype, total: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """As ``ops.product_sum.product_sum``, of tensors of one shape."""
    batch, length, width = value.shape
    out = torch.empty(batch, length, width, dtype=out_dtype, device=value.device)
    given = [part for tensor in (value, factor, addend) for part in (tensor, *tensor.stride())]
    kinds = (torch.empty(0, dtype=dtype, device=value.device) for dtype in (product, total))
    constants = {"D": width, "WIDTH": 1 << (width - 1).bit_length(), "ROWS": _TILE.rows}
    programs = batch * ceil_div(length, _TILE.rows)
    _triton.launch(sum_rows, programs, _TILE, value.device, *given, out, *kinds, length, **constants)
    return out
