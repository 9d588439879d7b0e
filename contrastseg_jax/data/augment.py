"""Training augmentation: scale, aspect, crop and flip in one resampling of the crop alone.

The distribution is the original's (lib/datasets/tools/cv2_aug_transforms.py: resize, random_resize,
random_crop, random_hflip, random_brightness, then padding at a random offset), without ever making
the resized images. Like the original's bicubic resizes it does not blur before it shrinks.

What the original does not have is off by default: distorted colours, crops around rare classes,
blur, erasing, mixing. Each draws from a generator of its own, so that switching one on leaves the
draws of all others as they are.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.preprocess import Example, Size, pad, resized_size
from contrastseg_jax.data.spec import Color
from contrastseg_jax.structs import IGNORE_LABEL

Image = UInt8[np.ndarray, "h w 3"]
Label = UInt8[np.ndarray, "h w"]
NewImage = UInt8[np.ndarray, "h2 w2 3"]
NewLabel = UInt8[np.ndarray, "h2 w2"]

BLUR_SIGMAS = (0.1, 2.0)  # pixels, as SimCLR (Chen et al., ICML 2020, appendix A)
ERASED_SHARES = (0.02, 0.4)  # of the image; these two as Zhong et al., AAAI 2020, section 4
ERASED_ASPECTS = (0.3, 1 / 0.3)  # height over width
TOLERANCE = 0.01  # pixels by which a crop may lie beside that of the whole image, resized


@dataclass(frozen=True)
class Augmentation:
    """The distribution of training views: the settings `augment.*` of the config."""

    crop_size: Size  # of a view
    scale_range: tuple[float, float]  # bounds of the scale s of both sides
    aspect_range: tuple[float, float]  # bounds of a: width times s * sqrt(a), height s / sqrt(a)
    flip_rate: float  # share of views mirrored left to right
    brightness: int  # largest shift of all channels, either way, in grey levels
    color_distortion: float  # strength of `distort_colors`; 0: none
    # Share of crops that hold a pixel of a class drawn uniformly from those in the label, so that
    # rare classes are seen more often.
    class_uniform_rate: float
    blur_rate: float  # share of views that `blur` blurs
    erase_rate: float  # share of views from which `erase` takes a rectangle
    class_mix_rate: float  # share of views into which `mix_classes` pastes parts of another


@dataclass(frozen=True)
class View:
    """Which rows and columns of the scaled image are shown, and where they lie in the crop."""

    scaled_size: Size  # of the whole image
    start: tuple[int, int]  # first row and column that are shown
    size: Size  # number of rows and columns: the crop's, or all where the image is smaller
    offset: tuple[int, int]  # row and column of the crop where they begin; the rest is padding
    flip: bool


def augment(
    example: Example,
    rng: np.random.Generator,
    augmentation: Augmentation,
    *,
    short_side: int,
    pad_color: Color,
) -> tuple[NewImage, NewLabel]:
    """A random view of an image and the same view of its label.

    The image is read as far as the view reaches. The result is a function of the generator.

    Args:
        example: an image, and a label of its size.
        rng: the example's own.
        augmentation: the distribution of views.
        short_side: length of the shorter side before all else; 0 keeps the size.
        pad_color: RGB where a scaled image is smaller than the crop, and where it is erased;
            IGNORE_LABEL in the label.
    """
    color_rng, class_rng, blur_rng, erase_rng = rng.spawn(4)
    label = example.label
    view = _draw_view(resized_size(label.shape, short_side), rng, augmentation)
    shift = int(rng.integers(-augmentation.brightness, augmentation.brightness, endpoint=True))
    if class_rng.random() < augmentation.class_uniform_rate:
        view = _move_to_random_class(view, label, class_rng)

    pixels = _shift_brightness(_crop_image(example, view), shift)
    if augmentation.color_distortion > 0:
        pixels = distort_colors(pixels, color_rng, strength=augmentation.color_distortion)
    if blur_rng.random() < augmentation.blur_rate:
        pixels = blur(pixels, blur_rng)
    label = _crop_label(label, view)
    if erase_rng.random() < augmentation.erase_rate:
        pixels, label = erase(pixels, label, erase_rng, color=pad_color)
    return (
        pad(pixels, augmentation.crop_size, pad_color, offset=view.offset),
        pad(label, augmentation.crop_size, IGNORE_LABEL, offset=view.offset),
    )


def distort_colors(image: Image, rng: np.random.Generator, *, strength: float) -> Image:
    """Photometric distortion of SSD (Liu et al., ECCV 2016), as in mmsegmentation.

    Each of four changes is made with probability 1/2, with u uniform in -strength..strength:

        brightness  v <- v + 32 u             contrast    v <- v (1 + u / 2)
        saturation  S <- S (1 + u / 2)        hue         H <- H + 36 u degrees

    Brightness comes first; contrast comes before or after S and H of HSV, with equal probability.
    Strength 1 is SSD's; 0 returns the image unchanged.
    """
    applied, contrast_first = rng.random(4) < 0.5, rng.random() < 0.5
    brightness, contrast, saturation, hue = rng.uniform(-strength, strength, 4) * applied
    levels = np.arange(256)
    brighter = _to_levels(levels + 32 * brightness)
    stretch = 1 + contrast / 2
    image = cv2.LUT(image, _to_levels(brighter * stretch) if contrast_first else brighter)
    if saturation or hue:
        # OpenCV keeps H in steps of 2 degrees, 0..179.
        tables = (levels + round(18 * hue)) % 180, levels * (1 + saturation / 2), levels
        table = _to_levels(np.stack(tables, axis=-1)[None])
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else cv2.LUT(image, _to_levels(levels * stretch))


def blur(image: Image, rng: np.random.Generator) -> Image:
    """Gaussian blur as in SimCLR: its sigma is uniform in BLUR_SIGMAS, borders are mirrored."""
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(*BLUR_SIGMAS))


def erase(
    image: Image, label: Label, rng: np.random.Generator, *, color: Color
) -> tuple[Image, Label]:
    """Random erasing (Zhong et al., AAAI 2020, algorithm 1): a rectangle of one colour.

    Its share of the image and its height over its width are uniform in ERASED_SHARES and
    ERASED_ASPECTS; a side longer than the image's is cut to that, where the paper draws again. Its
    label is IGNORE_LABEL: nothing there shows the class, so it is neither learnt nor contrasted.
    """
    area = rng.uniform(*ERASED_SHARES) * label.size
    aspect = rng.uniform(*ERASED_ASPECTS)
    sides = math.sqrt(area * aspect), math.sqrt(area / aspect)
    erased = []
    for length, side in zip(label.shape, sides, strict=True):
        number = min(length, max(1, round(side)))
        start = int(rng.integers(0, length - number, endpoint=True))
        erased.append(slice(start, start + number))
    image, label = image.copy(), label.copy()
    image[*erased], label[*erased] = color, IGNORE_LABEL
    return image, label


def mix_classes(
    image: Image, label: Label, other: Image, other_label: Label, rng: np.random.Generator
) -> tuple[Image, Label]:
    """ClassMix (Olsson et al., WACV 2021) of labelled views of one size: pastes half the classes.

    Of the classes in `other_label` half, rounded down, are drawn; their pixels and labels replace
    those of the first view, and all else of it stays.
    """
    classes = np.unique(other_label[other_label != IGNORE_LABEL])
    drawn = rng.choice(classes, len(classes) // 2, replace=False)
    pasted = np.isin(other_label, drawn)
    return np.where(pasted[..., None], other, image), np.where(pasted, other_label, label)


def _draw_view(size: Size, rng: np.random.Generator, augmentation: Augmentation) -> View:
    """A view of an image of `size`."""
    scale = rng.uniform(*augmentation.scale_range)
    stretch = np.sqrt(rng.uniform(*augmentation.aspect_range))
    scaled_height = max(1, int(size[0] * scale / stretch))
    scaled_width = max(1, int(size[1] * scale * stretch))
    top, first_row, num_rows = _draw_crop(scaled_height, augmentation.crop_size[0], rng)
    left, first_column, num_columns = _draw_crop(scaled_width, augmentation.crop_size[1], rng)
    return View(
        scaled_size=(scaled_height, scaled_width),
        start=(first_row, first_column),
        size=(num_rows, num_columns),
        offset=(top, left),
        flip=rng.random() < augmentation.flip_rate,
    )


def _draw_crop(scaled: int, crop: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Along one axis: offset in the crop, start in the scaled image, number of pixels."""
    offset = int(rng.integers(0, abs(crop - scaled), endpoint=True))
    return (offset, 0, scaled) if scaled < crop else (0, offset, crop)


