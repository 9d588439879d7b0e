"""The paper's objective: Eq. 3 on sampled anchors, with or without the memory bank as its state."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from contrastseg_jax.config.rules import splits_memory, uses_memory
from contrastseg_jax.config.tree import Config
from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.contrast.contrast_step import (
    BankKeys,
    bank_keys,
    bank_metrics,
    contrast_loss,
)
from contrastseg_jax.objectives.objective import ImageKeys, Label, Metrics, Objective
from contrastseg_jax.parallel import sharding
from contrastseg_jax.structs import MemoryBank, SegmentationOutput


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
        loss=partial(loss_of_output, settings=contrast, mesh=mesh, split=split),
        extract=partial(
            extract_keys,
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


def loss_of_output(
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
    """`contrast_loss` of a network's output, by the settings `contrast` of a config.

    `split`: each device of the mesh holds a part of the bank's slots.
    """
    return contrast_loss(
        require_embedding(output),
        label,
        lax.argmax(output.logits, output.logits.ndim - 1, jnp.int32),
        bank,
        image_rng,
        rng,
        num_classes=output.logits.shape[-1],
        candidates=settings.candidates,
        anchors=settings.anchors,
        anchors_per_image=settings.anchors_per_image,
        max_views=settings.max_views,
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


def extract_keys(
    output: SegmentationOutput,
    label: Label,
    image_rng: ImageKeys,
    *,
    num_classes: int,
    pixels_per_class: int,
    only_correct: bool,
) -> BankKeys:
    """`bank_keys` of a network's output; `image_rng` draws the pixels."""
    return bank_keys(
        require_embedding(output),
        label,
        lax.argmax(output.logits, output.logits.ndim - 1, jnp.int32),
        image_rng,
        num_classes=num_classes,
        pixels_per_class=pixels_per_class,
        only_correct=only_correct,
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
    return bank, bank_metrics(bank, keys)


def require_embedding(output: SegmentationOutput) -> Float[Array, "b hs ws d"]:
    """The embeddings; ValueError for a network without a projection head."""
    if output.embedding is None:
        raise ValueError("pixel contrast needs a network with a projection head")
    return output.embedding
