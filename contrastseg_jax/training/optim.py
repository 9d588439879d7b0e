"""The original's optimiser: SGD with momentum under a polynomial learning-rate schedule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from contrastseg_jax.config.tree import Config

Schedule = Callable[[Any], Float[Array, ""]]  # step -> learning rate


def poly_schedule(
    *, learning_rate: float, num_steps: int, poly_power: float, warmup_steps: int
) -> Schedule:
    """learning_rate · (1 - step/num_steps)^poly_power, times a linear warm-up.

    Original: `lambda_poly` in `segmentor/tools/optim_scheduler.py`.
    """
    poly = optax.polynomial_schedule(learning_rate, 0.0, poly_power, num_steps)

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
        return jnp.asarray(poly(step) * rise)

    return schedule


def sgd(
    schedule: Schedule, *, momentum: float, weight_decay: float, head_lr_multiplier: float
) -> optax.GradientTransformation:
    """PyTorch's SGD: decay is added to the gradient of every parameter, before the momentum.

    Everything outside params["backbone"] has `head_lr_multiplier` times the learning rate, which
    scales the decay too, as in PyTorch's parameter groups. Original: `nbb_mult` of
    `_get_parameters` in `segmentor/trainer_contrastive.py`.
    """
    steps = [optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum)]
    if head_lr_multiplier != 1:
        steps.append(optax.masked(optax.scale(head_lr_multiplier), _is_head))
    return optax.chain(*steps)


def _is_head(params: dict[str, Any]) -> dict[str, bool]:
    return {name: name != "backbone" for name in params}


def update_ema(ema: Any, variables: Any, step: Int[Array, ""], *, ema_decay: float) -> Any:
    """Exponential moving average of variables; the decay is warmed up to `ema_decay`."""
    step = step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, variables)


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimiser and its learning-rate schedule."""
    optim = config.optim
    schedule = poly_schedule(
        learning_rate=optim.learning_rate,
        num_steps=config.train.num_steps,
        poly_power=optim.poly_power,
        warmup_steps=optim.warmup_steps,
    )
    tx = sgd(
        schedule,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        head_lr_multiplier=optim.head_lr_multiplier,
    )
    return tx, schedule
