"""Sorting pixels by group, at random inside each: what every draw of pixels is made of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32


def sort_by_group(
    group: Int[Array, " n"], rng: Key[Array, ""], *, num_groups: int
) -> tuple[Int[Array, " n"], Int[Array, " g"], Int[Array, " g"]]:
    """Order pixels by group, at random inside each.

    Returns the pixel at each sorted position, and the start and size of groups 0..num_groups-1;
    pixels whose group is `num_groups` or more come last and belong to none. Group and pixel share
    one 32-bit sort key, which a CPU sorts seven times as fast as keys with values beside them.
    """
    bits = max(group.size - 1, 1).bit_length()
    if (num_groups + 1) << bits > 1 << 32:
        raise ValueError(f"{num_groups} groups of {group.size} pixels: too many for a 32-bit key")
    rounds = jax.random.bits(rng, (6,), jnp.uint32)
    shuffled = _scramble(jnp.arange(group.size, dtype=jnp.uint32), rounds, bits=bits)
    group = jnp.minimum(group, num_groups).astype(jnp.uint32)
    key = jnp.sort((group << bits) | shuffled)
    order = _scramble(key & jnp.uint32((1 << bits) - 1), rounds, bits=bits, inverse=True)
    ends = jnp.arange(num_groups + 1, dtype=jnp.uint32) << bits
    bounds = jnp.searchsorted(key, ends).astype(jnp.int32)
    return order.astype(jnp.int32), bounds[:-1], jnp.diff(bounds)


def _scramble(
    index: UInt32[Array, " n"], rounds: UInt32[Array, " r"], *, bits: int, inverse: bool = False
) -> UInt32[Array, " n"]:
    """A random one-to-one map of 0..2**bits-1 (a Feistel network, one key a round), or its inverse.

    Each round changes one half of the bits by a hash of the other, so that it undoes itself. Maps
    of a handful of pixels are not quite evenly shuffled.
    """
    low = bits // 2
    low_mask, high_mask = (1 << low) - 1, (1 << bits) - (1 << low)
    turns = range(rounds.size)
    for turn in reversed(turns) if inverse else turns:
        if turn % 2:
            index ^= _hash((index >> low) + rounds[turn]) & jnp.uint32(low_mask)
        else:
            index ^= (_hash((index & jnp.uint32(low_mask)) + rounds[turn]) << low) & jnp.uint32(
                high_mask
            )
    return index


def _hash(x: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
    """The finalizer of MurmurHash3: every bit of the input moves every bit of the output."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