def _move_to_random_class(view: View, label: Label, rng: np.random.Generator) -> View:
    """The view moved to a random place that holds a random pixel of a random class.

    A label without any class leaves it where it is.
    """
    pixel = _draw_class_pixel(label, rng)
    if pixel is None:
        return view
    row, column = (np.array(pixel) + 0.5) / label.shape * view.scaled_size
    start = (
        _draw_start(int(row), view.scaled_size[0], view.size[0], rng),
        _draw_start(int(column), view.scaled_size[1], view.size[1], rng),
    )
    return replace(view, start=start)


def _draw_class_pixel(label: Label, rng: np.random.Generator) -> tuple[int, int] | None:
    """(row, column) of a random pixel of a random class of the label; None: it has no class."""
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()
    classes = np.flatnonzero(counts[:IGNORE_LABEL])
    if not classes.size:
        return None
    pixels = np.flatnonzero(label == rng.choice(classes))
    row, column = divmod(int(rng.choice(pixels)), label.shape[1])
    return row, column


def _draw_start(pixel: int, scaled: int, crop: int, rng: np.random.Generator) -> int:
    """Along one axis: a random start of a crop that contains `pixel`."""
    earliest, latest = max(0, pixel - crop + 1), min(pixel, scaled - crop)
    return int(rng.integers(earliest, latest, endpoint=True))


