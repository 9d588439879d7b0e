"""Evaluation on whole images: exact metrics of a split, including the last partial batch."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from contrastseg_jax.config.rules import PROTOCOL
from contrastseg_jax.config.tree import Config, leaves
from contrastseg_jax.data import pictures, pipeline
from contrastseg_jax.data.audit.report import audited_class_weights
from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.images import decode_image
from contrastseg_jax.data.labels import label_table
from contrastseg_jax.data.pipeline import EvalGroup, Source
from contrastseg_jax.data.prepared import fingerprint, read_names
from contrastseg_jax.errors import InputError, best_effort
from contrastseg_jax.evaluation import metrics, programs
from contrastseg_jax.evaluation.diagnosis import logged_symptoms
from contrastseg_jax.evaluation.metrics import METRICS, Metric, image_counts
from contrastseg_jax.evaluation.programs import Programs
from contrastseg_jax.evaluation.protocols import Images, Protocol, configured, protocol_name
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.ops.resize import resized_argmax
from contrastseg_jax.parallel import processes, sharding
from contrastseg_jax.report import evaluation
from contrastseg_jax.report.image_counts import ImageCounts, save_image_counts
from contrastseg_jax.run.checkpoint_files import find_step
from contrastseg_jax.run.compilation_cache import set_compilation_cache
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.record import environment, save_evaluation_record
from contrastseg_jax.run.workdir import evaluation_folder, read_config, recorded_images
from contrastseg_jax.setup.resolve import load_network
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import Batch, SegmentationOutput
from contrastseg_jax.text import count_of, table
from contrastseg_jax.weights.load import require_finite

Counts = dict[str, Any]  # by metric


@dataclass(frozen=True)
class Evaluator:
    """The batches of a split, the same in every evaluation of a run, and the programs to score it.

    The network, which takes long to compile, is compiled once per image size; the scores also per
    label size.
    """

    setup: Setup
    split: str
    protocol: str  # its name
    source: Source
    groups: Sequence[EvalGroup]
    network: Programs  # variables, images -> logits
    score: Programs  # logits, batch -> predictions, counts, counts of each image


def make_evaluator(
    setup: Setup, source: Source, split: str, *, protocol: Protocol | None = None
) -> Evaluator:
    """The evaluator of a split, by the config's protocol or another; compiles nothing yet."""
    protocol = protocol or configured(setup.config)
    groups = pipeline.eval_groups(
        source,
        preprocessing=setup.preprocessing,
        batch_size=batch_size(setup),
        pad_multiple=setup.config.eval.pad_multiple,
        loading=pipeline.loading_settings(setup.config),
    )
    sizes = {group.image_size for group in groups}
    log.info(
        f"{split}: {count_of(len(source), 'image')} to evaluate in"
        f" {count_of(len(groups), 'batch', 'batches')}; compiling the network for"
        f" {count_of(len(sizes), 'image size')}"
    )
    if note := seen_note(setup, split):
        log.warning(note)
    replicated, split_rows = sharding.replicated(setup.mesh), sharding.batch_sharding(setup.mesh)
    return Evaluator(
        setup=setup,
        split=split,
        protocol=protocol_name(protocol),
        source=source,
        groups=groups,
        network=compile_network(setup, protocol),
        score=programs.by_shape(
            functools.partial(score, metrics=metrics.configured(setup.config)),
            in_shardings=split_rows,
            out_shardings=(split_rows, replicated, split_rows),
        ),
    )


def seen_note(setup: Setup, split: str) -> str:
    """What the scores of a split that is trained on do not tell; empty: it is not."""
    if split not in setup.config.data.train_splits:
        return ""
    note = f"{split} is one of data.train_splits: its scores tell how well it was learnt, not more"
    return note + (", and the best checkpoint is chosen by them" if split == "val" else "")


def compile_network(setup: Setup, protocol: Protocol) -> Programs:
    """`network_logits` on the setup's mesh, compiled per shape of variables and images."""
    replicated, split_rows = sharding.replicated(setup.mesh), sharding.batch_sharding(setup.mesh)
    network = functools.partial(network_logits, setup=setup, protocol=protocol)
    return programs.by_shape(
        network, in_shardings=(replicated, split_rows), out_shardings=split_rows
    )


