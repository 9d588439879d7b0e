"""Anyone's own images: two folders per split, classes named in the config."""

from pathlib import Path

from contrastseg_jax.data.builders.base import DatasetSpec, PairsBuilder, find_splits, pairs_config
from contrastseg_jax.data.builders.pairs import Found, match_files
from contrastseg_jax.data.labels import LabelMap, default_palette
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """images/train/ images/val/ with images, labels/train/ labels/val/ with an index mask of
the same name for each (PNG, one channel, pixel value = class id); sub-folders and images/test/
labels/test/ are optional"""


class Folder(PairsBuilder):
    """Images and index masks of a folder."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """Class i has the i-th mask value, counting from 0 and leaving out `spec.ignore_values`.

    Raises:
        InputError: no class is named, or more than there are mask values; or a value to ignore is
            none that a mask can have.
    """
    if not all(0 <= value <= 255 for value in spec.ignore_values):
        raise InputError(f"data.ignore_values = {spec.ignore_values}: must lie in 0..255")
    values = [value for value in range(256) if value not in spec.ignore_values]
    limit = min(len(values), IGNORE_LABEL)
    if not 0 < len(spec.class_names) <= limit:
        raise InputError(
            f"data.class_names has {len(spec.class_names)} names: name 1..{limit} classes, in the "
            "order of their mask values"
        )
    train_ids = dict.fromkeys(spec.ignore_values, IGNORE_LABEL)
    train_ids |= {value: i for i, value in enumerate(values[: len(spec.class_names)])}
    return LabelMap(spec.class_names, default_palette(len(spec.class_names)), train_ids)


def make_builder(spec: DatasetSpec) -> Folder:
    """Builder of the files below `spec.root`.

    Raises:
        InputError: no split is there.
    """
    splits = find_splits(spec, _find, LAYOUT)
    config = pairs_config(spec.root, splits, label_map(spec), decoding=spec.decoding)
    return Folder(config=config, data_dir=spec.prepared_dir)


def _find(root: Path, split: str) -> Found:
    return match_files(root / "images" / split, root / "labels" / split)
