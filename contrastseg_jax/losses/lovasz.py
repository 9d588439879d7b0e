"""Lovasz-softmax: the Jaccard index of each class, extended to probabilities."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from contrastseg_jax.losses.cross_entropy import masked
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.ops.row_blocks import joined_rows, map_row_blocks


def lovasz(logits: Float[Array, "b hs ws k"], label: UInt8[Array, "b h w"]) -> Float[Array, ""]:
    """Mean over the classes present of the Lovasz extension of 1 - IoU, of the whole batch.

    Of a class c with errors m_i = |1{y_i = c} - p_i(c)|, p the softmax, it is Σ_i m_i · g_i, with
    g_i what pixel i adds to 1 - IoU when the pixels of larger errors are already wrong. Logits are
    brought to the label's size; pixels without a class are ignored, whatever their logits.

    One present class after another, each computed again for the gradient: what is held at the
    label's size are maps of one class.

    Berman et al., CVPR 2018, Eq. 8, 9 and 11, algorithm 1. Original: `LovaszSoftmax`.
    """
    num_classes, size = logits.shape[-1], (label.shape[1], label.shape[2])
    labelled = label < num_classes

    def normaliser(
        logits: Float[Array, "b r w k"], label: UInt8[Array, "b r w"]
    ) -> Float[Array, "b r w"]:
        return jax.nn.logsumexp(masked(logits, (label < num_classes).astype(jnp.float32)), axis=-1)

    total = joined_rows(map_row_blocks(normaliser, logits, label), size[0])

    def of_class(
        item: tuple[Int[Array, ""], Float[Array, "b hs ws"]],
    ) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        class_id, logits = item
        true = label == class_id.astype(label.dtype)

        def loss(logits: Float[Array, "b hs ws"]) -> Float[Array, ""]:
            logits = resize_bilinear(logits[..., None], size)[..., 0].astype(jnp.float32)
            p = jnp.exp(jnp.where(labelled, logits - total, -jnp.inf))
            error = jnp.where(labelled, jnp.abs(true.astype(jnp.float32) - p), 0.0)
            # Unlabelled pixels come after all others.
            order = jnp.where(labelled, lax.stop_gradient(error), -1.0)
            return (error * jaccard_steps(order, true)).sum()

        is_present = true.any()
        return lax.cond(is_present, loss, lambda _: jnp.zeros((), jnp.float32), logits), is_present

    classes = jnp.arange(num_classes, dtype=jnp.int32)
    losses, present = lax.map(
        jax.checkpoint(of_class, prevent_cse=False), (classes, jnp.moveaxis(logits, -1, 0))
    )
    return losses.sum() / jnp.maximum(present.sum(dtype=jnp.float32), 1.0)


def jaccard_steps(
    error: Float[Array, "b h w"], true: Bool[Array, "b h w"]
) -> Float[Array, "b h w"]:
    """What each pixel adds to 1 - IoU when pixels turn wrong in the order of falling errors.

    With I true pixels not yet wrong and U true or wrong ones: 1 / U for a true pixel and
    I / (U · (U - 1)) for another, exact where a difference of two IoU would be rounding alone.
    """
    flat = true.reshape(-1)
    places = jnp.arange(flat.size, dtype=jnp.int32)
    _, places = lax.sort((-error.reshape(-1), places), num_keys=1)
    in_order = flat[places].astype(jnp.int32)
    num_true, num_lost = in_order.sum(dtype=jnp.int32), jnp.cumsum(in_order)
    kept = (num_true - num_lost).astype(jnp.float32)
    others = jnp.arange(1, flat.size + 1, dtype=jnp.int32) - num_lost
    union = (num_true + others).astype(jnp.float32)
    steps = jnp.where(in_order > 0, 1.0, kept / jnp.maximum(union - 1, 1.0)) / union
    return jnp.zeros_like(steps).at[places].set(steps, unique_indices=True).reshape(true.shape)
