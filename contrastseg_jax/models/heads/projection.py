"""The projection head, whose embeddings are contrasted."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastseg_jax.contrast.unit_length import to_unit_length
from contrastseg_jax.models.layers import batch_norm, conv


class ProjectionHead(nn.Module):
    """Unit-length embeddings from features (the original's `lib/models/modules/projection.py`)."""

    proj_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b hs ws c"], *, train: bool) -> Float[Array, "b hs ws d"]:
        """1x1 convolution, BN, ReLU, 1x1 convolution, division by the length, in float32."""
        x = conv(x, x.shape[-1], 1, use_bias=True, name="conv1")
        x = nn.relu(batch_norm(x, train=train, name="bn1"))
        x = conv(x, self.proj_dim, 1, use_bias=True, name="conv2").astype(jnp.float32)
        return to_unit_length(x)
