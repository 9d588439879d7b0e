"""CamVid street scenes: SegNet's index masks, or the original colour masks in SegNet's classes."""

import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.audit.examples import Finding
from contrastseg_jax.data.builders.base import (
    SPLITS,
    RecordBuilder,
    SplitConfig,
    data_root,
    pairs_config,
)
from contrastseg_jax.data.builders.pairs import (
    Pair,
    SplitFiles,
    find_path,
    list_files,
    match_files,
    read_lines,
)
from contrastseg_jax.data.images import IMAGE_SUFFIXES, decode_image, decode_mask
from contrastseg_jax.data.masks import NO_VALUE, look_up
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """train.txt, val.txt, test.txt with lines "image mask", or without such lists the folders
train/ trainannot/ val/ valannot/ test/ testannot/ with files of equal names (test may be absent);
or, of the original, 701_StillsRaw_full/NAME.png and LabeledApproved_full/NAME_L.png, with or
without train.txt, val.txt, test.txt that hold a name per line"""
ORIGINAL_IMAGES, ORIGINAL_MASKS = "701_StillsRaw_full", "LabeledApproved_full"
HISTORICAL_PREFIX = "/SegNet/CamVid/"  # the original lists' absolute paths
VOID = 11
CLASSES = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
# The colours of the original's 32 classes (label_colors.txt), grouped by the class they become.
# SegNet published masks, not the mapping; this is that of MATLAB's example, which follows SegNet.
COLORS = {
    "Sky": {"Sky": (128, 128, 128)},
    "Building": {
        "Building": (128, 0, 0),
        "Archway": (192, 0, 128),
        "Bridge": (0, 128, 64),
        "Tunnel": (64, 0, 64),
        "Wall": (64, 192, 0),
    },
    "Pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "Road": {
        "Road": (128, 64, 128),
        "LaneMkgsDriv": (128, 0, 192),
        "LaneMkgsNonDriv": (192, 0, 64),
    },
    "Pavement": {
        "Sidewalk": (0, 0, 192),
        "ParkingBlock": (64, 192, 128),
        "RoadShoulder": (128, 128, 192),
    },
    "Tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "SignSymbol": {
        "SignSymbol": (192, 128, 128),
        "Misc_Text": (128, 128, 64),
        "TrafficLight": (0, 64, 64),
    },
    "Fence": {"Fence": (64, 64, 128)},
    "Car": {
        "Car": (64, 0, 128),
        "OtherMoving": (128, 64, 64),
        "SUVPickupTruck": (64, 128, 192),
        "Train": (192, 64, 128),
        "Truck_Bus": (192, 128, 192),
    },
    "Pedestrian": {
        "Pedestrian": (64, 64, 0),
        "Animal": (64, 128, 64),
        "CartLuggagePram": (64, 0, 192),
        "Child": (192, 128, 64),
    },
    "Bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
    "Void": {"Void": (0, 0, 0)},
}
# Seq05VD_f02610_L.png has 175 pixels of undefined colours: 0.03 %.
MAX_UNKNOWN_SHARE = 0.001
# A line "image mask" of a list. Names may have spaces, so the image ends at its suffix.
IMAGE_AND_MASK = re.compile(
    rf"(.+?(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))\s+(.+)", re.IGNORECASE
)


class Camvid(RecordBuilder):
    """CamVid (Brostow et al., 2009), SegNet's split, 11 classes."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """The eleven classes; void is ignored."""
    train_ids = {value: value for value in range(len(CLASSES))} | {VOID: IGNORE_LABEL}
    return LabelMap(tuple(CLASSES), tuple(CLASSES.values()), train_ids)


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The files of a split below `spec.root`."""
    root = data_root(spec)
    if os.path.isdir(root / ORIGINAL_MASKS):
        found, read_mask = _find_original(root, split), read_color_mask
    else:
        found, read_mask = _find_segnet(root, split), decode_mask
    return pairs_config(Camvid, spec, split, found, label_map(spec), read_mask, table=COLORS)


def read_color_mask(data: bytes, name: str) -> UInt8[np.ndarray, "h w"]:
    """A colour mask of the original as SegNet's mask values; a few unknown colours become void.

    Raises:
        InputError: more than `MAX_UNKNOWN_SHARE` of the pixels have an unknown colour.
    """
    values = {color: i for i, colors in enumerate(COLORS.values()) for color in colors.values()}
    mask = look_up(decode_image(data, name), values)
    unknown = mask == NO_VALUE
    if unknown.mean() > MAX_UNKNOWN_SHARE:
        raise InputError(
            f"{name}: {unknown.sum()} of {mask.size} pixels have a colour of none of CamVid's 32"
            " classes"
        )
    mask[unknown] = VOID
    return mask


def split_of(name: str) -> str | None:
    """SegNet's split of a frame of the original, by sequence and time; None: not such a frame."""
    match = re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)", name)
    if not match:
        return None
    sequence, frame = match[1], int(match[2])
    if sequence == "Seq05VD" or (sequence == "0001TP" and frame >= 8550):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= frame <= 8159 else "train"


def _find_original(root: Path, split: str) -> SplitFiles:
    images, masks = root / ORIGINAL_IMAGES, root / ORIGINAL_MASKS
    if any(os.path.exists(root / f"{name}.txt") for name in SPLITS):
        listing, endings = root / f"{split}.txt", {"image_ending": ".png", "mask_ending": "_L.png"}
        return list_files(listing, images, masks, **endings, parse_name=_frame_name)
    found = match_files(images, masks, mask_ending="_L.png")
    pairs = [pair for pair in found.pairs if split_of(pair.name) == split]
    strays = [
        Finding(
            "layout",
            str(pair.image),
            f"{pair.image}: not a frame of CamVid (0001TP_…, 0006R0_…, 0016E5_…, Seq05VD_…), so its"
            " split is unknown; name the frames of each in train.txt, val.txt, test.txt",
        )
        for pair in found.pairs
        if split_of(pair.name) is None
    ]
    # Findings that belong to no split are reported with the first.
    findings = [
        finding
        for finding in (*found.findings, *strays)
        if split == (split_of(Path(finding.file).stem.removesuffix("_L")) or SPLITS[0])
    ]
    return SplitFiles(pairs, findings)


def _find_segnet(root: Path, split: str) -> SplitFiles:
    listing = root / f"{split}.txt"
    if not os.path.exists(listing):
        return match_files(root / split, root / f"{split}annot")
    pairs, (lines, findings) = [], read_lines(listing)
    for number, line in enumerate(lines, start=1):
        paths = IMAGE_AND_MASK.fullmatch(line)
        if paths:
            image, mask = (
                find_path(root, path.removeprefix(HISTORICAL_PREFIX)) for path in paths.groups()
            )
            pairs.append(Pair(image.stem, image, mask))
        elif line:
            message = f'{listing}, line {number}: "image mask" is expected, found "{line}"'
            findings.append(Finding("layout", str(listing), message))
    return SplitFiles(pairs, findings)


def _frame_name(line: str) -> str:
    """The name in a line of a list, which may be a line "image mask" of SegNet's lists."""
    paths = IMAGE_AND_MASK.fullmatch(line)
    return Path(paths[1] if paths else line).stem
