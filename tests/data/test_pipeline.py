"""Batches: a function of (seed, step), each example where it belongs, whatever the processes."""

import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from paths import ROOT
from picture_files import exif, saved
from PIL import Image
from raw_data import noise
from small import make_config

from contrastseg_jax.data import images, pipeline, preprocess
from contrastseg_jax.data.augment import Augmentation
from contrastseg_jax.data.dataset import label_map, open_split
from contrastseg_jax.data.images import encode_png
from contrastseg_jax.data.labels import default_palette
from contrastseg_jax.data.pipeline import (
    Loading,
    Shard,
    eval_batches,
    eval_groups,
    loading_settings,
    train_batches,
)
from contrastseg_jax.data.spec import DatasetSpec, Decoding, LabelMap, Preprocessing
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

LABEL_MAP = LabelMap(("a", "b"), default_palette(2), {0: 0, 1: 1, 9: IGNORE_LABEL})
PAD_COLOR = (1, 2, 3)
SIZES = [(20, 30), (31, 24), (32, 32), (8, 64), (20, 32), (17, 30), (40, 40)]
# Every batch of `mixed_source`, all fields. They change with the numbers that are drawn, and how;
# runs that are resumed rely on them.
DIGESTS = {
    "train": "3c30fdc3d23bd076347d696a5c4f303e0500f75d1f0cbde75e8ea1e12f0b3d98",
    "train, every augmentation": "4eed90c0db3f24a75be0bd6803f7f02351babfd476815a08dec4757a0a5df84a",
    "evaluation": "a76e88683e86679db7047c8ac25b8869daec2404827a31cc1e905d24f8713d73",
    "evaluation, short side": "658a2dc5dbad93de9b1ecb84be02beb43fa370468a2f253a1d8858f806380dfe",
}


def record(index, size=(20, 30)):
    rng = np.random.default_rng(index)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    label = rng.choice(np.array([0, 1, 9], np.uint8), size)
    name = f"scene_{index}".encode()
    return {"image": encode_png(image), "label": encode_png(label), "name": name}


PREPROCESSING = Preprocessing(LABEL_MAP, PAD_COLOR)
AUGMENTATION = Augmentation(
    crop_size=(16, 24),
    scale_range=(0.5, 2.0),
    aspect_range=(0.9, 1.1),
    flip_rate=0.5,
    brightness=10,
    color_distortion=0.0,
    class_uniform_rate=0.0,
    blur_rate=0.0,
    erase_rate=0.0,
    class_mix_rate=0.0,
)
EVERY_AUGMENTATION = dict(
    color_distortion=1.0,
    class_uniform_rate=0.5,
    blur_rate=0.5,
    erase_rate=0.5,
    class_mix_rate=0.5,
)
LOADING = Loading(num_threads=2, num_workers=0, prefetch=2, cache_size=0)
STILL = dict(scale_range=(1.0, 1.0), aspect_range=(1.0, 1.0), flip_rate=0.0, brightness=0)


def structs(**settings):
    """The structs, each with those of the settings that are fields of it."""
    defaults = dict(preprocessing=PREPROCESSING, augmentation=AUGMENTATION, loading=LOADING)
    changed = {name: {} for name in defaults}
    for key, value in settings.items():
        (owner,) = (name for name, struct in defaults.items() if hasattr(struct, key))
        changed[owner][key] = value
    return {name: dataclasses.replace(defaults[name], **changed[name]) for name in defaults}


def train(source, *, batch_size=4, start_step=0, num_steps=6, seed=0, shard=(0, 1), **settings):
    return train_batches(
        source,
        batch_size=batch_size,
        steps=range(start_step, num_steps),
        seed=seed,
        shard=Shard(*shard),
        **structs(**settings),
    )


def evaluate(source, *, pad_multiple=8, batch_size=4, shard=(0, 1), **settings):
    shared = structs(**settings) | {"batch_size": batch_size}
    del shared["augmentation"]
    groups = eval_groups(source, pad_multiple=pad_multiple, **shared)
    return eval_batches(source, groups, shard=Shard(*shard), **shared)


