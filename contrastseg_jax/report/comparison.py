"""Comparing arms, runs that differ in their seed alone: means, paired differences, intervals.

NumPy in, dataclasses out. Two kinds of chance make two runs differ, and each has its interval: the
seed (initialisation, order, augmentation, sampling), by Student's t over the paired differences of
the seeds; and the images that a split happens to hold, by the bootstrap. All arms are scored on the
same images, and a seed starts all arms alike, so differences are taken pair by pair.

`s` seeds, `n` images, `k` classes, `r` resamples; `q` scores: mIoU, pixel accuracy, the mean IoU of
the rarest classes, then the IoU of each class.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Int64, Real
from scipy.special import stdtrit

from contrastseg_jax.ops.iou import class_iou, mean_over_classes, pixel_accuracy

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
NUM_RAREST = 5  # at most half of the classes
NUM_OVERALL = 3  # scores that are not of one class
MAX_ELEMENTS = 2**24  # of an array while resampling

Curve = Sequence[tuple[int, float]]  # step, val mIoU


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone, in the order of their seeds."""

    name: str
    settings: Mapping[str, Any]  # those that differ between the arms, by path
    workdirs: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]  # of training, after which each was evaluated
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class ArmCounts:
    """Pixels that each run of an arm counted in each image."""

    intersection: Int[np.ndarray, "s n k"]
    predicted: Int[np.ndarray, "s n k"]


@dataclass(frozen=True)
class LearningCurve:
    """Val mIoU over the seeds of an arm, at the steps where all of them were evaluated."""

    steps: Int64[np.ndarray, " p"]
    mean: Float64[np.ndarray, " p"]
    lowest: Float64[np.ndarray, " p"]
    highest: Float64[np.ndarray, " p"]


@dataclass(frozen=True)
class ArmScores:
    """The scores of an arm; NaN where there is none."""

    arm: Arm
    scores: Float64[np.ndarray, "s q"]
    mean: Float64[np.ndarray, " q"]
    std: Float64[np.ndarray, " q"]  # of a sample; NaN for one seed
    learning_curve: LearningCurve


@dataclass(frozen=True)
class Difference:
    """The scores of an arm minus those of the baseline, over the seeds that both have."""

    arm: Arm
    baseline: Arm
    seeds: tuple[int, ...]
    differences: Float64[np.ndarray, "s q"]
    mean: Float64[np.ndarray, " q"]
    seed_interval: Float64[np.ndarray, "2 q"]  # NaN for one seed
    image_interval: Float64[np.ndarray, "2 q"]


@dataclass(frozen=True)
class Comparison:
    """All that the pages show."""

    class_names: tuple[str, ...]
    labelled_pixels: Int64[np.ndarray, " k"]
    rarest: tuple[int, ...]  # class ids, the rarest first
    num_images: int
    num_resamples: int
    arms: tuple[ArmScores, ...]  # the first is the baseline
    differences: tuple[Difference, ...]  # of each other arm


