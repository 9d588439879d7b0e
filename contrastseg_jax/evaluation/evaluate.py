"""Evaluation on whole images: one confusion matrix over the split, exact on the last batch."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from contrastseg_jax.config.tree import Config, leaves
from contrastseg_jax.data import pictures, pipeline
from contrastseg_jax.data.audit.report import audited_class_weights
from contrastseg_jax.data.dataset import (
    dataset_spec,
    decoding,
    label_map,
    open_split,
    preprocessing,
)
from contrastseg_jax.data.images import decode_image
from contrastseg_jax.data.labels import label_table
from contrastseg_jax.data.pipeline import EvalGroup, Source
from contrastseg_jax.errors import InputError, best_effort
from contrastseg_jax.evaluation import programs
from contrastseg_jax.evaluation.metrics import (
    confusion_matrix,
    iou,
    mean_iou,
    never_predicted,
    pixel_accuracy,
)
from contrastseg_jax.evaluation.programs import Programs
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.ops.resize import most_likely
from contrastseg_jax.parallel import processes, sharding
from contrastseg_jax.report import evaluation
from contrastseg_jax.run import checkpoint
from contrastseg_jax.run.compilation_cache import keep_compiled
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import evaluation_folder
from contrastseg_jax.setup.setup import image_format, pad_color
from contrastseg_jax.structs import Batch, ImageFormat, SegmentationOutput
from contrastseg_jax.text import table
from contrastseg_jax.weights.load import load_run, require_finite


class EvalStep(NamedTuple):
    """The two programs of an evaluation, by the shapes of their arguments."""

    network: Programs  # variables, images -> logits
    score: Programs  # logits, batch -> predictions, confusion matrix


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
    image_size, label_size = batch.image_size, batch.label_size
    if image_size is None or label_size is None:
        image_size, label_size = (
            jnp.tile(jnp.asarray(size, jnp.int32), (len(logits), 1)) for size in (image, label)
        )
    prediction = most_likely(logits, image_size, label_size, padded_image=image, padded_label=label)
    counts = confusion_matrix(batch.label, prediction, num_classes=logits.shape[-1])
    return prediction.astype(jnp.uint8), counts


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def compile_network(config: Config, model: Segmenter, mesh: Mesh) -> Programs:
    """`network_logits`, for variables and images; it takes long, so only once for each size."""
    network = functools.partial(network_logits, model=model, image_format=image_format(config))
    everywhere, split = sharding.replicated(mesh), sharding.split(mesh)
    return programs.by_shape(network, in_shardings=(everywhere, split), out_shardings=split)


def compile_eval_step(config: Config, model: Segmenter, mesh: Mesh) -> EvalStep:
    """`network_logits`, then `score`, for a mesh.

    The network, which takes long, is compiled once per size of images, the score for each size of
    labels as well.
    """
    everywhere, split = sharding.replicated(mesh), sharding.split(mesh)
    return EvalStep(
        compile_network(config, model, mesh),
        programs.by_shape(score, in_shardings=split, out_shardings=(split, everywhere)),
    )


def require_memory(
    config: Config,
    eval_step: EvalStep,
    variables: Variables,
    source: Source,
    groups: Sequence[EvalGroup],
    split: str,
    mesh: Mesh,
) -> None:
    """Raise an error if the largest images of a split, or the largest labels, do not fit."""
    for size_of in (attrgetter("image_size"), attrgetter("label_size")):
        group_of = {size_of(group): group for group in reversed(groups)}
        height, width = max(group_of, key=math.prod)
        group = group_of[height, width]
        try:
            processes.together(
                functools.partial(_compile, config, eval_step, variables, group, mesh)
            )
        except InputError as error:
            name = source[group.example_ids[0]]["name"].decode()
            raise InputError(
                f"{split}, image {name}: to evaluate {_batch_size(config, mesh)} at a time, padded"
                f" to {width}x{height} pixels, {error}; lower eval.batch_size or data.short_side,"
                " or cut it into tiles"
            ) from error


def _compile(
    config: Config, eval_step: EvalStep, variables: Variables, group: EvalGroup, mesh: Mesh
) -> None:
    """Compile both programs for a group's sizes."""
    num_rows, of_rows = _batch_size(config, mesh), sharding.split(mesh)
    everywhere = sharding.replicated(mesh)

    def rows(dtype: Any, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_rows, *size), dtype, sharding=of_rows)

    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), variables
    )
    image, label = rows(np.uint8, *group.image_size, 3), rows(np.uint8, *group.label_size)
    sizes = (rows(np.int32, 2),) * 2 if config.data.short_side else ()
    logits = eval_step.network(variables, image).out_info
    eval_step.score(logits, Batch(image, label, rows(np.int32), rows(np.bool_), *sizes))


def group_examples(config: Config, source: Source, split: str, mesh: Mesh) -> list[EvalGroup]:
    """The batches in which a split is evaluated, the same in every evaluation of a run."""
    groups = pipeline.eval_groups(
        source,
        preprocessing=preprocessing(config, pad_color(config)),
        batch_size=_batch_size(config, mesh),
        pad_multiple=config.eval.pad_multiple,
        loading=pipeline.loading_settings(config),
    )
    sizes = {group.image_size for group in groups}
    log.info(
        f"{split}: {len(source)} images are evaluated in {len(groups)} batches; the network is"
        f" compiled for {len(sizes)} size{'s' if len(sizes) > 1 else ''} of them"
    )
    return groups


