"""Data sets by name: the classes of one, and its records."""

import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType

import tensorflow_datasets as tfds
from absl import logging

from contrastseg_jax.data.builders import camvid, folder, landcover, synthetic
from contrastseg_jax.data.builders.base import DatasetSpec
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.errors import InputError

MODULES: dict[str, ModuleType] = {
    "landcover": landcover,
    "camvid": camvid,
    "folder": folder,
    "synthetic": synthetic,
}


def dataset_names() -> tuple[str, ...]:
    """What `DatasetSpec.name` may be."""
    return tuple(MODULES)


def label_map(spec: DatasetSpec) -> LabelMap:
    """The classes of a data set; needs the settings only, not the data."""
    return MODULES[spec.name].label_map(spec)


def open_split(spec: DatasetSpec, split: str) -> Sequence[dict[str, bytes]]:
    """The records of a split: encoded `image` and `label`, and the `name` of the image.

    Prepares the data set on first use, and again when its raw files have changed.

    Raises:
        InputError: the raw data are missing or have faults, or have no such split.
    """
    builder = _prepared(spec)
    if split not in builder.info.splits:
        existing = ", ".join(builder.info.splits)
        raise InputError(f"data set '{spec.name}' has no split '{split}', only {existing}")
    decoders = dict.fromkeys(("image", "label"), tfds.decode.SkipDecoding())
    return builder.as_data_source(split, decoders=decoders)  # pyright: ignore[reportCallIssue]


def _prepared(spec: DatasetSpec) -> tfds.core.DatasetBuilder:
    spec = dataclasses.replace(spec, prepared_dir=str(Path(spec.prepared_dir).expanduser()))
    make_builder = MODULES[spec.name].make_builder
    with _quiet():
        builder = make_builder(spec)
        if builder.is_prepared():
            return builder
        try:
            builder.download_and_prepare(file_format="array_record")
        except OSError:
            if not builder.is_prepared():  # else another process was faster to move it into place
                raise
        return make_builder(spec)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from saying what is not so: that it downloads, and that a config is unknown.

    Its progress bars are shown on a terminal alone.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
