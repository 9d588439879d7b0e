"""Opens image files with Pillow: what their headers say, and errors that name the file.

Everything that depends on the bytes of a file runs inside `open_image`, so that whatever Pillow's
plugins raise becomes one kind of error. Pillow's own limits are meant for untrusted files; here
MAX_PIXELS bounds the size, with an error that says what to do, and PNGs may hold profiles of
megabytes, as some programs write them.
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

MAX_PIXELS = 1 << 28  # of an image: 0.8 GB once it is decoded
MAX_PNG_TEXT = 1 << 28  # bytes of a PNG's texts and profiles, decompressed
# By content, whatever the suffix: no vector formats, and none that starts another program.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF")
JPEG_FORMATS = ("JPEG", "MPO")  # MPO: several pictures in one JPEG, which phones write
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Decoders of these formats allocate all pixels that a header claims, and touch them. A header that
# claims more than TRUSTED_PIXELS, and more per byte of the file than an image of one colour has, is
# wrong. A JPEG has at least a bit for each 8x8 pixels; four times as many pixels are accepted.
TRUSTED_PIXELS = 1 << 24
MAX_PIXELS_PER_BYTE = {"JPEG": 4 * 512, "MPO": 4 * 512, "GIF": 1 << 14, "WEBP": 1 << 14}
EXIF_CHUNKS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # of a PNG, which may hold EXIF data
GDAL_COMMAND = "gdal_translate -of PNG -ot Byte -scale -b 1 -b 2 -b 3"

Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_PNG_TEXT
# What Pillow and its libtiff log names no file. Whatever matters is raised, with the file's name.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
with suppress(OSError, AttributeError):  # a Pillow whose libtiff is absent or not exported
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class FormatError(InputError):
    """A file that can be read, but not used as it is; the message says how to convert it."""


@dataclass(frozen=True)
class PixelLayout:
    """How the pixels of a file are stored, in Pillow's terms."""

    channels: str  # e.g. "RGB", "LA" or "I"
    order: str  # of bits and bytes, e.g. "16B" or "4"; empty: plain bytes
    bits: int  # per channel


@contextmanager
def open_image(data: bytes, name: str) -> Iterator[ImageFile.ImageFile]:
    """The Pillow image of `data`; any failure to read it is an InputError that names the file.

    Raises:
        FormatError: it has more pixels than MAX_PIXELS, or is a TIFF whose bands are not an image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, data, name)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                _check_bands(image.tag_v2, name)
            yield image
    except InputError:
        raise
    except UnidentifiedImageError as error:  # whose own message is a memory address
        if data.startswith(TIFF_SIGNATURES):
            raise _unidentified_tiff(data, name) from error
        reason = "not an image" if data else "empty"
        if data[4:8] == b"ftyp":
            reason = "HEIF, or a video; save it as JPEG or PNG"
        raise InputError(f"{name}: unreadable image file ({reason})") from error
    except MemoryError as error:
        raise InputError(f"{name}: unreadable image file (not enough memory)") from error
    except Exception as error:  # of any class, depending on the file
        kind = "" if isinstance(error, (OSError, SyntaxError, ValueError)) else type(error).__name__
        reason = ": ".join(part for part in (kind, str(error)) if part)
        raise InputError(f"{name}: unreadable image file ({reason})") from error


def stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """(height, width) of the pixels as stored; Pillow's own applies the orientation of a TIFF."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        return tags[TiffImagePlugin.IMAGELENGTH], tags[TiffImagePlugin.IMAGEWIDTH]
    return image.height, image.width


def exif_orientation_of(image: ImageFile.ImageFile, data: bytes) -> int:
    """The EXIF orientation, 1..8: how viewers rotate and mirror the pixels; 1: not at all.

    To be called before the pixels are loaded: Pillow then applies that of a TIFF and drops the tag.
    """
    if image.format == "PNG" and _exif_may_follow_pixels(data):
        image.load()
    try:
        exif = Image.Image.getexif(image)  # a PNG's own method would always load it
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        return int(orientation) if orientation in range(2, 9) else 1
    except Exception:
        if image.format == "TIFF":  # where the tag is a part of the header
            raise
        return 1  # damaged EXIF data are ignored


