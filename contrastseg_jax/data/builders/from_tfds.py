"""Any data set of TFDS that has an image and a mask, by its name there.

Its examples are copied as they are, still encoded, under the names of the record that all data sets
have. Classes are named in the config, as for `folder`.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import tensorflow_datasets as tfds

from contrastseg_jax.data.builders import folder
from contrastseg_jax.data.builders.base import (
    DatasetSpec,
    RecordBuilder,
    check_splits,
    file_stamp,
)
from contrastseg_jax.data.checks import Checked, RawSplit, Splits, check_encoded
from contrastseg_jax.data.images import Decoding
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.errors import InputError, listed

label_map = folder.label_map


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SourceConfig(tfds.core.BuilderConfig):
    """Where the examples come from, and the values their masks may hold."""

    source: tfds.core.DatasetBuilder
    splits: dict[str, str]  # of the source, by ours
    image_feature: str
    label_feature: str
    label_map: LabelMap
    decoding: Decoding


class FromTfds(RecordBuilder, skip_registration=True):
    """Image and mask of another data set of TFDS."""

    def raw_splits(self) -> Splits:
        """The examples of the source."""
        config = cast(SourceConfig, self.builder_config)
        sources = {ours: open_source(config, ours) for ours in config.splits}
        return {
            ours: RawSplit([partial(_check, config, ours, source, i) for i in range(len(source))])
            for ours, source in sources.items()
        }

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        config = cast(SourceConfig, self.builder_config)
        check_splits(str(config.description), self.raw_splits(), config.label_map)
        return {ours: self._generate_examples(open_source(config, ours)) for ours in config.splits}

    def _generate_examples(self, source: Sequence[dict]) -> Iterator[tuple[int, dict]]:
        config = cast(SourceConfig, self.builder_config)
        for index, example in enumerate(source):
            image, label = example[config.image_feature], example[config.label_feature]
            yield index, {"image": image, "label": label, "name": f"{index:06d}"}


def make_builder(spec: DatasetSpec) -> FromTfds:
    """Builder of the examples of `spec.dataset`, which TFDS keeps in `spec.root` or its own folder.

    Raises:
        InputError: there is no such data set, it cannot be prepared, or has no such image or mask.
    """
    try:
        source = tfds.builder(
            spec.dataset, data_dir=Path(spec.root).expanduser() if spec.root else None
        )
    except tfds.core.DatasetNotFoundError as error:
        message = str(error).splitlines()[0]
        raise InputError(f"data.tfds.dataset = '{spec.dataset}': {message}") from error
    check_features(spec, source)
    with _named_errors(_title(source)):
        if not source.is_prepared():
            source.download_and_prepare(file_format="array_record")
    chosen = {
        "splits": {"train": spec.train_split, "val": spec.val_split},
        "image_feature": spec.image_feature,
        "label_feature": spec.label_feature,
        "label_map": label_map(spec),
        "decoding": spec.decoding,
    }
    stamps = [file_stamp(path) for path in sorted(Path(source.data_dir).iterdir())]
    described = repr((source.info.full_name, stamps, chosen))
    config = SourceConfig(
        name=hashlib.sha256(described.encode()).hexdigest()[:12],
        description=_title(source),
        source=source,
        **chosen,
    )
    return FromTfds(config=config, data_dir=spec.prepared_dir)


def check_features(spec: DatasetSpec, source: tfds.core.DatasetBuilder) -> None:
    """Raise an error that lists the features that are missing or no pictures."""
    pictures = _pictures(source)
    chosen = {"image": spec.image_feature, "label": spec.label_feature}
    problems = [
        f"data.tfds.{setting}_feature = '{key}': must be one of its pictures, {', '.join(pictures)}"
        for setting, key in chosen.items()
        if key not in pictures
    ]
    if problems:
        raise listed(_title(source), problems)


def open_source(config: SourceConfig, split: str) -> Sequence[dict]:
    """The examples of what is our `split`, pictures encoded.

    Raises:
        InputError: the data set cannot be read here, or has no such split.
    """
    encoded = dict.fromkeys(_pictures(config.source), tfds.decode.SkipDecoding())
    with _named_errors(f"{config.description}, {config.splits[split]}"):
        return config.source.as_data_source(config.splits[split], decoders=encoded)  # pyright: ignore[reportCallIssue]


@contextmanager
def _named_errors(title: str) -> Iterator[None]:
    """What TFDS raises where it cannot prepare or read, as an error that says of what."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{title}: preparing it needs {error.name}, which is not installed; set data.root to a"
            " folder where it is prepared, with file_format='array_record'"
        ) from error
    except (ValueError, NotImplementedError, OSError) as error:
        raise InputError(f"{title}: {error}") from error


def _title(source: tfds.core.DatasetBuilder) -> str:
    return f"the data set {source.info.full_name} of TFDS"


def _check(config: SourceConfig, ours: str, source: Sequence[dict], index: int) -> Checked:
    example, name = source[index], f"{index:06d}"
    title = f"{config.source.info.full_name} {config.splits[ours]}, example {name}"
    image, label = example[config.image_feature], example[config.label_feature]
    files = f"{title}, image", f"{title}, mask"
    return check_encoded(name, image, label, *files, config.label_map, decoding=config.decoding)


def _pictures(source: tfds.core.DatasetBuilder) -> list[str]:
    features = cast(tfds.features.FeaturesDict, source.info.features)
    return [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
