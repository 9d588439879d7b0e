"""What runs have learnt of the same pixels: their vectors, with scores and a map of each run."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, UInt8

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.pipeline import Source
from contrastseg_jax.data.preprocess import Size
from contrastseg_jax.data.subset import Subset
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import programs
from contrastseg_jax.evaluation.evaluate import Evaluator, make_batches, make_evaluator
from contrastseg_jax.models.segmenter import Variables, describe_pixels, map_size
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.parallel import sharding
from contrastseg_jax.report import embedding, embedding_page
from contrastseg_jax.run.checkpoint_files import find_step
from contrastseg_jax.run.compilation_cache import set_compilation_cache
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.several import run_names
from contrastseg_jax.setup.resolve import load_network
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import IGNORE_LABEL
from contrastseg_jax.text import count_of, table

SPLIT = "val"
SEED = 0  # of the images and of the pixels that are drawn
MAX_IMAGES = 500
MAX_PER_CLASS = 200  # pixels
MAX_PIXELS = 3000  # of all classes

Vectors = dict[str, Float[np.ndarray, "n _"]]  # of the pixels: "embedding", if any, and "features"
LabelMaps = Sequence[UInt8[np.ndarray, "_ _"]]  # of each image


@dataclass(frozen=True)
class Pixels:
    """Labelled pixels: cells of the coarsest of the runs' maps, in random order."""

    image: Int[np.ndarray, " n"]  # index in the records
    cell: Int[np.ndarray, "n 2"]  # row, column
    label: UInt8[np.ndarray, " n"]


def embed_runs(
    setups: Sequence[Setup], workdirs: Sequence[Path], checkpoint: str, output: Path | None = None
) -> None:
    """Compare what runs of the same data have learnt of the same pixels of `val`.

    Writes embedding.png, embedding.json and embedding.html to `output`, by default to the folder
    `embedding` of the first run, over those of an earlier call.

    Raises:
        InputError: a run lacks the checkpoint, the output cannot be written, or too few pixels or
            classes are labelled.
    """
    output = output or workdirs[0] / "embedding"
    for workdir in workdirs:
        _require_step(workdir, checkpoint)
    source = drawn_images(open_split(setups[0].data, SPLIT))
    evaluators = [make_evaluator(setup, source, SPLIT) for setup in setups]
    grids = coarsest_maps(evaluators)
    classes, maps = setups[0].classes, label_maps(evaluators[0], grids)
    pixels = draw_pixels(maps)
    _require_enough(pixels, classes.names, setups[0].data.name)
    _make_folder(output)  # after all that may be refused
    runs = []
    for name, workdir, evaluator in zip(run_names(workdirs), workdirs, evaluators, strict=True):
        variables, step = load_network(evaluator.setup, workdir, checkpoint)
        set_compilation_cache(evaluator.setup.config, None)
        vectors = read_vectors(evaluator, variables, pixels, grids)
        runs.append(_summary(name, evaluator.setup, step, vectors, pixels, classes.names))
    results = _results(setups[0].data.name, source, pixels, runs)
    embedding_page.save_embedding(output, results, classes)
    for line in table(embedding_page.score_table(results)):
        log.info(line)
    log.info(f"pictures: {output / 'embedding.html'}")


def drawn_images(source: Source) -> Subset:
    """At most `MAX_IMAGES` of a split, the same at every call."""
    order = np.random.default_rng(SEED).permutation(len(source))
    return Subset(source, tuple(sorted(order[:MAX_IMAGES].tolist())))


def coarsest_maps(evaluators: Sequence[Evaluator]) -> dict[Size, Size]:
    """For each padded size of the images, rows and columns that every network's map has."""
    models = [evaluator.setup.model for evaluator in evaluators]
    grids = {}
    for padded in {group.image_size for group in evaluators[0].groups}:
        heights, widths = zip(*(map_size(model, padded) for model in models), strict=True)
        grids[padded] = min(heights), min(widths)
    return grids


def label_maps(evaluator: Evaluator, grids: Mapping[Size, Size]) -> list[UInt8[np.ndarray, "_ _"]]:
    """The labels of each image's cells, IGNORE_LABEL in the padding."""
    found = {}
    for batch in make_batches(evaluator):
        padded = (batch.image.shape[1], batch.image.shape[2])
        for row in np.flatnonzero(batch.valid):
            label, image_size = batch.label[row], padded
            if batch.image_size is not None and batch.label_size is not None:
                height, width = batch.label_size[row]
                label, image_size = label[:height, :width], tuple(batch.image_size[row].tolist())
            found[int(batch.example_id[row])] = cell_labels(
                label, image_size, padded, grids[padded]
            )
    return [found[example_id] for example_id in sorted(found)]


