"""Gradient accumulation: a batch computed in micro-batches, one after the other."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from contrastseg_jax.config.rules import micro_batch_size
from contrastseg_jax.losses.cross_entropy import pixel_weights
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import Batch

OfBatch = Callable[[Batch, Int[Array, " b"]], Any]  # of a batch and its `row_numbers`

# What becomes of the results of the micro-batches.
MEAN = optax.microbatching.AccumulationType.MEAN
CONCAT = optax.microbatching.AccumulationType.CONCAT  # in the order of the batch


def in_micro_batches(function: OfBatch, setup: Setup, results: Any) -> OfBatch:
    """The same function of a batch, computed for `train.accumulation_steps` micro-batches.

    Of n, number i has the rows i, i + n, i + 2 n, ...: of each device the same number, so that none
    travels, and the same ones whatever the number of devices. `results`: MEAN or CONCAT for each of
    the function's.
    """
    if setup.config.train.accumulation_steps == 1:
        return function

    def of_part(batch: Batch, row: Int[Array, " b"]) -> Any:
        evenly = sharding.batch_sharding(setup.mesh)
        return function(*lax.with_sharding_constraint((batch, row), evenly))

    return optax.microbatch(of_part, (0, 1), micro_batch_size(setup.config), results)


def row_numbers(batch: Batch) -> Int[Array, " b"]:
    """The places of images in the batch; the first in a micro-batch is its number."""
    return jnp.arange(batch.label.shape[0], dtype=jnp.int32)


def label_weight(setup: Setup, label: UInt8[Array, "b h w"]) -> Float[Array, ""]:
    """Σ w(y) over labelled pixels: what the mean of Eq. 1 is divided by."""
    return pixel_weights(label, setup.class_weights or (1.0,) * setup.model.num_classes).sum()


def loss_share(
    setup: Setup, label: UInt8[Array, "b h w"], total: Float[Array, ""]
) -> Float[Array, ""] | None:
    """What PIXEL_MEANS of a micro-batch are multiplied by: W / mean W, W its label weight.

    So the mean of the micro-batches' losses is that of the batch, to the rounding. Other losses
    become the mean over micro-batches. `total`: the label weight of the batch. None: the batch is
    computed at once.
    """
    number = setup.config.train.accumulation_steps
    if number == 1:
        return None
    return number * label_weight(setup, label) / jnp.where(total > 0, total, 1.0)
