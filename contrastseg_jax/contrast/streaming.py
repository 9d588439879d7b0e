"""Eq. 3 and its gradient with memory for anchors x one chunk of candidates, never for all of them.

Three walks. Over the negatives: log-sum-exp and its gradient together, under a running maximum, as
flash attention does it. Over the positives, which need that sum: anchors are sorted by class and
cut into tiles of one class, and a tile visits the part of the candidates where its class is. And,
for candidates that are differentiated themselves, over those. What the gradient of an anchor needs
is summed on the way, so that nothing is walked again backwards.
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

from contrastseg_jax.contrast.selection import (
    MASKED,
    NO_ANCHOR,
    NO_CLASS,
    Columns,
    Limits,
    Order,
    Rows,
    Selection,
    dot,
    finite,
    is_selected,
    select,
)
from contrastseg_jax.structs import Anchors, Candidates

TILE = 64  # rows of one class that select together, and visit their positives together

Metrics = dict[str, Float[Array, ""]]
Gradients = tuple[Float[Array, "b s d"], tuple[Float[Array, "..."] | None, ...]]


class Negatives(NamedTuple):
    """Of each row, over its negatives: log Σ exp(s) is peak + log(total)."""

    peak: Float[Array, " r"]
    total: Float[Array, " r"]
    weighted: Float[Array, "r d"]  # Σ exp(s - peak) · negative
    similarity: Float[Array, " r"]  # Σ s
    number: Float[Array, " r"]


class Positives(NamedTuple):
    """Of each row, over its positives, with L the log Σ exp of its negatives."""

    cost: Float[Array, " r"]  # Σ softplus(L - s)
    slope: Float[Array, " r"]  # Σ sigmoid(L - s), the derivative of `cost` by L
    weighted: Float[Array, "r d"]  # Σ sigmoid(L - s) · positive
    similarity: Float[Array, " r"]  # Σ s
    number: Float[Array, " r"]


def loss_and_gradient(
    anchors: Anchors,
    index: Int[Array, "b s"],
    candidates: tuple[Candidates, ...],
    ranks: tuple[Int[Array, "..."], ...] | None,
    order: Order | None,
    *,
    temperature: float,
    base_temperature: float,
    positives: Selection,
    negatives: Selection,
    chunk_size: int,
    differentiated: tuple[bool, ...],
    rows_axis: str | None = None,
    candidates_axis: str | None = None,
) -> tuple[Float[Array, ""], Metrics, Gradients]:
    """Loss, diagnostics, and gradients in the anchors and in the sets that are `differentiated`.

    All of them NaN where an anchor or a candidate that is valid is not finite.

    `index` is the place of each anchor in the batch; `ranks` and `order` are the random order from
    which selections draw. It runs on every device: the anchors lie over the devices of the mesh
    axis `rows_axis`, or the candidates over those of `candidates_axis`; what lies over no axis is
    whole on each device.
    """
    if ranks is None:
        ranks = tuple(jnp.zeros(c.label.shape, jnp.int32) for c in candidates)
    sets = tuple(_columns(*pair) for pair in zip(candidates, ranks, strict=True))
    rows, places = _sorted_rows(anchors, index, temperature)
    layouts = tuple((math.prod(c.label.shape[:-1]), c.label.shape[-1]) for c in candidates)
    choose = functools.partial(
        select,
        sets=sets,
        layouts=layouts,
        order=order,
        longest=_longest(sets, candidates_axis),
        axis=candidates_axis,
    )

    away, away_limits = _find_negatives(rows, sets, negatives, choose, chunk_size)
    peak = lax.pmax(away.peak, candidates_axis) if candidates_axis else away.peak
    share = jnp.exp(away.peak - peak)
    # Below 1 only for rows that never were walked: nowhere is a set, or they are not valid.
    total = jnp.maximum(_over(candidates_axis, away.total * share), 1.0)
    log_negatives = peak + jnp.log(total)

    near, near_limits = _find_positives(rows, log_negatives, positives, choose, chunk_size)
    cost, slope, number = _over(candidates_axis, (near.cost, near.slope, near.number))
    num_anchors = _over(rows_axis, jnp.sum(number > 0, dtype=jnp.float32))
    scale = temperature / base_temperature / jnp.maximum(num_anchors, 1.0)
    pull = jnp.where(number > 0, scale / jnp.maximum(number, 1.0), 0.0)
    push = pull * slope
    # No sum of the walks says it for certain: it may be in a candidate that was not drawn.
    lost = jnp.where(_all_finite(rows, sets, rows_axis, candidates_axis), 0.0, jnp.nan)
    loss = _over(rows_axis, jnp.sum(pull * cost)) + lost

    gradient = (push * share / total)[:, None] * away.weighted - pull[:, None] * near.weighted
    gradient = _over(candidates_axis, gradient) / temperature + lost
    gradient = jnp.zeros_like(gradient).at[places].set(gradient).reshape(anchors.embedding.shape)
    gradient = gradient.astype(anchors.embedding.dtype)

    def gradient_of(set_: Candidates, columns: Columns) -> Array:
        found = candidate_gradient(
            *(rows, log_negatives, pull, push, near_limits, away_limits, columns),
            chunk_size=chunk_size,
        )
        found = _over(rows_axis, found) + lost
        return found.reshape(set_.embedding.shape).astype(set_.embedding.dtype)

    of_candidates = tuple(
        gradient_of(c, columns) if wanted else None
        for c, columns, wanted in zip(candidates, sets, differentiated, strict=True)
    )
    metrics = _diagnostics(rows, near, away, temperature, rows_axis or candidates_axis)
    metrics["positives_per_anchor"] /= jnp.maximum(num_anchors, 1.0)
    return loss, metrics, (gradient, of_candidates)


def walk_negatives(
    rows: Rows, sets: tuple[Columns, ...], limits: Limits | None, chunk_size: int
) -> Negatives:
    """All sets, chunk by chunk, against all rows."""
    num_rows, d = rows.embedding.shape
    zero, zeros = jnp.zeros(num_rows, jnp.float32), jnp.zeros((num_rows, d), jnp.float32)
    start = Negatives(jnp.full(num_rows, MASKED, jnp.float32), zero, zeros, zero, zero)

    def visit(chunk: Columns, found: Negatives) -> Negatives:
        similarity = dot(rows.embedding, chunk.embedding.T)
        negative = is_selected(rows, chunk, similarity, limits, positive=False)
        masked = jnp.where(negative, similarity, MASKED)
        peak = jnp.maximum(found.peak, masked.max(1))
        # A row that has met no negative yet sums rubbish, which counts 0 once it meets one.
        weight, before = jnp.exp(masked - peak[:, None]), jnp.exp(found.peak - peak)
        return Negatives(
            peak,
            found.total * before + weight.sum(1),
            found.weighted * before[:, None] + dot(weight, chunk.embedding),
            found.similarity + jnp.where(negative, similarity, 0.0).sum(1),
            found.number + negative.sum(1, dtype=jnp.float32),
        )

    for columns in sets:
        start = _fold(visit, start, columns, 0, columns.label.size, chunk_size)
    return start


def walk_positives(
    tile: Rows,
    log_negatives: Float[Array, " r"],
    sets: tuple[Columns, ...],
    limits: Limits | None,
    chunk_size: int,
) -> Positives:
    """Rows of one class against the part of each set where that class is."""
    num_rows, d = tile.embedding.shape
    zero, zeros = jnp.zeros(num_rows, jnp.float32), jnp.zeros((num_rows, d), jnp.float32)
    start = Positives(zero, zero, zeros, zero, zero)

    def visit(chunk: Columns, found: Positives) -> Positives:
        similarity = dot(tile.embedding, chunk.embedding.T)
        positive = is_selected(tile, chunk, similarity, limits, positive=True)
        excess = log_negatives[:, None] - similarity
        slope = jnp.where(positive, sigmoid(excess), 0.0)
        return Positives(
            found.cost + jnp.where(positive, softplus(excess), 0.0).sum(1),
            found.slope + slope.sum(1),
            found.weighted + dot(slope, chunk.embedding),
            found.similarity + jnp.where(positive, similarity, 0.0).sum(1),
            found.number + positive.sum(1, dtype=jnp.float32),
        )

    for columns in sets:
        size = columns.label.size
        member, index = columns.label == tile.label[0], jnp.arange(size, dtype=jnp.int32)
        first = jnp.min(jnp.where(member, index, size), initial=size)
        end = jnp.max(jnp.where(member, index + 1, 0), initial=0)
        start = _fold(visit, start, columns, first, end, chunk_size)
    return start


def candidate_gradient(
    rows: Rows,
    log_negatives: Float[Array, " r"],
    pull: Float[Array, " r"],
    push: Float[Array, " r"],
    near_limits: Limits | None,
    away_limits: Limits | None,
    columns: Columns,
    *,
    chunk_size: int,
) -> Float[Array, "c d"]:
    """Gradient of the loss in candidates: each row times the derivative by its similarity.

    `pull` weighs the sigmoids of a row's positives, `push` the softmax over its negatives.
    """
    size = columns.label.size
    chunk_size = min(chunk_size, size)

    def visit(chunk: Columns, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        gradient, begin = carry
        similarity = dot(rows.embedding, chunk.embedding.T)
        positive = is_selected(rows, chunk, similarity, near_limits, positive=True)
        negative = is_selected(rows, chunk, similarity, away_limits, positive=False)
        ratio = jnp.exp(similarity - log_negatives[:, None])  # softmax; sigmoid is 1 / (1 + ratio)
        slope = jnp.where(negative, push[:, None] * ratio, 0.0)
        slope = jnp.where(positive, -pull[:, None] / (1.0 + ratio), slope)
        cut = jnp.minimum(begin, size - chunk_size)  # where `_fold` cut the chunk
        part = lax.dynamic_slice_in_dim(gradient, cut, chunk_size)
        part += dot(slope.T, rows.embedding)
        return lax.dynamic_update_slice_in_dim(gradient, part, cut, 0), begin + chunk_size

    start = jnp.zeros(columns.embedding.shape, jnp.float32), jnp.zeros((), jnp.int32)
    return _fold(visit, start, columns, 0, size, chunk_size)[0]


def by_class(visit: Callable[..., Any], rows: Rows, *more: Float[Array, " r"]) -> Any:
    """Results of `visit(tile, ...)` for all rows, which are sorted by label, those without last.

    A tile begins with the rows of one class. Those of the next that fill it up get results too,
    which are overwritten by those of the tile that begins with them.
    """
    num_rows = rows.label.size
    label = jnp.pad(rows.label, (0, TILE), constant_values=NO_CLASS)
    whole = jax.tree.map(
        lambda x: jnp.pad(x, ((0, TILE),) + ((0, 0),) * (x.ndim - 1)), (rows, *more)
    )
    whole = (whole[0]._replace(label=label), *whole[1:])

    def cut(start: Array) -> tuple[Any, ...]:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, TILE), whole)

    def step(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        start, results = carry
        tile, *others = cut(start)
        results = jax.tree.map(
            lambda written, x: lax.dynamic_update_slice_in_dim(written, x, start, 0),
            results,
            visit(tile, *others),
        )
        return start + jnp.sum(tile.label == tile.label[0], dtype=jnp.int32), results

    begin = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: visit(*cut(begin)))
    results = jax.tree.map(lambda x: jnp.zeros((num_rows + TILE, *x.shape[1:]), x.dtype), shapes)
    num_valid = jnp.sum(label != NO_CLASS, dtype=jnp.int32)
    _, results = lax.while_loop(lambda carry: carry[0] < num_valid, step, (begin, results))
    return jax.tree.map(lambda x: x[:num_rows], results)


def _find_negatives(
    rows: Rows,
    sets: tuple[Columns, ...],
    selection: Selection,
    choose: Callable[..., tuple[tuple[Columns, ...], Limits]],
    chunk_size: int,
) -> tuple[Negatives, Limits | None]:
    """All negatives are walked by all rows at once, selected ones class by class."""
    if selection.strategy == "all":
        return walk_negatives(rows, sets, None, chunk_size), None

    def visit(tile: Rows) -> tuple[Negatives, Limits]:
        some, limits = choose(tile, selection=selection, positive=False)
        return walk_negatives(tile, some, limits, chunk_size), limits

    return by_class(visit, rows)


def _find_positives(
    rows: Rows,
    log_negatives: Float[Array, " r"],
    selection: Selection,
    choose: Callable[..., tuple[tuple[Columns, ...], Limits]],
    chunk_size: int,
) -> tuple[Positives, Limits]:
    def visit(tile: Rows, log_negatives: Array) -> tuple[Positives, Limits]:
        some, limits = choose(tile, selection=selection, positive=True)
        return walk_positives(tile, log_negatives, some, limits, chunk_size), limits

    return by_class(visit, rows, log_negatives)


def _diagnostics(
    rows: Rows, near: Positives, away: Negatives, temperature: float, axis: str | None
) -> Metrics:
    """Number of positive pairs, and the mean similarity of the pairs of each kind."""
    sums = near.number, near.similarity, away.number, away.similarity
    real = rows.label != NO_CLASS
    sums = _over(axis, tuple(jnp.sum(jnp.where(real, part, 0.0)) for part in sums))
    num_positives, of_positives, num_negatives, of_negatives = sums
    return {
        "positives_per_anchor": num_positives,
        "positive_similarity": temperature * of_positives / jnp.maximum(num_positives, 1.0),
        "negative_similarity": temperature * of_negatives / jnp.maximum(num_negatives, 1.0),
    }


def _fold(
    visit: Callable[[Columns, Any], Any],
    carry: Any,
    columns: Columns,
    first: int | Int[Array, ""],
    end: int | Int[Array, ""],
    chunk_size: int,
) -> Any:
    """Fold `visit` over columns first..end-1, in chunks of one size."""
    size = columns.label.size
    chunk_size = min(chunk_size, size)
    if size == 0:
        return carry

    def step(i: Array, carry: Any) -> Any:
        begin = first + i * chunk_size
        # A chunk that would reach over the end is cut earlier; what was seen counts as no class.
        cut = jnp.minimum(begin, size - chunk_size)
        chunk = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, cut, chunk_size), columns)
        fresh = cut + jnp.arange(chunk_size, dtype=jnp.int32) >= begin
        chunk = chunk._replace(label=jnp.where(fresh, chunk.label, NO_CLASS))
        return visit(chunk._replace(embedding=finite(chunk)), carry)

    return lax.fori_loop(0, -(-(end - first) // chunk_size), step, carry)


def _sorted_rows(
    anchors: Anchors, index: Int[Array, "b s"], temperature: float
) -> tuple[Rows, Int[Array, " r"]]:
    """The anchors by class, those that are not valid last, and where each one was."""
    label = jnp.where(anchors.valid, anchors.label.astype(jnp.int32), NO_CLASS).reshape(-1)
    order = jnp.argsort(label).astype(jnp.int32)
    embedding = jnp.where(anchors.valid[..., None], anchors.embedding.astype(jnp.float32), 0.0)
    embedding = embedding.reshape(-1, embedding.shape[-1])[order] / temperature
    return Rows(embedding, label[order], index.reshape(-1)[order]), order


def _columns(candidates: Candidates, rank: Int[Array, "..."]) -> Columns:
    """A set in one row, with the labels of what is not valid taken away."""
    label = jnp.where(candidates.valid, candidates.label.astype(jnp.int32), NO_CLASS).reshape(-1)
    anchor = candidates.anchor
    if anchor is None:
        anchor = jnp.full(label.shape, NO_ANCHOR, jnp.int32)
    anchor = anchor.astype(jnp.int32).reshape(-1)
    embedding = candidates.embedding.reshape(-1, candidates.embedding.shape[-1])
    return Columns(embedding, label, anchor, rank.reshape(-1))


def _longest(sets: tuple[Columns, ...], axis: str | None) -> Float[Array, ""]:
    """The length of the longest candidate on any device."""
    squares = [jnp.max(jnp.sum(finite(c) ** 2, axis=1), initial=0.0) for c in sets]
    longest = jnp.sqrt(jnp.max(jnp.stack(squares)))
    return lax.pmax(longest, axis) if axis else longest


def _all_finite(
    rows: Rows, sets: tuple[Columns, ...], rows_axis: str | None, candidates_axis: str | None
) -> Bool[Array, ""]:
    """Whether all anchors and candidates that take part, on all devices, are finite."""
    in_rows = jnp.sum(~jnp.isfinite(rows.embedding), dtype=jnp.int32)
    in_sets = jnp.zeros((), jnp.int32)
    for columns in sets:
        largest = jnp.max(jnp.abs(columns.embedding), axis=1)  # NaN where one is
        spoilt = ~jnp.isfinite(largest) & (columns.label != NO_CLASS)
        in_sets += jnp.sum(spoilt, dtype=jnp.int32)
    return _over(rows_axis, in_rows) + _over(candidates_axis, in_sets) == 0


def _over(axis: str | None, tree: Any) -> Any:
    """The sum over the devices of a mesh axis, where there is one."""
    return lax.psum(tree, axis) if axis else tree
