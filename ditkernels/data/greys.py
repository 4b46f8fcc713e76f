"""Grey images of more than eight bits, as bytes: what a file declares says what is white."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ditkernels.data.formats import UnreadableImageError

if TYPE_CHECKING:
    from PIL.Image import Image

WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
STRIP = 1 << 20  # numbers that are looked at once

# Tags of TIFF.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


@dataclass(frozen=True)
class Grey:
    """What a file declares of its grey numbers.

    Attributes:
        bits: of a number; None where the file does not say.
        unsigned: whether all of these bits count up from zero.
        inverted: whether zero is white and Pillow has left it so.
    """

    bits: int | None
    unsigned: bool = True
    inverted: bool = False

    @staticmethod
    def of(image: Image) -> Grey:
        """Of an image that has been opened and not loaded."""
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            bits = tags.get(_BITS, (1,))
            unsigned = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED
            # Of floats Pillow leaves white at zero too.
            return Grey(bits[0], unsigned, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)
        # Pillow spreads what a PNM or a JPEG 2000 of any depth holds over 16 bits.
        return Grey(16 if image.mode.startswith("I") and image.format in ("PNG", "PPM", "JPEG2000") else None)


def as_grey(image: Image, grey: Grey, transparent: Any, background: int) -> Image:
    """An image of a wide mode in mode L.

    Args:
        image: of a mode in WIDE.
        grey: what its file declares.
        transparent: the number that stands for no colour, or None.
        background: what is shown there.

    Raises:
        UnreadableImageError: the numbers are out of the range that the file declares, or it declares none.
    """
    from PIL import Image as pillow

    found = np.empty((image.height, image.width), np.uint8)
    bright = _Brightness(image.mode, grey)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        numbers = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        strip = found[top : top + rows]
        strip[...] = bright(numbers)
        if isinstance(transparent, int):
            strip[numbers == transparent] = background
    bright.check()
    return pillow.fromarray(found)


class _Brightness:
    """Numbers to bytes, and what range they were found in."""

    def __init__(self, mode: str, grey: Grey) -> None:
        self.mode = mode
        self.grey = grey
        self.low, self.high = np.inf, -np.inf
        self.brightest = 0
        self.bad = False

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        if self.mode == "I" and self.grey.bits == 32 and self.grey.unsigned:
            numbers = numbers.view(np.uint32)
        self.low, self.high = np.minimum(self.low, numbers.min()), np.maximum(self.high, numbers.max())
        white = 1.0 if self.mode == "F" else float((1 << (self.grey.bits or 16)) - 1)
        # Written so that NaN is bad.
        self.bad |= not (numbers.min() >= 0 and numbers.max() <= white)
        if self.bad:
            return np.zeros(numbers.shape, np.uint8)
        shades = np.rint(numbers * 255.0) if self.mode == "F" else numbers >> max(0, (self.grey.bits or 16) - 8)
        self.brightest = max(self.brightest, int(shades.max()))
        return (255 - shades if self.grey.inverted else shades).astype(np.uint8)

    def check(self) -> None:
        """Raises UnreadableImageError where the bytes mean nothing."""
        found = f"[{self.low:g}, {self.high:g}]"
        if self.mode == "F":
            if self.bad:
                raise UnreadableImageError(f"floats in {found}, read are those in [0, 1]")
            return
        bits = self.grey.bits
        if bits is None:
            raise UnreadableImageError(f"integers in {found}, and the file does not say what is white")
        if self.bad:
            raise UnreadableImageError(f"integers in {found}, though the file declares {bits} bits")
        if bits == 32 and self.brightest == 0 < self.high:
            raise UnreadableImageError(f"integers in {found}, all of them black of the 32 bits that the file declares")
