"""Digests of the arrays of a state, independent of the number of devices and processes.

The sum modulo 2**64, over the elements of an array, of splitmix64 of the element's bits and its
index in the whole array. So shards can be summed in any order, and a change of one element always
changes the sum.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from contrastseg_jax.parallel import processes

# Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014), as in splitmix64.c.
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # shift right, then multiply
MASK = 2**64 - 1
BLOCK_SIZE = 2**16  # elements hashed at once, to fit the CPU cache


def state_digests(state: Any) -> dict[str, str]:
    """The digest of each array of a state by name; all processes must call it.

    Every element is counted once, on the device with its first replica.
    """
    arrays = named_leaves(state)
    with ThreadPoolExecutor() as pool:  # NumPy releases the GIL
        sums = list(pool.map(_local_sum, arrays.values()))
    everyone = [text.split() for text in processes.gather(" ".join(f"{part:x}" for part in sums))]
    return {
        name: format_digest(array.dtype, array.shape, sum(int(part, 16) for part in parts))
        for (name, array), *parts in zip(arrays.items(), *everyone, strict=True)
    }


def array_digest(array: np.ndarray) -> str:
    """The digest of a whole array."""
    return format_digest(array.dtype, array.shape, part_sum(array, (0,) * array.ndim, array.shape))


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names under which Orbax stores them."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def format_digest(dtype: Any, shape: Sequence[int], total: int) -> str:
    """A digest as text, with dtype and shape."""
    return f"{np.dtype(dtype).name}[{','.join(map(str, shape))}] {total & MASK:016x}"


def part_sum(part: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """The sum over a part of an array of `shape`, starting at index `start`."""
    if part.shape == tuple(shape):  # the whole array: flattened, which is faster
        part, start, shape = part.reshape(-1), (0,), (part.size,)
    bits = part.view(np.dtype(f"u{part.dtype.itemsize}"))
    strides = [int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape))]
    return _mixed_sum(bits, [(begin, stride) for begin, stride in zip(start, strides, strict=True)])


def _local_sum(array: jax.Array) -> int:
    return sum(
        part_sum(np.asarray(shard.data), [side.start or 0 for side in shard.index], array.shape)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    )


def _mixed_sum(bits: np.ndarray, axes: list[tuple[int, int]]) -> int:
    """The sum over elements; `axes`: index of the first element, and stride, per axis."""
    if bits.size > BLOCK_SIZE:
        axis = int(np.argmax(bits.shape))
        half = bits.shape[axis] // 2
        first, second = np.split(bits, [half], axis)
        begin, stride = axes[axis]
        later = [*axes[:axis], (begin + half, stride), *axes[axis + 1 :]]
        return _mixed_sum(first, axes) + _mixed_sum(second, later)
    mixed = bits.astype(np.uint64) + np.uint64(GOLDEN)
    for axis, (begin, stride) in enumerate(axes):
        step, first = np.uint64(stride * GOLDEN & MASK), np.uint64(begin * stride * GOLDEN & MASK)
        places = np.arange(bits.shape[axis], dtype=np.uint64) * step + first
        mixed += np.expand_dims(places, tuple(range(1, bits.ndim - axis)))
    for shift, factor in MIX:
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return int(mixed.sum(dtype=np.uint64))
