"""The Triton kernels of ``patch_embed``. Names and formulas are those at the top of patch_embed.py.

An absent argument (bias, positions) is None and its code is not compiled. K = C·p·p, the values of a patch; a line is one
token of one sample, B·N in all.

    embed            a program owns ``ROWS`` lines and ``COLUMNS`` channels. Gathers the patches of its lines, writes y: 1 pass.

    weight_products  a program owns ``COLUMNS`` channels and one group of consecutive lines. Reads dy once, 1 pass, or once
                     for every 256 of K (128 in fp32 products), and gathers the patches; writes partial sums of dW
                     (groups, D, K) and of dbias (groups, D), fp32. Runs if either is asked for.

    add_groups       a program owns some elements of dW or dbias: adds the groups in a fixed order, writes the gradient.

    image_gradients  a program owns ``ROWS`` lines. Reads dy, writes dx; runs only if dx is asked for.

    add_positions    a program owns ``ROWS`` tokens and ``COLUMNS`` channels. Reads dy, adding the samples in order, writes
                     dpos; runs only if dpos is asked for.

The patches are rounded to the weight's dtype. Products take operands in the weight's dtype where all have it and accumulate in
fp32; otherwise they are fp32 products, never TF32; all else is fp32. Nothing is added atomically, no two programs write one
element, and the number of groups depends on shapes alone: same inputs, same bits.

``COLUMNS`` divides every width of the paper; other widths mask the last tile. x, dy and the positions are read in place at any
strides; a weight that is not contiguous is copied. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _registry as registry
from ditkernels.ops import _triton
from ditkernels.ops._rows_triton import load_piece, mask_of, rows_of
from ditkernels.ops._triton import Tile, ceil_div, jit, packed, tl, with_strides
from ditkernels.ops.patch_embed import PATCH_EMBED, PATCH_EMBED_BACKWARD

# ------------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------------


@jit
def _lines(first, N, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sample (64-bit) and token (32-bit) of the lines first, first + 1, ..., each (ROWS, 1)."""
    sample = first // N
    token = (first - sample * N).to(tl.int32) + tl.arange(0, ROWS)[:, None]
    return sample + token // N, token % N


