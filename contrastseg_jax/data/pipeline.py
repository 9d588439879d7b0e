"""Records to batches with Grain: read, decode, augment and stack in threads or processes.

A training batch is a pure function of (seed, step), so a run resumes anywhere at no cost. Row r of
step s is row g = s * batch_size + r of an endless sequence of shuffled epochs; g also seeds the
example's augmentation, so how rows are spread over processes, workers and threads changes nothing.
A row that is mixed with another takes row g + 1 of that sequence, which whoever makes row g makes a
second time: nobody waits for anybody, and a share `class_mix_rate` more examples are decoded.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import cv2
import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8

from contrastseg_jax.config.tree import Config
from contrastseg_jax.data.augment import Augmentation, augment, mix_classes
from contrastseg_jax.data.images import image_size
from contrastseg_jax.data.preprocess import (
    Example,
    Size,
    open_example,
    pad,
    padded_size,
    resize_image,
    resized_size,
    too_large,
)
from contrastseg_jax.data.spec import Decoding, Preprocessing
from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.structs import IGNORE_LABEL, Batch

Source = Sequence[dict[str, bytes]]  # what `open_split` returns
Image = UInt8[np.ndarray, "h w 3"]
Label = UInt8[np.ndarray, "h w"]
Row = tuple[Image, Label, int, *tuple[Size, ...]]  # as `Batch`; example id -1: no example
Batches = grain.DatasetIterator[Batch]

cv2.setNumThreads(0)  # Grain's threads are the parallelism


@dataclass(frozen=True)
class Loading:
    """How the work is spread over threads and processes; it changes no batch."""

    num_threads: int  # that prepare examples, in each worker
    num_workers: int = 0  # processes that make training batches; 0: this one
    prefetch: int = 1  # batches prepared ahead
    cache_size: int = 0  # decoded training examples kept in memory, by each worker


@dataclass(frozen=True)
class Shard:
    """The rows of every batch that one of several processes loads."""

    index: int = 0
    count: int = 1


ALL_ROWS = Shard()


@dataclass(frozen=True)
class EvalGroup:
    """The examples of one batch of an evaluation, and the padded sizes that hold each of them."""

    image_size: Size
    label_size: Size
    example_ids: list[int]
    names: list[str]  # of the examples


def loading_settings(config: Config) -> Loading:
    """How a config spreads the work."""
    data = config.data
    return Loading(data.num_threads, data.num_workers, data.prefetch, data.cache_size)


def train_batches(
    source: Source,
    *,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    batch_size: int,
    steps: range,
    seed: int,
    loading: Loading,
    shard: Shard = ALL_ROWS,
) -> Batches:
    """Batches of the given steps: this process's rows of each.

    Every example comes once per epoch; a batch may span two epochs, so none is dropped. To be
    closed after use, which ends the workers.

    Args:
        source: the records of a split.
        preprocessing: how they become images and labels.
        augmentation: the distribution of views.
        batch_size: rows of all processes together, a multiple of their number.
        steps: from the one to resume at to the end of the run.
        seed: of the order and of the augmentation.
        loading: threads, workers and buffers.
        shard: the rows to load.

    Raises:
        InputError: while iterating, for a record that cannot be decoded; it names the example.
    """
    order = _endless_order(len(source), seed)
    open_source = partial(_open_example, source.__getitem__, preprocessing=preprocessing)
    load = partial(
        _load_view,
        order=order,
        open_by_id=partial(_cached, open_source, cache_size=loading.cache_size, cache={}),
        view=partial(
            augment,
            augmentation=augmentation,
            short_side=preprocessing.short_side,
            pad_color=preprocessing.pad_color,
        ),
        class_mix_rate=augmentation.class_mix_rate,
        batch_size=batch_size,
        seed=seed,
    )
    return _batches(load, steps=steps, rows=_shard_rows(batch_size, shard), loading=loading)


def example_ids(num_examples: int, *, seed: int, batch_size: int, step: int) -> list[int]:
    """The examples of the training batch that step `step` of `train_batches` has, row by row."""
    order = _endless_order(num_examples, seed)
    return [cast(int, order[index]) for index in range(step * batch_size, (step + 1) * batch_size)]


def _endless_order(num_examples: int, seed: int) -> grain.MapDataset[int]:
    """Shuffled epochs, one after the other."""
    # Grain shuffles epoch e by seed + e: without mixing, neighbouring seeds would share epochs.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(num_examples).shuffle(shuffle_seed).repeat()


def eval_groups(
    source: Source,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    pad_multiple: int,
    loading: Loading,
) -> list[EvalGroup]:
    """Which examples are evaluated together: up to `batch_size` whose padded sizes are the same.

    Reads every record of the split, for its name and the header of its image, so a run calls it
    once.

    Args:
        source: the records of a split.
        preprocessing: how images are decoded and resized.
        batch_size: rows of all processes together.
        pad_multiple: what heights and widths are rounded up to a multiple of.
        loading: threads that read.

    Raises:
        InputError: for an image whose header cannot be read, or for all that are too large; it
            names the examples.
    """
    read_header = partial(_image_header, source, preprocessing.decoding)
    headers = grain.MapDataset.range(len(source)).map(read_header)
    short_side = preprocessing.short_side
    members: defaultdict[tuple[Size, Size], list[tuple[int, str]]] = defaultdict(list)
    problems = []
    options = _read_options(loading.num_threads)
    for example_id, (name, size) in enumerate(headers.to_iter_dataset(options)):
        if problem := too_large(size, short_side, pad_multiple):
            problems.append(f"image {name}: {problem}")
        resized = resized_size(size, short_side)
        padded = padded_size(resized, pad_multiple), padded_size(size, pad_multiple)
        members[padded].append((example_id, name))
    if problems:
        raise listed("the images to evaluate", problems)
    return [
        EvalGroup(*padded, *map(list, zip(*found[first : first + batch_size], strict=True)))
        for padded, found in members.items()
        for first in range(0, len(found), batch_size)
    ]


def eval_batches(
    source: Source,
    groups: Sequence[EvalGroup],
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    loading: Loading,
    shard: Shard = ALL_ROWS,
) -> Batches:
    """Whole images, each exactly once: this process's rows of each batch.

    Images and labels lie in the upper left corner of the group's padded sizes, surrounded by
    `pad_color` and IGNORE_LABEL. Labels keep their size; where images are resized, batches have
    `image_size` and `label_size`. The last batch of a size is filled up with rows that are not
    valid and have the example id -1. All processes see the same number of batches of the same
    sizes.

    Args:
        source: the records of a split.
        groups: the examples of each batch, as `eval_groups` makes them for the same settings.
        preprocessing: how records become images and labels.
        batch_size: rows of all processes together, a multiple of their number.
        loading: threads and buffers; there are no workers, because starting processes takes
            longer than most evaluations.
        shard: the rows to load.

    Raises:
        InputError: for a record that cannot be decoded; it names the example.
    """
    load = partial(
        _load_whole,
        groups=groups,
        open_by_id=partial(_open_example, source.__getitem__, preprocessing=preprocessing),
        preprocessing=preprocessing,
    )
    return _batches(
        load,
        steps=range(len(groups)),
        rows=_shard_rows(batch_size, shard),
        loading=replace(loading, num_workers=0),
    )


def _batches(
    load: Callable[[int, int], Row], *, steps: range, rows: range, loading: Loading
) -> Batches:
    """Stacks `load(step, row)` over the rows of each step; workers take rows in turns."""
    num_rows = len(rows)
    elements = grain.MapDataset.range(steps.start * num_rows, steps.stop * num_rows).map(
        partial(_load_element, load, rows)
    )
    num_ahead = loading.prefetch * num_rows
    if loading.num_workers == 0:
        loaded = elements.to_iter_dataset(_read_options(loading.num_threads, num_ahead))
    else:
        flags.FLAGS.mark_as_parsed()  # Grain reads flags; a caller need not be an absl program
        # Grain buffers what a worker has made twice, on either side of the pipe.
        buffer_size = -(-num_ahead // (2 * loading.num_workers))
        buffers = grain.MultiprocessingOptions(loading.num_workers, buffer_size)
        # Pipes, not shared memory: a full /dev/shm, 64 MB in a container, would kill the workers.
        pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        loaded = elements.to_iter_dataset(_read_options(loading.num_threads))
        loaded = grain.experimental.WithOptionsIterDataset(loaded, pipes)
        loaded = loaded.mp_prefetch(buffers, _start_worker)
    return iter(loaded.batch(num_rows, batch_fn=_stack))


def _load_element(load: Callable[[int, int], Row], rows: range, index: int) -> Row:
    return load(index // len(rows), rows[index % len(rows)])


def _load_view(
    step: int,
    row: int,
    *,
    order: grain.MapDataset[int],
    open_by_id: Callable[[int], Example],
    view: Callable[[Example, np.random.Generator], tuple[Image, Label]],
    class_mix_rate: float,
    batch_size: int,
    seed: int,
) -> Row:
    """A row of a training batch. Pickled for the workers with all it calls, so no closures."""
    index = step * batch_size + row
    example_id, rng = cast(int, order[index]), np.random.default_rng((seed, index))
    image, label = view(open_by_id(example_id), rng)
    (mix_rng,) = rng.spawn(1)
    if mix_rng.random() < class_mix_rate:
        next_rng = np.random.default_rng((seed, index + 1))
        other = view(open_by_id(cast(int, order[index + 1])), next_rng)
        image, label = mix_classes(image, label, *other, mix_rng)
    return image, label, example_id


def _load_whole(
    step: int,
    row: int,
    *,
    groups: Sequence[EvalGroup],
    open_by_id: Callable[[int], Example],
    preprocessing: Preprocessing,
) -> Row:
    """A row of an evaluation batch; one of padding alone where the group has no more examples."""
    group = groups[step]
    if row < len(group.example_ids):
        example_id = group.example_ids[row]
        example = open_by_id(example_id)
        label = example.label
        sizes = resized_size(label.shape, preprocessing.short_side), label.shape
        image = resize_image(example.image, sizes[0])
    else:
        example_id, sizes = -1, ((1, 1), (1, 1))
        image = np.full((1, 1, 3), preprocessing.pad_color, np.uint8)
        label = np.full((1, 1), IGNORE_LABEL, np.uint8)
    return (
        pad(image, group.image_size, preprocessing.pad_color),
        pad(label, group.label_size, IGNORE_LABEL),
        example_id,
        *(sizes if preprocessing.short_side else ()),
    )


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Leaves signals to the main process, and ends the worker when that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    main = multiprocessing.parent_process()

    def exit_with_main() -> None:
        if main is not None:
            main.join()
            os._exit(1)

    threading.Thread(target=exit_with_main, daemon=True).start()


def _stack(rows: Sequence[Row]) -> Batch:
    images, labels, example_ids, *sizes = zip(*rows, strict=True)
    example_id = np.array(example_ids, np.int32)
    sizes = [np.array(size, np.int32) for size in sizes]
    return Batch(np.stack(images), np.stack(labels), example_id, example_id >= 0, *sizes)


def _open_example(
    read: Callable[[int], dict[str, bytes]], example_id: int, *, preprocessing: Preprocessing
) -> Example:
    return open_example(read(example_id), preprocessing)


def _cached(
    open_by_id: Callable[[int], Example],
    example_id: int,
    *,
    cache_size: int,
    cache: dict[int, Example],
) -> Example:
    """`open_by_id(example_id)`. The first results stay cached, with their whole images: as each
    example comes once per epoch, replacing them would gain nothing.
    """
    if example_id in cache:
        return cache[example_id]
    example = open_by_id(example_id)
    if len(cache) < cache_size:
        image = example.image
        cache[example_id] = example = replace(example, read_image=lambda _: image)
    return example


def _image_header(source: Source, decoding: Decoding, example_id: int) -> tuple[str, Size]:
    """The name of an example, and the size of its image."""
    record = source[example_id]
    name = record["name"].decode()
    return name, image_size(record["image"], f"image {name}", decoding)


def _shard_rows(batch_size: int, shard: Shard) -> range:
    if batch_size % shard.count:
        raise InputError(f"batch_size = {batch_size}: not a multiple of {shard.count} processes")
    num_rows = batch_size // shard.count
    return range(shard.index * num_rows, (shard.index + 1) * num_rows)


def _read_options(num_threads: int, buffer_size: int = 0) -> grain.ReadOptions:
    return grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(num_threads, buffer_size)
    )
