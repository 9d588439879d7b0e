"""How well contours are met: boundary IoU and boundary F-score."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, UInt8

from contrastseg_jax.ops.iou import class_iou, mean_over_classes


def boundary_counts(
    label: UInt8[Array, "b h w"],
    prediction: Int[Array, "b h w"],
    *,
    num_classes: int,
    width: float,
) -> Int[Array, "k 7"]:
    """What `boundary_scores` needs of a batch: seven numbers of pixels for each class.

    The contour of a class: its pixels beside one of another class; its band: those within `width`,
    a share of the image's diagonal, of another class. Distances are the larger of those in rows and
    columns, as repeated erosion by 3x3 has them. Ignored pixels, and what lies outside the image,
    are of no class: they make no contour. (Cheng et al. count the image's border as one, which
    every prediction of a whole scene meets.)
    """
    size = max(1, round(width * math.hypot(*label.shape[1:])))
    label = label.astype(jnp.int32)
    known = label < num_classes
    within = functools.partial(_any_within, distance=size)

    def count(cls: Int[Array, ""]) -> Int[Array, " 7"]:
        truth, guess = known & (label == cls), known & (prediction == cls)
        bands = [mask & within(known & ~mask) for mask in (truth, guess)]
        contours = [mask & _any_within(known & ~mask, distance=1) for mask in (truth, guess)]
        met = [a & within(b) for a, b in zip(contours, reversed(contours), strict=True)]
        masks = (bands[0] & bands[1], *bands, met[0], contours[0], met[1], contours[1])
        return jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in masks])

    # Class after class: all of them at the size of the image are not kept at once.
    return lax.map(count, jnp.arange(num_classes, dtype=jnp.int32))


def boundary_scores(
    counts: Int[np.ndarray, "k 7"], class_names: Sequence[str], *, width: float
) -> dict[str, Any]:
    """Boundary IoU and F-score per class, and their means over the classes that have contours.

    Boundary IoU: of the bands of label and prediction (Cheng et al., CVPR 2021). F-score: harmonic
    mean of the shares of predicted contours near labelled ones, and the reverse (Csurka et al.,
    BMVC 2013), of the split's pixels together. NaN for a class without a contour in either.
    """
    both, label, prediction, label_met, label_all, guess_met, guess_all = counts.T
    iou = class_iou(both, label, prediction)
    with np.errstate(invalid="ignore"):
        precision, recall = guess_met / guess_all, label_met / label_all
        score = 2 * precision * recall / (precision + recall)
    occurs, found = label_all + guess_all > 0, (label_met > 0) & (guess_met > 0)
    score = np.where(found, score, np.where(occurs, 0.0, np.nan))
    return {
        "boundary_width": width,
        "mean_boundary_iou": float(mean_over_classes(iou)),
        "mean_boundary_f_score": float(mean_over_classes(score)),
        "boundary_iou": dict(zip(class_names, iou.tolist(), strict=True)),
        "boundary_f_score": dict(zip(class_names, score.tolist(), strict=True)),
    }


def _any_within(mask: Bool[Array, "b h w"], *, distance: int) -> Bool[Array, "b h w"]:
    """Whether any pixel of the mask is so near in rows and columns, or nearer.

    By windows along each axis that are doubled until they are long enough.
    """
    for axis in (1, 2):
        sides = [(distance, distance) if i == axis else (0, 0) for i in range(3)]
        seen, length = jnp.pad(mask, sides), 1  # of as many pixels from each on
        while length < 2 * distance + 1:
            step = min(length, 2 * distance + 1 - length)
            # Else the compiler would fuse all steps, and compute the first anew for each pixel.
            seen = lax.optimization_barrier(seen)
            size = seen.shape[axis] - step
            first, second = (lax.slice_in_dim(seen, i, i + size, axis=axis) for i in (0, step))
            seen, length = first | second, length + step
        mask = seen
    return mask
