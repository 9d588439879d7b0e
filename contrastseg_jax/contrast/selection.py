"""Which candidates an anchor is contrasted with: all, random, hardest or semi-hard (Sec. 3.2).

A selection is two limits per anchor. Every candidate has a rank, its place in one random order: an
anchor takes those below a rank, and of them those that are hard enough; all that are as hard as the
last one are taken.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

from contrastseg_jax.contrast.devices import Split, part_of_candidates, sum_over_candidates
from contrastseg_jax.contrast.grouped_sort import sort_by_group
from contrastseg_jax.contrast.kth_largest import kth_largest, kth_largest_approximate
from contrastseg_jax.contrast.pairs import (
    MASKED,
    NO_ANCHOR,
    NO_CLASS,
    Columns,
    Limits,
    Rows,
    Side,
    hardness_of,
    is_selected,
    tied,
)
from contrastseg_jax.contrast.walks import similarities
from contrastseg_jax.structs import Candidates

STRATEGIES = ("all", "random", "hardest", "semi_hard")
POOLED = {"random", "semi_hard"}  # strategies that draw a pool from the candidates of a class
BY_HARDNESS = {"hardest", "semi_hard"}  # strategies that look at similarities
NO_LABEL = 255  # what stands for NO_CLASS in the 8 bits that a label has in a key
RANK_BITS = 24
BLOCK = 16  # rows whose similarities with all candidates of a selection exist at once
POOL_FACTOR = 10  # semi-hard takes the hardest tenth of a pool this many times as large


class Selection(NamedTuple):
    """How an anchor's positives, or negatives, are chosen."""

    side: Side
    strategy: str  # all, random, hardest or semi_hard
    number: int
    approximate: bool


class RandomOrder(NamedTuple):
    """A random order of the candidates of all sets on all devices, those without a label last."""

    ranks: tuple[Int[Array, "..."], ...]  # of each set: the place of each candidate in the order
    candidate: Int[Array, " all"]  # which one it is, one set after the other, by rank
    keys: UInt32[Array, " all"]  # label << RANK_BITS | rank of each, sorted


class CandidateSets(NamedTuple):
    """All candidates, as far as they lie on this device, and what it takes to select of them."""

    columns: tuple[Columns, ...]
    shapes: tuple[tuple[int, int], ...]  # classes x slots that the columns of each set are made of
    order: RandomOrder | None
    longest: Float[Array, ""]  # the length of the longest candidate on any device
    chunk_size: int  # how many of them are looked at at a time
    split: Split


def shuffle(candidates: tuple[Candidates, ...], rng: Key[Array, ""]) -> RandomOrder:
    """A random order that depends on neither devices nor embeddings."""
    label = jnp.concatenate([jnp.where(c.valid, c.label, NO_LABEL).reshape(-1) for c in candidates])
    if label.size > 1 << RANK_BITS:
        raise ValueError(f"{label.size} candidates: at most {1 << RANK_BITS} can be drawn from")
    index, _, _ = sort_by_group((label == NO_LABEL).astype(jnp.int32), rng, num_groups=1)
    rank = jnp.zeros_like(index).at[index].set(jnp.arange(index.size, dtype=jnp.int32))
    keys = jnp.sort((label.astype(jnp.uint32) << RANK_BITS) | rank.astype(jnp.uint32))
    ends = itertools.accumulate(c.label.size for c in candidates[:-1])
    parts = zip(jnp.split(rank, list(ends)), candidates, strict=True)
    return RandomOrder(tuple(part.reshape(c.label.shape) for part, c in parts), index, keys)


