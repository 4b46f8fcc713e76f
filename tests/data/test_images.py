"""Image files as they come: each row of the table in docs/data.md, what is refused and why, and whose fault a failure is."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from ditkernels.data import crop, images
from ditkernels.data.crop import center_crop
from ditkernels.data.formats import FORMAT_OF, FORMATS, UnreadableImageError, lacking
from ditkernels.data.images import read_crop, read_file, read_whole

# ---- Greys of more than eight bits -----------------------------------------------------------------------------------

GREYS = np.array([[0, 256, 4096], [32768, 65280, 65535]])
ITS_BYTES = np.array([[0, 1, 16], [128, 255, 255]], np.uint8)


def tiff(
    path: Path, numbers: np.ndarray, bits: int, *, photometric: int = 1, sample_format: int = 1, content: bytes | None = None
) -> Path:
    """A grey TIFF without compression, little-endian, with these tags."""
    content = numbers.tobytes() if content is None else content
    height, width = numbers.shape
    tags = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric)),
        *((273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, len(content)), (339, 3, 1, sample_format)),
    ]
    offset = 8 + len(content) + len(content) % 2
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", offset) + content + b"\0" * (len(content) % 2) + directory)
    return path


def grey_of(path: Path) -> np.ndarray:
    pixels, _ = read_whole(path)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
def test_sixteen_bits_of_grey_are_shifted(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(GREYS.astype(np.uint16)).save(path)
    assert (grey_of(path) == ITS_BYTES).all()


def test_sixteen_bits_of_a_big_endian_tiff_are_shifted(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (3, 2), GREYS.astype(">u2").tobytes()).save(tmp_path / "x.tif")
    assert (grey_of(tmp_path / "x.tif") == ITS_BYTES).all()


def test_sixteen_bits_of_pgm_are_shifted(tmp_path: Path) -> None:
    (tmp_path / "x.pgm").write_bytes(b"P5 3 2 65535\n" + GREYS.astype(">u2").tobytes())
    assert (grey_of(tmp_path / "x.pgm") == ITS_BYTES).all()
    # Pillow scales 1000 to 65535.
    (tmp_path / "y.pgm").write_bytes(b"P5 3 1 1000\n" + np.array([0, 500, 1000]).astype(">u2").tobytes())
    assert grey_of(tmp_path / "y.pgm").tolist() == [[0, 128, 255]]


def test_twelve_bits_of_tiff_are_shifted_by_four(tmp_path: Path) -> None:
    # 0x000 0x010 0x800 0xFFF, two numbers in three bytes.
    path = tiff(tmp_path / "x.tif", np.zeros((1, 4)), 12, content=bytes([0x00, 0x00, 0x10, 0x80, 0x0F, 0xFF]))
    assert grey_of(path).tolist() == [[0, 1, 128, 255]]


def test_a_tiff_whose_white_is_zero_is_inverted(tmp_path: Path) -> None:
    path = tiff(tmp_path / "x.tif", GREYS.astype("<u2"), 16, photometric=0)
    assert (grey_of(path) == 255 - ITS_BYTES).all()
    path = tiff(tmp_path / "y.tif", np.array([[0, 1, 255]], np.uint8), 8, photometric=0)
    assert grey_of(path).tolist() == [[255, 254, 0]]
    path = tiff(tmp_path / "z.tif", np.array([[0, 1]], "<f4"), 32, photometric=0, sample_format=3)
    assert grey_of(path).tolist() == [[255, 0]]


def test_unsigned_32_bits_of_tiff_are_shifted_by_24(tmp_path: Path) -> None:
    path = tiff(tmp_path / "x.tif", np.array([[0, 1 << 24, (1 << 32) - 1]], "<u4"), 32)
    assert grey_of(path).tolist() == [[0, 1, 255]]


def test_floats_from_zero_to_one_are_bytes(tmp_path: Path) -> None:
    numbers = np.array([[0, 0.5, 1], [0.25, 0.001, 0.999]], np.float32)
    expected = [[0, 128, 255], [64, 0, 255]]
    Image.fromarray(numbers).save(tmp_path / "x.tif")
    assert grey_of(tmp_path / "x.tif").tolist() == expected
    (tmp_path / "x.pfm").write_bytes(b"Pf\n3 2\n-1.0\n" + numbers[::-1].astype("<f4").tobytes())
    assert grey_of(tmp_path / "x.pfm").tolist() == expected


@pytest.mark.parametrize(
    "numbers, bits, sample_format, reason",
    [
        (np.array([[0, 255]], "<i4"), 32, 2, r"integers in \[0, 255\], all of them black of the 32 bits that the file declares"),
        (np.array([[-5, 300]], "<i2"), 16, 2, r"integers in \[-5, 300\], though the file declares 16 bits"),
        (np.array([[0, 255]], "<f4"), 32, 3, r"floats in \[0, 255\], read are those in \[0, 1\]"),
        (np.array([[-0.5, 1]], "<f4"), 32, 3, r"floats in \[-0.5, 1\]"),
        (np.array([[0, np.nan]], "<f4"), 32, 3, r"floats in \[nan, nan\]"),
    ],
)
def test_numbers_that_mean_no_grey_are_refused_with_their_range(
    numbers: np.ndarray, bits: int, sample_format: int, reason: str, tmp_path: Path
) -> None:
    path = tiff(tmp_path / "x.tif", numbers, bits, sample_format=sample_format)
    with pytest.raises(UnreadableImageError, match=reason):
        read_crop(path, 8)


def test_sixteen_bits_of_colour_are_as_pillow_gives_them(tmp_path: Path) -> None:
    content = struct.pack(">6H", 0, 256, 65535, 300, 511, 512)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(png(header, b"\0" + content))
    assert read_whole(tmp_path / "x.png")[0].tolist() == [[[0, 1, 255], [1, 1, 2]]]


def png(header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# ---- Orientation, transparency, frames -------------------------------------------------------------------------------


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def with_orientation(path: Path, number: int, pixels: np.ndarray) -> Path:
    exif = Image.Exif()
    exif[images.ORIENTATION] = number
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {"lossless": True}))
    return path


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_orientation_is_applied(suffix: str, number: int, tmp_path: Path) -> None:
    path = with_orientation(tmp_path / f"x.{suffix}", number, noise(10, 14))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image.copy() if suffix == "tif" else image).convert("RGB")
    assert (read_whole(path)[0] == np.array(upright)).all()
    assert (read_crop(path, 5)[0] == center_crop(upright, 5)).all()


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_large_image_is_turned_after_it_was_reduced(
    suffix: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns, channels = np.indices((101, 143, 3))
    waves = 127 + 60 * np.sin(rows / 25 + channels) + 60 * np.cos(columns / 25 - channels)
    path = with_orientation(tmp_path / f"x.{suffix}", number, waves.astype(np.uint8))
    small = read_crop(path, 20)[0]
    monkeypatch.setattr(images, "STRIP", 500)
    monkeypatch.setattr(crop, "STRIP", 500)
    assert np.abs(read_crop(path, 20)[0].astype(int) - small).max() <= 1


BACKGROUND = list(images.BACKGROUND)


def test_transparent_pixels_show_the_background_and_not_their_hidden_colour(tmp_path: Path) -> None:
    layered = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 128]]], np.uint8)
    for suffix in ("png", "webp", "tif", "tga"):
        Image.fromarray(layered).save(tmp_path / f"x.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
        found = read_whole(tmp_path / f"x.{suffix}")[0][0].tolist()
        assert found[:2] == [BACKGROUND, [10, 20, 30]], suffix
        assert found[2] == pytest.approx([127] * 3, abs=1), suffix


def test_a_transparent_colour_shows_the_background(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    grey.save(tmp_path / "grey.png", transparency=7)
    colour = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    colour.save(tmp_path / "colour.png", transparency=(1, 2, 3))
    colour.quantize(2).save(tmp_path / "palette.gif", transparency=0)
    wide = Image.fromarray(np.array([[1000, 1001]], np.uint16))
    wide.save(tmp_path / "wide.png", transparency=1000)
    assert read_whole(tmp_path / "grey.png")[0].tolist() == [[BACKGROUND, [8] * 3]]
    assert read_whole(tmp_path / "colour.png")[0].tolist() == [[BACKGROUND, [1, 2, 4]]]
    assert BACKGROUND in read_whole(tmp_path / "palette.gif")[0].tolist()[0]
    assert read_whole(tmp_path / "wide.png")[0].tolist() == [[BACKGROUND, [3] * 3]]


def test_a_transparent_colour_is_given_in_the_files_own_bits(tmp_path: Path) -> None:
    # Two bits a number: 0 1 2 3, of which 1 is transparent.
    header = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(png(header, b"\0" + bytes([0b00011011]), (b"tRNS", struct.pack(">H", 1))))
    assert read_whole(tmp_path / "x.png")[0][0, :, 0].tolist() == [0, 255, 170, 255]
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    rows = b"\0" + struct.pack(">6H", 256, 512, 768, 256, 512, 1024)
    (tmp_path / "y.png").write_bytes(png(header, rows, (b"tRNS", struct.pack(">3H", 256, 512, 768))))
    assert read_whole(tmp_path / "y.png")[0].tolist() == [[BACKGROUND, [1, 2, 4]]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_an_animation_is_read_and_others_are_told(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(
        tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
    )
    pixels, more = read_whole(tmp_path / f"x.{suffix}")
    assert more
    assert pixels[0, 0].tolist() == [255, 0, 0]
    frames[0].save(tmp_path / f"y.{suffix}")
    assert not read_whole(tmp_path / f"y.{suffix}")[1]


# ---- Formats ---------------------------------------------------------------------------------------------------------

SAVED = [
    *("png", "jpg", "jfif", "webp", "avif", "jp2", "tif", "bmp", "gif", "ppm", "pgm", "pbm", "tga"),
]


def saved(path: Path, size: tuple[int, int] = (20, 16)) -> Path:
    modes = {".pgm": "L", ".pbm": "1", ".gif": "P"}
    Image.fromarray(noise(size[1], size[0])).convert(modes.get(path.suffix, "RGB")).save(path, FORMAT_OF[path.suffix])
    return path


@pytest.mark.parametrize("suffix", SAVED)
def test_each_format_gives_what_pillow_gives(suffix: str, tmp_path: Path) -> None:
    if FORMAT_OF[f".{suffix}"] in lacking():
        pytest.skip(f"this Pillow lacks {suffix}")
    path = saved(tmp_path / f"x.{suffix}")
    with Image.open(path) as image:
        expected = image.convert("RGB")
    assert (read_whole(path)[0] == np.array(expected)).all()
    assert (read_crop(path, 8)[0] == center_crop(expected, 8)).all()


def test_formats_beside_the_list_are_not_read(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    for kind in ("EPS", "PCX", "ICO", "SGI"):
        assert kind not in FORMATS
        image.save(tmp_path / "x.png", kind)
        with pytest.raises(UnreadableImageError, match="no image of a format that is read"):
            read_crop(tmp_path / "x.png", 8)


def test_a_format_that_this_pillow_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "get_supported", lambda: ["jpg", "webp", "jpg_2000", "zlib"])
    lacking.cache_clear()
    try:
        (tmp_path / "x.avif").write_bytes(b"any")
        with pytest.raises(UnreadableImageError, match="this Pillow was built without AVIF"):
            read_crop(tmp_path / "x.avif", 8)
    finally:
        lacking.cache_clear()


# ---- The crop of large and of thin images ----------------------------------------------------------------------------


def plain_crop(image: Image.Image, size: int) -> np.ndarray:
    """The crop written out, with nothing done in strips."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    pixels = np.array(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def test_strips_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop, "STRIP", 700)
    draw = np.random.default_rng(1)
    for seed in range(150):
        height, width, size = (int(edge) for edge in draw.integers((1, 1, 1), (300, 300, 40)))
        image = Image.fromarray(noise(height, width, seed=seed))
        assert (center_crop(image, size) == plain_crop(image, size)).all(), (height, width, size)


