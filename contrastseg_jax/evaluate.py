"""Evaluation on whole images: one confusion matrix over the split, exact on the last batch."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from contrastseg_jax import checkpoint, distributed, processes, report
from contrastseg_jax.build import (
    abstract_state,
    build_model,
    build_optimizer,
    dataset_spec,
    decoding,
    image_format,
    initial_variables,
    keep_compiled,
    pad_color,
)
from contrastseg_jax.config import Config, leaves, splits_memory
from contrastseg_jax.data import pipeline
from contrastseg_jax.data.dataset import label_map, open_split
from contrastseg_jax.data.images import decode_image
from contrastseg_jax.data.labels import label_table
from contrastseg_jax.data.pipeline import EvalGroup, Source
from contrastseg_jax.logging import log
from contrastseg_jax.metrics import confusion_matrix, iou, mean_iou, pixel_accuracy
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.resize import most_likely, resize_bilinear
from contrastseg_jax.structs import Batch, ImageFormat, SegmentationOutput, TrainState

LogitsFn = Callable[[Variables, Any], Array]
EvalStep = Callable[[Variables, Batch], tuple[Array, Array]]


def normalize(image: UInt8[Array, "b h w 3"], image_format: ImageFormat) -> Float[Array, "b h w 3"]:
    """Images as a network takes them."""
    mean = jnp.asarray(image_format.mean, jnp.float32)
    std = jnp.asarray(image_format.std, jnp.float32)
    normalized = (image.astype(jnp.float32) - mean[None, None, None]) / std[None, None, None]
    return normalized[..., ::-1] if image_format.channel_order == "BGR" else normalized


def inference_variables(state: TrainState) -> Variables:
    """What a network needs to predict: the running averages where the run keeps them."""
    if state.ema is not None:
        return state.ema
    return {"params": state.params, "batch_stats": state.batch_stats}


def network_logits(
    variables: Variables,
    image: UInt8[Array, "b h w 3"],
    *,
    model: Segmenter,
    image_format: ImageFormat,
) -> Float[Array, "b hs ws k"]:
    """Logits at the network's output stride."""
    normalized = normalize(image, image_format)
    return cast(SegmentationOutput, model.apply(variables, normalized, train=False)).logits


def score(
    logits: Float[Array, "b hs ws k"], batch: Batch
) -> tuple[UInt8[Array, "b h w"], Int[Array, "k k"]]:
    """Predictions at the size of the labels, and their confusion matrix.

    Rows that only fill up carry no labels.
    """
    image, label = batch.image.shape[1:3], batch.label.shape[1:3]
    if batch.image_size is None or batch.label_size is None:
        prediction = jnp.argmax(resize_bilinear(logits, label), axis=-1)
    else:
        sizes = batch.image_size, batch.label_size
        prediction = most_likely(logits, *sizes, padded_image=image, padded_label=label)
    counts = confusion_matrix(batch.label, prediction, num_classes=logits.shape[-1])
    return prediction.astype(jnp.uint8), counts


def compile_eval_step(config: Config, model: Segmenter, mesh: Mesh) -> EvalStep:
    """`network_logits`, then `score`, for a mesh.

    The network, which takes long, is compiled once per size of images, the score for each size of
    labels as well.
    """
    network = functools.partial(network_logits, model=model, image_format=image_format(config))
    everywhere, split = distributed.replicated(mesh), distributed.split(mesh)
    logits_fn = jax.jit(network, in_shardings=(everywhere, split), out_shardings=split)
    score_fn = jax.jit(score, in_shardings=split, out_shardings=(split, everywhere))
    return lambda variables, batch: score_fn(logits_fn(variables, batch.image), batch)


def group_examples(config: Config, source: Source, split: str, mesh: Mesh) -> list[EvalGroup]:
    """The batches in which a split is evaluated, the same in every evaluation of a run."""
    groups = pipeline.eval_groups(
        source,
        batch_size=_batch_size(config, mesh),
        short_side=config.data.short_side,
        pad_multiple=config.eval.pad_multiple,
        num_threads=config.data.num_threads,
        decoding=decoding(config),
    )
    sizes = {group.image_size for group in groups}
    log.info(
        f"{split}: {len(source)} images are evaluated in {len(groups)} batches; the network is"
        f" compiled for {len(sizes)} size{'s' if len(sizes) > 1 else ''} of them"
    )
    return groups


