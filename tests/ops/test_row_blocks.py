"""Row blocks against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastseg_jax.ops import row_blocks
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.ops.row_blocks import joined_rows, map_row_blocks


@pytest.mark.parametrize(
    ("old", "new"), [((5, 7), (17, 25)), ((16, 12), (16, 12)), ((9, 9), (65, 33)), ((1, 3), (7, 7))]
)
@pytest.mark.parametrize("num_rows", [1, 4, 6])
def test_they_are_the_rows_of_the_whole(old, new, num_rows, monkeypatch):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, *old, 3)), jnp.float32)
    label = jnp.asarray(rng.integers(3, size=(2, *new)), jnp.uint8)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", num_rows * new[1] * 3 * 4)
    shapes = []

    def weighted(logits, label):
        shapes.append(logits.shape)
        return (logits * jnp.arange(1, 4, dtype=jnp.float32)[None, None, None]).sum(-1)

    def whole(logits):
        return weighted(resize_bilinear(logits, new), label)

    def blocks(logits):
        return joined_rows(map_row_blocks(weighted, logits, label), new[0])

    cotangent = jnp.asarray(rng.normal(size=label.shape), jnp.float32)
    found, pull = jax.vjp(blocks, logits)
    assert shapes[0][1] <= num_rows
    expected, pull_whole = jax.vjp(whole, logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull(cotangent)[0], pull_whole(cotangent)[0], rtol=1e-4, atol=1e-5)


def test_large_logits_never_exist_whole():
    """At 512x1024 with 60 classes; one float32 copy of them would take 120 MiB."""
    logits = jax.ShapeDtypeStruct((1, 64, 128, 60), jnp.float32)
    label = jax.ShapeDtypeStruct((1, 512, 1024), jnp.uint8)

    def loss(logits, label):
        found = map_row_blocks(lambda x, _: jax.nn.logsumexp(x, axis=-1), logits, label)
        return found.sum()

    compiled = jax.jit(jax.grad(loss)).lower(logits, label).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 << 20
