"""Anyone's own images: two folders per split or two alone, classes named in the config."""

import os
import re
from dataclasses import replace
from pathlib import Path

from contrastseg_jax.data.builders.base import (
    SPLITS,
    RecordBuilder,
    SplitConfig,
    data_root,
    pairs_config,
)
from contrastseg_jax.data.builders.folders import match_folders
from contrastseg_jax.data.builders.pairs import SplitFiles, match_files
from contrastseg_jax.data.builders.val_split import draw_val
from contrastseg_jax.data.labels import default_palette
from contrastseg_jax.data.masks import mask_reader, mask_table
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """images/train/ images/val/ with images, labels/train/ labels/val/ with an index mask of
the same name for each (PNG, one channel, pixel value = class id); sub-folders and images/test/
labels/test/ are optional. With --config.data.val_fraction=0.1 images/ labels/ without train/ and
val/, or images/train/ labels/train/ alone, of which a tenth is drawn for val"""
SIDES = ("images", "labels")
FOLDERS = {split: (f"images/{split}", f"labels/{split}") for split in SPLITS}
DRAWN = ("train", "val")  # the splits that `data.val_fraction` makes
# Folders that look like a split, so that images of one must not be drawn for another.
SPLIT_NAME = re.compile(r"(train|training|trn|val|valid|validation|dev|eval|test|testing|tst)\d*")


class Folder(RecordBuilder):
    """Images and index masks of a folder."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """Class i has the i-th mask value, counted from 0 without those in `spec.ignore_values`.

    In masks of colours, and those of two classes, values are class ids once they are read.

    Raises:
        InputError: no class is named, or more than there are mask values, or a value to ignore
            lies outside 0..255.
    """
    ignored = _ignored_values(spec)
    if not all(0 <= value <= 255 for value in ignored):
        raise InputError(f"data.ignore_values = {spec.ignore_values}: must lie in 0..255")
    values = [value for value in range(256) if value not in ignored]
    limit = min(len(values), IGNORE_LABEL)
    if not 0 < len(spec.class_names) <= limit:
        raise InputError(
            f"data.class_names has {len(spec.class_names)} names: name 1..{limit} classes, in the "
            "order of their mask values"
        )
    train_ids = dict.fromkeys(ignored, IGNORE_LABEL)
    train_ids |= {value: i for i, value in enumerate(values[: len(spec.class_names)])}
    palette = spec.palette or default_palette(len(spec.class_names))
    return LabelMap(spec.class_names, palette, train_ids)


def _ignored_values(spec: DatasetSpec) -> tuple[int, ...]:
    """The mask values without a class, as the masks are read."""
    if spec.mask_encoding == "index":
        return spec.ignore_values
    return (IGNORE_LABEL,) if spec.mask_encoding == "rgb" else ()


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The files of a split below `spec.root`; with `spec.val_fraction` train and val are drawn.

    Raises:
        InputError: they cannot be drawn, as there is a val, or a single sequence.
    """
    if spec.val_fraction and split in DRAWN:
        found = _draw(spec, split)
    else:
        found = match_folders(spec, FOLDERS, split)
        if split == "val" and not found.pairs and not found.findings:
            found = replace(found, hints=[*found.hints, *_drawing_hint(data_root(spec))])
    return pairs_config(
        Folder, spec, split, found, label_map(spec), mask_reader(spec), table=mask_table(spec)
    )


def _draw(spec: DatasetSpec, split: str) -> SplitFiles:
    """The part of the undivided files that a split has."""
    root = data_root(spec)
    if own := _own_splits(root):
        raise InputError(
            f"data.val_fraction = {spec.val_fraction}: {spec.root} has {', '.join(own)}, a split of"
            " its own; leave the setting at 0, or have images/ without splits, or images/train/"
        )
    found = _undivided(root)
    if not found.pairs:
        return replace(found, hints=match_folders(spec, FOLDERS, split).hints)
    draw = draw_val([pair.name for pair in found.pairs], spec.val_fraction, spec.val_unit)
    pairs = [pair for pair in found.pairs if (pair.name in draw.val) == (split == "val")]
    return replace(found, pairs=pairs, drawn=draw.description[split])


def _undivided(root: Path) -> SplitFiles:
    """Images and masks without a val: those of train if it exists, or all but those of test."""
    images, masks = (root / side for side in FOLDERS["train"])
    if images.is_dir():
        return match_files(images, masks)
    found = match_files(*(root / side for side in SIDES))
    tests = [str(root / side) + os.sep for side in FOLDERS["test"]]
    return replace(
        found,
        pairs=[pair for pair in found.pairs if not pair.name.startswith("test/")],
        findings=[f for f in found.findings if not f.file.startswith(tuple(tests))],
    )


def _own_splits(root: Path) -> list[str]:
    """Folders below the root that are a split already, whatever its name, beside train and test."""
    return [
        f"{side}/{path.name}"
        for side in SIDES
        for path in sorted((root / side).glob("*/"))
        if SPLIT_NAME.fullmatch(path.name.lower()) and path.name not in ("train", "test")
    ]


def _drawing_hint(root: Path) -> list[str]:
    """How to have a val without making one, where there are images that one can be drawn from."""
    if _own_splits(root) or not _undivided(root).pairs:
        return []
    return ["Or have a tenth of the images drawn for val: --config.data.val_fraction=0.1"]
