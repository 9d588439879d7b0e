"""What training, evaluation and prediction do to an image alike: decode it, resize it, pad it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.image_files import MAX_PIXELS
from contrastseg_jax.data.images import decode_image, decode_mask, image_size
from contrastseg_jax.data.labels import to_train_ids
from contrastseg_jax.data.spec import Color, Preprocessing
from contrastseg_jax.errors import InputError

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Example:
    """An example of a split: the label, and the image, which is decoded as far as it is needed."""

    read_image: Callable[[int], UInt8[np.ndarray, "h w 3"]]  # its first so many rows, or more
    label: UInt8[np.ndarray, "h w"]  # class ids

    @property
    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        """The whole image."""
        return self.read_image(self.label.shape[0])


def open_example(record: dict[str, bytes], preprocessing: Preprocessing) -> Example:
    """The example of a record, at the size it is stored in.

    Raises:
        InputError: the label cannot be decoded or has an unknown value, or the image is of another
            size; also on reading the image, where it cannot be decoded. Names the example.
    """
    name, decoding = record["name"].decode(), preprocessing.decoding
    size = image_size(record["image"], f"image {name}", decoding)
    mask = decode_mask(record["label"], f"label {name}")
    if mask.shape != size:
        raise InputError(f"label {name}: has {_text(mask.shape)} pixels, its image {_text(size)}")

    def read_image(num_rows: int) -> UInt8[np.ndarray, "h w 3"]:
        return decode_image(record["image"], f"image {name}", decoding, num_rows=num_rows)

    return Example(read_image, to_train_ids(mask, preprocessing.label_map, f"label {name}"))


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
