"""Encoded pictures to arrays and back.

Pillow reads the header and has the last word. Where both give the same pixels OpenCV decodes them,
which is a fifth faster (`benchmarks/data.py --decoders`); whatever it does not read goes to Pillow,
whose errors say what is wrong. Neither is asked to apply the EXIF orientation, because a mask is
drawn on the pixels as stored.
"""

import io
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from jaxtyping import Int64, UInt8, UInt16
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from scipy.io import loadmat

from contrastseg_jax.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What decoders multiply the grey values of a PNG by, by bits per pixel, so that white is 255.
GREY_SCALES = {2: 85, 4: 17}
COLORS_NAMED = 6  # of a colour mask, in its error
JPEG_SIDE = 65_500  # pixels, the longest that a JPEG can have as OpenCV writes it
MAX_PIXELS = 1 << 28  # of an image, which is decoded whole for each crop: 0.8 GB

# Pillow's limits are for files of strangers. For size there is MAX_PIXELS, whose error says what to
# do; and texts of megabytes are sound: programs write profiles into PNGs.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = sys.maxsize


class FormatError(InputError):
    """A file that can be read, but not used as it is; the message says what mends it."""


def decode_image(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an image file; grey, palette, RGBA, CMYK and 16-bit files are converted.

    Args:
        data: the file's content.
        name: what an error calls it.

    Raises:
        InputError: the file cannot be read to its end.
        FormatError: it has more pixels than `MAX_PIXELS`, numbers of no known range, or 16 bits of
            which the upper 8 are not used.
    """
    with _opened(data, name) as image:
        if image.mode in ("F", "I"):
            kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
            raise FormatError(
                f"{name}: its pixels are {kind} numbers, in {_range(np.asarray(image))}; which of"
                " them is white is not known, save it with 8 bits per channel"
            )
        rgb = _rgb(data, image)
    if rgb.max() == 0:
        _refuse_lost_values(data, name)
    return rgb


def decode_mask(data: bytes, name: str) -> UInt8[np.ndarray, "h w"]:
    """Pixel values of an index mask as stored: one channel, or the indices of a palette PNG.

    Raises:
        InputError: the file cannot be read to its end.
        FormatError: it has colour channels, values above 255 or of floating point, more pixels than
            `MAX_PIXELS`, or is a JPEG.
    """
    with _opened(data, name) as image:
        if image.format == "JPEG":
            raise FormatError(
                f"{name}: a mask saved as JPEG has other values than were drawn, near borders or"
                " everywhere; export it again from its source as PNG"
            )
        if image.mode == "F":
            raise FormatError(
                f"{name}: mask values must be whole numbers in 0..255, found floating-point numbers"
                f" in {_range(np.asarray(image))}; save it with 8 bits"
            )
        if len(image.getbands()) > 1:
            image.load()  # a file that is cut short is that before all else
            raise FormatError(
                f"{name}: an index mask is expected (one channel, pixel value = class id), "
                f"found {len(image.getbands())} channels ({image.mode}) {_colors(image)}"
            )
        mask = _by_opencv(data, image, "L", cv2.IMREAD_GRAYSCALE)
        if mask is None:
            mask = np.array(image)
        # A PNG has its bits per pixel there.
        bits = data[24] if image.format == "PNG" and image.mode == "L" else 8
        if bits in GREY_SCALES:
            mask //= GREY_SCALES[bits]
    if mask.min() < 0 or mask.max() > 255:
        divisor = int(np.gcd.reduce(np.unique(mask).astype(np.int64)))
        fits = mask.min() >= 0 and divisor > 1 and mask.max() // divisor <= 255
        remedy = f"all are multiples of {divisor}, divide by it" if fits else "renumber the classes"
        raise FormatError(
            f"{name}: mask values must lie in 0..255, found {mask.min()}..{mask.max()}; {remedy}"
        )
    return mask.astype(np.uint8)


def mask_colors(
    data: bytes, name: str
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]] | None:
    """Colours (0xRRGGBB) of a mask file and the pixels of each; None: it has but one channel.

    Raises:
        InputError: the file cannot be read to its end.
    """
    with _opened(data, name) as image:
        return _color_counts(image) if len(image.getbands()) > 1 else None


def decode_mat(data: bytes, name: str, variable: str, largest: int) -> UInt16[np.ndarray, "h w"]:
    """An index mask that a MATLAB file (of version 7 or older) holds as a variable.

    Raises:
        InputError: the file cannot be read, has no such variable, or it is no picture of whole
            numbers in 0..largest.
    """
    try:
        found = loadmat(io.BytesIO(data), variable_names=[variable])
    except Exception as error:  # of many classes, none of them scipy's own
        raise InputError(f"{name}: unreadable MATLAB file ({error})") from error
    if variable not in found:
        raise InputError(f"{name}: has no variable {variable}")
    array = found[variable]
    numbers = array.dtype.kind in "uif" and array.ndim == 2 and array.size > 0
    if not numbers or np.any(array != np.floor(array)):
        raise InputError(f"{name}: {variable} must be a picture of whole numbers")
    if array.min() < 0 or array.max() > largest:
        raise InputError(
            f"{name}: mask values must lie in 0..{largest}, found {array.min()}..{array.max()}"
        )
    return array.astype(np.uint16)


def check_checksums(data: bytes, name: str) -> None:
    """Holds each part of a PNG against its checksum, which Pillow does not do for the pixels.

    It takes a mask of few values in which one bit is wrong for another mask. Other formats have no
    checksums.

    Raises:
        InputError: a part is damaged, or cut short.
    """
    start = len(PNG_SIGNATURE)
    while data.startswith(PNG_SIGNATURE) and start < len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4])
        kind = data[start + 4 : start + 8]
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4]):
            reason = "damaged or cut short: a checksum is wrong"
            raise InputError(f"{name}: unreadable image file ({reason})")
        start = len(data) if kind == b"IEND" else end + 4


def file_format(data: bytes, name: str) -> str:
    """Format and mode of an image file as Pillow calls them, e.g. "PNG L", from the header alone.

    Raises:
        InputError: the header cannot be read, or has more pixels than `MAX_PIXELS`.
    """
    with _opened(data, name) as image:
        return f"{image.format} {image.mode}"


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) from the header alone.

    Raises:
        InputError: the header cannot be read, or has more pixels than `MAX_PIXELS`.
    """
    with _opened(data, name) as image:
        return image.height, image.width


def is_turned(data: bytes, name: str) -> bool:
    """Whether a JPEG notes in EXIF that viewers are to turn or mirror it, which nothing here does.

    Raises:
        InputError: the header cannot be read.
    """
    with _opened(data, name) as image:
        if image.format not in ("JPEG", "MPO"):  # several pictures in one JPEG, as of phones
            return False
        try:
            return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        except (OSError, SyntaxError, ValueError, struct.error):  # a damaged note says nothing
            return False


def encode_png(array: np.ndarray) -> bytes:
    """A PNG file of `u8[h w]` (index mask or grey) or `u8[h w 3]` (RGB)."""
    return _encode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 9])


