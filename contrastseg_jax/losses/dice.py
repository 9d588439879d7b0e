"""Dice loss: how little prediction and label of each class overlap."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from contrastseg_jax.losses.cross_entropy import masked
from contrastseg_jax.ops.row_blocks import map_row_blocks


def dice(
    logits: Float[Array, "b hs ws k"], label: UInt8[Array, "b h w"], *, smooth: float = 0.0
) -> Float[Array, ""]:
    """Mean over classes of 1 - (2 Σ p_c y_c + s) / (Σ p_c + Σ y_c + s), p the softmax, y 0 or 1.

    The sums are over the labelled pixels of the whole batch. A class that no pixel has counts as 0.
    As segmentation_models_pytorch's `DiceLoss` in its multi-class mode (Milletari et al., 3DV 2016,
    without their squares). Logits are brought to the label's size; pixels without a class are
    ignored, whatever their logits. `smooth`: s.
    """
    num_classes = logits.shape[-1]

    def sums(
        logits: Float[Array, "b r w k"], label: UInt8[Array, "b r w"]
    ) -> tuple[Float[Array, "b k"], ...]:
        labelled = (label < num_classes).astype(jnp.float32)
        p = jax.nn.softmax(masked(logits, labelled)) * labelled[..., None]
        truth = jax.nn.one_hot(label, num_classes, dtype=jnp.float32)  # zeros beyond the classes
        return (p * truth).sum((1, 2)), p.sum((1, 2)), truth.sum((1, 2))

    overlap, predicted, true = (x.sum((0, 1)) for x in map_row_blocks(sums, logits, label))
    score = (2 * overlap + smooth) / jnp.maximum(predicted + true + smooth, 1e-7)
    return jnp.where(true > 0, 1 - score, 0.0).mean()
