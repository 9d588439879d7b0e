"""Eq. 3 and its gradient with memory for anchors x one chunk of candidates, never for all of them.

Three walks (`walks.py`). Over the negatives: log-sum-exp and its gradient together. Over the
positives, which need that sum: anchors are sorted by class and cut into tiles of one class, and a
tile visits the part of the candidates where its class is. And, for candidates into which gradients
flow, over those. What the gradient of an anchor needs is summed on the way, so that nothing is
walked again backwards.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from contrastseg_jax.contrast.devices import (
    Split,
    max_over_candidates,
    sum_over_anchors,
    sum_over_candidates,
)
from contrastseg_jax.contrast.pairs import NO_CLASS, Columns, Limits, Rows, columns_of, sorted_rows
from contrastseg_jax.contrast.selection import (
    BLOCK,
    CandidateSets,
    RandomOrder,
    Selection,
    select,
)
from contrastseg_jax.contrast.walks import (
    NegativeSums,
    PositiveSums,
    Slopes,
    candidate_gradient,
    fold,
    walk_negatives,
    walk_positives,
)
from contrastseg_jax.structs import Anchors, Candidates

LARGEST_TILE = 64  # rows of one class that select together, and visit their positives together

Metrics = dict[str, Float[Array, ""]]


class Embeddings(NamedTuple):
    """Those that the loss is differentiated in; its gradients in them have the same form."""

    anchors: Float[Array, "b s d"]
    candidates: tuple[Float[Array, "..."], ...]  # of each set that has no `stop_gradient`


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
    sets = _candidate_sets(candidates, order, chunk_size, split)
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
    # No sum of the walks says it for certain: it may be in a candidate that was not drawn.
    lost = jnp.where(_all_finite(rows, sets), 0.0, jnp.nan)
    loss = sum_over_anchors(jnp.sum(weight * cost), split) + lost

    slopes = Slopes(log_negatives, weight, weight * slope, positive_limits, negative_limits)
    of_rows = _anchor_gradient(over_positives, over_negatives, slopes, share)
    of_rows = sum_over_candidates(of_rows, split) / temperature + lost
    of_anchors = jnp.zeros_like(of_rows).at[places].set(of_rows)
    of_candidates = tuple(
        _like(c, sum_over_anchors(candidate_gradient(rows, part, slopes, chunk_size), split) + lost)
        for c, part in zip(candidates, sets.columns, strict=True)
        if not c.stop_gradient
    )
    metrics = _diagnostics(rows, over_positives, over_negatives, temperature, split)
    metrics["positives_per_anchor"] /= num_anchors
    return loss, metrics, Embeddings(_like(anchors, of_anchors), of_candidates)


def _candidate_sets(
    candidates: tuple[Candidates, ...], order: RandomOrder | None, chunk_size: int, split: Split
) -> CandidateSets:
    """The sets as lists of columns, and the length of the longest candidate on any device."""
    ranks = order.ranks if order else (None,) * len(candidates)
    columns = tuple(columns_of(*pair) for pair in zip(candidates, ranks, strict=True))
    square = jnp.zeros((), jnp.float32)
    for part in columns:
        square = fold(_largest_square, square, part, 0, part.label.size, chunk_size)
    return CandidateSets(
        columns=columns,
        shapes=tuple((math.prod(c.label.shape[:-1]), c.label.shape[-1]) for c in candidates),
        order=order,
        longest=max_over_candidates(jnp.sqrt(square), split),
        chunk_size=chunk_size,
        split=split,
    )


def _largest_square(square: Float[Array, ""], chunk: Columns, _: Array) -> Float[Array, ""]:
    """The largest square of a length so far, with those of one more chunk."""
    return jnp.maximum(square, jnp.max(jnp.sum(chunk.embedding**2, axis=1)))


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
    """Number of pairs of each kind, and their mean similarity.

    The number of positives is that of all anchors together.
    """
    valid = rows.label != NO_CLASS
    sums = positives.number, positives.similarity, negatives.number, negatives.similarity
    sums = tuple(jnp.sum(jnp.where(valid, part, 0.0)) for part in sums)
    sums = sum_over_candidates(sums, split)
    *sums, num_rows = sum_over_anchors((*sums, jnp.sum(valid, dtype=jnp.float32)), split)
    num_positives, of_positives, num_negatives, of_negatives = sums
    return {
        "positives_per_anchor": num_positives,
        "negatives_per_anchor": num_negatives / jnp.maximum(num_rows, 1.0),
        "positive_similarity": temperature * of_positives / jnp.maximum(num_positives, 1.0),
        "negative_similarity": temperature * of_negatives / jnp.maximum(num_negatives, 1.0),
    }


def _anchor_gradient(
    positives: PositiveSums, negatives: NegativeSums, slopes: Slopes, share: Float[Array, " r"]
) -> Float[Array, "r d"]:
    """Gradient of the loss in rows: each candidate times the derivative by its similarity."""
    of_negatives = (slopes.negative_weight * share)[:, None] * negatives.weighted
    return of_negatives - slopes.positive_weight[:, None] * positives.weighted


def _like(given: Anchors | Candidates, gradient: Float[Array, "x d"]) -> Float[Array, "*shape d"]:
    """A gradient in the shape and type of the embeddings that it belongs to."""
    return gradient.reshape(given.embedding.shape).astype(given.embedding.dtype)


def tile_size(num_rows: int) -> int:
    """A sixteenth of the rows: of few, a large tile would mostly be padding."""
    return min(max(num_rows // 16 // BLOCK, 1) * BLOCK, LARGEST_TILE)


def by_class(visit: Callable[..., Any], rows: Rows, *more: Float[Array, " r"]) -> Any:
    """Results of `visit(tile, ...)` for all rows, which are sorted by label, those without last.

    A tile begins with the rows of one class. Those of the next that fill it up get results too,
    which are overwritten by those of the tile that begins with them.
    """
    size = tile_size(rows.label.size)
    padded = jax.tree.map(
        lambda x: jnp.pad(x, ((0, size),) + ((0, 0),) * (x.ndim - 1)), (rows, *more)
    )
    label = jnp.pad(rows.label, (0, size), constant_values=NO_CLASS)
    padded = (padded[0]._replace(label=label), *padded[1:])
    begin = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: visit(*_cut(padded, begin, size)))
    results = jax.tree.map(lambda x: jnp.zeros((label.size, *x.shape[1:]), x.dtype), shapes)
    num_valid = jnp.sum(label != NO_CLASS, dtype=jnp.int32)
    _, results = lax.while_loop(
        lambda carry: carry[0] < num_valid,
        functools.partial(_visit_tile, visit, padded, size),
        (begin, results),
    )
    return jax.tree.map(lambda x: x[: rows.label.size], results)


def _visit_tile(
    visit: Callable[..., Any],
    padded: tuple[Any, ...],
    size: int,
    carry: tuple[Int[Array, ""], Any],
) -> tuple[Int[Array, ""], Any]:
    """Write the results of the tile that begins at some row; the next begins with another class."""
    start, results = carry
    tile, *others = _cut(padded, start, size)
    results = jax.tree.map(
        lambda written, x: lax.dynamic_update_slice_in_dim(written, x, start, 0),
        results,
        visit(tile, *others),
    )
    return start + jnp.sum(tile.label == tile.label[0], dtype=jnp.int32), results


def _cut(padded: tuple[Any, ...], start: Int[Array, ""], size: int) -> tuple[Any, ...]:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), padded)
