"""What the builders share: the settings they read, the record they write, the checks before it.

A record holds the files of a data set as they are (`image`, `label`: encoded bytes) and the image's
`name`, its path below the split's folder without suffix. Masks keep the values of the raw data: the
label map is applied when they are read. Only masks that are no index pictures (colours, MATLAB
files) are turned into such.
"""

import dataclasses
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds

from contrastseg_jax.data.audit import audit_split, general_findings
from contrastseg_jax.data.builders.pairs import Found, Pair
from contrastseg_jax.data.checks import RawSplit, ReadMask, Splits, check_files
from contrastseg_jax.data.images import AS_STORED, Decoding, decode_mask, encode_png
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.errors import InputError, listed

SPLITS = ("train", "val", "test")
WARNINGS_SHOWN = 5  # when a data set is prepared

log = logging.getLogger("contrastseg_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which data set, and the settings of those that have some."""

    name: str
    prepared_dir: str = "~/.cache/contrastseg_jax"
    root: str = ""  # where the raw data are
    exif_orientation: str = AS_STORED.exif_orientation
    bit_depth: int = AS_STORED.bit_depth
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

    @property
    def decoding(self) -> Decoding:
        """How its images become pixels."""
        return Decoding(self.exif_orientation, self.bit_depth)


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The record, the same for every data set. Records keep the order they are yielded in."""

    VERSION = tfds.core.Version("1.0.0")  # another one when the same files give other records
    url_infos = None  # nothing is downloaded: no checksums to look for

    @abstractmethod
    def raw_splits(self) -> Splits:
        """The examples of each split, to be checked one by one; prepares nothing."""

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


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class PairsConfig(tfds.core.BuilderConfig):
    """The files of a data set and the values its masks may hold."""

    splits: dict[str, Found]
    label_map: LabelMap
    read_mask: ReadMask = decode_mask  # a mask file's content and name to pixel values
    decoding: Decoding = AS_STORED  # how image files become pixels


class PairsBuilder(RecordBuilder, skip_registration=True):
    """A data set of image files and mask files."""

    def raw_splits(self) -> Splits:
        """The pairs of each split, and the files that make none."""
        config = cast(PairsConfig, self.builder_config)
        check = partial(
            check_files,
            label_map=config.label_map,
            read_mask=config.read_mask,
            decoding=config.decoding,
        )
        return {
            split: RawSplit(
                [partial(check, pair.name, pair.image, pair.mask) for pair in found.pairs],
                found.findings,
            )
            for split, found in config.splits.items()
        }

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        config = cast(PairsConfig, self.builder_config)
        check_splits(str(config.description), self.raw_splits(), config.label_map)
        return {
            split: self._generate_examples(found.pairs) for split, found in config.splits.items()
        }

    def _generate_examples(self, pairs: list[Pair]) -> Iterator[tuple[int, dict]]:
        read_mask = cast(PairsConfig, self.builder_config).read_mask
        for index, pair in enumerate(pairs):
            image, mask = pair.image.read_bytes(), pair.mask.read_bytes()
            if read_mask is not decode_mask:
                mask = encode_png(read_mask(mask, str(pair.mask)))
            yield index, {"image": image, "label": mask, "name": pair.name}


def pairs_config(
    root: str | Path,
    splits: dict[str, Found],
    label_map: LabelMap,
    read_mask: ReadMask = decode_mask,
    table: Any = None,
    decoding: Decoding = AS_STORED,
) -> PairsConfig:
    """A config named by a hash of all that preparing depends on, sizes and times of files included.

    So a data set whose files or label settings changed is prepared again, in a folder of its own.

    Args:
        root: where the files are.
        splits: what is there.
        label_map: the values that masks may hold.
        read_mask: a mask file's content and name to pixel values.
        table: what `read_mask` translates by.
        decoding: how image files become pixels, with which they are checked.
    """
    stamps = [
        (split, pair.name, file_stamp(pair.image), file_stamp(pair.mask))
        for split, found in splits.items()
        for pair in found.pairs
    ]
    findings = [found.findings for found in splits.values()]
    described = repr((sorted(label_map.train_ids.items()), table, decoding, stamps, findings))
    return PairsConfig(
        name=hashlib.sha256(described.encode()).hexdigest()[:12],
        description=f"the data of {root}",
        splits=splits,
        label_map=label_map,
        read_mask=read_mask,
        decoding=decoding,
    )


def find_splits(
    spec: DatasetSpec,
    find: Callable[[Path, str], Found],
    layout: str,
    splits: tuple[str, ...] = SPLITS,
) -> dict[str, Found]:
    """The splits that are there, each with what `find(root, split)` finds.

    Raises:
        InputError: none is; `layout` says what is expected.
    """
    root = Path(spec.root).expanduser()
    found = {split: find(root, split) for split in splits} if spec.root else {}
    found = {split: files for split, files in found.items() if files.pairs or files.findings}
    if not found:
        state = "has none" if root.is_dir() else "is no folder"
        raise InputError(
            f"no images for the data set '{spec.name}': data.root = '{spec.root}' {state}\n"
            "Give the folder that holds them with --config.data.root=FOLDER; the first start checks"
            f" and prepares them. Its layout:\n{layout}"
        )
    return found


def check_splits(title: str, splits: Splits, label_map: LabelMap) -> None:
    """Reads every example of a data set to its end; the log has what is worth a warning.

    Raises:
        InputError: lists all that is wrong.
    """
    audits = {name: audit_split(raw, label_map, name) for name, raw in splits.items()}
    findings = [finding for audit in audits.values() for finding in audit.findings]
    findings += general_findings(audits, label_map)
    problems = dict.fromkeys(finding.message for finding in findings if finding.is_error)
    if problems:
        text = listed(title, list(problems))
        raise InputError(f"{text}\n--mode=audit lists all, with what mends each kind")
    messages = [finding.message for finding in findings]
    for message in messages[:WARNINGS_SHOWN]:
        log.warning(message)
    if len(messages) > WARNINGS_SHOWN:
        log.warning(f"and {len(messages) - WARNINGS_SHOWN} more warnings, see --mode=audit")


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Path, size and time of a file, which tell it from a changed one; zeros: it cannot be read."""
    location = str(path.absolute())
    try:
        status = path.stat()
    except OSError:  # which the checks name
        return location, 0, 0
    return location, status.st_size, status.st_mtime_ns
