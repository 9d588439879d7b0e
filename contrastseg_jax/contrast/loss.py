"""The supervised pixel InfoNCE of the paper (Eq. 3).

Everything is written for static shapes: a count that depends on the data becomes a `valid` mask,
and "nothing to contrast" is a loss of exactly 0 with a gradient of exactly 0.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from contrastseg_jax.contrast.grouped_sort import sort_by_group
from contrastseg_jax.contrast.selection import (
    NO_LABEL,
    POOLED,
    RANK_BITS,
    STRATEGIES,
    Order,
    Selection,
)
from contrastseg_jax.contrast.streaming import loss_and_gradient
from contrastseg_jax.structs import Anchors, Candidates

Metrics = dict[str, Float[Array, ""]]


def pixel_contrast_loss(
    anchors: Anchors,
    candidates: tuple[Candidates, ...],
    rng: Key[Array, ""] | None = None,
    *,
    temperature: float,
    base_temperature: float,
    positives: str = "all",
    negatives: str = "all",
    num_positives: int = 1024,
    num_negatives: int = 2048,
    approximate: bool = False,
    mesh: Mesh | None = None,
    split_candidates: bool = False,
    chunk_size: int = 1024,
) -> tuple[Float[Array, ""], Metrics]:
    """Pixel-wise supervised InfoNCE (Eq. 3), averaged over positives, then over anchors.

        L_i = T/T_base · 1/|P_i| Σ_{p∈P_i} -log  exp(i·p/T) / (exp(i·p/T) + Σ_{n∈N_i} exp(i·n/T))

    P_i: valid candidates with i's label, of all sets together; N_i: those with another. With
    L = log Σ_n exp(i·n/T) each term is softplus(L - i·p/T). Anchors without a positive are left out
    of the mean; without a negative a term is 0. Rows with valid=False never matter, whatever they
    hold; a valid one that is not finite, drawn or not, makes loss and gradient NaN. Similarities
    with all candidates never exist at once (see `streaming.py`): those of all anchors with
    `chunk_size` of them, or, where the hardest are sought, of a few anchors.

    `positives`, `negatives`: how P_i and N_i are thinned out (Sec. 3.2), both at random by `rng`.
      all: not at all; random: `num_positives` and `num_negatives` of them; hardest: as many, the
      positives least similar and the negatives most similar to i, and all that tie with the last;
      semi_hard: as many of the hardest tenth. `approximate`: find those by `lax.approx_max_k`.
    `mesh`: the devices over which the anchors' images are split. Each holds all candidates or, with
      `split_candidates`, its part of every set (of the last axis but one of `embedding`).

    Returns the loss and, for the log, `positives_per_anchor`, `positive_similarity` and
    `negative_similarity` (means over the anchors, and the pairs, that count), and `hard_anchors`,
    the share of anchors that are, where that is known.
    """
    if not candidates:
        raise ValueError("candidates must hold at least one set")
    for strategy in (positives, negatives):
        if strategy not in STRATEGIES:
            raise ValueError(f"{strategy!r}: must be one of {', '.join(STRATEGIES)}")
    if not any(c.label.size for c in candidates):
        positives = negatives = "all"  # of nothing
    chosen = (
        Selection(positives, num_positives, approximate),
        Selection(negatives, num_negatives, approximate),
    )
    ranks, order = None, None
    if POOLED & {positives, negatives}:
        if rng is None:
            raise ValueError(f"positives {positives} and negatives {negatives} need an rng")
        ranks, order = _shuffle(candidates, rng)
        if mesh is not None:  # every device sorts for itself: cheaper than sending it round
            whole = NamedSharding(mesh, PartitionSpec())
            ranks, order = lax.with_sharding_constraint((ranks, order), whole)
    measure = functools.partial(
        loss_and_gradient,
        temperature=temperature,
        base_temperature=base_temperature,
        positives=chosen[0],
        negatives=chosen[1],
        chunk_size=chunk_size,
    )
    if mesh is not None:
        measure = functools.partial(_on_mesh, measure, mesh, split_candidates)
    index = jnp.arange(anchors.label.size, dtype=jnp.int32).reshape(anchors.label.shape)
    loss, metrics = cast(Any, _loss)(measure, anchors, index, candidates, ranks, order)
    metrics = lax.stop_gradient(metrics)
    if anchors.hard is not None:
        num_anchors = jnp.sum(anchors.valid, dtype=jnp.float32)
        num_hard = jnp.sum(anchors.hard & anchors.valid, dtype=jnp.float32)
        metrics["hard_anchors"] = num_hard / jnp.maximum(num_anchors, 1.0)
    return loss, metrics


def _shuffle(
    candidates: tuple[Candidates, ...], rng: Key[Array, ""]
) -> tuple[tuple[Int[Array, "..."], ...], Order]:
    """A random order that depends on neither devices nor embeddings, and each one's rank in it."""
    label = jnp.concatenate([jnp.where(c.valid, c.label, NO_LABEL).reshape(-1) for c in candidates])
    if label.size > 1 << RANK_BITS:
        raise ValueError(f"{label.size} candidates: at most {1 << RANK_BITS} can be drawn from")
    index, _, _ = sort_by_group((label == NO_LABEL).astype(jnp.int32), rng, num_groups=1)
    rank = jnp.zeros_like(index).at[index].set(jnp.arange(index.size, dtype=jnp.int32))
    keys = jnp.sort((label.astype(jnp.uint32) << RANK_BITS) | rank.astype(jnp.uint32))
    ends = itertools.accumulate(c.label.size for c in candidates[:-1])
    ranks = jnp.split(rank, list(ends))
    shapes = [c.label.shape for c in candidates]
    return tuple(r.reshape(s) for r, s in zip(ranks, shapes, strict=True)), Order(index, keys)


