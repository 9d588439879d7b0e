"""What training, evaluation and prediction do to an image alike: decode it, resize it, pad it."""

import math

import cv2
import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.image_files import MAX_PIXELS
from contrastseg_jax.data.images import decode_image, decode_mask
from contrastseg_jax.data.labels import to_train_ids
from contrastseg_jax.data.spec import Color, Preprocessing

Size = tuple[int, int]  # height, width


def decode_example(
    record: dict[str, bytes], preprocessing: Preprocessing
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Image and class ids of a record, at the size they are stored in.

    Raises:
        InputError: one of them cannot be decoded, or the mask has an unknown value; names the
            example.
    """
    name = record["name"].decode()
    image = decode_image(record["image"], f"image {name}", preprocessing.decoding)
    mask = decode_mask(record["label"], f"label {name}")
    return image, to_train_ids(mask, preprocessing.label_map, f"label {name}")


def resized_size(size: Size, short_side: int) -> Size:
    """`size` scaled so that its shorter side is `short_side`; 0 keeps it."""
    if short_side == 0:
        return size
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def padded_size(size: Size, multiple: int) -> Size:
    """`size` with both sides rounded up to a multiple."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def too_large(size: Size, short_side: int, pad_multiple: int) -> str:
    """Why an image of `size` cannot be evaluated or predicted; empty: it can.

    `MAX_PIXELS`, above which no image file is read, also bounds what resizing and padding make.
    """
    resized = resized_size(size, short_side)
    padded = padded_size(resized, pad_multiple)
    if max(math.prod(padded), math.prod(padded_size(size, pad_multiple))) <= MAX_PIXELS:
        return ""
    step = f" resized by data.short_side = {short_side} to {_text(resized)}," if short_side else ""
    return (
        f"has {_text(size)} pixels,{step} padded by eval.pad_multiple = {pad_multiple} to"
        f" {_text(padded)}; at most {MAX_PIXELS:,} pixels are evaluated, cut it into tiles"
    )


def resize_image(image: UInt8[np.ndarray, "h w 3"], size: Size) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image at `size`; bicubic without antialiasing, like the original's."""
    if size == image.shape[:2]:
        return image
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)


def pad(
    array: UInt8[np.ndarray, "h w *c"],
    size: Size,
    value: Color | int,
    *,
    offset: tuple[int, int] = (0, 0),
) -> UInt8[np.ndarray, "h2 w2 *c"]:
    """The array in a field of `value`, its upper left corner at (row, column) `offset`."""
    height, width = array.shape[:2]
    if (height, width) == size:
        return array
    padded = np.full((*size, *array.shape[2:]), value, np.uint8)
    padded[offset[0] : offset[0] + height, offset[1] : offset[1] + width] = array
    return padded


def _text(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
