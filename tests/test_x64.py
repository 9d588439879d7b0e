"""With JAX_ENABLE_X64=1 all arrays keep the types that they have without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_batch, make_config, start

from contrastseg_jax.contrast.anchors import batch_candidates
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.evaluation.evaluate import score
from contrastseg_jax.structs import Anchors, Batch, Candidates
from contrastseg_jax.training.optim import learning_rates

SELECTED = ("contrast.num_positives=2", "contrast.num_negatives=2")


@pytest.mark.parametrize(
    "settings",
    [
        ("contrast.positives=semi_hard", "memory.sharding=slots", "optim.ema_decay=0.9"),
        ("contrast.positives=random", "contrast.negatives=hardest", "model.dtype=bfloat16"),
        ("contrast.negatives=hardest", "contrast.approximate=True", "memory.dtype=bfloat16"),
        ("optim.name=adamw", "optim.clip_norm=1.0", "train.accumulation_steps=2"),
        (
            "loss.cross_entropy.label_smoothing=0.1",
            *(f"loss.terms.{name}=1.0" for name in ("ohem", "focal", "lovasz", "rmi", "dice")),
        ),
    ],
)
def test_a_step_leaves_the_types_of_the_state_as_they_are(settings):
    """Traced, not compiled: a type that does not fit is an error of the trace."""
    config = make_config(*settings, *SELECTED, "optim.warmup_steps=2")
    with jax.enable_x64(True):
        step_fn, state, _ = start(config)
        after, metrics = jax.eval_shape(step_fn, state, make_batch())
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    wide = [x for x in jax.tree.leaves((after, metrics)) if x.dtype.itemsize > 4]
    assert not wide


def test_scores_are_the_same():
    """At the images' size and at other sizes of labels, which an evaluation resizes in one step."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 8, 9, 3)).astype(np.float32)
    label = rng.integers(3, size=(2, 32, 64)).astype(np.uint8)
    image, row = np.zeros((2, 32, 36, 3), np.uint8), np.zeros(2, np.int32)
    sizes = np.full((2, 2), 30, np.int32), np.array([[31, 64], [32, 50]], np.int32)
    for given in ((), sizes):
        batch = Batch(image, label, row, row == 0, *given)
        found = []
        for wide in (False, True):
            with jax.enable_x64(wide):
                arrays = jax.tree.map(jnp.asarray, (logits, batch))
                found.append(jax.device_get(jax.jit(score)(*arrays)))
        for narrow, wide in zip(*map(jax.tree.leaves, found), strict=True):
            assert narrow.dtype == wide.dtype
            np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("strategy", ["all", "semi_hard"])
def test_the_loss_takes_wide_types_too(strategy):
    """What NumPy makes by default: labels of 64 bits, embeddings in float64."""
    rng = np.random.default_rng(0)
    rows, queue = rng.normal(size=(1, 12, 8)), rng.normal(size=(20, 8))
    label, of_queue = rng.integers(3, size=(1, 12)), rng.integers(3, size=20)

    def loss_of(rows, queue, label, of_queue):
        anchors = Anchors(rows, label, jnp.ones(label.shape, bool))
        slots = Candidates(queue, of_queue, jnp.ones(of_queue.shape, bool))
        return pixel_contrast_loss(
            *(anchors, (batch_candidates(anchors), slots), jax.random.key(0)),
            **{"positives": strategy, "negatives": strategy},
            **{"num_positives": 2, "num_negatives": 4},
            **{"temperature": 0.5, "base_temperature": 0.07},
        )[0]

    found = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            arrays = map(jnp.asarray, (rows, queue, label, of_queue))
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss_of))(*arrays)))
    (loss, grad), (wide_loss, wide_grad) = found
    assert wide_loss.dtype == np.float32 and wide_grad.dtype == np.float64
    np.testing.assert_allclose(wide_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(wide_grad, grad, atol=1e-6)


@pytest.mark.parametrize("name", ["poly", "cosine", "constant"])
def test_the_learning_rate_is_no_wider(name):
    settings = {"learning_rate": 0.1, "num_steps": 10, "poly_power": 0.9, "warmup_steps": 3}
    schedule = learning_rates(name, **settings)
    with jax.enable_x64(True):
        rate = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    assert rate.dtype == jnp.float32
