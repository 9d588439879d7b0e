"""Pictures of labelled images: overlays, legends, panels of one image, sheets of many."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Integer, UInt8
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from contrastseg_jax.data.audit.statistics import Example
from contrastseg_jax.data.labels import colorize
from contrastseg_jax.data.spec import LabelMap
from contrastseg_jax.files import write_atomically
from contrastseg_jax.structs import IGNORE_LABEL

Entry = tuple[str, Any]  # of a legend: a name, and what is drawn beside it

PANEL_WIDTH = 12.0  # inches
PANEL_LEGEND_COLUMNS = 9
SHEET_COLUMNS = 5
SHEET_TILE_WIDTH = 4.0  # inches of an example
SHEET_LEGEND_COLUMNS = 2  # beneath each column of examples
WIDE = 3  # width over height above which the pictures of a panel lie one above the other
MAX_ASPECT = 8.0  # length over width; narrower pictures are stretched, to be seen at all
MAX_HEIGHT = 8.0  # inches of a picture
MAX_DRAWN_SIDE = 1500  # pixels: more cannot be seen in a figure
TITLE_LENGTH = 48  # letters of a name that fit
# Ignores the user's matplotlibrc: text.usetex would read names as LaTeX.
plain_style = style.context("default")


def overlay(
    image: UInt8[np.ndarray, "h w 3"], label: Integer[np.ndarray, "h w"], label_map: LabelMap
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with its classes in colour, half transparent; ignored pixels stay as they are."""
    color = colorize(label, label_map)
    labelled = (label < len(label_map.names))[:, :, None]
    # Their mean, without the bits that a sum would need: images may be as large as memory.
    return np.where(labelled, (image & color) + ((image ^ color) >> 1), image)


@plain_style
def save_legend(path: Path, label_map: LabelMap) -> None:
    """A picture of the classes and their colours."""
    names = label_map.names
    width = max(2.4, 0.8 + 0.11 * max(len(shortened(name)) for name in names))
    figure = Figure(figsize=(width, 0.3 + 0.22 * len(names)))
    add_legend(figure, class_entries(label_map), loc="center", frameon=False)
    save_figure(path, figure)


