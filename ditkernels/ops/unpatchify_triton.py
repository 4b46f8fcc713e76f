"""The Triton kernels of ``unpatchify``, and where a patch's values lie in an image.

    place_values     a program owns part of one row of patches of one sample; writes the image side by side.
    gather_values    its backward: the same the other way round.

V = p·p·O, the values of a patch. Nothing is computed; the input is read in place at any strides. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditkernels.ops import _registry as registry
from ditkernels.ops import _triton
from ditkernels.ops._triton import Tile, ceil_div, jit, tl, with_strides
from ditkernels.ops.final_layer import UNPATCHIFY, UNPATCHIFY_BACKWARD

_ELEMENTS = 1024


@jit
def places_of(image, sample, tokens, values, grid_w, V: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where values (1, ..) of tokens (.., 1) of a sample lie in the image."""
    O: tl.constexpr = V // (P * P)  # noqa: E741
    row, column = values // (P * O), values // O % P
    of_tokens = (tokens // grid_w * P).to(tl.int64) * image[3] + (tokens % grid_w * P).to(tl.int64) * image[4]
    of_values = (
        (values % O).to(tl.int64) * image[2] + row.to(tl.int64) * image[3] + column.to(tl.int64) * image[4]
    )
    return image[0] + sample * image[1] + (of_tokens + of_values)


@jit
def values_of(image, sample, tokens, values, grid_w, live, V: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """dz, or z: values (1, ..) of tokens (.., 1), in the image's dtype, zero outside."""
    return tl.load(places_of(image, sample, tokens, values, grid_w, V, P), live & (values < V), 0.0)


@jit
def place_values(  # type: ignore[no-untyped-def]
    tokens, image, grid_h, grid_w, parts, V: tl.constexpr, P: tl.constexpr, ELEMENTS: tl.constexpr
):
    program = tl.program_id(0)
    band = program // parts
    sample = (band // grid_h).to(tl.int64)
    patch_row = band % grid_h
    O: tl.constexpr = V // (P * P)  # noqa: E741
    width = grid_w * P
    # In the order of the image: output channel, row in the patch, column of the image.
    element = (program % parts) * ELEMENTS + tl.arange(0, ELEMENTS)
    live = element < width * (P * O)
    line, column = element // width, element % width
    channel, row = line // P, line % P
    token = patch_row.to(tl.int64) * grid_w + column // P
    value = (row * P + column % P) * O + channel
    at = tokens[0] + sample * tokens[1] + token * tokens[2] + value.to(tl.int64) * tokens[3]
    image_line = (sample * O + channel) * grid_h * P + patch_row * P + row
    tl.store(image + image_line * width + column, tl.load(at, live, 0.0), live)


@jit
def gather_values(  # type: ignore[no-untyped-def]
    image, tokens, grid_h, grid_w, parts, V: tl.constexpr, P: tl.constexpr, ELEMENTS: tl.constexpr
):
    program = tl.program_id(0)
    band = program // parts
    sample = (band // grid_h).to(tl.int64)
    # In the order of the tokens: token of the row of patches, value.
    element = (program % parts) * ELEMENTS + tl.arange(0, ELEMENTS)
    live = element < grid_w * V
    token = (band % grid_h) * grid_w + element // V
    read = tl.load(places_of(image, sample, token, element % V, grid_w, V, P), live, 0.0)
    tl.store(tokens + band.to(tl.int64) * grid_w * V + element, read, live)


def _unpatchify(tokens: Tensor, grid_h: int, grid_w: int, patch_size: int) -> Tensor:
    batch, _, values = tokens.shape
    channels = values // (patch_size * patch_size)
    image = tokens.new_empty((batch, channels, grid_h * patch_size, grid_w * patch_size))
    parts = ceil_div(grid_w * values, _ELEMENTS)
    _triton.launch(
        place_values,
        batch * grid_h * parts,
        Tile(1, 4),
        tokens.device,
        *(with_strides(tokens), image, grid_h, grid_w, parts),
        V=values,
        P=patch_size,
        ELEMENTS=_ELEMENTS,
    )
    return image


def _unpatchify_backward(dout: Tensor, patch_size: int) -> Tensor:
    batch, channels, height, width = dout.shape
    grid_h, grid_w = height // patch_size, width // patch_size
    values = patch_size * patch_size * channels
    tokens = dout.new_empty((batch, grid_h * grid_w, values))
    parts = ceil_div(grid_w * values, _ELEMENTS)
    _triton.launch(
        gather_values,
        batch * grid_h * parts,
        Tile(1, 4),
        dout.device,
        *(with_strides(dout), tokens, grid_h, grid_w, parts),
        V=values,
        P=patch_size,
        ELEMENTS=_ELEMENTS,
    )
    return tokens


def _refuse(values: Tensor, *args: Any) -> str | None:
    return _triton.refuse(1, values)


registry.implement(UNPATCHIFY, "triton", _unpatchify, refuse=_refuse)
registry.implement(UNPATCHIFY_BACKWARD, "triton", _unpatchify_backward, refuse=_refuse)
