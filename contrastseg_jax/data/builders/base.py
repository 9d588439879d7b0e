"""What the builders share: the settings they read, the record they write, the checks before it.

A record holds the files of a data set as they are (`image`, `label`: encoded bytes) and the image's
`name`, its path below the split's folder without suffix. Masks keep the values of the raw data: the
label map is applied when they are read.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import tensorflow_datasets as tfds
from tqdm import tqdm

from contrastseg_jax.data.images import IMAGE_SUFFIXES, decode_image, decode_mask
from contrastseg_jax.data.labels import LabelMap, to_train_ids
from contrastseg_jax.errors import InputError, listed

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which data set, and the settings of those that have some."""

    name: str
    prepared_dir: str = "~/.cache/contrastseg_jax"
    root: str = ""  # camvid, folder: where the raw data are
    class_names: tuple[str, ...] = ()  # folder
    ignore_values: tuple[int, ...] = (255,)  # folder: mask values without a class
    image_size: tuple[int, int] = (96, 128)  # synthetic: height, width
    num_classes: int = 5  # synthetic
    num_examples: tuple[int, int] = (16, 8)  # synthetic: train, val


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The record, the same for every data set. Records keep the order they are yielded in."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded: no checksums to look for

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image file and its mask file, as they should be; `check_pairs` finds the missing ones."""

    name: str
    image: Path
    mask: Path


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class PairsConfig(tfds.core.BuilderConfig):
    """The files of a data set and the values its masks may hold."""

    pairs: dict[str, list[Pair]]  # by split
    label_map: LabelMap


class PairsBuilder(RecordBuilder, skip_registration=True):
    """A data set of image files and mask files."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        config = cast(PairsConfig, self.builder_config)
        check_pairs(config)
        return {split: self._generate_examples(members) for split, members in config.pairs.items()}

    def _generate_examples(self, pairs: list[Pair]) -> Iterator[tuple[int, dict]]:
        for index, pair in enumerate(pairs):
            image, mask = pair.image.read_bytes(), pair.mask.read_bytes()
            yield index, {"image": image, "label": mask, "name": pair.name}


def pairs_config(root: Path, pairs: dict[str, list[Pair]], label_map: LabelMap) -> PairsConfig:
    """A config named by a hash of all that preparing depends on, sizes and times of files included.

    So a data set whose files or label settings changed is prepared again, in a folder of its own.
    """
    stamps = [
        (split, pair.name, _stamp(pair.image), _stamp(pair.mask))
        for split, members in pairs.items()
        for pair in members
    ]
    described = repr((sorted(label_map.train_ids.items()), stamps))
    return PairsConfig(
        name=hashlib.sha256(described.encode()).hexdigest()[:12],
        description=f"the data of {root}",
        pairs=pairs,
        label_map=label_map,
    )


def missing_data(spec: DatasetSpec, layout: str) -> InputError:
    """The error of a data set whose raw data are not where they should be."""
    found = "has none" if Path(spec.root).expanduser().is_dir() else "is no folder"
    return InputError(
        f"no images for the data set '{spec.name}': data.root = '{spec.root}' {found}\n"
        "Give the folder that holds them with --config.data.root=FOLDER; the first start checks and"
        f" prepares them. Its layout:\n{layout}"
    )


def match_files(images: Path, masks: Path) -> list[Pair]:
    """Pairs of equal path without suffix below the two folders, sorted by that path.

    Raises:
        InputError: two images have the same path without suffix.
    """
    image_of = _by_stem(images, IMAGE_SUFFIXES)
    mask_of = _by_stem(masks, (".png",))
    return [
        Pair(
            name,
            image_of.get(name, images / f"{name}.*"),
            mask_of.get(name, masks / f"{name}.png"),
        )
        for name in sorted(image_of.keys() | mask_of.keys())
    ]


def check_pairs(config: PairsConfig) -> None:
    """Reads every file of a data set to its end.

    Raises:
        InputError: lists all that is wrong.
    """
    pairs = [pair for members in config.pairs.values() for pair in members]
    with ThreadPoolExecutor() as pool:
        found = pool.map(partial(_problems, label_map=config.label_map), pairs)
        bar = tqdm(found, "Checking images and masks", len(pairs), leave=False, disable=None)
        problems = [problem for problems in bar for problem in problems]
    if problems:
        raise listed(str(config.description), problems)


def _problems(pair: Pair, label_map: LabelMap) -> list[str]:
    if not pair.mask.exists() and not pair.image.exists():
        return [f"{pair.image}: neither it nor its mask {pair.mask} exists"]
    if not pair.mask.exists():
        return [f"{pair.image}: image without mask ({pair.mask} does not exist)"]
    if not pair.image.exists():
        return [f"{pair.mask}: mask without image ({pair.image} does not exist)"]
    problems = []
    image = mask = None
    try:
        image = decode_image(pair.image.read_bytes(), str(pair.image))
    except (OSError, InputError) as error:
        problems.append(str(error))
    try:
        mask = decode_mask(pair.mask.read_bytes(), str(pair.mask))
        to_train_ids(mask, label_map, str(pair.mask))
    except (OSError, InputError) as error:
        problems.append(str(error))
    if image is not None and mask is not None and image.shape[:2] != mask.shape:
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
        problems.append(
            f"{pair.mask}: mask of {mask_width}x{mask_height} pixels for an image of "
            f"{width}x{height} ({pair.image})"
        )
    return problems


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in below.parts)
        if path.suffix.lower() in suffixes and not hidden:
            name = below.with_suffix("").as_posix()
            if name in files:
                raise InputError(f"{path}: same name without suffix as {files[name]}")
            files[name] = path
    return files


def _stamp(path: Path) -> tuple[str, int, int]:
    location = str(path.absolute())
    if not path.exists():
        return location, 0, 0
    status = path.stat()
    return location, status.st_size, status.st_mtime_ns
