"""Which candidates an anchor is contrasted with: all, random, hardest or semi-hard (Sec. 3.2).

A selection is two limits per anchor. Every candidate has a rank, its place in one random order: an
anchor takes those below a rank, and of them those that are hard enough. Hardness is the similarity
of a negative, and its opposite of a positive; all that are as hard as the last one are taken.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

NO_CLASS = 1 << 30  # the label of rows and columns that take part in nothing; sorts behind all
NO_ANCHOR = -1  # for a candidate that is no anchor
MASKED = -1e30  # stands for minus infinity where a real one would turn differences into NaN
STRATEGIES = ("all", "random", "hardest", "semi_hard")
POOLED = {"random", "semi_hard"}  # strategies that draw a pool from the candidates of a class
NO_LABEL = 255  # what stands for NO_CLASS in the 8 bits that a label has in a key
RANK_BITS = 24
BLOCK = 16  # rows whose similarities with all candidates of a selection exist at once
POOL_FACTOR = 10  # semi-hard takes the hardest tenth of a pool this many times as large


class Rows(NamedTuple):
    """Anchors: embeddings divided by the temperature, and which of the batch's anchors they are."""

    embedding: Float[Array, "r d"]
    label: Int[Array, " r"]
    anchor: Int[Array, " r"]


class Columns(NamedTuple):
    """Candidates, which anchor each is itself if any, and its place in the random order."""

    embedding: Float[Array, "c d"]
    label: Int[Array, " c"]
    anchor: Int[Array, " c"]
    rank: Int[Array, " c"]


class Order(NamedTuple):
    """A random order of the candidates of all sets on all devices, those without a label last."""

    candidate: Int[Array, " all"]  # which one it is, one set after the other, by rank
    keys: UInt32[Array, " all"]  # label << RANK_BITS | rank of each, sorted


class Selection(NamedTuple):
    """How an anchor's positives, or negatives, are chosen."""

    strategy: str  # all, random, hardest or semi_hard
    number: int
    approximate: bool


class Limits(NamedTuple):
    """What each row selects: ranks below `rank`, of a hardness of at least `hardness`."""

    rank: Int[Array, " r"]
    hardness: Float[Array, " r"]


def is_selected(
    rows: Rows,
    columns: Columns,
    similarity: Float[Array, "r c"],
    limits: Limits | None,
    *,
    positive: bool,
) -> Bool[Array, "r c"]:
    """Which columns are positives (or negatives) of which rows, inside the rows' limits."""
    same = columns.label[None, :] == rows.label[:, None]
    selected = columns.label[None, :] != NO_CLASS
    if positive:
        selected &= same & (columns.anchor[None, :] != rows.anchor[:, None])
    else:
        selected &= ~same
    if limits is not None:
        selected &= columns.rank[None, :] < limits.rank[:, None]
        # Not `>=`: a similarity that is not a number must be seen, and it is above no limit.
        selected &= ~((-similarity if positive else similarity) < limits.hardness[:, None])
    return selected


def select(
    tile: Rows,
    *,
    sets: tuple[Columns, ...],
    layouts: tuple[tuple[int, int], ...],
    order: Order | None,
    longest: Float[Array, ""],
    selection: Selection,
    positive: bool,
    axis: str | None,
) -> tuple[tuple[Columns, ...], Limits]:
    """The columns to look at, and the limits, for rows of the class that the first row has.

    The rows of a class share one pool, its first positives, or negatives, in the random order. The
    hardest tenth of a random pool of ten times K is the paper's K at random out of the hardest
    tenth of all, at a fraction of the comparisons. `layouts` are the shapes of the sets, classes x
    slots; with `axis`, the slots of this device out of those over all devices of a mesh axis.
    `longest` is the length of the longest candidate.
    """
    label, size = tile.label[0], tile.label.size
    limit = jnp.full(size, jnp.iinfo(jnp.int32).max, jnp.int32)
    if selection.strategy in POOLED and order is not None:
        factor = POOL_FACTOR if selection.strategy == "semi_hard" else 1
        pool_size = min(selection.number * factor, order.candidate.size)
        # One more than that, for the rows that are in the pool themselves.
        ranks = _pool_ranks(order, label, pool_size + 1, positive=positive)
        pool = _pool(sets, layouts, order, ranks, axis)
        own = jnp.sum(pool.anchor[None, :] == tile.anchor[:, None], axis=1, dtype=jnp.int32)
        own = lax.psum(own, axis) if axis else own
        sets, limit = (pool,), jnp.where(own > 0, ranks[-1], ranks[-2]) + 1
    limits = Limits(limit, jnp.full(size, -jnp.inf, jnp.float32))
    if selection.strategy in ("all", "random"):
        return sets, limits
    find = functools.partial(
        _hardness_limit, sets=sets, selection=selection, positive=positive, axis=axis
    )
    blocks = jax.tree.map(lambda x: x.reshape(-1, BLOCK, *x.shape[1:]), (tile, limits))
    hardness = lax.map(lambda block: find(*block), blocks).reshape(size)
    # The walks compute the same products in blocks of another size, which rounds them differently.
    margin = 1e-6 * longest * jnp.linalg.norm(tile.embedding, axis=1)
    return sets, limits._replace(hardness=hardness - margin)


