"""Decodes image and mask files to arrays, and encodes arrays.

Images in plain PNGs are decoded by imagecodecs, in half of Pillow's time and as far as they are
needed; all else by Pillow. OpenCV is somewhat faster as well (`benchmarks/data.py --decoders`), but
for a damaged JPEG or an odd PNG its libraries write lines to standard error that name no file.

`Decoding` says whether an image's EXIF orientation is applied, and how many bits its values have. A
mask keeps the pixels and values that are stored.
"""

import io
import logging
import sys
import zlib
from contextlib import suppress
from typing import Any

import cv2
import imagecodecs
import numpy as np
from jaxtyping import Int64, Integer, UInt8, UInt16, UInt32
from PIL import Image, ImageFile
from scipy.io import loadmat

from contrastseg_jax.data.image_files import (
    JPEG_FORMATS,
    PNG_SIGNATURE,
    FormatError,
    PixelLayout,
    exif_orientation_of,
    is_white_zero,
    open_image,
    pixel_layout,
    stored_size,
)
from contrastseg_jax.data.spec import AS_STORED, Color, Decoding
from contrastseg_jax.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# By bits per pixel: what decoders multiply grey values by, so that white is 255.
GREY_SCALES = {2: 85, 4: 17}
MAX_LISTED_COLORS = 6  # of a colour mask, in its error
JPEG_SIDE = 65_500  # pixels, the longest side of a JPEG that OpenCV can write
COMMON_BIT_DEPTHS = (8, 10, 12, 14)  # of cameras and scanners that write files of 16 bits
logging.getLogger("imagecodecs").setLevel(logging.CRITICAL)  # warns of rows that are left out
# How each EXIF orientation is applied, and how that is undone.
EXIF_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNDO_EXIF_TRANSPOSE = EXIF_TRANSPOSE | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
# Pillow's orders of the two bytes of a value (little, big, native), and the opposite of each.
SWAPPED_BYTE_ORDER = {
    "16L": "16B",
    "16B": "16L",
    "16N": "16B" if sys.byteorder == "little" else "16L",
}