def _crop_image(example: Example, view: View) -> NewImage:
    """The view of an image resized to the scaled size, bicubic; only the part shown is resized."""
    inputs, steps, outputs = [], [], []
    for axis, length in enumerate(example.label.shape):
        start, number = view.start[axis], view.size[axis]
        step = length / view.scaled_size[axis]
        begin, skipped = _aligned(start, step)
        end = min(length, math.ceil((start + number) * step) + 2)
        inputs.append(slice(begin, end))
        steps.append(step)
        outputs.append(slice(skipped, skipped + number))
    image = example.read_image(inputs[0].stop)
    resized = cv2.resize(
        image[*inputs], None, fx=1 / steps[1], fy=1 / steps[0], interpolation=cv2.INTER_CUBIC
    )
    crop = resized[*outputs]
    return cv2.flip(crop, 1) if view.flip else np.ascontiguousarray(crop)


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


def _crop_label(label: Label, view: View) -> NewLabel:
    """The view of a label; each pixel has the class of the nearest one."""
    # From pixel centres of the view to pixel centres of the label.
    step_y, step_x = np.divide(label.shape, view.scaled_size)
    start_y, start_x = (view.start[0] + 0.5) * step_y - 0.5, (view.start[1] + 0.5) * step_x - 0.5
    if view.flip:
        start_x, step_x = start_x + (view.size[1] - 1) * step_x, -step_x
    matrix = np.array([[step_x, 0, start_x], [0, step_y, start_y]])
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    size = view.size[::-1]
    return cv2.warpAffine(label, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _shift_brightness(image: Image, shift: int) -> Image:
    return cv2.LUT(image, _to_levels(np.arange(256) + shift))


def _to_levels(values: np.ndarray) -> UInt8[np.ndarray, "..."]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
