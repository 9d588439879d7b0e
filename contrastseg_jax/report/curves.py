"""Plots of a run's metrics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from contrastseg_jax.data.pictures import plain_style, save_figure

# Metrics by panel, several in one where they are to be compared.
PANELS = {
    "cross entropy": ("train/cross_entropy",),
    "contrast": ("train/contrast",),
    "similarity": ("train/positive_similarity", "train/negative_similarity"),
    "validation mean IoU": ("val/mean_iou",),
}


@plain_style
def save_curves(path: Path, metrics_file: Path) -> None:
    """Plot losses, similarities and validation mIoU over the steps, from `metrics.jsonl`."""
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    curves = {key: curve(lines, key) for keys in PANELS.values() for key in keys}
    panels = {
        title: [key for key in keys if curves[key]]
        for title, keys in PANELS.items()
        if any(curves[key] for key in keys)
    }
    figure = Figure(figsize=(4 * max(len(panels), 1), 3.5), layout="constrained")
    cells = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axes, (title, keys) in zip(cells, panels.items(), strict=False):
        for key in keys:
            points = curves[key]
            label = key.partition("/")[2].partition("_")[0]
            axes.plot(*np.array(points).T, "." if len(points) == 1 else "-", label=label)
        if len(keys) > 1:
            axes.legend(frameon=False)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    save_figure(path, figure)


def curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """The points (step, value) of a metric in the lines of `metrics.jsonl`; none where it is null.

    A restart makes an interval short, and a mean over few steps is noisy: such intervals are merged
    until they are as long as the longest.
    """
    longest = max((line.get("train/interval_steps", 1) for line in lines), default=1)
    found = [
        (line["step"], line[key], line.get("train/interval_steps", longest))
        for line in lines
        if line.get(key) is not None
    ]
    groups: list[list[tuple[int, float, int]]] = []
    for point in found:
        if not groups or _num_steps(groups[-1]) >= longest:
            groups.append([])
        groups[-1].append(point)
    if len(groups) > 1 and _num_steps(groups[-1]) < longest:
        groups[-2:] = [groups[-2] + groups[-1]]
    return [
        (group[-1][0], sum(v * size for _, v, size in group) / _num_steps(group))
        for group in groups
    ]


def _num_steps(intervals: Sequence[tuple[int, float, int]]) -> int:
    return sum(size for _, _, size in intervals)
