"""The Triton kernels of ``patch_embed``, ``final_layer``, ``unpatchify`` and ``patchify``, by the formulas of __init__.py.

An absent argument (branch, gate, scale ...) is None, and Triton does not compile the code that uses it. V is the number of values
of a patch. A line is one token of one sample; there are B·N lines. A pass is one read or one write of a (B, N, D) tensor.

    embed            A program owns ``ROWS`` lines and ``COLUMNS`` channels. It gathers the lines' patches and writes y: 1 pass.

    final_rows       A program owns ``ROWS`` tokens of one sample. It reads x (and the branch) and writes the image: 1 pass (2 with
                     a branch). Rows of up to 4096 channels are ``HELD`` in registers. Wider rows are read once for the mean, once
                     for the variance, and once for every 64 values (32 in fp32 products).

    place_values     ``unpatchify``. A program owns part of one row of patches of one sample, in the order of the image.
    gather_values    ``patchify``. A program owns part of one row of patches of one sample, in the order of the tokens.

Arithmetic is fp32 on values that are widened after the load; patches, x1 and h are rounded as the formulas say. Products take
operands in the weight's dtype and accumulate in fp32, never in TF32. The same inputs give the same bits: sums have a fixed order,
and no two programs write one element.

``PIECES`` pieces of ``PIECE`` channels hold a row. 128 channels (64 in fp32 products) divide the paper's widths; other widths mask
the last piece. The kernels read tensors in place at any strides; a strided weight of ``patch_embed`` and a vector with strided
channels are copied first. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditkernels.ops import _triton
from ditkernels.ops._rows import centred, load_piece, mask_of, modulated, of_sample, rows_of, stream_piece
from ditkernels.ops._triton import Tile, ceil_div, jit, packed, per_sample, tl, with_strides
from ditkernels.ops.image import FINAL_LAYER, PATCH_EMBED, PATCHIFY, UNPATCHIFY, refusing_empty_weights

# ---- Where the values of a patch lie in an image ---------------------------------------------------------------------


@jit
def places_of(  # type: ignore[no-untyped-def]
    image, sample, tokens, values, grid_w, V: tl.constexpr, P: tl.constexpr, CHANNELS_FIRST: tl.constexpr
):
    """Pointers to ``values`` (1, ...) of ``tokens`` (..., 1) in an image that is given with its strides."""
    if CHANNELS_FIRST:
        channel, row, column = values // (P * P), values // P % P, values % P
    else:
        O: tl.constexpr = V // (P * P)  # noqa: E741
        row, column, channel = values // (P * O), values // O % P, values % O
    of_tokens = (tokens // grid_w * P).to(tl.int64) * image[3] + (tokens % grid_w * P).to(tl.int64) * image[4]
    of_values = channel.to(tl.int64) * image[2] + row.to(tl.int64) * image[3] + column.to(tl.int64) * image[4]
    return image[0] + sample * image[1] + (of_tokens + of_values)


@jit
def place_values(  # type: ignore[no-untyped-def]
    tokens, tokens_b, tokens_n, tokens_v, image, grid_h, grid_w, parts,
    V: tl.constexpr, P: tl.constexpr, CHANNELS_FIRST: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    band = program // parts
    sample = (band // grid_h).to(tl.int64)
    patch_row = band % grid_h
    O: tl.constexpr = V // (P * P)  # noqa: E741
    width = grid_w * P
    # Ordered like the image, so that stores are contiguous: channel, row in the patch, column of the image.
    element = (program % parts) * ELEMENTS + tl.arange(0, ELEMENTS)
    live = element < width * (P * O)
    line, column = element // width, element % width
    channel, row = line // P, line % P
    token = patch_row.to(tl.int64) * grid_w + column // P
    value = line * P + column % P if CHANNELS_FIRST else (row * P + column % P) * O + channel
    at = tokens + sample * tokens_b + token * tokens_n + value.to(tl.int64) * tokens_v
    image_line = (sample * O + channel) * grid_h * P + patch_row * P + row
    tl.store(image + image_line * width + column, tl.load(at, live, 0.0), live)


@jit
def gather_values(  # type: ignore[no-untyped-def]
    image, image_b, image_c, image_h, image_w, tokens, grid_h, grid_w, parts,
    V: tl.constexpr, P: tl.constexpr, CHANNELS_FIRST: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    band = program // parts
    sample = (band // grid_h).to(tl.int64)
    # Ordered like the tokens, so that stores are contiguous: token of the row of patches, value.
    element = (program % parts) * ELEMENTS + tl.arange(0, ELEMENTS)
    live = element < grid_w * V
    token = (band % grid_h) * grid_w + element // V
    image = (image, image_b, image_c, image_h, image_w)
    at = places_of(image, sample, token, element % V, grid_w, V, P, CHANNELS_FIRST)
    value = tl.load(at, live, 0.0).to(tokens.dtype.element_ty)
    tl.store(tokens + band.to(tl.int64) * grid_w * V + element, value, live)


# ---- patch_embed -----------------------------------------------------------------------------------------------------


@jit
def embed(  # type: ignore[no-untyped-def]
    x, x_b, x_c, x_h, x_w, weight, bias, pos, pos_n, pos_d, y, lines, N, grid_w,
    D: tl.constexpr, V: tl.constexpr, P: tl.constexpr, PRODUCT: tl.constexpr, VALUES: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    ROUND: tl.constexpr = tiles * COLUMNS
    channels = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    columns = channels.to(tl.int64)[None, :]
    first = (program // tiles).to(tl.int64) * ROWS
    line = first + tl.arange(0, ROWS)[:, None]
    live = line < lines
    # Only the first line's sample takes a 64-bit division; the other lines' samples and tokens take 32-bit ones.
    sample = first // N
    token = (first - sample * N).to(tl.int32) + tl.arange(0, ROWS)[:, None]
    sample, token = sample + token // N, token % N

    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, V, VALUES):
        places = start + tl.arange(0, VALUES)
        at = places_of((x, x_b, x_c, x_h, x_w), sample, token, places[None, :], grid_w, V, P, True)
        u = tl.load(at, live & (places[None, :] < V), 0.0)
        w_at = weight + channels.to(tl.int64)[:, None] * V + places[None, :]
        w = tl.load(w_at, mask_of(places[None, :] < V, channels[:, None], ROUND, D), 0.0)
        u = u.to(tl.float32).to(weight.dtype.element_ty).to(PRODUCT)
        product = tl.dot(u, tl.trans(w).to(PRODUCT), product, input_precision="ieee")
    if bias is not None:
        product += tl.load(bias + columns, columns < D, 0.0).to(tl.float32)
    mask = mask_of(live, columns, ROUND, D)
    if pos is not None:
        product += load_piece((pos + token.to(tl.int64) * pos_n, pos_d), columns, mask).to(tl.float32)
    tl.store(y + line * D + columns, product.to(y.dtype.element_ty), mask)


# ---- final_layer -----------------------------------------------------------------------------------------------------


@jit
def _columns(piece, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 64-bit channel indices of a piece, (1, PIECE)."""
    return (piece * PIECE + tl.arange(0, PIECE)).to(tl.int64)[None, :]


