"""Evaluation metrics, all from one integer confusion matrix; the only definition of mIoU."""

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
    """Intersection over union per class; NaN for a class that neither truth nor prediction has."""
    hit = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0)


def mean_iou(confusion: Int[np.ndarray, "k k"]) -> float:
    """Mean IoU over the classes that truth or prediction has; NaN if there is none."""
    values = iou(confusion)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def never_predicted(confusion: Int[np.ndarray, "k k"]) -> list[int]:
    """The classes that are labelled somewhere and predicted at no labelled pixel."""
    return np.flatnonzero((confusion.sum(1) > 0) & (confusion.sum(0) == 0)).tolist()


def pixel_accuracy(confusion: Int[np.ndarray, "k k"]) -> float:
    """Share of labelled pixels that are predicted rightly; NaN without any."""
    total = confusion.sum()
    return float(np.diag(confusion).sum() / total) if total else float("nan")