@plain_style
def save_panel(
    path: Path,
    image: UInt8[np.ndarray, "h w 3"],
    label: Integer[np.ndarray, "h w"],
    prediction: Integer[np.ndarray, "h w"],
    label_map: LabelMap,
    name: str,
) -> None:
    """Image, label and prediction over a legend; pixels without a class are black in both.

    They lie side by side, or one above the other where they are wide.
    """
    height, width = image.shape[:2]
    num_rows, num_columns = (3, 1) if width > WIDE * height else (1, 3)
    row_height = min(PANEL_WIDTH / num_columns * drawn_aspect(height, width), MAX_HEIGHT)
    entries = [*class_entries(label_map), ("no class", Patch(facecolor="black"))]
    legend_columns = min(len(entries), PANEL_LEGEND_COLUMNS)
    legend_height = 0.4 + 0.25 * -(-len(entries) // legend_columns)
    figure = Figure(
        figsize=(PANEL_WIDTH, num_rows * (row_height + 0.2) + legend_height), layout="constrained"
    )
    image, label, prediction = (downscaled(x.astype(np.uint8)) for x in (image, label, prediction))
    labelled = label < len(label_map.names)
    panels = [
        (name, image),
        ("label", colorize(label, label_map)),
        ("prediction", colorize(np.where(labelled, prediction, label), label_map)),
    ]
    cells = figure.subplots(num_rows, num_columns)
    for axes, (title, picture) in zip(cells, panels, strict=True):
        _draw(axes, picture)
        axes.set_title(shortened(title), parse_math=False)
        axes.axis("off")
    add_legend(figure, entries, loc="outside lower center", ncols=legend_columns)
    save_figure(path, figure)


@plain_style
def save_sheet(path: Path, examples: Sequence[Example], label_map: LabelMap, title: str) -> None:
    """Many labelled images, their classes in colour over them, and a legend of those that occur."""
    num_columns = min(SHEET_COLUMNS, len(examples))
    num_rows = -(-len(examples) // num_columns)
    tallest = max(drawn_aspect(*example.label.shape) for example in examples)
    row_height = SHEET_TILE_WIDTH * min(tallest, 1.5) + 0.3
    hatched = Patch(facecolor="white", edgecolor="0.3", hatch="////")
    entries = [*_occurring_entries(examples, label_map), ("no class", hatched)]
    legend_columns = SHEET_LEGEND_COLUMNS * num_columns
    legend_height = 0.6 + 0.3 * -(-len(entries) // legend_columns)
    figure = Figure(
        figsize=(num_columns * SHEET_TILE_WIDTH, num_rows * row_height + legend_height),
        layout="constrained",
    )
    cells = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes in cells:
        axes.axis("off")
    for axes, example in zip(cells, examples, strict=False):
        _draw(axes, _hatched(overlay(example.image, example.label, label_map), example.label))
        axes.set_title(shortened(example.name), fontsize=10, parse_math=False)
    figure.suptitle(shortened(title, 200), parse_math=False)
    add_legend(figure, entries, loc="outside lower center", ncols=legend_columns, fontsize=12)
    save_figure(path, figure)


def drawn_aspect(height: int, width: int) -> float:
    """Height over width of a picture as it is drawn."""
    return float(min(max(height / width, 1 / MAX_ASPECT), MAX_ASPECT))


def downscaled(picture: UInt8[np.ndarray, "h w ..."]) -> UInt8[np.ndarray, "h2 w2 ..."]:
    """A picture, or class ids, with no more pixels than can be seen; a narrow side keeps more."""
    height, width = picture.shape[:2]
    scale = min(1, MAX_DRAWN_SIDE / max(height, width))
    if scale == 1:
        return picture
    size = [
        max(round(side * scale), min(side, round(MAX_DRAWN_SIDE / MAX_ASPECT)))
        for side in (width, height)
    ]
    interpolation = cv2.INTER_AREA if picture.ndim == 3 else cv2.INTER_NEAREST_EXACT
    return cv2.resize(picture, size, interpolation=interpolation)


def _draw(axes: Axes, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    axes.imshow(picture, aspect="auto")
    axes.set_box_aspect(drawn_aspect(*picture.shape[:2]))


def _hatched(
    picture: UInt8[np.ndarray, "h w 3"], label: Integer[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with diagonal lines where there is no class."""
    rows, columns = np.indices(label.shape)
    lines = ((rows + columns) % 8 < 2) & (label == IGNORE_LABEL)
    return np.where(lines[:, :, None], np.uint8(255), picture)


def shortened(name: str, length: int = TITLE_LENGTH) -> str:
    """A name on one line; of one longer than `length` characters, its beginning and its end."""
    name = printable(name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def printable(name: str) -> str:
    """The name with unprintable characters replaced: control characters, lone surrogates."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name
    )


def add_legend(figure: Figure, entries: Sequence[Entry], **settings: Any) -> None:
    """A legend. Names are set afterwards, since Matplotlib leaves out labels that begin with _."""
    handles = [patch for _, patch in entries]
    legend = figure.legend(handles=handles, labels=[""] * len(handles), **settings)
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=shortened(name), parse_math=False)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG."""
    write_atomically(path, figure_png(figure))


def figure_png(figure: Figure) -> bytes:
    """The PNG of a figure."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that the font lacks: a box will do.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def class_entries(label_map: LabelMap) -> list[Entry]:
    """The legend's entries of all classes, in the order of their ids."""
    colors = ("#{:02x}{:02x}{:02x}".format(*color) for color in label_map.palette)
    patches = (Patch(facecolor=color, edgecolor="0.5") for color in colors)
    return list(zip(label_map.names, patches, strict=False))


def _occurring_entries(examples: Sequence[Example], label_map: LabelMap) -> list[Entry]:
    """The legend's entries of the classes that occur in the examples."""
    present = np.unique(np.concatenate([np.unique(example.label) for example in examples]))
    entries = class_entries(label_map)
    return [entries[class_id] for class_id in present if class_id < len(entries)]
