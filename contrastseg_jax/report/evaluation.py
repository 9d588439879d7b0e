"""The HTML page and the JSON of an evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib

from contrastseg_jax.errors import best_effort
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.report.page import html_page, html_picture, html_table, html_text

matplotlib.use("Agg")


def score_rows(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores of an evaluation by display name."""
    rows = {"mean IoU": results["mean_iou"], "pixel accuracy": results["pixel_accuracy"]}
    return rows | {f"IoU {name}": value for name, value in results["iou"].items()}


def save_evaluation(
    folder: Path, results: Mapping[str, Any], pictures: Sequence[str], notes: Sequence[str] = ()
) -> None:
    """Write `metrics.json`, and `index.html` with the same numbers, notes and the pictures."""
    write_atomically(folder / "metrics.json", to_json(dict(results)) + "\n")
    scores = [(name, f"{value:.4f}") for name, value in score_rows(results).items()]
    page = html_page(
        f"{results['data']} {results['split']}, step {results['step']}",
        [
            html_table(("score", "value"), scores),
            *(f"<p>{html_text(note)}</p>" for note in notes),
            *(html_picture(quote(name), "image, label and prediction") for name in pictures),
        ],
    )
    with best_effort(str(folder / "index.html")):
        write_atomically(folder / "index.html", page)
