"""The data structures passed between modules. Data only, no behaviour.

Dimension names, here and in every annotation of the package: `b` image, `h w` label size,
`hs ws` size at the network's output stride, `n = hs * ws`, `k` classes, `d` embedding,
`s` anchors per image, `c` candidates, `m` memory slots per class.
"""

from dataclasses import dataclass
from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

IGNORE_LABEL = 255  # the label of a pixel that belongs to no class


CHANNEL_ORDERS = ("RGB", "BGR")


@dataclass(frozen=True)
class ImageFormat:
    """Image normalisation and channel order that a network's weights were trained with."""

    mean: tuple[float, ...] = (123.675, 116.28, 103.53)  # red green blue, in grey levels
    std: tuple[float, ...] = (58.395, 57.12, 57.375)  # likewise; both are ImageNet's
    channel_order: str = "RGB"  # of the normalised channels; or "BGR"


IMAGENET = ImageFormat()


@struct.dataclass
class Batch:
    """Images and their labels: NumPy arrays on the host, JAX arrays on the devices."""

    image: UInt8[Any, "b h w 3"]  # RGB
    label: UInt8[Any, "b h w"]  # class id, or IGNORE_LABEL
    example_id: Int[Any, " b"]  # index in the data set's split
    valid: Bool[Any, " b"]  # False: a padding row
    # (height, width) without padding, for evaluation where labels and images differ in size
    image_size: Int[Any, "b 2"] | None = None
    label_size: Int[Any, "b 2"] | None = None


@struct.dataclass
class SegmentationOutput:
    """A network's outputs for a batch, at its output stride."""

    logits: Float[Array, "b hs ws k"]
    embedding: Float[Array, "b hs ws d"] | None = None  # unit length; None outside training
    aux_logits: Float[Array, "b hs ws k"] | None = None
    features: Float[Array, "b hs ws c"] | None = None  # of which the last convolution makes logits


@struct.dataclass
class Anchors:
    """Sampled pixels, a fixed number per image; rows without a pixel have valid=False."""

    embedding: Float[Array, "b s d"]
    label: Int[Array, "b s"]
    valid: Bool[Array, "b s"]
    hard: Bool[Array, "b s"] | None = None  # wrongly predicted; None: not known


@struct.dataclass
class Candidates:
    """A set to contrast anchors with; same label: positive, other label: negative."""

    embedding: Float[Array, "*c d"]
    label: Int[Array, "*c"]
    valid: Bool[Array, "*c"]
    anchor: Int[Array, "*c"] | None = None  # index of the anchor it is; None: none is an anchor
    # True: constants, no gradient is computed for them
    stop_gradient: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class MemoryBank:
    """Two ring buffers per class: single pixels, and means of a class over one image.

    `head` is the slot written next, `count` the number of slots in use (at most m), `age` the steps
    since a slot was written; of one that never was, it means nothing.
    """

    pixel: Float[Array, "k m d"]
    pixel_age: Int[Array, "k m"]
    pixel_head: Int[Array, " k"]
    pixel_count: Int[Array, " k"]
    segment: Float[Array, "k m2 d"]
    segment_age: Int[Array, "k m2"]
    segment_head: Int[Array, " k"]
    segment_count: Int[Array, " k"]


@struct.dataclass
class TrainState:
    """Everything that changes from step to step: one pytree of arrays."""

    step: Int[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any | None = None  # of {params, batch_stats}, used for evaluation; None: not kept
    memory: Any | None = None  # the state of the objective: for pixel contrast its MemoryBank