def network_logits(
    variables: Variables, image: UInt8[Array, "b h w 3"], *, setup: Setup, protocol: Protocol
) -> Float[Array, "b hs ws k"]:
    """Logits at the network's output stride, or the objective's if it replaces them."""
    network = {name: variables[name] for name in ("params", "batch_stats")}
    logits_of = setup.objective and setup.objective.logits

    def logits(image: Images) -> Float[Array, "b hs ws k"]:
        normalized = normalize(image, setup.image_format)
        output = setup.model.apply(network, normalized, train=False, embed=bool(logits_of))
        output = cast(SegmentationOutput, output)
        return logits_of(variables["memory"], output) if logits_of else output.logits

    return protocol(logits, image)


def score(
    logits: Float[Array, "b hs ws k"], batch: Batch, *, metrics: Mapping[str, Metric] = METRICS
) -> tuple[UInt8[Array, "b h w"], Counts, Int[Array, "b 3 k"]]:
    """Predictions at the size of the labels, the counts of each metric, and `image_counts`.

    Padding rows have no labels.
    """
    image, label = batch.image.shape[1:3], batch.label.shape[1:3]
    image_size, label_size = batch.image_size, batch.label_size
    if image_size is None or label_size is None:
        image_size, label_size = (
            jnp.tile(jnp.asarray(size, jnp.int32), (len(logits), 1)) for size in (image, label)
        )
    prediction = resized_argmax(
        logits, image_size, label_size, padded_image=image, padded_label=label
    )
    num_classes = logits.shape[-1]
    counts = {
        name: metric.count(batch.label, prediction, num_classes=num_classes)
        for name, metric in metrics.items()
    }
    per_image = image_counts(batch.label, prediction, num_classes=num_classes)
    return prediction.astype(jnp.uint8), counts, per_image


def require_memory(evaluator: Evaluator, variables: Variables) -> None:
    """Raise an InputError if the largest images or labels of a split do not fit into memory."""
    for size_of in (attrgetter("image_size"), attrgetter("label_size")):
        group_of = {size_of(group): group for group in reversed(evaluator.groups)}
        height, width = max(group_of, key=math.prod)
        group = group_of[height, width]
        try:
            processes.sync_errors(functools.partial(_compile, evaluator, variables, group))
        except InputError as error:
            name = evaluator.source[group.example_ids[0]]["name"].decode()
            raise InputError(
                f"{evaluator.split}, image {name}: evaluating {batch_size(evaluator.setup)} at a"
                f" time, padded to {width}x{height} pixels, {error}; lower eval.batch_size or"
                " data.short_side, or cut it into tiles"
            ) from error


