"""Object-contextual representations: pixels look at the mean features of each class.

Yuan et al., "Object-Contextual Representations for Semantic Segmentation", ECCV 2020; the
original's `lib/models/modules/spatial_ocr_block.py`. Layers carry the names they have there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastseg_jax.models.layers import HeadOutput, Watch, batch_norm, conv, unwatched


class OCRHead(nn.Module):
    """Logits from features and a first guess at the logits: the auxiliary head's."""

    num_classes: int
    dropout_rate: float
    width: int = 512
    key_width: int = 256

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b hs ws c"],
        aux_logits: Float[Array, "b hs ws k"],
        *,
        train: bool,
        watch: Watch = unwatched,
    ) -> HeadOutput:
        """Each pixel's features beside the context that it draws from the classes' features."""

        def layer(
            x: Float[Array, "b _ _ _"],
            features: int,
            name: str,
            kernel_size: int = 1,
            first: int = 0,
        ) -> Float[Array, "b _ _ _"]:
            x = conv(x, features, kernel_size, use_bias=True, name=f"{name}_{first}")
            return nn.relu(batch_norm(x, train=train, name=f"{name}_{first + 1}"))

        x = layer(x, self.width, "conv3x3", kernel_size=3)
        # One row of pixels, one for each class, so that convolutions and BatchNorms apply.
        objects = spatial_gather(x, aux_logits)[:, :, None]
        query, key = x, objects
        for first in (0, 2):
            query = layer(query, self.key_width, "f_pixel", first=first)
            key = layer(key, self.key_width, "f_object", first=first)
        value = layer(objects, self.key_width, "f_down")
        context = object_attention(query, key[:, :, 0], value[:, :, 0])
        context = layer(context, self.width, "f_up")
        x = layer(jnp.concatenate([context, x], axis=-1), self.width, "conv_bn_dropout")
        x = nn.Dropout(self.dropout_rate, broadcast_dims=(1, 2), deterministic=not train)(x)
        logits = conv(watch(x), self.num_classes, 1, use_bias=True, name="classifier")
        return HeadOutput(logits, x)


def spatial_gather(
    features: Float[Array, "b hs ws c"], logits: Float[Array, "b hs ws k"]
) -> Float[Array, "b k c"]:
    """The features of each class: the mean over pixels, weighted by exp(logit) of the class."""
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=(1, 2)).astype(features.dtype)
    return jnp.einsum("bhwk,bhwc->bkc", weights, features)


def object_attention(
    query: Float[Array, "b hs ws d"], key: Float[Array, "b k d"], value: Float[Array, "b k d"]
) -> Float[Array, "b hs ws d"]:
    """What each pixel draws from the classes: softmax over classes of q·k / √d, times v."""
    similarity = jnp.einsum("bhwd,bkd->bhwk", query, key) * key.shape[-1] ** -0.5
    weights = jax.nn.softmax(similarity.astype(jnp.float32), axis=-1).astype(value.dtype)
    return jnp.einsum("bhwk,bkd->bhwd", weights, value)
