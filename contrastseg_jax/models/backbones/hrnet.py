"""HRNetV2: a backbone that keeps a high-resolution branch from end to end.

Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition", TPAMI 2020;
the original's `lib/models/backbones/hrnet/`. Submodules carry the names of the original's state
dict, indices joined by `_`: `stage4.2.fuse_layers.0.3.1` is `stage4_2/fuse_layers_0_3_1`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastseg_jax.models.backbones.contract import (
    Backbone,
    Peer,
    Shapes,
    TorchNames,
    count_modules,
    kernel_width,
)
from contrastseg_jax.models.backbones.resnet import BasicBlock, Bottleneck
from contrastseg_jax.models.layers import Features, batch_norm, conv, conv_bn, maybe_remat
from contrastseg_jax.ops.convolution import materialize
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.structs import IMAGENET, ImageFormat


@dataclass(frozen=True)
class HRNetSpec:
    """Everything in which one HRNet differs from another."""

    widths: tuple[int, int, int, int]  # channels of the branches at strides 4, 8, 16, 32
    num_modules: tuple[int, int, int] = (1, 4, 3)  # exchanges between branches in stages 2, 3, 4
    num_blocks: int = 4  # of layer1, and of each branch between two exchanges
    stem_width: int = 64  # of the stem; layer1 has four times as many channels


# As published, but for hrnet_tiny: this project's own, for two CPU cores.
HRNET_SPECS = {
    "hrnet_tiny": HRNetSpec((16, 24, 32, 48), num_modules=(1, 1, 1), num_blocks=1, stem_width=16),
    "hrnet_w18_small": HRNetSpec((18, 36, 72, 144), num_modules=(1, 3, 2), num_blocks=2),
    "hrnet_w18": HRNetSpec((18, 36, 72, 144)),
    "hrnet_w32": HRNetSpec((32, 64, 128, 256)),
    "hrnet_w40": HRNetSpec((40, 80, 160, 320)),
    "hrnet_w48": HRNetSpec((48, 96, 192, 384)),
}

TORCH_NAMES = TorchNames(
    "HRNetV2",
    modules=re.compile(r"(conv[12]|bn[12]|layer1|stage\d|transition\d)\..*"),
    unused=re.compile(r"(incre_modules|downsamp_modules|final_layer)\..*"),
)
# The original reads images as BGR, and normalises with statistics in the order of RGB.
ORIGINAL_FORMAT = ImageFormat(IMAGENET.mean[::-1], IMAGENET.std[::-1], "BGR")
# timm's hrnet_w18_small is smaller than the published one, its hrnet_w18_small_v2 is that one.
OF_TIMM = {
    HRNET_SPECS[name]: f"{name}_v2" if name.endswith("small") else name
    for name in ("hrnet_w18_small", "hrnet_w18", "hrnet_w32", "hrnet_w40", "hrnet_w48")
}


def backbone(spec: HRNetSpec) -> Backbone:
    """All that others need to know of an HRNet."""
    # The maps of all branches as they leave stage4.
    settings = {"feature_location": "", "out_indices": (1, 2, 3, 4)}
    return Backbone(
        build=partial(HRNet, spec),
        stages=HRNet.STAGES,
        parts=HRNet.PARTS,
        weights=spec,
        torch_names=TORCH_NAMES,
        recognizes=partial(_recognizes, spec),
        whole_format=ORIGINAL_FORMAT,
        peer=Peer("timm", OF_TIMM[spec], settings) if spec in OF_TIMM else None,
    )


def _recognizes(spec: HRNetSpec, shapes: Shapes) -> bool:
    """Whether a file has as many exchanges, and a first branch as wide."""
    found = tuple(count_modules(shapes, stage) for stage in ("stage2", "stage3", "stage4"))
    width = kernel_width(shapes, "stage4_0", "branches_0_0", "conv1")
    return (found, width) == (spec.num_modules, spec.widths[0])


class HRModule(nn.Module):
    """Blocks on every branch, then an exchange: each branch receives the sum of all."""

    num_blocks: int

    @nn.compact
    def __call__(
        self, branches: Sequence[Float[Array, "b _ _ _"]], train: bool
    ) -> list[Float[Array, "b _ _ _"]]:
        """Keep the shape of every branch; `branches` go from high to low resolution."""
        branches = list(branches)
        for i in range(len(branches)):
            for block in range(self.num_blocks):
                name = f"branches_{i}_{block}"
                width = branches[i].shape[-1]
                branches[i] = BasicBlock(width, name=name)(branches[i], train)
        return [
            materialize(
                nn.relu(sum(_exchange(branches, i, j, train=train) for j in range(len(branches))))
            )
            for i in range(len(branches))
        ]


class HRNet(nn.Module):
    """HRNetV2: stem, layer1, and three stages that each add a branch of half the resolution."""

    spec: HRNetSpec
    remat: tuple[str, ...] = ()  # of STAGES: computed again for the gradient, to save memory
    freeze: tuple[str, ...] = ()  # of PARTS: computed in training as outside it

    STAGES = ("layer1", "stage2", "stage3", "stage4")
    PARTS: ClassVar = {
        "stem": ("conv", "bn"),
        "layer1": ("layer1",),
        "stage2": ("transition1", "stage2"),
        "stage3": ("transition2", "stage3"),
        "stage4": ("transition3", "stage4"),
    }

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool) -> Features:
        """Features at stride 4, as "last": the four branches, upsampled and concatenated."""
        spec = self.spec
        trains = {part: train and part not in self.freeze for part in self.PARTS}
        x = image
        for i in (1, 2):
            x = conv(x, spec.stem_width, 3, stride=2, name=f"conv{i}")
            x = nn.relu(batch_norm(x, train=trains["stem"], name=f"bn{i}"))
        bottleneck: Any = maybe_remat(Bottleneck, "layer1" in self.remat)
        for block in range(spec.num_blocks):
            x = bottleneck(spec.stem_width, name=f"layer1_{block}")(x, trains["layer1"])

        branches = [x]
        for stage, num_modules in zip((2, 3, 4), spec.num_modules, strict=True):
            name = f"stage{stage}"
            branches = _transition(
                branches, spec.widths[:stage], train=trains[name], name=f"transition{stage - 1}"
            )
            hr_module: Any = maybe_remat(HRModule, name in self.remat)
            for i in range(num_modules):
                branches = hr_module(spec.num_blocks, name=f"{name}_{i}")(branches, trains[name])

        _, height, width, _ = branches[0].shape
        branches = [resize_bilinear(x, (height, width)) for x in branches]
        return {"last": jnp.concatenate(branches, axis=-1)}


def _transition(
    branches: list[Float[Array, "b _ _ _"]], widths: Sequence[int], *, train: bool, name: str
) -> list[Float[Array, "b _ _ _"]]:
    """Bring every branch to its width, and derive a new branch from the last one."""
    *kept, new = widths
    result = []
    for i, (x, width) in enumerate(zip(branches, kept, strict=True)):
        if x.shape[-1] != width:
            x = nn.relu(conv_bn(x, width, 3, train=train, name=f"{name}_{i}"))
        result.append(x)
    x = conv_bn(branches[-1], new, 3, stride=2, train=train, name=f"{name}_{len(kept)}_0")
    return [*result, nn.relu(x)]


def _exchange(
    branches: list[Float[Array, "b _ _ _"]], target: int, source: int, *, train: bool
) -> Float[Array, "b _ _ _"]:
    """What branch `target` receives from branch `source`."""
    x, (_, height, width, features) = branches[source], branches[target].shape
    name = f"fuse_layers_{target}_{source}"
    if source > target:
        x = conv_bn(x, features, 1, train=train, name=name)
        return resize_bilinear(x, (height, width))
    for step in range(target - source):
        last = step == target - source - 1
        out = features if last else x.shape[-1]
        x = conv_bn(x, out, 3, stride=2, train=train, name=f"{name}_{step}")
        x = x if last else nn.relu(x)
    return x
