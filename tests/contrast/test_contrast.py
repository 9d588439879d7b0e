"""Sampling and loss against the original's figures, literal NumPy, optax, and their own rules."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import golden_cases, pixel_contrast_loss_literal, sample_counts_literal

from contrastseg_jax.contrast.anchors import batch_candidates, sample_anchors
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.ops.resize import label_at_stride
from contrastseg_jax.structs import IGNORE_LABEL, Anchors, Candidates

SCALE = {"temperature": 0.1, "base_temperature": 0.07}


def unit_rows(rng, *shape):
    rows = rng.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def anchors_of(embedding, label, valid=None):
    """One image's anchors from rows."""
    valid = np.ones(len(label), bool) if valid is None else valid
    return Anchors(
        jnp.asarray(embedding)[None], jnp.asarray(label, jnp.int32)[None], jnp.asarray(valid)[None]
    )


def candidates_of(embedding, label, valid=None, anchor=None):
    valid = np.ones(len(label), bool) if valid is None else valid
    return Candidates(
        jnp.asarray(embedding),
        jnp.asarray(label, jnp.int32),
        jnp.asarray(valid),
        None if anchor is None else jnp.asarray(anchor, jnp.int32),
    )


# --- Loss ----------------------------------------------------------------------------------------


SETTINGS = ("temperature", "base_temperature", "positives", "negatives", "chunk_size")
contrast = jax.jit(pixel_contrast_loss, static_argnames=SETTINGS)


def loss_of_rows(rows, label, bank=None, valid=None, **settings):
    """The loss as a function of its anchors' embeddings, in the batch where there is no bank."""
    valid = jnp.ones_like(label, bool) if valid is None else valid
    anchors = Anchors(rows[None], label[None], valid[None])
    candidates = (batch_candidates(anchors),) if bank is None else bank
    return contrast(anchors, candidates, jax.random.key(0), **settings)[0]


def assert_matches_the_original(case, bank, grad_name):
    """Loss within 1e-5, and the gradient of the anchors within 1e-5 of its norm."""
    meta = json.loads(str(case["meta"]))
    image, pixel = np.moveaxis(case["anchor_index"], -1, 0)
    maps = case["embed"].astype(np.float32)
    rows = maps.reshape(*maps.shape[:2], -1)[image, :, pixel]
    label = np.repeat(case["anchor_labels"], rows.shape[1]).astype(np.int32)
    loss, grad = jax.value_and_grad(loss_of_rows)(
        jnp.asarray(rows.reshape(len(label), -1)),
        jnp.asarray(label),
        bank,
        temperature=meta["temperature"],
        base_temperature=meta["base_temperature"],
    )
    np.testing.assert_allclose(loss, case["loss_corrected"], rtol=1e-5, atol=1e-12)
    if grad_name in case:
        expected = case[grad_name].reshape(grad.shape)
        assert np.linalg.norm(grad - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-12
    else:  # a large case stores the length of the gradient of the whole map alone
        full = np.zeros((*maps.shape[:1], maps.shape[2] * maps.shape[3], maps.shape[1]))
        np.add.at(full, (image, pixel), np.reshape(grad, rows.shape))
        np.testing.assert_allclose(np.linalg.norm(full), case["grad_embed_l2"], rtol=1e-5)


@pytest.mark.parametrize("path", golden_cases("contrast"), ids=lambda p: p.stem)
def test_loss_in_the_batch_matches_the_original(path):
    case = np.load(path)
    if "anchor_index" not in case:  # nothing to sample: the original crashes
        loss = loss_of_rows(jnp.zeros((0, 8)), jnp.zeros(0, jnp.int32), None, **SCALE)
        assert float(loss) == float(case["loss_corrected"]) == 0
        return
    corrected = "grad_anchors_corrected"
    grad_name = corrected if corrected in case else "grad_anchors_f64"
    assert_matches_the_original(case, None, grad_name)


@pytest.mark.parametrize("path", golden_cases("memory"), ids=lambda p: p.stem)
def test_loss_against_the_bank_matches_the_original(path):
    """Class 0 counts (D6) and no slot is taken for the anchor itself (D7)."""
    case = np.load(path)
    bank = []
    for queue in (case["segment_queue"], case["pixel_queue"]):
        label = np.broadcast_to(np.arange(len(queue))[:, None], queue.shape[:2])
        bank.append(candidates_of(queue.astype(np.float32), label, np.ones(label.shape, bool)))
    bank = tuple(bank)
    assert_matches_the_original(case, bank, "grad_anchors_f64_fix_both")


def test_more_anchors_than_slots():
    """D7: the original crashes."""
    rng = np.random.default_rng(0)
    own = unit_rows(rng, 40, 8), rng.integers(2, size=40), np.ones(40, bool)
    slots = unit_rows(rng, 6, 8), np.arange(6) % 2, np.ones(6, bool)
    loss, _ = contrast(anchors_of(*own), (candidates_of(*slots),), **SCALE)
    expected = pixel_contrast_loss_literal(*own, *slots, False, **SCALE)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_loss_equals_optax_ntxent_when_positives_are_equally_many():
    rng = np.random.default_rng(0)
    embedding, label = unit_rows(rng, 24, 16), np.tile(np.arange(4), 6)
    anchors = anchors_of(embedding, label)
    loss, _ = contrast(anchors, (batch_candidates(anchors),), **SCALE)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = optax.losses.ntxent(jnp.asarray(embedding), jnp.asarray(label), temperature=0.1)
    np.testing.assert_allclose(loss, expected * 0.1 / 0.07, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), num_classes=st.integers(1, 5), in_batch=st.booleans())
