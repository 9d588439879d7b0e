"""Convolutions in the form that XLA compiles best, to stand in for `lax.conv_general_dilated`.

Each takes what `nn.Conv` passes to that, and ignores what is always the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def pointwise(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "1 1 c c2"],
    strides: tuple[int, int],
    *_: Any,
    **__: Any,
) -> Float[Array, "b hs ws c2"]:
    """A 1x1 convolution, as the product of two matrices.

    As a convolution its kernel has a gradient that takes several times as long on a CPU. So does
    the gradient of a product whose left side has more than two axes.
    """
    x = x[:, :: strides[0], :: strides[1]]
    product = jnp.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0])
    return product.reshape(*x.shape[:3], -1)


def depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], *_: Any, **__: Any
) -> Float[Array, "b h w c"]:
    """A convolution of each channel with its own kernel of odd size, with padding `SAME`.

    On a CPU a sum of shifted maps, tens of times as fast there as the grouped convolution, which
    other devices compute.
    """
    return lax.platform_dependent(x, kernel, cpu=_sum_of_shifted, default=_grouped)


def _grouped(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
    return lax.conv_general_dilated(
        *(x, kernel, (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@jax.custom_vjp
def _sum_of_shifted(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
    """Accumulated in float32."""
    size, (_, height, width, _) = kernel.shape[0], x.shape
    padded = _pad(x, size)
    total = jnp.zeros(x.shape, jnp.float32)
    for i in range(size):
        for j in range(size):
            weights = kernel[i, j].astype(jnp.float32)[None, None]
            total += padded[:, i : i + height, j : j + width] * weights
    return total.astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum_of_shifted(x, kernel), (x, kernel)


def _backward(
    residuals: tuple[jax.Array, jax.Array], cotangent: Float[Array, "b h w c"]
) -> tuple[jax.Array, jax.Array]:
    """Gradients by the map, which is the mirrored convolution, and by the kernel."""
    x, kernel = residuals
    size, (batch, height, width, channels) = kernel.shape[0], x.shape
    padded, cotangent = _pad(x, size), cotangent.astype(jnp.float32)

    def of_tap(tap: jax.Array) -> Float[Array, "b c"]:
        shifted = lax.dynamic_slice(
            padded, (0, tap // size, tap % size, 0), (batch, height, width, channels)
        )
        # By rows first, whose sums are vectorised; by images last, once for all taps.
        return jnp.sum(jnp.sum(shifted * cotangent, axis=1), axis=1)

    of_kernel = jnp.sum(lax.map(of_tap, jnp.arange(size**2)), axis=1).reshape(kernel.shape)
    of_map = _sum_of_shifted(cotangent, kernel[::-1, ::-1])
    return of_map.astype(x.dtype), of_kernel.astype(kernel.dtype)


_sum_of_shifted.defvjp(_forward, _backward)


def _pad(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
    """In float32, with zeros around each map for kernels of this size."""
    margin = (size // 2, size // 2)
    return jnp.pad(x.astype(jnp.float32), ((0, 0), margin, margin, (0, 0)))


def materialize(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The same values; on a CPU computed once, not again within each operation that reads them.

    XLA fuses a sum into all that reads it, on a CPU even where its terms are such sums themselves:
    in a chain of n residual blocks, each would compute all those before it. The barrier holds if
    XLA_FLAGS has --xla_disable_hlo_passes=cse_barrier_expander, as `run/xla_flags.py` sets it;
    otherwise XLA drops it too early.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
