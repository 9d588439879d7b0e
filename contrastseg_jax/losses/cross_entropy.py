"""Cross entropy over labelled pixels, weighted by class."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from contrastseg_jax.ops.row_blocks import map_row_blocks


def cross_entropy(
    logits: Float[Array, "b hs ws k"],
    label: UInt8[Array, "b h w"],
    *,
    class_weights: Sequence[float] = (),
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Class-weighted cross entropy over labelled pixels: Σ w_y · ce / Σ w_y (PyTorch's mean).

    Logits are brought to the label's size. Labels that are no class (IGNORE_LABEL) have weight 0.
    Pixels of weight 0 are ignored, whatever their logits; NaN at any other makes the loss NaN.
    `class_weights`: one per class, or empty for 1 everywhere.

    With `label_smoothing` ε (Szegedy et al., CVPR 2016) the target is 1 - ε for the label's class
    plus ε / k for every class; w_y · ce is then (1 - ε) w_y · -log p_y + ε / k Σ_c w_c · -log p_c,
    as PyTorch's `CrossEntropyLoss` has it. Original: `FSCELoss`.
    """
    weights = class_weights or (1.0,) * logits.shape[-1]

    def of_block(
        logits: Float[Array, "b r w k"], label: UInt8[Array, "b r w"]
    ) -> Float[Array, "b r w"]:
        weight = pixel_weights(label, weights)
        loss = weight * pixel_cross_entropy(logits, label, weight)
        if not label_smoothing:
            return loss
        log_p = jax.nn.log_softmax(masked(logits, weight))
        of_all = -(log_p * jnp.asarray(weights, jnp.float32)[None, None, None]).mean(-1)
        of_all = jnp.where(weight > 0, of_all, 0.0)
        return (1 - label_smoothing) * loss + label_smoothing * of_all

    total = pixel_weights(label, weights).sum()
    return map_row_blocks(of_block, logits, label).sum() / jnp.where(total > 0, total, 1.0)


def pixel_weights(label: UInt8[Array, "b h w"], weights: Sequence[float]) -> Float[Array, "b h w"]:
    """The weight of each pixel's class; 0 where it has none."""
    labelled = label < len(weights)
    target = jnp.where(labelled, label, 0).astype(jnp.int32)
    return jnp.where(labelled, jnp.asarray(weights, jnp.float32)[target], 0.0)


def pixel_cross_entropy(
    logits: Float[Array, "b h w k"], label: UInt8[Array, "b h w"], weight: Float[Array, "b h w"]
) -> Float[Array, "b h w"]:
    """-log p of each pixel's class, unweighted; where the weight is 0, a constant."""
    target = jnp.where(weight > 0, label, 0).astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(masked(logits, weight), target)


def masked(
    logits: Float[Array, "b h w k"], weight: Float[Array, "b h w"]
) -> Float[Array, "b h w k"]:
    """The logits in float32, 0 where the weight is.

    Before any softmax: after it, a weight of 0 would hide NaN from the loss, not the gradient.
    """
    return jnp.where(weight[..., None] > 0, logits.astype(jnp.float32), 0.0)