@jit
def _places(image, sample, token, values, grid_w, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where values (1, ..) of the patches of tokens (.., 1) lie in the images."""
    y = (token // grid_w * P).to(tl.int64)
    x = (token % grid_w * P).to(tl.int64)
    channel = (values // (P * P)).to(tl.int64)
    row = (values // P % P).to(tl.int64)
    column = (values % P).to(tl.int64)
    of_token = sample * image[1] + y * image[3] + x * image[4]
    return image[0] + of_token + (channel * image[2] + row * image[3] + column * image[4])


@jit
def embed(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    pos,
    y,
    lines,
    N,
    grid_w,
    D: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PRODUCT: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    ROUND: tl.constexpr = tiles * COLUMNS
    channels = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    columns = channels.to(tl.int64)[None, :]
    first = (program // tiles).to(tl.int64) * ROWS
    line = first + tl.arange(0, ROWS)[:, None]
    live = line < lines
    sample, token = _lines(first, N, ROWS)

    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, VALUES):
        places = start + tl.arange(0, VALUES)
        at = _places(x, sample, token, places[None, :], grid_w, P)
        u = tl.load(at, live & (places[None, :] < K), 0.0)
        w_at = weight + channels.to(tl.int64)[:, None] * K + places[None, :]
        w = tl.load(w_at, mask_of(places[None, :] < K, channels[:, None], ROUND, D), 0.0)
        u = u.to(tl.float32).to(weight.dtype.element_ty).to(PRODUCT)
        product = tl.dot(u, tl.trans(w).to(PRODUCT), product, input_precision="ieee")
    if bias is not None:
        product += tl.load(bias + columns, columns < D, 0.0).to(tl.float32)
    mask = mask_of(live, columns, ROUND, D)
    if pos is not None:
        product += load_piece(rows_of(pos, 0, token.to(tl.int64)), columns, mask).to(tl.float32)
    tl.store(y + line * D + columns, product.to(y.dtype.element_ty), mask)


@jit
def weight_products(  # type: ignore[no-untyped-def]
    dy,
    x,
    weight,
    partial,
    bias_partial,
    lines,
    N,
    group_lines,
    grid_w,
    D: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PRODUCT: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    value_tiles: tl.constexpr = (K + VALUES - 1) // VALUES
    ROUND: tl.constexpr = tiles * COLUMNS
    channels = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    columns = channels.to(tl.int64)[None, :]
    value_tile = program // tiles % value_tiles
    values = (value_tile * VALUES + tl.arange(0, VALUES))[None, :]
    group = (program // (tiles * value_tiles)).to(tl.int64)

    dw = tl.zeros([COLUMNS, VALUES], tl.float32)
    db = tl.zeros([COLUMNS], tl.float32)
    last = tl.minimum((group + 1) * group_lines, lines)
    for first in range(group * group_lines, last, ROWS):
        live = first + tl.arange(0, ROWS)[:, None] < last
        sample, token = _lines(first, N, ROWS)
        d = load_piece(rows_of(dy, sample, token.to(tl.int64)), columns, mask_of(live, columns, ROUND, D))
        if bias_partial is not None:
            db += tl.sum(d.to(tl.float32), 0)
        if partial is not None:
            at = _places(x, sample, token, values, grid_w, P)
            u = tl.load(at, live & (values < K), 0.0)
            u = u.to(tl.float32).to(weight.dtype.element_ty).to(PRODUCT)
            dw = tl.dot(tl.trans(d).to(PRODUCT), u, dw, input_precision="ieee")

    if partial is not None:
        at = partial + (group * D + channels.to(tl.int64)[:, None]) * K + values
        tl.store(at, dw, mask_of(values < K, channels[:, None], ROUND, D))
    if bias_partial is not None:  # noqa: SIM102 (the first is decided by the compiler)
        if value_tile == 0:
            tl.store(bias_partial + group * D + channels, db, channels < D)


@jit
def add_groups(  # type: ignore[no-untyped-def]
    partial, out, groups, size, GROUPS: tl.constexpr, ELEMENTS: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    inside = element < size
    values = tl.load(partial + group * size + element, (group < groups) & inside, 0.0)
    tl.store(out + element, tl.sum(values, 0, keep_dims=True).to(out.dtype.element_ty), inside)


@jit
def image_gradients(  # type: ignore[no-untyped-def]
    dy,
    weight,
    dx,
    lines,
    N,
    grid_w,
    D: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PRODUCT: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    value_tiles: tl.constexpr = (K + VALUES - 1) // VALUES
    ROUND: tl.constexpr = (D + COLUMNS - 1) // COLUMNS * COLUMNS
    values = (program % value_tiles * VALUES + tl.arange(0, VALUES))[None, :]
    first = (program // value_tiles).to(tl.int64) * ROWS
    live = first + tl.arange(0, ROWS)[:, None] < lines
    sample, token = _lines(first, N, ROWS)

    du = tl.zeros([ROWS, VALUES], tl.float32)
    for start in range(0, D, COLUMNS):
        channels = start + tl.arange(0, COLUMNS)
        columns = channels.to(tl.int64)[None, :]
        d = load_piece(rows_of(dy, sample, token.to(tl.int64)), columns, mask_of(live, columns, ROUND, D))
        w_at = weight + channels.to(tl.int64)[:, None] * K + values
        w = tl.load(w_at, mask_of(values < K, channels[:, None], ROUND, D), 0.0)
        du = tl.dot(d.to(PRODUCT), w.to(PRODUCT), du, input_precision="ieee")
    at = _places(dx, sample, token, values, grid_w, P)
    tl.store(at, du.to(dx[0].dtype.element_ty), live & (values < K))


@jit
def add_positions(  # type: ignore[no-untyped-def]
    dy,
    dpos,
    batch,
    N,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    columns = (program % tiles * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    token = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = mask_of(token < N, columns, tiles * COLUMNS, D)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for sample in range(batch):
        total += load_piece(rows_of(dy, tl.cast(sample, tl.int64), token), columns, mask).to(tl.float32)
    tl.store(dpos + token * D + columns, total.to(dpos.dtype.element_ty), mask)


# ------------------------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------------------------

_COLUMNS = 128
_EMBED = Tile(64, 4)
_EMBED_VALUES = 64

_PRODUCT_ROWS = 64
_PRODUCT_VALUES = 256
_GROUPS = 32
_LINES_PER_VALUE = 8  # so that the partial sums of dW stay below 1/8 of the elements of dy
_ACCUMULATORS = 8192

_SUMMED = 4096

_IMAGE = Tile(64, 4)
_IMAGE_VALUES = 64

_POSITIONS = Tile(16, 4)


def value_tile(values: int, most: int) -> int:
    """Values of a patch held at a time: a power of two, at least the 16 a product takes."""
    return min(most, max(16, 1 << (values - 1).bit_length()))


def product_tile(values: int, product: Any) -> tuple[int, int, Tile]:
    """(values, columns, tile) of ``weight_products``. Operands of fp32 products lie in registers, which leaves less for dW."""
    if product == tl.float32:
        held = value_tile(values, _PRODUCT_VALUES // 2)
        return held, min(_COLUMNS, _ACCUMULATORS // held), Tile(16, 8)
    held = value_tile(values, _PRODUCT_VALUES)
    return held, max(64, min(_COLUMNS, _ACCUMULATORS // held)), Tile(_PRODUCT_ROWS, 8 if held > 64 else 4)


def grouping(lines: int, values: int) -> tuple[int, int]:
    """(groups, lines of a group) of ``weight_products``, from shapes alone."""
    group_lines = max(ceil_div(lines, _GROUPS), _LINES_PER_VALUE * values)
    group_lines = ceil_div(group_lines, _PRODUCT_ROWS) * _PRODUCT_ROWS
    return ceil_div(lines, group_lines), group_lines


def product_dtype(*operands: Tensor) -> Any:
    """The dtype of a product's operands: theirs, if it is one they share, else fp32. The interpreter knows only fp32."""
    dtypes = {t.dtype for t in operands}
    if _triton.INTERPRETED or len(dtypes) > 1:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtypes.pop()]


