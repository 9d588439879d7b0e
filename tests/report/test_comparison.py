"""Figures of a comparison against literal NumPy, scipy.stats and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, jaccard_score

from contrastseg_jax.report import comparison
from contrastseg_jax.report.comparison import (
    Arm,
    ArmCounts,
    compare,
    learning_curve,
    mean_and_std,
    rarest_classes,
    resamples,
    t_interval,
)

NUM_CLASSES, NUM_IMAGES = 4, 7
SEEDS = {"base": (0, 1, 2), "better": (1, 2, 5), "one": (2,)}


def arm_of(name, seeds=None, curves=()):
    seeds = SEEDS[name] if seeds is None else seeds
    steps = (600,) * len(seeds)
    return Arm(name, {"x": name}, tuple(f"{name}_{s}" for s in seeds), seeds, steps, curves)


def counts_of(labels, predictions):
    """Counts of images and classes, one pixel after the other."""
    counts = np.zeros((3, len(labels), NUM_CLASSES), np.int32)
    for i, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
        for truth, guess in zip(label, prediction, strict=True):
            counts[0, i, truth] += truth == guess
            counts[1, i, truth] += 1
            counts[2, i, guess] += 1
    return counts


@pytest.fixture(scope="module")
def scene():
    """Labels of images of several sizes, the last class rare; predictions of each arm and seed."""
    rng = np.random.default_rng(0)
    labels = [
        rng.choice(NUM_CLASSES, p=[0.5, 0.3, 0.17, 0.03], size=rng.integers(20, 60))
        for _ in range(NUM_IMAGES)
    ]
    predictions = {
        (name, seed): [
            np.where(rng.random(x.size) < right, x, rng.integers(NUM_CLASSES, size=x.size))
            for x in labels
        ]
        for (name, seeds), right in zip(SEEDS.items(), (0.5, 0.6, 0.4), strict=True)
        for seed in seeds
    }
    return labels, predictions


@pytest.fixture(scope="module")
def counted(scene):
    labels, predictions = scene
    counts = {key: counts_of(labels, guess) for key, guess in predictions.items()}
    arms = [arm_of(name) for name in SEEDS]
    of_arms = [
        ArmCounts(*(np.stack([counts[a.name, s][i] for s in a.seeds]) for i in (0, 2)))
        for a in arms
    ]
    return arms, of_arms, counts["base", 0][1]


@pytest.fixture(scope="module")
def compared(counted):
    names = [f"class_{i}" for i in range(NUM_CLASSES)]
    return compare(*counted, names, num_resamples=200, seed=3)


def test_scores_are_those_of_scikit_learn(scene, compared):
    labels, predictions = scene
    truth = np.concatenate(labels)
    assert compared.labelled_pixels.tolist() == np.bincount(truth).tolist()
    assert compared.rarest == (3, 2) and compared.num_images == NUM_IMAGES
    for found in compared.arms:
        expected = []
        for seed in found.arm.seeds:
            guess = np.concatenate(predictions[found.arm.name, seed])
            iou = jaccard_score(truth, guess, average=None)
            expected.append([iou.mean(), accuracy_score(truth, guess), iou[[3, 2]].mean(), *iou])
        np.testing.assert_allclose(found.scores, expected, rtol=1e-12)
        np.testing.assert_allclose(found.mean, np.mean(expected, axis=0), rtol=1e-12)
        if len(expected) > 1:
            np.testing.assert_allclose(found.std, stats.tstd(expected, axis=0), rtol=1e-12)
        else:
            assert np.isnan(found.std).all()


def test_differences_are_paired_over_the_seeds_that_both_have(compared):
    base, better, one = compared.arms
    of_better, of_one = compared.differences
    assert of_better.seeds == (1, 2) and of_one.seeds == (2,)
    pairs = better.scores[[0, 1]], base.scores[[1, 2]]
    np.testing.assert_array_equal(of_better.differences, pairs[0] - pairs[1])
    interval = stats.ttest_rel(*pairs).confidence_interval(0.95)
    np.testing.assert_allclose(of_better.seed_interval, interval, rtol=1e-9)
    np.testing.assert_array_equal(of_one.mean, one.scores[0] - base.scores[2])
    assert np.isnan(of_one.seed_interval).all()
    assert not np.isnan(of_one.image_interval).any()


@pytest.mark.parametrize("number", [2, 3, 10])
def test_the_interval_over_seeds_is_that_of_scipy(number):
    values = np.random.default_rng(number).normal(size=(number, 6))
    mean, std = mean_and_std(values)
    expected = stats.t.interval(0.95, number - 1, mean, stats.sem(values, axis=0))
    np.testing.assert_allclose(t_interval(values), expected, rtol=1e-12)
    np.testing.assert_allclose(std, stats.tstd(values, axis=0))


def literal_bootstrap(scene, pairs, num_resamples, seed):
    """mIoU of each resample from its pixels, for each arm and seed; then means and difference."""
    labels, predictions = scene
    rng, found = np.random.default_rng(seed), []
    for _ in range(num_resamples):
        drawn = rng.integers(NUM_IMAGES, size=NUM_IMAGES)
        truth = np.concatenate([labels[i] for i in drawn])

        def mean_of(name, seeds):
            values = []
            for seed in seeds:
                guess = np.concatenate([predictions[name, seed][i] for i in drawn])  # noqa: B023
                ious = []
                for c in range(NUM_CLASSES):
                    union = np.sum((truth == c) | (guess == c))  # noqa: B023
                    if union:
                        ious.append(np.sum((truth == c) & (guess == c)) / union)  # noqa: B023
                values.append(np.mean(ious))
            return np.mean(values)

        found.append(mean_of(*pairs[0]) - mean_of(*pairs[1]))
    return np.array(found)


def test_the_interval_over_images_is_that_of_a_literal_bootstrap(scene, compared):
    for found in compared.differences:
        name, seeds = found.arm.name, found.seeds
        samples = literal_bootstrap(scene, ((name, seeds), ("base", seeds)), 200, 3)
        expected = np.percentile(samples, [2.5, 97.5])
        np.testing.assert_allclose(found.image_interval[:, 0], expected, rtol=1e-9)


def test_the_interval_over_images_is_about_that_of_scipy(counted, compared):
    """Of pixel accuracy, a ratio of sums; with resamples of its own."""
    (base, better, _), labelled = counted[1], counted[2].sum(1)
    right = [x.intersection[i].sum(2).mean(0) for x, i in ((better, [0, 1]), (base, [1, 2]))]

    def difference(a, b, total, axis):
        return (a.sum(axis) - b.sum(axis)) / total.sum(axis)

    result = stats.bootstrap(
        (*right, labelled), difference, paired=True, method="percentile", n_resamples=5000, rng=0
    )
    found = compared.differences[0].image_interval[:, 1]
    np.testing.assert_allclose(found, result.confidence_interval, atol=0.03)


def test_resamples_do_not_depend_on_how_many_are_made_at_once(counted, monkeypatch):
    whole = np.concatenate([*resamples(NUM_IMAGES, 50, 1, 50)])
    assert (whole.sum(1) == NUM_IMAGES).all() and len(np.unique(whole, axis=0)) > 40
    for chunk in (1, 7):
        np.testing.assert_array_equal(np.concatenate([*resamples(NUM_IMAGES, 50, 1, chunk)]), whole)
    names = list("abcd")
    found = [compare(*counted, names, num_resamples=50)]
    monkeypatch.setattr(comparison, "MAX_ELEMENTS", 300)
    found.append(compare(*counted, names, num_resamples=50))
    for a, b in zip(*(x.differences for x in found), strict=True):
        np.testing.assert_array_equal(a.image_interval, b.image_interval)


def test_an_arm_that_predicts_the_same_does_not_differ(counted):
    arms, counts, labelled = counted
    twin = arm_of("twin", seeds=arms[0].seeds)
    found = compare([arms[0], twin], [counts[0], counts[0]], labelled, list("abcd"))
    (difference,) = found.differences
    for values in (difference.mean, difference.seed_interval, difference.image_interval):
        assert (values == 0).all()
    assert found.num_resamples == 10_000


def test_a_class_in_few_images_or_in_none():
    """Class 1 lies in one image of three, class 2 in none, and is predicted by the second arm."""
    labels = [np.array([0, 0, 0, 1]), np.zeros(4, int), np.zeros(4, int)]
    guesses = [np.array([0, 0, 1, 1]), np.zeros(4, int), np.zeros(4, int)]
    others = [np.array([0, 0, 0, 1]), np.zeros(4, int), np.array([0, 0, 0, 2])]
    first, second = counts_of(labels, guesses), counts_of(labels, others)
    arms = [arm_of("a", (0,)), arm_of("b", (0,))]
    counts = [ArmCounts(x[:1], x[2:]) for x in (first, second)]
    found = compare(arms, counts, first[1], list("abcd"), num_resamples=100)
    assert found.rarest == (1,)
    (difference,) = found.differences
    overall, classes = np.split(difference.mean, [comparison.NUM_OVERALL])
    np.testing.assert_allclose(classes, [10 / 11 - 10 / 11, 0.5, np.nan, np.nan])
    assert overall[0] == pytest.approx((10 / 11 + 1 + 0) / 3 - (10 / 11 + 1 / 2) / 2)
    low, high = difference.image_interval[:, comparison.NUM_OVERALL + 1]
    assert low == high == 0.5  # in all resamples that have the class
    assert np.isnan(difference.image_interval[:, -1]).all()


@pytest.mark.parametrize(
    ("pixels", "rarest"),
    [
        ([5, 0, 3, 9], (2,)),
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10, 11], (8, 7, 6, 5, 4)),
        ([4, 4, 4, 4], (0, 1)),
        ([0, 7], (1,)),
    ],
)
def test_the_rarest_classes_are_labelled_somewhere(pixels, rarest):
    assert rarest_classes(np.array(pixels)) == rarest


def test_learning_curves_have_mean_and_range_where_all_seeds_have_points():
    curves = ([(100, 0.1), (200, 0.3), (300, 0.4)], [(200, 0.5), (300, 0.2), (350, 0.3)], [])
    found = learning_curve(curves)
    assert found.steps.tolist() == [200, 300]
    np.testing.assert_allclose(found.mean, [0.4, 0.3])
    np.testing.assert_allclose(found.lowest, [0.3, 0.2])
    np.testing.assert_allclose(found.highest, [0.5, 0.4])
    for empty in ((), ([],), ([(1, 0.5)], [(2, 0.5)])):
        assert learning_curve(empty).steps.size == learning_curve(empty).mean.size == 0
