"""A comparison as Markdown, JSON, and a page with its pictures in it."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from contrastseg_jax.data.pictures import (
    add_legend,
    figure_png,
    plain_style,
    printable,
    shortened,
)
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.report.comparison import (
    NUM_OVERALL,
    ArmScores,
    Comparison,
    Difference,
)
from contrastseg_jax.text import count_of

NAMES = ("comparison.md", "comparison.json", "comparison.html")
OVERALL = ("mIoU", "pixel accuracy", "mIoU of the rarest")
OVERALL_KEYS = ("mean_iou", "pixel_accuracy", "rarest_mean_iou")
INTERVALS = ("95 % over seeds", "95 % over images")
NO_VALUE = "–"
LEGEND: dict[str, Any] = {"loc": "outside upper left", "ncols": 2, "frameon": False}
STYLE = (
    "body{font:15px sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "td,th{padding:2px 1em 2px 0;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Evaluated:
    """What all runs were evaluated on, and what to know about these runs."""

    data: str
    split: str
    checkpoint: str
    notes: tuple[str, ...]


def save_comparison(folder: Path, comparison: Comparison, evaluated: Evaluated) -> None:
    """Write the three files of a comparison."""
    texts = (
        markdown(comparison, evaluated),
        to_json(json_values(comparison, evaluated)) + "\n",
        page(comparison, evaluated),
    )
    for name, text in zip(NAMES, texts, strict=True):
        write_atomically(folder / name, text)


# --- Tables ---------------------------------------------------------------------------------------


def tables(comparison: Comparison) -> list[Table]:
    """All tables: the overall scores, the rarest classes, all classes, settings and runs."""
    everything = range(len(comparison.class_names))
    return [
        *overall_tables(comparison),
        *class_tables(comparison, comparison.rarest, "The rarest classes"),
        *class_tables(comparison, everything, "All classes"),
        settings_table(comparison),
        runs_table(comparison),
    ]


def overall_tables(comparison: Comparison) -> list[Table]:
    """The scores of each arm, and their differences from the baseline's."""
    overall = range(NUM_OVERALL)
    scores = [
        [arm.arm.name, str(len(arm.arm.seeds)), *(mean_text(arm, q) for q in overall)]
        for arm in comparison.arms
    ]
    differences = [
        [d.arm.name, OVERALL[q], str(len(d.seeds)), *difference_texts(d, q)]
        for d in comparison.differences
        for q in overall
    ]
    baseline = comparison.arms[0].arm.name
    return [
        Table("Scores, mean ± standard deviation over seeds", ("arm", "seeds", *OVERALL), scores),
        Table(
            f"Differences from {baseline}, paired by seed",
            ("arm", "score", "pairs", "difference", *INTERVALS),
            differences,
        ),
    ]


def class_tables(comparison: Comparison, classes: Sequence[int], title: str) -> list[Table]:
    """IoU of some classes in each arm, and its differences from the baseline's."""
    arms, names = comparison.arms, comparison.class_names
    share = comparison.labelled_pixels / max(1, comparison.labelled_pixels.sum())
    scores = [
        [names[i], f"{share[i]:.2%}", *(mean_text(arm, NUM_OVERALL + i) for arm in arms)]
        for i in classes
    ]
    differences = [
        [names[i], d.arm.name, *difference_texts(d, NUM_OVERALL + i)]
        for i in classes
        for d in comparison.differences
    ]
    header = ("class", "share of pixels", *(arm.arm.name for arm in arms))
    return [
        Table(f"{title}: IoU, mean ± standard deviation over seeds", header, scores),
        Table(
            f"{title}: differences from {arms[0].arm.name}, paired by seed",
            ("class", "arm", "difference", *INTERVALS),
            differences,
        ),
    ]


def settings_table(comparison: Comparison) -> Table:
    """The settings that make the arms."""
    arms = [scored.arm for scored in comparison.arms]
    rows = [[path, *(repr(arm.settings[path]) for arm in arms)] for path in arms[0].settings]
    return Table("Settings that differ", ("setting", *(arm.name for arm in arms)), rows)


def runs_table(comparison: Comparison) -> Table:
    """Every run with the step that was evaluated."""
    rows = [
        [workdir, scored.arm.name, str(seed), str(step), *(f"{x:.4f}" for x in scores[:2])]
        for scored in comparison.arms
        for workdir, seed, step, scores in zip(
            *(scored.arm.workdirs, scored.arm.seeds, scored.arm.steps, scored.scores), strict=True
        )
    ]
    return Table("Runs", ("run", "arm", "seed", "step", *OVERALL[:2]), rows)


def mean_text(arm: ArmScores, score: int) -> str:
    """A mean with its standard deviation, where they exist."""
    mean, std = arm.mean[score], arm.std[score]
    if np.isnan(mean):
        return NO_VALUE
    return f"{mean:.4f}" if np.isnan(std) else f"{mean:.4f} ± {std:.4f}"