def _hardness_limit(
    rows: Rows,
    limits: Limits,
    *,
    sets: tuple[Columns, ...],
    selection: Selection,
    positive: bool,
    axis: str | None,
) -> Float[Array, " r"]:
    """The hardness of the last candidate that each row takes, of those inside its limits."""
    hardness, number = [], jnp.zeros(rows.label.shape, jnp.int32)
    for columns in sets:
        similarity = dot(rows.embedding, columns.embedding.astype(jnp.float32).T)
        selected = is_selected(rows, columns, similarity, limits, positive=positive)
        hardness.append(jnp.where(selected, -similarity if positive else similarity, MASKED))
        number += selected.sum(1, dtype=jnp.int32)
    number = lax.psum(number, axis) if axis else number
    share = POOL_FACTOR if selection.strategy == "semi_hard" else 1
    wanted = jnp.clip(-(-number // share), 1, selection.number)
    values = jnp.concatenate(hardness, axis=1)
    if selection.approximate:
        return _kth_approximate(values, wanted, axis, most=selection.number)
    return _kth_largest(values, wanted, axis)


def _pool_ranks(
    order: Order, label: Int[Array, ""], size: int, *, positive: bool
) -> Int[Array, " p"]:
    """Ranks of the first positives, or negatives, of a class; beyond all ranks where none is left.

    The time is that of a few searches, whatever the number of candidates.
    """
    nothing, place = order.candidate.size, jnp.arange(size, dtype=jnp.int32)
    classes = jnp.stack([label, label + 1, jnp.full_like(label, NO_LABEL)]).astype(jnp.uint32)
    start, end, num_valid = jnp.searchsorted(order.keys, classes << RANK_BITS).astype(jnp.int32)

    def rank_of(member: Int[Array, " p"]) -> Int[Array, " p"]:
        key = jnp.take(order.keys, start + member, mode="clip")
        return (key & jnp.uint32((1 << RANK_BITS) - 1)).astype(jnp.int32)

    if positive:
        return jnp.where(place < end - start, rank_of(place), nothing)

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        ahead = (middle < end - start) & (rank_of(middle) - middle <= place)
        return jnp.where(ahead, middle + 1, low), jnp.where(ahead, high, middle)

    # Of the class itself, so many members come before the negative at each place.
    bounds = jnp.zeros_like(place), jnp.full_like(place, nothing)
    members, _ = lax.fori_loop(0, nothing.bit_length() + 1, halve, bounds)
    rank = place + members
    return jnp.where(rank < num_valid, rank, nothing)


def _pool(
    sets: tuple[Columns, ...],
    layouts: tuple[tuple[int, int], ...],
    order: Order,
    ranks: Int[Array, " p"],
    axis: str | None,
) -> Columns:
    """The candidates of some ranks; those that lie on other devices take part in nothing here."""
    index = jnp.take(order.candidate, ranks, mode="fill", fill_value=order.candidate.size)
    num_devices, device = (lax.axis_size(axis), lax.axis_index(axis)) if axis else (1, 0)
    pool = Columns(
        jnp.zeros((ranks.size, sets[0].embedding.shape[1]), jnp.float32),
        jnp.full(ranks.shape, NO_CLASS, jnp.int32),
        jnp.full(ranks.shape, NO_ANCHOR, jnp.int32),
        ranks,
    )
    for columns, (num_rows, width) in zip(sets, layouts, strict=True):
        if columns.label.size == 0:
            continue
        row, slot = jnp.divmod(index, width * num_devices)
        here = (row >= 0) & (row < num_rows) & (slot // width == device)
        local = jnp.where(here, row * width + slot % width, 0)
        found = jax.tree.map(lambda x, at=local: jnp.take(x, at, axis=0, mode="clip"), columns)
        pool = Columns(
            jnp.where(here[:, None], found.embedding.astype(jnp.float32), pool.embedding),
            jnp.where(here, found.label, pool.label),
            jnp.where(here, found.anchor, pool.anchor),
            ranks,
        )
        index -= num_rows * width * num_devices
    return pool


def _kth_largest(
    values: Float[Array, "r c"], number: Int[Array, " r"], axis: str | None
) -> Float[Array, " r"]:
    """The number-th largest value of each row, found bit by bit: 32 counts instead of a sort.

    On a CPU, for rows that fit its cache, this is tens of times as fast as `lax.top_k`.
    """
    sign = jnp.uint32(1 << 31)
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    bits = jnp.where(bits & sign, ~bits, bits | sign)  # ordered as the values are

    def settle(i: Int[Array, ""], found: Array) -> Array:
        trial = found | (sign >> i.astype(jnp.uint32))
        at_least = jnp.sum(bits >= trial[:, None], axis=1, dtype=jnp.int32)
        at_least = lax.psum(at_least, axis) if axis else at_least
        return jnp.where(at_least >= number, trial, found)

    found = lax.fori_loop(0, 32, settle, jnp.zeros(values.shape[:1], jnp.uint32))
    return lax.bitcast_convert_type(jnp.where(found & sign, found ^ sign, ~found), jnp.float32)


def _kth_approximate(
    values: Float[Array, "r c"], number: Int[Array, " r"], axis: str | None, *, most: int
) -> Float[Array, " r"]:
    """The same by `lax.approx_max_k`, which TPUs have in hardware; `most` bounds `number`."""
    best = lax.approx_max_k(values, min(most, values.shape[1]))[0]
    if axis:
        best = lax.all_gather(best, axis, axis=1, tiled=True)
        best = lax.top_k(best, min(most, best.shape[1]))[0]
    last = jnp.clip(number - 1, 0, best.shape[1] - 1)
    return jnp.take_along_axis(best, last[:, None], axis=1)[:, 0]


def finite(columns: Columns) -> Float[Array, "c d"]:
    """Embeddings in float32, with zeros for what takes part in nothing and may hold NaN."""
    embedding = columns.embedding.astype(jnp.float32)
    return jnp.where(columns.label[:, None] != NO_CLASS, embedding, 0.0)


def dot(first: Float[Array, "x y"], second: Float[Array, "y z"]) -> Float[Array, "x z"]:
    """A product in full float32, also where hardware would take fewer bits."""
    return jnp.matmul(first, second, precision=lax.Precision.HIGHEST)
