"""Bilinear resizing against a loop over pixels and against PyTorch."""

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

from contrastseg_jax.ops import resize
from contrastseg_jax.ops.resize import resize_bilinear, resized_argmax

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


@pytest.fixture(params=["matrix", "gather"])
def path(request, monkeypatch):
    """Both ways to interpolate, whatever the size."""
    if request.param == "gather":
        monkeypatch.setattr(resize, "MATRIX_SIZE", 0)


def random_map(size):
    return np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_agrees_with_a_loop_over_pixels(path, old, new):
    x = random_map(old)
    result = resize_bilinear(jnp.asarray(x), new)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, by_loops(x, new), rtol=0, atol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_agrees_with_torch_in_value_and_gradient(path, old, new):
    torch = needs.package("torch")
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


def test_classes_are_those_of_each_image_alone(path):
    """Rows of several sizes against resize, crop, resize and argmax; padding influences nothing."""
    image_size = [(33, 47), (40, 64), (17, 64), (1, 1), (40, 1), (9, 9)]
    label_size = [(50, 71), (40, 64), (7, 23), (5, 3), (1, 72), (1, 1)]
    logits = np.random.default_rng(0).normal(size=(6, 10, 16, 5)).astype(np.float32)
    classes_of = jax.jit(resized_argmax, static_argnames=("padded_image", "padded_label"))
    settings = {"padded_image": (40, 64), "padded_label": (56, 72)}
    result = classes_of(logits, np.int32(image_size), np.int32(label_size), **settings)
    assert result.shape == (6, 56, 72) and result.dtype == jnp.int32
    for row, (crop, size) in enumerate(zip(image_size, label_size, strict=True)):
        whole = resize_bilinear(jnp.asarray(logits[row : row + 1]), (40, 64))
        expected = resize_bilinear(whole[:, : crop[0], : crop[1]], size)[0]
        got = np.asarray(result[row, : size[0], : size[1]])
        first, second = np.sort(expected, axis=-1)[..., [-1, -2]].transpose(2, 0, 1)
        clear = first - second > 1e-5  # rounding may turn the others
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(got[clear], np.argmax(expected, axis=-1)[clear])
        around = np.pad(got, [(0, 56 - size[0]), (0, 72 - size[1])], mode="edge")
        np.testing.assert_array_equal(result[row], around)


@pytest.mark.parametrize(
    ("image_size", "label_size"), [((2, 70_000),) * 2, ((2, 300), (3, 70_000))]
)
def test_memory_goes_by_area(image_size, label_size):
    """The matrices for a side of 70,000 would take 5 GB; whole numbers would leave 32 bits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 2, image_size[1] // 4, 3)).astype(np.float32)
    settings = {"padded_image": image_size, "padded_label": label_size}
    classes_of = jax.jit(resized_argmax, static_argnames=tuple(settings))
    sizes = np.int32([image_size]), np.int32([label_size])
    program = classes_of.lower(logits, *sizes, **settings).compile()
    assert program.memory_analysis().temp_size_in_bytes < 200 * np.prod(label_size)
    columns = np.arange(0, label_size[1], 997)
    expected = np.empty((len(columns), 3))
    for number in range(3):  # along the first row
        row = logits[0, 0, :, number]
        of_image = np.arange(image_size[1]) * (len(row) - 1) / (image_size[1] - 1)
        row = np.interp(of_image, np.arange(len(row)), row)
        of_label = columns * (len(row) - 1) / (label_size[1] - 1)
        expected[:, number] = np.interp(of_label, np.arange(len(row)), row)
    second, first = np.sort(expected, axis=-1)[:, -2:].T
    clear = first - second > 1e-4
    assert clear.mean() > 0.99
    result = np.asarray(program(logits, *sizes))[0, 0, columns]
    np.testing.assert_array_equal(result[clear], expected.argmax(-1)[clear])


def test_products_beyond_32_bits():
    x = np.int32([0, 1, 46_341, 65_537, 300_000, 1 << 27])
    factor, unit = np.int32([1, 7, 69_999, 65_536, 4_999, 1 << 27]), x[-1] - 3
    scaled = jax.jit(resize._scaled, static_argnames="bits")
    quotient, rest = scaled(x, factor, unit, bits=28)
    expected = [divmod(int(a) * int(b), int(unit)) for a, b in zip(x, factor, strict=True)]
    assert list(zip(quotient.tolist(), rest.tolist(), strict=True)) == expected


def test_the_first_of_equal_classes_is_taken():
    logits, one = jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 2), jnp.int32)
    logits = logits.at[..., 1:].set(4.0)
    classes = resized_argmax(logits, one * 4, one * 6, padded_image=(4, 4), padded_label=(6, 6))
    assert np.all(classes == 1)


def test_own_size_is_the_identity():
    x = jnp.asarray(random_map((5, 7)))
    np.testing.assert_array_equal(resize_bilinear(x, (5, 7)), x)


@pytest.mark.parametrize("size", [(1, 1), (9, 31), (2, 3)])
def test_constants_and_corners_are_kept(path, size):
    constant = jnp.full((1, 5, 7, 2), 3.0)
    np.testing.assert_allclose(resize_bilinear(constant, size), 3.0, rtol=1e-6)
    x = jnp.asarray(random_map((5, 7)))
    result = resize_bilinear(x, size)
    np.testing.assert_array_equal(result[:, 0, 0], x[:, 0, 0])
    if size != (1, 1):
        np.testing.assert_array_equal(result[:, -1, -1], x[:, -1, -1])


def test_keeps_the_type(path):
    x = jnp.asarray(random_map((4, 4))).astype(jnp.bfloat16)
    assert resize_bilinear(x, (8, 8)).dtype == jnp.bfloat16
