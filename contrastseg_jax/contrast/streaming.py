"""Eq. 3 and its gradient with memory for anchors x one chunk of candidates, never for all of them.

Three walks. Over the negatives: log-sum-exp and its gradient together, under a running maximum, as
flash attention does it. Over the positives, which need that sum: anchors are sorted by class and
cut into tiles of one class, and a tile visits the part of the candidates where its class is. And,
for candidates into which gradients flow, over those. What the gradient of an anchor needs is summed
on the way, so that nothing is walked again backwards.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import sigmoid, softplus
from jaxtyping import Array, Bool, Float, Int

from contrastseg_jax.contrast.devices import (
    Split,
    max_over_candidates,
    sum_over_anchors,
    sum_over_candidates,
)
from contrastseg_jax.contrast.pairs import (
    MASKED,
    NO_CLASS,
    Columns,
    Limits,
    Rows,
    Side,
    columns_of,
    dot,
    finite,
    is_selected,
    sorted_rows,
)
from contrastseg_jax.contrast.selection import CandidateSets, RandomOrder, Selection, select
from contrastseg_jax.structs import Anchors, Candidates

TILE = 64  # rows of one class that select together, and visit their positives together

Metrics = dict[str, Float[Array, ""]]


class Embeddings(NamedTuple):
    """Those that the loss is differentiated in; its gradients in them have the same form."""

    anchors: Float[Array, "b s d"]
    candidates: tuple[Float[Array, "..."], ...]  # of each set that has no `stop_gradient`


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


def loss_and_gradient(
    anchors: Anchors,
    candidates: tuple[Candidates, ...],
    order: RandomOrder | None,
    *,
    temperature: float,
    positives: Selection,
    negatives: Selection,
    chunk_size: int,
    split: Split,
) -> tuple[Float[Array, ""], Metrics, Embeddings]:
    """The loss without its factor T / T_base, diagnostics and gradients, on one of the devices.

    `order`: what selections draw their pools from. `split`: what this device has only a part of.
    Loss and gradients are NaN where an anchor or a candidate that is valid is not finite.
    """
    rows, places = sorted_rows(anchors, temperature=temperature, split=split)
    sets = _candidate_sets(candidates, order, split)
    over_negatives, negative_limits = _sum_negatives(rows, sets, negatives, chunk_size)
    log_negatives, share = _log_sum_exp(over_negatives, split)
    over_positives, positive_limits = _sum_positives(
        rows, log_negatives, sets, positives, chunk_size
    )
    sums = over_positives.cost, over_positives.slope, over_positives.number
    cost, slope, number = sum_over_candidates(sums, split)
    num_anchors = sum_over_anchors(jnp.sum(number > 0, dtype=jnp.float32), split)
    num_anchors = jnp.maximum(num_anchors, 1.0)
    weight = jnp.where(number > 0, 1.0 / num_anchors / jnp.maximum(number, 1.0), 0.0)
    slopes = Slopes(log_negatives, weight, weight * slope, positive_limits, negative_limits)

    # No sum of the walks says it for certain: it may be in a candidate that was not drawn.
    lost = jnp.where(_all_finite(rows, sets), 0.0, jnp.nan)
    loss = sum_over_anchors(jnp.sum(weight * cost), split) + lost
    of_rows = (slopes.negative_weight * share)[:, None] * over_negatives.weighted
    of_rows -= slopes.positive_weight[:, None] * over_positives.weighted
    of_rows = sum_over_candidates(of_rows, split) / temperature + lost
    of_anchors = jnp.zeros_like(of_rows).at[places].set(of_rows)
    of_candidates = tuple(
        _like(c, candidate_gradient(rows, part, slopes, chunk_size, split) + lost)
        for c, part in zip(candidates, sets.columns, strict=True)
        if not c.stop_gradient
    )
    metrics = _diagnostics(rows, over_positives, over_negatives, temperature, split)
    metrics["positives_per_anchor"] /= num_anchors
    return loss, metrics, Embeddings(_like(anchors, of_anchors), of_candidates)


def _candidate_sets(
    candidates: tuple[Candidates, ...], order: RandomOrder | None, split: Split
) -> CandidateSets:
    """The sets as lists of columns, and the length of the longest candidate on any device."""
    ranks = order.ranks if order else (None,) * len(candidates)
    columns = tuple(columns_of(*pair) for pair in zip(candidates, ranks, strict=True))
    squares = [jnp.max(jnp.sum(finite(part) ** 2, axis=1), initial=0.0) for part in columns]
    return CandidateSets(
        columns=columns,
        shapes=tuple((math.prod(c.label.shape[:-1]), c.label.shape[-1]) for c in candidates),
        order=order,
        longest=max_over_candidates(jnp.sqrt(jnp.max(jnp.stack(squares))), split),
        split=split,
    )


def _sum_negatives(
    rows: Rows, sets: CandidateSets, selection: Selection, chunk_size: int
) -> tuple[NegativeSums, Limits | None]:
    """All negatives are walked by all rows at once, selected ones class by class."""
    if selection.strategy == "all":
        return walk_negatives(rows, sets.columns, None, chunk_size), None

    def visit(tile: Rows) -> tuple[NegativeSums, Limits | None]:
        columns, limits = select(tile, sets, selection)
        return walk_negatives(tile, columns, limits, chunk_size), limits

    return by_class(visit, rows)


def _log_sum_exp(sums: NegativeSums, split: Split) -> tuple[Float[Array, " r"], Float[Array, " r"]]:
    """L over the negatives on all devices, and the share of exp(peak) on this device in exp(L)."""
    peak = max_over_candidates(sums.peak, split)
    rescale = jnp.exp(sums.peak - peak)
    # Below 1 only for rows that never were walked: nowhere is a set, or they are not valid.
    total = jnp.maximum(sum_over_candidates(sums.total * rescale, split), 1.0)
    return peak + jnp.log(total), rescale / total


def _sum_positives(
    rows: Rows,
    log_negatives: Float[Array, " r"],
    sets: CandidateSets,
    selection: Selection,
    chunk_size: int,
) -> tuple[PositiveSums, Limits | None]:
    """Positives are walked class by class."""

    def visit(tile: Rows, log_negatives: Array) -> tuple[PositiveSums, Limits | None]:
        columns, limits = select(tile, sets, selection)
        return walk_positives(tile, log_negatives, columns, limits, chunk_size), limits

    return by_class(visit, rows, log_negatives)


def _all_finite(rows: Rows, sets: CandidateSets) -> Bool[Array, ""]:
    """Whether all anchors and candidates that take part, on all devices, are finite."""
    in_rows = jnp.sum(~jnp.isfinite(rows.embedding), dtype=jnp.int32)
    in_sets = jnp.zeros((), jnp.int32)
    for columns in sets.columns:
        largest = jnp.max(jnp.abs(columns.embedding), axis=1)  # NaN where one is
        spoilt = ~jnp.isfinite(largest) & (columns.label != NO_CLASS)
        in_sets += jnp.sum(spoilt, dtype=jnp.int32)
    in_rows = sum_over_anchors(in_rows, sets.split)
    return in_rows + sum_over_candidates(in_sets, sets.split) == 0


def _diagnostics(
    rows: Rows,
    positives: PositiveSums,
    negatives: NegativeSums,
    temperature: float,
    split: Split,
) -> Metrics:
    """Number of positive pairs, and the mean similarity of the pairs of each kind."""
    sums = positives.number, positives.similarity, negatives.number, negatives.similarity
    sums = tuple(jnp.sum(jnp.where(rows.label != NO_CLASS, part, 0.0)) for part in sums)
    sums = sum_over_anchors(sum_over_candidates(sums, split), split)
    num_positives, of_positives, num_negatives, of_negatives = sums
    return {
        "positives_per_anchor": num_positives,
        "positive_similarity": temperature * of_positives / jnp.maximum(num_positives, 1.0),
        "negative_similarity": temperature * of_negatives / jnp.maximum(num_negatives, 1.0),
    }


def _like(given: Anchors | Candidates, gradient: Float[Array, "x d"]) -> Float[Array, "*shape d"]:
    """A gradient in the shape and type of the embeddings that it belongs to."""
    return gradient.reshape(given.embedding.shape).astype(given.embedding.dtype)


# --- The three walks ------------------------------------------------------------------------------


def walk_negatives(
    rows: Rows, columns: tuple[Columns, ...], limits: Limits | None, chunk_size: int
) -> NegativeSums:
    """All sets, chunk by chunk, against all rows."""
    num_rows, d = rows.embedding.shape
    zero, zeros = jnp.zeros(num_rows, jnp.float32), jnp.zeros((num_rows, d), jnp.float32)
    sums = NegativeSums(jnp.full(num_rows, MASKED, jnp.float32), zero, zeros, zero, zero)
    add = functools.partial(_add_negatives, rows=rows, limits=limits)
    for part in columns:
        sums = _fold(add, sums, part, 0, part.label.size, chunk_size)
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
        sums = _fold(add, sums, part, first, end, chunk_size)
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
    rows: Rows, columns: Columns, slopes: Slopes, chunk_size: int, split: Split
) -> Float[Array, "c d"]:
    """Gradient of the loss in candidates: each row times the derivative by its similarity."""
    add = functools.partial(_add_candidate_gradient, rows=rows, slopes=slopes)
    gradient = jnp.zeros(columns.embedding.shape, jnp.float32)
    gradient = _fold(add, gradient, columns, 0, columns.label.size, chunk_size)
    return sum_over_anchors(gradient, split)


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


# --- Class by class, chunk by chunk ---------------------------------------------------------------


def by_class(visit: Callable[..., Any], rows: Rows, *more: Float[Array, " r"]) -> Any:
    """Results of `visit(tile, ...)` for all rows, which are sorted by label, those without last.

    A tile begins with the rows of one class. Those of the next that fill it up get results too,
    which are overwritten by those of the tile that begins with them.
    """
    padded = jax.tree.map(
        lambda x: jnp.pad(x, ((0, TILE),) + ((0, 0),) * (x.ndim - 1)), (rows, *more)
    )
    label = jnp.pad(rows.label, (0, TILE), constant_values=NO_CLASS)
    padded = (padded[0]._replace(label=label), *padded[1:])
    begin = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: visit(*_cut(padded, begin)))
    results = jax.tree.map(lambda x: jnp.zeros((label.size, *x.shape[1:]), x.dtype), shapes)
    num_valid = jnp.sum(label != NO_CLASS, dtype=jnp.int32)
    _, results = lax.while_loop(
        lambda carry: carry[0] < num_valid,
        functools.partial(_visit_tile, visit, padded),
        (begin, results),
    )
    return jax.tree.map(lambda x: x[: rows.label.size], results)


def _visit_tile(
    visit: Callable[..., Any], padded: tuple[Any, ...], carry: tuple[Int[Array, ""], Any]
) -> tuple[Int[Array, ""], Any]:
    """Write the results of the tile that begins at some row; the next begins with another class."""
    start, results = carry
    tile, *others = _cut(padded, start)
    results = jax.tree.map(
        lambda written, x: lax.dynamic_update_slice_in_dim(written, x, start, 0),
        results,
        visit(tile, *others),
    )
    return start + jnp.sum(tile.label == tile.label[0], dtype=jnp.int32), results


def _cut(padded: tuple[Any, ...], start: Int[Array, ""]) -> tuple[Any, ...]:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, TILE), padded)


def _fold(
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
        chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, chunk_size), columns)
        fresh = start + jnp.arange(chunk_size, dtype=jnp.int32) >= unseen
        chunk = chunk._replace(label=jnp.where(fresh, chunk.label, NO_CLASS))
        return visit(carry, chunk._replace(embedding=finite(chunk)), start)

    return lax.fori_loop(0, -(-(end - first) // chunk_size), step, carry)
