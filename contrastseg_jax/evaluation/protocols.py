"""Evaluation protocols: the logits of an image, from one or several passes of the network.

Logits are combined at the network's stride; full-size logits are never materialised.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import Precision
from jaxtyping import Array, Float, Num

from contrastseg_jax.config.tree import Config
from contrastseg_jax.ops.resize import resize_bilinear

Images = Num[Array, "b h w 3"]  # in grey levels
Logits = Float[Array, "b hs ws k"]
Network = Callable[[Images], Logits]  # of images of any size
Protocol = Callable[[Network, Images], Logits]  # pure; at the network's stride


def configured(config: Config) -> Protocol:
    """The protocol of the settings `eval` of a config."""
    protocol: Protocol = whole_image
    if config.eval.window:
        window, overlap = tuple(config.eval.window), config.eval.overlap
        protocol = functools.partial(sliding_window, window=window, overlap=overlap)
    scales, flip = tuple(config.eval.scales), config.eval.flip
    if scales == (1.0,) and not flip:
        return protocol
    return functools.partial(multi_scale, each=protocol, scales=scales, flip=flip)


def whole_image(network: Network, image: Images) -> Logits:
    """One pass over the image as it is."""
    return network(image)


def multi_scale(
    network: Network, image: Images, *, each: Protocol, scales: Sequence[float], flip: bool
) -> Logits:
    """The mean of the logits of an image resized by some factors, and of its mirror images.

    `each`: how a resized image is seen. The original's `ms_test` (`segmentor/tester.py`), which
    sums logits, not probabilities, at the image's size where this does so at the network's stride,
    and resizes images bicubically, where here they are interpolated linearly, with antialiasing.
    """
    size = image.shape[1:3]
    grid = jax.eval_shape(network, image).shape[1:3]
    total, number = None, 0
    for scale in scales:
        new_size = tuple(max(round(scale * side), 1) for side in size)
        logits_of = functools.partial(each, network)
        logits = _summed_over_flips(logits_of, _resized(image, new_size), flip)
        logits = resize_bilinear(logits, grid)
        total = logits if total is None else total + logits
        number += 2 if flip else 1
    if total is None:
        raise ValueError("scales must hold at least one")
    return total / number


def sliding_window(
    network: Network, image: Images, *, window: tuple[int, int], overlap: float
) -> Logits:
    """The mean of the logits of windows that cover an image, one after the other.

    Windows of `window` (height, width) pixels, or of the image's where that is less, begin each
    (1 - overlap) of a window after the last; the last one ends where the image does. Each cell of
    the whole image's logits takes its value by interpolation from the windows that its centre is
    in. Source: the original's `sscrop_test`, whose windows do not overlap.
    """
    grid = jax.eval_shape(network, image).shape
    sizes = [min(own, whole) for own, whole in zip(window, image.shape[1:3], strict=True)]
    of_window = jax.eval_shape(
        network, jax.ShapeDtypeStruct((image.shape[0], *sizes, 3), image.dtype)
    ).shape
    rows, columns = (
        _tile(image.shape[axis], sizes[axis - 1], overlap, grid[axis], of_window[axis])
        for axis in (1, 2)
    )
    padded = (grid[0], rows.padded, columns.padded, grid[3])

    def add(total: Logits, place: tuple[Array, Array]) -> tuple[Logits, None]:
        i, j = place
        start = rows.start[i], columns.start[j]
        part = lax.dynamic_slice(image, (0, *start, 0), (image.shape[0], *sizes, 3))
        values = jnp.einsum(
            "rh,cw,bhwk->brck",
            *(rows.matrix[i], columns.matrix[j], network(part).astype(jnp.float32)),
            precision=Precision.HIGHEST,
        )
        cell = (0, rows.cell[i], columns.cell[j], 0)
        sum_so_far = lax.dynamic_slice(total, cell, values.shape)
        return lax.dynamic_update_slice(total, sum_so_far + values, cell), None

    places = np.indices((len(rows.start), len(columns.start))).reshape(2, -1).astype(np.int32)
    total, _ = lax.scan(add, jnp.zeros(padded, jnp.float32), tuple(jnp.asarray(places)))
    number = jnp.asarray(rows.number[:, None] * columns.number, jnp.float32)
    return total[:, : grid[1], : grid[2]] / number[None, :, :, None]


def protocol_name(protocol: Callable[..., Any]) -> str:
    """The protocol's function with the settings bound to it, as evaluations record it."""
    if isinstance(protocol, functools.partial):
        values = [*map(repr, protocol.args)]
        for name, value in protocol.keywords.items():
            shown = protocol_name(value) if callable(value) else repr(value)
            values.append(f"{name}={shown}")
        return f"{protocol_name(protocol.func)}({', '.join(values)})"
    return getattr(protocol, "__name__", type(protocol).__name__)


class Tiling(NamedTuple):
    """Windows along an axis, and how their logits become those of the cells of the whole axis."""

    start: Array  # i32[t], in pixels
    cell: Array  # i32[t], the first cell that takes a value
    matrix: Array  # f32[t r hs]: of the r cells from there, from the hs of the window
    number: np.ndarray  # i64[cells]: windows that each cell takes a value from
    padded: int  # cells, with those beyond the end that the last windows reach


def _tile(size: int, window: int, overlap: float, num_cells: int, num_own: int) -> Tiling:
    """Windows of `window` pixels over `size`, with `num_own` and `num_cells` cells of logits."""
    step = max(round(window * (1 - overlap)), 1)
    starts = np.minimum(np.arange(math.ceil((size - window) / step) + 1) * step, size - window)
    # Corners are aligned: the first and last cells lie at the first and last pixels.
    position = np.linspace(0, size - 1, num_cells)
    from_start = position - starts[:, None]
    inside = (from_start >= -0.5) & (from_start < window - 0.5)
    first, most = inside.argmax(1), int(inside.sum(1).max())
    matrix = np.zeros((len(starts), most, num_own), np.float32)
    for tile in range(len(starts)):
        for row, cell in enumerate(np.flatnonzero(inside[tile])):
            place = np.clip(from_start[tile, cell] / max(window - 1, 1), 0, 1) * (num_own - 1)
            left = min(int(place), max(num_own - 2, 0))
            matrix[tile, row, left] += 1 - (place - left)
            matrix[tile, row, min(left + 1, num_own - 1)] += place - left
    return Tiling(
        start=jnp.asarray(starts, jnp.int32),
        cell=jnp.asarray(first, jnp.int32),
        matrix=jnp.asarray(matrix),
        number=inside.sum(0),
        padded=max(num_cells, int(first.max()) + most),
    )


def _summed_over_flips(logits_of: Callable[[Images], Logits], image: Images, flip: bool) -> Logits:
    """Logits of an image, plus those of its mirror image mirrored back, one after the other."""
    if not flip:
        return logits_of(image)
    both = jnp.stack([image, image[:, :, ::-1]])  # one copy of the network in the program
    logits = lax.map(logits_of, both)
    return logits[0] + logits[1][:, :, ::-1]


def _resized(image: Images, size: tuple[int, ...]) -> Num[Array, "b h2 w2 3"]:
    if size == image.shape[1:3]:
        return image
    shape = (image.shape[0], *size, image.shape[3])
    return jax.image.resize(image.astype(jnp.float32), shape, "linear")
