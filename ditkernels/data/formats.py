"""The image formats that are read: their names in Pillow, the suffixes of their files, and what this Pillow lacks of them.

The list is fixed, so that what a run reads is no matter of which plugins an installation has. None of the formats is a stub that
hands the work to another program, as EPS is.
"""

from __future__ import annotations

from functools import cache

# A format's name in Pillow, to the suffixes of its files.
FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
FORMAT_OF = {suffix: name for name, suffixes in FORMATS.items() for suffix in suffixes}

# What Pillow calls the library that a format needs.
_LIBRARIES = {"PNG": "zlib", "JPEG": "jpg", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}


@cache
def lacking() -> frozenset[str]:
    """The formats that this Pillow was built without."""
    from PIL import features

    return frozenset(name for name, library in _LIBRARIES.items() if library not in features.get_supported())


class UnreadableImageError(ValueError):
    """A file is no image that is read; the message is the reason, without the file's name."""
