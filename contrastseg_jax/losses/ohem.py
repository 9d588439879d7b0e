"""Online hard example mining: cross entropy of the pixels that the network finds hardest."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from contrastseg_jax.contrast.devices import Split
from contrastseg_jax.contrast.kth_largest import kth_largest
from contrastseg_jax.losses.cross_entropy import pixel_cross_entropy, pixel_weights
from contrastseg_jax.ops.row_blocks import joined_rows, map_row_blocks


def ohem(
    logits: Float[Array, "b hs ws k"],
    label: UInt8[Array, "b h w"],
    *,
    class_weights: Sequence[float] = (),
    threshold: float = 0.7,
    min_kept: int = 100_000,
) -> Float[Array, ""]:
    """Mean of w_y · ce over hard pixels: those whose class has a probability below a threshold.

    The threshold is raised where fewer than `min_kept` pixels of the whole batch are below it, to
    the probability of the next harder one: max(`threshold`, p_(min_kept)), with p_(0) the smallest
    probability, p_(n - 1) the largest and the last one taken where n is smaller. A pixel that is
    at the threshold is not kept. The mean divides by the number of pixels, not by their weights.

    Pixels of weight 0 are ignored, whatever their logits, and logits are brought to the label's
    size, as in `cross_entropy`. Original: `FSOhemCELoss`.
    """
    weights = class_weights or (1.0,) * logits.shape[-1]
    weight = pixel_weights(label, weights)

    def of_block(
        logits: Float[Array, "b r w k"], label: UInt8[Array, "b r w"]
    ) -> Float[Array, "b r w"]:
        return pixel_cross_entropy(logits, label, pixel_weights(label, weights))

    loss = joined_rows(map_row_blocks(of_block, logits, label), label.shape[1])
    kept = hard_pixels(loss, weight > 0, threshold=threshold, min_kept=min_kept)
    return jnp.where(kept, weight * loss, 0.0).sum() / jnp.maximum(kept.sum(dtype=jnp.float32), 1.0)


def hard_pixels(
    loss: Float[Array, "b h w"], labelled: Bool[Array, "b h w"], *, threshold: float, min_kept: int
) -> Bool[Array, "b h w"]:
    """Which pixels `ohem` keeps, by the cross entropy of each. Has no gradient.

    What is not finite at a labelled pixel is kept, so that the loss shows it.
    """
    p = jnp.exp(-lax.stop_gradient(loss))
    p = jnp.where(jnp.isnan(p), 0.0, p)
    num_pixels = labelled.sum(dtype=jnp.int32)
    rank = jnp.minimum(min_kept, num_pixels - 1) + 1  # from 1 on
    # As negative numbers, of which the largest are found; -2 comes after all probabilities.
    negative = jnp.where(labelled, -p, -2.0).reshape(1, -1)
    found = kth_largest(negative, rank[None], split=Split.NOTHING)[0]
    return labelled & (p < jnp.maximum(-found, threshold))
