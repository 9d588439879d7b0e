"""Hard anchors, and the anchors of the batch as candidates (Sec. 3.2)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from contrastseg_jax.contrast.grouped_sort import sort_by_group
from contrastseg_jax.structs import IGNORE_LABEL, Anchors, Candidates


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

    draw = functools.partial(
        _draw_pixels,
        num_classes=num_classes,
        anchors_per_image=anchors_per_image,
        max_views=max_views,
    )
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


def _draw_pixels(
    group: Int[Array, " n"],
    rng: Key[Array, ""],
    *,
    num_classes: int,
    anchors_per_image: int,
    max_views: int,
) -> tuple[Int[Array, " s"], Int[Array, " s"], Bool[Array, " s"]]:
    """Pixels of one image, class by class and of each the hard ones first; classes; valid."""
    order, start, size = sort_by_group(group, rng, num_groups=2 * num_classes)
    start, size = start.reshape(num_classes, 2), size.reshape(num_classes, 2)
    num_hard, num_easy = _num_views(size, anchors_per_image, max_views)
    num_views = num_hard + num_easy
    end = jnp.cumsum(num_views, dtype=jnp.int32)
    row = jnp.arange(anchors_per_image, dtype=jnp.int32)
    cls = jnp.searchsorted(end, row, side="right").astype(jnp.int32)
    valid = cls < num_classes
    cls = jnp.where(valid, cls, 0)
    view = row - (end - num_views)[cls]
    is_hard = view < num_hard[cls]
    position = jnp.where(is_hard, start[cls, 0] + view, start[cls, 1] + view - num_hard[cls])
    return order[jnp.where(valid, position, 0)], cls, valid


def _num_views(
    size: Int[Array, "k 2"], anchors_per_image: int, max_views: int
) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
    """How many hard and how many easy pixels each class gives, of as many as it has."""
    num_present = jnp.sum(size.max(1) > 0, dtype=jnp.int32)
    views = jnp.minimum(anchors_per_image // jnp.maximum(num_present, 1), max_views)
    # Of a single view half would be none: then hard sampling would be off.
    half = jnp.maximum(views // 2, jnp.minimum(views, 1))
    hard = jnp.minimum(size[:, 0], jnp.maximum(half, views - size[:, 1]))
    return hard, jnp.minimum(size[:, 1], views - hard)
