"""The figures of a comparison in words and rows of text, whatever they are written to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from contrastseg_jax.report.comparison import NUM_OVERALL, ArmScores, Comparison, Difference
from contrastseg_jax.text import count_of

OVERALL = ("mIoU", "pixel accuracy", "mIoU of the rarest")
INTERVALS = ("95 % over seeds", "95 % over images")
NO_VALUE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1  # columns that name a row, before those of its figures


@dataclass(frozen=True)
class Evaluated:
    """What all runs were evaluated on, and what to know about these runs."""

    data: str
    split: str
    checkpoint: str
    notes: tuple[str, ...]


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
            num_names=2,
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
            num_names=2,
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
    return Table("Runs", ("run", "arm", "seed", "step", *OVERALL[:2]), rows, num_names=2)


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
