"""The HTML page and the JSON of an evaluation."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib

from contrastseg_jax.data.pictures import printable
from contrastseg_jax.errors import best_effort
from contrastseg_jax.files import to_json, write_atomically

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
    rows = "".join(
        f"<tr><td>{html.escape(printable(name))}</td><td>{value:.4f}</td></tr>"
        for name, value in score_rows(results).items()
    )
    images = "".join(f'<p><img src="{quote(name)}" width="100%"></p>' for name in pictures)
    remarks = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    title = html.escape(f"{results['data']} {results['split']}, step {results['step']}")
    page = (
        f"<!doctype html><meta charset=utf-8><title>{title}</title>"
        "<style>body{font:15px sans-serif;max-width:1100px;margin:2em auto}td{padding:2px 1em}"
        f"</style><h1>{title}</h1><table>{rows}</table>{remarks}{images}"
    )
    with best_effort(str(folder / "index.html")):
        write_atomically(folder / "index.html", page)
