"""Images per second of the training data, beside tf.data and the two floors; its memory.

    python benchmarks/data.py              # both recipes, about two minutes on two CPU cores
    python benchmarks/data.py --decoders   # Pillow and OpenCV instead, PNG and JPEG
    python benchmarks/data.py --memory     # memory of the process over 10,000 examples instead

The images are generated: textures of several scales and noise, so that a PNG of 1024x2048 has the
2 to 3 MB that one of Cityscapes has. All sides of a table take turns in one run, each in a fresh
pipeline whose first batches do not count, and the fastest round counts. With TensorFlow installed,
a plain tf.data pipeline is timed as well: decode, cut out, resize bicubically, flip, brighten.
"""

import contextlib
import importlib.util
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from absl import app, flags
from jaxtyping import UInt8
from PIL import Image

from contrastseg_jax.config.load import schema
from contrastseg_jax.data import pipeline
from contrastseg_jax.data.augment import Augmentation
from contrastseg_jax.data.images import decode_image, decode_mask, encode_jpeg
from contrastseg_jax.data.labels import default_palette
from contrastseg_jax.data.spec import LabelMap, Preprocessing

FLAGS = flags.FLAGS
flags.DEFINE_boolean("decoders", False, "Time Pillow and OpenCV alone.")
flags.DEFINE_boolean("memory", False, "Follow the memory of the process.")
flags.DEFINE_integer("rounds", 3, "Turns of each side.")

Record = dict[str, bytes]
CLASSES = 19
IDS = {i: i for i in range(CLASSES)}
LABEL_MAP = LabelMap(tuple(map(str, IDS)), default_palette(CLASSES), IDS)
PREPROCESSING = Preprocessing(LABEL_MAP, pad_color=(124, 116, 104))
CORES = os.cpu_count() or 1
# Size of images and crops, images in memory, batches timed.
RECIPES = {
    "Cityscapes": ((1024, 2048), (512, 1024), 8, 8),
    "CamVid": ((360, 480), (360, 480), 32, 50),
}
BATCH_SIZE = 8


def main(_: list[str]) -> None:
    """Print the tables in Markdown."""
    if FLAGS.memory:
        memory()
        return
    for name, (size, crop_size, num_images, num_batches) in RECIPES.items():
        rng = np.random.default_rng(0)
        if FLAGS.decoders:
            decoders(name, *scene(rng, size))
            continue
        records = [record(*scene(rng, size), f"{i}") for i in range(num_images)]
        megabytes = sum(len(r["image"]) for r in records) / len(records) / 1e6
        print(f"\n{name}: PNG of {size[0]}x{size[1]} ({megabytes:.2f} MB), crops of {crop_size}\n")
        compare(records, crop_size, num_batches)


# --- The pipeline --------------------------------------------------------------------------------


def compare(records: list[Record], crop_size: tuple[int, int], num_batches: int) -> None:
    """One recipe: ours in threads and in processes, tf.data, decoding alone, copying alone."""
    ours = partial(make_batches, records, crop_size)
    sides: dict[str, Callable[[], float]] = {
        "PNG decoding alone": partial(decode_speed, records, num_batches * BATCH_SIZE),
        f"ours, {CORES} threads": partial(
            batch_speed, partial(ours, num_threads=CORES), num_batches
        ),
        f"ours, {CORES} processes": partial(
            batch_speed, partial(ours, num_threads=1, num_workers=CORES), num_batches
        ),
    }
    if importlib.util.find_spec("tensorflow"):
        theirs = partial(tensorflow_batches, records, crop_size)
        sides[f"tf.data, {CORES} threads"] = partial(batch_speed, theirs, num_batches)
    sides["copy of image and label"] = partial(copy_speed, records)
    table(sides, "PNG decoding alone", "img/s")


def make_batches(
    records: list[Record], crop_size: tuple[int, int], *, num_threads: int, num_workers: int = 0
) -> pipeline.Batches:
    """The loader of a run, with the settings of configs/default.py."""
    config = schema()
    return pipeline.train_batches(
        records,
        preprocessing=PREPROCESSING,
        augmentation=Augmentation(**dict(config.augment, crop_size=crop_size)),
        batch_size=BATCH_SIZE,
        steps=range(10**6),
        seed=0,
        loading=pipeline.Loading(num_threads, num_workers, prefetch=2),
    )


