"""Focal loss: cross entropy that weighs pixels less the more certain the network is of them."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from contrastseg_jax.losses.cross_entropy import pixel_cross_entropy, pixel_weights
from contrastseg_jax.ops.row_blocks import map_row_blocks


def focal(
    logits: Float[Array, "b hs ws k"],
    label: UInt8[Array, "b h w"],
    *,
    class_weights: Sequence[float] = (),
    gamma: float = 2.0,
) -> Float[Array, ""]:
    """Σ w_y · (1 - p_y)^γ · -log p_y / Σ w_y over labelled pixels, p the softmax.

    Lin et al., ICCV 2017, Eq. 5, for exclusive classes: with the softmax, as Kornia's `focal_loss`
    has it (its α is w_y here), not a sum of k binary problems, as in MMSegmentation and in
    segmentation_models_pytorch. With γ = 0 it is `cross_entropy`, and ignores what that ignores.
    """
    weights = class_weights or (1.0,) * logits.shape[-1]

    def of_block(
        logits: Float[Array, "b r w k"], label: UInt8[Array, "b r w"]
    ) -> Float[Array, "b r w"]:
        weight = pixel_weights(label, weights)
        loss = pixel_cross_entropy(logits, label, weight)
        # Above 0, where a power below 1 has no derivative.
        error = jnp.maximum(-jnp.expm1(-loss), jnp.finfo(jnp.float32).tiny)
        return weight * error**gamma * loss

    total = pixel_weights(label, weights).sum()
    return map_row_blocks(of_block, logits, label).sum() / jnp.where(total > 0, total, 1.0)
