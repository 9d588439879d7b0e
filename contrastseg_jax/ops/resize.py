"""Bilinear resizing with aligned corners, argmax of resized logits, and labels at a stride."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, Int, UInt8

# Largest interpolation matrix, in elements: that of 512 -> 2048. It grows quadratically with the
# side, so longer axes are gathered instead.
MATRIX_SIZE = 1 << 20


class Taps(NamedTuple):
    """Linear interpolation along an axis: output i is the sum of weight[i] * x[index[i]]."""

    index: Any  # i32[... new taps]
    weight: Any  # f[... new taps]


def resize_bilinear(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Resize to `size` (h2, w2); corner pixels keep their position and value.

    As PyTorch's `F.interpolate(mode="bilinear", align_corners=True)`, which the original uses for
    features and logits alike: output i reads the input at i * (h - 1) / (h2 - 1), or at 0 where
    h2 is 1. No anti-aliasing when shrinking.

    Each axis is a small matrix product, as the gradient of a gather is a scatter. Only where the
    matrix would exceed `MATRIX_SIZE` a gather is used.
    """
    b, h, _, c = x.shape
    h2, w2 = size
    x = resize_columns(x, w2)
    if h2 == h:
        return x
    if h * h2 <= MATRIX_SIZE:
        return interpolate_rows(x, row_matrix(h, h2))
    return _gather(x, _taps(h, h2), axis=1).reshape(b, h2, w2, c)


def resize_columns(x: Float[Array, "b h w c"], w2: int) -> Float[Array, "b h w2 c"]:
    """`resize_bilinear` of the width alone."""
    w = x.shape[2]
    if w2 == w:
        return x
    taps = _taps(w, w2)
    if w * w2 > MATRIX_SIZE:
        return _gather(x, taps, axis=2)
    columns = jnp.asarray(_matrix(taps, w), x.dtype)
    return jnp.einsum("vw,bhwc->bhvc", columns, x, precision=Precision.HIGHEST)


def interpolate_rows(x: Float[Array, "b h w c"], matrix: Any) -> Float[Array, "b h2 w c"]:
    """Rows that are sums of the rows of `x`, by a matrix `f[h2 h]`."""
    b, h, w, c = x.shape
    # One product per image over flattened rows needs no transposition: twice as fast on CPU
    rows = jnp.broadcast_to(jnp.asarray(matrix, x.dtype), (b, *matrix.shape))
    x = jnp.matmul(rows, x.reshape(b, h, w * c), precision=Precision.HIGHEST)
    return x.reshape(b, matrix.shape[0], w, c)


def row_matrix(h: int, h2: int) -> Any:
    """The NumPy matrix `f[h2 h]` by which `resize_bilinear` interpolates rows."""
    return _matrix(_taps(h, h2), h)


def resized_argmax(
    logits: Float[Array, "b hs ws k"],
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    *,
    padded_image: tuple[int, int],
    padded_label: tuple[int, int],
) -> Int[Array, "b h w"]:
    """Argmax of logits resized to the sizes of the labels, which differ from row to row.

    Equivalent, for each row, to `resize_bilinear` to `padded_image`, cropping `image_size` (height,
    width) from the upper left corner, `resize_bilinear` to `label_size`, and argmax. The result is
    in the upper left corner of `padded_label` (h, w); its last row and column are repeated as
    padding.

    Both resizes and the crop are fused into one interpolation per axis, a matrix product or a
    gather as in `resize_bilinear`. It scans over the classes: all logits at the size of the labels
    would be the largest array of an evaluation.
    """
    resize = _resize_and_crop(logits, image_size, label_size, padded_image, padded_label)

    def compare(best: tuple[Array, Array], current: tuple[Array, Array]) -> tuple[Any, None]:
        (largest, classes), (number, x) = best, current
        x = resize(x)
        return (jnp.maximum(x, largest), jnp.where(x > largest, number, classes)), None

    shape = (logits.shape[0], *padded_label)
    start = jnp.full(shape, -jnp.inf, logits.dtype), jnp.zeros(shape, jnp.int32)
    numbers = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    (_, classes), _ = jax.lax.scan(compare, start, (numbers, jnp.moveaxis(logits, -1, 0)))
    return classes


def resized_logits(
    logits: Float[Array, "b hs ws k"],
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    *,
    padded_image: tuple[int, int],
    padded_label: tuple[int, int],
) -> Float[Array, "b h w k"]:
    """The logits of which `resized_argmax` is the argmax, for those who want all of them."""
    resize = _resize_and_crop(logits, image_size, label_size, padded_image, padded_label)
    return jnp.moveaxis(jax.lax.map(resize, jnp.moveaxis(logits, -1, 0)), 0, -1)


def resized_probabilities(
    logits: Float[Array, "b hs ws k"],
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    **padded: tuple[int, int],
) -> Float[Array, "b h w k"]:
    """The softmax of `resized_logits`, which takes the same arguments."""
    return jax.nn.softmax(resized_logits(logits, image_size, label_size, **padded), axis=-1)


