"""The streamed loss against the direct form: values, gradients, and what it holds in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import logsumexp, softplus
from jax.test_util import check_grads

from contrastseg_jax.contrast.anchors import batch_candidates
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.contrast.selection import STRATEGIES
from contrastseg_jax.contrast.streaming import tile_size
from contrastseg_jax.structs import Anchors, Candidates

SCALE = {"temperature": 0.1, "base_temperature": 0.07}


def scene(num_classes=4, rows=70, slots=33, d=8, seed=0):
    """Anchors of two images, and a queue of slots per class, some of all invalid."""
    rng = np.random.default_rng(seed)
    embedding, queue = (rng.normal(size=(*s, d)) for s in ((2, rows), (num_classes, slots)))
    embedding, queue = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (embedding, queue))
    label = np.broadcast_to(np.arange(num_classes)[:, None], (num_classes, slots))
    anchors = Anchors(
        jnp.asarray(embedding, jnp.float32),
        jnp.asarray(rng.integers(num_classes, size=(2, rows)), jnp.int32),
        jnp.asarray(rng.random((2, rows)) < 0.8),
    )
    return anchors, Candidates(
        jnp.asarray(queue, jnp.float32),
        jnp.asarray(label, jnp.int32),
        jnp.asarray(rng.random((num_classes, slots)) < 0.7),
    )


def direct_loss(rows, queue, anchors, candidates):
    """Eq. 3 with all similarities at once, in the batch and against the queue."""
    rows, d = rows.reshape(-1, rows.shape[-1]), rows.shape[-1]
    embedding = jnp.concatenate([rows, queue.reshape(-1, d)])
    label, valid = (
        jnp.concatenate([getattr(a, name).reshape(-1) for a in (anchors, candidates)])
        for name in ("label", "valid")
    )
    num_rows = len(rows)
    same = label[:num_rows, None] == label[None, :]
    usable = valid[:num_rows, None] & valid[None, :]
    positive = usable & same & ~jnp.eye(*same.shape, dtype=bool)
    similarity = jnp.matmul(rows, embedding.T) / SCALE["temperature"]
    negatives = jnp.where(usable & ~same, similarity, -1e30)
    excess = logsumexp(negatives, axis=1, keepdims=True) - similarity
    number = positive.sum(1).astype(jnp.float32)
    cost = jnp.where(positive, softplus(excess), 0.0).sum(1) / jnp.maximum(number, 1)
    return 0.1 / 0.07 * cost.sum() / jnp.maximum((number > 0).sum().astype(jnp.float32), 1)


def streamed_loss(rows, queue, anchors, candidates, **settings):
    anchors = anchors.replace(embedding=rows)
    sets = (batch_candidates(anchors), candidates.replace(embedding=queue))
    return pixel_contrast_loss(anchors, sets, **settings, **SCALE)[0]


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 32, 33, 1024])
def test_values_and_gradients_of_anchors_and_queue(chunk_size):
    """Chunks that divide the candidates, that do not, and that exceed them."""
    anchors, candidates = scene()
    arguments = (anchors.embedding, candidates.embedding)
    streamed = functools.partial(streamed_loss, chunk_size=chunk_size)
    loss, grads = jax.jit(jax.value_and_grad(streamed, argnums=(0, 1)))(
        *arguments, anchors, candidates
    )
    expected, expected_grads = jax.value_and_grad(direct_loss, argnums=(0, 1))(
        *arguments, anchors, candidates
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert np.linalg.norm(grad - expected) < 2e-6 * np.linalg.norm(expected)
    alone = streamed(*arguments, anchors, candidates)
    np.testing.assert_allclose(alone, loss, rtol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 2, 140])
def test_classes_larger_and_smaller_than_a_tile(num_classes):
    anchors, candidates = scene(num_classes, rows=71, slots=3)
    assert 1 < tile_size(71) < 71
    arguments = (anchors.embedding, candidates.embedding, anchors, candidates)
    loss, grad = jax.jit(jax.value_and_grad(streamed_loss))(*arguments)
    expected, expected_grad = jax.value_and_grad(direct_loss)(*arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=2e-6 * np.abs(expected_grad).max())


@pytest.mark.parametrize(
    ("num_rows", "size"), [(1, 16), (128, 16), (511, 16), (512, 32), (1024, 64), (9999, 64)]
)
def test_tiles_grow_with_the_rows(num_rows, size):
    assert tile_size(num_rows) == size


def test_gradients_are_those_of_finite_differences():
    anchors, candidates = scene(rows=6, slots=4)
    loss = functools.partial(streamed_loss, anchors=anchors, candidates=candidates)
    arguments = anchors.embedding, candidates.embedding
    check_grads(jax.jit(loss), arguments, order=1, modes=["rev"], eps=1e-2, rtol=2e-2)


def test_bfloat16_in_is_bfloat16_gradients_out():
    anchors, candidates = scene()
    rows, queue = (x.embedding.astype(jnp.bfloat16) for x in (anchors, candidates))
    loss, grads = jax.value_and_grad(streamed_loss, argnums=(0, 1))(
        rows, queue, anchors, candidates
    )
    exact = streamed_loss(*(x.astype(jnp.float32) for x in (rows, queue)), anchors, candidates)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, exact, rtol=1e-6)
    assert {grad.dtype for grad in grads} == {jnp.dtype(jnp.bfloat16)}


def test_candidates_with_stop_gradient_are_constants_and_cost_no_walk():
    """The same loss and gradient in the anchors, without the two products for the queue's own."""
    anchors, candidates = scene()

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(rows, queue, candidates):
        return streamed_loss(rows, queue, anchors, candidates)

    found, num_products = {}, {}
    for constant in (False, True):
        given = candidates.replace(stop_gradient=constant)
        arguments = anchors.embedding, candidates.embedding, given
        found[constant] = jax.jit(loss)(*arguments)
        num_products[constant] = str(jax.make_jaxpr(loss)(*arguments)).count("dot_general")
    (value, (of_rows, of_queue)), (same, (same_rows, of_constants)) = found.values()
    np.testing.assert_array_equal(same, value)
    np.testing.assert_array_equal(same_rows, of_rows)
    assert np.any(of_queue) and not np.any(of_constants)
    assert num_products[False] - num_products[True] == 2


