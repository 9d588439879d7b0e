"""ResNet, with dilation in place of stride where a head needs finer features.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, in the form of torchvision
(the 3x3 convolution of a bottleneck carries the stride); the original's
`lib/models/backbones/resnet/`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import flax.linen as nn
from jaxtyping import Array, Float

from contrastseg_jax.models.backbones.contract import (
    Backbone,
    Peer,
    Shapes,
    Table,
    TorchNames,
    count_modules,
    kernel_width,
)
from contrastseg_jax.models.layers import Features, batch_norm, conv, conv_bn, maybe_remat
from contrastseg_jax.ops.convolution import materialize
from contrastseg_jax.structs import IMAGENET, ImageFormat


@dataclass(frozen=True)
class ResNetSpec:
    """Everything in which one ResNet differs from another."""

    num_blocks: tuple[int, int, int, int]  # in layers 1 to 4
    block: Literal["basic", "bottleneck"] = "bottleneck"
    stem: Literal["conv7", "deep"] = "conv7"  # one 7x7 convolution, or the original's three of 3x3
    ceil_mode: bool = False  # the max-pool's: an even side gets one cell more (the original's)
    output_stride: Literal[8, 16, 32] = 32
    multi_grid: tuple[int, ...] = ()  # factors on the dilation of layer 4's blocks, if dilated


RESNET_SPECS = {
    "r18": ResNetSpec((2, 2, 2, 2), "basic"),
    "r34": ResNetSpec((3, 4, 6, 3), "basic"),
    "r50": ResNetSpec((3, 4, 6, 3)),
    "r101": ResNetSpec((3, 4, 23, 3)),
    "r152": ResNetSpec((3, 8, 36, 3)),
}

# The original reads images as BGR, and subtracts a mean alone.
ORIGINAL_FORMAT = ImageFormat((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0), "BGR")


def _of_deep_stem(names: Collection[str]) -> Table:
    """An ImageNet file of the original's deep stem has its three convolutions at the top."""
    return ((r"(conv|bn)([123])", r"resinit.\1\2"),) if "conv3.weight" in names else ()


TORCH_NAMES = TorchNames(
    "ResNet",
    modules=re.compile(r"(conv[123]|bn[123]|resinit|layer\d)\..*"),
    renamed=_of_deep_stem,
)


def backbone(spec: ResNetSpec) -> Backbone:
    """All that others need to know of a ResNet."""
    is_original = spec.stem == "deep"
    image_format = ORIGINAL_FORMAT if is_original else IMAGENET
    depth = 2 + sum(spec.num_blocks) * (3 if spec.block == "bottleneck" else 2)
    settings = {"output_stride": spec.output_stride, "out_indices": (4,)}
    has_peer = not (is_original or spec.ceil_mode or spec.multi_grid)
    return Backbone(
        build=partial(ResNet, spec),
        stages=ResNet.STAGES,
        parts=ResNet.PARTS,
        weights=replace(spec, output_stride=32, ceil_mode=False, multi_grid=()),
        torch_names=TORCH_NAMES,
        recognizes=partial(_recognizes, spec),
        image_format=image_format,
        whole_format=image_format,
        # timm's: torchvision's ResNet-18 cannot be dilated.
        peer=Peer("timm", f"resnet{depth}", settings) if has_peer else None,
    )


def _recognizes(spec: ResNetSpec, shapes: Shapes) -> bool:
    """Whether a file has as many blocks, of the same kind, behind the same stem."""
    found = tuple(count_modules(shapes, stage) for stage in ResNet.STAGES)
    is_deep = any(path[0] == "resinit" for path in shapes)
    is_bottleneck = kernel_width(shapes, "layer1_0", "conv3") > 0
    expected = spec.num_blocks, spec.stem == "deep", spec.block == "bottleneck"
    return (found, is_deep, is_bottleneck) == expected


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, as in ResNet-34."""

    width: int
    stride: int = 1
    dilations: tuple[int, int] = (1, 1)  # of the convolution that carries the stride, of others

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b hs ws c2"]:
        """Apply the block; where the shape changes, the shortcut is projected."""
        first, second = self.dilations
        y = conv(x, self.width, 3, stride=self.stride, dilation=first, name="conv1")
        y = nn.relu(batch_norm(y, train=train, name="bn1"))
        y = conv(y, self.width, 3, dilation=second, name="conv2")
        y = batch_norm(y, train=train, name="bn2")
        return materialize(nn.relu(_shortcut(x, y, self.stride, train=train) + y))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut, as in ResNet-50; 4 * `width` channels."""

    width: int
    stride: int = 1
    dilations: tuple[int, int] = (1, 1)  # as of BasicBlock; its one 3x3 carries the stride

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b hs ws c4"]:
        """Apply the block; where the shape changes, the shortcut is projected."""
        y = conv(x, self.width, 1, name="conv1")
        y = nn.relu(batch_norm(y, train=train, name="bn1"))
        y = conv(y, self.width, 3, stride=self.stride, dilation=self.dilations[0], name="conv2")
        y = nn.relu(batch_norm(y, train=train, name="bn2"))
        y = conv(y, 4 * self.width, 1, name="conv3")
        y = batch_norm(y, train=train, name="bn3")
        return materialize(nn.relu(_shortcut(x, y, self.stride, train=train) + y))


