"""CamVid street scenes, in the layout of the SegNet tutorial."""

from pathlib import Path

from contrastseg_jax.data.builders.base import (
    SPLITS,
    DatasetSpec,
    Pair,
    PairsBuilder,
    match_files,
    missing_data,
    pairs_config,
)
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.errors import InputError
from contrastseg_jax.structs import IGNORE_LABEL

LAYOUT = """train.txt, val.txt, test.txt with lines "image mask", or without such lists the folders
train/ trainannot/ val/ valannot/ test/ testannot/ with files of equal names (test may be absent)"""
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


class Camvid(PairsBuilder):
    """CamVid (Brostow et al., 2009), SegNet's split, 11 classes."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """The eleven classes; void is ignored."""
    train_ids = {value: value for value in range(len(CLASSES))} | {VOID: IGNORE_LABEL}
    return LabelMap(tuple(CLASSES), tuple(CLASSES.values()), train_ids)


def make_builder(spec: DatasetSpec) -> Camvid:
    """Builder of the files below `spec.root`.

    Raises:
        InputError: no split is there, or a list has a line that is not a pair.
    """
    root = Path(spec.root).expanduser()
    found = {split: _find_pairs(root, split) for split in SPLITS} if spec.root else {}
    pairs = {split: members for split, members in found.items() if members}
    if not pairs:
        raise missing_data(spec, LAYOUT)
    return Camvid(config=pairs_config(root, pairs, label_map(spec)), data_dir=spec.prepared_dir)


def _find_pairs(root: Path, split: str) -> list[Pair]:
    listing = root / f"{split}.txt"
    if not listing.exists():
        return match_files(root / split, root / f"{split}annot")
    pairs = []
    for number, line in enumerate(listing.read_text().splitlines(), start=1):
        paths = [root / field.removeprefix(HISTORICAL_PREFIX) for field in line.split()]
        if len(paths) == 2:
            image, mask = paths
            pairs.append(Pair(image.stem, image, mask))
        elif paths:
            raise InputError(f'{listing}, line {number}: "image mask" is expected, found "{line}"')
    return pairs
