"""What the builders share: the settings they read, the record they write, the checks before it.

A record holds the files of a data set as they are (`image`, `label`: encoded bytes) and the image's
`name`, its path below the split's folder without suffix. Masks keep the values of the raw data; the
label map is applied when a record is read. Only masks that are not index images (colour masks,
MATLAB files) are converted to index PNGs.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds

from contrastseg_jax.data.audit.examples import RawFormat, RawSplit, ReadMask, Splits, check_files
from contrastseg_jax.data.audit.statistics import (
    audit_split,
    dataset_findings,
    merge_color_findings,
)
from contrastseg_jax.data.builders.pairs import Pair, SplitFiles
from contrastseg_jax.data.images import decode_mask, encode_png
from contrastseg_jax.data.masks import color_names
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.errors import InputError, listed

SPLITS = ("train", "val", "test")
MAX_WARNINGS = 5  # that are logged when a data set is prepared

log = logging.getLogger("contrastseg_jax")


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SplitConfig(tfds.core.BuilderConfig):
    """A split before it is prepared.

    The name is a hash of all that preparing depends on, so that a split whose files or label
    settings changed is prepared again, in another folder.
    """

    builder: type["RecordBuilder"]
    split: str
    raw: RawSplit
    records: Callable[[], Iterable[dict]]  # to be written
    label_map: LabelMap
    names: Sequence[str] = ()  # of its images, where it was drawn: a list of them is kept


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One split of a data set, its records in the order in which they are generated."""

    VERSION = tfds.core.Version("1.0.0")  # to be raised when the same files give other records
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

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        config = cast(SplitConfig, self.builder_config)
        return {config.split: self._generate_examples(config.records)}

    def _generate_examples(
        self, records: Callable[[], Iterable[dict]]
    ) -> Iterator[tuple[int, dict]]:
        yield from enumerate(records())


def data_root(spec: DatasetSpec) -> Path:
    """Where the raw data are."""
    return Path(spec.root).expanduser()


def pairs_config(
    builder: type[RecordBuilder],
    spec: DatasetSpec,
    split: str,
    files: SplitFiles,
    label_map: LabelMap,
    read_mask: ReadMask = decode_mask,
    table: Any = None,
) -> SplitConfig:
    """A split of pairs of files.

    Args:
        builder: of the data set.
        spec: where the files are, and how images are decoded to check them.
        split: its name.
        files: the pairs; paths, sizes and times of the files go into the hash.
        label_map: the values that masks may hold.
        read_mask: content and name of a mask file to pixel values.
        table: what `read_mask` converts by, for the hash.
    """
    stamps = [(pair.name, file_stamp(pair.image), file_stamp(pair.mask)) for pair in files.pairs]
    colors = color_names(spec)
    raw_format = RawFormat(label_map, read_mask, spec.decoding, colors)
    check = partial(check_files, raw_format=raw_format)
    checks = [partial(check, pair.name, pair.image, pair.mask) for pair in files.pairs]
    return SplitConfig(
        builder=builder,
        name=name_by_hash(split, label_map, spec.decoding, table, stamps, files.findings),
        description=f"the data of {spec.root or spec.name}",
        split=split,
        raw=RawSplit(checks, files.findings, files.hints, files.drawn, colors),
        records=partial(_read_pairs, files.pairs, read_mask),
        label_map=label_map,
        names=[pair.name for pair in files.pairs] if files.drawn else (),
    )


def name_by_hash(split: str, label_map: LabelMap, *inputs: Any) -> str:
    """The split's name with a hash of its mask values and of all else that preparing depends on."""
    text = repr((split, sorted(label_map.train_ids.items()), *inputs))
    return f"{split}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def check_splits(
    title: str, splits: Splits, label_map: LabelMap, splits_of_training: Sequence[str]
) -> None:
    """Decodes every example of some splits, and logs warnings.

    Raises:
        InputError: lists all errors.
    """
    audits = {name: audit_split(raw, label_map, name) for name, raw in splits.items()}
    findings = [
        finding for name, audit in audits.items() for finding in merge_color_findings(audit, name)
    ]
    findings += dataset_findings(audits, label_map, splits_of_training)
    problems = dict.fromkeys(finding.message for finding in findings if finding.is_error)
    if problems:
        text = listed(title, list(problems))
        raise InputError(f"{text}\n--mode=audit lists all, with a remedy for each kind")
    messages = [finding.message for finding in findings]
    for message in messages[:MAX_WARNINGS]:
        log.warning(message)
    if len(messages) > MAX_WARNINGS:
        log.warning(f"and {len(messages) - MAX_WARNINGS} more warnings, see --mode=audit")


def file_stamp(path: Path) -> tuple[str, int, int]:
    """Path, size and modification time, by which a changed file is recognised; 0: unreadable."""
    location = str(path.absolute())
    try:
        status = path.stat()
    except OSError:  # which checking the file reports
        return location, 0, 0
    return location, status.st_size, status.st_mtime_ns


def _read_pairs(pairs: Sequence[Pair], read_mask: ReadMask) -> Iterator[dict]:
    for pair in pairs:
        image, mask = pair.image.read_bytes(), pair.mask.read_bytes()
        mask = index_mask(mask, str(pair.mask), read_mask)
        yield {"image": image, "label": mask, "name": pair.name}


def index_mask(data: bytes, name: str, read_mask: ReadMask) -> bytes:
    """The file of an index mask: as it is, or what `read_mask` makes of another encoding."""
    return data if read_mask is decode_mask else encode_png(read_mask(data, name))
