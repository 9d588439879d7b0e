"""Records to batches with Grain: read, decode, augment and stack in threads or processes.

A training batch is a pure function of (seed, step), so a run resumes anywhere at no cost. Row r of
step s is row g = s * batch_size + r of an endless sequence of shuffled epochs; g also seeds the
example's augmentation, so how rows are spread over processes, workers and threads changes nothing.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import cv2
import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8

from contrastseg_jax.data.augment import augment, padded_size, resize_image, resized_size, too_large
from contrastseg_jax.data.images import AS_STORED, Decoding, decode_image, decode_mask, image_size
from contrastseg_jax.data.labels import LabelMap, to_train_ids
from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.structs import IGNORE_LABEL, Batch

Source = Sequence[dict[str, bytes]]  # what `open_split` returns
Image = UInt8[np.ndarray, "h w 3"]
Label = UInt8[np.ndarray, "h w"]
Example = tuple[Image, Label]
Size = tuple[int, int]  # height, width
Row = tuple[Image, Label, int, *tuple[Size, ...]]  # as `Batch`; example id -1: no example
Batches = grain.DatasetIterator[Batch]


@dataclass(frozen=True)
class EvalGroup:
    """The examples of one batch of an evaluation, and the sizes that hold each of them."""

    image_size: Size
    label_size: Size
    example_ids: list[int]


cv2.setNumThreads(0)  # Grain's threads are the parallelism


def train_batches(
    source: Source,
    *,
    label_map: LabelMap,
    batch_size: int,
    start_step: int,
    num_steps: int,
    seed: int,
    crop_size: tuple[int, int],
    short_side: int,
    scale_range: tuple[float, float],
    aspect_range: tuple[float, float],
    flip_rate: float,
    brightness: int,
    color_distortion: float,
    class_uniform_rate: float,
    pad_color: tuple[int, int, int],
    cache_size: int,
    num_threads: int,
    num_workers: int,
    prefetch: int,
    decoding: Decoding = AS_STORED,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of the steps start_step .. num_steps - 1: this process's rows of each.

    Every example comes once per epoch; a batch may span two epochs, so none is dropped. To be
    closed after use, which ends the workers.

    Args:
        source: the records of a split.
        label_map: what the masks' values mean.
        batch_size: rows of all processes together, a multiple of `process_count`.
        start_step: first step, the one to resume at.
        num_steps: number of steps of the whole run.
        seed: of the order and of the augmentation.
        crop_size: (height, width) of the batch.
        short_side: see `augment`, like the settings after it.
        scale_range: see `augment`.
        aspect_range: see `augment`.
        flip_rate: see `augment`.
        brightness: see `augment`.
        color_distortion: see `augment`.
        class_uniform_rate: see `augment`.
        pad_color: see `augment`.
        cache_size: decoded examples kept in memory, by each worker.
        num_threads: threads that prepare examples, in each worker.
        num_workers: processes in which they do; 0: this one.
        prefetch: batches prepared ahead.
        decoding: how image files become pixels.
        process_index: number of this process.
        process_count: number of processes.

    Raises:
        InputError: while iterating, for a record that cannot be decoded; it names the example.
    """
    # Grain shuffles epoch e by seed + e: without mixing, neighbouring seeds would share epochs.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(source)).shuffle(shuffle_seed).repeat()
    num_rows = _rows_per_process(batch_size, process_count)

    decode = partial(_decode, source.__getitem__, label_map=label_map, decoding=decoding)
    view = partial(
        augment,
        crop_size=crop_size,
        short_side=short_side,
        scale_range=scale_range,
        aspect_range=aspect_range,
        flip_rate=flip_rate,
        brightness=brightness,
        color_distortion=color_distortion,
        class_uniform_rate=class_uniform_rate,
        pad_color=pad_color,
    )
    load = partial(
        _load_view,
        order=order,
        decode=partial(_recall, decode, cache_size=cache_size, kept={}),
        view=view,
        batch_size=batch_size,
        seed=seed,
    )
    return _batches(
        load,
        steps=range(start_step, num_steps),
        rows=range(process_index * num_rows, (process_index + 1) * num_rows),
        num_threads=num_threads,
        num_workers=num_workers,
        prefetch=prefetch,
    )


def eval_groups(
    source: Source,
    *,
    batch_size: int,
    short_side: int,
    pad_multiple: int,
    num_threads: int,
    decoding: Decoding = AS_STORED,
) -> list[EvalGroup]:
    """Which examples are evaluated together: up to `batch_size` whose padded sizes are the same.

    It reads the whole split, for the sizes of the images, so a run does it once.

    Args:
        source: the records of a split.
        batch_size: rows of all processes together.
        short_side: length of the images' shorter side, but not of the labels'; 0 keeps it.
        pad_multiple: what heights and widths are rounded up to a multiple of.
        num_threads: threads that read.
        decoding: how image files become pixels.

    Raises:
        InputError: for an image whose header cannot be read, or for all that are too large; it
            names the examples.
    """
    sizes = grain.MapDataset.range(len(source)).map(partial(_image_size, source, decoding))
    example_ids: defaultdict[tuple[Size, Size], list[int]] = defaultdict(list)
    problems = []
    for example_id, size in enumerate(sizes.to_iter_dataset(_read_options(num_threads, 0))):
        if problem := too_large(size, short_side, pad_multiple):
            problems.append(f"image {source[example_id]['name'].decode()}: {problem}")
        resized = resized_size(size, short_side)
        padded = padded_size(resized, pad_multiple), padded_size(size, pad_multiple)
        example_ids[padded].append(example_id)
    if problems:
        raise listed("the images to evaluate", problems)
    return [
        EvalGroup(*padded, members[first : first + batch_size])
        for padded, members in example_ids.items()
        for first in range(0, len(members), batch_size)
    ]