class DeepStem(nn.Module):
    """Three 3x3 convolutions to stride 2 and 128 channels, in place of one 7x7 to 64."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b hs ws 128"]:
        """Apply the stem."""
        for i, (features, stride) in enumerate(((64, 2), (64, 1), (128, 1)), start=1):
            x = conv(x, features, 3, stride=stride, name=f"conv{i}")
            x = nn.relu(batch_norm(x, train=train, name=f"bn{i}"))
        return x


class ResNet(nn.Module):
    """Stem, max-pool and four layers of blocks."""

    spec: ResNetSpec
    remat: tuple[str, ...] = ()  # of STAGES: computed again for the gradient, to save memory
    freeze: tuple[str, ...] = ()  # of PARTS: computed in training as outside it

    STAGES = ("layer1", "layer2", "layer3", "layer4")
    PARTS: ClassVar = {"stem": ("conv1", "bn1", "resinit")} | {name: (name,) for name in STAGES}

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool) -> Features:
        """Features of layer1 (stride 4), layer3, and as "last" of layer4 (output stride)."""
        spec = self.spec
        trains = {part: train and part not in self.freeze for part in self.PARTS}
        if spec.stem == "deep":
            x = DeepStem(name="resinit")(image, train=trains["stem"])
        else:
            x = conv(image, 64, 7, stride=2, name="conv1")
            x = nn.relu(batch_norm(x, train=trains["stem"], name="bn1"))
        x = max_pool(x, ceil_mode=spec.ceil_mode)
        block: Any = Bottleneck if spec.block == "bottleneck" else BasicBlock
        outputs = []
        for i, plan in enumerate(block_plan(spec)):
            name, width = self.STAGES[i], 64 * 2**i
            stage_block = maybe_remat(block, name in self.remat)
            for j, (stride, dilations) in enumerate(plan):
                x = stage_block(width, stride, dilations, name=f"{name}_{j}")(x, trains[name])
            outputs.append(x)
        return {"layer1": outputs[0], "layer3": outputs[2], "last": outputs[3]}


def block_plan(spec: ResNetSpec) -> list[list[tuple[int, tuple[int, int]]]]:
    """For each block of each layer: its stride, and the dilations of its 3x3 convolutions.

    A layer whose stride would exceed the output stride has stride 1 and twice the dilation d of the
    one before. The convolution that lost its stride has dilation d / 2 (where its stride was, its
    neighbours still are that close), all others d.
    """
    plan, reached, dilation = [], 4, 1
    for layer, num_blocks in enumerate(spec.num_blocks, start=1):
        stride = 1 if layer == 1 else 2
        dilated = reached * stride > spec.output_stride
        if dilated:
            stride, dilation = 1, dilation * 2
        reached *= stride
        blocks = []
        for i in range(num_blocks):
            factor = spec.multi_grid[i] if layer == 4 and dilated and spec.multi_grid else 1
            d = dilation * factor
            blocks.append((stride if i == 0 else 1, (d // 2 if dilated and i == 0 else d, d)))
        plan.append(blocks)
    return plan


def max_pool(x: Float[Array, "b h w c"], *, ceil_mode: bool) -> Float[Array, "b hs ws c"]:
    """The largest of each 3x3 window, at stride 2: PyTorch's `MaxPool2d(3, 2, 1, ceil_mode)`.

    A side n becomes ceil((n - 1) / 2) + 1 with `ceil_mode` and floor((n - 1) / 2) + 1 without.
    PyTorch leaves out a last window that lies in the padding behind the input; here none does.
    """
    padding: Any = []  # Flax declares it as a string only
    for size in x.shape[1:3]:
        windows = (size // 2 if ceil_mode else (size - 1) // 2) + 1
        padding.append((1, max(0, 2 * (windows - 1) + 3 - size - 1)))
    return nn.max_pool(x, (3, 3), (2, 2), padding)


def _shortcut(
    x: Float[Array, "b h w c"], y: Float[Array, "b hs ws c2"], stride: int, *, train: bool
) -> Float[Array, "b hs ws c2"]:
    """The input of a block as it is added to `y`, projected where their shapes differ."""
    if stride == 1 and x.shape[-1] == y.shape[-1]:
        return x
    return conv_bn(x, y.shape[-1], 1, stride=stride, train=train, name="downsample")