def cell_labels(
    label: UInt8[np.ndarray, "h w"], image_size: Size, padded: Size, grid: Size
) -> UInt8[np.ndarray, "_ _"]:
    """The label of each cell of a map: that of the pixel in which the cell begins.

    As `ops.resize.label_at_stride` where the label is as large as the padded image. Otherwise the
    image was resized to `image_size`, which lies in the upper left corner of `padded`.
    """
    rows, columns = (
        np.arange(grid[axis]) * padded[axis] * label.shape[axis] // (grid[axis] * image_size[axis])
        for axis in (0, 1)
    )
    inside = (rows < label.shape[0])[:, None] & (columns < label.shape[1])
    rows, columns = np.minimum(rows, label.shape[0] - 1), np.minimum(columns, label.shape[1] - 1)
    return np.where(inside, label[rows[:, None], columns], np.uint8(IGNORE_LABEL))


def draw_pixels(maps: LabelMaps) -> Pixels:
    """Cells of each class, at random from all images, as evenly as `quotas` can have it."""
    label = np.concatenate([labels.ravel() for labels in maps])
    starts = np.cumsum([0, *(labels.size for labels in maps)])
    rng = np.random.default_rng(SEED)
    numbers = quotas(np.bincount(label, minlength=IGNORE_LABEL + 1)[:IGNORE_LABEL])
    drawn = [
        rng.choice(np.flatnonzero(label == class_id), numbers[class_id], replace=False)
        for class_id in np.flatnonzero(numbers)
    ]
    # In random order, so that in a picture no class lies above all others.
    place = rng.permutation(np.concatenate([np.zeros(0, np.int64), *drawn]))
    image = np.searchsorted(starts, place, side="right") - 1
    widths = np.array([labels.shape[1] for labels in maps])
    cell = np.stack(np.divmod(place - starts[image], widths[image]), axis=-1)
    return Pixels(image, cell, label[place])


