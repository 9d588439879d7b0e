"""The state of a training: at step 0, its shapes, where its arrays lie."""

import jax
import jax.numpy as jnp
import optax

from contrastseg_jax.config.rules import splits_memory, uses_memory
from contrastseg_jax.config.tree import Config
from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.models import segmenter
from contrastseg_jax.models.segmenter import Segmenter, Variables
from contrastseg_jax.parallel import sharding
from contrastseg_jax.structs import TrainState


def init_state(
    config: Config, model: Segmenter, tx: optax.GradientTransformation, variables: Variables
) -> TrainState:
    """The state at step 0: what the network starts from, and an empty bank."""
    bank = None
    if uses_memory(config):
        bank = memory_bank.init_memory(
            num_classes=model.num_classes,
            pixel_size=config.memory.pixel_size,
            segment_size=config.memory.segment_size,
            proj_dim=config.model.proj_dim,
            dtype=config.memory.dtype,
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=jax.tree.map(jnp.copy, variables) if config.optim.ema_decay else None,
        memory=bank,
    )


def state_sharding(config: Config, state: TrainState, mesh: sharding.AnyMesh) -> TrainState:
    """Where each array of the state lies, as the config asks for; `state` may be its shapes."""
    return sharding.state_sharding(
        mesh, state, split_memory=splits_memory(config), fsdp=config.parallel.fsdp
    )


def abstract_state(
    config: Config, model: Segmenter, tx: optax.GradientTransformation
) -> TrainState:
    """Shapes and types of `init_state`, whatever the network starts from."""
    return jax.eval_shape(
        lambda variables: init_state(config, model, tx, variables),
        segmenter.variable_shapes(model),
    )
