"""Metrics of a split, exact for any batching; the only definition of mIoU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8


def confusion_matrix(
    label: UInt8[Array, "b h w"], prediction: Int[Array, "b h w"], *, num_classes: int
) -> Int[Array, "k k"]:
    """Number of pixels with label i and prediction j, at [i, j]; ignored pixels are left out."""
    labelled = label < num_classes
    row, column = label.astype(jnp.int32), prediction.astype(jnp.int32)
    pair = jnp.where(labelled, row * num_classes + column, num_classes**2)
    counts = jnp.bincount(pair.reshape(-1), length=num_classes**2 + 1).astype(jnp.int32)
    return counts[:-1].reshape(num_classes, num_classes)


def iou(confusion: Int[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
    """Intersection over union per class; NaN for a class in neither label nor prediction."""
    hit = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0)


def mean_iou(confusion: Int[np.ndarray, "k k"]) -> float:
    """Mean IoU over the classes that occur in label or prediction; NaN if there are none."""
    values = iou(confusion)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def never_predicted(confusion: Int[np.ndarray, "k k"]) -> list[int]:
    """The classes that are labelled somewhere and predicted at no labelled pixel."""
    return np.flatnonzero((confusion.sum(1) > 0) & (confusion.sum(0) == 0)).tolist()


def pixel_accuracy(confusion: Int[np.ndarray, "k k"]) -> float:
    """Share of labelled pixels predicted correctly; NaN if none is labelled."""
    total = confusion.sum()
    return float(np.diag(confusion).sum() / total) if total else float("nan")


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
