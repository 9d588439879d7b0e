"""Progress of a run: metrics and speed, logged regularly, and checks for divergence."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from contrastseg_jax.config.tree import Config
from contrastseg_jax.evaluation.diagnosis import symptoms
from contrastseg_jax.objectives.objective import Metrics
from contrastseg_jax.parallel import sharding
from contrastseg_jax.run.board import Board, write_metrics
from contrastseg_jax.run.logging import log
from contrastseg_jax.structs import TrainState
from contrastseg_jax.text import count_of
from contrastseg_jax.training.optim import Schedule

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
    start_time: float  # of the interval, monotonic clock; moved forward by pauses
    metrics: list[Metrics] = field(default_factory=list)
    waited: float = 0.0  # seconds in which the devices were idle
    is_start: bool = True  # first interval, which includes making the first batches
    is_warned: bool = False  # about waiting for data, once
    reported: set[str] = field(default_factory=set)  # names of symptoms that were logged


def log_progress(progress: Progress, step: int) -> None:
    """Log means over the steps since the last call, and start a new interval after `step`."""
    require_finite(progress.metrics, step)
    config, size = progress.config, len(progress.metrics)
    seconds = time.monotonic() - progress.start_time
    values = interval_means(sharding.fetch(progress.metrics)) | {
        "interval_steps": size,
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
    with_pairs = [metrics for metrics in history if metrics.get("positives_per_anchor") != 0]
    steps = {key: with_pairs if key in CONTRAST_METRICS else history for key in history[0]}
    return {
        key: float(np.mean([metrics[key] for metrics in found]))
        for key, found in steps.items()
        if found
    }


def require_finite(history: Sequence[Metrics], step: int) -> None:
    """Raise a FloatingPointError if a loss is not finite; `history` ends with `step`."""
    losses = [float(metrics["loss"]) for metrics in history]
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"the loss is not finite in the {count_of(len(history), 'step')} up to step {step}:"
            f" {losses}; lower optim.learning_rate or check the data"
        )


def require_finite_state(state: TrainState, metrics: Metrics, step: int, mesh: Mesh) -> None:
    """Raise a FloatingPointError if the loss of `step`, or the state after it, is not finite."""
    require_finite([metrics], step)
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
    losses = [f"{k} {values[k]:.4f}" for k in ("loss", "cross_entropy", "contrast") if k in values]
    shown = "  ".join([*losses, *_contrast_words(values)])
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
