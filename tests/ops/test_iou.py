"""IoU and its mean, over any leading axes."""

import numpy as np

from contrastseg_jax.ops.iou import class_iou, mean_over_classes, pixel_accuracy


def test_leading_axes_are_independent_and_broadcast():
    rng = np.random.default_rng(0)
    labelled = rng.integers(10, 20, size=(3, 1, 4))
    hit = rng.integers(10, size=(3, 2, 4))
    predicted = hit + rng.integers(5, size=hit.shape)
    iou, accuracy = class_iou(hit, labelled, predicted), pixel_accuracy(hit, labelled)
    mean = mean_over_classes(iou)
    assert iou.shape == (3, 2, 4) and mean.shape == accuracy.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        for c in range(4):
            union = labelled[i, 0, c] + predicted[i, j, c] - hit[i, j, c]
            assert iou[i, j, c] == hit[i, j, c] / union
        np.testing.assert_allclose(mean[i, j], iou[i, j].mean())
        np.testing.assert_allclose(accuracy[i, j], hit[i, j].sum() / labelled[i, 0].sum())


def test_without_pixels_there_is_no_score():
    hit, labelled = np.array([[1, 0], [0, 0]]), np.array([[2, 0], [0, 0]])
    iou = class_iou(hit, labelled, hit)
    np.testing.assert_array_equal(iou, [[0.5, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(mean_over_classes(iou), [0.5, np.nan])
    np.testing.assert_array_equal(pixel_accuracy(hit, labelled), [0.5, np.nan])
