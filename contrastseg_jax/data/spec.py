"""What a data set is and how its examples become arrays: structs alone, quick to import."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How image files become pixels: the settings `data.exif_orientation` and `data.bit_depth`."""

    exif_orientation: str = "stored"  # or "applied": rotated and mirrored as viewers do
    bit_depth: int = 0  # of values in files with more than 8 bits per channel; 0: as the file says


AS_STORED = Decoding()

Color = tuple[int, int, int]  # red, green, blue


@dataclass(frozen=True)
class LabelMap:
    """The classes of a data set, in the order of their ids, and the mask values that mean them."""

    names: tuple[str, ...]
    palette: tuple[Color, ...]  # one per class
    train_ids: Mapping[int, int]  # pixel value in a mask file -> class id, or IGNORE_LABEL


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which data set, and its settings; the comments name the data sets that read them."""

    name: str
    prepared_dir: str = "~/.cache/contrastseg_jax"
    root: str = ""  # where the raw data are
    exif_orientation: str = AS_STORED.exif_orientation
    bit_depth: int = AS_STORED.bit_depth
    train_splits: tuple[str, ...] = ("train",)  # to train on
    val_fraction: float = 0.0  # folder: share of the images to draw for val; 0: it has one
    val_unit: str = "sequence"  # folder: what is drawn whole, or "image"
    class_names: tuple[str, ...] = ()  # folder, tfds
    ignore_values: tuple[int, ...] = (255,)  # folder, tfds: mask values without a class
    mask_encoding: str = "index"  # folder, tfds: of a pixel's class; or "rgb", "binary"
    palette: tuple[Color, ...] = ()  # folder, tfds: of the classes, in masks that are "rgb"
    ignore_colors: tuple[Color, ...] = ()  # likewise: colours without a class
    dataset: str = ""  # tfds: its name in TFDS
    image_feature: str = "image"  # tfds
    label_feature: str = "label"  # tfds
    train_split: str = "train"  # tfds: what to train on
    val_split: str = "validation"  # tfds: what to validate on
    image_size: tuple[int, int] = (96, 128)  # synthetic: height, width
    num_classes: int = 5  # synthetic
    num_examples: tuple[int, int] = (16, 8)  # synthetic: train, val

    @property
    def splits_of_training(self) -> tuple[str, ...]:
        """All that training reads: the splits to train on, and val."""
        return tuple(dict.fromkeys((*self.train_splits, "val")))

    @property
    def decoding(self) -> Decoding:
        """How its images are decoded."""
        return Decoding(self.exif_orientation, self.bit_depth)


@dataclass(frozen=True)
class Preprocessing:
    """How the files of an example become arrays, whatever the arrays are for."""

    label_map: LabelMap  # what the masks' values mean
    pad_color: Color  # RGB around an image that is smaller than its batch
    short_side: int = 0  # length of images' shorter side, not of labels'; 0: keep the size
    decoding: Decoding = AS_STORED
