"""Cityscapes street scenes: gtFine, and train_extra of gtCoarse where present.

The published masks of `test` hold no class (ids 0 to 3 only), so its scores are NaN. To the
benchmark's server one submits the masks that `--mode=predict` writes, which hold label ids.
"""

import os
from pathlib import Path

from contrastseg_jax.data.builders.base import RecordBuilder, SplitConfig, data_root, pairs_config
from contrastseg_jax.data.builders.pairs import SplitFiles, match_files
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """leftImg8bit/train/CITY/*_leftImg8bit.png with gtFine/train/CITY/*_gtFine_labelIds.png,
and likewise val; test, and train_extra with gtCoarse/train_extra/CITY/*_gtCoarse_labelIds.png, are
optional"""
SPLITS = ("train", "val", "test", "train_extra")
# Label id and colour of each class (cityscapesScripts, helpers/labels.py), in the order of trainId.
CLASSES = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
# Licence plates have the id -1. The official tools do not draw them; others store 255.
LABEL_IDS = (*range(34), 255)


class Cityscapes(RecordBuilder):
    """Cityscapes (Cordts et al., 2016), 19 classes."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """The 19 classes of the benchmark; all other label ids are ignored."""
    label_ids, palette = zip(*CLASSES.values(), strict=True)
    train_ids = dict.fromkeys(LABEL_IDS, IGNORE_LABEL)
    train_ids |= {label_id: class_id for class_id, label_id in enumerate(label_ids)}
    return LabelMap(tuple(CLASSES), palette, train_ids)


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The files of a split below `spec.root`."""
    found = _find(data_root(spec), split)
    return pairs_config(Cityscapes, spec, split, found, label_map(spec))


def _find(root: Path, split: str) -> SplitFiles:
    annotation = "gtCoarse" if split == "train_extra" else "gtFine"
    images, masks = root / "leftImg8bit" / split, root / annotation / split
    if split in ("test", "train_extra") and not os.path.isdir(images):
        return SplitFiles()  # these are optional, though the masks of all come in one archive
    return match_files(
        images,
        masks,
        image_endings=("_leftImg8bit.png",),
        mask_ending=f"_{annotation}_labelIds.png",
    )
