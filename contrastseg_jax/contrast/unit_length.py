"""Vectors of unit length, whose products are cosines."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def to_unit_length(x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
    """Divide by the length. A vector of zeros has no direction: it stays, and has no gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    has_length = square > 1e-24  # a length of 1e-12, as in PyTorch's F.normalize
    return jnp.where(has_length, x * lax.rsqrt(jnp.where(has_length, square, 1.0)), 0.0)
