"""Data sets by name: the classes of one, and its records."""

import dataclasses
import io
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType

import absl.logging
import tensorflow_datasets as tfds

from contrastseg_jax.data.builders import (
    ade20k,
    camvid,
    cityscapes,
    coco_stuff,
    folder,
    from_tfds,
    landcover,
    pascal_context,
    synthetic,
)
from contrastseg_jax.data.builders.base import DatasetSpec
from contrastseg_jax.data.checks import Splits
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.files import lock

MODULES: dict[str, ModuleType] = {
    "landcover": landcover,
    "cityscapes": cityscapes,
    "pascal_context": pascal_context,
    "coco_stuff10k": coco_stuff,
    "coco_stuff164k": coco_stuff,
    "camvid": camvid,
    "ade20k": ade20k,
    "folder": folder,
    "tfds": from_tfds,
    "synthetic": synthetic,
}
# How many examples each split has as published. Another number is worth a warning and no more:
# subsets are legitimate.
SPLIT_SIZES = {
    "cityscapes": {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998},
    "pascal_context": {"train": 4998, "val": 5105},
    "coco_stuff10k": {"train": 9000, "val": 1000},
    "coco_stuff164k": {"train": 118287, "val": 5000},
    "camvid": {"train": 367, "val": 101, "test": 233},
    "ade20k": {"train": 20210, "val": 2000},
}
log = logging.getLogger("contrastseg_jax")


def dataset_names() -> tuple[str, ...]:
    """What `DatasetSpec.name` may be."""
    return tuple(MODULES)


def label_map(spec: DatasetSpec) -> LabelMap:
    """The classes of a data set; needs the settings only, not the data."""
    return MODULES[spec.name].label_map(spec)


def open_split(spec: DatasetSpec, split: str) -> Sequence[dict[str, bytes]]:
    """The records of a split: encoded `image` and `label`, and the `name` of the image.

    Prepares the data set on first use, and again when its raw files have changed. A split that is
    not as long as published is worth a warning.

    Raises:
        InputError: the raw data are missing or have faults, or have no such split.
    """
    return open_splits(spec, [split])[0]


def open_splits(spec: DatasetSpec, splits: Sequence[str]) -> list[Sequence[dict[str, bytes]]]:
    """As `open_split`, for several splits of which the raw files are looked through once."""
    builder = _prepared(spec)
    return [_open(builder, spec, split) for split in splits]


def raw_splits(spec: DatasetSpec) -> Splits:
    """The examples of each split, to be checked one by one; prepares nothing.

    Raises:
        InputError: the raw data are missing.
    """
    with _quiet():
        return MODULES[spec.name].make_builder(spec).raw_splits()


def _open(
    builder: tfds.core.DatasetBuilder, spec: DatasetSpec, split: str
) -> Sequence[dict[str, bytes]]:
    if split not in builder.info.splits:
        existing, where = ", ".join(builder.info.splits), f" in {spec.root}" if spec.root else ""
        raise InputError(
            f"data set '{spec.name}'{where} has no split '{split}', only {existing};"
            " README.md has its layout, and --mode=audit shows what each split holds"
        )
    decoders = dict.fromkeys(("image", "label"), tfds.decode.SkipDecoding())
    source = builder.as_data_source(split, decoders=decoders)  # pyright: ignore[reportCallIssue]
    published = SPLIT_SIZES.get(spec.name, {}).get(split, len(source))
    if len(source) != published:
        log.warning(
            f"data set '{spec.name}', split '{split}': {len(source)} examples, not the {published}"
            " of the published one"
        )
    return source


def _prepared(spec: DatasetSpec) -> tfds.core.DatasetBuilder:
    spec = dataclasses.replace(spec, prepared_dir=str(Path(spec.prepared_dir).expanduser()))
    make_builder = MODULES[spec.name].make_builder
    with _quiet():
        builder = make_builder(spec)
        if builder.is_prepared():
            return builder
        folder = Path(builder.data_dir).parents[1]  # of all that is prepared by this builder
        try:
            with lock(folder / ".lock", wait=True):
                if not builder.is_prepared():  # else another process was faster
                    for stale in folder.glob("*/incomplete.*"):  # of a process that was killed
                        shutil.rmtree(stale)
                    builder.download_and_prepare(file_format="array_record")
        except (OSError, RuntimeError) as error:
            # ArrayRecord's writer says with a RuntimeError that the disk is full.
            if not isinstance(error, OSError) and "write() failed" not in str(error):
                raise
            raise InputError(
                f"data.prepared_dir = '{spec.prepared_dir}': preparing data set '{spec.name}' there"
                f" failed: {error}"
            ) from error
        return make_builder(spec)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from saying what is not so: that it downloads, and that a config is unknown.

    Its progress bars are shown on a terminal alone.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)