def decode_image(
    data: bytes, name: str, decoding: Decoding = AS_STORED, *, num_rows: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an image file; grey, palette, RGBA, CMYK and 16-bit files are converted.

    Of more than 8 bits per channel, the upper 8 of `decoding.bit_depth` bits are kept. The array
    may be read-only.

    Args:
        data: the file's content.
        name: what an error calls it.
        decoding: orientation and bit depth.
        num_rows: how many of the first rows are needed; others may be missing. None: all.

    Raises:
        InputError: the file cannot be read as far as it is needed.
        FormatError: it has more pixels than `MAX_PIXELS`, bands that are not colours, numbers of
            unknown range, values above `decoding.bit_depth`, or, where that is 0, 16-bit values
            that leave the upper two bits unused.
    """
    with open_image(data, name) as image:
        if image.mode in ("F", "I"):
            kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
            raise FormatError(
                f"{name}: its pixels are {kind} numbers, in {_value_range(np.asarray(image))};"
                " which of them is white is not known, save it with 8 bits per channel"
            )
        layout, orientation = pixel_layout(image), exif_orientation_of(image, data)
        if _is_plain_png(image, layout, orientation):
            height = min(num_rows or image.height, image.height)
            with suppress(imagecodecs.PngError):  # Pillow says what is wrong, if it cannot read it
                rows = imagecodecs.png_decode(_with_header(data, height=height))
                return rows if image.mode == "RGB" else _rgb(Image.fromarray(rows))
        pixels: Image.Image = image
        if layout.bits > 8:
            values = _deep_values(data, image, layout, name)
            pixels = _to_pillow(_upper_8_bits(values, layout.bits, decoding.bit_depth, name))
        return _rgb(
            _oriented(pixels, orientation, decoding, applied_by_pillow=image.format == "TIFF")
        )


def decode_mask(data: bytes, name: str) -> UInt8[np.ndarray, "h w"]:
    """Pixel values of an index mask as stored: one channel, or the indices of a palette PNG.

    Raises:
        InputError: the file cannot be read to its end.
        FormatError: it has colour channels, values above 255 or of floating point, more pixels than
            `MAX_PIXELS`, or is a JPEG.
    """
    mask = mask_values(data, name)
    if mask.min() < 0 or mask.max() > 255:
        divisor = int(np.gcd.reduce(np.unique(mask).astype(np.int64)))
        fits = mask.min() >= 0 and divisor > 1 and mask.max() // divisor <= 255
        remedy = f"all are multiples of {divisor}, divide by it" if fits else "renumber the classes"
        raise FormatError(
            f"{name}: mask values must lie in 0..255, found {mask.min()}..{mask.max()}; {remedy}"
        )
    return mask.astype(np.uint8)


def mask_values(data: bytes, name: str) -> Integer[np.ndarray, "h w"]:
    """As `decode_mask`, of any size: values may lie outside 0..255."""
    with open_image(data, name) as image:
        refuse_jpeg(image, name)
        if image.mode == "F":
            raise FormatError(
                f"{name}: mask values must be whole numbers in 0..255, found floating-point numbers"
                f" in {_value_range(np.asarray(image))}; save it with 8 bits"
            )
        if len(image.getbands()) > 1:
            image.load()  # that a file is cut short matters more than its colours
            raise FormatError(
                f"{name}: an index mask is expected (one channel, pixel value = class id), "
                f"found {len(image.getbands())} channels ({image.mode}) {_describe_colors(image)}"
            )
        layout, orientation = pixel_layout(image), exif_orientation_of(image, data)
        mask = np.array(
            _oriented(image, orientation, AS_STORED, applied_by_pillow=image.format == "TIFF")
        )
        if image.mode == "L":
            mask //= GREY_SCALES.get(layout.bits, 1)
    return mask.astype(np.uint8) if mask.dtype == bool else mask


def refuse_jpeg(image: Image.Image, name: str) -> None:
    """Raise an error for a mask that is a JPEG, whatever its file is called."""
    if image.format in JPEG_FORMATS:
        raise FormatError(
            f"{name}: a mask saved as JPEG has other values than were drawn, near borders or"
            " everywhere; export it again from its source as PNG"
        )


def color_codes(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt32[np.ndarray, "h w"]:
    """0xRRGGBB of each pixel."""
    blue_first = np.zeros((*pixels.shape[:2], 4), np.uint8)
    cv2.mixChannels([pixels], [blue_first], [0, 2, 1, 1, 2, 0])
    return blue_first.view("<u4")[..., 0]


def color_code(color: Color) -> int:
    """0xRRGGBB of a colour."""
    red, green, blue = color
    return red << 16 | green << 8 | blue


def color_text(code: int) -> str:
    """A colour 0xRRGGBB as settings have it."""
    return f"#{code:06x}"


def mask_colors(
    data: bytes, name: str, *, of_indices: bool
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]] | None:
    """Colours (0xRRGGBB) of a mask file and the pixels of each.

    `of_indices`: one channel holds indices; then the result is None.

    Raises:
        InputError: the file cannot be read to its end.
    """
    with open_image(data, name) as image:
        has_indices = of_indices and len(image.getbands()) == 1
        return None if has_indices else _color_counts(image)


def decode_mat(data: bytes, name: str, variable: str, largest: int) -> UInt16[np.ndarray, "h w"]:
    """The index mask in a variable of a MATLAB file of version 7 or older.

    Raises:
        InputError: the file cannot be read or has no such variable, or the variable is not a matrix
            of whole numbers in 0..largest.
    """
    try:
        found = loadmat(io.BytesIO(data), variable_names=[variable])
    except Exception as error:  # of many classes, none of them SciPy's own
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


def file_format(data: bytes, name: str) -> str:
    """Format and mode of an image file as Pillow calls them, e.g. "PNG L", from the header alone.

    Raises:
        InputError: the header cannot be read, or has more pixels than `MAX_PIXELS`.
    """
    with open_image(data, name) as image:
        return f"{image.format} {image.mode}"


def image_size(data: bytes, name: str, decoding: Decoding = AS_STORED) -> tuple[int, int]:
    """(height, width) of what `decode_image` returns, from the header alone.

    Raises:
        InputError: the header cannot be read, or has more pixels than `MAX_PIXELS`.
    """
    with open_image(data, name) as image:
        height, width = stored_size(image)
        if decoding.exif_orientation == "applied" and exif_orientation_of(image, data) >= 5:
            return width, height
        return height, width


def has_exif_orientation(data: bytes, name: str) -> bool:
    """Whether a file is to be rotated or mirrored by viewers, by EXIF data or a TIFF tag.

    Raises:
        InputError: the header cannot be read.
    """
    with open_image(data, name) as image:
        return exif_orientation_of(image, data) != 1


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


def _deep_values(
    data: bytes, image: ImageFile.ImageFile, layout: PixelLayout, name: str
) -> UInt16[np.ndarray, "h w c"]:
    """All bits of the channels except alpha, of a file that has more than 8 bits per channel.

    Pillow decodes them for a single grey channel only. For colours it keeps the upper byte of each
    value; decoding a second time, with the opposite byte order, gives the lower byte.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)[..., None]
        return (1 << layout.bits) - 1 - values if is_white_zero(image) else values
    if layout.channels == "LA":
        return _grey_of_16_bit_la(data, name)
    if (
        layout.channels not in ("RGB", "RGBX", "RGBA", "CMYK")
        or layout.order not in SWAPPED_BYTE_ORDER
    ):
        raise FormatError(
            f"{name}: has {layout.bits} bits per channel in a layout that is not read"
            f" ({layout.channels}); save it with 8 bits per channel"
        )
    swapped = f"{layout.channels};{SWAPPED_BYTE_ORDER[layout.order]}"
    with open_image(data, name) as again:
        again.tile = [tile._replace(args=_with_layout(tile.args, swapped)) for tile in again.tile]
        lower = np.asarray(again).astype(np.uint16)
    values = np.asarray(image).astype(np.uint16) << 8 | lower
    return values[..., :3] if image.mode == "RGBA" else values


