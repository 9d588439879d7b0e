"""From losses on logits, by name, to the loss of a network's output."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from contrastseg_jax.losses.cross_entropy import cross_entropy
from contrastseg_jax.losses.dice import dice
from contrastseg_jax.losses.focal import focal
from contrastseg_jax.losses.lovasz import lovasz
from contrastseg_jax.losses.ohem import ohem
from contrastseg_jax.losses.rmi import rmi
from contrastseg_jax.structs import SegmentationOutput

# (logits f[b hs ws k], label u8[b h w], *, settings) -> scalar, of logits brought to the size of
# the label. Pure, in float32 throughout, and 0 (never NaN) where every pixel is ignored.
PixelLoss = Callable[..., Float[Array, ""]]

# The settings of each are those of its name in the config, `loss.NAME`, if it has any.
PIXEL_LOSSES: dict[str, PixelLoss] = {
    "cross_entropy": cross_entropy,
    "ohem": ohem,
    "focal": focal,
    "lovasz": lovasz,
    "rmi": rmi,
    "dice": dice,
}
# Those that are means over labelled pixels, weighted by class: the mean of a batch is that of its
# parts, each with its share of the weights.
PIXEL_MEANS = ("cross_entropy", "focal")
# Those that sum over pixels, so that `loss.class_weights` matter. In the others every class counts
# alike, however few its pixels.
CLASS_WEIGHTED = ("cross_entropy", "ohem", "focal")


class Term(NamedTuple):
    """A loss, with its settings, and its weight in the sum of all."""

    name: str
    weight: float
    loss: PixelLoss


def segmentation_loss(
    terms: Sequence[Term],
    output: SegmentationOutput,
    label: UInt8[Array, "b h w"],
    *,
    aux_weight: float,
    share: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of all terms, and each by its name, unweighted.

    Each term is that of the logits plus `aux_weight` times that of the auxiliary logits, if there
    are any. Logits of another size than the label's are interpolated, which spreads NaN at one
    place over its whole image. With an `aux_weight` of 0 the auxiliary logits never matter.
    `share`: that of a micro-batch in the PIXEL_MEANS of its batch, times their number; None: it is
    the batch.

    Original: `FSCELoss`, `FSAuxCELoss` (weight 0.4 on the auxiliary logits), and those of its other
    losses, whose auxiliary logits have cross entropy.
    """
    found = {}
    for term in terms:
        found[term.name] = term.loss(output.logits, label)
        if output.aux_logits is not None and aux_weight != 0:
            found[term.name] += aux_weight * term.loss(output.aux_logits, label)
        if share is not None and term.name in PIXEL_MEANS:
            found[term.name] *= share
    total = sum((term.weight * found[term.name] for term in terms), jnp.zeros((), jnp.float32))
    return total, found
