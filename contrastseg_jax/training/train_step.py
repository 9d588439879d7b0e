"""The train step: a pure function over a mesh."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from contrastseg_jax.config.tree import Config
from contrastseg_jax.losses.segmentation import segmentation_loss
from contrastseg_jax.models.freezing import trained, with_frozen
from contrastseg_jax.models.segmenter import Probes
from contrastseg_jax.objectives.objective import Extract, Metrics, Objective
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.ops.resize import label_at_stride
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import IGNORE_LABEL, Batch, SegmentationOutput, TrainState
from contrastseg_jax.training.micro_batches import (
    CONCAT,
    MEAN,
    in_micro_batches,
    label_weight,
    loss_share,
    row_numbers,
)
from contrastseg_jax.training.optim import update_ema
from contrastseg_jax.training.state import abstract_state, state_sharding


class StepRngs(NamedTuple):
    """Keys of a step, for a micro-batch."""

    dropout: Key[Array, ""]
    loss: Key[Array, " b"]  # of each image, as are those of `extract`
    extract: Key[Array, " b"]
    shared: Key[Array, ""]  # of the images together


def train_step(
    state: TrainState, batch: Batch, *, setup: Setup, tx: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One step of Eq. 4: the losses of segmentation and objective, then the objective's update.

    A pure function of its arguments: all randomness comes from the seed, the step and, per image,
    the example's id, so it does not depend on how images are distributed over devices.

    Where the loss, a gradient or a batch statistic is not finite, the step is skipped: the state
    stays what it was, but for the step and the optimiser's count of them, which schedules follow.
    Metric `skipped`: 1 in such a step, else 0.
    """
    config, mesh, objective = setup.config, setup.mesh, setup.objective
    (grads, squares), batch_stats, metrics, extract = batch_gradients(setup, state, batch)
    if objective is not None and config.loss.segmentation_weight:
        ratio = squares.embedding / jnp.maximum(squares.logits, 1e-30)
        metrics["gradient_ratio"] = jnp.sqrt(ratio)
    # Known before the update, which is then made in place.
    is_finite = sharding.is_finite((metrics["loss"], grads, batch_stats))
    metrics["skipped"] = 1.0 - is_finite.astype(jnp.float32)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    old = trained(setup.model, variables)
    updates, opt_state = tx.update(grads, state.opt_state, old["params"])
    new = {"params": optax.apply_updates(old["params"], updates), "batch_stats": batch_stats}
    ema = old_ema = trained(setup.model, state.ema)
    if ema is not None:
        # BatchNorm statistics belong to their weights, so both are averaged.
        ema = update_ema(ema, new, state.step, ema_decay=config.optim.ema_decay)
    after, before = (new, opt_state, ema), (old, state.opt_state, old_ema)
    new, opt_state, ema = unless_skipped(is_finite, after, before)
    variables, ema = with_frozen(new, variables), with_frozen(ema, state.ema)
    memory = state.memory
    if objective is not None:
        # After the loss: an image is never contrasted with its own rows of this step.
        if objective.update_from_ema:
            of_ema = sharding.replicate(ema, mesh)
            of_batch = functools.partial(ema_extract, setup, objective, of_ema, state.step)
            extract = in_micro_batches(of_batch, setup, CONCAT)(batch, row_numbers(batch))
        # This also orders the loss before the write to the bank; otherwise XLA keeps a copy of the
        # whole bank for it.
        memory, diagnostics = objective.update(memory, extract, is_finite)
        metrics |= diagnostics
    state = TrainState(state.step + 1, **variables, opt_state=opt_state, ema=ema, memory=memory)
    return state, metrics


def batch_gradients(
    setup: Setup, state: TrainState, batch: Batch
) -> tuple[tuple[Any, Probes], Any, Metrics, Extract]:
    """`gradients` of a whole batch, in as many micro-batches as the config says."""
    # Gathered if sharded, as only batches are computed in parallel.
    whole = dataclasses.replace(state, params=sharding.replicate(state.params, setup.mesh))
    of_batch = functools.partial(gradients, setup, whole, label_weight(setup, batch.label))
    of_batch = in_micro_batches(of_batch, setup, (MEAN, MEAN, MEAN, CONCAT))
    return of_batch(batch, row_numbers(batch))


