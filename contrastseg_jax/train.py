"""The training loop: from a config to its last checkpoint, through stops and starts."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import optax
import orbax.checkpoint as ocp
from clu import parameter_overview
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from contrastseg_jax import checkpoint, distributed, processes, report
from contrastseg_jax.build import (
    abstract_state,
    build_model,
    build_optimizer,
    dataset_spec,
    decoding,
    follow_weights,
    init_state,
    initial_variables,
    keep_compiled,
    pad_color,
    state_sharding,
)
from contrastseg_jax.config import Config, leaves
from contrastseg_jax.data import pipeline
from contrastseg_jax.data.dataset import label_map, open_splits
from contrastseg_jax.data.labels import label_table
from contrastseg_jax.data.pipeline import EvalGroup, Source
from contrastseg_jax.evaluate import (
    EvalStep,
    compile_eval_step,
    evaluate,
    group_examples,
    inference_variables,
)
from contrastseg_jax.files import lock
from contrastseg_jax.logging import log, open_board, write_metrics
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.progress import Interval, data_advice, log_interval, require_finite
from contrastseg_jax.structs import Batch, TrainState
from contrastseg_jax.train_step import Metrics, batch_shape, compile_step
from contrastseg_jax.workdir import claim, find_run

StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def is_due(step: int, period: int, num_steps: int) -> bool:
    """Whether what happens every `period` steps, and at the end, happens after `step` steps."""
    return step % period == 0 or step == num_steps


def train(config: Config, workdir: Path) -> None:
    """Train to `train.num_steps`, from the newest checkpoint of the workdir where it has one."""
    # What is wrong with the data shows before anything is compiled or written.
    spec = dataset_spec(config)
    source, val_source = processes.first_then_others(lambda: open_splits(spec, ("train", "val")))
    processes.require_same(dict(leaves(config)) | {"images": (len(source), len(val_source))})
    log.info(f"{spec.name}: {len(source)} images to train on, {len(val_source)} to validate")
    log.info(label_table(label_map(spec)))
    with contextlib.ExitStack() as held:
        run = processes.together(lambda: find_run(workdir))  # all look before one writes
        begun = processes.together(lambda: _begin(config, workdir, run, held))
        processes.require_shared(workdir)
        _train_on(*begun, workdir, source, val_source)


def _begin(
    config: Config, workdir: Path, run: Config | None, held: contextlib.ExitStack
) -> tuple[Config, Segmenter, Variables | None]:
    """Make the workdir the run's: its config, the network, and what that starts from if fresh.

    `run`: the config of the run that is there, if there is one.
    """
    config = follow_weights(config, run)
    model = build_model(config, len(label_map(dataset_spec(config)).names))
    variables = None if run else initial_variables(config, model)
    if processes.is_first():  # with nothing left that may fail, as this makes the folder
        held.enter_context(lock(workdir / ".lock"))
    claim(workdir, config, write=processes.is_first())
    return config, model, variables


def _train_on(
    config: Config,
    model: Segmenter,
    variables: Variables | None,
    workdir: Path,
    source: Source,
    val_source: Source,
) -> None:
    """Train from `variables`, or where there are none from the newest checkpoint."""
    # Where the run is.
    keep_compiled(config, workdir)
    mesh = distributed.make_mesh()
    tx, schedule = build_optimizer(config)
    num_steps = config.train.num_steps
    manager = checkpoint.open_manager(workdir, keep_checkpoints=config.train.keep_checkpoints)
    start_step = manager.latest_step() or 0
    processes.require_same({"begins": variables is not None, "newest checkpoint": start_step})
    scored = _is_scored(config, workdir, start_step)
    if start_step >= num_steps and scored:
        log.info(f"{workdir}: is trained to its end, step {start_step}")
        return
    state = _placed_state(config, model, tx, variables, manager, start_step, mesh)

    # Scores.
    board = open_board(workdir, start_step) if processes.is_first() else None
    score = functools.partial(
        _score,
        config,
        compile_eval_step(config, model, mesh),
        val_source,
        group_examples(config, val_source, "val", mesh),
        mesh=mesh,
        workdir=workdir,
        board=board,
    )
    if not scored:
        score(state, start_step)

    # Steps.
    log.info("compiling")
    started = time.monotonic()
    step_fn = compile_step(config, model, tx, mesh)
    step_fn = step_fn.lower(state, batch_shape(config, mesh)).compile()
    log.info(f"compiled in {time.monotonic() - started:.0f} s")
    batches = make_batches(config, source, start_step)
    bar = tqdm(
        total=num_steps,
        initial=start_step,
        unit="step",
        disable=None if processes.is_first() else True,
        dynamic_ncols=True,
    )
    with contextlib.ExitStack() as stack:
        # Outermost: SIGTERM must not end the process before the last checkpoint is written.
        sigterm_came = stack.enter_context(processes.noted_sigterm())
        for resource in (manager, batches, *([board] if board else [])):
            stack.enter_context(contextlib.closing(resource))
        stack.enter_context(bar)
        stack.enter_context(logging_redirect_tqdm([log]))
        ask = functools.partial(_any_came, sigterm_came, mesh)
        stop_asked = ask()
        interval, advice = Interval(time.monotonic()), ""
        step, stopping = start_step, False
        steps = take_steps(step_fn, state, batches, mesh)
        del state  # each step uses up the one before
        for step, (state, metrics, waited) in enumerate(steps, start_step + 1):
            interval.metrics.append(metrics)
            interval.waited += waited
            bar.update()
            # Of the step before, so that nothing waits: all processes stop after the same step.
            stopping = bool(stop_asked)
            stop_asked = ask()

            if stopping or is_due(step, config.train.log_steps, num_steps):
                require_finite(interval.metrics, step)
                data_wait = log_interval(config, workdir, board, step, interval, schedule)
                is_first_line = step == start_step + len(interval.metrics)  # data still start up
                if not (advice or is_first_line):
                    advice = data_advice(data_wait, config)
                    if advice:
                        log.warning(advice)
                interval = Interval(time.monotonic())

            mean_iou, paused = None, time.monotonic()
            if not stopping and is_due(step, config.train.eval_steps, num_steps):
                try:
                    mean_iou = score(state, step, before_batch=functools.partial(_stop_if, ask))
                except processes.Stopped:
                    stopping = True
            saving = mean_iou is not None or is_due(step, config.train.checkpoint_steps, num_steps)
            if saving or stopping:
                require_finite([metrics], step)  # a lost state must not replace a good one
                checkpoint.save(manager, step, state, mean_iou)
            interval.began += time.monotonic() - paused
            if stopping:
                break
    if stopping:
        log.warning(f"SIGTERM: stopped after step {step}, which is saved; run again to go on")
        sys.exit(processes.TERMINATED)
    log.info(f"scores and pictures: {workdir / 'eval' / str(num_steps) / 'index.html'}")


def _placed_state(
    config: Config,
    model: Segmenter,
    tx: optax.GradientTransformation,
    variables: Variables | None,
    manager: ocp.CheckpointManager,
    step: int,
    mesh: Mesh,
) -> TrainState:
    """The state at step 0, of `variables`, or that of the checkpoint after `step`; on the mesh."""
    abstract = abstract_state(config, model, tx)
    of_state = state_sharding(config, abstract, mesh)
    if variables is None:
        log.info(f"going on after step {step} of {config.train.num_steps}")
        state = checkpoint.restore(manager, step, abstract, of_state)
    else:
        state = jax.device_put(init_state(config, model, tx, variables), of_state)
    num_params = parameter_overview.count_parameters(state.params)
    log.info(
        f"{config.model.name}: {num_params / 1e6:.2f} M parameters on {mesh.size}"
        f" {jax.default_backend()} device{'s' if mesh.size > 1 else ''}"
    )
    return state


def _score(
    config: Config,
    eval_fn: EvalStep,
    source: Source,
    groups: Sequence[EvalGroup],
    state: TrainState,
    step: int,
    *,
    mesh: Mesh,
    workdir: Path,
    board: SummaryWriter | None,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean IoU on the validation split; all scores go where the run's numbers go."""
    variables = jax.device_put(inference_variables(state), distributed.replicated(mesh))
    results = evaluate(
        config,
        eval_fn,
        variables,
        source,
        groups,
        "val",
        step,
        mesh=mesh,
        folder=workdir / "eval" / str(step),
        before_batch=before_batch,
    )
    if board:
        scores = {key: results[key] for key in ("mean_iou", "pixel_accuracy")}
        scores |= {f"iou_{name}": value for name, value in results["iou"].items()}
        write_metrics(workdir, board, step, {f"val/{key}": value for key, value in scores.items()})
        report.save_curves(workdir / "curves.png", workdir / "metrics.jsonl")
        log.info(f"step {step}  val mIoU {results['mean_iou']:.4f}")
    return results["mean_iou"]


