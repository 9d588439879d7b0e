"""Image files as Pillow opens them: what their headers say, and errors that name the file.

Everything that depends on the bytes of a file runs inside `opened`, so that whatever Pillow's
plugins raise becomes one kind of error. Its own limits are for files of strangers: for size there
is MAX_PIXELS, whose error says what to do; and programs write profiles of megabytes into PNGs.
"""

import ctypes
import io
import logging
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from contrastseg_jax.errors import InputError

MAX_PIXELS = 1 << 28  # of an image, which is decoded whole for each crop: 0.8 GB
MAX_TEXT = 1 << 28  # bytes of a PNG's texts and profiles, unpacked
# By content, whatever the suffix: no vector formats, and none that starts another program.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF")
JPEGS = ("JPEG", "MPO")  # MPO: several pictures in one JPEG, as of phones
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Decoders of these formats take memory for all pixels that a header says, and touch it. One that
# says more than MANY_PIXELS, and more for each byte of the file than a picture of one colour has,
# lies. A JPEG has at least a bit for each 8x8 pixels: four times that is believed.
MANY_PIXELS = 1 << 24
PIXELS_PER_BYTE = {"JPEG": 4 * 512, "MPO": 4 * 512, "GIF": 1 << 14, "WEBP": 1 << 14}
NOTES = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # parts of a PNG that may hold its orientation
TO_READ_BANDS = "gdal_translate -of PNG -ot Byte -scale -b 1 -b 2 -b 3"

Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT
# What Pillow and its libtiff write names no file. What matters is an error, which does.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
with suppress(OSError, AttributeError):  # a Pillow without libtiff, or a system that hides it
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class FormatError(InputError):
    """A file that can be read, but not used as it is; the message says what mends it."""


@dataclass(frozen=True)
class Layout:
    """How the pixels of a file lie in it, in Pillow's words."""

    channels: str  # e.g. "RGB", "LA" or "I"
    order: str  # of bits and bytes, e.g. "16B" or "4"; empty: plain bytes
    bits: int  # per channel


@contextmanager
def opened(data: bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    """The Pillow image of `data`; any failure to read it is an InputError that says `name`.

    Raises:
        FormatError: it has more pixels than MAX_PIXELS, or is a TIFF of bands that are no picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_sizes(image, data, name)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                _refuse_bands(image.tag_v2, name)
            yield image
    except InputError:
        raise
    except UnidentifiedImageError as error:  # whose own message is a memory address
        if data.startswith(TIFF_SIGNATURES):
            raise _unknown_tiff(data, name) from error
        reason = "not an image" if data else "empty"
        if data[4:8] == b"ftyp":
            reason = "HEIF, or a video; save it as JPEG or PNG"
        raise InputError(f"{name}: unreadable image file ({reason})") from error
    except MemoryError as error:
        raise InputError(f"{name}: unreadable image file (not enough memory)") from error
    except Exception as error:  # of any class, for it is the file that chooses
        kind = "" if isinstance(error, (OSError, SyntaxError, ValueError)) else type(error).__name__
        reason = ": ".join(part for part in (kind, str(error)) if part)
        raise InputError(f"{name}: unreadable image file ({reason})") from error


def stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """(height, width) of the pixels as the file has them; Pillow's size of a TIFF is turned."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        return tags[TiffImagePlugin.IMAGELENGTH], tags[TiffImagePlugin.IMAGEWIDTH]
    return image.height, image.width


def orientation_of(image: ImageFile.ImageFile, data: bytes) -> int:
    """How viewers are to turn and mirror the pixels, 1..8 as EXIF has it; 1: not at all.

    To be asked before the pixels are loaded: Pillow turns those of a TIFF, and forgets why.
    """
    if image.format == "PNG" and _notes_come_late(data):
        image.load()
    try:
        exif = Image.Image.getexif(image)  # a PNG's own would always load it
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        return int(orientation) if orientation in range(2, 9) else 1
    except Exception:
        if image.format == "TIFF":  # where the note is a part of the header
            raise
        return 1  # a damaged note says nothing


def layout_of(image: ImageFile.ImageFile) -> Layout:
    """How the pixels lie in the file. To be asked before they are loaded."""
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return Layout(image.mode, "", 16 if image.mode.startswith("I;16") else 8)
    arguments = image.tile[0].args
    name = arguments[0] if isinstance(arguments, tuple) else str(arguments)
    channels, _, order = name.partition(";")
    found = re.match(r"\d+", order)
    return Layout(channels, order, int(found[0]) if found else 8)


def is_white_0(image: ImageFile.ImageFile) -> bool:
    """Whether a TIFF has 0 for white, which Pillow heeds up to 8 bits."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    return image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) == 0


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


def _notes_come_late(png: bytes) -> bool:
    """Whether the orientation may lie behind the pixels, which are decoded to get there."""
    pixels = png.find(b"IDAT")
    return any(png.rfind(note) > pixels for note in NOTES)


def _refuse_sizes(image: ImageFile.ImageFile, data: bytes, name: str) -> None:
    number, shown = image.width * image.height, f"{image.width}x{image.height} pixels"
    if number == 0:
        raise InputError(f"{name}: unreadable image file (has {shown})")
    if number > MAX_PIXELS:
        raise FormatError(
            f"{name}: has {shown}; at most {MAX_PIXELS:,} are read, cut it into tiles"
        )
    believed = PIXELS_PER_BYTE.get(image.format or "", number) * len(data)
    if number > max(believed, MANY_PIXELS):
        raise InputError(
            f"{name}: unreadable image file ({len(data)} bytes are too few for {shown})"
        )


def _refuse_bands(tags: TiffImagePlugin.ImageFileDirectory_v2, name: str) -> None:
    """Raise an error for a TIFF of which Pillow would take one band for all, or bytes for others.

    It takes the first of several bands that no photometric interpretation calls colours, and knows
    planes only of three colours with 8 bits each.
    """
    bands, bits = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), _bits(tags)
    is_grey = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) in (0, 1)
    in_planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    if is_grey and bands > 2 or in_planes and (bits > 8 or bands > 3):
        raise _bands_error(tags, name)


def _unknown_tiff(data: bytes, name: str) -> InputError:
    """What to say of a TIFF that Pillow cannot identify."""
    file = io.BytesIO(data)
    try:
        is_big = data[2:4] in (b"+\0", b"\0+")
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if is_big else 8))
        file.seek(tags.next)
        tags.load(file)
        if TiffImagePlugin.IMAGEWIDTH in tags:
            return _bands_error(tags, name)
    except Exception:  # of any class, as in `opened`
        pass
    return InputError(f"{name}: unreadable image file (TIFF with a damaged header)")


def _bands_error(tags: TiffImagePlugin.ImageFileDirectory_v2, name: str) -> FormatError:
    bands, bits = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), _bits(tags)
    kind = {2: "signed ", 3: "floating-point "}.get(_first(tags, TiffImagePlugin.SAMPLEFORMAT), "")
    in_planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    return FormatError(
        f"{name}: is a TIFF of {bands} {kind}band{'s' if bands != 1 else ''} of {bits} bits"
        f"{' in planes' if in_planes else ''}, which is not read as a picture; choose bands and"
        f" range for red, green and blue, e.g. {TO_READ_BANDS} IN.tif OUT.png"
    )


def _bits(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    return _first(tags, TiffImagePlugin.BITSPERSAMPLE)


def _first(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> int:
    """A number that a TIFF may give for each band; 1, as TIFF has it, where it does not."""
    value = tags.get(tag, 1)
    return value[0] if isinstance(value, tuple) else value
