"""The contract of a pixel loss, by one of a few lines."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small import make_batch, make_config, setup_of

from contrastseg_jax.losses.segmentation import Term
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.resolve import initial_variables
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import init_state
from contrastseg_jax.training.train_step import compile_step

pytestmark = pytest.mark.slow


def squares(logits, label):
    """The mean square of the logits of labelled pixels; 0 where there is none."""
    logits = resize_bilinear(logits, label.shape[1:])
    labelled = (label < logits.shape[-1]).astype(jnp.float32)
    square = jnp.square(logits).mean(-1) * labelled
    return square.sum() / jnp.maximum(labelled.sum(), 1.0)


@pytest.mark.parametrize("model", ["toy", "toy_ocr"])
def test_a_step_lowers_it(model):
    settings = "loss.aux_weight=0.5", "optim.learning_rate=0.001", "model.dropout_rate=0.0"
    config = make_config(f"model.name={model}", *settings, variant="ce")
    setup = dataclasses.replace(setup_of(config), terms=(Term("squares", 1.0, squares),))
    tx, _ = build_optimizer(config)
    state = init_state(setup, tx, initial_variables(setup))
    step_fn, batch = compile_step(setup, tx), sharding.to_devices(make_batch(), setup.mesh)
    losses = []
    for _ in range(4):
        state, metrics = step_fn(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses == sorted(losses, reverse=True)
