"""Training: one pure step over a mesh, and the loop around it."""

import contextlib
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from tensorboardX import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from contrastseg_jax import checkpoint, distributed, memory, processes, report
from contrastseg_jax.build import (
    abstract_state,
    build_model,
    build_optimizer,
    dataset_spec,
    follow_weights,
    image_format,
    init_state,
    initial_variables,
    keep_compiled,
    pad_color,
    state_sharding,
)
from contrastseg_jax.config import Config, claim, leaves, run_in, splits_memory
from contrastseg_jax.contrast import (
    batch_candidates,
    label_at_stride,
    pixel_contrast_loss,
    sample_anchors,
)
from contrastseg_jax.data import pipeline
from contrastseg_jax.data.dataset import label_map, open_split
from contrastseg_jax.data.labels import label_table
from contrastseg_jax.data.pipeline import Source
from contrastseg_jax.evaluate import compile_eval_step, evaluate, inference_variables, normalize
from contrastseg_jax.files import lock
from contrastseg_jax.logging import log, open_board, write_metrics
from contrastseg_jax.losses import segmentation_loss
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.optim import update_ema
from contrastseg_jax.structs import (
    IGNORE_LABEL,
    Batch,
    MemoryBank,
    SegmentationOutput,
    TrainState,
)

Metrics = dict[str, Float[Array, ""]]


