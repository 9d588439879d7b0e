"""Any data set of TFDS that has an image and a mask, by its name there.

Its examples are copied as they are, still encoded, under the names of the record that all data sets
have. Classes are named in the config, as for `folder`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import tensorflow_datasets as tfds

from contrastseg_jax.data.audit.examples import Checked, Finding, RawSplit, check_encoded
from contrastseg_jax.data.builders import folder
from contrastseg_jax.data.builders.base import (
    DatasetSpec,
    RecordBuilder,
    SplitConfig,
    data_root,
    file_stamp,
    name_by_hash,
)
from contrastseg_jax.data.images import Decoding
from contrastseg_jax.data.labels import LabelMap
from contrastseg_jax.errors import InputError, listed

SPLITS = ("train", "val")
label_map = folder.label_map


class FromTfds(RecordBuilder, skip_registration=True):
    """Image and mask of another data set of TFDS."""


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """A split of `spec.dataset`, which TFDS keeps in `spec.root` or its own folder.

    Raises:
        InputError: there is no such data set or split, it cannot be prepared or read here, or has
            no such image or mask.
    """
    source = _prepared_source(spec)
    check_features(spec, source)
    theirs = {"train": spec.train_split, "val": spec.val_split}[split]
    encoded = dict.fromkeys(_pictures(source), tfds.decode.SkipDecoding())
    with _named_errors(f"{_title(source)}, {theirs}"):
        examples = source.as_data_source(theirs, decoders=encoded)  # pyright: ignore[reportCallIssue]
    stamps = [file_stamp(path) for path in sorted(Path(source.data_dir).iterdir())]
    features = spec.image_feature, spec.label_feature
    title, classes = f"{source.info.full_name} {theirs}", label_map(spec)
    check = partial(_check, examples, *features, title, classes, spec.decoding)
    return SplitConfig(
        builder=FromTfds,
        name=name_by_hash(
            *(split, classes, source.info.full_name, theirs, features, spec.decoding, stamps)
        ),
        description=_title(source),
        split=split,
        raw=RawSplit([partial(check, index) for index in range(len(examples))]),
        records=partial(_copy, examples, *features),
        label_map=classes,
    )


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


def _prepared_source(spec: DatasetSpec) -> tfds.core.DatasetBuilder:
    """The data set as TFDS has prepared it, now if need be. What is damaged is left as it is."""
    title = f"data.tfds.dataset = '{spec.dataset}'"
    try:
        source = tfds.builder(spec.dataset, data_dir=data_root(spec) if spec.root else None)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(f"{title}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of several classes, where a file of it is garbled
        where = spec.root or "TFDS's own folder"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{title}: what TFDS has of it in {where} is damaged: {reason}") from error
    with _named_errors(_title(source)):
        if not source.is_prepared():
            source.download_and_prepare(file_format="array_record")
    if not source.is_prepared():  # TFDS takes a folder for prepared that holds nothing
        raise InputError(
            f"{_title(source)}: {source.data_dir} lacks its json files; delete that folder to have"
            " it prepared again"
        )
    return source


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


def _check(
    examples: Sequence,
    image_feature: str,
    label_feature: str,
    title: str,
    classes: LabelMap,
    decoding: Decoding,
    index: int,
) -> Checked:
    name = f"{index:06d}"
    title = f"{title}, example {name}"
    image_file, mask_file = f"{title}, image", f"{title}, mask"
    try:
        example = examples[index]
    except Exception as error:  # of several classes, whose texts are those of C++
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"{title}: cannot be read, what TFDS has prepared is damaged: {reason}"
        finding = Finding("unreadable", title, message)
        return Checked(name, image_file, mask_file, findings=(finding,))
    image, label = example[image_feature], example[label_feature]
    return check_encoded(name, image, label, image_file, mask_file, classes, decoding=decoding)


def _copy(examples: Sequence, image_feature: str, label_feature: str) -> Iterator[dict]:
    for index, example in enumerate(examples):
        image, label = example[image_feature], example[label_feature]
        yield {"image": image, "label": label, "name": f"{index:06d}"}


def _pictures(source: tfds.core.DatasetBuilder) -> list[str]:
    features = cast(tfds.features.FeaturesDict, source.info.features)
    return [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
