"""Convolutions against XLA's own, with their gradients, and as each kind of device gets them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from contrastseg_jax.ops.convolution import depthwise, materialize, pointwise


def reference(x, kernel, stride=1):
    return lax.conv_general_dilated(
        *(x, kernel, (stride, stride), [(kernel.shape[0] // 2,) * 2] * 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
        precision="highest",
    )


def noise(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def require_equal(function, expected, x, kernel):
    """Values and both gradients, of a weighted sum."""
    y = expected(x, kernel)
    weights = noise(*y.shape)
    np.testing.assert_allclose(function(x, kernel), y, rtol=1e-5, atol=1e-5)

    def gradients(f):
        return jax.grad(lambda x, kernel: jnp.vdot(f(x, kernel), weights), argnums=(0, 1))(
            x, kernel
        )

    for ours, theirs in zip(gradients(function), gradients(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
def test_a_pointwise_convolution_is_a_product(size, stride):
    require_equal(
        lambda x, kernel: pointwise(x, kernel, (stride, stride)),
        lambda x, kernel: reference(x, kernel, stride),
        noise(2, *size, 3),
        noise(1, 1, 3, 5),
    )


@pytest.mark.parametrize(
    ("size", "kernel_size"), [((9, 12), 7), ((5, 4), 7), ((1, 1), 3), ((6, 3), 1)]
)
def test_a_depthwise_convolution_is_a_sum_of_shifted_maps(size, kernel_size):
    kernel = noise(kernel_size, kernel_size, 1, 4)
    require_equal(depthwise, reference, noise(2, *size, 4), kernel)


def test_depthwise_in_bfloat16_sums_in_float32():
    x, kernel = noise(1, 8, 8, 4, dtype="bfloat16"), noise(7, 7, 1, 4, dtype="bfloat16")
    exact = reference(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert depthwise(x, kernel).dtype == jnp.bfloat16
    # Equal but for the last rounding: half of 2 ** -8.
    np.testing.assert_allclose(depthwise(x, kernel).astype(jnp.float32), exact, rtol=2**-8)
    of_map, of_kernel = jax.vjp(depthwise, x, kernel)[1](x)
    assert of_map.dtype == of_kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_keep_their_own(platform):
    def both(x, kernel):
        return jnp.sum(materialize(depthwise(x, kernel)))

    def text(platform):
        traced = jax.jit(jax.grad(both)).trace(noise(1, 8, 8, 4), noise(7, 7, 1, 4))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.convolution" in text(platform)
    assert "optimization_barrier" not in text(platform)
    assert "stablehlo.convolution" not in text("cpu")
    assert "optimization_barrier" in text("cpu")


def test_materialize_changes_neither_values_nor_gradients():
    x = noise(1, 2, 2, 3)
    np.testing.assert_array_equal(materialize(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.vdot(materialize(x), x))(x), 2 * x)