def test_loss_equals_a_literal_transcription(seed, num_classes, in_batch):
    """Whatever the classes, with candidates in one set or in two, and any chunk size."""
    rng = np.random.default_rng(seed)
    own = (unit_rows(rng, 12, 8), rng.integers(num_classes, size=12), rng.random(12) < 0.8)
    more = (unit_rows(rng, 20, 8), rng.integers(num_classes, size=20), rng.random(20) < 0.8)
    both = [np.concatenate(pair) for pair in zip(own, more, strict=True)]
    anchors = anchors_of(*own)
    first = batch_candidates(anchors) if in_batch else candidates_of(*own)
    expected = pixel_contrast_loss_literal(*own, *both, in_batch, **SCALE)
    for chunk_size in (5, 64):
        sets = (first, candidates_of(*more))
        loss, _ = contrast(anchors, sets, chunk_size=chunk_size, **SCALE)
        np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_invalid_rows_and_the_order_of_candidates_never_matter(seed):
    rng = np.random.default_rng(seed)
    anchors = unit_rows(rng, 8, 6), rng.integers(3, size=8), rng.random(8) < 0.7
    embedding, label = unit_rows(rng, 16, 6), rng.integers(3, size=16)
    valid = rng.random(16) < 0.7

    def loss_and_grad(embedding, label, valid, garbage):
        spoilt = np.where(anchors[2][:, None], anchors[0], garbage)
        embedding = np.where(valid[:, None], embedding, garbage)
        bank = (candidates_of(embedding.astype(np.float32), label, valid),)
        rows = [jnp.asarray(spoilt, jnp.float32), *map(jnp.asarray, anchors[1:])]
        with jax.debug_nans(False):
            return jax.value_and_grad(loss_of_rows)(*rows[:2], bank, rows[2], **SCALE)

    loss, grad = loss_and_grad(embedding, label, valid, 1.0)
    order = rng.permutation(16)
    for garbage in (np.nan, np.inf, 1e30):
        other = loss_and_grad(embedding[order], label[order], valid[order], garbage)
        np.testing.assert_allclose(other[0], loss, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(other[1], grad, rtol=1e-3, atol=1e-6)


STRATEGIES = ("all", "random", "hardest", "semi_hard")


@pytest.fixture(scope="module")
def measured():
    """A function: loss and gradients of some anchors with the batch and a queue, by strategy."""
    rng = np.random.default_rng(0)
    rows, queue = unit_rows(rng, 12, 8), unit_rows(rng, 20, 8)
    label, of_queue = np.arange(12) % 3, np.arange(20) % 4
    valid, in_queue = np.arange(12) != 5, np.arange(20) != 17
    sets = {"batch": (True, False), "memory": (False, True), "both": (True, True)}

    @functools.partial(jax.jit, static_argnames=("strategy", "approximate", "which"))
    def measure(rows, queue, *, strategy, which, approximate=False):
        def loss_of(rows, queue):
            anchors, candidates = anchors_of(rows, label, valid), ()
            if sets[which][0]:
                candidates += (batch_candidates(anchors),)
            if sets[which][1]:
                candidates += (candidates_of(queue, of_queue, in_queue),)
            return pixel_contrast_loss(
                *(anchors, candidates, jax.random.key(0)),
                **{"positives": strategy, "negatives": strategy, "approximate": approximate},
                **{"num_positives": 2, "num_negatives": 2, "chunk_size": 7},
                **SCALE,
            )

        (loss, metrics), grads = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(rows, queue)
        return loss, grads, metrics

    def spoilt(places, value, **settings):
        """Rows that count at 0 to 11, of the queue at 100 to 119."""
        parts = rows.copy(), queue.copy()
        for place in places:
            parts[place // 100][place % 100] = value
        with jax.debug_nans(False):
            return jax.device_get(measure(*map(jnp.asarray, parts), **settings))

    literal = pixel_contrast_loss_literal(
        *(rows, label, valid, np.concatenate([rows, queue]), np.concatenate([label, of_queue])),
        *(np.concatenate([valid, in_queue]), True),
        **SCALE,
    )
    return spoilt, literal


@pytest.mark.parametrize(
    ("strategy", "which"),
    [
        ("all", "batch"),
        ("semi_hard", "memory"),
        *((s, "both") for s in (*STRATEGIES, "approximate")),
    ],
)
def test_what_is_not_finite_is_never_silent(measured, strategy, which):
    """One row that counts or all of them: NaN. Rows that do not count: not a bit differs."""
    spoilt, literal = measured
    settings = {"strategy": strategy, "which": which}
    if strategy == "approximate":
        settings |= {"strategy": "hardest", "approximate": True}
    anchors, slots = range(12), range(100, 120)
    loss, grads, metrics = spoilt([], 0, **settings)
    assert loss > 0
    if strategy == "all" and which == "both":
        np.testing.assert_allclose(loss, literal, rtol=2e-5)

    counting = [[p] for p in (0, 4, 11)] + [[p for p in anchors if p != 5], [*anchors, *slots]]
    if which != "batch":
        counting += [[100], [103], [119], [p for p in slots if p != 117]]  # 103: of no anchor
    for places in counting:
        for value in (np.nan, np.inf, -np.inf):
            lost, of_rows, _ = spoilt(places, value, **settings)
            assert np.isnan(lost), (places, value)
            assert np.isnan(of_rows[0]).any()
    for places in ([5], [117], [5, 117]):
        for value in (np.nan, np.inf, -np.inf, 1e38):
            same, same_grads, same_metrics = spoilt(places, value, **settings)
            assert same == loss, (places, value)
            jax.tree.map(np.testing.assert_array_equal, same_grads, grads)
            assert same_metrics == metrics


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("label", "valid"),
    [([0, 1, 2, 3], [1, 1, 1, 1]), ([0, 0, 0, 0], [1, 1, 1, 1]), ([0, 0, 1, 1], [0, 0, 0, 0])],
    ids=["no positive", "no negative", "no anchor"],
)
def test_nothing_to_contrast_is_exactly_zero(label, valid, strategy):
    """D13, D14: the original crashes or divides 0 by 0."""
    rows = jnp.asarray(unit_rows(np.random.default_rng(0), 4, 8))
    label, valid = jnp.asarray(label), jnp.asarray(valid, bool)
    chosen = {"positives": strategy, "negatives": strategy}
    loss, grad = jax.value_and_grad(loss_of_rows)(rows, label, None, valid, **chosen, **SCALE)
    assert float(loss) == 0
    assert not np.any(grad)


@pytest.mark.parametrize(
    ("labels", "num_classes", "anchors_per_image"),
    [([IGNORE_LABEL], 3, 8), ([1], 3, 8), ([0, 1, 2, 3, 4, 5], 6, 4)],
    ids=["all ignored", "one class only", "more classes than rows"],
)
def test_maps_without_anything_to_contrast(labels, num_classes, anchors_per_image):
    """D13, from the maps on: loss and gradient in the embeddings are exactly 0."""
    rng = np.random.default_rng(0)
    embedding = jnp.asarray(unit_rows(rng, 2, 4, 6, 8))
    label = jnp.asarray(np.resize(labels, (2, 4, 6)), jnp.int32)

    @jax.value_and_grad
    def loss_of(embedding):
        anchors = sample_anchors(
            *(embedding, label, jnp.zeros_like(label), jax.random.split(jax.random.key(0))),
            num_classes=num_classes,
            anchors_per_image=anchors_per_image,
            max_views=100,
            strategy="hard",
        )
        return contrast(anchors, (batch_candidates(anchors),), **SCALE)[0]

    loss, grad = loss_of(embedding)
    assert float(loss) == 0
    assert not np.any(grad)


def test_small_temperature_gives_no_nan():
    """D15: the original's log(exp(s) + Σ exp) underflows at temperature 0.01."""
    rng = np.random.default_rng(0)
    rows, label = 10 * unit_rows(rng, 32, 8), rng.integers(3, size=32)
    scale = {"temperature": 0.001, "base_temperature": 0.07}
    loss, grad = jax.value_and_grad(loss_of_rows)(
        jnp.asarray(rows), jnp.asarray(label, jnp.int32), None, **scale
    )
    assert np.isfinite(loss) and np.isfinite(grad).all() and np.any(grad)


def test_diagnostics_are_means_over_the_pairs():
    rng = np.random.default_rng(0)
    rows, label, valid = unit_rows(rng, 20, 8), rng.integers(4, size=20), rng.random(20) < 0.8
    hard = rng.random(20) < 0.5
    anchors = anchors_of(rows, label, valid).replace(hard=jnp.asarray(hard)[None])
    _, metrics = pixel_contrast_loss(anchors, (batch_candidates(anchors),), **SCALE)
    similarity, same = rows @ rows.T, label[:, None] == label
    pairs = valid[:, None] & valid
    positive, negative = pairs & same & ~np.eye(20, dtype=bool), pairs & ~same
    expected = {
        "positives_per_anchor": positive.sum() / positive.any(1).sum(),
        "negatives_per_anchor": negative.sum() / valid.sum(),
        "positive_similarity": similarity[positive].mean(),
        "negative_similarity": similarity[negative].mean(),
        "hard_anchors": hard[valid].mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_what_cannot_be_contrasted_is_an_error():
    anchors = anchors_of(np.ones((2, 3), np.float32), [0, 1])
    with pytest.raises(ValueError, match="at least one set"):
        pixel_contrast_loss(anchors, (), **SCALE)
    with pytest.raises(ValueError, match="semihard.*must be one of all, random"):
        pixel_contrast_loss(anchors, (batch_candidates(anchors),), negatives="semihard", **SCALE)
    with pytest.raises(ValueError, match="semi_hard.*rng"):
        pixel_contrast_loss(anchors, (batch_candidates(anchors),), negatives="semi_hard", **SCALE)


# --- Labels and anchors --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(65, 129), (64, 128), (7, 5), (512, 1024), (1, 1)])
def test_label_at_stride_takes_the_pixel_of_pytorch_nearest(size):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 256, (2, 512, 1024)).astype(np.uint8)
    got = label_at_stride(jnp.asarray(label), size)
    rows = [int(np.floor(i * 512 / size[0])) for i in range(size[0])]
    columns = [int(np.floor(i * 1024 / size[1])) for i in range(size[1])]
    np.testing.assert_array_equal(got, label[:, rows][:, :, columns])


def scene(rng, num_classes, size=(12, 14), batch=2, ignore_rate=0.2, wrong_rate=0.3):
    label = rng.integers(num_classes, size=(batch, *size))
    prediction = np.where(
        rng.random(label.shape) < wrong_rate, rng.integers(num_classes, size=label.shape), label
    )
    label = np.where(rng.random(label.shape) < ignore_rate, IGNORE_LABEL, label)
    # Each pixel's embedding says where it is from: image, row, column.
    where = np.stack(np.meshgrid(*map(np.arange, label.shape), indexing="ij"), -1)
    return where.astype(np.float32), label.astype(np.int32), prediction.astype(np.int32)


def sample(where, label, prediction, seed=0, **settings):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(label)))
    draw = jax.jit(sample_anchors, static_argnames=tuple(settings))
    return jax.tree.map(np.asarray, draw(where, label, prediction, keys, **settings))


