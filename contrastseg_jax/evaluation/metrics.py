"""Metrics of a split, exact for any batching."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real, UInt8

from contrastseg_jax.config.tree import Config
from contrastseg_jax.evaluation.boundary import boundary_counts, boundary_scores
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
    """The scores of a confusion matrix, as metrics.json has them.

    Precision, recall and Dice of a class as scikit-learn's, but NaN where nothing is divided by
    nothing; means are over the classes for which there is a number. Mean accuracy is the mean
    recall, frequency-weighted IoU the mean IoU by labelled pixels.
    """
    hit, labelled, predicted = class_counts(confusion)
    of_class = {
        "iou": iou(confusion),
        "precision": _share(hit, predicted),
        "recall": _share(hit, labelled),
        "dice": _share(2 * hit, labelled + predicted),
    }
    weighted = np.nansum(of_class["iou"] * labelled)
    return {
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "mean_accuracy": float(mean_over_classes(of_class["recall"])),
        "frequency_weighted_iou": float(
            _share(np.array([weighted]), labelled.sum(keepdims=True))[0]
        ),
        "mean_dice": float(mean_over_classes(of_class["dice"])),
        **{
            name: dict(zip(class_names, values.tolist(), strict=True))
            for name, values in of_class.items()
        },
        "never_predicted": [class_names[i] for i in never_predicted(confusion)],
        "confusion": confusion.tolist(),
    }


def _share(part: Real[np.ndarray, " n"], whole: Real[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Quotients; NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


# The metrics of every evaluation; metrics.json has the scores of all merged.
METRICS = {"segmentation": Metric(confusion_matrix, segmentation_scores)}


def configured(config: Config) -> dict[str, Metric]:
    """The metrics of the settings `eval` of a config, by name."""
    width = config.eval.boundary_width
    if not width:
        return METRICS
    boundary = Metric(
        functools.partial(boundary_counts, width=width),
        functools.partial(boundary_scores, width=width),
    )
    return METRICS | {"boundary": boundary}
