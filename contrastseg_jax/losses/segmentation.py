"""From a loss on logits of label size to that of a network's output."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, UInt8

from contrastseg_jax.losses.cross_entropy import cross_entropy
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.structs import SegmentationOutput

# (logits f[b h w k], label u8[b h w], *, class_weights) -> scalar. Pure, in float32 throughout, and
# 0 (never NaN) where every pixel is ignored.
PixelLoss = Callable[..., Float[Array, ""]]

PIXEL_LOSSES: dict[str, PixelLoss] = {"cross_entropy": cross_entropy}


def segmentation_loss(
    pixel_loss: PixelLoss,
    output: SegmentationOutput,
    label: UInt8[Array, "b h w"],
    *,
    class_weights: Any,
    aux_weight: float,
) -> Float[Array, ""]:
    """The loss of the logits brought to the label's size, plus the auxiliary head's if any.

    Logits of another size are interpolated, which spreads NaN at one place over its whole image.
    With an `aux_weight` of 0 the auxiliary logits never matter.

    Original: `FSCELoss`, `FSAuxCELoss` (weight 0.4 on the auxiliary logits).
    """
    size = label.shape[1], label.shape[2]
    loss = pixel_loss(resize_bilinear(output.logits, size), label, class_weights=class_weights)
    if output.aux_logits is None or aux_weight == 0:
        return loss
    aux_logits = resize_bilinear(output.aux_logits, size)
    return loss + aux_weight * pixel_loss(aux_logits, label, class_weights=class_weights)
