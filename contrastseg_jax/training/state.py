"""The train state: its initial value, shapes and shardings."""

import jax
import jax.numpy as jnp
import optax

from contrastseg_jax.models import segmenter
from contrastseg_jax.models.freezing import trained
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.setup import Setup
from contrastseg_jax.structs import TrainState


def init_state(setup: Setup, tx: optax.GradientTransformation, variables: Variables) -> TrainState:
    """The state at step 0, from the initial variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(trained(setup.model, variables["params"])),
        ema=jax.tree.map(jnp.copy, variables) if setup.config.optim.ema_decay else None,
        memory=setup.objective.init() if setup.objective else None,
    )


def abstract_state(setup: Setup, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of `init_state`."""
    return jax.eval_shape(
        lambda variables: init_state(setup, tx, variables), segmenter.variable_shapes(setup.model)
    )


def state_sharding(setup: Setup, state: TrainState, mesh: sharding.AnyMesh) -> TrainState:
    """The sharding of each array of the state, or of its shapes.

    With parallel.fsdp the large arrays of parameters, optimiser state and EMA are sharded, else
    replicated. The objective decides for its own state.
    """
    place = sharding.fsdp_sharding if setup.config.parallel.fsdp else sharding.replicated_tree
    where = sharding.replicated_tree(mesh, state).replace(
        params=place(mesh, state.params),
        opt_state=place(mesh, state.opt_state),
        ema=place(mesh, state.ema),
    )
    if setup.objective is None:
        return where
    return where.replace(memory=setup.objective.sharding(mesh, state.memory))
