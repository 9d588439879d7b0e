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
from clu import parameter_overview
from jax.sharding import Mesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from contrastseg_jax import out_of_memory
from contrastseg_jax.config.rules import uses_contrast
from contrastseg_jax.config.tree import Config, leaves
from contrastseg_jax.data import pipeline
from contrastseg_jax.data.augment import Augmentation
from contrastseg_jax.data.dataset import dataset_spec, label_map, open_splits, preprocessing
from contrastseg_jax.data.labels import label_table
from contrastseg_jax.data.pipeline import EvalGroup, Source
from contrastseg_jax.errors import best_effort, reason
from contrastseg_jax.evaluation.evaluate import (
    EvalStep,
    compile_eval_step,
    evaluate,
    group_examples,
    require_memory,
)
from contrastseg_jax.files import lock
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.parallel import processes, sharding
from contrastseg_jax.report import curves
from contrastseg_jax.run import checkpoint
from contrastseg_jax.run.board import Board, close_board, open_board, write_metrics
from contrastseg_jax.run.compilation_cache import keep_compiled
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import claim, evaluation_folder, find_run
from contrastseg_jax.setup.setup import (
    build_model,
    follow_weights,
    num_anchors,
    num_cells,
    pad_color,
)
from contrastseg_jax.structs import Batch, TrainState
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.progress import (
    Interval,
    data_advice,
    log_interval,
    require_finite,
    require_finite_state,
)
from contrastseg_jax.training.state import abstract_state, init_state, state_sharding
from contrastseg_jax.training.train_step import Metrics, batch_shape, compile_step
from contrastseg_jax.weights.load import inference_variables, initial_variables

AskFn = Callable[..., jax.Array]  # as `_any_came`
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
    val_groups = group_examples(config, val_source, "val", sharding.make_mesh())
    with contextlib.ExitStack() as held:
        run = processes.together(lambda: find_run(workdir))  # all look before one writes
        begun = processes.together(lambda: _begin(config, workdir, run, held))
        processes.require_shared(workdir)
        _train_on(*begun, workdir, source, val_source, val_groups)


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
    val_groups: Sequence[EvalGroup],
) -> None:
    """Train from `variables`, or where there are none from the newest whole checkpoint."""
    # Where the run is.
    keep_compiled(config, workdir)
    mesh = sharding.make_mesh()
    tx, schedule = build_optimizer(config)
    num_steps = config.train.num_steps
    processes.require_same({"begins": variables is not None})
    start_step = checkpoint.find_whole(workdir, "latest", goes_on=True) if not variables else 0
    scored = _is_scored(config, workdir, start_step)
    if start_step >= num_steps and scored:
        log.info(f"{workdir}: is trained to its end, step {start_step}")
        return
    abstract = abstract_state(config, model, tx)
    checkpoint.prepare(workdir, abstract)
    state = _placed_state(abstract, config, model, tx, variables, workdir, start_step, mesh)

    # Scores.
    eval_step = compile_eval_step(config, model, mesh)
    predicting = inference_variables(state)
    require_memory(config, eval_step, predicting, val_source, val_groups, "val", mesh)
    del predicting  # each step uses up the state before
    board = open_board(workdir, start_step) if processes.is_first() else None
    score = functools.partial(
        *(_try_to_score, config, eval_step, val_source, val_groups),
        mesh=mesh,
        workdir=workdir,
        board=board,
    )

    # Steps.
    if uses_contrast(config):
        anchors, cells = num_anchors(config, model), num_cells(config, model)
        log.info(f"contrast.anchors_per_image: {anchors} of {cells} cells; fewer are faster")
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
        writer = stack.enter_context(
            checkpoint.open_writer(workdir, keep_checkpoints=config.train.keep_checkpoints)
        )
        stack.enter_context(contextlib.closing(batches))
        if board:
            stack.callback(close_board, board)
        stack.enter_context(bar)
        stack.enter_context(logging_redirect_tqdm([log]))
        ask = functools.partial(_any_came, sigterm_came, mesh)
        stopping = not scored and not score(state, start_step, ask)
        stop_asked = ask()
        interval, advice = Interval(time.monotonic()), ""
        step = start_step
        steps = iter(()) if stopping else take_steps(step_fn, state, batches, mesh)
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

            paused = time.monotonic()
            evaluating = not stopping and is_due(step, config.train.eval_steps, num_steps)
            if stopping or evaluating or is_due(step, config.train.checkpoint_steps, num_steps):
                # A lost state must not replace a good one; its loss is that of before the step.
                require_finite([metrics], step)
                require_finite_state(state, step, mesh)
                checkpoint.save(writer, step, state)
            if evaluating:
                stopping = not score(state, step, ask)
            interval.began += time.monotonic() - paused
            if stopping:
                break
    if stopping:
        log.warning(f"SIGTERM: stopped after step {step}, which is saved; run again to go on")
        sys.exit(processes.TERMINATED)
    page = evaluation_folder(workdir, num_steps) / "index.html"
    if page.exists():
        log.info(f"scores and pictures: {page}")


