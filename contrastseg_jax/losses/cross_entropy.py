"""Cross entropy over labelled pixels, weighted by class."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8


def cross_entropy(
    logits: Float[Array, "b h w k"], label: UInt8[Array, "b h w"], *, class_weights: Sequence[float]
) -> Float[Array, ""]:
    """Class-weighted cross entropy over labelled pixels: Σ w_y · ce / Σ w_y (PyTorch's mean).

    Labels that are no class (IGNORE_LABEL) have weight 0. Pixels of weight 0 are ignored, whatever
    their logits; NaN at any other makes the loss NaN. `class_weights`: one per class, or empty for
    1 everywhere. Original: `FSCELoss`.
    """
    num_classes = logits.shape[-1]
    target = jnp.where(label < num_classes, label, 0).astype(jnp.int32)
    weight = pixel_weights(label, num_classes=num_classes, class_weights=class_weights)
    # Before the softmax: after it, a weight of 0 would hide NaN from the loss, not the gradient.
    logits = jnp.where(weight[..., None] > 0, logits.astype(jnp.float32), 0.0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    total = weight.sum()
    return (weight * loss).sum() / jnp.where(total > 0, total, 1.0)


def pixel_weights(
    label: UInt8[Array, "b h w"], *, num_classes: int, class_weights: Sequence[float]
) -> Float[Array, "b h w"]:
    """The weight of each pixel in the mean: that of its class, 0 where its label is none."""
    weights = jnp.asarray(class_weights or (1.0,) * num_classes, jnp.float32)
    labelled = label < num_classes
    return jnp.where(labelled, weights[jnp.where(labelled, label, 0).astype(jnp.int32)], 0.0)
