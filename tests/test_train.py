"""The train step: what it computes, on how many devices, and how often it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_batch, make_config, run_steps, start

from contrastseg_jax import distributed
from contrastseg_jax.train import _means, is_due


@pytest.fixture(scope="module")
def two_devices():
    return run_steps(make_config(), num_devices=2)


def test_one_device_gives_the_same_as_two(two_devices):
    """Loss, bank and, by way of the parameters, gradients: to float32 rounding."""
    state, history, _ = two_devices
    other, other_history, _ = run_steps(make_config(), num_devices=1)
    # The first step to rounding; the later ones inherit its differences through BatchNorm.
    for key in history[0]:
        np.testing.assert_allclose(history[0][key], other_history[0][key], rtol=1e-5, err_msg=key)
    for step in (1, 2):
        np.testing.assert_allclose(
            history[step]["loss"], other_history[step]["loss"], rtol=2e-3, err_msg=f"step {step}"
        )
    np.testing.assert_array_equal(state.memory.pixel_count, other.memory.pixel_count)
    np.testing.assert_array_equal(state.memory.pixel_head, other.memory.pixel_head)


def test_gradients_are_the_same_on_two_devices():
    """One step without momentum or decay moves parameters by the gradient alone."""
    config = make_config(
        "contrast.warmup_steps=0",
        "optim.momentum=0.0",
        "optim.weight_decay=0.0",
        variant="contrast",
    )
    gradients = []
    for num_devices in (1, 2):
        step_fn, state, mesh = start(config, num_devices)
        before = distributed.fetch(state.params)
        state, metrics = step_fn(state, distributed.to_devices(make_batch(), mesh))
        assert metrics["contrast"] > 0
        after = distributed.fetch(state.params)
        difference = jax.tree.map(lambda new, old: (old - new).ravel(), after, before)
        gradients.append(np.concatenate(jax.tree.leaves(difference)))
    assert np.linalg.norm(gradients[0] - gradients[1]) < 1e-4 * np.linalg.norm(gradients[0])


def test_many_batches_are_one_trace(two_devices):
    assert two_devices[2]._cache_size() == 1


def test_contrast_counts_after_its_warmup_and_the_bank_fills_before(two_devices):
    state, history, _ = two_devices
    assert history[0]["contrast"] == 0
    assert history[0]["loss"] == history[0]["cross_entropy"]
    assert history[0]["memory_fill"] > 0
    assert history[1]["contrast"] > 0
    np.testing.assert_allclose(
        history[1]["loss"], history[1]["cross_entropy"] + 0.1 * history[1]["contrast"], rtol=1e-6
    )
    assert int(state.step) == 3
    lengths = np.linalg.norm(state.memory.pixel, axis=-1)
    written = np.arange(16)[None] < state.memory.pixel_count[:, None]
    np.testing.assert_allclose(lengths[written], 1, rtol=1e-5)
    assert not lengths[~written].any()


def test_cross_entropy_alone_has_neither_projection_nor_bank():
    config = make_config("optim.ema_decay=0.9", variant="ce")
    _, state, _ = start(config)
    assert "proj_head" not in state.params
    assert state.memory is None
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_bank_alone_trains_on_what_it_holds():
    config = make_config("contrast.candidates=memory", "memory.dtype=bfloat16")
    state, history, _ = run_steps(config, num_steps=2)
    assert history[1]["contrast"] > 0
    assert state.memory.pixel.dtype == jnp.bfloat16


def test_a_step_depends_on_seed_and_step_alone():
    config = make_config()
    step_fn, state, mesh = start(config)
    again = jax.tree.map(jnp.copy, state)
    first, _ = step_fn(state, distributed.to_devices(make_batch(), mesh))
    second, _ = step_fn(again, distributed.to_devices(make_batch(), mesh))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_loss_falls_on_one_batch():
    step_fn, state, mesh = start(make_config("train.num_steps=40"))
    losses = []
    for _ in range(20):
        state, metrics = step_fn(state, distributed.to_devices(make_batch(), mesh))
        losses.append(float(metrics["cross_entropy"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])


def test_a_loss_that_is_not_finite_stops_the_run():
    history = [{"loss": jnp.asarray(1.0)}, {"loss": jnp.asarray(np.inf)}]
    with pytest.raises(FloatingPointError, match="in steps 9 to 10"):
        _means(history, 10)


def test_is_due_every_period_and_at_the_end():
    assert [step for step in range(1, 8) if is_due(step, 3, 7)] == [3, 6, 7]
