"""What every network is made of. Each layer computes in the type of its input.

So a network computes in the type to which its image is cast: parameters stay float32, and BatchNorm
takes its statistics and normalises in float32 whatever its input.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from contrastseg_jax.ops.convolution import depthwise, pointwise

Features = dict[str, Float[Array, "b _ _ _"]]  # of a backbone: by layer, the final ones as "last"

Watch = Callable[[Array], Array]  # the identity, but that it may note what passes, or its gradient


class HeadOutput(NamedTuple):
    """Logits, and the features of which a head's last 1x1 convolution makes them."""

    logits: Float[Array, "b hs ws k"]
    features: Float[Array, "b hs ws c"]


def unwatched(x: Array) -> Array:
    """The same."""
    return x


def conv(
    x: Float[Array, "b h w c"],
    features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    use_bias: bool = False,
    name: str,
) -> Float[Array, "b hs ws c2"]:
    """A convolution with PyTorch's padding, which is not `SAME` for stride 2 and even sizes."""
    layer = nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=dilation * (kernel_size // 2),
        kernel_dilation=dilation,
        use_bias=use_bias,
        dtype=x.dtype,
        name=name,
        conv_general_dilated_cls=(lambda: pointwise) if kernel_size == 1 else None,
    )
    return layer(x)


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel_size: int, *, name: str
) -> Float[Array, "b h w c"]:
    """A convolution of each channel with its own kernel, of odd size."""
    layer = nn.Conv(
        x.shape[-1],
        (kernel_size, kernel_size),
        feature_group_count=x.shape[-1],
        dtype=x.dtype,
        name=name,
        conv_general_dilated_cls=lambda: depthwise,
    )
    return layer(x)


def batch_norm(x: Float[Array, "b h w c"], *, train: bool, name: str) -> Float[Array, "b h w c"]:
    """BatchNorm with PyTorch's momentum of 0.1, which is 0.9 in Flax, and its epsilon.

    Train-mode outputs agree; the running variance does not quite: PyTorch's is unbiased, so
    n / (n - 1) times this one for n = b * h * w.
    """
    # `axis_name` stays None: under `jit` the statistics already are those of the global batch.
    layer = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=x.dtype, name=name)
    with jax.numpy_dtype_promotion("standard"):  # Flax subtracts a float32 mean from bfloat16
        return layer(x)


def layer_norm(x: Float[Array, "b h w c"], *, name: str) -> Float[Array, "b h w c"]:
    """LayerNorm over each pixel's channels, with ConvNeXt's epsilon."""
    # A variance as the mean of squares less the squared mean would lose digits.
    layer = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=x.dtype, name=name)
    with jax.numpy_dtype_promotion("standard"):  # as in BatchNorm
        return layer(x)


def conv_bn(
    x: Float[Array, "b h w c"],
    features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    use_bias: bool = False,
    train: bool,
    name: str,
) -> Float[Array, "b hs ws c2"]:
    """The original's `Sequential(conv, bn)`: elements 0 and 1 of `name`."""
    x = conv(
        x,
        features,
        kernel_size,
        stride=stride,
        dilation=dilation,
        use_bias=use_bias,
        name=f"{name}_0",
    )
    return batch_norm(x, train=train, name=f"{name}_1")


def maybe_remat(block: type[nn.Module], remat: bool) -> type[nn.Module]:
    """A block of `__call__(x, train)` that, with `remat`, is computed again for its gradient."""
    return nn.remat(block, static_argnums=(2,)) if remat else block
