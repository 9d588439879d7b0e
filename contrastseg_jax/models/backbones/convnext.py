"""ConvNeXt: a convolutional network built as a Swin transformer is.

Liu et al., "A ConvNet for the 2020s", CVPR 2022, in the form of torchvision, whose names its
modules carry, indices joined by `_`: `features.1.0.block.0` is `features_1_0/block_0`.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from contrastseg_jax.models.backbones.contract import (
    Backbone,
    Peer,
    Shapes,
    TorchNames,
    count_modules,
    kernel_width,
)
from contrastseg_jax.models.layers import Features, depthwise_conv, layer_norm, maybe_remat
from contrastseg_jax.ops.convolution import materialize


@dataclass(frozen=True)
class ConvNeXtSpec:
    """Everything in which one ConvNeXt differs from another."""

    num_blocks: tuple[int, int, int, int]  # at strides 4, 8, 16, 32
    widths: tuple[int, int, int, int] = (96, 192, 384, 768)  # channels there
    drop_rate: float = 0.0  # share of images for which the last block is left out; the first: 0


CONVNEXT_SPECS = {
    "convnext_tiny": ConvNeXtSpec((3, 3, 9, 3), drop_rate=0.1),
    "convnext_small": ConvNeXtSpec((3, 3, 27, 3), drop_rate=0.4),
}

TORCH_NAMES = TorchNames(
    "ConvNeXt",
    modules=re.compile(r"features\..*"),
    unused=re.compile(r"classifier\.[02]\.(weight|bias)"),
)
OF_TORCHVISION = {spec: name for name, spec in CONVNEXT_SPECS.items()}


def backbone(spec: ConvNeXtSpec) -> Backbone:
    """All that others need to know of a ConvNeXt."""
    settings = {"return_nodes": [ConvNeXt.STAGES[-1].replace("_", ".")]}
    return Backbone(
        build=partial(ConvNeXt, spec),
        stages=ConvNeXt.STAGES,
        parts=ConvNeXt.PARTS,
        weights=spec,
        torch_names=TORCH_NAMES,
        recognizes=partial(_recognizes, spec),
        peer=Peer("torchvision", OF_TORCHVISION[spec], settings)
        if spec in OF_TORCHVISION
        else None,
    )


def _recognizes(spec: ConvNeXtSpec, shapes: Shapes) -> bool:
    """Whether a file has as many blocks behind a stem as wide."""
    found = tuple(count_modules(shapes, stage) for stage in ConvNeXt.STAGES)
    return (found, kernel_width(shapes, "features_0_0")) == (spec.num_blocks, spec.widths[0])


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, then two layers on each pixel, around a shortcut."""

    drop_rate: float  # share of images for which the block is left out in training

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        """Apply the block; what it adds is divided by how often it is there."""
        width = x.shape[-1]
        y = layer_norm(depthwise_conv(x, 7, name="block_0"), name="block_2")
        y = nn.Dense(4 * width, dtype=x.dtype, name="block_3")(y)
        y = nn.Dense(width, dtype=x.dtype, name="block_5")(nn.gelu(y, approximate=False))
        scale = self.param("layer_scale", nn.initializers.constant(1e-6), (1, 1, width))
        y = y * scale[None].astype(x.dtype)
        # Of whole images, as torchvision's StochasticDepth in mode "row".
        drop = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3), deterministic=not train)
        return materialize(x + drop(y))


class ConvNeXt(nn.Module):
    """Stem and four stages of blocks, with a reduction to half the size between two."""

    spec: ConvNeXtSpec
    remat: tuple[str, ...] = ()  # of STAGES: computed again for the gradient, to save memory
    freeze: tuple[str, ...] = ()  # of PARTS: computed in training as outside it

    STAGES = ("features_1", "features_3", "features_5", "features_7")
    PARTS: ClassVar = {
        "stem": ("features_0",),
        "features_1": ("features_1",),
        "features_3": ("features_2", "features_3"),
        "features_5": ("features_4", "features_5"),
        "features_7": ("features_6", "features_7"),
    }

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool) -> Features:
        """Features at strides 4, 8, 16 and 32: layer1, layer2, layer3 and last."""
        spec = self.spec
        x = patches(image, spec.widths[0], 4, name="features_0_0")
        x = layer_norm(x, name="features_0_1")
        outputs, block, num_blocks = [], 0, sum(spec.num_blocks)
        for i, stage in enumerate(self.STAGES):
            if i > 0:
                x = layer_norm(x, name=f"features_{2 * i}_0")
                x = patches(x, spec.widths[i], 2, name=f"features_{2 * i}_1")
            stage_block: Any = maybe_remat(ConvNeXtBlock, stage in self.remat)
            for j in range(spec.num_blocks[i]):
                drop_rate = spec.drop_rate * block / max(num_blocks - 1, 1)
                x = stage_block(drop_rate, name=f"{stage}_{j}")(
                    x, train and stage not in self.freeze
                )
                block += 1
            outputs.append(x)
        return dict(zip(("layer1", "layer2", "layer3", "last"), outputs, strict=True))


def patches(
    x: Float[Array, "b h w c"], features: int, size: int, *, name: str
) -> Float[Array, "b hs ws c2"]:
    """Features of each patch of size x size pixels.

    Sides that are no multiple of it are filled up with zeros at their ends. torchvision leaves out
    the pixels that make no whole patch, so results agree where the image's sides are multiples of
    32.
    """
    padding = tuple((0, -side % size) for side in x.shape[1:3])
    layer = nn.Conv(features, (size, size), (size, size), padding, dtype=x.dtype, name=name)
    return layer(x)
