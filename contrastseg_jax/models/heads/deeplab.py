"""Heads of DeepLabV3 and DeepLabV3+."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastseg_jax.models.layers import (
    Features,
    HeadOutput,
    Watch,
    batch_norm,
    conv,
    conv_bn,
    unwatched,
)
from contrastseg_jax.ops.resize import resize_bilinear


class ASPP(nn.Module):
    """Features at several scales: dilated convolutions side by side, and the image's mean.

    Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017; the
    original's `lib/models/modules/decoder_block.py`.
    """

    width: int
    rates: tuple[int, int, int]  # dilations of the 3x3 convolutions
    project_size: int  # kernel of the convolution that joins the branches
    dropout_rate: float  # of single values of the result

    @nn.compact
    def __call__(self, x: Float[Array, "b hs ws c"], *, train: bool) -> Float[Array, "b hs ws c2"]:
        """A 1x1 convolution, one per rate, and one of the mean, each with BN and ReLU; joined."""
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        branches = [
            conv_bn(x, self.width, 1, train=train, name="b0"),
            *(
                conv_bn(x, self.width, 3, dilation=rate, train=train, name=f"b{i}")
                for i, rate in enumerate(self.rates, start=1)
            ),
            jnp.broadcast_to(
                conv_bn(mean, self.width, 1, train=train, name="b4"),
                (*x.shape[:3], self.width),
            ),
        ]
        x = nn.relu(jnp.concatenate(branches, axis=-1))
        x = conv_bn(x, self.width, self.project_size, train=train, name="project")
        return nn.Dropout(self.dropout_rate, deterministic=not train)(nn.relu(x))


class DeepLabV3Head(nn.Module):
    """Logits from an ASPP: the original's `lib/models/modules/decoder_block.py` as it stands.

    With a width of 256, a 1x1 convolution to join the branches and a ReLU after the refinement it
    is the standard one (torchvision's).
    """

    num_classes: int
    dropout_rate: float
    width: int = 512
    rates: tuple[int, int, int] = (12, 24, 36)
    project_size: int = 3
    refine_relu: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b hs ws c"], *, train: bool, watch: Watch = unwatched
    ) -> HeadOutput:
        """ASPP, 3x3 convolution, BN, 1x1 convolution."""
        aspp = ASPP(self.width, self.rates, self.project_size, self.dropout_rate, name="aspp")
        x = conv_bn(aspp(x, train=train), self.width, 3, train=train, name="refine")
        x = nn.relu(x) if self.refine_relu else x
        logits = conv(watch(x), self.num_classes, 1, use_bias=True, name="refine_2")
        return HeadOutput(logits, x)


class DeepLabV3PlusNeck(nn.Module):
    """Features of an ASPP, brought to the resolution of layer1 and joined with it.

    Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
    Segmentation", ECCV 2018. Its decoder, without separable convolutions, is this and
    `DeepLabV3PlusHead`.
    """

    rates: tuple[int, int, int] = (6, 12, 18)  # for output stride 16

    @nn.compact
    def __call__(self, features: Features, *, train: bool) -> Float[Array, "b h4 w4 304"]:
        """256 channels of the ASPP beside 48 of layer1."""
        x = ASPP(256, self.rates, 1, 0.0, name="aspp")(features["last"], train=train)
        low = nn.relu(conv_bn(features["layer1"], 48, 1, train=train, name="low_level"))
        return jnp.concatenate([resize_bilinear(x, (low.shape[1], low.shape[2])), low], axis=-1)


class DeepLabV3PlusHead(nn.Module):
    """Logits from the features that `DeepLabV3PlusNeck` has joined."""

    num_classes: int
    dropout_rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b hs ws c"], *, train: bool, watch: Watch = unwatched
    ) -> HeadOutput:
        """Twice 3x3 convolution, BN and ReLU; dropout of whole channels, 1x1 convolution."""
        for i in (1, 2):
            x = conv(x, 256, 3, name=f"conv{i}")
            x = nn.relu(batch_norm(x, train=train, name=f"bn{i}"))
        x = nn.Dropout(self.dropout_rate, broadcast_dims=(1, 2), deterministic=not train)(x)
        logits = conv(watch(x), self.num_classes, 1, use_bias=True, name="conv3")
        return HeadOutput(logits, x)
