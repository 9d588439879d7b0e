"""Pictures and pages to look at: overlays, legends, panels, curves, evaluations."""

import html
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
import numpy as np
from jaxtyping import Integer, UInt8
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from contrastseg_jax.data.audit import Example
from contrastseg_jax.data.labels import LabelMap, colorize
from contrastseg_jax.errors import best_effort
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.structs import IGNORE_LABEL

matplotlib.use("Agg")

SHEET_LEGEND_COLUMNS = 10
TITLE_LENGTH = 48  # letters of a name that fit
# Not as a matplotlibrc of the user's may say: text.usetex would read names as LaTeX.
plain_style = style.context("default")


def overlay(
    image: UInt8[np.ndarray, "h w 3"], label: Integer[np.ndarray, "h w"], label_map: LabelMap
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with its classes in colour, half transparent; ignored pixels stay as they are."""
    color = colorize(label, label_map).astype(np.uint16)
    labelled = (label < len(label_map.names))[:, :, None]
    return np.where(labelled, (image + color) // 2, image).astype(np.uint8)


@plain_style
def save_legend(path: Path, label_map: LabelMap) -> None:
    """A picture that says which colour is which class."""
    names = label_map.names
    width = max(2.4, 0.8 + 0.11 * max(len(shortened(name)) for name in names))
    figure = Figure(figsize=(width, 0.3 + 0.22 * len(names)))
    _legend(figure, _patches(label_map), names, loc="center", frameon=False)
    _save(path, figure)


@plain_style
def save_panel(
    path: Path,
    image: UInt8[np.ndarray, "h w 3"],
    label: Integer[np.ndarray, "h w"],
    prediction: Integer[np.ndarray, "h w"],
    label_map: LabelMap,
    name: str,
) -> None:
    """Image, label and prediction side by side over a legend; pixels without a class are black."""
    h, w = image.shape[:2]
    columns = min(len(label_map.names) + 1, 9)
    rows = -(-(len(label_map.names) + 1) // columns)
    width = 12.0
    figure = Figure(figsize=(width, width * h / (3 * w) + 0.6 + 0.25 * rows), layout="constrained")
    known = np.where(label < len(label_map.names), prediction, label)
    shown = [
        (name, image),
        ("label", colorize(label, label_map)),
        ("prediction", colorize(known, label_map)),
    ]
    for axes, (title, picture) in zip(figure.subplots(1, 3), shown, strict=True):
        axes.imshow(picture)
        axes.set_title(shortened(title), parse_math=False)
        axes.axis("off")
    handles = [*_patches(label_map), Patch(facecolor="black")]
    names = [*label_map.names, "no class"]
    _legend(figure, handles, names, loc="outside lower center", ncols=columns)
    _save(path, figure)


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
    tallest = max(example.label.shape[0] / example.label.shape[1] for example in examples)
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
        axes.imshow(_hatched(overlay(example.image, example.label, label_map), example.label))
        axes.set_title(shortened(example.name), fontsize=10, parse_math=False)
    figure.suptitle(shortened(title, 200), parse_math=False)
    _legend(
        *(figure, handles, names),
        loc="outside lower center",
        ncols=SHEET_LEGEND_COLUMNS,
        fontsize=12,
    )
    _save(path, figure)


@plain_style
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
        f"<tr><td>{html.escape(_printable(name))}</td><td>{value:.4f}</td></tr>"
        for name, value in score_rows(results).items()
    )
    images = "".join(f'<p><img src="{quote(name)}" width="100%"></p>' for name in pictures)
    title = html.escape(f"{results['data']} {results['split']}, step {results['step']}")
    page = (
        f"<!doctype html><meta charset=utf-8><title>{title}</title>"
        "<style>body{font:15px sans-serif;max-width:1100px;margin:2em auto}td{padding:2px 1em}"
        f"</style><h1>{title}</h1><table>{rows}</table>{images}"
    )
    with best_effort(str(folder / "index.html")):
        write_atomically(folder / "index.html", page)


def _hatched(
    picture: UInt8[np.ndarray, "h w 3"], label: Integer[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with diagonal lines where there is no class."""
    rows, columns = np.indices(label.shape)
    lines = ((rows + columns) % 8 < 2) & (label == IGNORE_LABEL)
    return np.where(lines[:, :, None], np.uint8(255), picture)


def shortened(name: str, length: int = TITLE_LENGTH) -> str:
    """A name on one line: both its ends, where it is longer than `length` letters."""
    name = _printable(name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def _printable(name: str) -> str:
    """The name without what no font and no page has: control characters, lone surrogates."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name
    )


def _legend(figure: Figure, handles: list[Patch], names: Sequence[str], **settings: Any) -> None:
    """A legend of any names: given as labels, those that begin with _ would be left out."""
    legend = figure.legend(handles=handles, labels=[""] * len(handles), **settings)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=shortened(name), parse_math=False)


def _save(path: Path, figure: Figure) -> None:
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
