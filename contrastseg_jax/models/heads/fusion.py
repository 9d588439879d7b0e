"""One map of features from those of all strides."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastseg_jax.models.layers import Features, batch_norm, conv, layer_norm
from contrastseg_jax.ops.resize import resize_bilinear


class FusionNeck(nn.Module):
    """Each stride's features brought to one width and to the size of the finest, and joined.

    Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with
    Transformers", NeurIPS 2021: its decoder without the classifier. Features are normalised first,
    as ConvNeXt's own segmentation code does, whose backbone's stages end in sums of any size.
    """

    width: int = 256
    inputs: tuple[str, ...] = ("layer1", "layer2", "layer3", "last")

    @nn.compact
    def __call__(self, features: Features, *, train: bool) -> Float[Array, "b hs ws c"]:
        """LayerNorm, 1x1 convolution and resizing of each; 1x1 convolution of all, BN, ReLU."""
        size = features[self.inputs[0]].shape[1:3]
        maps = []
        for name in self.inputs:
            x = layer_norm(features[name], name=f"{name}_norm")
            x = conv(x, self.width, 1, use_bias=True, name=f"{name}_project")
            maps.append(resize_bilinear(x, (size[0], size[1])))
        x = conv(jnp.concatenate(maps, axis=-1), self.width, 1, name="fuse_0")
        return nn.relu(batch_norm(x, train=train, name="fuse_1"))
