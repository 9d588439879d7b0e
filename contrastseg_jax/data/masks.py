"""Masks in other encodings than class ids: colours, and zero or not. What reads a data set's masks.

They are read so once, when a data set is audited or prepared: prepared masks hold class ids.
"""

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.audit.examples import ReadMask
from contrastseg_jax.data.image_files import FormatError, open_image
from contrastseg_jax.data.images import (
    color_code,
    color_codes,
    color_text,
    decode_image,
    decode_mask,
    mask_values,
    refuse_jpeg,
)
from contrastseg_jax.data.spec import Color, DatasetSpec
from contrastseg_jax.structs import IGNORE_LABEL

NO_VALUE = 254  # of a colour that is not in a table: no class has this id
MAX_LISTED_COLORS = 6  # in an error


def mask_reader(spec: DatasetSpec) -> ReadMask:
    """What turns the content of a mask file into mask values, as `spec.mask_encoding` says."""
    if spec.mask_encoding == "rgb":
        return partial(decode_color_mask, values=color_values(spec))
    return decode_binary_mask if spec.mask_encoding == "binary" else decode_mask


def color_values(spec: DatasetSpec) -> dict[Color, int]:
    """The class id of each colour of a data set's table, or IGNORE_LABEL."""
    ignored = dict.fromkeys(spec.ignore_colors, IGNORE_LABEL)
    return ignored | {color: class_id for class_id, color in enumerate(spec.palette)}


def color_names(spec: DatasetSpec) -> dict[int, str]:
    """What each colour (0xRRGGBB) means in masks that are read by their colours; else nothing."""
    if spec.mask_encoding != "rgb":
        return {}
    names = dict(enumerate(spec.class_names))
    values = color_values(spec)
    return {color_code(color): names.get(values[color], "no class") for color in values}


def mask_table(spec: DatasetSpec) -> Any:
    """All that `mask_reader` converts by, for a hash; None: it converts nothing."""
    encoding = spec.mask_encoding
    return None if encoding == "index" else (encoding, sorted(color_values(spec).items()))


def decode_color_mask(
    data: bytes, name: str, *, values: Mapping[Color, int]
) -> UInt8[np.ndarray, "h w"]:
    """The values of a mask's colours; those of a palette PNG are what it shows.

    Raises:
        InputError: the file cannot be read to its end.
        FormatError: it has a colour without value, transparent pixels, more pixels than
            `MAX_PIXELS`, or is a JPEG.
    """
    pixels = _opaque_colors(data, name)
    mask = look_up(pixels, values)
    unknown = mask == NO_VALUE
    if unknown.any():
        text = _describe_unknown(pixels[unknown], mask.size)
        if _num_channels(data, name) == 1:
            text += "; it has one channel, whose values are read by data.mask_encoding = 'index'"
        raise FormatError(f"{name}: {text}")
    return mask


def decode_binary_mask(data: bytes, name: str) -> UInt8[np.ndarray, "h w"]:
    """1 where a mask is not 0, in any of its colour channels if it has several; else 0.

    Raises:
        InputError: the file cannot be read to its end.
        FormatError: it has transparent pixels, floating-point values, more pixels than
            `MAX_PIXELS`, or is a JPEG.
    """
    if _num_channels(data, name) == 1:
        return np.not_equal(mask_values(data, name), 0).astype(np.uint8)
    return np.any(_opaque_colors(data, name), axis=-1).astype(np.uint8)


def look_up(
    pixels: UInt8[np.ndarray, "h w 3"], values: Mapping[Color, int]
) -> UInt8[np.ndarray, "h w"]:
    """The value of each pixel's colour; NO_VALUE: it has none."""
    return np.take(_table(tuple(values.items())), color_codes(pixels))


@functools.lru_cache(maxsize=4)  # 16 MB each; a data set needs one
def _table(values: tuple[tuple[Color, int], ...]) -> UInt8[np.ndarray, " 16777216"]:
    table = np.full(1 << 24, NO_VALUE, np.uint8)
    for color, value in values:
        table[color_code(color)] = value
    return table


def _num_channels(data: bytes, name: str) -> int:
    with open_image(data, name) as image:
        return len(image.getbands())


def _opaque_colors(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """The RGB pixels of a mask, all of which must be opaque: what lies under others is not seen."""
    with open_image(data, name) as image:
        refuse_jpeg(image, name)
        if image.has_transparency_data:
            alpha = np.asarray(image.convert("RGBA").getchannel("A"))
            if number := int((alpha < 255).sum()):
                raise FormatError(
                    f"{name}: {number} of {alpha.size} pixels are transparent, which no class is;"
                    " save the mask without alpha, these pixels in the colour of their class"
                )
    return decode_image(data, name)


def _describe_unknown(pixels: UInt8[np.ndarray, "n 3"], num_pixels: int) -> str:
    """The colours of pixels that have no value, of so many of the mask, and the rule they break."""
    codes, counts = np.unique(color_codes(pixels[None]), return_counts=True)
    common = np.argsort(-counts, kind="stable")[:MAX_LISTED_COLORS]
    listed = ", ".join(f"{color_text(int(codes[i]))} in {counts[i]}" for i in common)
    more = f", and {len(codes) - len(common)} more" if len(codes) > len(common) else ""
    rule = "each must be in data.palette or data.ignore_colors"
    if more:
        rule += "; soft edges have many, export the mask again without"
    plural = "colours" if len(codes) > 1 else "a colour"
    return f"{plural} of no class: {listed}{more} of {num_pixels} pixels; {rule}"
