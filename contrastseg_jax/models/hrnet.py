"""HRNetV2: a backbone that keeps a high-resolution branch from end to end.

Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition", TPAMI 2020;
the original's `lib/models/backbones/hrnet/`. Submodules carry the names of the original's state
dict, indices joined by `_`: `stage4.2.fuse_layers.0.3.1` is `stage4_2/fuse_layers_0_3_1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastseg_jax.resize import resize_bilinear


@dataclass(frozen=True)
class HRNetSpec:
    """Everything in which one HRNet differs from another."""

    widths: tuple[int, int, int, int]  # channels of the branches at strides 4, 8, 16, 32
    num_modules: tuple[int, int, int] = (1, 4, 3)  # exchanges between branches in stages 2, 3, 4
    num_blocks: int = 4  # of layer1, and of each branch between two exchanges
    stem_width: int = 64  # of the stem; layer1 has four times as many channels


HRNET_SPECS = {
    "hrnet_tiny": HRNetSpec((16, 24, 32, 48), num_modules=(1, 1, 1), num_blocks=1, stem_width=16),
    "hrnet_w18_small": HRNetSpec((18, 36, 72, 144), num_modules=(1, 3, 2), num_blocks=2),
    "hrnet_w18": HRNetSpec((18, 36, 72, 144)),
    "hrnet_w32": HRNetSpec((32, 64, 128, 256)),
    "hrnet_w48": HRNetSpec((48, 96, 192, 384)),
}

# PyTorch's momentum 0.1 is Flax's 0.9. Train-mode outputs agree; the running variance does not
# quite: PyTorch's is unbiased, so n / (n - 1) times Flax's for n = b * h * w.
# `axis_name` stays None: under `jit` the statistics already are those of the global batch.
batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def conv(
    features: int, kernel_size: int, *, stride: int = 1, use_bias: bool = False, name: str
) -> nn.Conv:
    """A convolution with PyTorch's padding, which is not `SAME` for stride 2 and even sizes."""
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=kernel_size // 2,
        use_bias=use_bias,
        name=name,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, as in ResNet-34. Keeps the width."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        """Apply the block."""
        width = x.shape[-1]
        y = conv(width, 3, name="conv1")(x)
        y = nn.relu(batch_norm(not train, name="bn1")(y))
        y = conv(width, 3, name="conv2")(y)
        y = batch_norm(not train, name="bn2")(y)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut, as in ResNet-50; 4 * `width` channels."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c4"]:
        """Apply the block; where the number of channels changes, the shortcut is projected."""
        y = conv(self.width, 1, name="conv1")(x)
        y = nn.relu(batch_norm(not train, name="bn1")(y))
        y = conv(self.width, 3, name="conv2")(y)
        y = nn.relu(batch_norm(not train, name="bn2")(y))
        y = conv(4 * self.width, 1, name="conv3")(y)
        y = batch_norm(not train, name="bn3")(y)
        if x.shape[-1] != y.shape[-1]:
            x = _conv_bn(x, y.shape[-1], 1, train=train, name="downsample")
        return nn.relu(x + y)


class HRModule(nn.Module):
    """Blocks on every branch, then an exchange: each branch receives the sum of all."""

    num_blocks: int

    @nn.compact
    def __call__(
        self, branches: Sequence[Float[Array, "b _ _ _"]], *, train: bool
    ) -> list[Float[Array, "b _ _ _"]]:
        """Keep the shape of every branch; `branches` go from high to low resolution."""
        branches = list(branches)
        for i in range(len(branches)):
            for block in range(self.num_blocks):
                name = f"branches_{i}_{block}"
                branches[i] = BasicBlock(name=name)(branches[i], train=train)
        return [
            nn.relu(sum(_exchange(branches, i, j, train=train) for j in range(len(branches))))
            for i in range(len(branches))
        ]


class HRNet(nn.Module):
    """HRNetV2: stem, layer1, and three stages that each add a branch of half the resolution."""

    spec: HRNetSpec

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b hs ws c"]:
        """Features at stride 4: the four branches, upsampled and concatenated."""
        spec = self.spec
        x = image
        for i in (1, 2):
            x = conv(spec.stem_width, 3, stride=2, name=f"conv{i}")(x)
            x = nn.relu(batch_norm(not train, name=f"bn{i}")(x))
        for block in range(spec.num_blocks):
            x = Bottleneck(spec.stem_width, name=f"layer1_{block}")(x, train=train)

        branches = [x]
        for stage, num_modules in zip((2, 3, 4), spec.num_modules, strict=True):
            branches = _transition(
                branches, spec.widths[:stage], train=train, name=f"transition{stage - 1}"
            )
            for module in range(num_modules):
                name = f"stage{stage}_{module}"
                branches = HRModule(spec.num_blocks, name=name)(branches, train=train)

        _, height, width, _ = branches[0].shape
        return jnp.concatenate([resize_bilinear(x, (height, width)) for x in branches], axis=-1)


def _transition(
    branches: list[Float[Array, "b _ _ _"]], widths: Sequence[int], *, train: bool, name: str
) -> list[Float[Array, "b _ _ _"]]:
    """Bring every branch to its width, and derive a new branch from the last one."""
    *kept, new = widths
    result = []
    for i, (x, width) in enumerate(zip(branches, kept, strict=True)):
        if x.shape[-1] != width:
            x = nn.relu(_conv_bn(x, width, 3, train=train, name=f"{name}_{i}"))
        result.append(x)
    x = _conv_bn(branches[-1], new, 3, stride=2, train=train, name=f"{name}_{len(kept)}_0")
    return [*result, nn.relu(x)]


def _exchange(
    branches: list[Float[Array, "b _ _ _"]], target: int, source: int, *, train: bool
) -> Float[Array, "b _ _ _"]:
    """What branch `target` receives from branch `source`."""
    x, (_, height, width, features) = branches[source], branches[target].shape
    name = f"fuse_layers_{target}_{source}"
    if source > target:
        x = _conv_bn(x, features, 1, train=train, name=name)
        return resize_bilinear(x, (height, width))
    for step in range(target - source):
        last = step == target - source - 1
        out = features if last else x.shape[-1]
        x = _conv_bn(x, out, 3, stride=2, train=train, name=f"{name}_{step}")
        x = x if last else nn.relu(x)
    return x


def _conv_bn(
    x: Float[Array, "b h w c"],
    features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    train: bool,
    name: str,
) -> Float[Array, "b hs ws c2"]:
    """The original's `Sequential(conv, bn)`: elements 0 and 1 of `name`."""
    x = conv(features, kernel_size, stride=stride, name=f"{name}_0")(x)
    return batch_norm(not train, name=f"{name}_1")(x)
