"""The pictures of a comparison: learning curves, and differences with their intervals."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from contrastseg_jax.data.pictures import add_legend, figure_png, plain_style, shortened
from contrastseg_jax.report.comparison import NUM_OVERALL, Comparison
from contrastseg_jax.report.comparison_tables import OVERALL

LEGEND: dict[str, Any] = {"loc": "outside upper left", "ncols": 2, "frameon": False}


@plain_style
def pictures(comparison: Comparison) -> dict[str, bytes]:
    """The PNGs by their titles."""
    figures = {}
    if any(arm.learning_curve.steps.size for arm in comparison.arms):
        figures["Learning curves, mean and range over seeds"] = curves_figure(comparison)
    title = "Differences; thick the 95 % interval over images, thin that over seeds"
    figures[title] = differences_figure(comparison)
    return {title: figure_png(figure) for title, figure in figures.items()}


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