# ------------------------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------------------------


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int, int, int]:
    """N, columns of the grid, D, K, p."""
    width, channels, p, _ = weight.shape
    grid_h, grid_w = x.shape[2] // p, x.shape[3] // p
    return grid_h * grid_w, grid_w, width, channels * p * p, p


def _patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    length, grid_w, width, values, p = _sizes(x, weight)
    lines = x.shape[0] * length
    product = product_dtype(weight)
    y = x.new_empty((x.shape[0], length, width), dtype=out_dtype)
    positions = None if pos_embed is None else with_strides(pos_embed.expand(1, length, width))
    _triton.launch(
        embed,
        ceil_div(lines, _EMBED.rows) * ceil_div(width, _COLUMNS),
        _EMBED,
        x.device,
        *(with_strides(x), weight.contiguous(), packed(bias), positions, y, lines, length, grid_w),
        D=width,
        K=values,
        P=p,
        PRODUCT=product,
        VALUES=value_tile(values, 16 if product == tl.float32 else _EMBED_VALUES),
        COLUMNS=_COLUMNS,
        ROWS=_EMBED.rows,
    )
    return y


def _patch_embed_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    dx, dpos = x.new_empty(0), x.new_empty(0)
    if needs[0]:
        dx = _image_gradient(dy, x, weight)
    dweight, dbias = _weight_gradients(dy, x, weight, bias if needs[2] else None, needs[1])
    if needs[3] and pos_embed is not None:
        dpos = _position_gradient(dy, pos_embed)
    return dx, dweight, dbias, dpos


