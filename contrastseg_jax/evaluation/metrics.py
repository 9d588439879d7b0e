"""Metrics of a split, exact for any batching."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from contrastseg_jax.ops.iou import class_iou, mean_over_classes
from contrastseg_jax.ops.iou import pixel_accuracy as accuracy


def confusion_matrices(
    label: UInt8[Array, "b h w"], prediction: Int[Array, "b h w"], *, num_classes: int
) -> Int[Array, "b k k"]:
    """Number of pixels with label i and prediction j, at [i, j] of each image's matrix.

    Ignored pixels are left out.
    """
    labelled = label < num_classes
    row, column = label.astype(jnp.int32), prediction.astype(jnp.int32)
    pair = jnp.where(labelled, row * num_classes + column, num_classes**2)
    count = functools.partial(jnp.bincount, length=num_classes**2 + 1)
    counts = jax.vmap(count)(pair.reshape(len(pair), -1)).astype(jnp.int32)
    return counts[:, :-1].reshape(-1, num_classes, num_classes)


def confusion_matrix(
    label: UInt8[Array, "b h w"], prediction: Int[Array, "b h w"], *, num_classes: int
) -> Int[Array, "k k"]:
    """The sum of the images' `confusion_matrices`."""
    counts = confusion_matrices(label, prediction, num_classes=num_classes)
    return counts.sum(0, dtype=jnp.int32)


def image_counts(
    label: UInt8[Array, "b h w"], prediction: Int[Array, "b h w"], *, num_classes: int
) -> Int[Array, "b 3 k"]:
    """Pixels of each image and class: rightly predicted, labelled, and predicted.

    Ignored pixels are left out of all three. Summed over the images of a split they give the same
    IoU as its confusion matrix, and summed over any sample of images the IoU of that sample.
    """
    counts = confusion_matrices(label, prediction, num_classes=num_classes)
    hit = jnp.diagonal(counts, axis1=1, axis2=2)
    sums = (counts.sum(axis, dtype=jnp.int32) for axis in (2, 1))
    return jnp.stack([hit, *sums], axis=1)


def class_counts(
    confusion: Int[np.ndarray, "k k"],
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Pixels of each class: rightly predicted, labelled, and predicted."""
    return np.diag(confusion), confusion.sum(1), confusion.sum(0)


def iou(confusion: Int[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
    """Intersection over union per class; NaN for a class in neither label nor prediction."""
    return class_iou(*class_counts(confusion))


def mean_iou(confusion: Int[np.ndarray, "k k"]) -> float:
    """Mean IoU over the classes that occur in label or prediction; NaN if there are none."""
    return float(mean_over_classes(iou(confusion)))


def never_predicted(confusion: Int[np.ndarray, "k k"]) -> list[int]:
    """The classes that are labelled somewhere and predicted at no labelled pixel."""
    return np.flatnonzero((confusion.sum(1) > 0) & (confusion.sum(0) == 0)).tolist()


def pixel_accuracy(confusion: Int[np.ndarray, "k k"]) -> float:
    """Share of labelled pixels predicted correctly; NaN if none is labelled."""
    hit, labelled, _ = class_counts(confusion)
    return float(accuracy(hit, labelled))


@dataclass(frozen=True)
class Metric:
    """Scores computed from integer counts that are summed over the batches of a split."""

    # (label u8[b h w], prediction i32[b h w], *, num_classes) -> i32 arrays of a batch, on devices
    count: Callable[..., Any]
    # (their sums over the split in int64, names of the classes) -> scores as JSON has them
    result: Callable[[Any, Sequence[str]], dict[str, Any]]


def segmentation_scores(
    confusion: Int[np.ndarray, "k k"], class_names: Sequence[str]
) -> dict[str, Any]:
    """Mean IoU, pixel accuracy, IoU per class, and the confusion matrix."""
    return {
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "iou": dict(zip(class_names, iou(confusion).tolist(), strict=True)),
        "never_predicted": [class_names[i] for i in never_predicted(confusion)],
        "confusion": confusion.tolist(),
    }


# All metrics of an evaluation; metrics.json has their scores merged.
METRICS = {"segmentation": Metric(confusion_matrix, segmentation_scores)}
