"""The picture, the JSON and the HTML page of what runs have learnt of the same pixels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from contrastseg_jax.data.pictures import (
    add_legend,
    class_entries,
    plain_style,
    save_figure,
    shortened,
)
from contrastseg_jax.data.spec import LabelMap
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.report.page import html_page, html_picture, html_table, html_text, inline

Results = Mapping[str, Any]

COLUMNS = 3  # panels side by side
PANEL_SIZE = 5.0  # inches
KINDS = {"embedding": "embeddings", "features": "features before the logits"}
SCORES = {
    "silhouette": "silhouette",
    "intra_cosine": "cosine within classes",
    "inter_cosine": "cosine between classes",
}


def save_embedding(folder: Path, results: Results, classes: LabelMap) -> None:
    """Write embedding.json with the results, embedding.png, and embedding.html with both."""
    write_atomically(folder / "embedding.json", to_json(dict(results)) + "\n")
    save_maps(folder / "embedding.png", results, classes)
    picture = (folder / "embedding.png").read_bytes()
    write_atomically(folder / "embedding.html", page(results, picture, classes))


@plain_style
def save_maps(path: Path, results: Results, classes: LabelMap) -> None:
    """Draw a panel for each run, its pixels in the colours of their classes, over a legend."""
    runs, label = results["runs"], np.array(results["pixels"]["label"])
    num_columns = min(COLUMNS, len(runs))
    num_rows = -(-len(runs) // num_columns)
    entries = [class_entries(classes)[class_id] for class_id in np.unique(label)]
    longest = max(len(shortened(name)) for name, _ in entries)
    width = PANEL_SIZE * num_columns
    legend_columns = max(1, min(len(entries), int(width / (0.6 + 0.09 * longest))))
    height = num_rows * (PANEL_SIZE + 0.7) + 0.15 + 0.22 * -(-len(entries) // legend_columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    cells = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    colors = np.array(classes.palette)[label] / 255
    for axes in cells[len(runs) :]:
        axes.axis("off")
    for axes, run in zip(cells, runs, strict=False):
        _draw_map(axes, run, colors)
    add_legend(figure, entries, loc="outside lower center", ncols=legend_columns)
    save_figure(path, figure)


def _draw_map(axes: Axes, run: Results, colors: np.ndarray) -> None:
    x, y = np.array(run["map"]).T
    # Outlined, as some classes are nearly white.
    axes.scatter(x, y, s=14, c=colors, edgecolors="0.3", linewidths=0.25)
    axes.set_box_aspect(1)
    axes.set_anchor("S")  # what is left over of the height is the title's
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.04)
    silhouette = run["scores"][run["shown"]]["silhouette"]
    lines = (
        shortened(run["name"]),
        f"{run['network']}, step {run['step']}",
        f"{KINDS[run['shown']]}, silhouette {_number(silhouette)}",
    )
    axes.set_title("\n".join(lines), fontsize=11, parse_math=False)


def score_table(results: Results) -> list[list[str]]:
    """The scores over all pixels: a row for each run and kind of vector, under a header."""
    rows = [["", *SCORES.values()]]
    for run in results["runs"]:
        for kind, scores in run["scores"].items():
            values = (_number(scores[key]) for key in SCORES)
            rows.append([f"{run['name']}, {KINDS[kind]}", *values])
    return rows


def page(results: Results, picture: bytes, classes: LabelMap) -> str:
    """The HTML page, which holds the picture itself."""
    header, *rows = score_table(results)
    parts = [
        f"<p>The same {results['num_pixels']} pixels of {results['num_images']} images in every"
        " panel, drawn at random, balanced over the classes as far as rare ones allow. Each map is"
        f" by t-SNE (perplexity {results['perplexity']:.3g}, cosine): which pixels lie together is"
        " meaningful; distances between groups and their sizes are not.</p>",
        html_picture(inline(picture), "t-SNE maps"),
        "<h2>All pixels</h2>",
        html_table(header, rows),
        "<p>Silhouette: how much nearer a pixel is to its own class than to the nearest other, from"
        " -1 to 1. Cosines: means over pairs of pixels, of one class and of two. Compare runs by"
        " the same kind of vector: embeddings are what the contrast loss trains, features before"
        " the logits are what every network has.</p>",
    ]
    for run in results["runs"]:
        for kind, scores in run["scores"].items():
            title = f"{run['name']}: {KINDS[kind]} ({run['sizes'][kind]} values)"
            header, *rows = _class_table(results, scores, classes.names)
            parts += [f"<h2>{html_text(title)}</h2>", html_table(header, rows)]
    return html_page(f"{results['data']} {results['split']}: pixel embeddings", parts)


def _class_table(results: Results, scores: Results, class_names: Sequence[str]) -> list[list[str]]:
    """The scores of each class, and its number of pixels."""
    counts = np.bincount(results["pixels"]["label"], minlength=len(class_names)).tolist()
    rows = [["class", "pixels", *SCORES.values()]]
    for name, count in zip(class_names, counts, strict=True):
        if count:
            values = (_number(scores["classes"][name][key]) for key in SCORES)
            rows.append([name, str(count), *values])
    return rows


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
