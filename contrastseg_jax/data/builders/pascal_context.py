"""PASCAL-Context: the whole scenes of VOC2010's photographs, in the 59 most frequent labels.

Masks are either PNGs of 59 classes (SegmentationClassContext, as in mmsegmentation and the paper's
code: 0 is background, classes count from 1 in alphabetical order) or the official MATLAB files of
all 459 labels, which are converted to such PNGs. PNGs in the order of the official 59_labels.txt
(59_context_labels) are not supported, because that order is another one.
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.builders.base import RecordBuilder, SplitConfig, data_root, pairs_config
from contrastseg_jax.data.builders.pairs import SplitFiles, list_files
from contrastseg_jax.data.images import decode_mask, decode_mat
from contrastseg_jax.data.labels import default_palette, split_names
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """JPEGImages/NAME.jpg, SegmentationClassContext/NAME.png or else trainval/NAME.mat, the
names in train.txt, val.txt below ImageSets/SegmentationContext/ or else ImageSets/Main/"""
SPLITS = ("train", "val")
NUM_LABELS = 459
BACKGROUND = 0
# The classes with their numbers among the 459 labels (labels.txt). They cannot be matched to
# 59_labels.txt by name, because that has other names for table, bedclothes and cloth.
NUMBERED = split_names(
    """
aeroplane 2, bag 9, bed 18, bedclothes 19, bench 22, bicycle 23, bird 25, boat 31, book 33,
bottle 34, building 44, bus 45, cabinet 46, car 59, cat 65, ceiling 68, chair 72, cloth 80,
computer 85, cow 98, cup 104, curtain 105, dog 113, door 115, fence 144, floor 158, flower 159,
food 162, grass 187, ground 189, horse 207, keyboard 220, light 232, motorbike 258, mountain 259,
mouse 260, person 284, plate 295, platform 296, pottedplant 308, road 324, rock 326, sheep 347,
shelves 349, sidewalk 354, sign 355, sky 360, snow 366, sofa 368, table 397, track 415, train 416,
tree 420, truck 424, tvmonitor 427, wall 440, water 445, window 454, wood 458
"""
)
CLASSES = {name: int(number) for name, number in map(str.split, NUMBERED)}


class PascalContext(RecordBuilder):
    """PASCAL-Context (Mottaghi et al., 2014), 59 classes without background."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """Mask value v is class v - 1; background is ignored, as in the paper."""
    values = range(1, len(CLASSES) + 1)
    train_ids = {value: value - 1 for value in values} | {BACKGROUND: IGNORE_LABEL}
    return LabelMap(tuple(CLASSES), default_palette(len(CLASSES)), train_ids)


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The files of a split below `spec.root`, which is the folder VOC2010."""
    root = data_root(spec)
    read_mask = decode_mask if _has_pngs(root) else read_mat_mask
    found = _find(root, split)
    return pairs_config(
        PascalContext, spec, split, found, label_map(spec), read_mask, table=CLASSES
    )


def read_mat_mask(data: bytes, name: str) -> UInt8[np.ndarray, "h w"]:
    """The mask values of the 59 classes, from an official file of 459 labels."""
    table = np.full(NUM_LABELS + 1, BACKGROUND, np.uint8)
    table[list(CLASSES.values())] = range(1, len(CLASSES) + 1)
    return table[decode_mat(data, name, "LabelMap", NUM_LABELS)]


def _find(root: Path, split: str) -> SplitFiles:
    lists = root / "ImageSets" / "SegmentationContext"
    if not os.path.isdir(lists):
        lists = root / "ImageSets" / "Main"
    listing, images = lists / f"{split}.txt", root / "JPEGImages"
    if _has_pngs(root):
        masks, ending = root / "SegmentationClassContext", ".png"
    else:
        masks, ending = root / "trainval", ".mat"
    return list_files(listing, images, masks, image_ending=".jpg", mask_ending=ending)


def _has_pngs(root: Path) -> bool:
    return os.path.isdir(root / "SegmentationClassContext")