def batch_speed(make: Callable[[], Any], num_batches: int) -> float:
    """Images per second once what was made ahead is used up."""
    with contextlib.closing(make()) as batches:
        for _ in range(5):
            next(batches)
        started = time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        return num_batches * BATCH_SIZE / (time.perf_counter() - started)


def decode_speed(records: list[Record], num_images: int) -> float:
    """Images per second of decoding images and labels on all cores, and nothing else."""

    def decode(record: Record) -> None:
        decode_image(record["image"], "image")
        decode_mask(record["label"], "label")

    with ThreadPoolExecutor(CORES) as pool:
        started = time.perf_counter()
        for _ in pool.map(decode, islice(cycle(records), num_images)):
            pass
        return num_images / (time.perf_counter() - started)


def copy_speed(records: list[Record]) -> float:
    """Images per second of copying a decoded image and its label."""
    image = decode_image(records[0]["image"], "image")
    label = decode_mask(records[0]["label"], "label")
    started = time.perf_counter()
    for _ in range(100):
        image.copy()
        label.copy()
    return 100 / (time.perf_counter() - started)


def tensorflow_batches(records: list[Record], crop_size: tuple[int, int]) -> Iterator[Any]:
    """The same work in tf.data; only the part that the crop shows is resized, as in ours."""
    tf = importlib.import_module("tensorflow")
    ids = np.full(256, 255, np.uint8)
    ids[:CLASSES] = range(CLASSES)
    of_record = [tf.constant([r[key] for r in records]) for key in ("image", "label")]
    crop = tf.constant(crop_size)

    def load(index: Any) -> tuple[Any, Any]:
        image = tf.io.decode_png(tf.gather(of_record[0], index), channels=3)
        label = tf.io.decode_png(tf.gather(of_record[1], index), channels=1)
        label = tf.gather(tf.constant(ids), tf.cast(label, tf.int32))
        scale = tf.random.uniform([], 0.5, 2.0) * tf.ones(2)
        stretch = tf.sqrt(tf.random.uniform([], 0.9, 1.1))
        scale = scale * tf.stack([1 / stretch, stretch])
        size = tf.shape(image)[:2]
        box = tf.minimum(tf.cast(tf.cast(crop, tf.float32) / scale, tf.int32), size)
        view = tf.minimum(tf.cast(tf.cast(box, tf.float32) * scale, tf.int32) + 1, crop)
        start = tf.cast(tf.random.uniform([2]) * tf.cast(size - box + 1, tf.float32), tf.int32)
        image = image[start[0] : start[0] + box[0], start[1] : start[1] + box[1]]
        label = label[start[0] : start[0] + box[0], start[1] : start[1] + box[1]]
        image = tf.image.resize(image, view, "bicubic")
        label = tf.image.resize(label, view, "nearest")
        if tf.random.uniform([]) < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        shift = tf.cast(tf.random.uniform([], -10, 11, tf.int32), tf.float32)
        image = tf.cast(tf.clip_by_value(image + shift, 0, 255), tf.uint8)
        before = tf.cast(tf.random.uniform([2]) * tf.cast(crop - view + 1, tf.float32), tf.int32)
        around = tf.stack([before, crop - view - before], axis=1)
        around = tf.concat([around, [[0, 0]]], axis=0)
        return tf.pad(image, around), tf.pad(label, around, constant_values=255)

    data = tf.data.Dataset.range(len(records)).shuffle(len(records)).repeat()
    data = data.map(load, num_parallel_calls=CORES).batch(BATCH_SIZE).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = CORES
    batches = data.with_options(options).as_numpy_iterator()
    yield from batches


# --- Decoders ------------------------------------------------------------------------------------


