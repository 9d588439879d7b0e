"""The k-th largest value of each row, also of rows that are split over devices."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from contrastseg_jax.contrast.devices import AXIS, Split, sum_over_candidates

SIGN = 1 << 31  # the highest of 32 bits


def kth_largest(
    values: Float[Array, "r c"], k: Int[Array, " r"], *, split: Split
) -> Float[Array, " r"]:
    """The k-th largest value of each row, found bit by bit: 32 counts instead of a sort.

    On a CPU, for rows that fit its cache, this is tens of times as fast as `lax.top_k`.
    """
    sign = jnp.uint32(SIGN)
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    bits = jnp.where(bits & sign, ~bits, bits | sign)  # ordered as the values are
    settle = functools.partial(_settle_bit, bits=bits, k=k, split=split)
    found = lax.fori_loop(0, 32, settle, jnp.zeros(values.shape[:1], jnp.uint32))
    return lax.bitcast_convert_type(jnp.where(found & sign, found ^ sign, ~found), jnp.float32)


def kth_largest_approximate(
    values: Float[Array, "r c"], k: Int[Array, " r"], *, largest_k: int, split: Split
) -> Float[Array, " r"]:
    """The same by `lax.approx_max_k`, which TPUs have in hardware; no `k` exceeds `largest_k`."""
    best = lax.approx_max_k(values, min(largest_k, values.shape[1]))[0]
    if split is Split.CANDIDATES:
        best = lax.all_gather(best, AXIS, axis=1, tiled=True)
        best = lax.top_k(best, min(largest_k, best.shape[1]))[0]
    place = jnp.clip(k - 1, 0, best.shape[1] - 1)
    return jnp.take_along_axis(best, place[:, None], axis=1)[:, 0]


def _settle_bit(
    i: Int[Array, ""],
    found: UInt32[Array, " r"],
    *,
    bits: UInt32[Array, "r c"],
    k: Int[Array, " r"],
    split: Split,
) -> UInt32[Array, " r"]:
    """Set the i-th highest bit of what was found so far, if k values are still as large."""
    trial = found | (jnp.uint32(SIGN) >> i.astype(jnp.uint32))
    at_least = jnp.sum(bits >= trial[:, None], axis=1, dtype=jnp.int32)
    return jnp.where(sum_over_candidates(at_least, split) >= k, trial, found)
