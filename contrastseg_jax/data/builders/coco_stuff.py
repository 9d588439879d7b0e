"""COCO-Stuff: 80 things and 91 kinds of stuff, on 10,000 photographs (v1.1) or on all of COCO 2017.

Both count their 182 labels from 1 (labels.txt). The 10k masks store that number, with 0 for no
label; the 164k masks (stuffthingmaps) store it less 1, with 255 for no label.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.builders.base import RecordBuilder, SplitConfig, data_root, pairs_config
from contrastseg_jax.data.builders.folders import match_folders
from contrastseg_jax.data.builders.pairs import SplitFiles, list_files
from contrastseg_jax.data.images import decode_mask, decode_mat
from contrastseg_jax.data.labels import default_palette, split_names
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """coco_stuff10k: imageLists/train.txt, imageLists/test.txt (our val) with a name per line,
images/NAME.jpg, annotations/NAME.mat
coco_stuff164k: images/train2017/*.jpg images/val2017/*.jpg (train, val) with
annotations/train2017/*.png annotations/val2017/*.png, of stuffthingmaps_trainval2017.zip"""
SPLITS = ("train", "val")
LISTS_10K = {"train": "train.txt", "val": "test.txt"}
FOLDERS = {split: (f"images/{split}2017", f"annotations/{split}2017") for split in SPLITS}
NUM_LABELS = 182
# Labels that COCO has no masks for: street sign, hat, shoe, eye glasses, plate, mirror, window,
# desk, door, blender, hair brush. The others are the classes, in their order.
WITHOUT_MASKS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
CLASSES = split_names(
    """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage,
cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain,
desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood,
flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves,
light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete,
wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
window-other, wood
"""
)


class CocoStuff(RecordBuilder):
    """COCO-Stuff (Caesar et al., 2018), 171 classes."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """The 171 classes; no label, and labels without masks, are ignored."""
    first, no_label = (1, 0) if spec.name == "coco_stuff10k" else (0, 255)
    values = {label: label - 1 + first for label in range(1, NUM_LABELS + 1)}
    ignored = [no_label, *(values.pop(label) for label in WITHOUT_MASKS)]
    train_ids = dict.fromkeys(ignored, IGNORE_LABEL)
    train_ids |= {value: class_id for class_id, value in enumerate(values.values())}
    return LabelMap(CLASSES, default_palette(len(CLASSES)), train_ids)


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The files of a split below `spec.root`."""
    if spec.name == "coco_stuff10k":
        found, read_mask = _find_10k(data_root(spec), split), read_mat_mask
    else:
        found, read_mask = _find_164k(spec, split), decode_mask
    return pairs_config(CocoStuff, spec, split, found, label_map(spec), read_mask)


def read_mat_mask(data: bytes, name: str) -> UInt8[np.ndarray, "h w"]:
    """The labels that a MATLAB file of COCO-Stuff 10k holds."""
    return decode_mat(data, name, "S", NUM_LABELS).astype(np.uint8)


def _find_10k(root: Path, split: str) -> SplitFiles:
    listing = root / "imageLists" / LISTS_10K[split]
    images, masks = root / "images", root / "annotations"
    return list_files(listing, images, masks, image_ending=".jpg", mask_ending=".mat")


def _find_164k(spec: DatasetSpec, split: str) -> SplitFiles:
    found = match_folders(spec, FOLDERS, split)
    # Not the masks that mmsegmentation's converter writes beside them.
    pairs = [pair for pair in found.pairs if not pair.name.endswith("_labelTrainIds")]
    return replace(found, pairs=pairs)
