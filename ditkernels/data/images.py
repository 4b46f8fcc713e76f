"""A file of an image as it comes, to bytes of red, green and blue: the one reader of training, encoding and evaluation.

What each kind of file means stands in docs/data.md. A file is read whole and decoded from memory: what reading raises is the disk's
fault and ends the run, and what decoding raises is the file's, which counts as unreadable.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditkernels.data.crop import STRIP, center_crop
from ditkernels.data.formats import FORMAT_OF, FORMATS, UnreadableImageError, lacking
from ditkernels.data.greys import WIDE, Grey, as_grey
from ditkernels.files import printable

if TYPE_CHECKING:
    from PIL.Image import Image

READER = 2
"""The version of this reader: it changes where the same file would give other pixels. Reader 1 recorded none."""
MAX_PIXELS = 1 << 28
BACKGROUND = (255, 255, 255)
ORIENTATION = 274  # EXIF's number for it

TRIED_AGAIN = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM)
WAITS = (0.1, 0.5)  # seconds before the second and the third try

# What Pillow and its decoders raise on files cut short or altered, whatever their format.
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

# Where transparency of a grey of few bits is given in its own bits, though Pillow spreads the values over eight.
_SPREAD = {"L;2": 85, "L;4": 17}
_LAYERED = ("LA", "PA", "RGBA", "La", "RGBa")
# The orientations in which the turned image's first column or row is the file's last one.
_FROM_RIGHT, _FROM_BOTTOM = (2, 3, 7, 8), (3, 4, 6, 7)
_LOCK = threading.Lock()


# ---- The disk --------------------------------------------------------------------------------------------------------


def read_file(path: str | os.PathLike[str]) -> bytes:
    """A regular file's content.

    Raises:
        UnreadableImageError: it is no regular file.
        OSError: the disk did not give it. An error that may pass was met three times.
        MemoryError: it is larger than the memory; it is named.
    """
    for wait in (*WAITS, None):
        try:
            return _read_once(path)
        except OSError as error:
            if wait is None or error.errno not in TRIED_AGAIN:
                raise OSError(error.errno, error.strerror, printable(os.fspath(path))) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _read_once(path: str | os.PathLike[str]) -> bytes:
    # Opening a FIFO would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableImageError("no regular file")
        try:
            return file.read()
        except MemoryError as error:
            raise MemoryError(f"{printable(os.fspath(path))}: no memory for its content") from error


# ---- A decoded file --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A decoded image, not yet bytes of red, green and blue.

    Attributes:
        image: as its decoder left it, or grey bytes.
        orientation: how it is to be turned, 1 to 8 as in EXIF.
        transparency: of one colour, of a palette's entries, or None; as in Pillow's ``info``.
        frames: whether others follow this first one.
    """

    image: Image
    orientation: int
    transparency: Any
    frames: bool

    def whole(self) -> Image:
        """All of it, turned, in mode RGB."""
        return self._turned(self._converted(self.image))

    def cropped(self, size: int) -> np.ndarray:
        """Its square centre, turned, (size, size, 3) uint8; see :func:`center_crop`."""
        from PIL import Image as pillow

        if self.orientation == 1:
            return center_crop(self.image, size, converted=self._converted)
        if self.image.width * self.image.height <= STRIP:
            return center_crop(self.whole(), size)
        # A turned copy of a large image would double its memory.
        far = (self.orientation in _FROM_RIGHT, self.orientation in _FROM_BOTTOM)
        return np.array(self._turned(pillow.fromarray(center_crop(self.image, size, converted=self._converted, from_end=far))))

    def _turned(self, image: Image) -> Image:
        from PIL.Image import Transpose

        ways = {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }
        return image if self.orientation == 1 else image.transpose(ways[self.orientation])

    def _converted(self, piece: Image) -> Image:
        """A piece of it in mode RGB, before the background where it is transparent."""
        from PIL import Image as pillow

        if self.transparency is None and piece.mode not in _LAYERED:
            return piece if piece.mode == "RGB" else piece.convert("RGB")
        if self.transparency is not None:
            piece.info["transparency"] = self.transparency
        layered = piece if piece.mode == "RGBA" else piece.convert("RGBA")
        shown = pillow.new("RGB", piece.size, BACKGROUND)
        shown.paste(layered.convert("RGB"), mask=layered.getchannel("A"))
        return shown


