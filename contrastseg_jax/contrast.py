"""Pixel contrast: anchors, candidates and the supervised pixel InfoNCE of the paper.

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
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from contrastseg_jax.selection import NO_LABEL, POOLED, RANK_BITS, STRATEGIES, Order, Selection
from contrastseg_jax.streaming import loss_and_gradient
from contrastseg_jax.structs import IGNORE_LABEL, Anchors, Candidates

Metrics = dict[str, Float[Array, ""]]


def label_at_stride(label: UInt8[Array, "b h w"], size: tuple[int, int]) -> Int[Array, "b hs ws"]:
    """Nearest label for every cell of a map of another size, odd ones (65x129) included.

    Cell i takes pixel floor(i * h / hs), PyTorch's `nearest`; the only place where labels shrink.
    """
    rows = jnp.arange(size[0], dtype=jnp.int32) * label.shape[1] // size[0]
    columns = jnp.arange(size[1], dtype=jnp.int32) * label.shape[2] // size[1]
    return label[:, rows[:, None], columns[None, :]].astype(jnp.int32)


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


def sample_anchors(
    embedding: Float[Array, "b hs ws d"],
    label: Int[Array, "b hs ws"],
    prediction: Int[Array, "b hs ws"],
    rng: Key[Array, " b"],
    *,
    num_classes: int,
    anchors_per_image: int,
    max_views: int,
    strategy: str,
) -> Anchors:
    """Segmentation-aware hard anchor sampling (Sec. 3.2), one independent draw per image.

    With p classes present, each gives min(anchors_per_image // p, max_views) pixels, or all it
    has. `strategy='hard'`: half of them (one at least) wrongly predicted, half rightly, the
    shorter side topped up by the other; `'random'`: any. Pixels that carry IGNORE_LABEL are never
    drawn. Rows are sorted by class within an image. More classes than rows: no anchors.
    """
    b, _, _, d = embedding.shape
    wrong = prediction != label if strategy == "hard" else jnp.zeros_like(label, bool)
    # Groups 2c: hard pixels of class c, 2c+1: easy ones; those without a class sort behind all.
    group = jnp.where(
        label < num_classes, 2 * label + (~wrong).astype(label.dtype), 2 * num_classes
    )

    def draw(group: Int[Array, " n"], rng: Key[Array, ""]) -> tuple[Array, Array, Array]:
        order, start, size = sort_by_group(group, rng, num_groups=2 * num_classes)
        start, size = start.reshape(num_classes, 2), size.reshape(num_classes, 2)
        num_present = jnp.sum(size.max(1) > 0, dtype=jnp.int32)
        views = jnp.minimum(anchors_per_image // jnp.maximum(num_present, 1), max_views)
        # Of a single view half would be none: then hard sampling would be off.
        half = jnp.maximum(views // 2, jnp.minimum(views, 1))
        hard = jnp.minimum(size[:, 0], jnp.maximum(half, views - size[:, 1]))
        taken = hard + jnp.minimum(size[:, 1], views - hard)
        end = jnp.cumsum(taken, dtype=jnp.int32)
        row = jnp.arange(anchors_per_image, dtype=jnp.int32)
        cls = jnp.searchsorted(end, row, side="right").astype(jnp.int32)
        valid = cls < num_classes
        cls = jnp.where(valid, cls, 0)
        view = row - (end - taken)[cls]
        is_hard = view < hard[cls]
        position = jnp.where(is_hard, start[cls, 0] + view, start[cls, 1] + view - hard[cls])
        return order[jnp.where(valid, position, 0)], cls, valid

    pixel, cls, valid = jax.vmap(draw)(group.reshape(b, -1), rng)
    hard = valid & jnp.take_along_axis((prediction != label).reshape(b, -1), pixel, axis=1)
    rows = jnp.take_along_axis(embedding.reshape(b, -1, d), pixel[:, :, None], axis=1, mode="clip")
    return Anchors(rows, jnp.where(valid, cls, IGNORE_LABEL), valid, hard)


def batch_candidates(anchors: Anchors) -> Candidates:
    """The anchors of the whole global batch as candidates; gradients flow into them.

    They are sorted by class, so that the positives of an anchor lie together. Each knows which
    anchor it is, so that none is its own positive.
    """
    label = anchors.label.reshape(-1)
    order = jnp.argsort(label).astype(jnp.int32)
    rows = anchors.embedding.reshape(-1, anchors.embedding.shape[-1])
    return Candidates(
        embedding=jnp.take(rows, order, axis=0, mode="clip"),
        label=label[order],
        valid=anchors.valid.reshape(-1)[order],
        anchor=order,
    )


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