def encode_jpeg(rgb: UInt8[np.ndarray, "h w 3"], quality: int) -> bytes:
    """A JPEG file without chroma subsampling: class borders keep their colour edges."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1, *sampling]
    return _encode(".jpg", rgb, settings)


def _encode(suffix: str, array: np.ndarray, settings: list[int]) -> bytes:
    pixels = cv2.cvtColor(array, cv2.COLOR_RGB2BGR) if array.ndim == 3 else array
    done, data = cv2.imencode(suffix, pixels, settings)
    if not done:
        height, width = array.shape[:2]
        raise InputError(f"{width}x{height} pixels cannot be written as {suffix}")
    return data.tobytes()


def _rgb(data: bytes, image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    pixels = _by_opencv(data, image, "RGB", cv2.IMREAD_COLOR)
    if pixels is not None:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    if image.mode.startswith("I"):  # 16 bits per grey value; `convert` would clip at 255
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "P":  # by way of RGBA, for palettes with transparency
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _refuse_lost_values(data: bytes, name: str) -> None:
    """Raise an error if an image that is black in 8 bits is not in the 16 bits it has."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if deep is not None and deep.dtype == np.uint16 and deep.any():
        raise FormatError(
            f"{name}: has 16 bits per channel, but values in {_range(deep)} alone, which in 8 bits"
            " are black; save it with 8 bits per channel"
        )


def _colors(image: Image.Image) -> str:
    """The colours of a mask that should have none, and what makes an index mask of it."""
    codes, counts = _color_counts(image)
    total = counts.sum()
    common = np.argsort(-counts, kind="stable")[:COLORS_NAMED]
    named = [
        f"({codes[i] >> 16}, {codes[i] >> 8 & 255}, {codes[i] & 255}) {counts[i] / total:.1%}"
        for i in common
    ]
    more = ", ..." if len(codes) > len(named) else ""
    if np.all(codes % 0x010101 == 0):
        remedy = "all colours are grey, so save one channel of them alone"
    else:
        remedy = "write the class id of each colour into one channel"
    return f"in {len(codes)} colours: {', '.join(named)}{more}; {remedy}"


def _color_counts(image: Image.Image) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    red, green, blue = np.moveaxis(np.array(image.convert("RGB")).astype(np.int64), -1, 0)
    return np.unique(red << 16 | green << 8 | blue, return_counts=True)


def _range(array: np.ndarray) -> str:
    return f"{array.min():g}..{array.max():g}"


def _by_opencv(data: bytes, image: Image.Image, mode: str, flag: int) -> np.ndarray | None:
    """Pixels of a whole PNG or JPEG of a mode, with the colours of `flag`; None: not by OpenCV.

    OpenCV 4 fills a truncated JPEG up with grey, so only one that has an end is left to it.
    """
    whole = image.format == "PNG" or image.format == "JPEG" and data.endswith(b"\xff\xd9")
    if image.mode != mode or not whole:
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    return pixels if pixels is not None and pixels.shape[:2] == image.size[::-1] else None


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The Pillow image of `data`; any failure to read it is an InputError that says `name`."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise FormatError(
                    f"{name}: has {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are"
                    " read, cut it into tiles"
                )
            yield image
    except InputError:
        raise
    except UnidentifiedImageError as error:  # whose own message is a memory address
        reason = "not an image" if data else "empty"
        raise InputError(f"{name}: unreadable image file ({reason})") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name}: unreadable image file ({error})") from error