def _weight_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, weight_needed: bool
) -> tuple[Tensor, Tensor]:
    """dweight and dbias, (0,) for the one that is not asked for."""
    length, grid_w, width, values, p = _sizes(x, weight)
    lines = x.shape[0] * length
    product = product_dtype(dy, weight)
    held, columns, tile = product_tile(values, product)
    groups, group_lines = grouping(lines, values)
    partial = x.new_empty((groups, width * values), dtype=torch.float32) if weight_needed else None
    bias_partial = x.new_empty((groups, width), dtype=torch.float32) if bias is not None else None
    if weight_needed or bias is not None:
        _triton.launch(
            weight_products,
            groups * ceil_div(values, held) * ceil_div(width, columns),
            tile,
            x.device,
            *(with_strides(dy), with_strides(x), weight, partial, bias_partial),
            *(lines, length, group_lines, grid_w),
            D=width,
            K=values,
            P=p,
            PRODUCT=product,
            VALUES=held,
            COLUMNS=columns,
            ROWS=tile.rows,
        )
    dweight = sum_groups(partial, weight) if partial is not None else x.new_empty(0)
    dbias = (
        sum_groups(bias_partial, bias) if bias is not None and bias_partial is not None else x.new_empty(0)
    )
    return dweight, dbias


def sum_groups(partial: Tensor, like: Tensor) -> Tensor:
    """The sum of partial sums, (groups, elements) with a handful of groups, in the shape and dtype of ``like``."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    groups = partial.shape[0]
    held = 1 << (max(groups, 1) - 1).bit_length()
    _triton.launch(
        add_groups,
        ceil_div(out.numel(), _SUMMED // held),
        Tile(1, 4),
        partial.device,
        *(partial, out, groups, out.numel()),
        GROUPS=held,
        ELEMENTS=_SUMMED // held,
    )
    return out


def _image_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    length, grid_w, width, values, p = _sizes(x, weight)
    lines = x.shape[0] * length
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    held = value_tile(values, _IMAGE_VALUES)
    _triton.launch(
        image_gradients,
        ceil_div(lines, _IMAGE.rows) * ceil_div(values, held),
        _IMAGE,
        x.device,
        *(with_strides(dy), weight.contiguous(), with_strides(dx), lines, length, grid_w),
        D=width,
        K=values,
        P=p,
        PRODUCT=product_dtype(dy, weight),
        VALUES=held,
        COLUMNS=_COLUMNS,
        ROWS=_IMAGE.rows,
    )
    return dx


def _position_gradient(dy: Tensor, pos_embed: Tensor) -> Tensor:
    batch, length, width = dy.shape
    dpos = torch.empty(pos_embed.shape, dtype=pos_embed.dtype, device=pos_embed.device)
    _triton.launch(
        add_positions,
        ceil_div(length, _POSITIONS.rows) * ceil_div(width, _COLUMNS),
        _POSITIONS,
        dy.device,
        *(with_strides(dy), dpos, batch, length),
        D=width,
        COLUMNS=_COLUMNS,
        ROWS=_POSITIONS.rows,
    )
    return dpos


# ------------------------------------------------------------------------------------------------------------------
# Registration
# ------------------------------------------------------------------------------------------------------------------


def _refuse_row(weight: Tensor, *args: Any) -> str | None:
    given = [a for a in args if isinstance(a, (Tensor, torch.dtype))]
    if weight.numel() == 0:
        return "the weight is empty"
    return _triton.refuse(1, weight, *given)


def _refuse_patch_embed(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _refuse_row(weight, x, *args)


def _refuse_patch_embed_backward(dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return _refuse_row(weight, dy, x, *args)


registry.implement(PATCH_EMBED, "triton", _patch_embed, refuse=_refuse_patch_embed)
registry.implement(PATCH_EMBED_BACKWARD, "triton", _patch_embed_backward, refuse=_refuse_patch_embed_backward)
