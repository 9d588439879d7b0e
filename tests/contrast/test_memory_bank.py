"""The bank against the original's figures, a literal NumPy queue, and its own rules."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import golden_cases

from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.ops.resize import label_at_stride
from contrastseg_jax.structs import IGNORE_LABEL, MemoryBank

enqueue = jax.jit(memory_bank.enqueue)


def bank_of(pixel, segment, head, count):
    head, count = jnp.asarray(head, jnp.int32), jnp.asarray(count, jnp.int32)
    ages = [jnp.zeros(queue.shape[:2], jnp.int32) for queue in (pixel, segment)]
    return MemoryBank(
        *(jnp.asarray(pixel, jnp.float32), ages[0], head, count),
        *(jnp.asarray(segment, jnp.float32), ages[1], head, count),
    )


@pytest.mark.parametrize("path", golden_cases("enqueue"), ids=lambda p: p.stem)
def test_enqueue_matches_the_corrected_original(path):
    case = np.load(path)
    meta = json.loads(str(case["meta"]))
    num_classes, size, _ = case["pixel_queue"].shape
    embedding = jnp.asarray(case["keys"].transpose(0, 2, 3, 1), jnp.float32)
    label = case["labels"]
    label = np.where(label == meta["ignore_index"], IGNORE_LABEL, label).astype(np.uint8)
    label = label_at_stride(jnp.asarray(label), embedding.shape[1:3])
    bank = bank_of(case["pixel_queue"], case["segment_queue"], case["ptr"], [size] * num_classes)

    # The pixels that were drawn there, in the shape in which they are drawn here.
    per_class = meta["pixel_update_freq"]
    rows = np.zeros((len(embedding), num_classes, per_class, embedding.shape[-1]), np.float32)
    valid = np.zeros(rows.shape[:3], bool)
    flat = np.asarray(embedding).reshape(len(embedding), -1, embedding.shape[-1])
    for image, cls, *pixels in case["corrected_pixels"]:
        drawn = [pixel for pixel in pixels if pixel >= 0]
        unit = flat[image, drawn] / np.linalg.norm(flat[image, drawn], axis=-1, keepdims=True)
        rows[image, cls, : len(drawn)], valid[image, cls, : len(drawn)] = unit, True
    segment = memory_bank.segment_keys(embedding, label, num_classes=num_classes)
    new = enqueue(bank, (jnp.asarray(rows), jnp.asarray(valid)), segment)

    np.testing.assert_allclose(new.pixel, case["corrected_pixel_queue"], atol=2e-6)
    np.testing.assert_allclose(new.segment, case["corrected_segment_queue"], atol=2e-6)
    np.testing.assert_array_equal(new.pixel_head, case["corrected_pixel_queue_ptr"])
    np.testing.assert_array_equal(new.segment_head, case["corrected_segment_queue_ptr"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), fill_rate=st.floats(0, 1))
def test_the_ring_holds_the_last_rows(seed, fill_rate):
    """Ten steps against a Python list per class; steps of up to 8 rows wrap a ring of 5."""
    rng = np.random.default_rng(seed)
    num_classes, size, batch, views = 3, 5, 2, 4
    bank = memory_bank.init_memory(
        num_classes=num_classes, pixel_size=size, segment_size=0, proj_dim=2, dtype="float32"
    )
    history, written = ([[] for _ in range(num_classes)] for _ in range(2))
    for step in range(10):
        rows = rng.normal(size=(batch, num_classes, views, 2)).astype(np.float32)
        valid = rng.random((batch, num_classes, views)) < fill_rate
        nothing = jnp.zeros((batch, num_classes, 1, 2)), jnp.zeros((batch, num_classes, 1), bool)
        bank = enqueue(bank, (jnp.asarray(rows), jnp.asarray(valid)), nothing)
        for image, cls in np.ndindex(batch, num_classes):
            history[cls].extend(rows[image, cls][valid[image, cls]])
            written[cls].extend([step] * int(valid[image, cls].sum()))
        for cls in range(num_classes):
            count, head = int(bank.pixel_count[cls]), int(bank.pixel_head[cls])
            assert count == min(len(history[cls]), size)
            oldest_first = np.roll(bank.pixel[cls], -head, axis=0)[size - count :]
            expected = np.array(history[cls][-size:]).reshape(-1, 2)
            np.testing.assert_array_equal(oldest_first, expected, err_msg=f"step {step}")
            ages = np.roll(bank.pixel_age[cls], -head)[size - count :]
            np.testing.assert_array_equal(ages, step - np.array(written[cls][-size:], int))
        ages = [step - when for steps in written for when in steps[-size:]]
        mean = np.mean(ages) if ages else 0.0
        np.testing.assert_allclose(memory_bank.mean_age(bank), mean, rtol=1e-6)


def test_keys_are_pixels_of_their_class_and_class_0_is_among_them():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, IGNORE_LABEL], size=(2, 5, 7)).astype(np.int32)
    where = np.stack(np.meshgrid(*map(np.arange, label.shape), indexing="ij"), -1)
    keys = jax.random.split(jax.random.key(0), 2)
    rows, valid = memory_bank.pixel_keys(
        jnp.asarray(where, jnp.float32), jnp.asarray(label), keys, num_classes=4, pixels_per_class=9
    )
    rows = np.asarray(rows, int)
    for image, cls in np.ndindex(2, 4):
        drawn = rows[image, cls][np.asarray(valid[image, cls])]
        assert len(drawn) == min(9, np.sum(label[image] == cls))
        assert len(np.unique(drawn, axis=0)) == len(drawn)
        assert (label[tuple(drawn.T)] == cls).all() and (drawn[:, 0] == image).all()
    assert valid[:, 0].any(axis=1).all() and not valid[:, 3].any()


def test_segment_keys_are_unit_means_of_a_class():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 2, IGNORE_LABEL], size=(2, 5, 7)).astype(np.int32)
    embedding = rng.normal(size=(2, 5, 7, 6)).astype(np.float32)
    rows, valid = memory_bank.segment_keys(
        jnp.asarray(embedding), jnp.asarray(label), num_classes=3
    )
    np.testing.assert_array_equal(valid[:, :, 0], [[True, False, True]] * 2)
    for image, cls in np.ndindex(2, 3):
        if valid[image, cls, 0]:
            mean = embedding[image][label[image] == cls].mean(0)
            np.testing.assert_allclose(
                rows[image, cls, 0], mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_class_alone_and_is_not_kept(value):
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, IGNORE_LABEL], size=(2, 5, 7)).astype(np.int32)
    label[1, 2, 3] = 1
    clean = rng.normal(size=(2, 5, 7, 6)).astype(np.float32)
    spoilt = np.where((label == IGNORE_LABEL)[..., None], np.float32(value), clean)
    lost = spoilt.copy()
    lost[1, 2, 3, 0] = value

    def keys(embedding):
        return memory_bank.segment_keys(jnp.asarray(embedding), jnp.asarray(label), num_classes=3)

    bank = memory_bank.init_memory(
        num_classes=3, pixel_size=0, segment_size=4, proj_dim=6, dtype="float32"
    )
    none = jnp.zeros((2, 3, 1, 6)), jnp.zeros((2, 3, 1), bool)
    with jax.debug_nans(False):
        (expected, valid), (same, _), (rows, _) = map(keys, (clean, spoilt, lost))
        bank = enqueue(bank, none, (rows, valid))
        expected, same, rows = map(np.asarray, (expected, same, rows))
    np.testing.assert_array_equal(same, expected)
    assert np.isnan(rows[1, 1]).all()
    np.testing.assert_array_equal(rows[:, [0, 2]], expected[:, [0, 2]])
    np.testing.assert_array_equal(bank.segment_count, [2, 1, 2])
    assert np.isfinite(bank.segment).all()


def test_empty_slots_are_no_candidates_and_no_gradient_reaches_the_bank():
    bank = memory_bank.init_memory(
        num_classes=2, pixel_size=3, segment_size=2, proj_dim=4, dtype="bfloat16"
    )
    assert not any(queue.valid.any() for queue in memory_bank.memory_candidates(bank))
    rows = jnp.ones((1, 2, 2, 4)), jnp.asarray([[[True, True], [True, False]]])
    means = jnp.ones((1, 2, 1, 4)), jnp.asarray([[[True], [False]]])
    bank = enqueue(bank, rows, means)
    pixel, segment = memory_bank.memory_candidates(bank)
    assert pixel.embedding.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pixel.label, [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(pixel.valid, [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(segment.label, [[0, 0], [1, 1]])
    np.testing.assert_array_equal(segment.valid, [[1, 0], [0, 0]])
    np.testing.assert_allclose(memory_bank.fill_ratio(bank), [3 / 5, 1 / 5])
    grad = jax.grad(
        lambda rows: (
            memory_bank.memory_candidates(bank.replace(pixel=rows))[0].embedding.sum().astype("f4")
        )
    )(bank.pixel)
    assert not np.any(np.asarray(grad, np.float32))


@pytest.mark.parametrize(("pixel_size", "segment_size"), [(0, 2), (3, 0)])
def test_a_queue_of_no_slots_is_switched_off(pixel_size, segment_size):
    bank = memory_bank.init_memory(
        num_classes=2,
        pixel_size=pixel_size,
        segment_size=segment_size,
        proj_dim=4,
        dtype="float32",
    )
    rows = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 1), bool)
    bank = enqueue(bank, rows, rows)
    (queue,) = memory_bank.memory_candidates(bank)
    assert queue.embedding.shape == (2, pixel_size + segment_size, 4)
    assert queue.valid.sum() == 2
