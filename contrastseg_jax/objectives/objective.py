"""The contract between the train step and what is trained beside the segmentation loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, Int, Key

from contrastseg_jax.structs import SegmentationOutput

Metrics = dict[str, Float[Array, ""]]
State = Any  # a pytree of arrays, or None
Label = Int[Array, "b hs ws"]  # at the stride of the network's output
ImageKeys = Key[Array, " b"]  # one per image, whatever the device it lies on


@dataclass(frozen=True)
class Objective:
    """A loss on a network's output with a state that is carried, sharded and checkpointed.

    All functions are pure. `loss` sees the state as it was before the step, `update` makes that
    after it; a step whose loss is not finite updates with labels that are all ignored.
    """

    loss_weight: float  # λ of the total loss
    warmup_steps: int  # before which the loss is not computed; the state is updated from step 0 on
    init: Callable[[], State]
    loss: Callable[
        [State, SegmentationOutput, Label, ImageKeys, Key[Array, ""]],
        tuple[Float[Array, ""], Metrics],
    ]
    update: Callable[[State, SegmentationOutput, Label, ImageKeys], tuple[State, Metrics]]
    sharding: Callable[[Any, State], Any]  # mesh, state or its shapes -> where each array lies
    # For a head that changes inference: the logits that count instead of the network's.
    logits: Callable[[State, SegmentationOutput], Float[Array, "b hs ws k"]] | None = None
