"""The confusion matrix against scikit-learn, and IoU by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import jaccard_score, precision_recall_fscore_support, recall_score

from contrastseg_jax.evaluation.metrics import (
    confusion_matrix,
    image_counts,
    iou,
    mean_iou,
    never_predicted,
    pixel_accuracy,
    segmentation_scores,
)
from contrastseg_jax.structs import IGNORE_LABEL


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, 3, IGNORE_LABEL], size=(2, 9, 7)).astype(np.uint8)
    return label, rng.integers(4, size=label.shape).astype(np.int32)


def test_confusion_matrix_and_iou_match_scikit_learn(scene):
    label, prediction = scene
    got = np.asarray(confusion_matrix(jnp.asarray(label), jnp.asarray(prediction), num_classes=4))
    seen = label != IGNORE_LABEL
    truth, guess = label[seen], prediction[seen]
    np.testing.assert_array_equal(got, sklearn_confusion_matrix(truth, guess, labels=range(4)))
    np.testing.assert_allclose(iou(got), jaccard_score(truth, guess, average=None))
    assert mean_iou(got) == pytest.approx(jaccard_score(truth, guess, average="macro"))
    assert pixel_accuracy(got) == pytest.approx((truth == guess).mean())


def test_images_are_counted_one_by_one(scene):
    """Each as if it were alone, ignored pixels left out; together they are the matrix."""
    label, prediction = scene
    arrays = jnp.asarray(label), jnp.asarray(prediction)
    got = np.asarray(image_counts(*arrays, num_classes=5))
    assert got.shape == (2, 3, 5) and got.dtype == np.int32
    for counts, truth, guess in zip(got, label, prediction, strict=True):
        seen = truth != IGNORE_LABEL
        for c in range(5):
            is_label, is_guess = seen & (truth == c), seen & (guess == c)
            expected = [(is_label & is_guess).sum(), is_label.sum(), is_guess.sum()]
            assert counts[:, c].tolist() == expected
    confusion = np.asarray(confusion_matrix(*arrays, num_classes=5))
    sums = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    np.testing.assert_array_equal(got.sum(0), sums)


def test_classes_that_do_not_occur_are_left_out_of_the_mean():
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(iou(confusion), [3 / 4, 4 / 5, np.nan])
    assert mean_iou(confusion) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_classes_that_are_labelled_and_never_predicted():
    confusion = np.array([[3, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert never_predicted(confusion) == [1]  # 2 is predicted alone, 3 does not occur


def test_nothing_labelled_has_no_score():
    label = jnp.full((1, 2, 2), IGNORE_LABEL, jnp.uint8)
    counts = confusion_matrix(label, jnp.zeros((1, 2, 2), jnp.int32), num_classes=2)
    confusion = np.asarray(counts)
    assert confusion.sum() == 0
    assert np.isnan(mean_iou(confusion)) and np.isnan(pixel_accuracy(confusion))


def test_scores_of_a_class_are_scikit_learns(scene):
    label, prediction = scene
    prediction = np.where(prediction == 3, 2, prediction)  # a class that is never predicted
    seen = label != IGNORE_LABEL
    truth, guess = label[seen], prediction[seen]
    found = segmentation_scores(sklearn_confusion_matrix(truth, guess, labels=range(5)), "abcde")
    expected = precision_recall_fscore_support(truth, guess, labels=range(4), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "dice"), expected, strict=False):
        np.testing.assert_allclose([found[name][c] for c in "abcd"], values, err_msg=name)
        assert np.isnan(found[name]["e"])
    assert found["mean_accuracy"] == pytest.approx(recall_score(truth, guess, average="macro"))
    assert found["mean_dice"] == pytest.approx(expected[2].mean())
    weighted = jaccard_score(truth, guess, average="weighted")
    assert found["frequency_weighted_iou"] == pytest.approx(weighted)


def test_scores_of_nothing_are_no_numbers():
    found = segmentation_scores(np.zeros((2, 2), int), "ab")
    assert np.isnan([found["mean_iou"], found["frequency_weighted_iou"], found["mean_dice"]]).all()
