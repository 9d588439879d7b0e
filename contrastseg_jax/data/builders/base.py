"""What the builders share: the settings they read, the record they write, the checks before it.

A record holds the files of a data set as they are (`image`, `label`: encoded bytes) and the image's
`name`, its path below the split's folder without suffix. Masks keep the values of the raw data: the
label map is applied when they are read. Only masks that are no index pictures (colours, MATLAB
files) are turned into such.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import tensorflow_datasets as tfds

from contrastseg_jax.data.checks import ReadMask, check_files, in_parallel
from contrastseg_jax.data.images import IMAGE_SUFFIXES, decode_mask, encode_png
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.errors import InputError, listed

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which data set, and the settings of those that have some."""

    name: str
    prepared_dir: str = "~/.cache/contrastseg_jax"
    root: str = ""  # where the raw data are
    class_names: tuple[str, ...] = ()  # folder, tfds
    ignore_values: tuple[int, ...] = (255,)  # folder, tfds: mask values without a class
    dataset: str = ""  # tfds: its name there
    image_feature: str = "image"  # tfds
    label_feature: str = "label"  # tfds
    train_split: str = "train"  # tfds: what is our train
    val_split: str = "validation"  # tfds: what is our val
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
    read_mask: ReadMask = decode_mask  # a mask file's content and name to pixel values


class PairsBuilder(RecordBuilder, skip_registration=True):
    """A data set of image files and mask files."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        config = cast(PairsConfig, self.builder_config)
        check_pairs(config)
        return {split: self._generate_examples(members) for split, members in config.pairs.items()}

    def _generate_examples(self, pairs: list[Pair]) -> Iterator[tuple[int, dict]]:
        read_mask = cast(PairsConfig, self.builder_config).read_mask
        for index, pair in enumerate(pairs):
            image, mask = pair.image.read_bytes(), pair.mask.read_bytes()
            if read_mask is not decode_mask:
                mask = encode_png(read_mask(mask, str(pair.mask)))
            yield index, {"image": image, "label": mask, "name": pair.name}


def pairs_config(
    root: str | Path,
    pairs: dict[str, list[Pair]],
    label_map: LabelMap,
    read_mask: ReadMask = decode_mask,
) -> PairsConfig:
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
        read_mask=read_mask,
    )


def find_splits(
    spec: DatasetSpec,
    find_pairs: Callable[[Path, str], list[Pair]],
    layout: str,
    splits: tuple[str, ...] = SPLITS,
) -> dict[str, list[Pair]]:
    """The splits that are there, each with what `find_pairs(root, split)` finds.

    Raises:
        InputError: none is; `layout` says what is expected.
    """
    root = Path(spec.root).expanduser()
    found = {split: find_pairs(root, split) for split in splits} if spec.root else {}
    pairs = {split: members for split, members in found.items() if members}
    if not pairs:
        state = "has none" if root.is_dir() else "is no folder"
        raise InputError(
            f"no images for the data set '{spec.name}': data.root = '{spec.root}' {state}\n"
            "Give the folder that holds them with --config.data.root=FOLDER; the first start checks"
            f" and prepares them. Its layout:\n{layout}"
        )
    return pairs


def match_files(
    images: Path,
    masks: Path,
    *,
    image_endings: tuple[str, ...] = IMAGE_SUFFIXES,
    mask_ending: str = ".png",
) -> list[Pair]:
    """Pairs of equal path without ending below the two folders, sorted by that path.

    Raises:
        InputError: two images have the same path without ending.
    """
    image_of = _by_name(images, image_endings)
    mask_of = _by_name(masks, (mask_ending,))
    missing = image_endings[0] if len(image_endings) == 1 else ".*"
    return [
        Pair(
            name,
            image_of.get(name, images / f"{name}{missing}"),
            mask_of.get(name, masks / f"{name}{mask_ending}"),
        )
        for name in sorted(image_of.keys() | mask_of.keys())
    ]


def name_files(
    names: Iterable[str], images: Path, masks: Path, *, image_ending: str, mask_ending: str
) -> list[Pair]:
    """The pairs of a list of names, in its order."""
    return [
        Pair(name, images / f"{name}{image_ending}", masks / f"{name}{mask_ending}")
        for name in names
    ]


def read_lines(path: Path) -> list[str]:
    """The lines of a list of files, without blank ones; none if there is no such list."""
    if not path.exists():
        return []
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def check_pairs(config: PairsConfig) -> None:
    """Reads every file of a data set to its end.

    Raises:
        InputError: lists all that is wrong.
    """

    def errors_of(pair: Pair) -> list[str]:
        checked = check_files(pair.name, pair.image, pair.mask, config.label_map, config.read_mask)
        return [finding.message for finding in checked.findings if finding.is_error]

    pairs = [pair for members in config.pairs.values() for pair in members]
    found = in_parallel(errors_of, pairs, "Checking images and masks")
    problems = [problem for problems in found for problem in problems]
    if problems:
        raise listed(str(config.description), problems)


def _by_name(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The files below a folder whose names end so, by their path without it."""
    files: dict[str, Path] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):  # rglob passes over it
            raise InputError(f"{path}: the folder cannot be read (permission denied)")
        below = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in below.parts)
        ending = next((e for e in endings if path.name.lower().endswith(e.lower())), "")
        if ending and not hidden:
            name = below.as_posix().removesuffix(path.name[-len(ending) :])
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