def test_memory_is_that_of_a_chunk():
    """Not of anchors x candidates (here 80 MB), nor of a copy of the bank (20 MB)."""
    anchors, candidates = scene(num_classes=5, rows=500, slots=4000, d=256)

    def loss(rows, candidates):
        return pixel_contrast_loss(anchors.replace(embedding=rows), (candidates,), **SCALE)[0]

    step = jax.jit(jax.value_and_grad(loss)).lower(anchors.embedding, candidates).compile()
    assert step.memory_analysis().temp_size_in_bytes < 12 << 20


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bfloat16_bank_is_widened_chunk_by_chunk(strategy):
    """Not all of it (100 MB), whatever looks at it: walks, pools or the limits of the hardest."""
    anchors, candidates = scene(num_classes=5, rows=50, slots=20_000, d=256)
    anchors = jax.eval_shape(lambda: anchors)
    candidates = candidates.replace(embedding=candidates.embedding.astype(jnp.bfloat16))
    candidates = jax.eval_shape(lambda: candidates.replace(stop_gradient=True))

    def loss(rows, anchors, candidates, rng):
        return pixel_contrast_loss(
            anchors.replace(embedding=rows),
            (candidates,),
            rng,
            positives=strategy,
            negatives=strategy,
            num_positives=64,
            num_negatives=128,
            **SCALE,
        )[0]

    rng = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.jit(jax.value_and_grad(loss)).lower(anchors.embedding, anchors, candidates, rng)
    widened = 4 * candidates.embedding.size
    assert step.compile().memory_analysis().temp_size_in_bytes < widened // 4
