"""Walks over candidates in chunks, which sum what the loss and its gradients need.

The similarities of all rows with one chunk exist at a time. The log-sum-exp over the negatives and
its gradient are summed together under a running maximum, as flash attention does it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import sigmoid, softplus
from jaxtyping import Array, Float, Int

from contrastseg_jax.contrast.pairs import (
    MASKED,
    NO_CLASS,
    Columns,
    Limits,
    Rows,
    Side,
    dot,
    finite,
    is_selected,
    tied,
)


class NegativeSums(NamedTuple):
    """Of each row, over its negatives: log Σ exp(s) is peak + log(total)."""

    peak: Float[Array, " r"]
    total: Float[Array, " r"]
    weighted: Float[Array, "r d"]  # Σ exp(s - peak) · negative
    similarity: Float[Array, " r"]  # Σ s
    number: Float[Array, " r"]


class PositiveSums(NamedTuple):
    """Of each row, over its positives, with L the log Σ exp of its negatives."""

    cost: Float[Array, " r"]  # Σ softplus(L - s)
    slope: Float[Array, " r"]  # Σ sigmoid(L - s), the derivative of `cost` by L
    weighted: Float[Array, "r d"]  # Σ sigmoid(L - s) · positive
    similarity: Float[Array, " r"]  # Σ s
    number: Float[Array, " r"]


class Slopes(NamedTuple):
    """What the derivative of the loss by each similarity s of a row is made of, with L as above.

    -positive_weight · sigmoid(L - s) by those with its positives, negative_weight · exp(s - L) by
    those with its negatives, 0 by those outside its limits.
    """

    log_negatives: Float[Array, " r"]  # L
    positive_weight: Float[Array, " r"]  # 1 / (number of anchors · number of the row's positives)
    negative_weight: Float[Array, " r"]  # positive_weight · Σ sigmoid(L - s) over its positives
    positive_limits: Limits | None
    negative_limits: Limits | None


def walk_negatives(
    rows: Rows, columns: tuple[Columns, ...], limits: Limits | None, chunk_size: int
) -> NegativeSums:
    """All sets, chunk by chunk, against all rows."""
    num_rows, d = rows.embedding.shape
    zero, zeros = jnp.zeros(num_rows, jnp.float32), jnp.zeros((num_rows, d), jnp.float32)
    sums = NegativeSums(jnp.full(num_rows, MASKED, jnp.float32), zero, zeros, zero, zero)
    add = functools.partial(_add_negatives, rows=rows, limits=limits)
    for part in columns:
        sums = fold(add, sums, part, 0, part.label.size, chunk_size)
    return sums


def _add_negatives(
    sums: NegativeSums, chunk: Columns, _: Array, *, rows: Rows, limits: Limits | None
) -> NegativeSums:
    """The sums with those over the negatives in one more chunk, under a peak that may be higher."""
    similarity = dot(rows.embedding, chunk.embedding.T)
    negative = is_selected(rows, chunk, similarity, limits, Side.NEGATIVES)
    masked = jnp.where(negative, similarity, MASKED)
    peak = jnp.maximum(sums.peak, masked.max(1))
    # A row that has met no negative yet sums rubbish, which counts 0 once it meets one.
    weight, rescale = jnp.exp(masked - peak[:, None]), jnp.exp(sums.peak - peak)
    return NegativeSums(
        peak,
        sums.total * rescale + weight.sum(1),
        sums.weighted * rescale[:, None] + dot(weight, chunk.embedding),
        sums.similarity + jnp.where(negative, similarity, 0.0).sum(1),
        sums.number + negative.sum(1, dtype=jnp.float32),
    )


def walk_positives(
    tile: Rows,
    log_negatives: Float[Array, " r"],
    columns: tuple[Columns, ...],
    limits: Limits | None,
    chunk_size: int,
) -> PositiveSums:
    """Rows of one class against the part of each set where that class is."""
    num_rows, d = tile.embedding.shape
    zero, zeros = jnp.zeros(num_rows, jnp.float32), jnp.zeros((num_rows, d), jnp.float32)
    sums = PositiveSums(zero, zero, zeros, zero, zero)
    add = functools.partial(_add_positives, tile=tile, log_negatives=log_negatives, limits=limits)
    for part in columns:
        size = part.label.size
        member, index = part.label == tile.label[0], jnp.arange(size, dtype=jnp.int32)
        first = jnp.min(jnp.where(member, index, size), initial=size)
        end = jnp.max(jnp.where(member, index + 1, 0), initial=0)
        sums = fold(add, sums, part, first, end, chunk_size)
    return sums


def _add_positives(
    sums: PositiveSums,
    chunk: Columns,
    _: Array,
    *,
    tile: Rows,
    log_negatives: Float[Array, " r"],
    limits: Limits | None,
) -> PositiveSums:
    """The sums with those over the positives in one more chunk."""
    similarity = dot(tile.embedding, chunk.embedding.T)
    positive = is_selected(tile, chunk, similarity, limits, Side.POSITIVES)
    excess = log_negatives[:, None] - similarity
    slope = jnp.where(positive, sigmoid(excess), 0.0)
    return PositiveSums(
        sums.cost + jnp.where(positive, softplus(excess), 0.0).sum(1),
        sums.slope + slope.sum(1),
        sums.weighted + dot(slope, chunk.embedding),
        sums.similarity + jnp.where(positive, similarity, 0.0).sum(1),
        sums.number + positive.sum(1, dtype=jnp.float32),
    )


def candidate_gradient(
    rows: Rows, columns: Columns, slopes: Slopes, chunk_size: int
) -> Float[Array, "c d"]:
    """Gradient of the loss in candidates: each row times the derivative by its similarity."""
    add = functools.partial(_add_candidate_gradient, rows=rows, slopes=slopes)
    gradient = jnp.zeros(columns.embedding.shape, jnp.float32)
    return fold(add, gradient, columns, 0, columns.label.size, chunk_size)


def _add_candidate_gradient(
    gradient: Float[Array, "c d"], chunk: Columns, start: Array, *, rows: Rows, slopes: Slopes
) -> Float[Array, "c d"]:
    """The gradient with that of the candidates in one more chunk, which begins at `start`."""
    similarity = dot(rows.embedding, chunk.embedding.T)
    positive = is_selected(rows, chunk, similarity, slopes.positive_limits, Side.POSITIVES)
    negative = is_selected(rows, chunk, similarity, slopes.negative_limits, Side.NEGATIVES)
    softmax = jnp.exp(similarity - slopes.log_negatives[:, None])
    slope = jnp.where(negative, slopes.negative_weight[:, None] * softmax, 0.0)
    # sigmoid(L - s) is 1 / (1 + softmax).
    slope = jnp.where(positive, -slopes.positive_weight[:, None] / (1.0 + softmax), slope)
    part = lax.dynamic_slice_in_dim(gradient, start, chunk.label.size)
    part += dot(slope.T, rows.embedding)
    return lax.dynamic_update_slice_in_dim(gradient, part, start, 0)


def similarities(rows: Rows, columns: Columns, chunk_size: int) -> Float[Array, "r c"]:
    """Of all pairs, for few rows: one product, or chunk by chunk where columns must be widened."""
    if columns.embedding.dtype == jnp.float32:
        return dot(rows.embedding, columns.embedding.T)
    products = jnp.zeros((rows.label.size, columns.label.size), jnp.float32)
    add = functools.partial(_add_similarities, rows=rows)
    return fold(add, products, columns, 0, columns.label.size, chunk_size)


def _add_similarities(
    products: Float[Array, "r c"], chunk: Columns, start: Array, *, rows: Rows
) -> Float[Array, "r c"]:
    """The products with those of one more chunk, which begins at `start`."""
    part = lax.dynamic_slice_in_dim(products, start, chunk.label.size, axis=1)
    part += dot(rows.embedding, chunk.embedding.T)  # + 0 for what was seen before
    return lax.dynamic_update_slice_in_dim(products, part, start, axis=1)


def fold(
    visit: Callable[[Any, Columns, Array], Any],
    carry: Any,
    columns: Columns,
    first: int | Int[Array, ""],
    end: int | Int[Array, ""],
    chunk_size: int,
) -> Any:
    """Fold `visit` over columns first..end-1, in chunks of one size; it is told where each begins.

    A chunk that would reach over the last column begins earlier, and what was seen before counts as
    no class there.
    """
    size = columns.label.size
    chunk_size = min(chunk_size, size)
    if size == 0:
        return carry

    def step(i: Array, carry: Any) -> Any:
        unseen = first + i * chunk_size
        start = jnp.minimum(unseen, size - chunk_size)
        chunk = columns._replace(embedding=tied(columns.embedding, start))
        chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, chunk_size), chunk)
        fresh = start + jnp.arange(chunk_size, dtype=jnp.int32) >= unseen
        chunk = chunk._replace(label=jnp.where(fresh, chunk.label, NO_CLASS))
        return visit(carry, chunk._replace(embedding=finite(chunk)), start)

    return lax.fori_loop(0, -(-(end - first) // chunk_size), step, carry)
