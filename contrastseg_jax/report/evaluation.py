"""The HTML page and the JSON of an evaluation."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib

from contrastseg_jax.errors import best_effort
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.ops.iou import class_iou, mean_over_classes, pixel_accuracy
from contrastseg_jax.report.image_counts import ImageCounts
from contrastseg_jax.report.page import html_page, html_picture, html_table, html_text

matplotlib.use("Agg")


# Scores by their names in metrics.json, and as tables call them: of a split, and of a class.
OF_SPLIT = {
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "mean_dice": "mean Dice",
    "mean_boundary_iou": "mean boundary IoU",
    "mean_boundary_f_score": "mean boundary F-score",
}
OF_CLASS = {
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "dice": "Dice",
    "boundary_iou": "boundary IoU",
    "boundary_f_score": "boundary F-score",
}


def summary(results: Mapping[str, Any]) -> str:
    """The scores of a split in a line."""
    return ", ".join(f"{title} {results[k]:.4f}" for k, title in OF_SPLIT.items() if k in results)


def class_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A table of the scores of each class, with a header; empty for what a class does not have."""
    columns = {title: results[name] for name, title in OF_CLASS.items() if name in results}
    rows = [
        (name, *(_number(column[name]) for column in columns.values())) for name in results["iou"]
    ]
    return [("class", *columns), *rows]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def save_image_scores(folder: Path, counts: ImageCounts) -> None:
    """Write `per_image.csv`: pixel accuracy, mean IoU and the IoU of each class of every image."""
    iou = class_iou(counts.intersection, counts.labelled, counts.predicted)
    means = mean_over_classes(iou), pixel_accuracy(counts.intersection, counts.labelled)
    rows = [
        (name, *map(_number, values))
        for name, *values in zip(counts.image_names, *means, *iou.T, strict=True)
    ]
    header = ("image", "mean IoU", "pixel accuracy", *counts.class_names)
    _save_csv(folder / "per_image.csv", [header, *rows])


def _save_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with best_effort(str(path)):
        write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def save_evaluation(
    folder: Path, results: Mapping[str, Any], pictures: Sequence[str], notes: Sequence[str] = ()
) -> None:
    """Write `metrics.json`, and the same numbers to `per_class.csv` and `index.html`.

    The page also has notes and the pictures.
    """
    write_atomically(folder / "metrics.json", to_json(dict(results)) + "\n")
    header, *classes = class_rows(results)
    _save_csv(
        folder / "per_class.csv",
        [header, *(["" if cell == "-" else cell for cell in row] for row in classes)],
    )
    scores = [(name, _number(results[k])) for k, name in OF_SPLIT.items() if k in results]
    page = html_page(
        f"{results['data']} {results['split']}, step {results['step']}",
        [
            html_table(("score", "value"), scores),
            html_table(header, classes),
            *(f"<p>{html_text(note)}</p>" for note in notes),
            *(html_picture(quote(name), "image, label and prediction") for name in pictures),
        ],
    )
    with best_effort(str(folder / "index.html")):
        write_atomically(folder / "index.html", page)
