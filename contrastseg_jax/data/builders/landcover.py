"""Land cover of the Earth seen from space: real photographs that come with the package.

Blue Marble images and MODIS land cover, both NASA, in blocks of 512x512 pixels or less;
`landcover_data/CREDITS.md` has the credits, `landcover_data/make.py` the rule of the split.
"""

from pathlib import Path

from contrastseg_jax.data.builders.base import RecordBuilder, SplitConfig, pairs_config
from contrastseg_jax.data.builders.pairs import match_files
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.structs import IGNORE_LABEL

FOLDER = Path(__file__).parent / "landcover_data"
SPLITS = ("train", "val")
CLASSES = {
    "water": (24, 66, 148),
    "forest": (16, 92, 32),
    "shrub": (150, 114, 58),
    "savanna": (190, 186, 70),
    "grass": (124, 204, 88),
    "crop": (238, 140, 190),
    "snow": (244, 250, 255),
    "barren": (222, 200, 160),
}


class Landcover(RecordBuilder):
    """NASA Blue Marble with MODIS MCD12C1 land cover of 2019, in 8 classes."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """The eight classes; wetland and urban are IGNORE_LABEL in the masks already."""
    train_ids = {value: value for value in (*range(len(CLASSES)), IGNORE_LABEL)}
    return LabelMap(tuple(CLASSES), tuple(CLASSES.values()), train_ids)


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The blocks that were held out (val), or the others (train)."""
    found = match_files(FOLDER / "images" / split, FOLDER / "labels" / split)
    return pairs_config(Landcover, spec, split, found, label_map(spec))