def read_crop(path: str | os.PathLike[str], size: int, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, bool]:
    """The square centre of an image file's first frame, (size, size, 3) uint8, and whether other frames follow it.

    Raises:
        UnreadableImageError: the file is no image, a damaged one, one of more than ``max_pixels``, or one whose numbers do not say
            what is black and white.
        OSError: the disk did not give it; see :func:`read_file`.
        MemoryError: there is no memory for it; it is named.
    """
    content = _content_of(path)
    with _faults_of(path):
        picture = decode(content, max_pixels)
        return picture.cropped(size), picture.frames


def read_whole(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, bool]:
    """All of an image file's first frame, (H, W, 3) uint8, and whether other frames follow it; errors as of :func:`read_crop`."""
    content = _content_of(path)
    with _faults_of(path):
        picture = decode(content, max_pixels)
        return np.array(picture.whole()), picture.frames


def _content_of(path: str | os.PathLike[str]) -> bytes:
    content = read_file(path)
    expected = FORMAT_OF.get(Path(path).suffix.lower())
    if expected in lacking():
        raise UnreadableImageError(f"this Pillow was built without {expected}")
    return content


@contextmanager
def _faults_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """What decoding raises is the file's fault, but for a lack of memory."""
    try:
        yield
    except UnreadableImageError:
        raise
    except MemoryError as error:
        raise MemoryError(f"{printable(os.fspath(path))}: no memory to decode it") from error
    except DAMAGED as error:
        raise UnreadableImageError(_reason(error)) from error


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """The first frame of an image file's content. Raises UnreadableImageError, or what Pillow raises of damaged files, DAMAGED."""
    with warnings.catch_warnings(), _no_limit_of_pillow():
        # Pillow warns of what is odd about a file; what it can read of it is taken.
        warnings.simplefilter("ignore")
        return _decoded(content, max_pixels)


def _decoded(content: bytes, max_pixels: int) -> Picture:
    from PIL.Image import open as open_image

    image: Image = open_image(BytesIO(content), formats=[name for name in FORMATS if name not in lacking()])
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImageError(f"{width} x {height} pixels are more than max_pixels, {max_pixels:,}")
    grey = Grey.of(image)
    rawmode = _rawmode(image)
    orientation = _orientation(image) if image.format == "TIFF" else None
    frames = bool(getattr(image, "is_animated", False))
    image.load()
    transparency = _transparency(image.info.get("transparency"), rawmode)
    orientation = orientation or _orientation(image)
    # What else its file holds is let go.
    plain = image._new(image.im)
    plain.info = {}
    if plain.mode in WIDE:
        return Picture(as_grey(plain, grey, transparency, BACKGROUND[0]), orientation, None, frames)
    return Picture(plain, orientation, transparency, frames)


def _orientation(image: Image) -> int:
    """EXIF's; Pillow is told that the image stands upright, since it would turn a TIFF while loading it."""
    exif = image.getexif()
    found = exif.get(ORIENTATION, 1)
    if image.format == "TIFF":
        exif[ORIENTATION] = 1
    return found if found in range(1, 9) else 1


def _rawmode(image: Image) -> str:
    """How the file packs its numbers, in Pillow's words; "" where no single tile says."""
    tiles: list[Any] = getattr(image, "tile", [])
    arguments = tiles[0][3] if len(tiles) >= 1 else ""
    packed = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return packed if isinstance(packed, str) else ""


def _transparency(given: Any, rawmode: str) -> Any:
    """The colour that is transparent, in the eight bits of what was decoded."""
    if isinstance(given, tuple) and rawmode == "RGB;16B":
        return tuple(part >> 8 for part in given)
    return given * _SPREAD[rawmode] if isinstance(given, int) and rawmode in _SPREAD else given


def _reason(error: BaseException) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image of a format that is read"
    text = printable(" ".join(str(error).split()))
    return f"damaged: {text or type(error).__name__}"


@contextmanager
def _no_limit_of_pillow() -> Iterator[None]:
    """Pillow refuses 179 megapixels and warns of 90; the limit here is ``max_pixels``, looked at before anything is decoded."""
    from PIL import Image as pillow

    with _LOCK:
        before = pillow.MAX_IMAGE_PIXELS
        pillow.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            pillow.MAX_IMAGE_PIXELS = before
