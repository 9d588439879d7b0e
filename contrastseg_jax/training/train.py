"""The training loop: trains to the last step, resuming where there is a checkpoint."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from contrastseg_jax.config.tree import Config
from contrastseg_jax.parallel import processes
from contrastseg_jax.run import checkpoint_writer
from contrastseg_jax.run.board import Board, open_metrics_log
from contrastseg_jax.run.claim import claimed
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.record import add_start
from contrastseg_jax.run.weights_and_biases import open_sinks
from contrastseg_jax.run.workdir import evaluation_folder, record_images, saved_steps
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.training.feed import make_batches, step_images, take_steps
from contrastseg_jax.training.progress import (
    Progress,
    is_stuck,
    log_progress,
    require_finite_state,
    stuck_error,
)
from contrastseg_jax.training.score import is_early_end, score
from contrastseg_jax.training.start import (
    Start,
    TrainingData,
    describe_start,
    fresh_variables,
    is_due,
    log_new_duration,
    open_data,
    start,
    weigh_classes,
)


def train(setup: Setup, workdir: Path) -> None:
    """Train to `train.num_steps`, resuming from the newest checkpoint of the workdir if any.

    SIGTERM and SIGINT save a checkpoint and exit with status 143; running again resumes.
    """
    # Errors in data or weights are raised before anything is compiled or written.
    data = open_data(setup)
    setup = weigh_classes(setup, data.source)
    variables = fresh_variables(setup, workdir)
    if variables is None:
        log_new_duration(setup, workdir)
    with claimed(workdir, setup.config, resume=variables is None):
        record = functools.partial(record_images, workdir, data.lists, resume=variables is None)
        processes.sync_errors(record if processes.is_first() else lambda: None)
        begin = start(setup, workdir, variables, data.evaluator)
        if begin is None:
            log.info(f"{workdir}: training already finished, at step {saved_steps(workdir)[-1]}")
            return
        if processes.is_first():
            entry = describe_start(setup, data, begin.step)
            add_start(workdir, entry, resume=variables is None)
        stopped_after = _train(setup, workdir, begin, data)
    if stopped_after is not None:
        log.warning(f"stopped and saved after step {stopped_after}; run again to resume")
        sys.exit(processes.TERMINATED)
    page = evaluation_folder(workdir, saved_steps(workdir)[-1]) / "index.html"
    if page.exists():
        log.info(f"scores and pictures: {page}")


@dataclass(frozen=True)
class Run:
    """What the training loop uses between steps."""

    setup: Setup
    steps: Any  # of `take_steps`
    bar: tqdm
    progress: Progress
    writer: checkpoint_writer.Writer
    score: Callable[..., None]  # state, step
    stop_requests: Callable[..., Any]


def _train(setup: Setup, workdir: Path, begin: Start, data: TrainingData) -> int | None:
    """Take the remaining steps; returns the step after which the run was stopped, if it was."""
    config, is_first = setup.config, processes.is_first()
    with contextlib.ExitStack() as stack:
        # Outermost: a signal must not end the process before the last checkpoint is written.
        requests = stack.enter_context(processes.stop_requests(setup.mesh))
        keep_checkpoints = config.train.keep_checkpoints
        writer = checkpoint_writer.open_writer(workdir, keep_checkpoints=keep_checkpoints)
        writer = stack.enter_context(writer)
        board = stack.enter_context(_open_board(workdir, begin.step, config)) if is_first else None
        batches = stack.enter_context(
            contextlib.closing(make_batches(setup, data.source, begin.step))
        )
        steps = take_steps(begin.step_fn, begin.state, batches, setup.mesh)
        bar = tqdm(
            total=config.train.num_steps,
            initial=begin.step,
            unit="step",
            disable=None if is_first else True,
            dynamic_ncols=True,
        )
        stack.enter_context(bar)
        stack.enter_context(logging_redirect_tqdm([log]))
        score_state = functools.partial(
            score, data.evaluator, workdir=workdir, board=board, requests=requests
        )
        images_of = functools.partial(step_images, setup, data.source)
        schedule, now = begin.schedule, time.monotonic()
        progress = Progress(config, schedule, workdir, board, images_of, now)
        return _loop(Run(setup, steps, bar, progress, writer, score_state, requests), begin)


@contextlib.contextmanager
def _open_board(workdir: Path, step: int, config: Config) -> Iterator[Board]:
    """Where the numbers of a run that goes on after `step` are written."""
    with open_sinks(workdir, config) as sinks, open_metrics_log(workdir, step, sinks) as board:
        yield board


def _loop(run: Run, begin: Start) -> int | None:
    """Log, save and evaluate between steps.

    Returns the step after which the run was stopped, if it was.
    """
    train, mesh, progress = run.setup.config.train, run.setup.mesh, run.progress
    due = functools.partial(is_due, num_steps=train.num_steps)
    step = begin.step
    try:
        if not begin.is_scored:
            run.score(begin.state, step)
        stop, progress.start_time = run.stop_requests(), time.monotonic()
        for step, (state, metrics, waited) in enumerate(run.steps, begin.step + 1):
            run.bar.update()
            progress.metrics.append(metrics)
            progress.waited += waited
            # Requested a step earlier, to avoid waiting: all processes stop after the same step.
            is_stopping, stop = bool(stop), run.stop_requests()
            if is_stopping or due(step, train.log_steps):
                log_progress(progress, step)
            paused = time.monotonic()
            is_scoring = not is_stopping and due(step, train.eval_steps)
            must_end = is_stopping or is_stuck(progress)
            if must_end or is_scoring or due(step, train.checkpoint_steps):
                require_finite_state(state, step, mesh)  # it must not replace a good one
                checkpoint_writer.save(run.writer, step, state)
            if is_stuck(progress):
                raise stuck_error(progress, step)
            if is_stopping:
                raise processes.Stopped
            if is_scoring:
                run.score(state, step)
                if step < train.num_steps and is_early_end(progress.workdir, train.patience, step):
                    log.info(
                        f"ending at step {step} of {train.num_steps}: train.patience ="
                        f" {train.patience}, and as many evaluations have not raised the val mIoU"
                    )
                    return None
            progress.start_time += time.monotonic() - paused
    except processes.Stopped:
        return step
    return None