def pixel_layout(image: ImageFile.ImageFile) -> PixelLayout:
    """How the pixels are stored. To be called before they are loaded."""
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return PixelLayout(image.mode, "", 16 if image.mode.startswith("I;16") else 8)
    arguments = image.tile[0].args
    name = arguments[0] if isinstance(arguments, tuple) else str(arguments)
    channels, _, order = name.partition(";")
    bits = re.match(r"\d+", order)
    return PixelLayout(channels, order, int(bits[0]) if bits else 8)


def is_white_zero(image: ImageFile.ImageFile) -> bool:
    """Whether a TIFF stores white as 0 (WhiteIsZero), which Pillow converts up to 8 bits only."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    return image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) == 0


def check_checksums(data: bytes, name: str) -> None:
    """Verifies the checksum of each chunk of a PNG, which Pillow does not do for the pixels.

    Without it, a mask in which a bit has flipped may be read as another mask. Other formats have no
    checksums.

    Raises:
        InputError: a chunk is damaged, or cut short.
    """
    for kind, start, end in _png_chunks(data):
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4]):
            reason = "damaged or cut short: a checksum is wrong"
            raise InputError(f"{name}: unreadable image file ({reason})")
        if kind == b"IEND":
            return


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each chunk of a PNG, where it begins and where its checksum does; else none."""
    start = len(PNG_SIGNATURE) if data.startswith(PNG_SIGNATURE) else len(data)
    while start < len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4])
        yield data[start + 4 : start + 8], start, end
        start = end + 4


def _exif_may_follow_pixels(png: bytes) -> bool:
    """Whether EXIF data may come after the pixels, which are decoded to get there."""
    kinds = [kind for kind, _, _ in _png_chunks(png)]
    return b"IDAT" in kinds and not set(EXIF_CHUNKS).isdisjoint(kinds[kinds.index(b"IDAT") :])


def _check_size(image: ImageFile.ImageFile, data: bytes, name: str) -> None:
    num_pixels, size = image.width * image.height, f"{image.width}x{image.height} pixels"
    if num_pixels == 0:
        raise InputError(f"{name}: unreadable image file (has {size})")
    if num_pixels > MAX_PIXELS:
        raise FormatError(f"{name}: has {size}; at most {MAX_PIXELS:,} are read, cut it into tiles")
    plausible = MAX_PIXELS_PER_BYTE.get(image.format or "", num_pixels) * len(data)
    if num_pixels > max(plausible, TRUSTED_PIXELS):
        raise InputError(
            f"{name}: unreadable image file ({len(data)} bytes are too few for {size})"
        )


def _check_bands(tags: TiffImagePlugin.ImageFileDirectory_v2, name: str) -> None:
    """Raise an error for a TIFF of several bands that Pillow would misread without an error.

    It takes the first of several bands that no photometric interpretation calls colours, and
    supports separate planes only for three colours with 8 bits each.
    """
    bands, bits = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), _bits_per_band(tags)
    is_grey = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) in (0, 1)
    in_planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    if is_grey and bands > 2 or in_planes and (bits > 8 or bands > 3):
        raise _bands_error(tags, name)


def _unidentified_tiff(data: bytes, name: str) -> InputError:
    """The error for a TIFF that Pillow cannot identify."""
    file = io.BytesIO(data)
    try:
        is_big = data[2:4] in (b"+\0", b"\0+")
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if is_big else 8))
        file.seek(tags.next)
        tags.load(file)
        if TiffImagePlugin.IMAGEWIDTH in tags:
            return _bands_error(tags, name)
    except Exception:  # of any class, as in `open_image`
        pass
    return InputError(f"{name}: unreadable image file (TIFF with a damaged header)")


def _bands_error(tags: TiffImagePlugin.ImageFileDirectory_v2, name: str) -> FormatError:
    bands, bits = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1), _bits_per_band(tags)
    kind = {2: "signed ", 3: "floating-point "}.get(
        _tag_number(tags, TiffImagePlugin.SAMPLEFORMAT), ""
    )
    in_planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    return FormatError(
        f"{name}: is a TIFF of {bands} {kind}band{'s' if bands != 1 else ''} of {bits} bits"
        f"{' in planes' if in_planes else ''}, which is not read as a picture; choose bands and"
        f" range for red, green and blue, e.g. {GDAL_COMMAND} IN.tif OUT.png"
    )


def _bits_per_band(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    return _tag_number(tags, TiffImagePlugin.BITSPERSAMPLE)


def _tag_number(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> int:
    """A number that a TIFF may give per band, of the first band; 1, TIFF's default, if absent."""
    value = tags.get(tag, 1)
    return value[0] if isinstance(value, tuple) else value