def _compile(evaluator: Evaluator, variables: Variables, group: EvalGroup) -> None:
    """Compile both programs for the sizes of a group."""
    setup = evaluator.setup
    num_rows, by_rows = batch_size(setup), sharding.batch_sharding(setup.mesh)
    replicated = sharding.replicated(setup.mesh)

    def rows(dtype: Any, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_rows, *size), dtype, sharding=by_rows)

    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), variables
    )
    image, label = rows(np.uint8, *group.image_size, 3), rows(np.uint8, *group.label_size)
    sizes = (rows(np.int32, 2),) * 2 if setup.config.data.short_side else ()
    logits = evaluator.network(variables, image).out_info
    evaluator.score(logits, Batch(image, label, rows(np.int32), rows(np.bool_), *sizes))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def evaluate(
    evaluator: Evaluator,
    variables: Variables,
    step: int,
    *,
    folder: Path,
    workdir: Path,
    before_batch: Callable[[Exception | None], None] = _raise,
) -> dict[str, Any]:
    """Scores of a split, after `step` steps of training.

    They are written to `folder/metrics.json` and `folder/index.html`, which also shows the first
    images of process 0 with labels and predictions, and says which failures of contrast the
    workdir's metrics show; what was counted in each image, to `folder/image_counts.npz`. Classes
    that are never predicted are logged, with the class weights of an audit in the workdir.
    `before_batch` receives the error if a batch could not be made, and may raise to end the
    evaluation.
    """
    require_finite(variables, step)
    setup, panels, counted = evaluator.setup, [], []
    totals: Any = None  # counts by metric
    num_panels = setup.config.eval.num_pictures if processes.is_first() else 0
    for batch in _asking(make_batches(evaluator), before_batch):
        on_devices = sharding.to_devices(batch, setup.mesh)
        logits = programs.run(evaluator.network, variables, on_devices.image)
        prediction, counts, per_image = programs.run(evaluator.score, logits, on_devices)
        # In int64, as a split has more pixels than int32 can count.
        counts = jax.tree.map(lambda x: np.asarray(x, np.int64), counts)
        totals = counts if totals is None else jax.tree.map(np.add, totals, counts)
        counted.append((batch.example_id, sharding.local_rows(per_image)))
        panels += _draw_panels(evaluator, batch, prediction, folder, num_panels)
        num_panels = max(0, num_panels - int(batch.valid.sum()))  # those that failed too
    results = {
        "data": setup.data.name,
        "split": evaluator.split,
        "step": step,
        "num_images": len(evaluator.source),
    }
    for name, metric in metrics.configured(setup.config).items():
        results |= metric.result(totals[name], setup.classes.names)
    advice = unpredicted_advice(setup, results["never_predicted"], workdir)
    if advice and processes.is_first():
        log.info(advice)

    of_images = join_image_counts(evaluator, counted)

    def write() -> None:
        save_image_counts(folder, of_images)
        save_evaluation_record(folder, describe(evaluator, step), workdir)
        found = logged_symptoms(workdir, step, setup.config)
        notes = filter(None, [seen_note(setup, evaluator.split), advice, *found])
        # Last: they say that the evaluation is complete.
        evaluation.save_image_scores(folder, of_images)
        evaluation.save_evaluation(folder, results, panels, [*notes])

    processes.sync_errors(write if processes.is_first() else lambda: None)
    return results


def require_same_protocol(config: Config, workdir: Path) -> None:
    """Raise an InputError for scores that are not those by which the run's best is chosen."""
    values, run = dict(leaves(config)), dict(leaves(read_config(workdir)))
    if other := [path for path in PROTOCOL if values[path] != run[path]]:
        texts = ", ".join(f"{path} = {values[path]!r} (the run: {run[path]!r})" for path in other)
        raise InputError(
            f"{texts}: scores of another protocol than the run's are not written into its folder;"
            " give --output=FOLDER"
        )


def describe(evaluator: Evaluator, step: int) -> dict[str, Any]:
    """What an evaluation is of, for its record."""
    setup = evaluator.setup
    return environment(setup.mesh) | {
        "config": setup.config.to_dict(),
        "step": step,
        "split": evaluator.split,
        "protocol": evaluator.protocol,
        "data": {
            "name": setup.data.name,
            "fingerprint": fingerprint(evaluator.source),
            "images": len(evaluator.source),
        },
    }


def join_image_counts(
    evaluator: Evaluator, counted: Sequence[tuple[Int[np.ndarray, " b"], Int[np.ndarray, "b 3 k"]]]
) -> ImageCounts:
    """The counts of every image of the split, from the rows of all processes.

    `counted`: example ids and `image_counts` of this process's rows of each batch. All processes
    must call it.
    """
    mesh = evaluator.setup.mesh
    example_id, rows = (
        sharding.all_rows(np.concatenate(parts), mesh) for parts in zip(*counted, strict=True)
    )
    order = np.argsort(example_id)
    order = order[example_id[order] >= 0]  # without rows of padding
    intersection, labelled, predicted = np.moveaxis(rows[order], 1, 0)
    names = {i: n for g in evaluator.groups for i, n in zip(g.example_ids, g.names, strict=True)}
    return ImageCounts(
        split=evaluator.split,
        protocol=evaluator.protocol,
        image_names=tuple(names[i] for i in example_id[order].tolist()),
        class_names=tuple(evaluator.setup.classes.names),
        intersection=intersection,
        labelled=labelled,
        predicted=predicted,
    )