def compare(
    arms: Sequence[Arm],
    counts: Sequence[ArmCounts],
    labelled: Int[np.ndarray, "n k"],
    class_names: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare arms with the first of them, with which each must share a seed.

    Args:
        arms: at least two.
        counts: of each arm.
        labelled: labelled pixels of each image, the same for all.
        class_names: in the order of their ids.
        num_resamples: of the images, for the bootstrap.
        seed: of the resampling.
    """
    labelled_pixels = labelled.sum(0, dtype=np.int64)
    rarest = rarest_classes(labelled_pixels)
    scored = tuple(
        score_arm(arm, counted, labelled_pixels, rarest)
        for arm, counted in zip(arms, counts, strict=True)
    )
    pairs = [paired_seeds(arm, arms[0]) for arm in arms[1:]]
    samples = bootstrap_differences(
        counts, labelled, pairs, rarest, num_resamples=num_resamples, seed=seed
    )
    return Comparison(
        class_names=tuple(class_names),
        labelled_pixels=labelled_pixels,
        rarest=rarest,
        num_images=len(labelled),
        num_resamples=num_resamples,
        arms=scored,
        differences=tuple(
            score_difference(arm, scored[0], pair, sample)
            for arm, pair, sample in zip(scored[1:], pairs, samples, strict=True)
        ),
    )


# --- Scores ---------------------------------------------------------------------------------------


def rarest_classes(labelled_pixels: Int[np.ndarray, " k"]) -> tuple[int, ...]:
    """Ids of the classes with the fewest labelled pixels, the rarest first; without absent ones."""
    present = np.flatnonzero(labelled_pixels)
    number = max(1, min(NUM_RAREST, len(present) // 2))
    order = np.argsort(labelled_pixels[present], kind="stable")
    return tuple(present[order[:number]].tolist())


def scores_of(
    intersection: Real[np.ndarray, "*#batch k"],
    labelled: Real[np.ndarray, "*#batch k"],
    predicted: Real[np.ndarray, "*#batch k"],
    rarest: Sequence[int],
) -> Float64[np.ndarray, "*batch q"]:
    """The scores of counts that were summed over images; NaN where there is none."""
    iou = class_iou(intersection, labelled, predicted)
    overall = (
        mean_over_classes(iou),
        pixel_accuracy(intersection, labelled),
        mean_over_classes(iou[..., list(rarest)]),
    )
    return np.concatenate([np.stack(overall, axis=-1), iou], axis=-1)


def score_arm(
    arm: Arm,
    counts: ArmCounts,
    labelled_pixels: Int64[np.ndarray, " k"],
    rarest: Sequence[int],
) -> ArmScores:
    """The scores of each seed, their mean and standard deviation."""
    sums = (x.sum(1, dtype=np.int64) for x in (counts.intersection, counts.predicted))
    intersection, predicted = sums
    scores = scores_of(intersection, labelled_pixels[None], predicted, rarest)
    mean, std = mean_and_std(scores)
    return ArmScores(arm, scores, mean, std, learning_curve(arm.curves))


def mean_and_std(
    values: Float64[np.ndarray, "s q"],
) -> tuple[Float64[np.ndarray, " q"], Float64[np.ndarray, " q"]]:
    """Mean and standard deviation (of a sample) over the seeds; of one seed the latter is NaN."""
    unknown = np.full(values.shape[1], np.nan)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else unknown


def learning_curve(curves: Sequence[Curve]) -> LearningCurve:
    """Mean and range over the curves that have points, at the steps that all of these have."""
    points = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    values = np.array([[of_seed[step] for step in steps] for of_seed in points], np.float64)
    values = values.reshape(len(points), len(steps)) if steps else np.empty((1, 0))
    return LearningCurve(np.array(steps, np.int64), values.mean(0), values.min(0), values.max(0))


# --- Differences ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The seeds that an arm and the baseline share, and where each has them."""

    seeds: tuple[int, ...]
    of_arm: list[int]
    of_baseline: list[int]


def paired_seeds(arm: Arm, baseline: Arm) -> Pairs:
    """The pairs of runs with the same seed."""
    seeds = tuple(sorted({*arm.seeds} & {*baseline.seeds}))
    of_arm, of_baseline = ([x.seeds.index(seed) for seed in seeds] for x in (arm, baseline))
    return Pairs(seeds, of_arm, of_baseline)


def score_difference(
    arm: ArmScores, baseline: ArmScores, pairs: Pairs, samples: Float64[np.ndarray, "r q"]
) -> Difference:
    """Paired differences with both intervals; `samples`: their means in resamples of the images."""
    differences = arm.scores[pairs.of_arm] - baseline.scores[pairs.of_baseline]
    return Difference(
        arm=arm.arm,
        baseline=baseline.arm,
        seeds=pairs.seeds,
        differences=differences,
        mean=differences.mean(0),
        seed_interval=t_interval(differences),
        image_interval=percentile_interval(samples),
    )


def t_interval(values: Float64[np.ndarray, "s q"]) -> Float64[np.ndarray, "2 q"]:
    """Student's t interval for the mean over seeds.

        mean ± t(0.975; s - 1) std / sqrt(s)

    For one seed it is NaN.
    """
    mean, std = mean_and_std(values)
    if len(values) < 2:
        return np.stack([std, std])
    half = stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2) * std / np.sqrt(len(values))
    return np.stack([mean - half, mean + half])


