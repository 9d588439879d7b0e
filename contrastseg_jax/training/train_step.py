"""The train step: a pure function over a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from contrastseg_jax.config.rules import splits_memory
from contrastseg_jax.config.tree import Config
from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.contrast.anchors import batch_candidates, sample_anchors
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.losses.cross_entropy import segmentation_loss
from contrastseg_jax.models.segmenter import Segmenter
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.ops.resize import label_at_stride
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.setup import image_format, num_anchors
from contrastseg_jax.structs import IGNORE_LABEL, Batch, MemoryBank, SegmentationOutput, TrainState
from contrastseg_jax.training.optim import update_ema
from contrastseg_jax.training.state import abstract_state, state_sharding

Metrics = dict[str, Float[Array, ""]]


def contrast_loss(
    logits: Float[Array, "b hs ws k"],
    embedding: Float[Array, "b hs ws d"],
    label: Int[Array, "b hs ws"],
    rng: Key[Array, " b"],
    selection_rng: Key[Array, ""],
    *,
    bank: MemoryBank | None,
    num_anchors: int,
    mesh: Mesh,
    config: Config,
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 3 between sampled anchors and the candidates that the config names, and diagnostics.

    `rng` draws the anchors, `num_anchors` of each image with one key per image, `selection_rng`
    positives and negatives.
    """
    settings = config.contrast
    anchors = sample_anchors(
        embedding,
        label,
        lax.argmax(logits, logits.ndim - 1, jnp.int32),
        rng,
        num_classes=logits.shape[-1],
        anchors_per_image=num_anchors,
        max_views=settings.max_views,
        strategy=settings.anchors,
    )
    sets = ()
    if settings.candidates in ("batch", "both"):
        sets += (batch_candidates(anchors),)
    if bank is not None:
        sets += memory_bank.memory_candidates(bank)
    return pixel_contrast_loss(
        anchors,
        sets,
        selection_rng,
        temperature=settings.temperature,
        base_temperature=settings.base_temperature,
        positives=settings.positives,
        negatives=settings.negatives,
        num_positives=settings.num_positives,
        num_negatives=settings.num_negatives,
        approximate=settings.approximate,
        mesh=mesh,
        split_candidates=splits_memory(config),
    )


def enqueue_batch(
    bank: MemoryBank,
    embedding: Float[Array, "b hs ws d"],
    label: Int[Array, "b hs ws"],
    rng: Key[Array, " b"],
    *,
    mesh: Mesh,
    config: Config,
) -> MemoryBank:
    """The bank after this step: pixels and class means of every image of the global batch."""
    num_classes = bank.pixel.shape[0]
    pixel = memory_bank.pixel_keys(
        embedding,
        label,
        rng,
        num_classes=num_classes,
        pixels_per_class=config.memory.pixels_per_class,
    )
    segment = memory_bank.segment_keys(embedding, label, num_classes=num_classes)
    return memory_bank.enqueue(
        bank,
        *sharding.replicate((pixel, segment), mesh),
        mesh=mesh if splits_memory(config) else None,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Segmenter,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    config: Config,
) -> tuple[TrainState, Metrics]:
    """One step of Eq. 4: cross entropy plus weighted pixel contrast, then the bank's update.

    A pure function of its arguments: all randomness comes from the seed, the step and, per image,
    the example's id, so it does not depend on how images are spread over devices.
    """
    step_rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    dropout_rng, anchor_rng, key_rng, selection_rng = jax.random.split(step_rng, 4)
    per_image = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    anchor_rng, key_rng = (per_image(rng, batch.example_id) for rng in (anchor_rng, key_rng))
    image = normalize(batch.image, image_format(config))
    bank = state.memory

    def loss_fn(params: Any) -> tuple[Float[Array, ""], tuple[Any, SegmentationOutput, Metrics]]:
        output, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_rng},
        )
        loss = cross_entropy = segmentation_loss(
            output,
            batch.label,
            class_weights=config.loss.class_weights,
            aux_weight=config.loss.aux_weight,
        )
        ignored = jnp.mean((batch.label == IGNORE_LABEL).astype(jnp.float32))
        metrics = {"cross_entropy": cross_entropy, "ignored_pixels": ignored}
        if output.embedding is not None:
            label = label_at_stride(batch.label, output.embedding.shape[1:3])
            measure = functools.partial(
                contrast_loss,
                bank=bank,
                num_anchors=num_anchors(config, model),
                mesh=mesh,
                config=config,
            )
            arguments = (output.logits, output.embedding, label, anchor_rng, selection_rng)
            shapes = jax.eval_shape(measure, *arguments)
            contrast, diagnostics = lax.cond(
                state.step >= config.contrast.warmup_steps,
                measure,
                lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
                *arguments,
            )
            loss += config.contrast.loss_weight * contrast
            metrics |= {"contrast": contrast, **diagnostics}
        return loss, (updates["batch_stats"], output, metrics | {"loss": loss})

    # Whole, even where each device keeps a part: batches are what devices share out. Of the
    # gradients a device then needs its part alone.
    whole = sharding.replicate(state.params, mesh)
    grads, (batch_stats, output, metrics) = jax.grad(loss_fn, has_aux=True)(whole)
    grads = lax.with_sharding_constraint(grads, state_sharding(config, state, mesh).params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # Statistics belong to the weights they were taken with, so both are averaged.
        variables = {"params": params, "batch_stats": batch_stats}
        ema = update_ema(ema, variables, state.step, ema_decay=config.optim.ema_decay)
    if bank is not None and output.embedding is not None:
        # After the loss: an image is never contrasted with its own rows of this step.
        label = label_at_stride(batch.label, output.embedding.shape[1:3])
        # A lost step must not spoil the bank. Besides, the loss is then known to be computed before
        # the bank is written, without which XLA keeps a copy of the whole bank for it.
        label = jnp.where(jnp.isfinite(metrics["loss"]), label, IGNORE_LABEL)
        bank = enqueue_batch(bank, output.embedding, label, key_rng, mesh=mesh, config=config)
        fill = memory_bank.fill_ratio(bank)
        metrics |= {"memory_fill": fill.mean(), "memory_fill_min": fill.min()}
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema, bank)
    return state, metrics


def compile_step(
    config: Config, model: Segmenter, tx: optax.GradientTransformation, mesh: Mesh
) -> jax.stages.Wrapped:
    """`train_step` for a mesh; the state it is given is used up."""
    of_state = state_sharding(config, abstract_state(config, model, tx), mesh)
    return jax.jit(
        functools.partial(train_step, model=model, tx=tx, mesh=mesh, config=config),
        in_shardings=(of_state, sharding.split(mesh)),
        out_shardings=(of_state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def batch_shape(config: Config, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of a global training batch."""
    size, by_rows = config.train.batch_size, sharding.split(mesh)
    image, row = (size, *config.augment.crop_size), (size,)
    return Batch(
        image=jax.ShapeDtypeStruct((*image, 3), jnp.uint8, sharding=by_rows),
        label=jax.ShapeDtypeStruct(image, jnp.uint8, sharding=by_rows),
        example_id=jax.ShapeDtypeStruct(row, jnp.int32, sharding=by_rows),
        valid=jax.ShapeDtypeStruct(row, jnp.bool, sharding=by_rows),
    )