def evaluate(
    config: Config,
    step_fn: EvalStep,
    variables: Variables,
    source: Source,
    groups: Sequence[EvalGroup],
    split: str,
    step: int,
    *,
    mesh: Mesh,
    folder: Path,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Scores on the records of a split, in groups, after `step` steps of training.

    They go to `folder/metrics.json`, and to `folder/index.html` together with the first images of
    process 0, drawn beside label and prediction. `before_batch` may raise to end it early.
    """
    spec = dataset_spec(config)
    classes = label_map(spec)
    batches = pipeline.eval_batches(
        source,
        groups,
        label_map=classes,
        batch_size=_batch_size(config, mesh),
        short_side=config.data.short_side,
        pad_color=pad_color(config),
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        decoding=decoding(config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    confusion = np.zeros((len(classes.names),) * 2, np.int64)  # more pixels than int32 can count
    pictures, num_pictures = [], config.eval.num_pictures if processes.is_first() else 0
    for batch in batches:
        before_batch()
        prediction, counts = step_fn(variables, distributed.to_devices(batch, mesh))
        confusion += np.asarray(counts)
        for row in np.flatnonzero(batch.valid)[: num_pictures - len(pictures)]:
            example_id = int(batch.example_id[row])
            pictures.append(f"{example_id:06d}.png")
            record = source[example_id]
            image = decode_image(record["image"], pictures[-1], decoding(config))
            height, width = image.shape[:2]
            report.save_panel(
                folder / pictures[-1],
                image,
                batch.label[row, :height, :width],
                distributed.local_rows(prediction)[row, :height, :width],
                classes,
                record["name"].decode(),
            )
    results = {
        "data": spec.name,
        "split": split,
        "step": step,
        "num_images": len(source),
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "iou": dict(zip(classes.names, iou(confusion).tolist(), strict=True)),
        "confusion": confusion.tolist(),
    }
    if processes.is_first():
        report.save_evaluation(folder, results, pictures)
    return results


def _batch_size(config: Config, mesh: Mesh) -> int:
    return -(-config.eval.batch_size // mesh.size) * mesh.size


def load_run(config: Config, workdir: Path, which: str) -> tuple[Segmenter, Variables, int, Mesh]:
    """The network of a run with the parameters of a checkpoint: "latest", "best" or a step.

    "init": those that training starts from; of a run there may be nothing yet.
    """
    mesh = distributed.make_mesh()
    model = build_model(config, len(label_map(dataset_spec(config)).names))
    if which == "init":
        variables = jax.device_put(
            initial_variables(config, model, whole=True), distributed.replicated(mesh)
        )
        return model, variables, 0, mesh
    tx, _ = build_optimizer(config)
    state = abstract_state(config, model, tx)
    # Laid out as in training, where the devices at hand allow it: whole it may not fit.
    uneven = (config.memory.pixel_size % mesh.size, config.memory.segment_size % mesh.size)
    of_state = distributed.state_sharding(
        mesh,
        state,
        split_memory=splits_memory(config) and not any(uneven),
        fsdp=config.parallel.fsdp,
    )
    with contextlib.closing(checkpoint.open_reader(workdir)) as manager:
        # As process 0 sees it: a run beside this one may save another at any moment.
        found = processes.together(lambda: checkpoint.find_step(manager, which))
        step = int(processes.gather(str(found))[0])
        state = checkpoint.restore(manager, step, state, of_state)
    log.info(f"{manager.directory / str(step)}: {config.model.name} after {step} steps")
    variables = jax.device_put(inference_variables(state), distributed.replicated(mesh))
    return model, variables, step, mesh


def evaluate_run(config: Config, workdir: Path, which: str, split: str) -> None:
    """Evaluate a checkpoint of a workdir, and print the table of its scores."""
    spec = dataset_spec(config)
    source = processes.first_then_others(lambda: open_split(spec, split))
    facts = {"images": len(source), "--checkpoint": which, "--split": split}
    processes.require_same(dict(leaves(config)) | facts)
    log.info(f"{spec.name}: {len(source)} images to evaluate, of {split}")
    log.info(label_table(label_map(spec)))
    model, variables, step, mesh = load_run(config, workdir, which)
    keep_compiled(config, workdir)  # makes the folder, so not before all that may be refused
    folder = workdir / "eval" / (str(step) if split == "val" else f"{step}_{split}")
    step_fn = compile_eval_step(config, model, mesh)
    groups = group_examples(config, source, split, mesh)
    results = evaluate(
        config, step_fn, variables, source, groups, split, step, mesh=mesh, folder=folder
    )
    for name, value in report.score_rows(results).items():
        log.info(f"{name:20} {value:.4f}")
    log.info(f"pictures: {folder / 'index.html'}")