def contrast_loss(
    logits: Float[Array, "b hs ws k"],
    embedding: Float[Array, "b hs ws d"],
    label: Int[Array, "b hs ws"],
    rng: Key[Array, " b"],
    selection_rng: Key[Array, ""],
    *,
    bank: MemoryBank | None,
    mesh: Mesh,
    config: Config,
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 3 between sampled anchors and the candidates that the config names, and diagnostics.

    `rng` draws the anchors, one key per image, `selection_rng` positives and negatives.
    """
    settings = config.contrast
    anchors = sample_anchors(
        embedding,
        label,
        jnp.argmax(logits, axis=-1).astype(jnp.int32),
        rng,
        num_classes=logits.shape[-1],
        anchors_per_image=settings.anchors_per_image,
        max_views=settings.max_views,
        strategy=settings.anchors,
    )
    sets = ()
    if settings.candidates in ("batch", "both"):
        sets += (batch_candidates(anchors),)
    if bank is not None:
        sets += memory.memory_candidates(bank)
    return pixel_contrast_loss(
        anchors,
        sets,
        selection_rng,
        temperature=settings.temperature,
        base_temperature=settings.base_temperature,
        positives=settings.positives,
        negatives=settings.negatives,
        num_positives=settings.num_positives,
        num_negatives=settings.num_negatives,
        approximate=settings.approximate,
        mesh=mesh,
        split_candidates=splits_memory(config),
    )


def enqueue_batch(
    bank: MemoryBank,
    embedding: Float[Array, "b hs ws d"],
    label: Int[Array, "b hs ws"],
    rng: Key[Array, " b"],
    *,
    mesh: Mesh,
    config: Config,
) -> MemoryBank:
    """The bank after this step: pixels and class means of every image of the global batch."""
    num_classes = bank.pixel.shape[0]
    pixel = memory.pixel_keys(
        embedding,
        label,
        rng,
        num_classes=num_classes,
        pixels_per_class=config.memory.pixels_per_class,
    )
    segment = memory.segment_keys(embedding, label, num_classes=num_classes)
    return memory.enqueue(
        bank,
        *distributed.replicate((pixel, segment), mesh),
        mesh=mesh if splits_memory(config) else None,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Segmenter,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    config: Config,
) -> tuple[TrainState, Metrics]:
    """One step of Eq. 4: cross entropy plus weighted pixel contrast, then the bank's update.

    A pure function of its arguments: all randomness comes from the seed, the step and, per image,
    the example's id, so it does not depend on how images are spread over devices.
    """
    step_rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    dropout_rng, anchor_rng, key_rng, selection_rng = jax.random.split(step_rng, 4)
    per_image = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    anchor_rng, key_rng = (per_image(rng, batch.example_id) for rng in (anchor_rng, key_rng))
    image = normalize(batch.image, image_format(config))
    bank = state.memory

    def loss_fn(params: Any) -> tuple[Float[Array, ""], tuple[Any, SegmentationOutput, Metrics]]:
        output, updates = model.apply(
            # Whole, even where each device keeps a part: batches are what devices share out.
            {"params": distributed.replicate(params, mesh), "batch_stats": state.batch_stats},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_rng},
        )
        loss = cross_entropy = segmentation_loss(
            output,
            batch.label,
            class_weights=config.loss.class_weights,
            aux_weight=config.loss.aux_weight,
        )
        ignored = jnp.mean((batch.label == IGNORE_LABEL).astype(jnp.float32))
        metrics = {"cross_entropy": cross_entropy, "ignored_pixels": ignored}
        if output.embedding is not None:
            label = label_at_stride(batch.label, output.embedding.shape[1:3])
            measure = functools.partial(contrast_loss, bank=bank, mesh=mesh, config=config)
            arguments = (output.logits, output.embedding, label, anchor_rng, selection_rng)
            shapes = jax.eval_shape(measure, *arguments)
            contrast, diagnostics = jax.lax.cond(
                state.step >= config.contrast.warmup_steps,
                measure,
                lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
                *arguments,
            )
            loss += config.contrast.loss_weight * contrast
            metrics |= {"contrast": contrast, **diagnostics}
        return loss, (updates["batch_stats"], output, metrics | {"loss": loss})

    grads, (batch_stats, output, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # Statistics belong to the weights they were taken with, so both are averaged.
        variables = {"params": params, "batch_stats": batch_stats}
        ema = update_ema(ema, variables, state.step, ema_decay=config.optim.ema_decay)
    if bank is not None and output.embedding is not None:
        # After the loss: an image is never contrasted with its own rows of this step.
        label = label_at_stride(batch.label, output.embedding.shape[1:3])
        # A lost step must not spoil the bank. Besides, the loss is then known to be computed before
        # the bank is written, without which XLA keeps a copy of the whole bank for it.
        label = jnp.where(jnp.isfinite(metrics["loss"]), label, IGNORE_LABEL)
        bank = enqueue_batch(bank, output.embedding, label, key_rng, mesh=mesh, config=config)
        fill = memory.fill_ratio(bank)
        metrics |= {"memory_fill": fill.mean(), "memory_fill_min": fill.min()}
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema, bank)
    return state, metrics


def compile_step(
    config: Config, model: Segmenter, tx: optax.GradientTransformation, mesh: Mesh
) -> jax.stages.Wrapped:
    """`train_step` for a mesh; the state it is given is used up."""
    of_state = state_sharding(config, abstract_state(config, model, tx), mesh)
    return jax.jit(
        functools.partial(train_step, model=model, tx=tx, mesh=mesh, config=config),
        in_shardings=(of_state, distributed.split(mesh)),
        out_shardings=(of_state, distributed.replicated(mesh)),
        donate_argnums=0,
    )


# --- The loop ------------------------------------------------------------------------------------

DATA_BOUND = 0.2  # share of time waiting for data from which on a run is told what may help


def is_due(step: int, period: int, num_steps: int) -> bool:
    """Whether what happens every `period` steps, and at the end, happens after `step` steps."""
    return step % period == 0 or step == num_steps


def train(config: Config, workdir: Path) -> None:
    """Train to `train.num_steps`, from the newest checkpoint of the workdir where it has one."""
    # What is wrong with the data shows before anything is compiled or written.
    spec = dataset_spec(config)
    source, val_source = processes.first_then_others(
        lambda: (open_split(spec, "train"), open_split(spec, "val"))
    )
    processes.require_same(
        dict(leaves(config))
        | {"images": (len(source), len(val_source)), "devices": jax.local_device_count()}
        | {"code": processes.code_digest(), "jax": jax.__version__}
    )
    log.info(f"{spec.name}: {len(source)} images to train on, {len(val_source)} to validate")
    log.info(label_table(label_map(spec)))
    with contextlib.ExitStack() as held:
        begun = processes.together(lambda: _begin(config, workdir, held))
        processes.require_shared(workdir)
        _train_on(*begun, workdir, source, val_source)


def _begin(
    config: Config, workdir: Path, held: contextlib.ExitStack
) -> tuple[Config, Segmenter, Variables | None]:
    """Make the workdir the run's: its config, the network, and what that starts from if fresh."""
    if processes.is_first():
        held.enter_context(lock(workdir / ".lock"))
    run = run_in(workdir, config)
    config = follow_weights(config, run)
    model = build_model(config, len(label_map(dataset_spec(config)).names))
    variables = None if run else initial_variables(config, model)
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
    # State.
    keep_compiled(config, workdir)
    mesh = distributed.make_mesh()
    tx, schedule = build_optimizer(config)
    num_steps = config.train.num_steps
    of_state = state_sharding(config, abstract_state(config, model, tx), mesh)
    manager = checkpoint.open_manager(workdir, keep_checkpoints=config.train.keep_checkpoints)
    start_step = manager.latest_step() or 0
    if start_step >= num_steps:
        log.info(f"{workdir}: is trained to its end, step {start_step}")
        return
    if variables is None:
        log.info(f"going on after step {start_step} of {num_steps}")
        state = abstract_state(config, model, tx)
        state = checkpoint.restore(manager, start_step, state, of_state)
    else:
        state = jax.device_put(init_state(config, model, tx, variables), of_state)
    num_params = parameter_overview.count_parameters(state.params)
    log.info(
        f"{config.model.name}: {num_params / 1e6:.2f} M parameters on {mesh.size}"
        f" {jax.default_backend()} device{'s' if mesh.size > 1 else ''}; compiling"
    )

    # Steps.
    started = time.monotonic()
    step_fn = compile_step(config, model, tx, mesh)
    step_fn = step_fn.lower(state, batch_shape(config, mesh)).compile()
    log.info(f"compiled in {time.monotonic() - started:.0f} s")
    eval_fn = compile_eval_step(config, model, mesh)
    batches = make_batches(config, source, start_step)
    board = open_board(workdir, start_step) if processes.is_first() else None
    bar = tqdm(
        total=num_steps,
        initial=start_step,
        unit="step",
        disable=None if processes.is_first() else True,
        dynamic_ncols=True,
    )
    with contextlib.ExitStack() as stack:
        for resource in (manager, batches, *([board] if board else [])):
            stack.enter_context(contextlib.closing(resource))
        stack.enter_context(bar)
        stack.enter_context(logging_redirect_tqdm([log]))
        sigterm_came = stack.enter_context(processes.noted_sigterm())
        stop_asked = distributed.any_process(False, mesh)
        history, waited, since, advice = [], 0.0, time.monotonic(), ""
        step, stopping = start_step, False
        for step in range(start_step + 1, num_steps + 1):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            # Returns at once: the batch is copied while the step before is computed.
            state, metrics = step_fn(state, distributed.to_devices(batch, mesh))
            if history:  # one step in flight while the next is made ready, not a long queue
                jax.block_until_ready(history[-1])
            history.append(metrics)
            bar.update()
            # Of the step before, so that nothing waits: all processes stop after the same step.
            stopping = bool(stop_asked)
            stop_asked = distributed.any_process(sigterm_came(), mesh)

            if stopping or is_due(step, config.train.log_steps, num_steps):
                _require_finite(history, step)
                seconds = time.monotonic() - since
                values = _means(history) | {
                    "learning_rate": float(schedule(step - 1)),
                    "images_per_second": len(history) * config.train.batch_size / seconds,
                    "data_wait": waited / seconds,
                }
                if board:
                    numbers = {f"train/{k}": v for k, v in values.items()}
                    write_metrics(workdir, board, step, numbers)
                log.info(_line(step, num_steps, values, len(history) / seconds))
                if not advice and step > start_step + len(history):  # the first line: data start up
                    advice = data_advice(values["data_wait"], config)
                    if advice:
                        log.warning(advice)
                history, waited, since = [], 0.0, time.monotonic()

            score, paused = None, time.monotonic()
            if is_due(step, config.train.eval_steps, num_steps) and not stopping:
                folder = workdir / "eval" / str(step)
                weights = inference_variables(state)
                weights = jax.device_put(weights, distributed.replicated(mesh))
                results = evaluate(
                    config, eval_fn, weights, val_source, "val", step, mesh=mesh, folder=folder
                )
                score = results["mean_iou"]
                _log_scores(workdir, board, step, results)
            saving = score is not None or is_due(step, config.train.checkpoint_steps, num_steps)
            if saving or stopping:
                _require_finite([metrics], step)  # a lost state must not replace a good one
                checkpoint.save(manager, step, state, score)
            since += time.monotonic() - paused
            if stopping:
                break
    if stopping:
        log.warning(f"SIGTERM: stopped after step {step}, which is saved; run again to go on")
        sys.exit(processes.TERMINATED)
    log.info(f"scores and pictures: {workdir / 'eval' / str(num_steps) / 'index.html'}")


def data_advice(data_wait: float, config: Config) -> str:
    """What to change in a run that spends the share `data_wait` of its time waiting for data."""
    if data_wait <= DATA_BOUND:
        return ""
    data = config.data
    return (
        f"the run waits for data {data_wait:.0%} of the time; what may help, on {os.cpu_count()}"
        f" CPU cores: more data.num_threads (now {data.num_threads}) or data.num_workers (now"
        f" {data.num_workers}), or, where memory allows, data.cache_size (now {data.cache_size})"
    )


def batch_shape(config: Config, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of a global training batch."""
    size, sharding = config.train.batch_size, distributed.split(mesh)
    image, row = (size, *config.augment.crop_size), (size,)
    return Batch(
        image=jax.ShapeDtypeStruct((*image, 3), jnp.uint8, sharding=sharding),
        label=jax.ShapeDtypeStruct(image, jnp.uint8, sharding=sharding),
        example_id=jax.ShapeDtypeStruct(row, jnp.int32, sharding=sharding),
        valid=jax.ShapeDtypeStruct(row, jnp.bool, sharding=sharding),
    )


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
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **config.augment,
    )


def _log_scores(
    workdir: Path, board: SummaryWriter | None, step: int, results: dict[str, Any]
) -> None:
    """An evaluation's scores, wherever the run's numbers go; without a board, nowhere."""
    if board is None:
        return
    scores = {key: results[key] for key in ("mean_iou", "pixel_accuracy")}
    scores |= {f"iou_{name}": value for name, value in results["iou"].items()}
    write_metrics(workdir, board, step, {f"val/{key}": value for key, value in scores.items()})
    report.save_curves(workdir / "curves.png", workdir / "metrics.jsonl")
    log.info(f"step {step}  val mIoU {results['mean_iou']:.4f}")


def _means(history: list[Metrics]) -> dict[str, float]:
    """Means of the steps since the last line of the log."""
    stacked = distributed.fetch(history)
    return {key: float(np.mean([metrics[key] for metrics in stacked])) for key in stacked[0]}


def _require_finite(history: list[Metrics], step: int) -> None:
    """Stop a run whose loss is lost; `history` ends with `step`."""
    losses = [float(metrics["loss"]) for metrics in history]
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"the loss of the last {len(history)} steps before step {step + 1} is not finite:"
            f" {losses}; lower optim.learning_rate or look at the data"
        )


def _line(step: int, num_steps: int, values: dict[str, float], steps_per_second: float) -> str:
    """One line of the log."""
    left = int((num_steps - step) / steps_per_second)
    losses = [f"{k} {values[k]:.4f}" for k in ("loss", "cross_entropy", "contrast") if k in values]
    return (
        f"step {step}/{num_steps}  {'  '.join(losses)}  lr {values['learning_rate']:.2e}"
        f"  {values['images_per_second']:.1f} img/s  waiting for data {values['data_wait']:.0%}"
        f"  ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    )
