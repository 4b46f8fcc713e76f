"""The square centre of an image, as ADM prepares ImageNet (Dhariwal & Nichol, arXiv 2105.05233): every DiT number rests on it.

The image is halved by box averages while both edges stay at least twice the crop's, then resized bicubically until the shorter
edge is the crop's, then cropped. A large image goes through the first halving in strips, which changes no byte. Where the resized
whole would be large, only what the crop shows is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_WHOLE = 1 << 24  # pixels of a resized image that is made whole
STRIP = 1 << 21  # pixels that are halved at once
TALL = 1.5  # height over width, from which on an image is halved whole

ToRGB = Callable[["Image"], "Image"]


def center_crop(
    image: Image,
    size: int,
    *,
    converted: ToRGB | None = None,
    from_end: tuple[bool, bool] = (False, False),
) -> np.ndarray:
    """The square centre of a Pillow image, (size, size) or (size, size, channels) uint8.

    Args:
        image: of any mode that ``converted`` takes.
        size: edge of the crop.
        converted: makes bytes of any piece of the image; default: the image's own are taken.
        from_end: whether columns and rows are counted from the far end, where the middle lies between two of them.
    """
    from PIL.Image import Resampling

    halvings = _halvings(image.size, size)
    resized = _resized_size(image.size, halvings, size)
    left, top = ((edge - size + far) // 2 for edge, far in zip(resized, from_end, strict=True))
    converted = converted or _as_it_is
    if resized[0] * resized[1] <= LARGEST_WHOLE:
        halved = _halved(image, halvings, converted)
        return np.array(halved.resize(resized, Resampling.BICUBIC))[top : top + size, left : left + size]
    x, y = (_margin(edge, min(image.size), halvings) for edge in image.size)
    seen = _halved(image.crop((x, y, image.width - x, image.height - y)), halvings, converted)
    steps = [(edge >> halvings) / to for edge, to in zip(image.size, resized, strict=True)]
    x, y = x >> halvings, y >> halvings
    columns = (left * steps[0] - x, (left + size) * steps[0] - x)
    rows = (top * steps[1] - y, (top + size) * steps[1] - y)
    return np.array(_resized(seen, size, columns, rows))


def _resized(image: Image, size: int, columns: tuple[float, float], rows: tuple[float, float]) -> Image:
    """Those columns and rows of an image, resized bicubically to (size, size), in the order of Pillow.

    Pillow shrinks the rows of tall images first. All else begins with the columns.
    """
    from PIL.Image import Resampling

    left, right = max(columns[0], 0), min(columns[1], image.width)
    top, bottom = max(rows[0], 0), min(rows[1], image.height)
    if image.height > image.width and bottom - top > size:
        image = image.resize((image.width, size), Resampling.BICUBIC, box=(0, top, image.width, bottom))
        return image.resize((size, size), Resampling.BICUBIC, box=(left, 0, right, size))
    image = image.resize((size, image.height), Resampling.BICUBIC, box=(left, 0, right, image.height))
    return image.resize((size, size), Resampling.BICUBIC, box=(0, top, size, bottom))


def _as_it_is(image: Image) -> Image:
    return image


def _halvings(edges: tuple[int, int], size: int) -> int:
    """How often both edges can be halved before the shorter one is below twice ``size``."""
    return max(0, (min(edges) // size).bit_length() - 1)


def _resized_size(edges: tuple[int, int], halvings: int, size: int) -> tuple[int, int]:
    width, height = (edge >> halvings for edge in edges)
    scale = size / min(width, height)
    return round(width * scale), round(height * scale)


def _margin(edge: int, shorter: int, halvings: int) -> int:
    """How much of both ends of an edge the crop does not need; the halvings treat what is left as they treat the whole."""
    unit = 2 << halvings
    # The crop is as long as the shorter edge, and the bicubic window reaches four pixels of the last halving beyond it.
    needed = ((shorter >> halvings) + 16) << halvings
    margin = max(0, (edge - needed) // 2 // unit * unit)
    while margin and not all(_halves_alike(edge >> done, margin >> done) for done in range(halvings)):
        margin -= unit
    return margin


def _halves_alike(edge: int, margin: int) -> bool:
    before, triples = _averages(edge)
    return _averages(edge - 2 * margin) == (before - margin // 2, triples)


def _halved(image: Image, times: int, converted: ToRGB) -> Image:
    """The image of bytes, after ``times`` halvings."""
    from PIL.Image import Resampling

    # Pillow halves the columns of tall images first, where strips, which are wide, have their rows halved first.
    if times and image.width * image.height > STRIP and image.height <= TALL * image.width:
        image, times = _halved_in_strips(image, converted), times - 1
    else:
        image = converted(image)
    for _ in range(times):
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    return image


def _halved_in_strips(image: Image, converted: ToRGB) -> Image:
    """What halving the whole gives, byte for byte; beside the image itself only a strip of it is in memory as bytes."""
    from PIL import Image as pillow

    size = (image.width // 2, image.height // 2)
    halved = None
    for row, rows, top, bottom in _strips(image.height, max(1, STRIP // image.width // 2)):
        strip = converted(image.crop((0, top, image.width, bottom)))
        halved = pillow.new(strip.mode, size) if halved is None else halved
        halved.paste(strip.resize((size[0], rows), pillow.Resampling.BOX), (0, row))
    assert halved is not None
    return halved


def _strips(height: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row of the halved image, how many, first row that they average, row behind the last)."""
    half = height // 2
    before, triples = _averages(height)
    for first, end, ahead in ((0, before, 0), (before + triples, half, 1)):
        for row in range(first, end, most):
            until = min(row + most, end)
            yield row, until - row, 2 * row + ahead, 2 * until + ahead
    if triples:
        yield before, 1, 2 * before, 2 * before + 3


@lru_cache(4096)
def _averages(height: int) -> tuple[int, int]:
    """How many rows of the halved image average rows 2i and 2i + 1, and how many after them average 2i to 2i + 2.

    All others average 2i + 1 and 2i + 2. Of an odd height one row averages three, or none does and one is left out, as Pillow's
    rounding has it. So a ramp is asked.
    """
    from PIL import Image as pillow

    ramp = np.arange(height, dtype=np.float32)[:, None]
    means = np.asarray(pillow.fromarray(ramp).resize((1, height // 2), pillow.Resampling.BOX))[:, 0]
    ahead = means - 2 * np.arange(height // 2)
    return int((ahead < 0.75).sum()), int(((ahead > 0.75) & (ahead < 1.25)).sum())
