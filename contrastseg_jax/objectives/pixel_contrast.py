"""The paper's objective: Eq. 3 on sampled anchors, with or without the memory bank as its state."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from contrastseg_jax.config.rules import splits_memory, uses_memory
from contrastseg_jax.config.tree import Config
from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.contrast.anchors import batch_candidates, sample_anchors
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.objectives.objective import ImageKeys, Label, Metrics, Objective
from contrastseg_jax.parallel import sharding
from contrastseg_jax.structs import IGNORE_LABEL, MemoryBank, SegmentationOutput


def pixel_contrast(config: Config, *, num_classes: int, proj_dim: int, mesh: Mesh) -> Objective:
    """Pixel contrast with the settings `contrast` and `memory` of a config."""
    contrast, memory, split = config.contrast, config.memory, splits_memory(config)
    init = partial(
        memory_bank.init_memory,
        num_classes=num_classes,
        pixel_size=memory.pixel_size,
        segment_size=memory.segment_size,
        proj_dim=proj_dim,
        dtype=memory.dtype,
    )
    return Objective(
        loss_weight=contrast.loss_weight,
        warmup_steps=contrast_start(config),
        ramp_steps=contrast.ramp_steps,
        init=init if uses_memory(config) else lambda: None,
        loss=partial(contrast_loss, settings=contrast, mesh=mesh, split=split),
        extract=partial(
            bank_keys,
            num_classes=num_classes,
            pixels_per_class=memory.pixels_per_class,
            only_correct=memory.key_pixels == "correct",
        )
        if uses_memory(config)
        else lambda *_: None,
        update=partial(update_bank, mesh=mesh, split=split),
        update_from_ema=uses_memory(config) and memory.key_network == "ema",
        sharding=sharding.bank_sharding if split else sharding.replicated_tree,
    )


def contrast_start(config: Config) -> int:
    """Steps before the contrast loss counts: its warm-up, unless there is no other loss."""
    return config.contrast.warmup_steps if config.loss.segmentation_weight else 0


def contrast_loss(
    bank: MemoryBank | None,
    output: SegmentationOutput,
    label: Label,
    image_rng: ImageKeys,
    rng: Key[Array, ""],
    *,
    settings: Any,
    mesh: Mesh,
    split: bool,
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 3 between sampled anchors and the candidates that `settings` name, and diagnostics.

    `image_rng` draws the anchors, `rng` positives and negatives. `split`: each device of the mesh
    holds a part of the bank's slots.
    """
    anchors = sample_anchors(
        require_embedding(output),
        label,
        lax.argmax(output.logits, output.logits.ndim - 1, jnp.int32),
        image_rng,
        num_classes=output.logits.shape[-1],
        anchors_per_image=num_anchors(settings.anchors_per_image, label.shape[1:]),
        max_views=settings.max_views,
        strategy=settings.anchors,
    )
    candidates = ()
    if settings.candidates in ("batch", "both"):
        candidates += (batch_candidates(anchors),)
    if bank is not None:
        candidates += memory_bank.memory_candidates(bank)
    return pixel_contrast_loss(
        anchors,
        candidates,
        rng,
        temperature=settings.temperature,
        base_temperature=settings.base_temperature,
        positives=settings.positives,
        negatives=settings.negatives,
        num_positives=settings.num_positives,
        num_negatives=settings.num_negatives,
        approximate=settings.approximate,
        mesh=mesh,
        split_candidates=split,
    )


class BankKeys(NamedTuple):
    """What each image of a batch gives to the bank: rows and their `valid` masks."""

    pixel: tuple[Float[Array, "b k v d"], Bool[Array, "b k v"]]
    segment: tuple[Float[Array, "b k 1 d"], Bool[Array, "b k 1"]]
    right: Bool[Array, "b k v"]  # which of the pixels were predicted correctly


def bank_keys(
    output: SegmentationOutput,
    label: Label,
    image_rng: ImageKeys,
    *,
    num_classes: int,
    pixels_per_class: int,
    only_correct: bool,
) -> BankKeys:
    """Pixels and class means of each image.

    `image_rng` draws the pixels. `only_correct`: keys are made of pixels that the network predicts
    correctly alone (Alonso et al., ICCV 2021).
    """
    embedding = require_embedding(output)
    correct = lax.argmax(output.logits, output.logits.ndim - 1, jnp.int32) == label
    if only_correct:
        label = jnp.where(correct, label, IGNORE_LABEL)
    index, valid = memory_bank.draw_pixels(
        label, image_rng, num_classes=num_classes, pixels_per_class=pixels_per_class
    )
    right = memory_bank.values_at(correct[..., None], index)[..., 0]
    return BankKeys(
        pixel=(memory_bank.values_at(embedding, index), valid),
        segment=memory_bank.segment_keys(embedding, label, num_classes=num_classes),
        right=valid & right,
    )


def update_bank(
    bank: MemoryBank | None,
    keys: BankKeys | None,
    is_taken: Bool[Array, ""],
    *,
    mesh: Mesh,
    split: bool,
) -> tuple[MemoryBank | None, Metrics]:
    """The bank, if there is one, after this step: with the keys of the global batch in it.

    `is_taken`: False for a step that is skipped, which enqueues nothing. `split`: each device of
    the mesh holds a part of the slots.
    """
    if bank is None or keys is None:
        return None, {}
    rows = sharding.replicate((keys.pixel, keys.segment), mesh)
    rows = [(embedding, valid & is_taken) for embedding, valid in rows]
    bank = memory_bank.enqueue(bank, *rows, mesh=mesh if split else None)
    fill = memory_bank.fill_ratio(bank)
    metrics = {
        "memory_fill": fill.mean(),
        "memory_fill_min": fill.min(),
        "memory_age": memory_bank.mean_age(bank),
    }
    if bank.pixel.size:
        drawn = keys.right, keys.pixel[1]
        num_right, num_keys = (jnp.sum(x, dtype=jnp.float32) for x in drawn)
        metrics["correct_keys"] = num_right / jnp.maximum(num_keys, 1.0)
    return bank, metrics


def num_anchors(given: int, map_size: tuple[int, ...]) -> int:
    """Anchors per image: `given`, or if that is 0, by the size of the embedding map.

    A sixteenth of its cells, clipped to 16..512. The cost of the contrast loss is quadratic in the
    anchors, that of the network linear in the cells.
    """
    return given or min(max(math.prod(map_size) // 16, 16), 512)


def require_embedding(output: SegmentationOutput) -> Float[Array, "b hs ws d"]:
    """The embeddings; ValueError for a network without a projection head."""
    if output.embedding is None:
        raise ValueError("pixel contrast needs a network with a projection head")
    return output.embedding
