"""A run that is small in everything: what the tests of the program share."""

import jax
import numpy as np
import toy  # noqa: F401
from paths import ROOT

from contrastseg_jax.config.load import load_config
from contrastseg_jax.parallel import sharding
from contrastseg_jax.setup.resolve import initial_variables, resolve
from contrastseg_jax.structs import IGNORE_LABEL, Batch
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import init_state, state_sharding
from contrastseg_jax.training.train_step import compile_step

SETTINGS = (
    "data.name=synthetic",
    "data.synthetic.image_size=(48, 64)",
    "data.synthetic.num_classes=3",
    "data.synthetic.num_examples=(6, 3)",
    "data.num_threads=2",
    "data.prefetch=2",
    "augment.crop_size=(32, 32)",
    "contrast.anchors_per_image=24",
    "contrast.warmup_steps=1",
    "memory.pixel_size=16",
    "memory.segment_size=4",
    "memory.pixels_per_class=3",
    "model.proj_dim=16",
    "train.batch_size=4",
    "train.num_steps=6",
    "train.log_steps=2",
    "train.eval_steps=4",
    "train.checkpoint_steps=3",
    "eval.batch_size=2",
    "eval.num_pictures=1",
)


def make_config(*overrides, variant="memory"):
    """The small config, changed."""
    path = ROOT / "configs" / "default.py"
    return load_config(f"{path}:toy,{variant}", (*SETTINGS, *overrides))


def make_batch(seed=0, size=4, num_classes=3):
    """A global batch of noisy blocks, as bright as their class.

    Large enough for BatchNorm at stride 32 to have something to average: on smaller images its
    gradient magnifies rounding a thousandfold.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(num_classes, size=(size, 8, 8)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    noise = rng.integers(60, size=(size, 64, 64, 3))
    image = (label[..., None] * 60 + noise).astype(np.uint8)
    label[:, :2] = IGNORE_LABEL
    return Batch(image, label, np.arange(size, dtype=np.int32), np.ones(size, bool))


def setup_of(config, num_devices=2):
    """What a config means on some of the test's devices."""
    return resolve(config, jax.devices()[:num_devices])


def start(config, num_devices=2):
    """The compiled step, the state at step 0 and the mesh of a config."""
    setup = setup_of(config, num_devices)
    tx, _ = build_optimizer(config)
    state = init_state(setup, tx, initial_variables(setup))
    state = jax.device_put(state, state_sharding(setup, state, setup.mesh))
    return compile_step(setup, tx), state, setup.mesh


def run_steps(config, num_devices=2, num_steps=3):
    """States and metrics of the first steps on batches of noise."""
    step_fn, state, mesh = start(config, num_devices)
    history = []
    for step in range(num_steps):
        state, metrics = step_fn(state, sharding.to_devices(make_batch(step), mesh))
        history.append(sharding.fetch(metrics))
    return sharding.fetch(state), history, step_fn
