"""A batch in micro-batches: what is equal to the whole batch, and what each of them sees."""

import jax
import numpy as np
import pytest
from small import make_batch, make_config, run_steps, start

from contrastseg_jax.parallel import sharding
from contrastseg_jax.structs import IGNORE_LABEL

pytestmark = pytest.mark.slow

# Every BatchNorm of the toy's backbone is frozen, that of its head is not.
SETTINGS = (
    *("train.batch_size=8", "model.dropout_rate=0.0", "loss.class_weights=(1.0, 2.0, 0.5)"),
    *("optim.weight_decay=0.0", "optim.learning_rate=0.1", "optim.momentum=0.0"),
)
CE = ("contrast.candidates=none",)


def batch_of_unequal_labels(repeats=1):
    """Eight images of which every other has few labelled pixels, each `repeats` times in a row."""
    batch = make_batch(size=8 // repeats)
    batch.label[::2, 5:60] = IGNORE_LABEL
    return jax.tree.map(lambda x: np.repeat(x, repeats, axis=0), batch)


def step(batch, *settings, num_devices=2, num_steps=1):
    """State, metrics and the state before, after steps on one batch."""
    step_fn, state, mesh = start(make_config(*SETTINGS, *settings), num_devices)
    before = sharding.fetch(state)
    for _ in range(num_steps):
        state, metrics = step_fn(state, sharding.to_devices(batch, mesh))
    return sharding.fetch(state), sharding.fetch(metrics), before


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def test_accumulated_gradients_are_those_of_the_batch():
    """Of micro-batches with the same statistics, as each has one of every pair of images.

    But their labels differ, so that a plain mean of their losses would be another loss.
    """
    batch = batch_of_unequal_labels(repeats=2)
    batch.label[1::2, ::3] = IGNORE_LABEL
    batch.label[3::4, :, 10:] = IGNORE_LABEL
    whole, metrics, before = step(batch, *CE)
    parts, in_parts, _ = step(batch, *CE, "train.accumulation_steps=2")
    np.testing.assert_allclose(in_parts["cross_entropy"], metrics["cross_entropy"], rtol=1e-5)
    moved = largest_difference(whole.params, before.params)
    assert largest_difference(whole.params, parts.params) < 1e-4 * moved
    weights = [(batch.label[i::2] != IGNORE_LABEL).sum() for i in range(2)]
    assert weights[1] < 0.7 * weights[0]


def test_the_bank_is_written_once_in_the_order_of_the_batch():
    """With keys of each micro-batch's own statistics, which are the same here."""
    batch, settings = batch_of_unequal_labels(repeats=2), ("memory.pixel_size=40",)
    settings += ("memory.segment_size=8", "contrast.candidates=memory", "contrast.warmup_steps=1")
    whole, _, _ = step(batch, *settings)
    parts, _, _ = step(batch, *settings, "train.accumulation_steps=2")
    for name in ("pixel_head", "pixel_count", "segment_count", "pixel_age"):
        np.testing.assert_array_equal(getattr(parts.memory, name), getattr(whole.memory, name))
    np.testing.assert_allclose(parts.memory.pixel, whole.memory.pixel, atol=1e-4)
    np.testing.assert_allclose(parts.memory.segment, whole.memory.segment, atol=1e-4)


@pytest.mark.parametrize("network", ["online", "ema"])
def test_micro_batches_do_not_depend_on_devices(network):
    """Contrast inside them included."""
    settings = ("train.accumulation_steps=2", "contrast.warmup_steps=0", "optim.ema_decay=0.9")
    settings += (f"memory.key_network={network}", "memory.pixel_size=40", "memory.segment_size=8")
    batch = batch_of_unequal_labels()
    alone, metrics, before = step(batch, *settings, num_devices=1)
    split, on_two, _ = step(batch, *settings, num_devices=2)
    assert metrics["contrast"] > 0 and metrics["gradient_ratio"] > 0
    for name, value in metrics.items():
        np.testing.assert_allclose(on_two[name], value, rtol=1e-3, err_msg=name)
    moved = largest_difference(alone.params, before.params)
    assert largest_difference(alone.params, split.params) < 1e-2 * moved
    np.testing.assert_allclose(split.memory.segment, alone.memory.segment, atol=1e-3)


def test_no_image_travels_between_devices():
    settings = ("train.accumulation_steps=4", "train.batch_size=8", *CE)
    step_fn, state, mesh = start(make_config(*settings))
    batch = sharding.to_devices(make_batch(size=8), mesh)
    text = step_fn.lower(state, batch).compile().as_text()
    assert "all-reduce" in text
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert f"{kind}(" not in text and f"{kind}-start(" not in text


def test_running_statistics_move_once_by_the_mean_of_the_micro_batches():
    """Of the mean of a layer that reads images, which is that of the whole batch then."""
    batch = batch_of_unequal_labels()
    whole, _, before = step(batch, *CE)
    parts, _, _ = step(batch, *CE, "train.accumulation_steps=4")
    name = ("backbone", "bn1", "mean")
    first, one, four = (
        state.batch_stats[name[0]][name[1]][name[2]] for state in (before, whole, parts)
    )
    assert np.abs(one - first).max() > 1e-3
    np.testing.assert_allclose(four, one, rtol=1e-4, atol=1e-6)


def test_what_ignores_every_pixel_has_no_loss_and_moves_nothing():
    batch = make_batch(size=8)
    batch.label[:] = IGNORE_LABEL
    state, metrics, before = step(batch, *CE, "train.accumulation_steps=2")
    assert metrics["loss"] == 0
    assert largest_difference(state.params, before.params) == 0


def test_training_goes_on_with_micro_batches():
    _, history, step_fn = run_steps(
        make_config("train.accumulation_steps=2", "optim.name=adamw", "optim.learning_rate=0.001")
    )
    assert np.isfinite([metrics["loss"] for metrics in history]).all()
    assert step_fn._cache_size() == 1
