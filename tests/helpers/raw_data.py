"""Small raw data sets on disk."""

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

from contrastseg_jax.data.dataset import label_map, open_splits
from contrastseg_jax.data.images import decode_mask, encode_jpeg, encode_png
from contrastseg_jax.data.labels import to_train_ids
from contrastseg_jax.errors import InputError

REAL_CAMVID = ROOT.parent / "shared" / "camvid"


def noise(seed, size=(6, 8, 3), high=256):
    return np.random.default_rng(seed).integers(0, high, size, dtype=np.uint8)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_image(path, size=(2, 3), seed=0):
    pixels = noise(seed, (*size, 3))
    write(path, encode_png(pixels) if path.suffix.lower() == ".png" else encode_jpeg(pixels, 95))


def write_mask(path, values):
    write(path, encode_png(np.array(values, np.uint8)))


def write_pair(image, mask, *, size=(6, 8), seed=0, num_values=3):
    """An image and a mask of noise."""
    write_image(image, size, seed)
    write_mask(mask, noise(seed, size, num_values))


def write_example(root, split, name, seed, mask=None):
    """A pair in the layout of `folder`."""
    of_image, of_mask = root / "images" / split, root / "labels" / split
    write_pair(of_image / f"{name}.jpg", of_mask / f"{name}.png", seed=seed)
    if mask is not None:
        write_mask(of_mask / f"{name}.png", mask)


def names(records):
    return [record["name"].decode() for record in records]


def classes_of(spec, record):
    """The class ids of a record."""
    return to_train_ids(decode_mask(record["label"], "a"), label_map(spec), "a").tolist()


def prepared_files(spec):
    files = [path for path in Path(spec.prepared_dir).rglob("*") if path.is_file()]
    return [path for path in files if path.name != ".lock"]


def problems(spec):
    """Why a data set cannot be prepared; nothing of it may be left."""
    with pytest.raises(InputError) as error:
        open_splits(spec, ("train", "val"))
    assert prepared_files(spec) == []
    assert list(Path(spec.prepared_dir).rglob("*incomplete*")) == []
    return str(error.value)


def without_capabilities(function, *args):
    """Calls it in a thread to which permissions apply even if root runs the tests."""

    def call():
        version = struct.pack("Ii", 0x20080522, 0)  # and this thread
        assert ctypes.CDLL(None).capset(version, bytes(24)) == 0
        return function(*args)

    with ThreadPoolExecutor() as pool:  # threads that it starts inherit what it may
        return pool.submit(call).result()
