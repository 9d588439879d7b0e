"""Optimisers and learning-rate schedules, of Optax's parts; the defaults are the original's."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from contrastseg_jax.config.tree import Config

Schedule = Callable[[Any], Float[Array, ""]]  # step -> learning rate


def learning_rates(
    name: str, *, learning_rate: float, num_steps: int, poly_power: float, warmup_steps: int
) -> Schedule:
    """The schedule `name` of a run of `num_steps`, times a linear warm-up.

        poly      learning_rate · (1 - step/num_steps)^poly_power
        cosine    learning_rate · (1 + cos(π · step/num_steps)) / 2
        constant  learning_rate

    The warm-up is min(1, (step + 1) / warmup_steps): the schedule runs on beneath it. Original:
    `lambda_poly` in `segmentor/tools/optim_scheduler.py`.
    """
    schedules = {
        "poly": optax.polynomial_schedule(learning_rate, 0.0, poly_power, num_steps),
        "cosine": optax.cosine_decay_schedule(learning_rate, num_steps),
        "constant": optax.constant_schedule(learning_rate),
    }
    falling = schedules[name]

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
        return jnp.asarray(falling(step) * rise)

    return schedule


def optimizer(
    name: str,
    schedule: Schedule,
    *,
    momentum: float,
    betas: Sequence[float],
    weight_decay: float,
    decayed: str,
    head_lr_multiplier: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """PyTorch's SGD or AdamW, with two groups of parameters.

    sgd: decay is added to the gradient, before the momentum. adamw: the parameter loses it, times
    the learning rate (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).

    Everything outside params["backbone"] has `head_lr_multiplier` times the learning rate, which
    scales the decay too, as in PyTorch's parameter groups. Original: `nbb_mult` of
    `_get_parameters` in `segmentor/trainer_contrastive.py`.

    Args:
        name: "sgd" or "adamw".
        schedule: of the learning rate.
        momentum: of sgd.
        betas: of adamw: decay of the averages of gradients and of their squares.
        weight_decay: the factor.
        decayed: parameters with decay: "all" (the original), or "kernels" alone, without the
            scales and biases of norms and layers.
        head_lr_multiplier: of the learning rate outside the backbone.
        clip_norm: what the norm of the whole gradient is cut down to, before all else; 0: not.
    """
    mask = _is_kernel if decayed == "kernels" else None
    rules = {
        "sgd": [optax.add_decayed_weights(weight_decay, mask), optax.sgd(schedule, momentum)],
        "adamw": [_promoting(optax.adamw(schedule, *betas, weight_decay=weight_decay, mask=mask))],
    }
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    heads = [optax.masked(optax.scale(head_lr_multiplier), _is_head)]
    return optax.chain(*clip, *rules[name], *(heads if head_lr_multiplier != 1 else []))


def _promoting(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to the power of a count
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


def _is_head(params: dict[str, Any]) -> dict[str, bool]:
    return {name: name != "backbone" for name in params}


def _is_kernel(params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def update_ema(ema: Any, variables: Any, step: Int[Array, ""], *, ema_decay: float) -> Any:
    """Exponential moving average of variables; the decay is warmed up to `ema_decay`."""
    step = step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, variables)


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimiser and its learning-rate schedule."""
    optim = config.optim
    schedule = learning_rates(
        optim.schedule,
        learning_rate=optim.learning_rate,
        num_steps=config.train.num_steps,
        poly_power=optim.poly_power,
        warmup_steps=optim.warmup_steps,
    )
    tx = optimizer(
        optim.name,
        schedule,
        momentum=optim.momentum,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        decayed=optim.decayed,
        head_lr_multiplier=optim.head_lr_multiplier,
        clip_norm=optim.clip_norm,
    )
    return tx, schedule
