"""Data sets by name: their classes and records, and the settings of the config that they read."""

import dataclasses
import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType

import absl.logging
import tensorflow_datasets as tfds

from contrastseg_jax.config.palette import levels
from contrastseg_jax.config.tree import Config
from contrastseg_jax.data.audit.examples import Splits
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
from contrastseg_jax.data.builders.base import RecordBuilder, SplitConfig, check_splits, data_root
from contrastseg_jax.data.prepared import (
    Records,
    find_fault,
    list_file,
    mark_prepared,
    open_records,
    remove,
    write_names,
)
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.files import lock

BUILDERS: dict[str, ModuleType] = {
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
# Number of examples of each published split. Another number is a warning only, since subsets are
# legitimate.
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
    return tuple(BUILDERS)


def split_names(name: str) -> tuple[str, ...]:
    """The splits that a data set may have."""
    return BUILDERS[name].SPLITS


def label_map(spec: DatasetSpec) -> LabelMap:
    """The classes of a data set; needs the settings only, not the data."""
    return BUILDERS[spec.name].label_map(spec)


def open_split(spec: DatasetSpec, split: str) -> Records:
    """The records of a split: encoded `image` and `label`, and the `name` of the image.

    Prepares it on first use, and again when its raw files have changed or the prepared ones are
    damaged. Logs a warning if it is not as long as published.

    Raises:
        InputError: the raw data are missing or have errors, or there is no such split.
    """
    return open_splits(spec, [split])[0]


def open_splits(spec: DatasetSpec, splits: Sequence[str]) -> list[Records]:
    """As `open_split`, for several splits, with one error that lists what is wrong in any of them.

    Other splits are not read.
    """
    spec = dataclasses.replace(spec, prepared_dir=str(Path(spec.prepared_dir).expanduser()))
    with _silence_tfds():
        configs = [_split_config(spec, split) for split in splits]
        if any(find_fault(_prepared_folder(spec, config)) for config in configs):
            _prepare(spec, configs)
        return [_open(spec, config) for config in configs]


def raw_splits(spec: DatasetSpec) -> Splits:
    """The examples of every split that exists, to be checked one by one; prepares nothing.

    Raises:
        InputError: the raw data are missing.
    """
    with _silence_tfds():
        found = _existing_splits(spec)
    if not found:
        raise _no_data_error(spec)
    return {config.split: config.raw for config in found}


def misplaced_hints(spec: DatasetSpec, splits: Sequence[str]) -> list[str]:
    """Files elsewhere that may be meant for absent splits, and where they belong."""
    if not _root_is_known(spec):
        return []
    configs = [BUILDERS[spec.name].split_config(spec, split) for split in splits]
    return list(dict.fromkeys(line for config in configs for line in config.raw.hints))


def _split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The raw split.

    Raises:
        InputError: it does not exist.
    """
    module, hints = BUILDERS[spec.name], []
    if split in module.SPLITS and _root_is_known(spec):
        config = module.split_config(spec, split)
        if _has_files(config):
            return config
        hints = config.raw.hints
    existing = [config.split for config in _existing_splits(spec)]
    if not existing:
        raise _no_data_error(spec)
    where = f" in {spec.root}" if spec.root else ""
    text = f"data set '{spec.name}'{where} has no split '{split}', only {', '.join(existing)};"
    text += " docs/data.md has its layout, and --mode=audit shows what each split holds"
    raise InputError("\n".join([text, *hints]))


def _existing_splits(spec: DatasetSpec) -> list[SplitConfig]:
    module = BUILDERS[spec.name]
    if not _root_is_known(spec):
        return []
    configs = [module.split_config(spec, split) for split in module.SPLITS]
    return [config for config in configs if _has_files(config)]


def _has_files(config: SplitConfig) -> bool:
    return bool(config.raw.checks or config.raw.findings)


def _root_is_known(spec: DatasetSpec) -> bool:
    """Whether the spec says where the raw data are, as far as the data set needs to know."""
    return bool(spec.root) or not hasattr(BUILDERS[spec.name], "LAYOUT")


def _no_data_error(spec: DatasetSpec) -> InputError:
    state = "holds none" if data_root(spec).is_dir() else "is not a folder"
    lines = [f"no images for the data set '{spec.name}': data.root = '{spec.root}' {state}"]
    lines += misplaced_hints(spec, BUILDERS[spec.name].SPLITS)
    lines += [
        "Give the folder that holds them with --config.data.root=FOLDER; the first start checks"
        f" and prepares them. Its layout:\n{BUILDERS[spec.name].LAYOUT}"
    ]
    return InputError("\n".join(lines))


def _prepared_folder(spec: DatasetSpec, config: SplitConfig) -> Path:
    """The folder that TFDS prepares a split in."""
    builder = config.builder
    return Path(spec.prepared_dir) / builder.name / config.name / str(builder.VERSION)


def _builder(spec: DatasetSpec, config: SplitConfig) -> RecordBuilder:
    return config.builder(config=config, data_dir=spec.prepared_dir)


def _open(spec: DatasetSpec, config: SplitConfig) -> Records:
    records = open_records(_builder(spec, config), config.split)
    if config.raw.drawn:
        log.info(f"{config.split}: {config.raw.drawn}; {list_file(records.folder, config.split)}")
    published = SPLIT_SIZES.get(spec.name, {}).get(config.split, len(records))
    if len(records) != published:
        log.warning(
            f"data set '{spec.name}', split '{config.split}': {len(records)} examples, not the"
            f" {published} of the published one"
        )
    return records


def _prepare(spec: DatasetSpec, configs: Sequence[SplitConfig]) -> None:
    """Check all the splits together, then prepare those that are not."""
    folders = {config: _prepared_folder(spec, config) for config in configs}
    first = configs[0]
    home = folders[first].parents[1]  # of all splits of this builder
    try:
        with lock(home / ".lock", wait=True):
            faults = {config: find_fault(folder) for config, folder in folders.items()}
            if not any(faults.values()):  # another process was faster
                return
            for config, fault in faults.items():
                if fault and os.path.lexists(folders[config]):
                    log.warning(f"{folders[config]}: prepared again, because {fault}")
            for stale in home.glob("*/incomplete.*"):  # of a process that was killed
                shutil.rmtree(stale)
            splits = {config.split: config.raw for config in configs}
            needed = spec.splits_of_training
            check_splits(str(first.description), splits, first.label_map, needed)
            for config in (config for config, fault in faults.items() if fault):
                remove(folders[config])
                _builder(spec, config).download_and_prepare(file_format="array_record")
                if config.names:
                    write_names(folders[config], config.split, config.names)
                mark_prepared(folders[config])
    except (OSError, RuntimeError) as error:
        # ArrayRecord's writer reports a full disk as a RuntimeError.
        if not isinstance(error, OSError) and "write() failed" not in str(error):
            raise
        raise InputError(
            f"data.prepared_dir = '{spec.prepared_dir}': preparing data set '{spec.name}' there"
            f" failed: {error}"
        ) from error


@contextmanager
def _silence_tfds() -> Iterator[None]:
    """Suppresses misleading messages of TFDS: that it downloads, and that a config is unknown.

    Its progress bars are shown on terminals only.
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


def dataset_spec(config: Config) -> DatasetSpec:
    """The data set of a config, with the settings that it reads."""
    data = config.data
    return DatasetSpec(
        name=data.name,
        prepared_dir=data.prepared_dir,
        root=data.root,
        exif_orientation=data.exif_orientation,
        bit_depth=data.bit_depth,
        train_splits=tuple(data.train_splits),
        val_fraction=data.val_fraction,
        val_unit=data.val_unit,
        class_names=data.class_names,
        ignore_values=data.ignore_values,
        mask_encoding=data.mask_encoding,
        palette=tuple(map(levels, data.palette)),
        ignore_colors=tuple(map(levels, data.ignore_colors)),
        **data.tfds,
        **data.synthetic,
    )
