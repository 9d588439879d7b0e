"""Label maps: from mask values to class ids and back, names and colours of classes."""

import functools

import cv2
import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt8

from contrastseg_jax.data.spec import Color, LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL
from contrastseg_jax.text import display_width, ljust

TABLE_WIDTH = 98  # columns of a table in the log
MAX_CLASSES = 255

BACKGROUNDS = (0, 128, 255)  # grey levels over which half-transparent colours must differ
COLORS: tuple[Color, ...] = (
    (255, 15, 0),
    (0, 255, 0),
    (0, 0, 255),
    (0, 90, 105),
    (240, 135, 255),
    (225, 255, 165),
    (255, 255, 0),
    (15, 255, 255),
    (105, 60, 0),
    (255, 150, 0),
    (0, 120, 255),
    (255, 0, 255),
    (0, 255, 150),
    (0, 90, 0),
    (135, 0, 45),
    (90, 0, 165),
    (0, 0, 75),
    (255, 150, 150),
    (255, 0, 150),
    (180, 210, 255),
    (105, 180, 0),
)


def to_train_ids(
    mask: UInt8[np.ndarray, "h w"], label_map: LabelMap, name: str
) -> UInt8[np.ndarray, "h w"]:
    """Class ids of the pixel values of a mask.

    Args:
        mask: pixel values as stored.
        label_map: what they mean.
        name: what an error calls the mask.

    Raises:
        InputError: the mask holds a value that the label map does not know.
    """
    is_unknown = np.ones(256, np.uint8)
    is_unknown[list(label_map.train_ids)] = 0
    if cv2.LUT(mask, is_unknown).any():
        unknown = unknown_values(value_counts(mask), label_map)
        raise InputError(
            f"{name}: unknown mask value(s) {_compact_ranges(list(unknown))} in"
            f" {sum(unknown.values())} of {mask.size} pixels;"
            f" allowed: {_compact_ranges(sorted(label_map.train_ids))}"
        )
    return cv2.LUT(mask, train_id_table(label_map))


def value_counts(mask: UInt8[np.ndarray, "h w"]) -> Int64[np.ndarray, "256"]:
    """How many pixels have each value."""
    return np.bincount(mask.ravel(), minlength=256)


def unknown_values(counts: Int64[np.ndarray, "256"], label_map: LabelMap) -> dict[int, int]:
    """Number of pixels of each value that occurs but is not in the label map, sorted."""
    present = np.flatnonzero(counts).tolist()
    return {value: int(counts[value]) for value in present if value not in label_map.train_ids}


def train_id_table(label_map: LabelMap) -> UInt8[np.ndarray, "256"]:
    """Class id of each pixel value; IGNORE_LABEL for unknown ones as well."""
    table = np.full(256, IGNORE_LABEL, np.uint8)
    table[list(label_map.train_ids)] = list(label_map.train_ids.values())
    return table


def to_mask_values(
    label: UInt8[np.ndarray, "h w"], label_map: LabelMap
) -> UInt8[np.ndarray, "h w"]:
    """The mask values of class ids; the lowest, where several values mean a class."""
    table = np.full(256, IGNORE_LABEL, np.uint8)
    for value in sorted(label_map.train_ids, reverse=True):
        table[label_map.train_ids[value]] = value
    return table[label]


def label_table(label_map: LabelMap) -> str:
    """Every class, for the log: its mask values, id, value in predicted masks, and name.

    Several classes share a line.
    """
    mask_values = {class_id: [] for class_id in (*range(len(label_map.names)), IGNORE_LABEL)}
    for value in sorted(label_map.train_ids):
        mask_values[label_map.train_ids[value]].append(value)
    ignored = _compact_ranges(mask_values.pop(IGNORE_LABEL)) or "none"
    predicted = to_mask_values(np.array([[*mask_values]], np.uint8), label_map)[0]
    cells = [
        f"{_compact_ranges(values)}->{class_id}->{predicted[class_id]} {label_map.names[class_id]}"
        for class_id, values in mask_values.items()
    ]
    width = max(map(display_width, cells)) + 2
    columns = max(1, TABLE_WIDTH // width)
    rows = (cells[i : i + columns] for i in range(0, len(cells), columns))
    lines = ["  " + "".join(ljust(cell, width) for cell in row).rstrip() for row in rows]
    title = f"mask values -> {len(label_map.names)} class ids -> values written"
    return "\n".join([f"{title}; ignored: {ignored}", *lines])


def split_names(text: str) -> tuple[str, ...]:
    """The names in a text, separated by commas, on one line or several."""
    return tuple(name.strip() for name in text.split(","))


def default_palette(num_classes: int) -> tuple[Color, ...]:
    """Distinct colours for up to 255 classes; fewer classes have the first of them.

    Distances are those in CIELAB, of the colours themselves and blended half over black, grey and
    white. They are maximised for the 21 of `COLORS`; each further colour is as far as possible from
    all before it, and from black, which stands for no class.
    """
    return COLORS[:num_classes] if num_classes <= len(COLORS) else _more_colors()[:num_classes]


def colorize(label: Integer[np.ndarray, "h w"], label_map: LabelMap) -> UInt8[np.ndarray, "h w 3"]:
    """The label in the colours of its classes; IGNORE_LABEL is black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(label_map.palette)] = label_map.palette
    return colors[label]


@functools.cache
def _more_colors() -> tuple[Color, ...]:
    steps = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _blended_lab(grid)
    colors = list(COLORS)
    nearest = np.full(len(grid), np.inf, np.float32)  # to any colour so far
    for color in ((0, 0, 0), *COLORS):
        nearest = np.minimum(nearest, _distances(lab, color))
    while len(colors) < MAX_CLASSES:
        red, green, blue = grid[nearest.argmax()].tolist()
        colors.append((red, green, blue))
        nearest = np.minimum(nearest, _distances(lab, colors[-1]))
    return tuple(colors)


def _blended_lab(colors: Int64[np.ndarray, "n 3"]) -> Float32[np.ndarray, "4 n 3"]:
    """CIELAB of colours themselves, and blended over each background as in an overlay."""
    blended = np.stack([colors, *((colors + grey) // 2 for grey in BACKGROUNDS)])
    return cv2.cvtColor((blended / 255).astype(np.float32), cv2.COLOR_RGB2LAB)


def _distances(lab: Float32[np.ndarray, "4 n 3"], color: Color) -> Float32[np.ndarray, " n"]:
    """Squared distances of colours to one, over the background where they are closest."""
    difference = lab - _blended_lab(np.array([color]))
    return np.einsum("bnc,bnc->bn", difference, difference).min(axis=0)


def _compact_ranges(values: list[int]) -> str:
    """Sorted numbers with runs abbreviated: [0, 1, 2, 255] -> "0..2, 255"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