def difference_texts(difference: Difference, score: int) -> list[str]:
    """A difference and its two intervals."""
    mean = difference.mean[score]
    intervals = difference.seed_interval[:, score], difference.image_interval[:, score]
    return [
        NO_VALUE if np.isnan(mean) else f"{mean:+.4f}",
        *(
            NO_VALUE if np.isnan(bounds).any() else "{:+.4f} to {:+.4f}".format(*bounds)
            for bounds in intervals
        ),
    ]


def title_of(comparison: Comparison, evaluated: Evaluated) -> str:
    """The headline."""
    number = count_of(len(comparison.arms), "arm")
    return f"{number} on {evaluated.data}, {evaluated.split}"


def remarks(comparison: Comparison, evaluated: Evaluated) -> list[str]:
    """How the figures are to be read, and what to know about these runs."""
    rarest = [comparison.class_names[i] for i in comparison.rarest]
    return [
        f"{count_of(comparison.num_images, 'image')}; checkpoint of each run:"
        f" {evaluated.checkpoint}. The baseline is {comparison.arms[0].arm.name}.",
        "Differences are those between runs of the same seed. The interval over seeds is Student's"
        " t, for what another seed would change; the interval over images is a bootstrap"
        f" ({comparison.num_resamples:,} resamples of the images, the same in all runs), for what"
        " other images would change. Each holds for one score: of twenty scores without any"
        " difference, one interval is expected to exclude 0.",
        f"The rarest classes, those with the fewest labelled pixels: {', '.join(rarest)}.",
        *evaluated.notes,
    ]


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
    marks = [" --- ", *[" ---: "] * (len(table.header) - 1)]
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
    title = html.escape(printable(title_of(comparison, evaluated)))
    overall, rest = tables(comparison)[:2], tables(comparison)[2:]
    texts = (html.escape(printable(text)) for text in remarks(comparison, evaluated))
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title}</h1>",
        *(f"<p>{text}</p>" for text in texts),
        *map(html_table, overall),
        *(f"<h2>{name}</h2>{inline(figure)}" for name, figure in figures(comparison)),
        *map(html_table, rest),
    ]
    return "\n".join([*parts, ""])


def html_table(table: Table) -> str:
    """A table with its title."""
    header, *rows = (
        [html.escape(printable(cell)) for cell in row] for row in (table.header, *table.rows)
    )
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{cell}</th>" for cell in header)
    title = html.escape(printable(table.title))
    return f"<h2>{title}</h2><table><tr>{head}</tr>{body}</table>"


@plain_style
def inline(figure: Figure) -> str:
    """The figure as an image of a page."""
    data = base64.b64encode(figure_png(figure)).decode()
    return f'<p><img src="data:image/png;base64,{data}"></p>'


@plain_style
def figures(comparison: Comparison) -> list[tuple[str, Figure]]:
    """The pictures with their titles."""
    title = "Differences; thick the 95 % interval over images, thin that over seeds"
    found = [(title, differences_figure(comparison))]
    if any(arm.learning_curve.steps.size for arm in comparison.arms):
        found.insert(0, ("Learning curves, mean and range over seeds", curves_figure(comparison)))
    return found


def curves_figure(comparison: Comparison) -> Figure:
    """Val mIoU against the step."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for scored in comparison.arms:
        curve = scored.learning_curve
        (line,) = axes.plot(curve.steps, curve.mean, "." if curve.steps.size == 1 else "-")
        axes.fill_between(
            curve.steps, curve.lowest, curve.highest, color=line.get_color(), alpha=0.2, lw=0
        )
    axes.set_xlabel("step")
    axes.set_ylabel("val mIoU")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    names = [scored.arm.name for scored in comparison.arms]
    add_legend(figure, [*zip(names, axes.lines, strict=True)], **LEGEND)
    return figure


def differences_figure(comparison: Comparison) -> Figure:
    """Differences from the baseline: thick lines are intervals over images, thin over seeds."""
    names = [*OVERALL, *comparison.class_names]
    rows, number = np.arange(len(names)), len(comparison.differences)
    figure = Figure(figsize=(9, 1.2 + (0.15 + 0.15 * number) * len(names)), layout="constrained")
    axes = figure.subplots()
    points = []
    for index, found in enumerate(comparison.differences):
        y = rows + (index - (number - 1) / 2) * 0.6 / number
        color = f"C{index + 1}"  # as among the learning curves
        axes.hlines(y, *found.image_interval, color=color, lw=4, alpha=0.4)
        axes.hlines(y, *found.seed_interval, color=color, lw=1)
        points += axes.plot(found.mean, y, "o", color=color, ms=4)
    axes.axvline(0, color="0.3", lw=1)
    axes.axhline(NUM_OVERALL - 0.5, color="0.8", lw=1)
    axes.set_yticks(rows, [shortened(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    baseline = shortened(comparison.arms[0].arm.name)
    axes.set_xlabel(f"difference from {baseline}", parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    arms = [found.arm.name for found in comparison.differences]
    add_legend(figure, [*zip(arms, points, strict=True)], **LEGEND)
    return figure
