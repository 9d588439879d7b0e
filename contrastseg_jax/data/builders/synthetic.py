"""Generated scenes of any size, number of classes and length: for tests and benchmarks only."""

from collections.abc import Iterator
from functools import partial

import cv2
import numpy as np
from jaxtyping import UInt8

from contrastseg_jax.data.audit.examples import (
    CheckedExample,
    EncodedExample,
    RawFormat,
    RawSplit,
    check_encoded,
)
from contrastseg_jax.data.builders.base import RecordBuilder, SplitConfig
from contrastseg_jax.data.images import encode_png
from contrastseg_jax.data.labels import default_palette
from contrastseg_jax.data.spec import DatasetSpec, LabelMap
from contrastseg_jax.structs import IGNORE_LABEL

SPLITS = ("train", "val")


class Synthetic(RecordBuilder):
    """Discs, rectangles and triangles with the colour and the stripes of their class."""


def label_map(spec: DatasetSpec) -> LabelMap:
    """Classes `class_0`, `class_1`, ...; masks hold class ids and IGNORE_LABEL."""
    names = tuple(f"class_{i}" for i in range(spec.num_classes))
    train_ids = {value: value for value in (*range(spec.num_classes), IGNORE_LABEL)}
    return LabelMap(names, default_palette(spec.num_classes), train_ids)


def split_config(spec: DatasetSpec, split: str) -> SplitConfig:
    """The scenes of a split, each a function of split, index, size and number of classes."""
    seed = SPLITS.index(split)
    count, (height, width) = spec.num_examples[seed], spec.image_size
    check = partial(_check, spec, seed)
    return SplitConfig(
        builder=Synthetic,
        name=f"{split}_{count}x{width}x{height}_{spec.num_classes}classes",
        description="generated scenes",
        split=split,
        raw=RawSplit([partial(check, index) for index in range(count)]),
        records=partial(_draw, spec, seed, count),
        label_map=label_map(spec),
    )


def draw_scene(
    rng: np.random.Generator, image_size: tuple[int, int], num_classes: int
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Shapes of random classes on a background of class 0, outlined by ignored pixels."""
    height, width = image_size
    label = np.zeros(image_size, np.uint8)
    for _ in range(max(3, num_classes)):
        class_id = int(rng.integers(num_classes))
        center = rng.uniform((0, 0), (width, height))
        radius = rng.uniform(0.1, 0.3) * min(image_size)
        num_corners = int(rng.choice((3, 4, 24)))  # 24 corners look like a disc
        angles = rng.uniform(0, 2 * np.pi) + np.arange(num_corners) * (2 * np.pi / num_corners)
        corners = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        corners = np.round(corners).astype(np.int32)
        cv2.fillPoly(label, [corners], class_id)
        cv2.polylines(label, [corners], isClosed=True, color=IGNORE_LABEL)

    colors = np.full((256, 3), 128.0)
    colors[:num_classes] = np.array(default_palette(num_classes)) * 0.6 + 50
    slopes = np.full((256, 2), 0.0)
    slopes[:num_classes] = [(np.cos(i), np.sin(i)) for i in range(num_classes)]
    rows, columns = np.mgrid[:height, :width]
    stripes = 20 * np.sin(slopes[label, 0] * rows + slopes[label, 1] * columns)
    noise = rng.normal(scale=12, size=(height, width, 3))
    image = np.clip(colors[label] + stripes[..., None] + noise, 0, 255).astype(np.uint8)
    return image, label


def _draw(spec: DatasetSpec, seed: int, count: int) -> Iterator[dict]:
    for index in range(count):
        yield _record(spec, seed, index)


def _record(spec: DatasetSpec, seed: int, index: int) -> dict:
    rng = np.random.default_rng((seed, index))
    image, label = draw_scene(rng, spec.image_size, spec.num_classes)
    return {"image": encode_png(image), "label": encode_png(label), "name": f"{index:06d}"}


def _check(spec: DatasetSpec, seed: int, index: int) -> CheckedExample:
    record = _record(spec, seed, index)
    name = record["name"]
    example = EncodedExample(
        name, f"image {name}", f"mask {name}", record["image"], record["label"]
    )
    return check_encoded(example, RawFormat(label_map(spec)))