def _any_came(sigterm_came: Callable[[], bool], mesh: Mesh) -> jax.Array:
    """Whether SIGTERM has come to any process; all must ask, and hear the same once it is known."""
    return distributed.any_process(sigterm_came(), mesh)


def _stop_if(ask: Callable[[], jax.Array]) -> None:
    if ask():
        raise processes.Stopped


def _is_scored(config: Config, workdir: Path, step: int) -> bool:
    """Whether a checkpoint has the scores that are due with it; a run that was stopped may not."""
    due = step > 0 and is_due(step, config.train.eval_steps, config.train.num_steps)
    there = (workdir / "eval" / str(step) / "metrics.json").exists()
    return processes.gather(str(there or not due))[0] == "True"


def take_steps(
    step_fn: StepFn, state: TrainState, batches: Iterator[Batch], mesh: Mesh
) -> Iterator[tuple[TrainState, Metrics, float]]:
    """A step for each batch: the new state, its metrics, seconds in which the devices had no work.

    One step is in flight while the next batch is made ready, not a long queue of them. Only when
    that step has ended, waiting for the batch costs time.
    """
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(time.monotonic)
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            came = time.monotonic()
            if batch is None:
                return
            # Returns at once: the batch is copied while the step before is computed.
            state, metrics = step_fn(state, distributed.to_devices(batch, mesh))
            waited = max(0.0, came - max(asked, ended.result()))
            ended = pool.submit(_time_of_end, metrics)
            yield state, metrics, waited


def _time_of_end(metrics: Metrics) -> float:
    jax.block_until_ready(metrics)
    return time.monotonic()


def make_batches(config: Config, source: Source, start_step: int) -> pipeline.Batches:
    """This process's rows of the training batches after `start_step`."""
    return pipeline.train_batches(
        source,
        label_map=label_map(dataset_spec(config)),
        batch_size=config.train.batch_size,
        start_step=start_step,
        num_steps=config.train.num_steps,
        seed=config.seed,
        short_side=config.data.short_side,
        pad_color=pad_color(config),
        cache_size=config.data.cache_size,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        prefetch=config.data.prefetch,
        decoding=decoding(config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **config.augment,
    )