def _grey_of_16_bit_la(data: bytes, name: str) -> UInt16[np.ndarray, "h w 1"]:
    """The grey values of a 16-bit PNG with alpha, whose header is changed to RGBA with 8 bits."""
    with open_image(_with_header(data, bits_and_channels=b"\x08\x06"), name) as image:
        upper, lower = np.moveaxis(np.asarray(image)[..., :2].astype(np.uint16), -1, 0)
    return (upper << 8 | lower)[..., None]


def _is_plain_png(image: ImageFile.ImageFile, layout: PixelLayout, orientation: int) -> bool:
    """Whether a file is a PNG whose rows follow each other, as they are to be shown.

    Interlaced ones are stored in seven passes, and animated ones name the sizes of frames. No tile
    is left of what was decoded to find its orientation.
    """
    plain = image.format == "PNG" and not image.info.keys() & {"interlace", "loop", "transparency"}
    shown = layout.bits == 8 and image.mode in ("L", "LA", "RGB", "RGBA") and orientation == 1
    return plain and shown and bool(image.tile)


def _with_header(png: bytes, *, height: int = 0, bits_and_channels: bytes = b"") -> bytes:
    """A PNG whose header says another height, or other bits and channels."""
    start = len(PNG_SIGNATURE) + 4
    header = bytearray(png[start : start + 17])
    if height:
        header[8:12] = height.to_bytes(4)
    if bits_and_channels:
        header[12:14] = bits_and_channels
    return png[:start] + header + zlib.crc32(header).to_bytes(4) + png[start + 21 :]


def _upper_8_bits(
    values: UInt16[np.ndarray, "h w c"], bits: int, bit_depth: int, name: str
) -> UInt8[np.ndarray, "h w c"]:
    """value >> (depth - 8), where depth is `bit_depth`, or else the file's `bits`."""
    largest = int(values.max())
    if bit_depth and largest >= 1 << bit_depth:
        raise FormatError(
            f"{name}: has values in {_value_range(values)}, above the {(1 << bit_depth) - 1} of"
            f" data.bit_depth = {bit_depth}"
        )
    if not bit_depth and 0 < largest < 1 << bits - 2:
        depth = next(depth for depth in COMMON_BIT_DEPTHS if largest < 1 << depth)
        raise FormatError(
            f"{name}: has values in {_value_range(values)} of {(1 << bits) - 1}, which are dark if"
            f" they have {bits} bits; set data.bit_depth = {depth} if they have {depth}, or ="
            f" {bits} to take them as they are"
        )
    return (values >> min(bit_depth or bits, bits) - 8).astype(np.uint8)


def _to_pillow(values: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    height, width, channels = values.shape
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    return Image.frombytes(mode, (width, height), values.tobytes())


def _oriented(
    image: Image.Image, orientation: int, decoding: Decoding, *, applied_by_pillow: bool
) -> Image.Image:
    """The image with its EXIF orientation applied or not, as `decoding` says.

    `applied_by_pillow`: loading the pixels has applied it already.
    """
    image.load()
    apply = decoding.exif_orientation == "applied"
    if orientation == 1 or apply == applied_by_pillow:
        return image
    return image.transpose((EXIF_TRANSPOSE if apply else UNDO_EXIF_TRANSPOSE)[orientation])


def _with_layout(arguments: tuple[Any, ...] | str | None, layout: str) -> tuple[Any, ...] | str:
    """The arguments of a Pillow decoder with another pixel layout."""
    return (layout, *arguments[1:]) if isinstance(arguments, tuple) else layout


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode == "P":  # via RGBA, for palettes with transparency
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _describe_colors(image: Image.Image) -> str:
    """The colours of a mask with colour channels, and how to make an index mask of it."""
    codes, counts = _color_counts(image)
    total = counts.sum()
    common = np.argsort(-counts, kind="stable")[:MAX_LISTED_COLORS]
    listed = [
        f"({codes[i] >> 16}, {codes[i] >> 8 & 255}, {codes[i] & 255}) {counts[i] / total:.1%}"
        for i in common
    ]
    more = ", ..." if len(codes) > len(listed) else ""
    if np.all(codes % 0x010101 == 0):
        remedy = "all colours are grey, so save one channel of them alone"
    else:
        remedy = "write the class id of each colour into one channel"
    remedy += "; of folder and tfds, data.mask_encoding reads colours (--mode=audit shows how)"
    return f"in {len(codes)} colours: {', '.join(listed)}{more}; {remedy}"


def _color_counts(image: Image.Image) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    codes, counts = np.unique(color_codes(np.array(image.convert("RGB"))), return_counts=True)
    return codes.astype(np.int64), counts


def _value_range(array: np.ndarray) -> str:
    return f"{array.min():g}..{array.max():g}"