def percentile_interval(samples: Float64[np.ndarray, "r q"]) -> Float64[np.ndarray, "2 q"]:
    """The interval between the percentiles of resampled values.

    Resamples in which a score does not exist, as a class occurs in neither label nor prediction,
    are left out for that score; it is NaN if none is left.
    """
    tail = (1 - CONFIDENCE) / 2
    interval = np.full((2, samples.shape[1]), np.nan)
    for column, values in enumerate(samples.T):
        defined = values[~np.isnan(values)]
        if defined.size:
            interval[:, column] = np.quantile(defined, [tail, 1 - tail])
    return interval


# --- Bootstrap over images ------------------------------------------------------------------------


def bootstrap_differences(
    counts: Sequence[ArmCounts],
    labelled: Int[np.ndarray, "n k"],
    pairs: Sequence[Pairs],
    rarest: Sequence[int],
    *,
    num_resamples: int,
    seed: int,
) -> Float64[np.ndarray, "a r q"]:
    """Differences of the means over paired seeds, in resamples of the images.

    A resample draws n of the n images with replacement, the same in all arms and seeds. Its scores
    are those of the summed counts, as those of the split are. `pairs`: of each of the `a` arms
    after the first with the first.
    """
    # Sums by one matrix product, in float64, which has every whole number up to 2**53.
    parts = [x for c in counts for x in (*c.intersection, *c.predicted)]
    table = np.concatenate([labelled, *parts], axis=1).astype(np.float64)
    num_seeds = [len(c.intersection) for c in counts]
    chunk = max(1, MAX_ELEMENTS // sum(table.shape))
    found = []
    for weights in resamples(len(labelled), num_resamples, seed, chunk):
        sums = (weights @ table).reshape(len(weights), len(parts) + 1, -1)
        baseline, *others = resampled_scores(sums, num_seeds, rarest)
        found.append(
            [
                scores[:, pair.of_arm].mean(1) - baseline[:, pair.of_baseline].mean(1)
                for scores, pair in zip(others, pairs, strict=True)
            ]
        )
    return np.concatenate(found, axis=1)


def resampled_scores(
    sums: Float64[np.ndarray, "r x k"], num_seeds: Sequence[int], rarest: Sequence[int]
) -> Iterator[Float64[np.ndarray, "r s q"]]:
    """The scores of each arm in each resample.

    `sums`: labelled pixels, then of each arm those of the intersection and the predicted ones, each
    of all its seeds.
    """
    labelled, start = sums[:, :1], 1
    for number in num_seeds:
        intersection, predicted = np.split(sums[:, start : start + 2 * number], 2, axis=1)
        yield scores_of(intersection, labelled, predicted, rarest)
        start += 2 * number


def resamples(
    num_images: int, num_resamples: int, seed: int, chunk: int
) -> Iterator[Float64[np.ndarray, "r n"]]:
    """How often each resample draws each image; `chunk` resamples at a time, which alters none."""
    rng = np.random.default_rng(seed)
    for first in range(0, num_resamples, chunk):
        number = min(chunk, num_resamples - first)
        drawn = rng.integers(num_images, size=(number, num_images))
        drawn += num_images * np.arange(number)[:, None]
        times = np.bincount(drawn.ravel(), minlength=number * num_images)
        yield times.reshape(number, num_images).astype(np.float64)