def evaluate(
    config: Config,
    eval_step: EvalStep,
    variables: Variables,
    source: Source,
    groups: Sequence[EvalGroup],
    split: str,
    step: int,
    *,
    mesh: Mesh,
    folder: Path,
    workdir: Path,
    before_batch: Callable[[Exception | None], None] = _raise,
) -> dict[str, Any]:
    """Scores on the records of a split, in groups, after `step` steps of training.

    They go to `folder/metrics.json`, and to `folder/index.html` together with the first images of
    process 0, drawn beside label and prediction. Classes that are never predicted are named, with
    the weights of an audit in the workdir. `before_batch` is given the error of a batch that cannot
    be made, and may raise that or another one to end it early.
    """
    require_finite(variables, step)
    spec = dataset_spec(config)
    classes = label_map(spec)
    batches = pipeline.eval_batches(
        source,
        groups,
        preprocessing=preprocessing(config, pad_color(config)),
        batch_size=_batch_size(config, mesh),
        loading=pipeline.loading_settings(config),
        shard=pipeline.Shard(jax.process_index(), jax.process_count()),
    )
    confusion = np.zeros((len(classes.names),) * 2, np.int64)  # more pixels than int32 can count
    drawn, num_pictures = [], config.eval.num_pictures if processes.is_first() else 0
    for batch in _asking(batches, before_batch):
        on_devices = sharding.to_devices(batch, mesh)
        logits = programs.run(eval_step.network, variables, on_devices.image)
        prediction, counts = programs.run(eval_step.score, logits, on_devices)
        confusion += np.asarray(counts)
        predicted = sharding.local_rows(prediction)
        shown = np.flatnonzero(batch.valid)[:num_pictures]
        num_pictures -= len(shown)
        for row in shown:
            example_id = int(batch.example_id[row])
            picture = f"{example_id:06d}.png"
            with best_effort(str(folder / picture)):
                record = source[example_id]
                image = decode_image(record["image"], picture, decoding(config))
                height, width = image.shape[:2]
                pictures.save_panel(
                    folder / picture,
                    image,
                    batch.label[row, :height, :width],
                    predicted[row, :height, :width],
                    classes,
                    record["name"].decode(),
                )
                drawn.append(picture)
    results = {
        "data": spec.name,
        "split": split,
        "step": step,
        "num_images": len(source),
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "iou": dict(zip(classes.names, iou(confusion).tolist(), strict=True)),
        "never_predicted": [classes.names[i] for i in never_predicted(confusion)],
        "confusion": confusion.tolist(),
    }
    advice = unpredicted_advice(results["never_predicted"], config, workdir)
    if advice and processes.is_first():
        log.info(advice)

    def write() -> None:
        evaluation.save_evaluation(folder, results, drawn, advice)

    processes.together(write if processes.is_first() else lambda: None)
    return results


def _asking(
    batches: Iterator[Batch], before_batch: Callable[[Exception | None], None]
) -> Iterator[Batch]:
    """The batches; `before_batch` is asked before each, and at the end."""
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except Exception as caught:
            error = caught
        before_batch(error)
        if batch is None:
            return
        yield batch


def unpredicted_advice(names: Sequence[str], config: Config, workdir: Path) -> str:
    """What may help classes that are labelled and never predicted; nothing where there are none."""
    if not names:
        return ""
    advice = f"labelled but never predicted: {', '.join(names)}; "
    if config.loss.class_weights:
        return f"{advice}raise their loss.class_weights in a new run"
    advice += "class weights may help, in a new run"
    weights = audited_class_weights(workdir, label_map(dataset_spec(config)).names)
    if weights is None:
        return f"{advice}: --mode=audit --workdir={workdir} computes some"
    return f'{advice}: --config.loss.class_weights="({", ".join(map(str, weights))})"'


def _batch_size(config: Config, mesh: Mesh) -> int:
    return -(-config.eval.batch_size // mesh.size) * mesh.size


def evaluate_run(
    config: Config, workdir: Path, which: str, split: str, output: Path | None = None
) -> None:
    """Evaluate a checkpoint of a workdir, and print the table of its scores.

    `output`: where results go instead of a folder in the workdir, in which nothing is written then.
    """
    if which != "init":  # before the data are read, which may take long
        processes.together(lambda: checkpoint.find_step(workdir, which))
    spec = dataset_spec(config)
    source = processes.first_then_others(lambda: open_split(spec, split))
    facts = {"images": len(source), "--checkpoint": which, "--split": split}
    processes.require_same(dict(leaves(config)) | facts)
    log.info(f"{spec.name}: {len(source)} images to evaluate, of {split}")
    log.info(label_table(label_map(spec)))
    groups = group_examples(config, source, split, sharding.make_mesh())
    model, variables, step, mesh = load_run(config, workdir, which)
    # Makes the folder, so not before all that may be refused.
    keep_compiled(config, None if output else workdir)
    folder = output or evaluation_folder(workdir, step, split)
    eval_step = compile_eval_step(config, model, mesh)
    require_memory(config, eval_step, variables, source, groups, split, mesh)
    results = evaluate(
        config,
        eval_step,
        variables,
        source,
        groups,
        split,
        step,
        mesh=mesh,
        folder=folder,
        workdir=workdir,
    )
    for line in table([(row, f"{x:.4f}") for row, x in evaluation.score_rows(results).items()]):
        log.info(line)
    log.info(f"pictures: {folder / 'index.html'}")
