"""The interface between the train step and an objective added to the segmentation loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key

from contrastseg_jax.structs import SegmentationOutput

Metrics = dict[str, Float[Array, ""]]
State = Any  # a pytree of arrays, or None
Label = Int[Array, "b hs ws"]  # at the network's output stride
ImageKeys = Key[Array, " b"]  # one per image, independent of its device
Extract = Any  # arrays [b ...], or None


@dataclass(frozen=True)
class Objective:
    """A loss on a network's output, with a state that is carried, sharded and checkpointed.

    All functions are pure. `loss` sees the state before the step, `update` returns the one after
    it. A batch may come in micro-batches: `loss` and `extract` see one of them at a time, `update`
    the whole batch, in order, and whether the step is taken: of one that is skipped, as something
    in it is not finite, nothing may be kept.
    """

    loss_weight: float  # λ of the total loss
    warmup_steps: int  # the loss is not computed before; the state is updated from step 0
    init: Callable[[], State]
    loss: Callable[
        [State, SegmentationOutput, Label, ImageKeys, Key[Array, ""]],
        tuple[Float[Array, ""], Metrics],
    ]
    # Of each image, what the state is updated from: few numbers, as a whole batch's are kept.
    extract: Callable[[SegmentationOutput, Label, ImageKeys], Extract]
    update: Callable[[State, Extract, Bool[Array, ""]], tuple[State, Metrics]]
    sharding: Callable[[Any, State], Any]  # mesh, state or its shapes -> shardings
    # For a head that changes inference: logits that replace the network's.
    logits: Callable[[State, SegmentationOutput], Float[Array, "b hs ws k"]] | None = None
    ramp_steps: int = 0  # after the warm-up, in which the weight rises linearly to `loss_weight`
    update_from_ema: bool = False  # `extract` sees the EMA's output, as in inference
