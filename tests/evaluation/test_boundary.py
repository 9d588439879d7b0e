"""Boundary IoU and F-score against a version that visits each pair of pixels."""

import jax.numpy as jnp
import numpy as np
import pytest

from contrastseg_jax.evaluation.boundary import boundary_counts, boundary_scores
from contrastseg_jax.structs import IGNORE_LABEL

CLASSES = 4


def scene(height=13, width=17):
    """Blobs, and the same moved by a pixel; some pixels are ignored, the last class is absent."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(3, size=(2, 4, 5))
    label = np.kron(coarse, np.ones((4, 4), int))[:, :height, :width].astype(np.uint8)
    prediction = np.roll(label, 1, axis=2).astype(np.int32)
    label[rng.random(label.shape) < 0.1] = IGNORE_LABEL
    return label, prediction


def near(mask, distance):
    """The pixels that have one of the mask within a distance, row and column by row and column."""
    found = np.zeros_like(mask)
    for image, row, column in np.ndindex(*mask.shape):
        top, left = max(row - distance, 0), max(column - distance, 0)
        found[image, row, column] = mask[
            image, top : row + distance + 1, left : column + distance + 1
        ].any()
    return found


@pytest.mark.parametrize(("width", "pixels"), [(0.01, 1), (0.1, 2), (0.2, 4)])
def test_counts_and_scores_are_the_literal_ones(width, pixels):
    label, prediction = scene()
    counts = boundary_counts(
        jnp.asarray(label), jnp.asarray(prediction), num_classes=CLASSES, width=width
    )
    known = label != IGNORE_LABEL
    scores = boundary_scores(np.asarray(counts, np.int64), "abcd", width=width)
    for c, name in enumerate("abc"):
        masks = [known & (label == c), known & (prediction == c)]
        bands = [mask & near(known & ~mask, pixels) for mask in masks]
        contours = [mask & near(known & ~mask, 1) for mask in masks]
        iou = (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()
        assert scores["boundary_iou"][name] == pytest.approx(iou)
        recall = (contours[0] & near(contours[1], pixels)).sum() / contours[0].sum()
        precision = (contours[1] & near(contours[0], pixels)).sum() / contours[1].sum()
        f_score = 2 * precision * recall / (precision + recall)
        assert scores["boundary_f_score"][name] == pytest.approx(f_score)
    assert np.isnan([scores["boundary_iou"]["d"], scores["boundary_f_score"]["d"]]).all()
    assert scores["mean_boundary_iou"] == pytest.approx(
        np.mean([scores["boundary_iou"][name] for name in "abc"])
    )


def test_a_perfect_prediction_scores_one_and_a_missed_class_zero():
    label, _ = scene()
    for prediction, expected in ((label, 1.0), (np.full_like(label, 3), 0.0)):
        counts = boundary_counts(
            jnp.asarray(label), jnp.asarray(prediction, jnp.int32), num_classes=CLASSES, width=0.05
        )
        scores = boundary_scores(np.asarray(counts, np.int64), "abcd", width=0.05)
        assert scores["boundary_iou"]["a"] == scores["boundary_f_score"]["a"] == expected


def test_what_is_ignored_makes_no_contour():
    """Nor does the border of the image: a scene of one class has none at all."""
    label = np.zeros((1, 9, 9), np.uint8)
    label[:, 3:5] = IGNORE_LABEL
    counts = boundary_counts(
        jnp.asarray(label), jnp.zeros((1, 9, 9), jnp.int32), num_classes=2, width=0.1
    )
    assert not np.any(counts)