def assert_equal(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for field in ("image", "label", "example_id", "valid"):
            np.testing.assert_array_equal(getattr(batch, field), getattr(other, field))


def digest_of(batches):
    digest = hashlib.sha256()
    for batch in batches:
        for field in dataclasses.fields(batch):
            array = getattr(batch, field.name)
            if array is not None:
                digest.update(f"{field.name} {array.dtype} {array.shape}".encode())
                digest.update(array.tobytes())
    return digest.hexdigest()


def joined(parts):
    """Global batches from those of all processes."""
    for batches in zip(*parts, strict=True):
        yield type(batches[0])(
            *(
                np.concatenate([getattr(batch, field) for batch in batches])
                for field in ("image", "label", "example_id", "valid")
            )
        )


@pytest.fixture
def time_limit():
    """Ends a test whose workers do not answer."""

    def end(*_):
        raise TimeoutError("no answer of the workers")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def source():
    return [record(i) for i in range(7)]


@pytest.fixture(scope="module")
def mixed_source():
    return [record(i, size) for i, size in enumerate(SIZES * 2)]


def test_batches_are_bit_for_bit_those_of_earlier_versions(mixed_source):
    settings = dict(short_side=18, color_distortion=1.0, class_uniform_rate=0.5)
    digests = {
        "train": digest_of(train(mixed_source, **settings)),
        "train, every augmentation": digest_of(train(mixed_source, **EVERY_AUGMENTATION)),
        "evaluation": digest_of(evaluate(mixed_source)),
        "evaluation, short side": digest_of(evaluate(mixed_source, short_side=12)),
    }
    assert digests == DIGESTS


def test_train_shapes_and_types(source):
    batches = list(train(source))
    assert len(batches) == 6
    for batch in batches:
        assert (batch.image.shape, batch.image.dtype) == ((4, 16, 24, 3), np.uint8)
        assert (batch.label.shape, batch.label.dtype) == ((4, 16, 24), np.uint8)
        assert batch.example_id.dtype == np.int32
        assert batch.valid.tolist() == [True] * 4
        assert set(np.unique(batch.label)) <= {0, 1, IGNORE_LABEL}


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_every_example_once_per_epoch_and_epochs_differ(source, batch_size):
    batches = train(source, batch_size=batch_size, num_steps=7 * 5)
    ids = np.concatenate([batch.example_id for batch in batches])
    epochs = [tuple(ids[first : first + 7].tolist()) for first in range(0, len(ids) - 6, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 0.9 * len(epochs)  # of 5,040 orders, some may come twice


def test_rows_come_from_the_example_they_name(source):
    for batch in train(source, crop_size=(20, 30), **STILL):
        for image, example_id in zip(batch.image, batch.example_id, strict=True):
            pixels = cv2.imdecode(np.frombuffer(source[example_id]["image"], np.uint8), 1)
            np.testing.assert_array_equal(image, pixels[..., ::-1])


@pytest.mark.parametrize("start_step", [1, 2, 5])
def test_resuming_anywhere_gives_the_same_batches(source, start_step):
    for settings in ({}, EVERY_AUGMENTATION):
        resumed = train(source, start_step=start_step, **settings)
        assert_equal(resumed, islice(train(source, **settings), start_step, None))


def test_resuming_far_away_reads_no_earlier_record(source):
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    counting = Counting(source)
    far = 10**9
    assert len(list(train(counting, start_step=far, num_steps=far + 2))) == 2
    assert 8 <= counting.reads < 16


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_rows_of_one_batch(source, process_count):
    for settings in ({}, EVERY_AUGMENTATION):
        parts = [
            train(source, shard=(index, process_count), **settings)
            for index in range(process_count)
        ]
        assert_equal(joined(parts), train(source, **settings))


def test_a_row_is_mixed_with_the_next_of_the_sequence(source):
    """Whatever batches the sequence is cut into; the next row is taken as it is without mixing."""
    plain = list(train(source, batch_size=1, num_steps=9))
    alone = list(train(source, batch_size=1, num_steps=8, class_mix_rate=1.0))
    mixed_rows = 0
    for index, batch in enumerate(alone):
        this, following = plain[index], plain[index + 1]
        (rng,) = np.random.default_rng((0, index)).spawn(5)[4:]
        assert rng.random() < 1
        classes = sorted({0, 1} & {*following.label.ravel().tolist()})
        drawn = rng.choice(classes, len(classes) // 2, replace=False)
        pasted = np.isin(following.label, drawn)
        np.testing.assert_array_equal(batch.label, np.where(pasted, following.label, this.label))
        expected = np.where(pasted[..., None], following.image, this.image)
        np.testing.assert_array_equal(batch.image, expected)
        assert batch.example_id == this.example_id
        mixed_rows += bool(pasted.any())
    assert mixed_rows == 8
    ofs = [np.concatenate([getattr(b, field) for b in alone]) for field in ("image", "label")]
    for step, batch in enumerate(train(source, num_steps=2, class_mix_rate=1.0)):
        np.testing.assert_array_equal(batch.image, ofs[0][4 * step : 4 * step + 4])
        np.testing.assert_array_equal(batch.label, ofs[1][4 * step : 4 * step + 4])


def test_the_rate_of_mixing_is_that_of_examples_read_twice(source):
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    reads = {}
    for rate in (0.0, 0.4, 1.0):
        counting = Counting(source)
        settings = dict(num_steps=50, num_threads=0, prefetch=1, class_mix_rate=rate)
        assert len(list(train(counting, **settings))) == 50
        reads[rate] = counting.reads
    assert reads[1.0] - reads[0.0] == 200
    assert abs((reads[0.4] - reads[0.0]) / 200 - 0.4) <= 4 * np.sqrt(0.4 * 0.6 / 200)


@pytest.mark.parametrize(("num_threads", "prefetch"), [(0, 0), (1, 1), (5, 1), (3, 4)])
def test_threads_change_nothing(source, num_threads, prefetch):
    assert_equal(train(source, num_threads=num_threads, prefetch=prefetch), train(source))


@pytest.mark.slow
@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize(
    ("num_workers", "start_step", "shard"),
    [(4, 0, (0, 1)), (2, 3, (1, 2)), (1, 1, (0, 1))],
    ids=["four", "two, resumed, of a second process", "one, resumed"],
)
def test_workers_change_nothing(source, num_workers, start_step, shard):
    settings = dict(start_step=start_step, shard=shard, cache_size=3)
    settings |= EVERY_AUGMENTATION
    with contextlib.closing(train(source, num_workers=num_workers, **settings)) as batches:
        assert_equal(batches, train(source, **settings))
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("time_limit")
def test_workers_read_a_prepared_data_set(tmp_path):
    spec = DatasetSpec(
        name="synthetic",
        prepared_dir=str(tmp_path),
        image_size=(32, 48),
        num_classes=3,
        num_examples=(5, 1),
    )
    settings = dict(label_map=label_map(spec), num_steps=4) | EVERY_AUGMENTATION
    source = open_split(spec, "train")
    with contextlib.closing(train(source, num_workers=2, **settings)) as batches:
        assert_equal(batches, train(source, **settings))


@pytest.mark.usefixtures("time_limit")
def test_faulty_records_are_named_by_workers(source):
    broken = source + [record(8) | {"image": source[0]["image"][:100]}]
    with contextlib.closing(train(broken, num_workers=2)) as batches:
        with pytest.raises(InputError, match="image scene_8: unreadable image file"):
            list(batches)


WITH_WORKERS = """
import sys, time
import test_pipeline
if __name__ == "__main__":
    source = [test_pipeline.record(i) for i in range(7)]
    batches = test_pipeline.train(source, num_workers=2, num_steps=10**6)
    next(batches)
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_process(tmp_path):
    """They would wait for ever, since each of them also holds its pipe's other end."""
    script = tmp_path / "with_workers.py"
    script.write_text(WITH_WORKERS)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers", Path(__file__).parent)))
    group = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        with group.stdout as output:
            assert output.readline() == "ready\n"
        group.kill()
        group.wait(20)
        with pytest.raises(ProcessLookupError):
            for _ in range(200):  # none of its process group is left within 20 seconds
                os.killpg(group.pid, 0)
                time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)


@pytest.mark.slow
def test_workers_go_on_when_all_processes_receive_sigterm(source):
    """A scheduler sends SIGTERM to each; the main one decides when the workers' work is done."""
    with contextlib.closing(train(source, num_workers=2, num_steps=10**6)) as batches:
        got = [next(batches)]
        workers = multiprocessing.active_children()
        assert len(workers) >= 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
        got += itertools.islice(batches, 40)  # more than were made ahead
    assert_equal(got, train(source, num_steps=41))


def test_caching_changes_nothing(source):
    assert_equal(train(source, cache_size=3), train(source))


def test_seeds_give_other_orders_and_views(source):
    def ids(seed):
        batches = train(source, seed=seed, num_steps=14)
        return np.concatenate([batch.example_id for batch in batches]).tolist()

    assert ids(0) != ids(1)
    assert ids(0)[7:] != ids(1)[:-7]  # neither are they the same epochs, one later
    only = source[:1]
    views = [next(train(only, seed=seed)).image for seed in (0, 1)]
    assert np.any(views[0] != views[1])


def test_an_example_looks_different_every_time(source):
    batch = next(train(source[:1]))
    assert batch.example_id.tolist() == [0] * 4
    assert len({image.tobytes() for image in batch.image}) == 4


def test_short_side_scales_before_the_augmentation(source):
    batch = next(train(source, short_side=10, crop_size=(20, 20), **STILL))
    inside = np.all(batch.image != PAD_COLOR, axis=-1)
    assert inside.any(axis=2).sum(axis=1).tolist() == [10] * 4
    assert inside.any(axis=1).sum(axis=1).tolist() == [15] * 4


def test_eval_gives_every_example_once_whole_and_padded(mixed_source):
    seen = []
    for batch in evaluate(mixed_source):
        assert batch.image.shape[1] % 8 == batch.image.shape[2] % 8 == 0
        assert len(batch.valid) == 4
        for row, valid in enumerate(batch.valid):
            image, label, example_id = batch.image[row], batch.label[row], batch.example_id[row]
            if not valid:
                assert example_id == -1
                assert np.all(label == IGNORE_LABEL)
                assert np.all(image == PAD_COLOR)
                continue
            seen.append(int(example_id))
            height, width = SIZES[example_id % 7]
            assert label.shape == (-(-height // 8) * 8, -(-width // 8) * 8)
            raw = mixed_source[example_id]
            pixels = cv2.imdecode(np.frombuffer(raw["image"], np.uint8), 1)[..., ::-1]
            mask = cv2.imdecode(np.frombuffer(raw["label"], np.uint8), 0)
            np.testing.assert_array_equal(image[:height, :width], pixels)
            np.testing.assert_array_equal(
                label[:height, :width], np.where(mask == 9, IGNORE_LABEL, mask)
            )
            label[:height, :width] = IGNORE_LABEL
            image[:height, :width] = PAD_COLOR
            assert np.all(label == IGNORE_LABEL)
            assert np.all(image == PAD_COLOR)
    assert sorted(seen) == list(range(14))


def test_eval_has_one_shape_per_size(mixed_source):
    batches = list(evaluate(mixed_source, pad_multiple=64))
    assert {batch.label.shape for batch in batches} == {(4, 64, 64)}
    assert len(batches) == 4
    assert sum(batch.valid.sum() for batch in batches) == 14


@pytest.mark.parametrize("process_count", [2, 4])
def test_eval_processes_see_the_same_number_of_batches(mixed_source, process_count):
    parts = [evaluate(mixed_source, shard=(index, process_count)) for index in range(process_count)]
    assert_equal(joined(parts), evaluate(mixed_source))


def test_eval_threads_change_nothing(mixed_source):
    assert_equal(evaluate(mixed_source, num_threads=0), evaluate(mixed_source, num_threads=5))


def test_sizes_are_read_for_the_groups_alone(mixed_source, monkeypatch):
    names = []

    def image_size(data, name, decoding):
        names.append(name)
        return images.image_size(data, name, decoding)

    monkeypatch.setattr(pipeline, "image_size", image_size)
    settings = dict(preprocessing=PREPROCESSING, batch_size=4, loading=LOADING)
    groups = eval_groups(mixed_source, pad_multiple=8, **settings)
    for _ in range(2):
        assert len(list(eval_batches(mixed_source, groups, **settings))) == len(groups)
    assert sorted(names) == sorted(f"image scene_{i}" for i in range(14))


def test_exif_orientation_is_applied_alike_in_training_and_evaluation():
    """The mask was drawn on the rotated image, whose size the evaluation's groups have as well."""
    pixels, mask = noise(0, (8, 16, 3)), noise(1, (16, 8), 2)
    image = saved(Image.fromarray(pixels), exif=exif(6))
    source = [{"image": image, "label": encode_png(mask), "name": b"a"}]
    settings = dict(batch_size=1, decoding=Decoding(exif_orientation="applied"))
    (evaluated,) = evaluate(source, **settings)
    (trained,) = train(source, **settings, num_steps=1, crop_size=(16, 8), **STILL)
    for batch in (evaluated, trained):
        np.testing.assert_array_equal(batch.image[0], np.rot90(pixels, -1))
        np.testing.assert_array_equal(batch.label[0], mask)


def test_eval_short_side_is_of_images_alone(mixed_source):
    """Sizes say what of images and labels is no padding; rows that fill up have one pixel."""
    seen = []
    for batch in evaluate(mixed_source, short_side=12):
        assert batch.image.shape[1] % 8 == batch.label.shape[2] % 8 == 0
        for image, label, example_id, image_size, label_size in zip(
            *(batch.image, batch.label, batch.example_id, batch.image_size, batch.label_size),
            strict=True,
        ):
            if example_id < 0:
                assert image_size.tolist() == label_size.tolist() == [1, 1]
                continue
            seen.append(int(example_id))
            size = SIZES[example_id % 7]
            assert label_size.tolist() == list(size)
            assert image_size.tolist() == [round(side * 12 / min(size)) for side in size]
            raw = mixed_source[example_id]
            pixels = cv2.imdecode(np.frombuffer(raw["image"], np.uint8), 1)[..., ::-1]
            resized = cv2.resize(pixels, image_size[::-1], interpolation=cv2.INTER_CUBIC)
            np.testing.assert_array_equal(image[: image_size[0], : image_size[1]], resized)
            image[: image_size[0], : image_size[1]] = PAD_COLOR
            assert np.all(image == PAD_COLOR)
            mask = cv2.imdecode(np.frombuffer(raw["label"], np.uint8), 0)
            np.testing.assert_array_equal(
                label[: size[0], : size[1]], np.where(mask == 9, IGNORE_LABEL, mask)
            )
            assert np.all(label[size[0] :] == IGNORE_LABEL)
            assert np.all(label[:, size[1] :] == IGNORE_LABEL)
    assert sorted(seen) == list(range(14))


@pytest.mark.parametrize("batches", [train, evaluate])
def test_faulty_records_are_named(source, batches):
    broken_image = source + [record(8) | {"image": source[0]["image"][:100]}]
    with pytest.raises(InputError, match="image scene_8: unreadable image file"):
        list(batches(broken_image))
    unknown = encode_png(np.full((20, 30), 77, np.uint8))
    with pytest.raises(
        ValueError, match=r"label scene_9: unknown mask value\(s\) 77 in 600 of 600"
    ):
        list(batches(source + [record(9) | {"label": unknown}]))


def test_a_value_outside_the_map_raises_on_the_first_batch_that_has_it(source):
    """Batches before it come as if nothing were wrong."""
    unknown = encode_png(np.full((20, 30), 77, np.uint8))
    settings = dict(batch_size=2, num_threads=1, prefetch=1)
    good = list(train(source, **settings))
    first = next(i for i, batch in enumerate(good) if 6 in batch.example_id)
    assert first > 0
    batches = train(source[:6] + [source[6] | {"label": unknown}], **settings)
    assert_equal(islice(batches, first), good[:first])
    with pytest.raises(InputError, match=r"label scene_6: unknown mask value\(s\) 77"):
        next(batches)


def test_settings_are_those_of_the_config():
    settings = ("num_threads=3", "num_workers=2", "prefetch=5", "cache_size=7")
    config = make_config(*(f"data.{setting}" for setting in settings))
    expected = Loading(num_threads=3, num_workers=2, prefetch=5, cache_size=7)
    assert loading_settings(config) == expected
    assert {field.name for field in dataclasses.fields(Augmentation)} == set(config.augment)


@pytest.mark.parametrize("batches", [train, evaluate])
def test_rows_must_divide_among_processes(source, batches):
    with pytest.raises(InputError, match="batch_size = 4: not a multiple of 3 processes"):
        batches(source, shard=(0, 3))


def test_images_that_cannot_be_evaluated_are_listed_before_any_is(monkeypatch):
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 64 * 64)
    source = [record(index, size) for index, size in enumerate([(3, 70), (16, 16), (90, 4)])]
    with pytest.raises(InputError) as error:
        evaluate(source, short_side=16)
    title, *lines = str(error.value).splitlines()
    assert title == "2 problems in the images to evaluate:"
    resized = "pixels, resized by data.short_side = 16 to"
    assert lines[0].startswith(f"  image scene_0: has 70x3 {resized} 373x16, padded")
    assert lines[1].startswith(f"  image scene_2: has 4x90 {resized} 16x360, padded")
