"""Image normalisation, inside the jitted programs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from contrastseg_jax.structs import ImageFormat


def normalize(image: Num[Array, "b h w 3"], image_format: ImageFormat) -> Float[Array, "b h w 3"]:
    """Subtract the mean, divide by the std, and put the channels into the network's order."""
    mean = jnp.asarray(image_format.mean, jnp.float32)
    std = jnp.asarray(image_format.std, jnp.float32)
    normalized = (image.astype(jnp.float32) - mean[None, None, None]) / std[None, None, None]
    return normalized[..., ::-1] if image_format.channel_order == "BGR" else normalized
