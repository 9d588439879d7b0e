"""The supervised pixel InfoNCE of the paper (Eq. 3).

Everything is written for static shapes: a count that depends on the data becomes a `valid` mask,
and "nothing to contrast" is a loss of exactly 0 with a gradient of exactly 0.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from contrastseg_jax.contrast.devices import AXIS, Split
from contrastseg_jax.contrast.pairs import Side
from contrastseg_jax.contrast.selection import POOLED, STRATEGIES, RandomOrder, Selection, shuffle
from contrastseg_jax.contrast.streaming import Embeddings, Metrics, loss_and_gradient
from contrastseg_jax.structs import Anchors, Candidates


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
    Gradients flow into anchors, and into the sets of candidates that have no `stop_gradient`.

    Returns the loss and, for the log, `positives_per_anchor`, `negatives_per_anchor`,
    `positive_similarity` and `negative_similarity` (means over the anchors, and the pairs, that
    count), and `hard_anchors`, the share of anchors that are, where that is known.
    """
    _check(candidates, positives, negatives)
    if not any(c.label.size for c in candidates):
        positives = negatives = "all"  # of nothing
    order = None
    if POOLED & {positives, negatives}:
        if rng is None:
            raise ValueError(f"positives {positives} and negatives {negatives} need an rng")
        order = shuffle(candidates, rng)
    measure = functools.partial(
        loss_and_gradient,
        temperature=temperature,
        positives=Selection(Side.POSITIVES, positives, num_positives, approximate),
        negatives=Selection(Side.NEGATIVES, negatives, num_negatives, approximate),
        chunk_size=chunk_size,
    )
    if mesh is None:
        measure = functools.partial(measure, split=Split.NOTHING)
    else:
        split = Split.CANDIDATES if split_candidates else Split.ANCHORS
        measure = functools.partial(_on_mesh, measure, mesh, split)
    # The gradients are found along with the loss, so that nothing of this is differentiated.
    loss, metrics, gradients = measure(*lax.stop_gradient((anchors, candidates)), order)
    flowing = tuple(c.embedding for c in candidates if not c.stop_gradient)
    loss = _with_gradients(loss, gradients, Embeddings(anchors.embedding, flowing))
    if anchors.hard is not None:
        num_anchors = jnp.sum(anchors.valid, dtype=jnp.float32)
        num_hard = jnp.sum(anchors.hard & anchors.valid, dtype=jnp.float32)
        metrics["hard_anchors"] = num_hard / jnp.maximum(num_anchors, 1.0)
    return temperature / base_temperature * loss, metrics


def _check(candidates: tuple[Candidates, ...], *strategies: str) -> None:
    if not candidates:
        raise ValueError("candidates must hold at least one set")
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise ValueError(f"{strategy!r}: must be one of {', '.join(STRATEGIES)}")


def _on_mesh(
    measure: Callable[..., Any],
    mesh: Mesh,
    split: Split,
    anchors: Anchors,
    candidates: tuple[Candidates, ...],
    order: RandomOrder | None,
) -> tuple[Float[Array, ""], Metrics, Embeddings]:
    """`measure` on every device, with its part of what is split and with all of the rest."""
    whole: Any = PartitionSpec()
    of_anchors: Any = PartitionSpec(AXIS) if split is Split.ANCHORS else whole
    of_sets: Any = tuple(
        PartitionSpec(*[None] * (c.label.ndim - 1), AXIS) if split is Split.CANDIDATES else whole
        for c in candidates
    )
    of_gradients = tuple(
        spec for spec, c in zip(of_sets, candidates, strict=True) if not c.stop_gradient
    )
    of_order = None
    if order is not None:
        # Every device sorts for itself: cheaper than sending it round.
        order = lax.with_sharding_constraint(order, NamedSharding(mesh, whole))
        of_order = RandomOrder(ranks=of_sets, candidate=whole, keys=whole)
    return jax.shard_map(
        functools.partial(measure, split=split),
        mesh=mesh,
        in_specs=(of_anchors, of_sets, of_order),
        out_specs=(whole, whole, Embeddings(of_anchors, of_gradients)),
        check_vma=False,
    )(anchors, candidates, order)


@jax.custom_vjp
def _with_gradients(
    loss: Float[Array, ""], gradients: Embeddings, embeddings: Embeddings
) -> Float[Array, ""]:
    """The loss as a function of the embeddings, in which its gradients are known."""
    return loss


def _forward(
    loss: Float[Array, ""], gradients: Embeddings, embeddings: Embeddings
) -> tuple[Float[Array, ""], Embeddings]:
    return loss, gradients


def _backward(gradients: Embeddings, slope: Float[Array, ""]) -> tuple[None, None, Embeddings]:
    return None, None, jax.tree.map(lambda x: slope.astype(x.dtype) * x, gradients)


_with_gradients.defvjp(_forward, _backward)