@pytest.mark.parametrize(
    ("num_classes", "anchors_per_image", "max_views"),
    [(1, 24, 100), (3, 24, 4), (3, 150, 100), (7, 24, 1), (7, 150, 8), (7, 5, 100)],
)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    ignore_rate=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    wrong_rate=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_anchors_obey_the_rule_of_the_paper(
    num_classes, anchors_per_image, max_views, seed, ignore_rate, wrong_rate
):
    rng = np.random.default_rng(seed)
    where, label, prediction = scene(
        rng, num_classes, ignore_rate=ignore_rate, wrong_rate=wrong_rate
    )
    anchors = sample(
        *(where, label, prediction),
        num_classes=num_classes,
        anchors_per_image=anchors_per_image,
        max_views=max_views,
        strategy="hard",
    )
    assert anchors.embedding.shape == (2, anchors_per_image, 3)
    for image in range(2):
        valid = anchors.valid[image]
        rows = anchors.embedding[image][valid].astype(int)
        assert len(np.unique(rows, axis=0)) == len(rows), "a pixel was drawn twice"
        assert (rows[:, 0] == image).all()
        labels = label[tuple(rows.T)]
        np.testing.assert_array_equal(labels, anchors.label[image][valid])
        assert (anchors.label[image][~valid] == IGNORE_LABEL).all()
        wrong = prediction[tuple(rows.T)] != labels
        expected = sample_counts_literal(
            label[image], prediction[image], num_classes, anchors_per_image, max_views
        )
        for c in range(num_classes):
            got = np.sum(wrong & (labels == c)), np.sum(~wrong & (labels == c))
            assert got == expected[c]