def unless_skipped(is_finite: Bool[Array, ""], after: Any, before: Any) -> Any:
    """The variables after a step, or those before it if it is skipped; its counts go on."""

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(is_finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(chosen, after, before)


def step_rngs(
    config: Config, step: Int[Array, ""], batch: Batch, row: Int[Array, " b"]
) -> StepRngs:
    """The keys of a (micro-)batch of a step; `row`: as of `row_numbers`."""
    step_rng = jax.random.fold_in(jax.random.key(config.seed), step)
    dropout, loss, extract, shared = jax.random.split(step_rng, 4)
    if config.train.accumulation_steps > 1:
        dropout, shared = (jax.random.fold_in(rng, row[0]) for rng in (dropout, shared))
    per_image = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    loss, extract = (per_image(rng, batch.example_id) for rng in (loss, extract))
    return StepRngs(dropout, loss, extract, shared)


def gradients(
    setup: Setup,
    state: TrainState,
    total_weight: Float[Array, ""],
    batch: Batch,
    row: Int[Array, " b"],
) -> tuple[tuple[Any, Probes], Any, Metrics, Extract]:
    """Of a (micro-)batch: gradients, new batch statistics, metrics, what the objective extracts.

    Gradients of the total loss in the parameters that are trained, and in the network's probes.
    `total_weight`: the label weight of the whole batch.
    """
    objective = setup.objective
    rngs = step_rngs(setup.config, state.step, batch, row)
    image = normalize(batch.image, setup.image_format)

    def loss_fn(
        params: Any, probes: Probes
    ) -> tuple[Float[Array, ""], tuple[Any, SegmentationOutput, Metrics]]:
        output, updates = setup.model.apply(
            {"params": with_frozen(params, state.params), "batch_stats": state.batch_stats},
            image,
            train=True,
            probes=probes,
            mutable=["batch_stats"],
            rngs={"dropout": rngs.dropout},
        )
        loss, metrics = total_loss(
            *(setup, state, output, batch.label, rngs.loss, rngs.shared),
            share=loss_share(setup, batch.label, total_weight),
        )
        return loss, (updates["batch_stats"], output, metrics)

    probes = Probes(jnp.zeros(()), jnp.zeros(()))
    (grads, squares), (batch_stats, output, metrics) = jax.grad(
        loss_fn, argnums=(0, 1), has_aux=True
    )(trained(setup.model, state.params), probes)
    # Reduced to the shards of the parameters.
    where = state_sharding(setup, state, setup.mesh).params
    grads = lax.with_sharding_constraint(grads, trained(setup.model, where))
    extract = None
    if objective is not None and not objective.update_from_ema:
        extract = objective.extract(output, output_label(output, batch.label), rngs.extract)
    return (grads, squares), trained(setup.model, batch_stats), metrics, extract


def ema_extract(
    setup: Setup,
    objective: Objective,
    ema: Any,
    step: Int[Array, ""],
    batch: Batch,
    row: Int[Array, " b"],
) -> Extract:
    """What the objective extracts of a (micro-)batch as the running average sees it."""
    output = output_of(setup, ema, normalize(batch.image, setup.image_format))
    rngs = step_rngs(setup.config, step, batch, row)
    return objective.extract(output, output_label(output, batch.label), rngs.extract)


def output_of(setup: Setup, variables: Any, image: Float[Array, "b h w 3"]) -> SegmentationOutput:
    """What the network makes of images in inference, embeddings included."""
    return cast(SegmentationOutput, setup.model.apply(variables, image, train=False, embed=True))


def total_loss(
    setup: Setup,
    state: TrainState,
    output: SegmentationOutput,
    label: UInt8[Array, "b h w"],
    image_rng: Key[Array, " b"],
    rng: Key[Array, ""],
    *,
    share: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 4 for what the network makes of a batch, and its parts.

    `share`: of a micro-batch, as of `loss_share`.
    """
    config, objective = setup.config, setup.objective
    segmentation, terms = segmentation_loss(
        setup.terms, output, label, aux_weight=config.loss.aux_weight, share=share
    )
    weight = config.loss.segmentation_weight * ramp(state.step, config.loss.ramp_steps)
    loss = weight * segmentation
    ignored = jnp.mean((label == IGNORE_LABEL).astype(jnp.float32))
    metrics = {**terms, "ignored_pixels": ignored}
    if objective is not None:
        contrast, diagnostics = objective_loss(objective, state, output, label, image_rng, rng)
        share = ramp(state.step - objective.warmup_steps, objective.ramp_steps)
        loss += objective.loss_weight * share * contrast
        metrics |= {"contrast": contrast, **diagnostics}
    return loss, metrics | {"loss": loss}


def ramp(step: Int[Array, ""], num_steps: int) -> Float[Array, ""]:
    """What a weight is multiplied by: 0 before step 0, then rising to 1 in `num_steps` equal steps.

    Step 0 has its share already, so that a ramp of no steps is a switch.
    """
    return jnp.clip((step + 1).astype(jnp.float32) / max(num_steps, 1), 0.0, 1.0)


def objective_loss(
    objective: Objective,
    state: TrainState,
    output: SegmentationOutput,
    label: UInt8[Array, "b h w"],
    image_rng: Key[Array, " b"],
    rng: Key[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """The objective's loss and diagnostics; zeros, not computed, during its warm-up."""
    measure = functools.partial(objective.loss, state.memory)
    label = output_label(output, label)
    arguments = (output, label, image_rng, rng)
    shapes = jax.eval_shape(measure, *arguments)
    return lax.cond(
        state.step >= objective.warmup_steps,
        measure,
        lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        *arguments,
    )


def output_label(output: SegmentationOutput, label: UInt8[Array, "b h w"]) -> Int[Array, "b hs ws"]:
    """Labels at the network's output stride."""
    return label_at_stride(label, (output.logits.shape[1], output.logits.shape[2]))


def compile_step(setup: Setup, tx: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The jitted `train_step` on the setup's mesh; the state argument is donated."""
    of_state = state_sharding(setup, abstract_state(setup, tx), setup.mesh)
    return jax.jit(
        functools.partial(train_step, setup=setup, tx=tx),
        in_shardings=(of_state, sharding.batch_sharding(setup.mesh)),
        out_shardings=(of_state, sharding.replicated(setup.mesh)),
        donate_argnums=0,
    )


def batch_shape(setup: Setup) -> Batch:
    """Shapes, dtypes and shardings of a global training batch."""
    size, by_rows = setup.config.train.batch_size, sharding.batch_sharding(setup.mesh)
    image, row = (size, *setup.config.augment.crop_size), (size,)
    return Batch(
        image=jax.ShapeDtypeStruct((*image, 3), jnp.uint8, sharding=by_rows),
        label=jax.ShapeDtypeStruct(image, jnp.uint8, sharding=by_rows),
        example_id=jax.ShapeDtypeStruct(row, jnp.int32, sharding=by_rows),
        valid=jax.ShapeDtypeStruct(row, jnp.bool, sharding=by_rows),
    )
