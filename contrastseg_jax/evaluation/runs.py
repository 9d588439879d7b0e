"""Runs to compare: read, and checked to have been evaluated alike."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contrastseg_jax.config.rules import decides_evaluation
from contrastseg_jax.config.tree import leaves
from contrastseg_jax.data.pictures import shortened
from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.report.comparison import Curve
from contrastseg_jax.report.curves import curve
from contrastseg_jax.report.image_counts import FILE_NAME, ImageCounts, read_image_counts
from contrastseg_jax.run.workdir import (
    evaluated_steps,
    evaluation_folder,
    read_config,
    read_metrics,
    read_score,
    saved_steps,
)

CLASSES_LENGTH = 80  # letters of a list of class names in an error


@dataclass(frozen=True)
class Run:
    """A run and one of its evaluations."""

    workdir: Path
    settings: dict[str, Any]  # by path
    step: int
    counts: ImageCounts
    curve: Curve


# --- Reading --------------------------------------------------------------------------------------


def read_runs(workdirs: Sequence[Path], checkpoint: str, split: str) -> list[Run]:
    """The evaluations of a checkpoint of each run: "latest", "best" or a step.

    Raises:
        InputError: listing every run without such an evaluation, or without its counts.
    """
    if checkpoint not in ("latest", "best") and not checkpoint.isdecimal():
        raise InputError(f"--checkpoint={checkpoint}: must be latest, best or a step")
    runs, problems = [], []
    for workdir in workdirs:
        try:
            runs.append(read_run(workdir, checkpoint, split))
        except (InputError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise listed("the runs to compare", problems)
    return runs


def read_run(workdir: Path, checkpoint: str, split: str) -> Run:
    """A run with one of its evaluations."""
    config = read_config(workdir)
    step = choose_step(workdir, checkpoint, split, config.train.num_steps)
    folder = evaluation_folder(workdir, step, split)
    try:
        counts = read_image_counts(folder)
    except FileNotFoundError as error:
        advice = eval_command(workdir, str(step), split)
        raise InputError(f"{folder}: has no {FILE_NAME}; evaluate it again: {advice}") from error
    of_val = curve(read_metrics(workdir), "val/mean_iou")
    return Run(workdir, dict(leaves(config)), step, counts, of_val)


def choose_step(workdir: Path, checkpoint: str, split: str, num_steps: int) -> int:
    """The step that was evaluated, in a run of `num_steps` steps.

    "best" is best by val mIoU, whatever the split, and a checkpoint that was saved, as in other
    modes; where no checkpoint is left, any evaluation may be the best.
    """
    scored_split = "val" if checkpoint == "best" else split
    steps = evaluated_steps(workdir, scored_split)
    if not steps:
        advice = eval_command(workdir, checkpoint, scored_split)
        raise InputError(f"{workdir}: has no evaluation of {scored_split}; evaluate it: {advice}")
    if checkpoint.isdecimal():
        if int(checkpoint) not in steps:
            known = ", ".join(map(str, steps))
            raise InputError(
                f"--checkpoint={checkpoint}: {workdir} has evaluations of {split} at {known}"
            )
        return int(checkpoint)
    if steps[-1] < num_steps:
        advice = eval_command(workdir, "latest", scored_split)
        raise InputError(
            f"{workdir}: its last evaluation of {scored_split} is of step {steps[-1]} of"
            f" {num_steps}; finish its training, then evaluate it: {advice}"
        )
    if checkpoint == "latest":
        return steps[-1]
    saved = {*saved_steps(workdir)}
    candidates = [step for step in steps if step in saved] or steps
    return max(candidates, key=lambda step: (read_score(workdir, step), step))


def eval_command(workdir: Path, checkpoint: str, split: str) -> str:
    """The flags that make an evaluation."""
    of_split = "" if split == "val" else f" --split={split}"
    return f"--mode=eval --workdir={workdir} --checkpoint={checkpoint}{of_split}"


# --- Checking -------------------------------------------------------------------------------------


def require_comparable(runs: Sequence[Run]) -> None:
    """Raise an InputError listing all that makes the scores of the runs incomparable."""
    paths = filter(decides_evaluation, runs[0].settings)
    problems = [differing(path, [run.settings[path] for run in runs], runs) for path in paths]
    problems.append(differing("protocol", [run.counts.protocol for run in runs], runs))
    classes = [run.counts.class_names for run in runs]
    problems.append(differing("classes", classes, runs, text=_classes_text))
    problems += [problem for run in runs[1:] for problem in differing_images(run, runs[0])]
    problems = [problem for problem in problems if problem]
    if problems:
        raise listed("the runs to compare, which were not evaluated alike", problems)


def differing(
    name: str,
    values: Sequence[Hashable],
    runs: Sequence[Run],
    *,
    text: Callable[[Any], str] = repr,
) -> str:
    """The values that the runs have of something, with the runs of each; empty if all are equal."""
    by_value: dict[Hashable, list[str]] = {}
    for value, run in zip(values, runs, strict=True):
        by_value.setdefault(value, []).append(str(run.workdir))
    if len(by_value) == 1:
        return ""
    parts = (f"{text(value)} in {', '.join(names)}" for value, names in by_value.items())
    return f"{name} = {'; '.join(parts)}"


def _classes_text(names: Sequence[str]) -> str:
    return f"{len(names)} ({shortened(', '.join(names), CLASSES_LENGTH)})"


def differing_images(run: Run, first: Run) -> Iterator[str]:
    """How the images and labels of a run's evaluation differ from those of another run's."""
    names, expected = run.counts.image_names, first.counts.image_names
    lacking = sorted({*expected} - {*names})
    added = sorted({*names} - {*expected})
    one, other = run.workdir, first.workdir
    if lacking:
        yield f"images: {one} lacks {len(lacking)} that {other} has, e.g. {lacking[0]}"
    if added:
        yield f"images: {one} has {len(added)} that {other} lacks, e.g. {added[0]}"
    if lacking or added:
        return
    if names != expected:
        yield f"images: {one} has them in another order than {other}"
    elif run.counts.class_names == first.counts.class_names:
        found = np.flatnonzero((run.counts.labelled != first.counts.labelled).any(1))
        if found.size:
            yield (
                f"labels: {one} has other numbers of labelled pixels than {other} in {len(found)}"
                f" of {len(names)} images, e.g. {names[found[0]]}"
            )
