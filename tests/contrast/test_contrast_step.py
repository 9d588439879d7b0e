"""The method in one call: against a literal loss, over shapes, devices and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import pixel_contrast_loss_literal

from contrastseg_jax.contrast.contrast_step import contrast_step
from contrastseg_jax.contrast.memory_bank import init_memory
from contrastseg_jax.contrast.unit_length import to_unit_length

CLASSES, DIM = 3, 8
SCALE = {"temperature": 0.2, "base_temperature": 0.07}
call = jax.jit(
    functools.partial(contrast_step, anchors_per_image=96, **SCALE),
    static_argnames=("candidates", "only_correct_keys", "mesh"),
)


def scene(*shape):
    """Embeddings of any length, labels of which some are ignored, logits."""
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, -1, 7], size=shape)
    embedding = 3 * rng.normal(size=(*shape, DIM)).astype(np.float32)
    logits = rng.normal(size=(*shape, CLASSES)).astype(np.float32)
    return jnp.asarray(embedding), jnp.asarray(label, jnp.int32), jnp.asarray(logits)


def empty_bank(**sizes):
    sizes = {"pixel_size": 200, "segment_size": 4} | sizes
    return init_memory(num_classes=CLASSES, proj_dim=DIM, dtype="float32", **sizes)


def normalized(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("shape", [(30,), (2, 12), (2, 3, 4), (2, 2, 3, 2)])
def test_where_all_pixels_are_anchors_the_loss_is_the_literal_one(shape):
    """In the batch, then with what the first call has put into the bank."""
    embedding, label, logits = scene(*shape)
    loss, metrics, bank = call(embedding, label, logits, empty_bank(), jax.random.key(0))
    rows, classes = normalized(embedding).reshape(-1, DIM), np.asarray(label).reshape(-1)
    known = (classes >= 0) & (classes < CLASSES)
    literal = pixel_contrast_loss_literal(
        rows, classes, known, rows, classes, known, exclude_self=True, **SCALE
    )
    np.testing.assert_allclose(loss, literal, rtol=1e-5)
    slots, filled = np.asarray(bank.pixel), np.asarray(bank.pixel_count)
    stored = np.concatenate([slots[c, :n] for c, n in enumerate(filled)])
    assert len(stored) == sum(
        min(10, np.sum(image == c))
        for image in classes.reshape(1 if len(shape) == 1 else shape[0], -1)
        for c in range(CLASSES)
    )
    segments = np.concatenate([bank.segment[c, :n] for c, n in enumerate(bank.segment_count)])
    of_stored = np.concatenate([np.repeat(np.arange(3), n) for n in (filled, bank.segment_count)])
    again, _, _ = call(embedding, label, logits, bank, jax.random.key(1))
    both = np.concatenate([rows, stored, segments]), np.concatenate([classes, of_stored])
    valid = np.concatenate([known, np.ones(len(of_stored), bool)])
    literal = pixel_contrast_loss_literal(
        rows, classes, known, *both, valid, exclude_self=True, **SCALE
    )
    np.testing.assert_allclose(again, literal, rtol=1e-5)
    assert float(metrics["memory_age"]) == 0.0 and 0 < float(metrics["correct_keys"]) < 1


def test_without_a_bank_the_batch_is_contrasted_and_none_comes_back():
    embedding, label, logits = scene(2, 12)
    with_bank, _, _ = call(embedding, label, logits, empty_bank(), jax.random.key(0))
    alone, metrics, bank = call(embedding, label, logits, None, jax.random.key(0))
    np.testing.assert_allclose(alone, with_bank, rtol=1e-6)
    assert bank is None and "memory_fill" not in metrics


def test_keys_may_be_correct_pixels_alone():
    embedding, label, _ = scene(2, 40)
    wrong = jax.nn.one_hot((label + 1) % CLASSES, CLASSES)
    bank = empty_bank()
    *_, kept = call(embedding, label, wrong, bank, jax.random.key(0), only_correct_keys=True)
    assert not np.any(kept.pixel_count) and not np.any(kept.segment_count)


def test_zeros_have_no_direction_and_no_gradient():
    embedding, label, logits = scene(2, 12)
    embedding = embedding.at[0, :5].set(0.0)

    def loss_of(embedding):
        return call(embedding, label, logits, None, jax.random.key(0))[0]

    loss, gradient = jax.value_and_grad(loss_of)(embedding)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert not np.any(gradient[0, :5]) and np.any(gradient[1])
    np.testing.assert_array_equal(to_unit_length(jnp.zeros((2, 4))), np.zeros((2, 4)))


def test_nothing_labelled_costs_nothing_and_leaves_the_bank():
    embedding, _, logits = scene(2, 12)
    nothing = jnp.full((2, 12), 255, jnp.int32)
    loss, _, bank = call(embedding, nothing, logits, empty_bank(), jax.random.key(0))
    assert float(loss) == 0.0 and not np.any(bank.pixel_count)


@pytest.mark.parametrize("is_named", [False, True])
def test_two_devices_give_what_one_gives(is_named):
    """Whether the compiler finds out how to split the work, or is told."""
    arrays, key = scene(2, 5, 4), jax.random.key(0)
    loss, _, bank = call(*arrays, empty_bank(), key)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    by_image = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    arrays = jax.device_put(arrays, by_image)
    rest = jax.device_put((empty_bank(), key), whole)
    with jax.set_mesh(mesh):
        split, _, of_two = call(*arrays, *rest, mesh=mesh if is_named else None)
    np.testing.assert_allclose(split, loss, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), of_two, bank)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"label": jnp.zeros((2, 11), jnp.int32)}, r"label \(2, 11\) .* must agree in all axes"),
        (
            {"logits": jnp.zeros((2, 12, 4))},
            "4 classes, .* length 8: the bank was made for 3 and 8",
        ),
        ({"logits": jnp.zeros((2, 12, 300))}, "300 classes: at most 255"),
        ({"candidates": "none"}, "'none': must be batch, memory or both"),
        ({"bank": None, "candidates": "memory"}, "'memory': needs a bank"),
    ],
)
def test_what_does_not_belong_together_is_refused(changed, expected):
    embedding, label, logits = scene(2, 12)
    arguments = {"embedding": embedding, "label": label, "logits": logits, "bank": empty_bank()}
    with pytest.raises(ValueError, match=expected):
        contrast_step(**arguments | changed, rng=jax.random.key(0))
