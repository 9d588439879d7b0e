"""Intersection over union and its mean, of counts of pixels: the only definition of mIoU."""

import numpy as np
from jaxtyping import Float64, Real


def class_iou(
    intersection: Real[np.ndarray, "*#batch k"],
    labelled: Real[np.ndarray, "*#batch k"],
    predicted: Real[np.ndarray, "*#batch k"],
) -> Float64[np.ndarray, "*batch k"]:
    """Intersection over union per class; NaN for a class in neither label nor prediction."""
    hit = np.asarray(intersection, np.float64)
    union = labelled + predicted - hit
    return np.divide(hit, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_over_classes(iou: Float64[np.ndarray, "*batch k"]) -> Float64[np.ndarray, "*batch"]:
    """Mean over the classes that occur in label or prediction; NaN if there are none."""
    occurs = ~np.isnan(iou)
    number = occurs.sum(-1)
    total = np.where(occurs, iou, 0.0).sum(-1)
    return np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)


def pixel_accuracy(
    intersection: Real[np.ndarray, "*#batch k"], labelled: Real[np.ndarray, "*#batch k"]
) -> Float64[np.ndarray, "*batch"]:
    """Share of labelled pixels predicted correctly; NaN if none is labelled."""
    hit, total = np.broadcast_arrays(intersection.sum(-1), labelled.sum(-1))
    return np.divide(hit, total, out=np.full(total.shape, np.nan), where=total > 0)