def eval_batches(
    source: Source,
    groups: Sequence[EvalGroup],
    *,
    label_map: LabelMap,
    batch_size: int,
    short_side: int,
    pad_color: tuple[int, int, int],
    num_threads: int,
    prefetch: int,
    decoding: Decoding = AS_STORED,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Whole images, each exactly once: this process's rows of each batch.

    Images and labels lie in the upper left corner of what their group shares, and what surrounds
    them has `pad_color` and IGNORE_LABEL. Labels keep their size. The last batch of a size is
    filled up with rows that are not valid and have the example id -1. All processes see the same
    number of batches of the same sizes.

    Args:
        source: the records of a split.
        groups: the examples of each batch, as `eval_groups` makes them for the same settings.
        label_map: what the masks' values mean.
        batch_size: rows of all processes together, a multiple of `process_count`.
        short_side: length of the images' shorter side; 0 keeps it. Where it is not 0, batches have
            `image_size` and `label_size`.
        pad_color: RGB of what surrounds an image.
        num_threads: threads that prepare examples.
        prefetch: batches prepared ahead.
        decoding: how image files become pixels.
        process_index: number of this process.
        process_count: number of processes.

    Raises:
        InputError: for a record that cannot be decoded; it names the example.
    """
    num_rows = _rows_per_process(batch_size, process_count)
    decode = partial(_decode, source.__getitem__, label_map=label_map, decoding=decoding)

    def load(step: int, row: int) -> Row:
        group = groups[step]
        image = np.full((*group.image_size, 3), pad_color, np.uint8)
        label = np.full(group.label_size, IGNORE_LABEL, np.uint8)
        example_id, image_size, label_size = -1, (1, 1), (1, 1)
        if row < len(group.example_ids):
            example_id = group.example_ids[row]
            pixels, classes = decode(example_id)
            image_size, label_size = resized_size(classes.shape, short_side), classes.shape
            image[: image_size[0], : image_size[1]] = resize_image(pixels, image_size)
            label[: label_size[0], : label_size[1]] = classes
        return image, label, example_id, *((image_size, label_size) if short_side else ())

    return _batches(
        load,
        steps=range(len(groups)),
        rows=range(process_index * num_rows, (process_index + 1) * num_rows),
        num_threads=num_threads,
        num_workers=0,  # to start processes for every evaluation takes longer than most of them
        prefetch=prefetch,
    )


def _batches(
    load: Callable[[int, int], Row],
    *,
    steps: range,
    rows: range,
    num_threads: int,
    num_workers: int,
    prefetch: int,
) -> Batches:
    """Stacks `load(step, row)` over the rows of each step; workers take rows in turns."""
    num_rows = len(rows)
    elements = grain.MapDataset.range(steps.start * num_rows, steps.stop * num_rows).map(
        partial(_load_element, load, rows)
    )
    num_ahead = prefetch * num_rows
    if num_workers == 0:
        loaded = elements.to_iter_dataset(_read_options(num_threads, num_ahead))
    else:
        flags.FLAGS.mark_as_parsed()  # Grain reads flags; a caller need not be an absl program
        # Grain buffers what a worker has made twice, on either side of the pipe.
        buffers = grain.MultiprocessingOptions(num_workers, -(-num_ahead // (2 * num_workers)))
        # Pipes, not shared memory: a full /dev/shm, 64 MB in a container, would kill the workers.
        pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        loaded = elements.to_iter_dataset(_read_options(num_threads, 0))
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
    decode: Callable[[int], Example],
    view: Callable[..., Example],
    batch_size: int,
    seed: int,
) -> Row:
    """A row of a training batch. This and what it calls travel to workers, so no closures."""
    index = step * batch_size + row
    example_id = cast(int, order[index])
    image, label = view(*decode(example_id), np.random.default_rng((seed, index)))
    return image, label, example_id


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Lets the main process alone decide on a worker's end, and no worker outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    main = multiprocessing.parent_process()

    def follow() -> None:
        if main is not None:
            main.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _stack(rows: Sequence[Row]) -> Batch:
    images, labels, example_ids, *sizes = zip(*rows, strict=True)
    example_id = np.array(example_ids, np.int32)
    sizes = [np.array(size, np.int32) for size in sizes]
    return Batch(np.stack(images), np.stack(labels), example_id, example_id >= 0, *sizes)


def _decode(
    read: Callable[[int], dict[str, bytes]],
    example_id: int,
    *,
    label_map: LabelMap,
    decoding: Decoding,
) -> Example:
    record = read(example_id)
    name = record["name"].decode()
    image = decode_image(record["image"], f"image {name}", decoding)
    mask = decode_mask(record["label"], f"label {name}")
    return image, to_train_ids(mask, label_map, f"label {name}")


def _recall(
    decode: Callable[[int], Example],
    example_id: int,
    *,
    cache_size: int,
    kept: dict[int, Example],
) -> Example:
    """What `decode` gives; its first results are kept for good, as each comes once per epoch."""
    if example_id in kept:
        return kept[example_id]
    example = decode(example_id)
    if len(kept) < cache_size:
        kept[example_id] = example
    return example


def _image_size(source: Source, decoding: Decoding, example_id: int) -> Size:
    record = source[example_id]
    return image_size(record["image"], f"image {record['name'].decode()}", decoding)


def _rows_per_process(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise InputError(f"batch_size = {batch_size}: no multiple of {process_count} processes")
    return batch_size // process_count


def _read_options(num_threads: int, buffer_size: int) -> grain.ReadOptions:
    return grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(num_threads, buffer_size)
    )