@jit
def _x1(x, branch, gate, branch_bias, live, columns, END: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of x1 in fp32."""
    mask = mask_of(live, columns, END, D)
    u = load_piece(branch, columns, mask) if branch is not None else None
    return stream_piece(x, u, gate, branch_bias, columns, mask, END, D)


@jit
def _add_product(  # type: ignore[no-untyped-def]
    z, h, weight, places, columns, V: tl.constexpr, END: tl.constexpr, D: tl.constexpr, PRODUCT: tl.constexpr
):
    """z plus the product of one piece of h, rounded to the weight's dtype, with the weight."""
    at = weight[0] + places[:, None].to(tl.int64) * weight[1] + columns * weight[2]
    w = tl.load(at, mask_of(places[:, None] < V, columns, END, D), 0.0)
    h = h.to(weight[0].dtype.element_ty).to(PRODUCT)
    return tl.dot(h, tl.trans(w).to(PRODUCT), z, input_precision="ieee")


@jit
def final_rows(  # type: ignore[no-untyped-def]
    x, x_b, x_n, x_d, branch, branch_b, branch_n, branch_d, gate, gate_b, branch_bias, shift, shift_b,
    scale, scale_b, norm_weight, norm_bias, weight, weight_v, weight_d, bias, out, out_b, out_c, out_h,
    out_w, N, blocks, grid_w, eps,
    D: tl.constexpr, V: tl.constexpr, P: tl.constexpr, CENTRED: tl.constexpr, HELD: tl.constexpr,
    PRODUCT: tl.constexpr, PIECE: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    PIECES: tl.constexpr = (D + PIECE - 1) // PIECE
    ROUND: tl.constexpr = PIECES * PIECE
    sample = (program // blocks).to(tl.int64)
    tokens = (program % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    live = tokens < N
    x = rows_of((x, x_b, x_n, x_d), sample, tokens.to(tl.int64))
    branch = rows_of((branch, branch_b, branch_n, branch_d), sample, tokens.to(tl.int64)) if branch is not None else None
    gate = of_sample((gate, gate_b), sample) if gate is not None else None
    shift = of_sample((shift, shift_b), sample) if shift is not None else None
    scale = of_sample((scale, scale_b), sample) if scale is not None else None
    weight = (weight, weight_v, weight_d)

    # A row that is held is centred twice: the second turn takes what rounding kept from the mean in the first. The mean of a wider
    # one is about + apart: its first channel, and the mean of the differences from that. A constant row is exactly zero either way.
    about = tl.zeros([ROWS, 1], tl.float32)
    apart = tl.zeros([ROWS, 1], tl.float32)
    if CENTRED and not HELD:
        about = _x1(x, branch, gate, branch_bias, live, _columns(0, 1), 1, D)
    # A row's sums stay separate for each column of a piece until the end: one reduction across warps, not one for each piece.
    sums = tl.zeros([ROWS, PIECE], tl.float32)
    stream = ()
    if HELD:
        for i in tl.static_range(PIECES):
            piece = _x1(x, branch, gate, branch_bias, live, _columns(i, PIECE), (i + 1) * PIECE, D)
            stream = stream + (piece,)  # type: ignore[assignment]  # noqa: RUF005
        if CENTRED:
            for _ in tl.static_range(2):
                sums = tl.zeros([ROWS, PIECE], tl.float32)
                for i in tl.static_range(PIECES):
                    sums += stream[i]
                apart = tl.div_rn(tl.sum(sums, 1, keep_dims=True), D * 1.0)
                left = ()
                for i in tl.static_range(PIECES):
                    piece = centred(stream[i], apart, _columns(i, PIECE), (i + 1) * PIECE, D)
                    left = left + (piece,)  # type: ignore[assignment]  # noqa: RUF005
                stream = left
    elif CENTRED:
        for i in range(PIECES):
            piece = _x1(x, branch, gate, branch_bias, live, _columns(i, PIECE), ROUND, D)
            sums += centred(piece, about, _columns(i, PIECE), ROUND, D)
        apart = tl.div_rn(tl.sum(sums, 1, keep_dims=True), D * 1.0)

    squares = tl.zeros([ROWS, PIECE], tl.float32)
    if HELD:
        for i in tl.static_range(PIECES):
            squares += stream[i] * stream[i]
    else:
        for i in range(PIECES):
            piece = _x1(x, branch, gate, branch_bias, live, _columns(i, PIECE), ROUND, D)
            difference = centred(piece - about, apart, _columns(i, PIECE), ROUND, D)
            squares += difference * difference
    square = tl.sum(squares, 1, keep_dims=True)
    scaling = tl.rsqrt(tl.div_rn(square, D * 1.0) + eps)
    if CENTRED:
        # Zero times a sum that has overflowed is NaN: such a row is lost, and not a row of zeros.
        scaling += 0.0 * square

    hidden = ()
    if HELD:
        for i in tl.static_range(PIECES):
            h = modulated(stream[i] * scaling, shift, scale, norm_weight, norm_bias, _columns(i, PIECE), (i + 1) * PIECE, D)
            hidden = hidden + (h.to(weight[0].dtype.element_ty).to(PRODUCT),)  # type: ignore[assignment]  # noqa: RUF005

    for first in range(0, V, VALUES):
        places = first + tl.arange(0, VALUES)
        z = tl.zeros([ROWS, VALUES], tl.float32)
        if HELD:
            for i in tl.static_range(PIECES):
                z = _add_product(z, hidden[i], weight, places, _columns(i, PIECE), V, (i + 1) * PIECE, D, PRODUCT)
        else:
            for i in range(PIECES):
                columns = _columns(i, PIECE)
                piece = _x1(x, branch, gate, branch_bias, live, columns, ROUND, D)
                normed = ((piece - about) - apart) * scaling
                h = modulated(normed, shift, scale, norm_weight, norm_bias, columns, ROUND, D)
                z = _add_product(z, h, weight, places, columns, V, ROUND, D, PRODUCT)
        values = places[None, :]
        if bias is not None:
            z += tl.load(bias + values, values < V, 0.0).to(tl.float32)
        at = places_of((out, out_b, out_c, out_h, out_w), sample, tokens, values, grid_w, V, P, False)
        tl.store(at, z.to(out.dtype.element_ty), live & (values < V))


# ---- Tiles -----------------------------------------------------------------------------------------------------------

_ELEMENTS = 1024  # that a program of place_values or gather_values moves

_COLUMNS = 128
_EMBED = Tile(64, 4)
_EMBED_VALUES = 64

_WIDEST_HELD = 4096
_PIECE = 128
_MOST_PIECES = 32
_ROWS = 16  # the fewest that tl.dot takes on tensor cores
_WARPS = {384: 8, 768: 8, 1024: 8, 1152: 8}
# The ptxas of Triton 3.6 would take 80, so that a third program fits on a multiprocessor, and spill at patch size 8.
_REGISTERS = {768: 128}
_WIDE = Tile(_ROWS, 8)


def value_tile(values: int, most: int) -> int:
    """Values of a patch held at a time: a power of two, at least the 16 that tl.dot needs, at most ``most``."""
    return min(most, max(16, 1 << (values - 1).bit_length()))


def row_piece(width: int, product: Any) -> int:
    """Channels of a piece: 128 (64 in fp32 products), fewer for narrow rows, more where too many pieces would be unrolled."""
    narrowest = max(16, 1 << (min(width, _WIDEST_HELD) - 1).bit_length())
    usual = _PIECE // 2 if product == tl.float32 else _PIECE
    return min(narrowest, max(usual, narrowest // _MOST_PIECES))


def row_tile(width: int) -> Tile:
    if width > _WIDEST_HELD:
        return _WIDE
    warps = _WARPS.get(width) or max(4, min(16, (1 << (width - 1).bit_length()) // 128))
    return Tile(_ROWS, warps, registers=_REGISTERS.get(width))


def product_dtype(weight: Tensor) -> Any:
    """The dtype of a product's operands: the weight's, or fp32 in Triton's interpreter, whose products support no other."""
    if _triton.INTERPRETED:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[weight.dtype]


# ---- Launch ----------------------------------------------------------------------------------------------------------


@PATCHIFY.implement("triton", refuse=_triton.refuse)
def _patchify(image: Tensor, patch_size: int, channels_first: bool, dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = image.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    values = channels * patch_size * patch_size
    tokens = image.new_empty((batch, grid_h * grid_w, values), dtype=dtype)
    _move(gather_values, image, tokens, values, (grid_h, grid_w), patch_size, channels_first)
    return tokens


@UNPATCHIFY.implement("triton", refuse=_triton.refuse)
def _unpatchify(tokens: Tensor, grid_h: int, grid_w: int, patch_size: int, channels_first: bool) -> Tensor:
    batch, _, values = tokens.shape
    channels = values // (patch_size * patch_size)
    image = tokens.new_empty((batch, channels, grid_h * patch_size, grid_w * patch_size))
    _move(place_values, tokens, image, values, (grid_h, grid_w), patch_size, channels_first)
    return image


def _move(
    kernel: Any, source: Tensor, target: Tensor, values: int, grid: tuple[int, int], p: int,
    channels_first: bool,
) -> None:  # fmt: skip
    grid_h, grid_w = grid
    parts = ceil_div(grid_w * values, _ELEMENTS)
    _triton.launch(
        kernel,
        source.shape[0] * grid_h * parts,
        Tile(1, 4),
        source.device,
        *(*with_strides(source), target, grid_h, grid_w, parts),
        V=values,
        P=p,
        CHANNELS_FIRST=channels_first,
        ELEMENTS=_ELEMENTS,
    )


@PATCH_EMBED.implement("triton", refuse=refusing_empty_weights(_triton.refuse))
def _patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    batch, channels, height, columns = x.shape
    width, _, p, _ = weight.shape
    grid_w, values = columns // p, channels * p * p
    length = height // p * grid_w
    lines = batch * length
    product = product_dtype(weight)
    y = x.new_empty((batch, length, width), dtype=out_dtype)
    pos = with_strides(None if pos_embed is None else pos_embed[0], 2)
    _triton.launch(
        embed,
        ceil_div(lines, _EMBED.rows) * ceil_div(width, _COLUMNS),
        _EMBED,
        x.device,
        *(*with_strides(x), weight.contiguous(), packed(bias), *pos, y, lines, length, grid_w),
        D=width,
        V=values,
        P=p,
        PRODUCT=product,
        VALUES=value_tile(values, 16 if product == tl.float32 else _EMBED_VALUES),
        COLUMNS=_COLUMNS,
        ROWS=_EMBED.rows,
    )
    return y


@FINAL_LAYER.implement("triton", refuse=refusing_empty_weights(_triton.refuse))
def _final_layer(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, branch_bias: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, grid_h: int, grid_w: int, patch_size: int, norm: str, eps: float,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    batch, length, width = x.shape
    values = weight.shape[0]
    channels = values // (patch_size * patch_size)
    image = x.new_empty((batch, channels, grid_h * patch_size, grid_w * patch_size), dtype=out_dtype)
    tile, product = row_tile(width), product_dtype(weight)
    blocks = ceil_div(length, tile.rows)
    _triton.launch(
        final_rows,
        batch * blocks,
        tile,
        x.device,
        *(*with_strides(x), *with_strides(branch), *per_sample(gate), packed(branch_bias)),
        *(*per_sample(shift), *per_sample(scale), packed(norm_weight), packed(norm_bias)),
        *(*with_strides(weight), packed(bias), *with_strides(image), length, blocks, grid_w, eps),
        D=width,
        V=values,
        P=patch_size,
        CENTRED=norm == "layernorm",
        HELD=width <= _WIDEST_HELD,
        PRODUCT=product,
        PIECE=row_piece(width, product),
        VALUES=value_tile(values, 32 if product == tl.float32 else 64),
        ROWS=tile.rows,
    )
    return image
