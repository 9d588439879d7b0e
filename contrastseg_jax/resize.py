"""Bilinear resizing to any size, corners aligned."""

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float


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


def _interpolation(size: int, new_size: int) -> Float[np.ndarray, "new old"]:
    """The matrix of linear interpolation along one axis; each row sums to 1."""
    position = np.linspace(0, size - 1, new_size)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size)))
