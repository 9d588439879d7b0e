"""Training augmentation: scale, aspect, crop and flip in one resampling of the crop alone.

The distribution is the original's (lib/datasets/tools/cv2_aug_transforms.py: resize, random_resize,
random_crop, random_hflip, random_brightness, then padding at a random offset), without ever making
the resized images. Like the original's bicubic resizes it does not blur before it shrinks.
"""

import math

import cv2
import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.image_files import MAX_PIXELS
from contrastseg_jax.structs import IGNORE_LABEL

Image = UInt8[np.ndarray, "h w 3"]
Label = UInt8[np.ndarray, "h w"]
NewImage = UInt8[np.ndarray, "h2 w2 3"]
NewLabel = UInt8[np.ndarray, "h2 w2"]

TOLERANCE = 0.01  # pixels by which a crop may lie beside that of the whole image, resized


def augment(
    image: Image,
    label: Label,
    rng: np.random.Generator,
    *,
    crop_size: tuple[int, int],
    short_side: int,
    scale_range: tuple[float, float],
    aspect_range: tuple[float, float],
    flip_rate: float,
    brightness: int,
    color_distortion: float,
    class_uniform_rate: float,
    pad_color: tuple[int, int, int],
) -> tuple[NewImage, NewLabel]:
    """A random view of an image and the same view of its label.

    Options draw from generators of their own, so each leaves what the others draw as it is.

    Args:
        image: RGB.
        label: class ids.
        rng: the example's own; the result is a function of it.
        crop_size: (height, width) of the result.
        short_side: length of the shorter side before all else; 0 keeps the size.
        scale_range: bounds of the scale s of both sides.
        aspect_range: bounds of a; width is scaled by s*sqrt(a), height by s/sqrt(a).
        flip_rate: how often left and right are swapped.
        brightness: largest shift of all channels, either way, in grey levels.
        color_distortion: strength of `distort_colors`; 0 leaves it out.
        class_uniform_rate: how often the crop holds a pixel of a class that is drawn uniformly
            from those in the label, so that rare classes are seen more often.
        pad_color: RGB where a scaled image is smaller than the crop; IGNORE_LABEL in the label.
    """
    scale = rng.uniform(*scale_range)
    stretch = np.sqrt(rng.uniform(*aspect_range))
    height, width = resized_size(label.shape, short_side)
    scaled_height = max(1, int(height * scale / stretch))
    scaled_width = max(1, int(width * scale * stretch))
    top, first_row, num_rows = _place(scaled_height, crop_size[0], rng)
    left, first_column, num_columns = _place(scaled_width, crop_size[1], rng)
    flip = rng.random() < flip_rate
    shift = int(rng.integers(-brightness, brightness, endpoint=True))
    color_rng, class_rng = rng.spawn(2)
    if class_rng.random() < class_uniform_rate and (place := _any_class(label, class_rng)):
        row, column = (np.array(place) + 0.5) / label.shape * (scaled_height, scaled_width)
        first_row = _containing(int(row), scaled_height, num_rows, class_rng)
        first_column = _containing(int(column), scaled_width, num_columns, class_rng)

    scaled, first = (scaled_height, scaled_width), (first_row, first_column)
    pixels = _crop_resized(image, scaled, first, (num_rows, num_columns))
    # Pixel centres of the view -> pixel centres of the label.
    step_y, step_x = np.divide(label.shape, scaled)
    start_y, start_x = (first_row + 0.5) * step_y - 0.5, (first_column + 0.5) * step_x - 0.5
    if flip:
        pixels = cv2.flip(pixels, 1)
        start_x, step_x = start_x + (num_columns - 1) * step_x, -step_x
    matrix = np.array([[step_x, 0, start_x], [0, step_y, start_y]])
    classes = _nearest(label, matrix, (num_rows, num_columns))
    pixels = _brighten(pixels, shift)
    if color_distortion > 0:
        pixels = distort_colors(pixels, color_rng, strength=color_distortion)
    if (num_rows, num_columns) == crop_size:
        return pixels, classes

    view = np.s_[top : top + num_rows, left : left + num_columns]
    image_crop = np.full((*crop_size, 3), pad_color, np.uint8)
    label_crop = np.full(crop_size, IGNORE_LABEL, np.uint8)
    image_crop[view], label_crop[view] = pixels, classes
    return image_crop, label_crop