def select(
    tile: Rows, sets: CandidateSets, selection: Selection
) -> tuple[tuple[Columns, ...], Limits | None]:
    """The columns to look at, and the limits if any, for rows of the class of the first row."""
    if selection.strategy == "all":
        return sets.columns, None
    size = tile.label.size
    columns = sets.columns
    limits = Limits(
        jnp.full(size, jnp.iinfo(jnp.int32).max, jnp.int32),
        jnp.full(size, -jnp.inf, jnp.float32),
    )
    if selection.strategy in POOLED:
        pool, rank = _draw_pool(tile, sets, selection)
        columns, limits = (pool,), limits._replace(rank=rank)
    if selection.strategy in BY_HARDNESS:
        hardness = _hardness_limits(tile, columns, limits, selection, sets)
        # The walks find the same products in blocks of another size, which rounds them differently.
        margin = 1e-6 * sets.longest * jnp.linalg.norm(tile.embedding, axis=1)
        limits = limits._replace(hardness=hardness - margin)
    return columns, limits


# --- The pool: the first candidates of a class in the random order --------------------------------


def _draw_pool(
    tile: Rows, sets: CandidateSets, selection: Selection
) -> tuple[Columns, Int[Array, " r"]]:
    """The pool that the rows of a class share, and the rank below which each row takes of it.

    The hardest tenth of a random pool of ten times K is the paper's K at random out of the hardest
    tenth of all, at a fraction of the comparisons.
    """
    if sets.order is None:
        raise ValueError(f"{selection.strategy}: a pool needs a random order")
    factor = POOL_FACTOR if selection.strategy == "semi_hard" else 1
    pool_size = min(selection.number * factor, sets.order.candidate.size)
    first_ranks = _positive_ranks if selection.side is Side.POSITIVES else _negative_ranks
    # One more than that, for the rows that are in the pool themselves.
    ranks = first_ranks(sets.order, tile.label[0], pool_size + 1)
    pool = _columns_of_ranks(sets, sets.order, ranks)
    own = jnp.sum(pool.anchor[None, :] == tile.anchor[:, None], axis=1, dtype=jnp.int32)
    own = sum_over_candidates(own, sets.split)
    return pool, jnp.where(own > 0, ranks[-1], ranks[-2]) + 1


def _positive_ranks(order: RandomOrder, label: Int[Array, ""], size: int) -> Int[Array, " p"]:
    """Ranks of the first candidates of a class; beyond all ranks where none is left."""
    place = jnp.arange(size, dtype=jnp.int32)
    start, end = _first_keys(order, jnp.stack([label, label + 1]))
    return jnp.where(place < end - start, _rank_at(order, start + place), order.candidate.size)


def _negative_ranks(order: RandomOrder, label: Int[Array, ""], size: int) -> Int[Array, " p"]:
    """Ranks of the first candidates of other classes; beyond all ranks where none is left.

    The time is that of a few searches, whatever the number of candidates.
    """
    beyond, place = order.candidate.size, jnp.arange(size, dtype=jnp.int32)
    labels = jnp.stack([label, label + 1, jnp.full_like(label, NO_LABEL)])
    start, end, num_valid = _first_keys(order, labels)
    halve = functools.partial(_halve, order=order, start=start, end=end, place=place)
    bounds = jnp.zeros_like(place), jnp.full_like(place, beyond)
    num_positives, _ = lax.fori_loop(0, beyond.bit_length() + 1, halve, bounds)
    rank = place + num_positives  # as many negatives come before it, and so many positives
    return jnp.where(rank < num_valid, rank, beyond)


def _halve(
    _: Int[Array, ""],
    bounds: tuple[Int[Array, " p"], Int[Array, " p"]],
    *,
    order: RandomOrder,
    start: Int[Array, ""],
    end: Int[Array, ""],
    place: Int[Array, " p"],
) -> tuple[Int[Array, " p"], Int[Array, " p"]]:
    """A step of the binary search for how many of a class come before the negative at a place.

    The m-th of the class does if so few negatives come before it: as many as its rank exceeds m.
    """
    low, high = bounds
    middle = (low + high) // 2
    before = (middle < end - start) & (_rank_at(order, start + middle) - middle <= place)
    return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)


