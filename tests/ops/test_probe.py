"""A probe changes nothing, and tells the norm of the gradient that passes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastseg_jax.ops.probe import probe


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_probe_is_that_of_its_square_norm(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), dtype)
    factor = jnp.arange(15, dtype=dtype).reshape(3, 5)

    def loss(x, square):
        first, second = probe(x, square), jnp.sin(x)
        return jnp.sum(jnp.cos(first) * factor) + jnp.sum(second)

    zero = jnp.zeros(())
    plain = jax.grad(lambda x: loss(x, zero))(x)
    gradient, square = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, zero)
    np.testing.assert_array_equal(gradient, plain)
    passed = -np.sin(np.asarray(x, np.float32)) * np.asarray(factor, np.float32)
    np.testing.assert_allclose(square, np.sum(passed**2), rtol=1e-5 if dtype == "float32" else 0.02)