@pytest.mark.parametrize("edges", [(9, 900), (900, 9), (40, 901), (901, 40), (83, 2001), (2001, 83), (84, 1999)])
def test_where_only_the_crop_is_computed_it_is_within_a_level(edges: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(noise(*edges))
    expected = plain_crop(image, 16).astype(int)
    monkeypatch.setattr(crop, "LARGEST_WHOLE", 0)
    assert np.abs(center_crop(image, 16) - expected).max() <= 1


MEASURED = """
import resource, sys
from ditkernels.data.images import read_crop
path, size = sys.argv[1], int(sys.argv[2])
import numpy, PIL.Image, PIL.PngImagePlugin
PIL.Image.init()
read_crop(sys.argv[3], 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_crop(path, size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_of(path: Path, size: int, small: Path) -> int:
    """Bytes by which reading a file raises the peak of a process."""
    command = [sys.executable, "-c", MEASURED, str(path), str(size), str(small)]
    return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout)


def test_a_thin_strip_costs_what_its_crop_costs(tmp_path: Path) -> None:
    Image.new("L", (8, 20_000)).save(tmp_path / "x.png")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    assert peak_of(tmp_path / "x.png", 256, tmp_path / "small.png") < 50e6


@pytest.mark.parametrize("suffix, options", [("png", {}), ("jpg", {}), ("bmp", {}), ("tif", {}), ("png", {"mode": "RGBA"})])
def test_a_large_image_takes_five_bytes_a_pixel(suffix: str, options: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    Image.new(options.get("mode", "RGB"), (6001, 5001)).save(path, exif=exif)
    Image.new("RGB", (8, 8)).save(tmp_path / f"small.{suffix}")
    allowed = 5 * 6001 * 5001 + 100e6 + path.stat().st_size
    assert peak_of(path, 256, tmp_path / f"small.{suffix}") < allowed - 50e6


def test_pillows_own_limit_is_put_back_and_ours_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = saved(tmp_path / "x.png")
    read_crop(path, 8, max_pixels=320)
    with pytest.raises(UnreadableImageError, match="20 x 16 pixels are more than max_pixels, 319"):
        read_crop(path, 8, max_pixels=319)
    assert Image.MAX_IMAGE_PIXELS == 10


# ---- The disk's faults and the file's --------------------------------------------------------------------------------


class Disk:
    """Opens files, after it has failed some times."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times, self.tries = number, times, 0
        self.opened = os.open

    def __call__(self, *arguments: object) -> int:
        self.tries += 1
        if self.tries <= self.times:
            raise OSError(self.number, os.strerror(self.number))
        return self.opened(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "WAITS", (0, 0))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "ENOMEM"])