def decoders(name: str, image: np.ndarray, label: np.ndarray) -> None:
    """Pillow and OpenCV on the same files, on one core and on all."""
    files = {
        "PNG image": record(image, label, "")["image"],
        "PNG label": record(image, label, "")["label"],
        "JPEG image": encode_jpeg(image, 95),
    }
    ways = {"Pillow": with_pillow, "OpenCV": with_opencv}
    for kind, data in files.items():
        same = np.array_equal(with_pillow(data), with_opencv(data))
        print(f"\n{name}, {kind}, {len(data) / 1e6:.2f} MB; same pixels: {same}\n")
        sides = {
            f"{way}, {cores} thread{'s' if cores > 1 else ''}": partial(speed, decode, data, cores)
            for cores in sorted({1, CORES})
            for way, decode in ways.items()
        }
        table(sides, "Pillow, 1 thread", "img/s")


def with_pillow(data: bytes) -> np.ndarray:
    """A file of one or three channels."""
    return np.array(Image.open(io.BytesIO(data)))


def with_opencv(data: bytes) -> np.ndarray:
    """The same array from OpenCV, RGB where it has colours."""
    pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if pixels.ndim == 3 else pixels


def speed(decode: Callable[[bytes], np.ndarray], data: bytes, num_threads: int) -> float:
    """Decoded files per second."""
    with ThreadPoolExecutor(num_threads) as pool:
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < 1:
            count += len(list(pool.map(decode, [data] * (2 * num_threads))))
        return count / (time.perf_counter() - started)


# --- Memory --------------------------------------------------------------------------------------


def memory() -> None:
    """Resident memory while 10,000 small examples pass."""
    rng = np.random.default_rng(0)
    records = [record(*scene(rng, (90, 120)), f"{i}") for i in range(100)]
    print("| examples | resident memory, MB | since the first 1,000 |\n| --- | --- | --- |")
    with contextlib.closing(make_batches(records, (64, 64), num_threads=CORES)) as batches:
        first = 0.0
        for count in range(1000, 11_000, 1000):
            for _ in range(1000 // BATCH_SIZE):
                next(batches)
            resident = resident_megabytes()
            first = first or resident
            print(f"| {count:,} | {resident:.1f} | {resident - first:+.1f} |")


def resident_megabytes() -> float:
    """What the process holds at this moment."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# --- Generated images ----------------------------------------------------------------------------


def scene(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Textures of several scales with a camera's noise; a label of large pieces and small ones."""
    image = np.full((*size, 3), 110, np.float32)
    for cell, strength in ((128, 35), (16, 12), (4, 5), (1, 1)):
        coarse = rng.normal(size=(*(-(-n // cell) for n in size), 3)) * strength
        image += cv2.resize(coarse.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
    label = np.zeros(size, np.uint8)
    for cell, share in ((64, 1.0), (8, 0.05)):
        grid = tuple(-(-n // cell) for n in size)
        pieces = rng.integers(CLASSES, size=grid, dtype=np.uint8).repeat(cell, 0).repeat(cell, 1)
        chosen = (rng.random(grid) < share).repeat(cell, 0).repeat(cell, 1)
        label = np.where(chosen, pieces, np.resize(label, pieces.shape))[: size[0], : size[1]]
    return np.clip(image, 0, 255).astype(np.uint8), np.ascontiguousarray(label)


def record(image: np.ndarray, label: np.ndarray, name: str) -> Record:
    """An example as a data set keeps it."""
    files = {"image": io.BytesIO(), "label": io.BytesIO()}
    for pixels, file in zip((image, label), files.values(), strict=True):
        Image.fromarray(pixels).save(file, "PNG")
    return {key: file.getvalue() for key, file in files.items()} | {"name": name.encode()}


# --- Measuring -----------------------------------------------------------------------------------


def table(sides: dict[str, Callable[[], float]], unit: str, what: str) -> None:
    """The speed of each side in units of one of them, measured in turns."""
    speeds = {name: [] for name in sides}
    for _ in range(FLAGS.rounds):
        for name, run in sides.items():
            speeds[name].append(run())
    print(f"| side | in units of {unit} | {what} |\n| --- | --- | --- |")
    for name, values in speeds.items():
        print(f"| {name} | {max(values) / max(speeds[unit]):.2f} | {max(values):.1f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