def _on_mesh(
    measure: Callable[..., Any],
    mesh: Mesh,
    split_candidates: bool,
    anchors: Anchors,
    index: Int[Array, "b s"],
    candidates: tuple[Candidates, ...],
    ranks: tuple[Int[Array, "..."], ...] | None,
    order: Order | None,
    *,
    differentiated: tuple[bool, ...],
) -> tuple[Float[Array, ""], Metrics, tuple[Array, tuple[Array | None, ...]]]:
    """`measure` on every device, on its own rows or its own candidates: the others are whole."""
    whole, split = PartitionSpec(), PartitionSpec("data")
    of_rows = whole if split_candidates else split
    of_sets = tuple(
        PartitionSpec(*[None] * (c.label.ndim - 1), "data") if split_candidates else whole
        for c in candidates
    )
    of_gradients = tuple(
        spec if wanted else None for spec, wanted in zip(of_sets, differentiated, strict=True)
    )
    return jax.shard_map(
        functools.partial(
            measure,
            differentiated=differentiated,
            rows_axis=None if split_candidates else "data",
            candidates_axis="data" if split_candidates else None,
        ),
        mesh=mesh,
        in_specs=(of_rows, of_rows, of_sets, None if ranks is None else of_sets, whole),
        out_specs=(whole, whole, (of_rows, of_gradients)),
        check_vma=False,
    )(anchors, index, candidates, ranks, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    measure: Callable[..., Any],
    anchors: Anchors,
    index: Int[Array, "b s"],
    candidates: tuple[Candidates, ...],
    *drawn: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss alone; when it is differentiated, its gradient is found on the same way."""
    nothing = (False,) * len(candidates)
    return measure(anchors, index, candidates, *drawn, differentiated=nothing)[:2]


def _loss_forward(
    measure: Callable[..., Any], *arguments: Any
) -> tuple[tuple[Float[Array, ""], Metrics], Any]:
    differentiated = tuple(c.embedding.perturbed for c in arguments[2])
    values = jax.tree.map(lambda x: x.value, arguments)
    loss, metrics, gradients = measure(*values, differentiated=differentiated)
    return (loss, metrics), gradients


def _loss_backward(_: Callable[..., Any], gradients: Any, cotangents: Any) -> tuple[Any, ...]:
    slope, nothing = cotangents[0], cast(Any, None)
    of_anchors, of_candidates = jax.tree.map(lambda x: slope.astype(x.dtype) * x, gradients)
    return (
        Anchors(of_anchors, nothing, nothing),
        None,
        tuple(Candidates(part, nothing, nothing) for part in of_candidates),
        None,
        None,
    )


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)
