"""Pictures and pages to look at: overlays, legends, panels, curves, evaluations."""

import html
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from jaxtyping import Integer, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from contrastseg_jax.data.audit import Example
from contrastseg_jax.data.labels import LabelMap, colorize
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.structs import IGNORE_LABEL

matplotlib.use("Agg")

SHEET_LEGEND_COLUMNS = 10
WIDE = 3  # times as wide as high: from there on pictures lie one above the other
NARROWEST = 8.0  # times as long as wide: what is narrower is drawn stretched, to be seen at all
TALLEST = 8.0  # inches of a picture
REDUCED_SIDE = 1500  # pixels: more cannot be seen in a figure
TITLE_LENGTH = 48  # letters of an example's name that fit over it


def overlay(
    image: UInt8[np.ndarray, "h w 3"], label: Integer[np.ndarray, "h w"], label_map: LabelMap
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with its classes in colour, half transparent; ignored pixels stay as they are."""
    color = colorize(label, label_map)
    labelled = (label < len(label_map.names))[:, :, None]
    # Their mean, without the bits that a sum would need: images may be as large as memory.
    return np.where(labelled, (image & color) + ((image ^ color) >> 1), image)


def save_legend(path: Path, label_map: LabelMap) -> None:
    """A picture that says which colour is which class."""
    figure = Figure(figsize=(2.4, 0.3 + 0.22 * len(label_map.names)))
    figure.legend(handles=_patches(label_map), loc="center", frameon=False)
    _save(path, figure)


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
    shown = {
        name: image,
        "label": colorize(label, label_map),
        "prediction": colorize(known, label_map),
    }
    for axes, (title, picture) in zip(figure.subplots(*stacked), shown.items(), strict=True):
        _show(axes, picture)
        axes.set_title(title)
        axes.axis("off")
    handles = [*_patches(label_map), Patch(facecolor="black", label="no class")]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    _save(path, figure)


def save_sheet(path: Path, examples: Sequence[Example], label_map: LabelMap, title: str) -> None:
    """Many labelled images, their classes in colour over them, and a legend of those that occur."""
    columns = min(5, len(examples))
    rows = -(-len(examples) // columns)
    present = np.unique(np.concatenate([np.unique(example.label) for example in examples]))
    handles = [_patches(label_map)[i] for i in present if i < len(label_map.names)]
    handles.append(Patch(facecolor="white", edgecolor="0.3", hatch="////", label="no class"))
    tallest = max(shown_aspect(*example.label.shape) for example in examples)
    legend_rows = -(-len(handles) // SHEET_LEGEND_COLUMNS)
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
        axes.set_title(example.name[-TITLE_LENGTH:], fontsize=10, parse_math=False)
    figure.suptitle(title, parse_math=False)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=SHEET_LEGEND_COLUMNS, fontsize=12
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in names: a box will do
        _save(path, figure)


def save_curves(path: Path, metrics_file: Path) -> None:
    """Losses and validation mIoU over the steps of a run, from its `metrics.jsonl`."""
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    # A contrast of 0 is one that does not count yet.
    curves = {
        key: points
        for key in ("train/cross_entropy", "train/contrast", "val/mean_iou")
        if (points := [(line["step"], line[key]) for line in lines if line.get(key)])
    }
    cells = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for axes, (key, points) in zip(cells, curves.items(), strict=False):
        axes.plot(*np.array(points).T, "." if len(points) == 1 else "-")
        axes.set_title(key)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    _save(path, figure)


def score_rows(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores of an evaluation by the names to print."""
    rows = {"mean IoU": results["mean_iou"], "pixel accuracy": results["pixel_accuracy"]}
    return rows | {f"IoU {name}": value for name, value in results["iou"].items()}


def save_evaluation(folder: Path, results: Mapping[str, Any], pictures: Sequence[str]) -> None:
    """`metrics.json`, and `index.html` that shows the same numbers with the pictures."""
    write_atomically(folder / "metrics.json", to_json(dict(results)) + "\n")
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{value:.4f}</td></tr>"
        for name, value in score_rows(results).items()
    )
    images = "".join(f'<p><img src="{html.escape(name)}" width="100%"></p>' for name in pictures)
    title = html.escape(f"{results['data']} {results['split']}, step {results['step']}")
    write_atomically(
        folder / "index.html",
        f"<!doctype html><meta charset=utf-8><title>{title}</title>"
        "<style>body{font:15px sans-serif;max-width:1100px;margin:2em auto}td{padding:2px 1em}"
        f"</style><h1>{title}</h1><table>{rows}</table>{images}",
    )


def shown_aspect(height: int, width: int) -> float:
    """Height over width of a picture as it is drawn."""
    return min(max(height / width, 1 / NARROWEST), NARROWEST)


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


def _save(path: Path, figure: Figure) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())


def _patches(label_map: LabelMap) -> list[Patch]:
    return [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*color), edgecolor="0.5", label=name)
        for name, color in zip(label_map.names, label_map.palette, strict=True)
    ]
