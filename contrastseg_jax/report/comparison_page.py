"""A comparison as Markdown, JSON, and a page with its pictures in it."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from contrastseg_jax.data.pictures import printable
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.report.comparison import NUM_OVERALL, ArmScores, Comparison, Difference
from contrastseg_jax.report.comparison_figures import pictures
from contrastseg_jax.report.comparison_tables import Evaluated, Table, remarks, tables, title_of
from contrastseg_jax.report.page import html_page, html_picture, html_table, html_text, inline

NAMES = ("comparison.md", "comparison.json", "comparison.html")
OVERALL_KEYS = ("mean_iou", "pixel_accuracy", "rarest_mean_iou")


def save_comparison(folder: Path, comparison: Comparison, evaluated: Evaluated) -> None:
    """Write the three files of a comparison."""
    texts = (
        markdown(comparison, evaluated),
        to_json(json_values(comparison, evaluated)) + "\n",
        page(comparison, evaluated),
    )
    for name, text in zip(NAMES, texts, strict=True):
        write_atomically(folder / name, text)


# --- Markdown and JSON ----------------------------------------------------------------------------


def markdown(comparison: Comparison, evaluated: Evaluated) -> str:
    """All tables as Markdown."""
    lines = [f"# {markdown_text(title_of(comparison, evaluated))}"]
    for text in remarks(comparison, evaluated):
        lines += ["", markdown_text(text)]
    for table in tables(comparison):
        lines += ["", f"## {markdown_text(table.title)}", "", *markdown_table(table)]
    return "\n".join([*lines, ""])


def markdown_table(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    marks = [" --- " if i < table.num_names else " ---: " for i in range(len(table.header))]
    rows = [f"| {' | '.join(map(markdown_text, row))} |" for row in (table.header, *table.rows)]
    return [rows[0], f"|{'|'.join(marks)}|", *rows[1:]]


def markdown_text(text: str) -> str:
    """The text without what Markdown would take for a cell's end, a tag or emphasis."""
    text = html.escape(printable(text), quote=False)
    return re.sub(r"[\\|*`\[]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def json_values(comparison: Comparison, evaluated: Evaluated) -> dict[str, Any]:
    """All figures, unrounded; null where there is none."""
    names = comparison.class_names
    return {
        "data": evaluated.data,
        "split": evaluated.split,
        "checkpoint": evaluated.checkpoint,
        "notes": list(evaluated.notes),
        "num_images": comparison.num_images,
        "num_resamples": comparison.num_resamples,
        "baseline": comparison.arms[0].arm.name,
        "labelled_pixels": dict(zip(names, comparison.labelled_pixels.tolist(), strict=True)),
        "rarest": [names[i] for i in comparison.rarest],
        "arms": [arm_values(arm, names) for arm in comparison.arms],
        "differences": [difference_values(d, names) for d in comparison.differences],
    }


def arm_values(scored: ArmScores, names: Sequence[str]) -> dict[str, Any]:
    """The figures of an arm."""
    arm, curve = scored.arm, scored.learning_curve
    return {
        "name": arm.name,
        "settings": {path: value for path, value in arm.settings.items()},
        "runs": list(arm.workdirs),
        "seeds": list(arm.seeds),
        "steps": list(arm.steps),
        "mean": by_score(scored.mean, names),
        "std": by_score(scored.std, names),
        "by_seed": by_score(scored.scores.T, names),
        "learning_curve": {
            "steps": curve.steps.tolist(),
            "mean": curve.mean.tolist(),
            "lowest": curve.lowest.tolist(),
            "highest": curve.highest.tolist(),
        },
    }


def difference_values(difference: Difference, names: Sequence[str]) -> dict[str, Any]:
    """The figures of a difference."""
    return {
        "arm": difference.arm.name,
        "baseline": difference.baseline.name,
        "seeds": list(difference.seeds),
        "mean": by_score(difference.mean, names),
        "by_seed": by_score(difference.differences.T, names),
        "seed_interval": by_score(difference.seed_interval.T, names),
        "image_interval": by_score(difference.image_interval.T, names),
    }


def by_score(values: Float64[np.ndarray, "q *rest"], names: Sequence[str]) -> dict[str, Any]:
    """Values by the names that `metrics.json` has for scores."""
    overall, classes = values[:NUM_OVERALL].tolist(), values[NUM_OVERALL:].tolist()
    found = dict(zip(OVERALL_KEYS, overall, strict=True))
    return found | {"iou": dict(zip(names, classes, strict=True))}


# --- The page -------------------------------------------------------------------------------------


def page(comparison: Comparison, evaluated: Evaluated) -> str:
    """All tables and pictures in one file, which needs no other."""
    overall, rest = tables(comparison)[:2], tables(comparison)[2:]
    parts = [
        *(f"<p>{html_text(text)}</p>" for text in remarks(comparison, evaluated)),
        *map(titled, overall),
        *(
            f"<h2>{html_text(title)}</h2>{html_picture(inline(png), title)}"
            for title, png in pictures(comparison).items()
        ),
        *map(titled, rest),
    ]
    return html_page(title_of(comparison, evaluated), parts)


def titled(table: Table) -> str:
    """A table with its title."""
    body = html_table(table.header, table.rows, num_names=table.num_names)
    return f"<h2>{html_text(table.title)}</h2>{body}"
