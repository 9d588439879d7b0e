"""Bilinear resizing to any size, corners aligned."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, Int


def resize_bilinear(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Resize to `size` (h2, w2) so that the corner pixels keep their place and value.

    As PyTorch's `F.interpolate(mode="bilinear", align_corners=True)`, which the original uses for
    features and logits alike: output i reads the input at i * (h - 1) / (h2 - 1), or at 0 where
    h2 is 1. No anti-aliasing when shrinking.

    Each axis is a small matrix product: the gather that it replaces has a scatter for a gradient.
    """
    b, h, w, c = x.shape
    h2, w2 = size
    if w2 != w:
        columns = jnp.asarray(_interpolation(w, w2), x.dtype)
        x = jnp.einsum("vw,bhwc->bhvc", columns, x, precision=Precision.HIGHEST)
    if h2 != h:
        # One product per image over flattened rows needs no transposition: twice as fast on CPU.
        rows = jnp.broadcast_to(jnp.asarray(_interpolation(h, h2), x.dtype), (b, h2, h))
        x = jnp.matmul(rows, x.reshape(b, h, w2 * c), precision=Precision.HIGHEST)
    return x.reshape(b, h2, w2, c)


def most_likely(
    logits: Float[Array, "b hs ws k"],
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    *,
    padded_image: tuple[int, int],
    padded_label: tuple[int, int],
) -> Int[Array, "b h w"]:
    """Classes of images at the sizes of their labels, which differ from row to row.

    For each row as `resize_bilinear` to `padded_image`, a crop of `image_size` (height, width) in
    the upper left corner, `resize_bilinear` to `label_size`, and argmax. That lies in the upper
    left corner of `padded_label` (h, w), and its last row and column are repeated around it.

    Each axis is one matrix product for both resizes and the crop. The classes come one by one: all
    logits at the size of labels would be the largest array of an evaluation.
    """
    rows, columns = (
        _interpolation_of_crop(
            *(logits.shape[1 + axis], padded_image[axis], image_size[:, axis]),
            *(label_size[:, axis], padded_label[axis]),
        )
        for axis in (0, 1)
    )

    def compare(best: tuple[Array, Array], of_class: tuple[Array, Array]) -> tuple[Any, None]:
        (largest, classes), (number, x) = best, of_class
        x = jnp.einsum("bhw,bvw->bhv", x, columns, precision=Precision.HIGHEST)
        x = jnp.matmul(rows, x, precision=Precision.HIGHEST)
        return (jnp.maximum(x, largest), jnp.where(x > largest, number, classes)), None

    shape = (logits.shape[0], *padded_label)
    none = jnp.full(shape, -jnp.inf, logits.dtype), jnp.zeros(shape, jnp.int32)
    numbers = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    (_, classes), _ = jax.lax.scan(compare, none, (numbers, jnp.moveaxis(logits, -1, 0)))
    return classes


def _interpolation_of_crop(
    size: int,
    padded: int,
    crop: Int[Array, " b"],
    new_size: Int[Array, " b"],
    new_padded: int,
) -> Float[Array, "b new old"]:
    """Matrices of interpolation from `size` to `padded`, then of its first `crop` to `new_size`."""
    of_padded = jnp.asarray(_interpolation(size, padded), jnp.float32)
    last, new_last = crop[:, None] - 1, new_size[:, None] - 1
    # Positions in units of 1 / unit: whole numbers are exact, unlike fractions in float32.
    position = jnp.minimum(jnp.arange(new_padded)[None], new_last) * last
    unit = jnp.maximum(new_last, 1)
    left, part = position // unit, ((position % unit) / unit)[..., None]
    right = jnp.minimum(left + 1, last)
    return (1 - part) * of_padded[left] + part * of_padded[right]


def _interpolation(size: int, new_size: int) -> Float[np.ndarray, "new old"]:
    """The matrix of linear interpolation along one axis; each row sums to 1."""
    position = np.linspace(0, size - 1, new_size)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size)))
