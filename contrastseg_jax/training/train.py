"""The training loop: trains to the last step, resuming where there is a checkpoint."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from contrastseg_jax.data.pipeline import Source
from contrastseg_jax.data.subset import image_names
from contrastseg_jax.evaluation.evaluate import Evaluator
from contrastseg_jax.parallel import processes
from contrastseg_jax.run import checkpoint_writer
from contrastseg_jax.run.board import open_metrics_log
from contrastseg_jax.run.claim import claimed
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import evaluation_folder, record_train_images
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.training.feed import make_batches, take_steps
from contrastseg_jax.training.progress import (
    Progress,
    log_progress,
    require_finite_state,
)
from contrastseg_jax.training.score import score
from contrastseg_jax.training.start import Start, fresh_variables, is_due, open_data, start


def train(setup: Setup, workdir: Path) -> None:
    """Train to `train.num_steps`, resuming from the newest checkpoint of the workdir if any.

    SIGTERM saves a checkpoint and exits with status 143; running again resumes.
    """
    # Errors in data or weights are raised before anything is compiled or written.
    source, evaluator = open_data(setup)
    variables = fresh_variables(setup, workdir)
    num_steps = setup.config.train.num_steps
    with claimed(workdir, setup.config, resume=variables is None):
        names = image_names(source) if setup.config.data.train_subset else []
        record = functools.partial(record_train_images, workdir, names, resume=variables is None)
        processes.sync_errors(record if processes.is_first() else lambda: None)
        begin = start(setup, workdir, variables, evaluator)
        if begin is None:
            log.info(f"{workdir}: training already finished, at step {num_steps}")
            return
        stopped_after = _train(setup, workdir, begin, source, evaluator)
    if stopped_after is not None:
        log.warning(f"SIGTERM: stopped and saved after step {stopped_after}; run again to resume")
        sys.exit(processes.TERMINATED)
    page = evaluation_folder(workdir, num_steps) / "index.html"
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


def _train(
    setup: Setup, workdir: Path, begin: Start, source: Source, evaluator: Evaluator
) -> int | None:
    """Take the remaining steps; returns the step after which the run was stopped, if it was."""
    config, is_first = setup.config, processes.is_first()
    with contextlib.ExitStack() as stack:
        # Outermost: SIGTERM must not end the process before the last checkpoint is written.
        requests = stack.enter_context(processes.stop_requests(setup.mesh))
        keep_checkpoints = config.train.keep_checkpoints
        writer = checkpoint_writer.open_writer(workdir, keep_checkpoints=keep_checkpoints)
        writer = stack.enter_context(writer)
        board = stack.enter_context(open_metrics_log(workdir, begin.step)) if is_first else None
        batches = stack.enter_context(contextlib.closing(make_batches(setup, source, begin.step)))
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
            score, evaluator, workdir=workdir, board=board, requests=requests
        )
        progress = Progress(config, begin.schedule, workdir, board, time.monotonic())
        return _loop(Run(setup, steps, bar, progress, writer, score_state, requests), begin)


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
            if is_stopping or is_scoring or due(step, train.checkpoint_steps):
                # A diverged state must not replace a good one; the loss is from before the update.
                require_finite_state(state, metrics, step, mesh)
                checkpoint_writer.save(run.writer, step, state)
            if is_stopping:
                raise processes.Stopped
            if is_scoring:
                run.score(state, step)
            progress.start_time += time.monotonic() - paused
    except processes.Stopped:
        return step
    return None
