"""Anyone's own images: two folders per split, classes named in the config."""

from contrastseg_jax.data.builders.base import SPLITS, RecordBuilder, SplitConfig, pairs_config
from contrastseg_jax.data.builders.folders import match_folders
from contrastseg_jax.data.labels import default_palette
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """images/train/ images/val/ with images, labels/train/ labels/val/ with an index mask of
the same name for each (PNG, one channel, pixel value = class id); sub-folders and images/test/
labels/test/ are optional"""
FOLDERS = {split: (f"images/{split}", f"labels/{split}") for split in SPLITS}


class Folder(RecordBuilder):
    """Images and index masks of a folder."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """Class i has the i-th mask value, counted from 0 without those in `spec.ignore_values`.

    Raises:
        InputError: no class is named, or more than there are mask values, or a value to ignore
            lies outside 0..255.
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


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The files of a split below `spec.root`."""
    return pairs_config(Folder, spec, split, match_folders(spec, FOLDERS, split), label_map(spec))
