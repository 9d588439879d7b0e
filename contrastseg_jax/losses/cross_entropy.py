"""Cross entropy in float32, which is 0 (never NaN) if every pixel is ignored."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.structs import SegmentationOutput


def cross_entropy(
    logits: Float[Array, "b h w k"], label: UInt8[Array, "b h w"], *, class_weights: Sequence[float]
) -> Float[Array, ""]:
    """Class-weighted cross entropy over labelled pixels: Σ w_y · ce / Σ w_y (PyTorch's mean).

    Labels that are no class (IGNORE_LABEL) have weight 0. Pixels of weight 0 are ignored, whatever
    their logits; NaN at any other makes the loss NaN. `class_weights`: one per class, or empty for
    1 everywhere. Original: `FSCELoss`.
    """
    num_classes = logits.shape[-1]
    weights = jnp.asarray(class_weights or (1.0,) * num_classes, jnp.float32)
    labelled = label < num_classes
    target = jnp.where(labelled, label, 0).astype(jnp.int32)
    weight = jnp.where(labelled, weights[target], 0.0)
    # Before the softmax: after it, a weight of 0 would hide NaN from the loss, not the gradient.
    logits = jnp.where(weight[..., None] > 0, logits.astype(jnp.float32), 0.0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    total = weight.sum()
    return (weight * loss).sum() / jnp.where(total > 0, total, 1.0)


def segmentation_loss(
    output: SegmentationOutput,
    label: UInt8[Array, "b h w"],
    *,
    class_weights: Sequence[float],
    aux_weight: float,
) -> Float[Array, ""]:
    """Cross entropy of the logits resized to the label's size, plus the auxiliary head's if any.

    Resizing spreads a NaN in the logits over the whole image. With an `aux_weight` of 0 the
    auxiliary logits are ignored.

    Original: `FSCELoss`, `FSAuxCELoss` (weight 0.4 on the auxiliary logits).
    """
    size = label.shape[1], label.shape[2]
    loss = cross_entropy(resize_bilinear(output.logits, size), label, class_weights=class_weights)
    if output.aux_logits is None or aux_weight == 0:
        return loss
    aux_logits = resize_bilinear(output.aux_logits, size)
    return loss + aux_weight * cross_entropy(aux_logits, label, class_weights=class_weights)