def quotas(counts: Integer[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """How many pixels to draw of classes that have so many.

    At most `MAX_PER_CLASS` of each and `MAX_PIXELS` in all; what a rare class lacks, others have.
    """
    numbers, left = np.zeros(len(counts), np.int64), MAX_PIXELS
    present = [i for i in np.argsort(counts, kind="stable") if counts[i]]
    for rank, class_id in enumerate(present):
        numbers[class_id] = min(counts[class_id], MAX_PER_CLASS, left // (len(present) - rank))
        left -= numbers[class_id]
    return numbers


def read_vectors(
    evaluator: Evaluator, variables: Variables, pixels: Pixels, grids: Mapping[Size, Size]
) -> Vectors:
    """The vectors of the pixels in one run, each of a kind: `embedding` and `features`."""
    setup, num_pixels = evaluator.setup, len(pixels.label)
    by_rows, network = sharding.batch_sharding(setup.mesh), _compile(setup)
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    most = int(np.bincount(pixels.image).max())  # of one image
    vectors: Vectors = {}
    for batch, rows in _batches_with_pixels(evaluator, pixels):
        cells = np.zeros((len(batch.image), most, 2), np.int32)
        for row, members in rows.items():
            cells[row, : len(members)] = pixels.cell[members]
        image, cells = jax.device_put((batch.image, cells), by_rows)
        grid = grids[image.shape[1], image.shape[2]]
        try:
            found = programs.run(network, variables, image, cells, grid=grid)
        except InputError as error:
            raise InputError(
                f"{SPLIT}: {setup.config.model.name} on {len(image)} images at a time, padded to"
                f" {image.shape[2]}x{image.shape[1]} pixels, {error}"
            ) from error
        for kind, values in jax.device_get(found).items():
            for row, members in rows.items():
                vectors.setdefault(kind, np.zeros((num_pixels, values.shape[-1]), np.float32))
                vectors[kind][members] = values[row, : len(members)]
    return vectors


def _batches_with_pixels(
    evaluator: Evaluator, pixels: Pixels
) -> Iterator[tuple[Any, dict[int, Int[np.ndarray, " _"]]]]:
    """The batches in which pixels were drawn, with the pixels of each row that has some."""
    for batch in make_batches(evaluator):
        members = {
            row: np.flatnonzero(pixels.image == batch.example_id[row])
            for row in np.flatnonzero(batch.valid).tolist()
        }
        members = {row: indices for row, indices in members.items() if len(indices)}
        if members:
            yield batch, members


def _compile(setup: Setup) -> programs.Programs:
    """`pixel_vectors` on the setup's mesh."""
    replicated, by_rows = sharding.replicated(setup.mesh), sharding.batch_sharding(setup.mesh)
    return programs.by_shape(
        functools.partial(pixel_vectors, setup=setup),
        in_shardings=(replicated, by_rows, by_rows),
        out_shardings=by_rows,
    )


def pixel_vectors(
    variables: Variables,
    image: UInt8[Array, "b h w 3"],
    cells: Int[Array, "b p 2"],
    *,
    setup: Setup,
    grid: Size,
) -> dict[str, Float[Array, "b p _"]]:
    """What a network says at cells of a map of `grid` rows and columns, whatever its own has.

    A cell of a finer map is found as the pixel of a label is: cell i is floor(i · hs / grid).
    """
    embedded, features = describe_pixels(
        setup.model, variables, normalize(image, setup.image_format)
    )
    size = jnp.array(features.shape[1:3], jnp.int32)
    places = cells * size[None, None] // jnp.array(grid, jnp.int32)[None, None]
    maps = (
        {"features": features}
        if embedded is None
        else {"embedding": embedded, "features": features}
    )
    return {
        kind: jax.vmap(lambda x, place: x[place[:, 0], place[:, 1]])(x, places)
        for kind, x in maps.items()
    }


def _summary(
    name: str,
    setup: Setup,
    step: int,
    vectors: Vectors,
    pixels: Pixels,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """A run's scores, and the map of its embeddings, or without such, of its features."""
    for kind, values in vectors.items():
        if not np.isfinite(values).all():
            raise FloatingPointError(f"{name}: {kind} of step {step} are not finite")
    shown = "embedding" if "embedding" in vectors else "features"
    log.info(f"{name}: t-SNE of the {count_of(len(pixels.label), 'pixel')}")
    return {
        "name": name,
        "network": setup.config.model.name,
        "step": step,
        "shown": shown,
        "sizes": {kind: values.shape[1] for kind, values in vectors.items()},
        "scores": {
            kind: embedding.scores(values, pixels.label, class_names)
            for kind, values in vectors.items()
        },
        "map": embedding.tsne(vectors[shown]).tolist(),
    }


def _results(
    data_name: str, source: Source, pixels: Pixels, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """All that embedding.json has: the pixels, and what each run says of them."""
    return {
        "data": data_name,
        "split": SPLIT,
        "num_images": len(source),
        "num_pixels": len(pixels.label),
        "perplexity": embedding.perplexity(len(pixels.label)),
        "runs": list(runs),
        "pixels": {
            "image": [source[i]["name"].decode() for i in pixels.image.tolist()],
            "cell": pixels.cell.tolist(),
            "label": pixels.label.tolist(),
        },
    }


def _make_folder(output: Path) -> None:
    """Create the folder for the results, and check that it is writable."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise InputError(f"--output={output}: cannot be written ({reason})") from error


def _require_step(workdir: Path, checkpoint: str) -> None:
    """Raise an InputError that names the run which lacks the checkpoint."""
    try:
        find_step(workdir, checkpoint)
    except InputError as error:
        raise InputError(f"--runs={workdir}: {error}") from error


def _require_enough(pixels: Pixels, class_names: Sequence[str], data_name: str) -> None:
    """Raise an InputError for labels of which no silhouette or no map can be made."""
    present = set(pixels.label.tolist())
    labelled = [name for class_id, name in enumerate(class_names) if class_id in present]
    if len(labelled) < 2:
        names = ", ".join(labelled) or "none"
        raise InputError(
            f"{data_name}, split {SPLIT}: classes with labelled pixels: {names}; a silhouette needs"
            " at least 2"
        )
    if len(pixels.label) < embedding.MIN_PIXELS:
        raise InputError(
            f"{data_name}, split {SPLIT}: has {len(pixels.label)} labelled pixels at the stride of"
            f" the networks; a map needs at least {embedding.MIN_PIXELS}"
        )
