"""Labelled images to look at: overlays, legends, panels, sheets."""

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
from contrastseg_jax.data.labels import LabelMap, colorize
from contrastseg_jax.files import write_atomically
from contrastseg_jax.structs import IGNORE_LABEL

SHEET_LEGEND_COLUMNS = 2  # beneath each column of examples
WIDE = 3  # times as wide as high: from there on pictures lie one above the other
NARROWEST = 8.0  # times as long as wide: what is narrower is drawn stretched, to be seen at all
TALLEST = 8.0  # inches of a picture
REDUCED_SIDE = 1500  # pixels: more cannot be seen in a figure
TITLE_LENGTH = 48  # letters of a name that fit
# Not as a matplotlibrc of the user's may say: text.usetex would read names as LaTeX.
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
    """A picture that says which colour is which class."""
    names = label_map.names
    width = max(2.4, 0.8 + 0.11 * max(len(shortened(name)) for name in names))
    figure = Figure(figsize=(width, 0.3 + 0.22 * len(names)))
    _legend(figure, _patches(label_map), names, loc="center", frameon=False)
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
    """Image, label and prediction over a legend; pixels without a class are black.

    Side by side, wide ones one above the other, and none larger than it can be seen.
    """
    h, w = image.shape[:2]
    columns = min(len(label_map.names) + 1, 9)
    rows = -(-(len(label_map.names) + 1) // columns)
    width = 12.0
    stacked = (3, 1) if w > WIDE * h else (1, 3)
    height = stacked[0] * min(width / stacked[1] * shown_aspect(h, w), TALLEST)
    figure = Figure(figsize=(width, height + 0.2 * stacked[0] + 0.4 + 0.25 * rows))
    figure.set_layout_engine("constrained")
    image, label, prediction = (reduced(x.astype(np.uint8)) for x in (image, label, prediction))
    known = np.where(label < len(label_map.names), prediction, label)
    shown = [
        (name, image),
        ("label", colorize(label, label_map)),
        ("prediction", colorize(known, label_map)),
    ]
    for axes, (title, picture) in zip(figure.subplots(*stacked), shown, strict=True):
        _show(axes, picture)
        axes.set_title(shortened(title), parse_math=False)
        axes.axis("off")
    handles = [*_patches(label_map), Patch(facecolor="black")]
    names = [*label_map.names, "no class"]
    _legend(figure, handles, names, loc="outside lower center", ncols=columns)
    save_figure(path, figure)


@plain_style
def save_sheet(path: Path, examples: Sequence[Example], label_map: LabelMap, title: str) -> None:
    """Many labelled images, their classes in colour over them, and a legend of those that occur."""
    columns = min(5, len(examples))
    rows = -(-len(examples) // columns)
    present = np.unique(np.concatenate([np.unique(example.label) for example in examples]))
    occurring = [i for i in present if i < len(label_map.names)]
    handles = [_patches(label_map)[i] for i in occurring]
    handles.append(Patch(facecolor="white", edgecolor="0.3", hatch="////"))
    names = [*(label_map.names[i] for i in occurring), "no class"]
    tallest = max(shown_aspect(*example.label.shape) for example in examples)
    legend_columns = SHEET_LEGEND_COLUMNS * columns
    legend_rows = -(-len(handles) // legend_columns)
    side = 4.0  # inches
    figure = Figure(
        figsize=(columns * side, rows * (side * min(tallest, 1.5) + 0.3) + 0.6 + 0.3 * legend_rows),
        layout="constrained",
    )
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells:
        axes.axis("off")
    for axes, example in zip(cells, examples, strict=False):
        _show(axes, _hatched(overlay(example.image, example.label, label_map), example.label))
        axes.set_title(shortened(example.name), fontsize=10, parse_math=False)
    figure.suptitle(shortened(title, 200), parse_math=False)
    _legend(
        *(figure, handles, names),
        loc="outside lower center",
        ncols=legend_columns,
        fontsize=12,
    )
    save_figure(path, figure)


def shown_aspect(height: int, width: int) -> float:
    """Height over width of a picture as it is drawn."""
    return float(min(max(height / width, 1 / NARROWEST), NARROWEST))


def reduced(picture: UInt8[np.ndarray, "h w ..."]) -> UInt8[np.ndarray, "h2 w2 ..."]:
    """A picture, or class ids, with as many pixels as can be seen; a narrow side stays as it is."""
    height, width = picture.shape[:2]
    scale = min(1, REDUCED_SIDE / max(height, width))
    size = [
        max(round(side * scale), min(side, round(REDUCED_SIDE / NARROWEST)))
        for side in (width, height)
    ]
    how = cv2.INTER_AREA if picture.ndim == 3 else cv2.INTER_NEAREST_EXACT
    return picture if scale == 1 else cv2.resize(picture, size, interpolation=how)


def _show(axes: Axes, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    axes.imshow(picture, aspect="auto")
    axes.set_box_aspect(shown_aspect(*picture.shape[:2]))


def _hatched(
    picture: UInt8[np.ndarray, "h w 3"], label: Integer[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with diagonal lines where there is no class."""
    rows, columns = np.indices(label.shape)
    lines = ((rows + columns) % 8 < 2) & (label == IGNORE_LABEL)
    return np.where(lines[:, :, None], np.uint8(255), picture)


def shortened(name: str, length: int = TITLE_LENGTH) -> str:
    """A name on one line: both its ends, where it is longer than `length` letters."""
    name = printable(name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def printable(name: str) -> str:
    """The name without what no font and no page has: control characters, lone surrogates."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name
    )


def _legend(figure: Figure, handles: list[Patch], names: Sequence[str], **settings: Any) -> None:
    """A legend of any names: given as labels, those that begin with _ would be left out."""
    legend = figure.legend(handles=handles, labels=[""] * len(handles), **settings)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=shortened(name), parse_math=False)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font lacks: a box will do
        figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())


def _patches(label_map: LabelMap) -> list[Patch]:
    return [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*color), edgecolor="0.5")
        for color in label_map.palette[: len(label_map.names)]
    ]