def test_errors_that_may_pass_are_met_three_times(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.png")
    for times, passes in ((2, True), (3, False)):
        disk = Disk(getattr(errno, name), times)
        monkeypatch.setattr(os, "open", disk)
        if passes:
            assert read_file(path) == path.read_bytes()
        else:
            with pytest.raises(OSError, match=r"x\.png") as raised:
                read_file(path)
            assert raised.value.errno == getattr(errno, name)
        assert disk.tries == 3
        monkeypatch.undo()
        monkeypatch.setattr(images, "WAITS", (0, 0))


@pytest.mark.usefixtures("quick")
def test_other_errors_of_the_disk_are_raised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(errno.EACCES, 1)
    monkeypatch.setattr(os, "open", disk)
    with pytest.raises(PermissionError, match=r"x\.png"):
        read_crop(tmp_path / "x.png", 8)
    assert disk.tries == 1


@pytest.mark.parametrize("suffix", SAVED)
def test_a_truncated_file_is_the_files_fault(suffix: str, tmp_path: Path) -> None:
    whole = saved(tmp_path / f"x.{suffix}", (64, 64)).read_bytes()
    (tmp_path / f"x.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImageError):
        read_crop(tmp_path / f"x.{suffix}", 8)


def test_a_runtime_error_of_a_decoder_is_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    with pytest.raises(UnreadableImageError, match="damaged: Failed to decode frame 0"):
        read_crop(saved(tmp_path / "x.png"), 8)


def test_a_lack_of_memory_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(*_: object) -> None:
        raise MemoryError

    path = saved(tmp_path / "x.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", large)
    with pytest.raises(MemoryError, match=r"x\.png: no memory to decode it"):
        read_crop(path, 8)


def test_a_fifo_is_no_image_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UnreadableImageError, match="no regular file"):
        read_crop(tmp_path / "x.png", 8)


# ---- Fuzzed files ----------------------------------------------------------------------------------------------------

FUZZED = pytest.mark.parametrize("suffix", SAVED)
ADDED = 1 << 30


def corrupted(content: bytes, draw: np.random.Generator) -> bytes:
    """Some bytes changed, a piece cut out, or the end cut off."""
    found = bytearray(content)
    way = draw.integers(3)
    if way == 0:
        for at in draw.integers(0, len(found), draw.integers(1, 9)):
            found[at] = draw.integers(256)
    elif way == 1:
        start = draw.integers(len(found))
        del found[start : start + draw.integers(1, 40)]
    else:
        del found[draw.integers(len(found)) :]
    return bytes(found)


def fuzz(suffix: str, times: int, folder: Path) -> None:
    content = saved(folder / f"x.{suffix}").read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw = np.random.default_rng(list(suffix.encode()))
    path = folder / f"y.{suffix}"
    for _ in range(times):
        path.write_bytes(corrupted(content, draw))
        with contextlib.suppress(UnreadableImageError):
            read_crop(path, 8, max_pixels=1 << 26)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < ADDED


@FUZZED
def test_corrupted_images_raise_named_errors(suffix: str, tmp_path: Path) -> None:
    if FORMAT_OF[f".{suffix}"] in lacking():
        pytest.skip(f"this Pillow lacks {suffix}")
    fuzz(suffix, 100, tmp_path)


@pytest.mark.slow
@FUZZED
def test_many_corrupted_images_raise_named_errors(suffix: str, tmp_path: Path) -> None:
    fuzz(suffix, 2500, tmp_path)


def test_decoding_touches_no_file(tmp_path: Path) -> None:
    # A file that is mapped while it is read can be cut under the reader.
    saved(tmp_path / "x.bmp")
    picture = images.decode((tmp_path / "x.bmp").read_bytes())
    (tmp_path / "x.bmp").write_bytes(b"")
    assert io.BytesIO(picture.whole().tobytes()).getbuffer().nbytes == 3 * 20 * 16
