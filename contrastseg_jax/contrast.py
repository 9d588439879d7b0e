"""Pixel contrast: hard anchor sampling and the supervised pixel InfoNCE of the paper.

Everything is written for static shapes: a count that depends on the data becomes a `valid` mask,
and "nothing to contrast" is a loss of exactly 0 with a gradient of exactly 0.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp, softplus
from jaxtyping import Array, Float, Int, Key, UInt8

from contrastseg_jax.structs import IGNORE_LABEL, Anchors, Candidates

MASKED = -1e30  # stands for minus infinity where a real one would turn gradients into NaN


def label_at_stride(label: UInt8[Array, "b h w"], size: tuple[int, int]) -> Int[Array, "b hs ws"]:
    """Nearest label for every cell of a map of another size, odd ones (65x129) included.

    Cell i takes pixel floor(i * h / hs), PyTorch's `nearest`; the only place where labels shrink.
    """
    rows = jnp.arange(size[0]) * label.shape[1] // size[0]
    columns = jnp.arange(size[1]) * label.shape[2] // size[1]
    return label[:, rows[:, None], columns[None, :]].astype(jnp.int32)


def sort_by_group(
    group: Int[Array, " n"], rng: Key[Array, ""], *, num_groups: int
) -> tuple[Int[Array, " n"], Int[Array, " g"], Int[Array, " g"]]:
    """Order pixels by group, at random inside each.

    Returns the pixel at each sorted position, and the start and size of groups 0..num_groups-1;
    pixels whose group is `num_groups` or more come last and belong to none.
    """
    random = jax.random.bits(rng, group.shape)
    index = jnp.arange(group.size, dtype=jnp.int32)
    group, _, order = lax.sort((group, random, index), num_keys=2)
    bounds = jnp.searchsorted(group, jnp.arange(num_groups + 1, dtype=group.dtype))
    return order, bounds[:-1].astype(jnp.int32), jnp.diff(bounds).astype(jnp.int32)


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
    has. `strategy='hard'`: half of them wrongly predicted, half rightly, the shorter side topped
    up by the other; `'random'`: any. Pixels that carry IGNORE_LABEL are never drawn. Rows are
    sorted by class within an image. More classes than rows: no anchors.
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
        num_present = jnp.sum(size.sum(1) > 0)
        views = jnp.minimum(anchors_per_image // jnp.maximum(num_present, 1), max_views)
        hard = jnp.minimum(size[:, 0], jnp.maximum(views // 2, views - size[:, 1]))
        taken = hard + jnp.minimum(size[:, 1], views - hard)
        end = jnp.cumsum(taken)
        row = jnp.arange(anchors_per_image, dtype=jnp.int32)
        cls = jnp.searchsorted(end, row, side="right").astype(jnp.int32)
        valid = cls < num_classes
        cls = jnp.where(valid, cls, 0)
        view = row - (end - taken)[cls]
        is_hard = view < hard[cls]
        position = jnp.where(is_hard, start[cls, 0] + view, start[cls, 1] + view - hard[cls])
        return order[jnp.where(valid, position, 0)], cls, valid

    pixel, cls, valid = jax.vmap(draw)(group.reshape(b, -1), rng)
    rows = jnp.take_along_axis(embedding.reshape(b, -1, d), pixel[:, :, None], axis=1, mode="clip")
    return Anchors(rows, jnp.where(valid, cls, IGNORE_LABEL), valid)


def batch_candidates(anchors: Anchors) -> Candidates:
    """The anchors of the whole global batch, in order, as candidates; gradients flow into them."""
    d = anchors.embedding.shape[-1]
    return Candidates(
        anchors.embedding.reshape(-1, d), anchors.label.reshape(-1), anchors.valid.reshape(-1)
    )


def join_candidates(first: Candidates, second: Candidates) -> Candidates:
    """Both sets, `first` in front; stored embeddings may be of a narrower dtype."""
    return Candidates(
        jnp.concatenate([first.embedding, second.embedding.astype(first.embedding.dtype)]),
        jnp.concatenate([first.label, second.label]),
        jnp.concatenate([first.valid, second.valid]),
    )


def pixel_contrast_loss(
    anchors: Anchors,
    candidates: Candidates,
    *,
    temperature: float,
    base_temperature: float,
    exclude_self: bool,
) -> Float[Array, ""]:
    """Pixel-wise supervised InfoNCE (Eq. 3), averaged over positives, then over anchors.

        L_i = T/T_base · 1/|P_i| Σ_{p∈P_i} -log  exp(i·p/T) / (exp(i·p/T) + Σ_{n∈N_i} exp(i·n/T))

    P_i: valid candidates with i's label; N_i: those with another. With L = log Σ_n exp(i·n/T) each
    term is softplus(L - i·p/T). Anchors without a positive are left out of the mean; without
    a negative a term is 0. Rows with valid=False never matter, whatever they hold.

    `exclude_self`: the first candidates are `batch_candidates(anchors)`, so candidate i is no
    positive of anchor i.
    """
    rows = batch_candidates(anchors)
    similarity = _similarity(rows, candidates) / temperature
    same = rows.label[:, None] == candidates.label[None, :]
    usable = rows.valid[:, None] & candidates.valid[None, :]
    positive, negative = usable & same, usable & ~same
    if exclude_self:
        positive &= ~jnp.eye(*same.shape, dtype=bool)
    log_negatives = logsumexp(jnp.where(negative, similarity, MASKED), axis=1, keepdims=True)
    cost = jnp.where(positive, softplus(log_negatives - similarity), 0.0)
    num_positives = positive.sum(1).astype(jnp.float32)
    per_anchor = cost.sum(1) / jnp.maximum(num_positives, 1.0)
    num_anchors = jnp.sum(num_positives > 0).astype(jnp.float32)
    return temperature / base_temperature * per_anchor.sum() / jnp.maximum(num_anchors, 1.0)


def _similarity(rows: Candidates, candidates: Candidates) -> Float[Array, "a c"]:
    """Dot products in float32; invalid rows count as zero vectors so that NaN cannot spread."""
    first, second = (
        jnp.where(side.valid[:, None], side.embedding.astype(jnp.float32), 0.0)
        for side in (rows, candidates)
    )
    return jnp.matmul(first, second.T, precision=lax.Precision.HIGHEST)