def _first_keys(order: RandomOrder, labels: Int[Array, " l"]) -> Int[Array, " l"]:
    """Where the keys of each label begin; those of NO_LABEL begin where what is valid ends."""
    return jnp.searchsorted(order.keys, labels.astype(jnp.uint32) << RANK_BITS).astype(jnp.int32)


def _rank_at(order: RandomOrder, place: Int[Array, " p"]) -> Int[Array, " p"]:
    """The ranks in the keys at some places, which may lie beyond the end."""
    key = jnp.take(order.keys, place, mode="clip")
    return (key & jnp.uint32((1 << RANK_BITS) - 1)).astype(jnp.int32)


def _columns_of_ranks(sets: CandidateSets, order: RandomOrder, ranks: Int[Array, " p"]) -> Columns:
    """The candidates of some ranks; those that lie on other devices take part in nothing here."""
    part, num_parts = part_of_candidates(sets.split)
    index = jnp.take(order.candidate, ranks, mode="fill", fill_value=order.candidate.size)
    pool = Columns(
        jnp.zeros((ranks.size, sets.columns[0].embedding.shape[1]), jnp.float32),
        jnp.full(ranks.shape, NO_CLASS, jnp.int32),
        jnp.full(ranks.shape, NO_ANCHOR, jnp.int32),
        ranks,
    )
    for columns, (num_classes, num_slots) in zip(sets.columns, sets.shapes, strict=True):
        if columns.label.size == 0:
            continue
        cls, slot = jnp.divmod(index, num_slots * num_parts)
        here = (cls >= 0) & (cls < num_classes) & (slot // num_slots == part)
        place = jnp.where(here, cls * num_slots + slot % num_slots, 0)
        found = columns._replace(embedding=tied(columns.embedding, place))
        found = jax.tree.map(lambda x, at=place: jnp.take(x, at, axis=0, mode="clip"), found)
        pool = Columns(
            jnp.where(here[:, None], found.embedding.astype(jnp.float32), pool.embedding),
            jnp.where(here, found.label, pool.label),
            jnp.where(here, found.anchor, pool.anchor),
            ranks,
        )
        index -= num_classes * num_slots * num_parts
    return pool


# --- The hardness limit: the hardness of the last candidate that is taken -------------------------


def _hardness_limits(
    tile: Rows,
    columns: tuple[Columns, ...],
    limits: Limits,
    selection: Selection,
    sets: CandidateSets,
) -> Float[Array, " r"]:
    """The hardness of the last candidate that each row takes, a few rows at a time."""
    blocks = jax.tree.map(lambda x: x.reshape(-1, BLOCK, *x.shape[1:]), (tile, limits))
    limit_of = functools.partial(
        _hardness_limits_of_block,
        columns=columns,
        selection=selection,
        chunk_size=sets.chunk_size,
        split=sets.split,
    )
    return lax.map(limit_of, blocks).reshape(tile.label.size)


def _hardness_limits_of_block(
    block: tuple[Rows, Limits],
    *,
    columns: tuple[Columns, ...],
    selection: Selection,
    chunk_size: int,
    split: Split,
) -> Float[Array, " r"]:
    """The k-th largest hardness of those candidates that are inside the limits of rows so far."""
    rows, limits = block
    hardness, number = [], jnp.zeros(rows.label.shape, jnp.int32)
    for part in columns:
        similarity = similarities(rows, part, chunk_size)
        selected = is_selected(rows, part, similarity, limits, selection.side)
        hardness.append(jnp.where(selected, hardness_of(similarity, selection.side), MASKED))
        number += selected.sum(1, dtype=jnp.int32)
    number = sum_over_candidates(number, split)
    share = POOL_FACTOR if selection.strategy == "semi_hard" else 1
    k = jnp.clip(-(-number // share), 1, selection.number)
    values = jnp.concatenate(hardness, axis=1)
    if selection.approximate:
        return kth_largest_approximate(values, k, largest_k=selection.number, split=split)
    return kth_largest(values, k, split=split)
