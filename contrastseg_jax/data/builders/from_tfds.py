"""Any data set of TFDS that has an image and a mask, by its name there.

Its examples are copied as they are, still encoded, under the names of the record that all data sets
have. Classes are named in the config, as for `folder`.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import tensorflow_datasets as tfds

from contrastseg_jax.data.builders import folder
from contrastseg_jax.data.builders.base import DatasetSpec, RecordBuilder, check_splits
from contrastseg_jax.data.checks import Checked, RawSplit, Splits, check_encoded
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
        check_splits(str(config.description), self.raw_splits())
        return {ours: self._generate_examples(open_source(config, ours)) for ours in config.splits}

    def _generate_examples(self, source: Sequence[dict]) -> Iterator[tuple[int, dict]]:
        config = cast(SourceConfig, self.builder_config)
        for index, example in enumerate(source):
            image, label = example[config.image_feature], example[config.label_feature]
            yield index, {"image": image, "label": label, "name": f"{index:06d}"}


def make_builder(spec: DatasetSpec) -> FromTfds:
    """Builder of the examples of `spec.dataset`, which TFDS keeps in `spec.root` or its own folder.

    Raises:
        InputError: there is no such data set, or it has no such image, mask or split.
    """
    try:
        source = tfds.builder(
            spec.dataset, data_dir=Path(spec.root).expanduser() if spec.root else None
        )
    except tfds.core.DatasetNotFoundError as error:
        message = str(error).splitlines()[0]
        raise InputError(f"data.tfds.dataset = '{spec.dataset}': {message}") from error
    chosen = {
        "splits": {"train": spec.train_split, "val": spec.val_split},
        "image_feature": spec.image_feature,
        "label_feature": spec.label_feature,
        "label_map": label_map(spec),
    }
    described = repr((source.info.full_name, spec.root, chosen))
    config = SourceConfig(
        name=hashlib.sha256(described.encode()).hexdigest()[:12],
        description=f"the data set {source.info.full_name} of TFDS",
        source=source,
        **chosen,
    )
    check_features(config)
    return FromTfds(config=config, data_dir=spec.prepared_dir)


def check_features(config: SourceConfig) -> None:
    """Raise an error that lists the features that are missing or no pictures."""
    pictures = _pictures(config.source)
    chosen = {"image": config.image_feature, "label": config.label_feature}
    problems = [
        f"data.tfds.{setting}_feature = '{key}': must be one of its pictures, {', '.join(pictures)}"
        for setting, key in chosen.items()
        if key not in pictures
    ]
    if problems:
        raise listed(str(config.description), problems)


def open_source(config: SourceConfig, split: str) -> Sequence[dict]:
    """The examples of what is our `split`, pictures encoded; prepared first if need be.

    Raises:
        InputError: the data set cannot be prepared or read here, or has no such split.
    """
    source = config.source
    encoded = dict.fromkeys(_pictures(source), tfds.decode.SkipDecoding())
    try:
        if not source.is_prepared():
            source.download_and_prepare(file_format="array_record")
        return source.as_data_source(config.splits[split], decoders=encoded)  # pyright: ignore[reportCallIssue]
    except ImportError as error:
        raise InputError(
            f"{config.description}: preparing it needs {error.name}, which is not installed; set"
            " data.root to a folder where it is prepared, with file_format='array_record'"
        ) from error
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{config.description}, {config.splits[split]}: {error}") from error


def _check(config: SourceConfig, ours: str, source: Sequence[dict], index: int) -> Checked:
    example, name = source[index], f"{index:06d}"
    title = f"{config.source.info.full_name} {config.splits[ours]}, example {name}"
    image, label = example[config.image_feature], example[config.label_feature]
    return check_encoded(name, image, label, f"{title}, image", f"{title}, mask", config.label_map)


def _pictures(source: tfds.core.DatasetBuilder) -> list[str]:
    features = cast(tfds.features.FeaturesDict, source.info.features)
    return [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