def _resize_and_crop(
    logits: Float[Array, "b hs ws k"],
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    padded_image: tuple[int, int],
    padded_label: tuple[int, int],
) -> Callable[[Float[Array, "b hs ws"]], Float[Array, "b h w"]]:
    """What `resized_argmax` does to the logits of one class."""
    rows, columns = (
        _crop_taps(
            *(logits.shape[1 + axis], padded_image[axis], image_size[:, axis]),
            *(label_size[:, axis], padded_label[axis]),
        )
        for axis in (0, 1)
    )
    resize_rows = _interpolation(rows, logits.shape[1], axis=0)
    resize_columns = _interpolation(columns, logits.shape[2], axis=1)
    return lambda x: resize_rows(resize_columns(x))


def _interpolation(taps: Taps, size: int, axis: int) -> Callable[[Array], Array]:
    """Interpolates maps of `size` along an axis, `f[b h w]`, each by its own taps."""
    if taps.index.shape[1] * size > MATRIX_SIZE:
        return lambda x: jax.vmap(partial(_gather, axis=axis))(x, taps)
    matrix = jax.vmap(partial(_matrix, size=size))(taps)
    product = "bvh,bhw->bvw" if axis == 0 else "bvw,bhw->bhv"
    return lambda x: jnp.einsum(product, matrix, x, precision=Precision.HIGHEST)


def _gather(x: Array, taps: Taps, axis: int) -> Array:
    """Interpolates an array along an axis."""
    along = [1] * x.ndim
    along[axis] = -1
    parts = [
        jnp.take(x, taps.index[:, tap], axis)
        * jnp.asarray(taps.weight[:, tap], x.dtype).reshape(along)
        for tap in range(taps.index.shape[1])
    ]
    return sum(parts[1:], parts[0])


def _matrix(taps: Taps, size: int) -> Any:
    """The same interpolation as a matrix `f[new size]`; each row sums to 1."""
    places = np.arange(size, dtype=np.int32)[None]
    parts = [
        taps.weight[:, tap, None] * (taps.index[:, tap, None] == places).astype(taps.weight.dtype)
        for tap in range(taps.index.shape[1])
    ]
    return sum(parts[1:], parts[0])


def _taps(size: int, new_size: int) -> Taps:
    """Linear interpolation from `size` to `new_size`."""
    position = np.linspace(0, size - 1, new_size)
    left = np.floor(position)
    index = np.stack([left, np.minimum(left + 1, size - 1)], axis=-1)
    weight = np.stack([1 - (position - left), position - left], axis=-1)
    return Taps(index.astype(np.int32), weight)


def _crop_taps(
    size: int,
    padded: int,
    crop: Int[Array, " b"],
    new_size: Int[Array, " b"],
    new_padded: int,
) -> Taps:
    """Interpolation from `size` to `padded`, then of its first `crop` to `new_size`, per row."""
    of_padded = _taps(size, padded)
    index, weight = jnp.asarray(of_padded.index), jnp.asarray(of_padded.weight, jnp.float32)
    last, new_last = crop[:, None] - 1, new_size[:, None] - 1
    place = jnp.minimum(jnp.arange(new_padded, dtype=jnp.int32)[None], new_last)
    # Positions in units of 1 / unit: integers are exact, unlike float32 fractions.
    unit = jnp.maximum(new_last, 1)
    left, rest = _scaled(place, last, unit, bits=new_padded.bit_length())
    right, share = (
        jnp.minimum(left + 1, last),
        (rest.astype(jnp.float32) / unit.astype(jnp.float32))[..., None],
    )
    return Taps(
        jnp.concatenate([index[left], index[right]], axis=-1),
        jnp.concatenate([(1 - share) * weight[left], share * weight[right]], axis=-1),
    )


def _scaled(x: Array, factor: Array, unit: Array, *, bits: int) -> tuple[Array, Array]:
    """Quotient and remainder of x * factor / unit, where the product may overflow 32 bits.

    By long multiplication in base 2. `x` has at most `bits` bits.
    """

    def add(bit: Array, carried: tuple[Array, ...]) -> tuple[Array, ...]:
        quotient, rest, of_bit, rest_of_bit = carried
        taken = (x >> bit) & 1
        quotient, rest = quotient + taken * of_bit, rest + taken * rest_of_bit
        return (
            *(quotient + rest // unit, rest % unit),
            *(2 * of_bit + 2 * rest_of_bit // unit, 2 * rest_of_bit % unit),
        )

    none = jnp.zeros_like(x)
    start = none, none, none + factor // unit, none + factor % unit
    quotient, rest, *_ = jax.lax.fori_loop(0, bits, add, start)
    return quotient, rest


def label_at_stride(label: UInt8[Array, "b h w"], size: tuple[int, int]) -> Int[Array, "b hs ws"]:
    """Labels downsampled to `size` by nearest neighbour, odd sizes (65x129) included.

    Cell i takes pixel floor(i * h / hs), PyTorch's `nearest`; labels are downsampled nowhere else.
    """
    rows = jnp.arange(size[0], dtype=jnp.int32) * label.shape[1] // size[0]
    columns = jnp.arange(size[1], dtype=jnp.int32) * label.shape[2] // size[1]
    return label[:, rows[:, None], columns[None, :]].astype(jnp.int32)
