"""Functions of logits at the size of the labels, which never exist whole where they are large."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from contrastseg_jax.ops.resize import (
    interpolate_rows,
    resize_bilinear,
    resize_columns,
    row_matrix,
)
from contrastseg_jax.structs import IGNORE_LABEL

# Bytes of an image's float32 logits in one block of rows. Of an image, not of a batch: the blocks,
# and so the rounding, must not depend on how images lie over devices.
BLOCK_BYTES = 16 << 20


def map_row_blocks(
    function: Callable[[Float[Array, "b r w k"], UInt8[Array, "b r w"]], Any],
    logits: Float[Array, "b hs ws k"],
    label: UInt8[Array, "b h w"],
) -> Any:
    """`function` of blocks of rows, their logits resized to the label's size; stacked `[blocks …]`.

    As `function(resize_bilinear(logits, (h, w)), label)` where that is at most `BLOCK_BYTES` an
    image, in one block. Otherwise the blocks follow one another, and each is computed again for the
    gradient: neither direction holds more than one. The last block may be filled up with rows
    that have no class.
    """
    h, w = label.shape[1:]
    num_blocks = min(-(-h * w * logits.shape[-1] * 4 // BLOCK_BYTES), h)
    if num_blocks <= 1:
        found = function(resize_bilinear(logits, (h, w)), label)
        return jax.tree.map(lambda x: x[None], found)
    num_rows = -(-h // num_blocks)
    num_blocks = -(-h // num_rows)
    padding = ((0, 0), (0, num_blocks * num_rows - h), (0, 0))
    padded = jnp.pad(label, padding, constant_values=IGNORE_LABEL)
    labels = jnp.moveaxis(padded.reshape(-1, num_blocks, num_rows, w), 1, 0)
    starts, matrices = _windows(logits.shape[1], h, num_rows)
    size = matrices.shape[2]
    windows = jnp.stack([logits[:, start : start + size] for start in starts])

    def of_block(block: tuple[Array, Array, Array]) -> Any:
        window, matrix, label = block
        return function(interpolate_rows(resize_columns(window, w), matrix), label)

    # Without barriers, which a scan does not need.
    of_block = jax.checkpoint(of_block, prevent_cse=False)
    return jax.lax.map(of_block, (windows, jnp.asarray(matrices, logits.dtype), labels))


def _windows(h: int, h2: int, num_rows: int) -> tuple[list[int], Any]:
    """Where the rows of `h` begin that each block of `num_rows` of `h2` is made of, and its matrix.

    The matrices `f[blocks num_rows size]` have one size; rows beyond `h2` are 0.
    """
    whole = row_matrix(h, h2)
    parts = [whole[i : i + num_rows] for i in range(0, h2, num_rows)]
    used = [np.flatnonzero(part.any(axis=0)) for part in parts]
    size = max(places[-1] - places[0] + 1 for places in used)
    starts = [int(min(places[0], h - size)) for places in used]
    matrices = np.zeros((len(parts), num_rows, size), whole.dtype)
    for matrix, part, start in zip(matrices, parts, starts, strict=True):
        matrix[: len(part)] = part[:, start : start + size]
    return starts, matrices


def joined_rows(blocks: Float[Array, "n b r w"], h: int) -> Float[Array, "b h w"]:
    """Maps that `map_row_blocks` returned, one below the other, without what filled up the last."""
    _, b, _, w = blocks.shape
    return jnp.moveaxis(blocks, 0, 1).reshape(b, -1, w)[:, :h]
