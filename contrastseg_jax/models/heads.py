"""What stands on a backbone's features: classification and projection."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from contrastseg_jax.models.hrnet import batch_norm, conv


class FCNHead(nn.Module):
    """Class logits from features (the original's `cls_head` in `lib/models/nets/hrnet.py`)."""

    num_classes: int
    dropout_rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b hs ws c"], *, train: bool) -> Float[Array, "b hs ws k"]:
        """3x3 convolution, BN, ReLU, dropout of whole channels, 1x1 convolution without bias."""
        x = conv(x.shape[-1], 3, use_bias=True, name="conv1")(x)
        x = nn.relu(batch_norm(not train, name="bn1")(x))
        x = nn.Dropout(self.dropout_rate, broadcast_dims=(1, 2), deterministic=not train)(x)
        return conv(self.num_classes, 1, name="conv2")(x)


class ProjectionHead(nn.Module):
    """Unit-length embeddings from features (the original's `lib/models/modules/projection.py`)."""

    proj_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b hs ws c"], *, train: bool) -> Float[Array, "b hs ws d"]:
        """1x1 convolution, BN, ReLU, 1x1 convolution, division by the length, in float32."""
        x = conv(x.shape[-1], 1, use_bias=True, name="conv1")(x)
        x = nn.relu(batch_norm(not train, name="bn1")(x))
        x = conv(self.proj_dim, 1, use_bias=True, name="conv2")(x).astype(jnp.float32)
        # At least 1e-12 as in F.normalize, so that a vector of zeros has a finite gradient.
        square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * lax.rsqrt(jnp.maximum(square, 1e-24))