def _placed_state(
    abstract: TrainState,
    config: Config,
    model: Segmenter,
    tx: optax.GradientTransformation,
    variables: Variables | None,
    workdir: Path,
    step: int,
    mesh: Mesh,
) -> TrainState:
    """The state at step 0, of `variables`, or that of the checkpoint after `step`; on the mesh."""
    of_state = state_sharding(config, abstract, mesh)
    if variables is None:
        log.info(f"going on after step {step} of {config.train.num_steps}")
        state = checkpoint.restore(workdir, step, abstract, of_state)
    else:
        state = jax.device_put(init_state(config, model, tx, variables), of_state)
    num_params = parameter_overview.count_parameters(state.params)
    log.info(
        f"{config.model.name}: {num_params / 1e6:.2f} M parameters on {mesh.size}"
        f" {jax.default_backend()} device{'s' if mesh.size > 1 else ''}"
    )
    return state


def _try_to_score(
    config: Config,
    eval_fn: EvalStep,
    source: Source,
    groups: Sequence[EvalGroup],
    state: TrainState,
    step: int,
    ask: AskFn,
    *,
    mesh: Mesh,
    workdir: Path,
    board: Board | None,
) -> bool:
    """Evaluate on the validation split; all scores go where the run's numbers go.

    An evaluation that fails is a warning. False: the run was told to stop.
    """
    try:
        variables = jax.device_put(inference_variables(state), sharding.replicated(mesh))
        results = evaluate(
            *(config, eval_fn, variables, source, groups, "val", step),
            mesh=mesh,
            folder=evaluation_folder(workdir, step),
            workdir=workdir,
            before_batch=functools.partial(_require_well, ask),
        )
    except processes.Stopped:
        return False
    except Exception as error:
        if processes.count() > 1 and not isinstance(error, processes.SharedError):
            raise  # the others wait for this one
        why = out_of_memory.explanation(error) or reason(error)
        log.warning(f"step {step}: the evaluation failed, and the run goes on: {why}")
        return True
    if board:
        scores = {key: results[key] for key in ("mean_iou", "pixel_accuracy")}
        scores |= {f"iou_{name}": value for name, value in results["iou"].items()}
        write_metrics(workdir, board, step, {f"val/{key}": value for key, value in scores.items()})
        with best_effort(str(workdir / "curves.png")):
            curves.save_curves(workdir / "curves.png", workdir / "metrics.jsonl")
        log.info(f"step {step}  val mIoU {results['mean_iou']:.4f}")
    return True


def _any_came(sigterm_came: Callable[[], bool], mesh: Mesh, failed: bool = False) -> jax.Array:
    """Whether SIGTERM has come to any process, or one has failed.

    All must ask, and hear the same once it is known.
    """
    return sharding.any_process(sigterm_came() or failed, mesh)


def _require_well(ask: AskFn, error: Exception | None) -> None:
    """Raise the same in all processes, where one has an error or was told to stop."""
    if ask(error is not None):
        processes.raise_shared(reason(error) if error else "")
        raise processes.Stopped


def _is_scored(config: Config, workdir: Path, step: int) -> bool:
    """Whether a checkpoint has the scores that are due with it; a run that was stopped may not."""
    due = step > 0 and is_due(step, config.train.eval_steps, config.train.num_steps)
    there = (evaluation_folder(workdir, step) / "metrics.json").exists()
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
            state, metrics = step_fn(state, sharding.to_devices(batch, mesh))
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
        preprocessing=preprocessing(config, pad_color(config)),
        augmentation=Augmentation(**config.augment),
        batch_size=config.train.batch_size,
        steps=range(start_step, config.train.num_steps),
        seed=config.seed,
        loading=pipeline.loading_settings(config),
        shard=pipeline.Shard(jax.process_index(), jax.process_count()),
    )