def make_batches(evaluator: Evaluator) -> Iterator[Batch]:
    """This process's rows of the batches of a split."""
    setup = evaluator.setup
    return pipeline.eval_batches(
        evaluator.source,
        evaluator.groups,
        preprocessing=setup.preprocessing,
        batch_size=batch_size(setup),
        loading=pipeline.loading_settings(setup.config),
        shard=pipeline.Shard(jax.process_index(), jax.process_count()),
    )


def _asking(
    batches: Iterator[Batch], before_batch: Callable[[Exception | None], None]
) -> Iterator[Batch]:
    """The batches, calling `before_batch` before each one and at the end."""
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


def _draw_panels(
    evaluator: Evaluator,
    batch: Batch,
    prediction: UInt8[Array, "b2 h w"],
    folder: Path,
    most: int,
) -> list[str]:
    """Draw the first images of this process's rows; returns their file names."""
    if most <= 0:
        return []
    drawn, predicted = [], sharding.local_rows(prediction)
    for row in np.flatnonzero(batch.valid)[:most]:
        example_id = int(batch.example_id[row])
        name = f"{example_id:06d}.png"
        with best_effort(str(folder / name)):
            record = evaluator.source[example_id]
            image = decode_image(record["image"], name, evaluator.setup.data.decoding)
            height, width = image.shape[:2]
            pictures.save_panel(
                folder / name,
                image,
                batch.label[row, :height, :width],
                predicted[row, :height, :width],
                evaluator.setup.classes,
                record["name"].decode(),
            )
            drawn.append(name)
    return drawn


def unpredicted_advice(setup: Setup, names: Sequence[str], workdir: Path) -> str:
    """Advice for classes that are labelled but never predicted; empty if there are none."""
    if not names:
        return ""
    advice = f"labelled but never predicted: {', '.join(names)}; "
    if setup.config.loss.class_weights or setup.config.loss.class_weighting != "given":
        return f"{advice}raise their loss.class_weights in a new run"
    advice += "class weights may help, in a new run"
    weights = audited_class_weights(workdir, setup.classes.names)
    if weights is None:
        return f"{advice}: --mode=audit --workdir={workdir} computes them"
    return f'{advice}: --config.loss.class_weights="({", ".join(map(str, weights))})"'


def batch_size(setup: Setup) -> int:
    """Global batch size: eval.batch_size, rounded up to a multiple of the devices."""
    num_devices = setup.mesh.size
    return -(-setup.config.eval.batch_size // num_devices) * num_devices


def evaluate_run(
    setup: Setup, workdir: Path, checkpoint: str, split: str, output: Path | None = None
) -> dict[str, Any]:
    """Evaluate a checkpoint of a workdir, log the table of its scores, and return them.

    `output`: folder for the results; then nothing is written to the workdir.
    """
    if checkpoint != "init":  # before reading the data, which may take long
        if output is None:
            require_same_protocol(setup.config, workdir)
        processes.sync_errors(lambda: find_step(workdir, checkpoint))
    source = processes.first_then_others(lambda: open_split(setup.data, split))
    recorded = recorded_images(workdir, f"split/{split}")
    if recorded is not None and recorded != read_names(source, split):
        log.warning(
            f"{split}: images have come or gone since the run began with those that"
            f" {workdir}/split/{split}.txt lists; it may have been trained on some of these"
        )
    given = {"images": len(source), "--checkpoint": checkpoint, "--split": split}
    processes.require_same(dict(leaves(setup.config)) | given)
    log.info(f"{setup.data.name}: {count_of(len(source), 'image')} to evaluate, split {split}")
    log.info(label_table(setup.classes))
    evaluator = make_evaluator(setup, source, split)
    variables, step = load_network(setup, workdir, checkpoint)
    # Creates the folder, so only after everything that may be rejected.
    set_compilation_cache(setup.config, None if output else workdir)
    require_memory(evaluator, variables)
    folder = output or evaluation_folder(workdir, step, split)
    results = evaluate(evaluator, variables, step, folder=folder, workdir=workdir)
    for line in (*table(evaluation.class_rows(results)), evaluation.summary(results)):
        log.info(line)
    log.info(f"pictures: {folder / 'index.html'}")
    return results
