"""Bilinear resizing against a loop over pixels and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastseg_jax.resize import resize_bilinear

SIZES = [
    ((4, 6), (8, 12)),
    ((5, 7), (17, 25)),  # odd
    ((16, 12), (5, 4)),  # down
    ((8, 3), (4, 9)),  # down and up
    ((1, 1), (3, 5)),
    ((6, 5), (1, 1)),
    ((6, 1), (1, 4)),
    ((4, 6), (4, 9)),  # one axis only
]


def by_loops(x, size):
    """Every output pixel from the four around it, in float64."""
    _, h, w, _ = x.shape
    result = np.zeros((x.shape[0], *size, x.shape[3]))
    for i in range(size[0]):
        for j in range(size[1]):
            y = i * (h - 1) / (size[0] - 1) if size[0] > 1 else 0.0
            z = j * (w - 1) / (size[1] - 1) if size[1] > 1 else 0.0
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, h - 1), min(z0 + 1, w - 1)
            result[:, i, j] = (1 - y + y0) * (
                (1 - z + z0) * x[:, y0, z0] + (z - z0) * x[:, y0, z1]
            ) + (y - y0) * ((1 - z + z0) * x[:, y1, z0] + (z - z0) * x[:, y1, z1])
    return result


def random_map(size):
    return np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_agrees_with_a_loop_over_pixels(old, new):
    x = random_map(old)
    result = resize_bilinear(jnp.asarray(x), new)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, by_loops(x, new), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_agrees_with_torch_in_value_and_gradient(old, new):
    torch = pytest.importorskip("torch")
    x = random_map(old)
    cotangent = np.random.default_rng(1).normal(size=(2, *new, 3)).astype(np.float32)
    result, vjp = jax.vjp(lambda x: resize_bilinear(x, new), jnp.asarray(x))

    x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.functional.interpolate(x, new, mode="bilinear", align_corners=True)
    expected.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6)
    gradient = x.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(vjp(jnp.asarray(cotangent))[0], gradient, rtol=0, atol=1e-5)


def test_numbers_computed_by_torch():
    # F.interpolate(torch.tensor([[[[0., 3., 1.], [4., 2., 9.]]]]), (3, 4), mode="bilinear",
    #               align_corners=True) with torch 2.13
    x = jnp.asarray([[0.0, 3.0, 1.0], [4.0, 2.0, 9.0]])[None, :, :, None]
    expected = [
        [0.0, 2.0, 2.333333, 1.0],
        [2.0, 2.333333, 3.333333, 5.0],
        [4.0, 2.666667, 4.333334, 9.0],
    ]
    np.testing.assert_allclose(resize_bilinear(x, (3, 4))[0, :, :, 0], expected, atol=1e-6)


def test_own_size_is_the_identity():
    x = jnp.asarray(random_map((5, 7)))
    np.testing.assert_array_equal(resize_bilinear(x, (5, 7)), x)


@pytest.mark.parametrize("size", [(1, 1), (9, 31), (2, 3)])
def test_constants_and_corners_are_kept(size):
    constant = jnp.full((1, 5, 7, 2), 3.0)
    np.testing.assert_allclose(resize_bilinear(constant, size), 3.0, rtol=1e-6)
    x = jnp.asarray(random_map((5, 7)))
    result = resize_bilinear(x, size)
    np.testing.assert_array_equal(result[:, 0, 0], x[:, 0, 0])
    if size != (1, 1):
        np.testing.assert_array_equal(result[:, -1, -1], x[:, -1, -1])


def test_keeps_the_type():
    x = jnp.asarray(random_map((4, 4))).astype(jnp.bfloat16)
    assert resize_bilinear(x, (8, 8)).dtype == jnp.bfloat16
