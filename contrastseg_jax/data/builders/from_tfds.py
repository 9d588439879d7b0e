"""Any data set of TFDS that has an image and a mask, by its name in TFDS.

Its examples are copied still encoded into the records that all data sets have. Classes are named in
the config, as for `folder`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import tensorflow_datasets as tfds

from contrastseg_jax.data.audit.examples import (
    CheckedExample,
    EncodedExample,
    Finding,
    RawFormat,
    RawSplit,
    ReadMask,
    check_encoded,
)
from contrastseg_jax.data.builders import folder
from contrastseg_jax.data.builders.base import (
    RecordBuilder,
    SplitConfig,
    data_root,
    file_stamp,
    index_mask,
    name_by_hash,
)
from contrastseg_jax.data.masks import color_names, mask_reader, mask_table
from contrastseg_jax.data.spec import DatasetSpec
from contrastseg_jax.errors import InputError, listed

SPLITS = ("train", "val")
label_map = folder.label_map


class FromTfds(RecordBuilder, skip_registration=True):
    """Image and mask of another data set of TFDS."""


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """A split of `spec.dataset`, which TFDS keeps in `spec.root` or in its default folder.

    Raises:
        InputError: there is no such data set or split, it cannot be prepared or read, or it has no
            such image or mask.
    """
    source = _prepared_source(spec)
    check_features(spec, source)
    source_split = {"train": spec.train_split, "val": spec.val_split}[split]
    encoded = dict.fromkeys(_image_features(source), tfds.decode.SkipDecoding())
    with _named_errors(f"{_title(source)}, {source_split}"):
        examples = source.as_data_source(source_split, decoders=encoded)  # pyright: ignore[reportCallIssue]
    stamps = [file_stamp(path) for path in sorted(Path(source.data_dir).iterdir())]
    features = spec.image_feature, spec.label_feature
    title, classes = f"{source.info.full_name} {source_split}", label_map(spec)
    read_mask, table = mask_reader(spec), mask_table(spec)
    colors = color_names(spec)
    raw_format = RawFormat(classes, read_mask, spec.decoding, colors)
    check = partial(_check, examples, features=features, title=title, raw_format=raw_format)
    return SplitConfig(
        builder=FromTfds,
        name=name_by_hash(
            *(split, classes, source.info.full_name, source_split, features, spec.decoding),
            *(table, stamps),
        ),
        description=_title(source),
        split=split,
        raw=RawSplit([partial(check, index) for index in range(len(examples))], color_names=colors),
        records=partial(_copy, examples, features=features, read_mask=read_mask),
        label_map=classes,
    )


def check_features(spec: DatasetSpec, source: tfds.core.DatasetBuilder) -> None:
    """Raise an error that lists the chosen features that are missing or are not images."""
    image_features = _image_features(source)
    chosen = {"image": spec.image_feature, "label": spec.label_feature}
    problems = [
        f"data.tfds.{setting}_feature = '{key}': must be one of its pictures,"
        f" {', '.join(image_features)}"
        for setting, key in chosen.items()
        if key not in image_features
    ]
    if problems:
        raise listed(_title(source), problems)


def _prepared_source(spec: DatasetSpec) -> tfds.core.DatasetBuilder:
    """The data set as prepared by TFDS, which is done now if necessary; damage is not repaired."""
    title = f"data.tfds.dataset = '{spec.dataset}'"
    try:
        source = tfds.builder(spec.dataset, data_dir=data_root(spec) if spec.root else None)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(f"{title}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of several classes, where one of its files is malformed
        where = spec.root or "TFDS's own folder"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{title}: what TFDS has of it in {where} is damaged: {reason}") from error
    with _named_errors(_title(source)):
        if not source.is_prepared():
            source.download_and_prepare(file_format="array_record")
    if not source.is_prepared():  # TFDS skips preparing where the folder exists, even empty
        raise InputError(
            f"{_title(source)}: {source.data_dir} lacks its json files; delete that folder to have"
            " it prepared again"
        )
    return source


@contextmanager
def _named_errors(title: str) -> Iterator[None]:
    """Errors of TFDS while preparing or reading, as an InputError that names the data set."""
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


def _check(
    examples: Sequence,
    index: int,
    *,
    features: tuple[str, str],
    title: str,
    raw_format: RawFormat,
) -> CheckedExample:
    name = f"{index:06d}"
    title = f"{title}, example {name}"
    image_file, mask_file = f"{title}, image", f"{title}, mask"
    try:
        example = examples[index]
    except Exception as error:  # of several classes, with messages from C++
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"{title}: cannot be read, what TFDS has prepared is damaged: {reason}"
        finding = Finding("unreadable", title, message)
        return CheckedExample(name, image_file, mask_file, findings=(finding,))
    image, label = (example[feature] for feature in features)
    return check_encoded(EncodedExample(name, image_file, mask_file, image, label), raw_format)


def _copy(examples: Sequence, features: tuple[str, str], read_mask: ReadMask) -> Iterator[dict]:
    for index, example in enumerate(examples):
        image, label = (example[feature] for feature in features)
        name = f"{index:06d}"
        yield {"image": image, "label": index_mask(label, name, read_mask), "name": name}


def _image_features(source: tfds.core.DatasetBuilder) -> list[str]:
    features = cast(tfds.features.FeaturesDict, source.info.features)
    return [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
