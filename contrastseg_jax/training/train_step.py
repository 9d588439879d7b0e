"""The train step: a pure function over a mesh."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from contrastseg_jax.losses.segmentation import segmentation_loss
from contrastseg_jax.models.segmenter import Probes
from contrastseg_jax.objectives.objective import Metrics, Objective
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.ops.resize import label_at_stride
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import IGNORE_LABEL, Batch, SegmentationOutput, TrainState
from contrastseg_jax.training.optim import update_ema
from contrastseg_jax.training.state import abstract_state, state_sharding


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
    step_rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    dropout_rng, loss_rng, update_rng, shared_rng = jax.random.split(step_rng, 4)
    per_image = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    image = normalize(batch.image, setup.image_format)
    rngs = dropout_rng, per_image(loss_rng, batch.example_id), shared_rng
    grads, (batch_stats, output, metrics) = gradients(setup, state, batch.label, image, rngs)
    grads = lax.with_sharding_constraint(grads, state_sharding(setup, state, mesh).params)
    # Known before the update, which is then made in place.
    is_finite = all_finite((metrics["loss"], grads, batch_stats))
    metrics["skipped"] = 1.0 - is_finite.astype(jnp.float32)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # BatchNorm statistics belong to their weights, so both are averaged.
        variables = {"params": params, "batch_stats": batch_stats}
        ema = update_ema(ema, variables, state.step, ema_decay=config.optim.ema_decay)
    before = state.params, state.batch_stats, state.opt_state, state.ema
    after = params, batch_stats, opt_state, ema
    params, batch_stats, opt_state, ema = unless_skipped(is_finite, after, before)
    memory = state.memory
    if objective is not None:
        # After the loss: an image is never contrasted with its own rows of this step.
        label = output_label(output, batch.label)
        if objective.update_from_ema:
            output = output_of(setup, sharding.replicate(ema, mesh), image)
        # A skipped step enqueues nothing. This also orders the loss before the write to the bank;
        # otherwise XLA keeps a copy of the whole bank for it.
        label = jnp.where(is_finite, label, IGNORE_LABEL)
        image_rng = per_image(update_rng, batch.example_id)
        memory, diagnostics = objective.update(memory, output, label, image_rng)
        metrics |= diagnostics
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema, memory), metrics


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all values of a tree are finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def unless_skipped(is_finite: Bool[Array, ""], after: Any, before: Any) -> Any:
    """The variables after a step, or those before it if it is skipped; its counts go on."""

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(is_finite, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(chosen, after, before)


def gradients(
    setup: Setup,
    state: TrainState,
    label: UInt8[Array, "b h w"],
    image: Float[Array, "b h w 3"],
    rngs: tuple[Key[Array, ""], Key[Array, " b"], Key[Array, ""]],
) -> tuple[Any, tuple[Any, SegmentationOutput, Metrics]]:
    """Gradients of the total loss in the parameters; new batch statistics, output and metrics.

    `rngs`: of dropout, of each image, and of the whole batch.
    """
    dropout_rng, image_rng, shared_rng = rngs

    def loss_fn(
        params: Any, probes: Probes
    ) -> tuple[Float[Array, ""], tuple[Any, SegmentationOutput, Metrics]]:
        output, updates = setup.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            image,
            train=True,
            probes=probes,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_rng},
        )
        loss, metrics = total_loss(setup, state, output, label, image_rng, shared_rng)
        return loss, (updates["batch_stats"], output, metrics)

    # Gathered if sharded, as only batches are computed in parallel. The gradients are then
    # reduced to the same shards.
    whole = sharding.replicate(state.params, setup.mesh)
    probes = Probes(jnp.zeros(()), jnp.zeros(()))
    (grads, squares), found = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(whole, probes)
    if setup.objective is not None and setup.config.loss.segmentation_weight:
        ratio = squares.embedding / jnp.maximum(squares.logits, 1e-30)
        found[2]["gradient_ratio"] = jnp.sqrt(ratio)
    return grads, found


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
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 4 for what the network makes of a batch, and its parts."""
    config, objective = setup.config, setup.objective
    segmentation, terms = segmentation_loss(
        setup.terms, output, label, aux_weight=config.loss.aux_weight
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
