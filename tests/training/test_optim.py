"""The optimiser against PyTorch's rule written out, the schedule against the original's formula."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastseg_jax.training.optim import poly_schedule, sgd, update_ema


@pytest.mark.parametrize("multiplier", [1.0, 10.0])
def test_sgd_is_that_of_pytorch_with_two_groups_of_parameters(multiplier):
    """v <- momentum·v + (g + decay·p); p <- p - lr·v, with an lr for all but the backbone."""
    rng = np.random.default_rng(0)
    schedule = poly_schedule(learning_rate=0.01, num_steps=5, poly_power=0.9, warmup_steps=0)
    tx = sgd(schedule, momentum=0.9, weight_decay=0.01, head_lr_multiplier=multiplier)
    rates = {"backbone": 0.01, "cls_head": 0.01 * multiplier, "proj_head": 0.01 * multiplier}
    expected = {name: rng.normal(size=4) for name in rates}
    velocity = dict.fromkeys(rates, np.zeros(4))
    params = {name: {"kernel": jnp.asarray(x, jnp.float32)} for name, x in expected.items()}
    opt_state = tx.init(params)
    for step in range(5):
        grads = {name: rng.normal(size=4) for name in rates}
        updates, opt_state = tx.update(
            {name: {"kernel": jnp.asarray(x, jnp.float32)} for name, x in grads.items()},
            opt_state,
            params,
        )
        params = optax.apply_updates(params, updates)
        for name, rate in rates.items():
            velocity[name] = 0.9 * velocity[name] + grads[name] + 0.01 * expected[name]
            expected[name] = expected[name] - rate * (1 - step / 5) ** 0.9 * velocity[name]
            np.testing.assert_allclose(params[name]["kernel"], expected[name], rtol=1e-5)


def test_poly_schedule_falls_to_zero_and_rises_in_the_warmup():
    schedule = poly_schedule(learning_rate=2.0, num_steps=100, poly_power=0.9, warmup_steps=4)
    got = [float(schedule(jnp.asarray(step))) for step in (0, 1, 3, 50, 100)]
    poly = [2 * (1 - step / 100) ** 0.9 for step in (0, 1, 3, 50, 100)]
    rise = [1 / 4, 2 / 4, 1, 1, 1]
    assert got == pytest.approx([a * b for a, b in zip(poly, rise, strict=True)], abs=1e-6)


def test_ema_follows_fast_at_first():
    ema, params = {"x": jnp.zeros(2)}, {"x": jnp.ones(2)}
    first = update_ema(ema, params, jnp.asarray(0), ema_decay=0.99)
    late = update_ema(ema, params, jnp.asarray(10_000), ema_decay=0.99)
    np.testing.assert_allclose(first["x"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(late["x"], 0.01, rtol=1e-4)