def distort_colors(image: Image, rng: np.random.Generator, *, strength: float) -> Image:
    """Photometric distortion of SSD (Liu et al., ECCV 2016), as in mmsegmentation.

    Each of four changes is made with probability 1/2, with u uniform in -strength..strength:

        brightness  v <- v + 32 u             contrast    v <- v (1 + u / 2)
        saturation  S <- S (1 + u / 2)        hue         H <- H + 36 u degrees

    Brightness comes first, and contrast, by the toss of a coin, before or after S and H of HSV.
    Strength 1 is SSD's; 0 gives the image back.
    """
    made, early = rng.random(4) < 0.5, rng.random() < 0.5
    brightness, contrast, saturation, hue = rng.uniform(-strength, strength, 4) * made
    levels = np.arange(256)
    brighter = _to_levels(levels + 32 * brightness)
    stretch = 1 + contrast / 2
    image = cv2.LUT(image, _to_levels(brighter * stretch) if early else brighter)
    if saturation or hue:
        # OpenCV keeps H in steps of 2 degrees, 0..179.
        tables = (levels + round(18 * hue)) % 180, levels * (1 + saturation / 2), levels
        table = _to_levels(np.stack(tables, axis=-1)[None])
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if early else cv2.LUT(image, _to_levels(levels * stretch))


def resized_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter one made `short_side`; 0 keeps the size."""
    if short_side == 0:
        return size
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def padded_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width), each rounded up to a multiple."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def too_large(size: tuple[int, int], short_side: int, pad_multiple: int) -> str:
    """Why an image of (height, width) cannot be evaluated or predicted; empty: it can.

    What is refused when it is read, more than `MAX_PIXELS`, is refused when resizing makes it.
    """
    resized = resized_size(size, short_side)
    padded = padded_size(resized, pad_multiple)
    if max(math.prod(padded), math.prod(padded_size(size, pad_multiple))) <= MAX_PIXELS:
        return ""
    made = f" resized by data.short_side = {short_side} to {_named(resized)}," if short_side else ""
    return (
        f"has {_named(size)} pixels,{made} padded by eval.pad_multiple = {pad_multiple} to"
        f" {_named(padded)}; at most {MAX_PIXELS:,} pixels are evaluated, cut it into tiles"
    )


def _named(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def resize_image(image: Image, size: tuple[int, int]) -> NewImage:
    """The image at (height, width), bicubic and without blur like the original's."""
    if size == image.shape[:2]:
        return image
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)


def _place(scaled: int, crop: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Along one axis: where in the crop, from where in the scaled image, how many pixels."""
    offset = int(rng.integers(0, abs(crop - scaled), endpoint=True))
    return (offset, 0, scaled) if scaled < crop else (0, offset, crop)


def _any_class(label: Label, rng: np.random.Generator) -> tuple[int, int] | None:
    """(row, column) of a random pixel of a random class of the label; None: it has no class."""
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()
    classes = np.flatnonzero(counts[:IGNORE_LABEL])
    if not classes.size:
        return None
    pixels = np.flatnonzero(label == rng.choice(classes))
    row, column = divmod(int(rng.choice(pixels)), label.shape[1])
    return row, column


def _containing(place: int, scaled: int, crop: int, rng: np.random.Generator) -> int:
    """Along one axis: where a crop may start that contains the pixel `place`."""
    earliest, latest = max(0, place - crop + 1), min(place, scaled - crop)
    return int(rng.integers(earliest, latest, endpoint=True))


def _crop_resized(
    image: Image, scaled: tuple[int, int], first: tuple[int, int], size: tuple[int, int]
) -> NewImage:
    """Of the image resized to `scaled`, bicubic, `size` pixels from `first` on, and no others made.

    All (height, width).
    """
    parts, steps, crops = [], [], []
    for axis in (0, 1):
        length, start, number = image.shape[axis], first[axis], size[axis]
        step = length / scaled[axis]
        begin, skipped = _aligned(start, step)
        end = min(length, math.ceil((start + number) * step) + 2)
        parts.append(slice(begin, end))
        steps.append(step)
        crops.append(slice(skipped, skipped + number))
    resized = cv2.resize(
        image[*parts], None, fx=1 / steps[1], fy=1 / steps[0], interpolation=cv2.INTER_CUBIC
    )
    return np.ascontiguousarray(resized[*crops])


def _aligned(first: int, step: float) -> tuple[int, int]:
    """Along one axis: where to begin to resize, and how many output pixels come before `first`.

    The edge of an output pixel must lie at the edge of the input pixel where resizing begins. Taken
    is the last such place before those that bicubic weights reach; 0, the edge of both, is one.
    """
    latest = max(0, math.floor((first + 0.5) * step - 0.5) - 1)
    places = np.arange(latest, -1, -1)
    skipped = first - places / step
    chosen = int(np.argmax(np.abs(skipped - np.rint(skipped)) <= TOLERANCE))
    return int(places[chosen]), round(skipped[chosen])


def _nearest(label: Label, matrix: np.ndarray, size: tuple[int, int]) -> NewLabel:
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(label, matrix, size[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _brighten(image: Image, shift: int) -> Image:
    return cv2.LUT(image, _to_levels(np.arange(256) + shift))


def _to_levels(values: np.ndarray) -> UInt8[np.ndarray, "..."]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
