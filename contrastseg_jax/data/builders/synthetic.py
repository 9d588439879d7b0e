"""Generated scenes of any size, number of classes and length: for tests and benchmarks only."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import cast

import cv2
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from contrastseg_jax.data.builders.base import DatasetSpec, RecordBuilder
from contrastseg_jax.data.checks import Checked, RawSplit, Splits, check_encoded
from contrastseg_jax.data.images import encode_png
from contrastseg_jax.data.labels import LabelMap, default_palette
from contrastseg_jax.structs import IGNORE_LABEL


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SceneConfig(tfds.core.BuilderConfig):
    """What the scenes of a data set have in common, and how many there are."""

    image_size: tuple[int, int]  # height, width
    num_classes: int
    label_map: LabelMap
    num_examples: tuple[int, int]  # train, val


class Synthetic(RecordBuilder):
    """Discs, rectangles and triangles with the colour and the stripes of their class."""

    def raw_splits(self) -> Splits:
        """The scenes of train and of val."""
        config = cast(SceneConfig, self.builder_config)
        return {
            split: RawSplit([partial(_check, config, seed, index) for index in range(count)])
            for split, (seed, count) in _splits(config).items()
        }

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        splits = _splits(cast(SceneConfig, self.builder_config))
        return {split: self._generate_examples(*found) for split, found in splits.items()}

    def _generate_examples(self, seed: int, num_examples: int) -> Iterator[tuple[int, dict]]:
        config = cast(SceneConfig, self.builder_config)
        for index in range(num_examples):
            yield index, _record(config, seed, index)


def label_map(spec: DatasetSpec) -> LabelMap:
    """Classes `class_0`, `class_1`, ...; masks hold class ids and IGNORE_LABEL."""
    names = tuple(f"class_{i}" for i in range(spec.num_classes))
    train_ids = {value: value for value in (*range(spec.num_classes), IGNORE_LABEL)}
    return LabelMap(names, default_palette(spec.num_classes), train_ids)


def make_builder(spec: DatasetSpec) -> Synthetic:
    """Builder of the scenes; one depends on its split, index, size and the number of classes."""
    height, width = spec.image_size
    train, val = spec.num_examples
    config = SceneConfig(
        name=f"{width}x{height}_{spec.num_classes}classes_{train}train_{val}val",
        image_size=spec.image_size,
        num_classes=spec.num_classes,
        label_map=label_map(spec),
        num_examples=spec.num_examples,
    )
    return Synthetic(config=config, data_dir=spec.prepared_dir)


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


def _splits(config: SceneConfig) -> dict[str, tuple[int, int]]:
    """Seed and number of scenes of the splits that have some."""
    counts = enumerate(zip(("train", "val"), config.num_examples, strict=True))
    return {split: (seed, count) for seed, (split, count) in counts if count > 0}


def _record(config: SceneConfig, seed: int, index: int) -> dict:
    rng = np.random.default_rng((seed, index))
    image, label = draw_scene(rng, config.image_size, config.num_classes)
    return {"image": encode_png(image), "label": encode_png(label), "name": f"{index:06d}"}


def _check(config: SceneConfig, seed: int, index: int) -> Checked:
    record = _record(config, seed, index)
    name = record["name"]
    return check_encoded(
        name, record["image"], record["label"], f"image {name}", f"mask {name}", config.label_map
    )