def test_a_single_view_is_a_hard_one():
    """D11: one view of each class, half of which is hard, must not mean none."""
    where, label, prediction = scene(np.random.default_rng(0), 3)
    arguments = {"num_classes": 3, "anchors_per_image": 3, "max_views": 1, "strategy": "hard"}
    anchors = sample(where, label, prediction, **arguments)
    assert anchors.valid.all() and anchors.hard.all()
    rows = anchors.embedding.reshape(-1, 3).astype(int)
    assert (prediction[tuple(rows.T)] != label[tuple(rows.T)]).all()


def test_random_anchors_ignore_the_prediction():
    where, label, prediction = scene(np.random.default_rng(0), 3)
    arguments = {"num_classes": 3, "anchors_per_image": 30, "max_views": 9, "strategy": "random"}
    first = sample(where, label, prediction, **arguments)
    second = sample(where, label, (prediction + 1) % 3, **arguments)
    np.testing.assert_array_equal(first.embedding, second.embedding)
    assert first.valid.sum() == 2 * 27


def test_every_pixel_of_a_class_is_drawn_equally_often():
    where, label, prediction = scene(np.random.default_rng(1), 2, size=(4, 5), batch=1)
    arguments = {"num_classes": 2, "anchors_per_image": 8, "max_views": 4, "strategy": "random"}
    counts = np.zeros((4, 5))
    for seed in range(300):
        anchors = sample(where, label, prediction, seed=seed, **arguments)
        np.add.at(counts, tuple(anchors.embedding[0][anchors.valid[0], 1:].astype(int).T), 1)
    for c in range(2):
        of_class = counts[label[0] == c]
        expected = 300 * 4 / len(of_class)
        assert np.abs(of_class - expected).max() < 5 * np.sqrt(expected)  # 5 sigma of a binomial
    assert (counts[label[0] == IGNORE_LABEL] == 0).all()


@pytest.mark.slow
def test_anchors_do_not_depend_on_the_other_images():
    where, label, prediction = scene(np.random.default_rng(2), 4, batch=3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(3))
    arguments = {"num_classes": 4, "anchors_per_image": 20, "max_views": 5, "strategy": "hard"}
    both = sample_anchors(*map(jnp.asarray, (where, label, prediction)), keys, **arguments)
    last = (jnp.asarray(array[2:]) for array in (where, label, prediction))
    alone = sample_anchors(*last, keys[2:], **arguments)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), both, alone)
