"""Progress of a run: metrics, speed and skipped steps, logged regularly."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from contrastseg_jax.config.tree import Config
from contrastseg_jax.evaluation.diagnosis import symptoms
from contrastseg_jax.losses.segmentation import PIXEL_LOSSES
from contrastseg_jax.objectives.objective import Metrics
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run.board import Board, write_metrics
from contrastseg_jax.run.logging import log
from contrastseg_jax.structs import TrainState
from contrastseg_jax.text import count_of
from contrastseg_jax.training.optim import Schedule

MOST_REPORTED = 3  # skipped steps of an interval that are named
DATA_BOUND = 0.2  # share of time spent waiting for data, above which a run logs advice
# Metrics that are 0 in steps without pairs: during warm-up of the objective, or by chance.
CONTRAST_METRICS = (
    *("contrast", "positive_similarity", "negative_similarity", "positives_per_anchor"),
    *("negatives_per_anchor", "hard_anchors", "gradient_ratio"),
)


@dataclass
class Progress:
    """The steps since the last log line, and where to log."""

    config: Config
    schedule: Schedule
    workdir: Path
    board: Board | None  # None: another process writes the metrics
    images_of: Callable[[int], list[str]]  # names of the images of the step with this number
    start_time: float  # of the interval, monotonic clock; moved forward by pauses
    metrics: list[Metrics] = field(default_factory=list)
    waited: float = 0.0  # seconds in which the devices were idle
    is_start: bool = True  # first interval, which includes making the first batches
    is_warned: bool = False  # about waiting for data, once
    reported: set[str] = field(default_factory=set)  # names of symptoms that were logged
    skipped_in_a_row: int = 0  # steps, up to the last one logged


def log_progress(progress: Progress, step: int) -> None:
    """Log means over the steps since the last call, and start a new interval after `step`."""
    config, size = progress.config, len(progress.metrics)
    seconds = time.monotonic() - progress.start_time
    history = sharding.fetch(progress.metrics)
    taken = [metrics for metrics in history if not metrics["skipped"]]
    report_skipped(progress, history, step)
    values = interval_means(taken) | {
        "interval_steps": size,
        "skipped": size - len(taken),
        "learning_rate": float(progress.schedule(step - 1)),
        "images_per_second": size * config.train.batch_size / seconds,
        "data_wait": progress.waited / seconds,
    }
    if progress.board:
        numbers = {f"train/{key}": value for key, value in values.items()}
        write_metrics(progress.workdir, progress.board, step, numbers)
    log.info(_line(step, config.train.num_steps, values, size / seconds))
    found = symptoms(values, step, config)
    for name in found.keys() - progress.reported:
        if progress.board:  # one process says it
            log.warning(found[name])
    progress.reported |= found.keys()
    advice = "" if progress.is_start else data_advice(values["data_wait"], config)
    if advice and not progress.is_warned:
        log.warning(advice)
        progress.is_warned = True
    progress.start_time, progress.metrics, progress.waited = time.monotonic(), [], 0.0
    progress.is_start = False


def interval_means(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of each metric over some steps; CONTRAST_METRICS only over steps with pairs.

    Without any such step they are left out, rather than 0.
    """
    if not history:
        return {}
    with_pairs = [metrics for metrics in history if metrics.get("positives_per_anchor") != 0]
    steps = {key: with_pairs if key in CONTRAST_METRICS else history for key in history[0]}
    return {
        key: float(np.mean([metrics[key] for metrics in found]))
        for key, found in steps.items()
        if found
    }


def report_skipped(progress: Progress, history: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log which steps of those up to `step` were skipped, and their images."""
    first = step - len(history) + 1
    skipped = [first + i for i, metrics in enumerate(history) if metrics["skipped"]]
    for metrics in history:
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if metrics["skipped"] else 0
    if not progress.board:  # one process says it
        return
    for number in skipped[:MOST_REPORTED]:
        log.warning(
            f"step {number} was skipped: its loss or gradient is not finite; --replay={number}"
            f" shows where; images: {', '.join(progress.images_of(number))}"
        )
    if len(skipped) > MOST_REPORTED:
        others = count_of(len(skipped) - MOST_REPORTED, "further step")
        log.warning(f"{others} up to step {step} skipped as well")


def is_stuck(progress: Progress) -> bool:
    """Whether too many of the last steps were skipped; the same in all processes."""
    return progress.skipped_in_a_row >= progress.config.train.max_skipped_steps


def stuck_error(progress: Progress, step: int) -> FloatingPointError:
    """The error of a run that stops after `step`, as it is stuck."""
    number = progress.skipped_in_a_row
    return FloatingPointError(
        f"the {count_of(number, 'step')} up to step {step} were skipped, as loss or gradient is not"
        f" finite; train.max_skipped_steps = {progress.config.train.max_skipped_steps}. The state"
        f" before them is saved. --replay={step - number + 1} shows where it begins; lower"
        " optim.learning_rate, or check the images that the log names"
    )


def require_finite_state(state: TrainState, step: int, mesh: Mesh) -> None:
    """Raise a FloatingPointError if the state after `step` is not finite."""
    if not sharding.all_finite(state, mesh):
        raise FloatingPointError(
            f"the state after step {step} is not finite; lower optim.learning_rate or check the"
            " data"
        )


def data_advice(data_wait: float, config: Config) -> str:
    """Advice for a run that spends the share `data_wait` of its time waiting for data."""
    if data_wait <= DATA_BOUND:
        return ""
    data = config.data
    return (
        f"training waits for data {data_wait:.0%} of the time; on {os.cpu_count()} CPU cores, try"
        f" raising data.num_threads (now {data.num_threads}) or data.num_workers (now"
        f" {data.num_workers}), or, if memory allows, data.cache_size (now {data.cache_size})"
    )


def _line(step: int, num_steps: int, values: dict[str, float], steps_per_second: float) -> str:
    """One line of the log."""
    left = int((num_steps - step) / steps_per_second)
    names = "loss", *PIXEL_LOSSES, "contrast"
    losses = [f"{name} {values[name]:.4f}" for name in names if name in values]
    skipped = [f"skipped {values['skipped']}"] if values["skipped"] else []
    shown = "  ".join([*losses, *_contrast_words(values), *skipped])
    return (
        f"step {step}/{num_steps}  {shown}  lr {values['learning_rate']:.2e}"
        f"  {values['images_per_second']:.1f} img/s  waiting for data {values['data_wait']:.0%}"
        f"  ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    )


def _contrast_words(values: Mapping[str, float]) -> list[str]:
    """How contrast fares, as far as it is known."""
    words = {
        "positive_similarity": "similarity {:.2f}",
        "negative_similarity": "to negatives {:.2f}",
        "gradient_ratio": "gradient ratio {:.2g}",
        "memory_age": "bank {:.0f} steps old",
        "correct_keys": "correct keys {:.0%}",
    }
    return [text.format(values[key]) for key, text in words.items() if key in values]
