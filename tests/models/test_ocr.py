"""OCR against its formulas written out in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastseg_jax.models.heads.ocr import OCRHead, object_attention, spatial_gather

B, H, W, C, K, D = 2, 3, 4, 5, 3, 6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def gathered(features, logits):
    """For every image and class, the features of each pixel times its share of the class."""
    result = np.zeros((B, K, C))
    for b in range(B):
        for k in range(K):
            share = np.exp(logits[b, :, :, k])
            share /= share.sum()
            for y in range(H):
                for x in range(W):
                    result[b, k] += share[y, x] * features[b, y, x]
    return result


def attended(query, key, value):
    """For every pixel, the values of the classes by how well their keys fit."""
    result = np.zeros(query.shape[:3] + value.shape[-1:])
    for b, y, x in np.ndindex(*query.shape[:3]):
        fit = np.exp([query[b, y, x] @ k / np.sqrt(len(k)) for k in key[b]])
        result[b, y, x] = sum(w * v for w, v in zip(fit / fit.sum(), value[b], strict=True))
    return result


def test_gather_is_the_written_out_one(rng):
    features, logits = normal(rng, B, H, W, C), 3 * normal(rng, B, H, W, K)
    result = spatial_gather(jnp.asarray(features), jnp.asarray(logits))
    np.testing.assert_allclose(result, gathered(features, logits), rtol=1e-4, atol=1e-5)


def test_attention_is_the_written_out_one(rng):
    query, key, value = normal(rng, B, H, W, D), normal(rng, B, K, D), normal(rng, B, K, D)
    result = object_attention(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value))
    np.testing.assert_allclose(result, attended(query, key, value), rtol=1e-4, atol=1e-5)


def test_the_whole_head_is_the_written_out_one(rng):
    head = OCRHead(num_classes=K, dropout_rate=0.5, width=8, key_width=D)
    features, logits = normal(rng, B, H, W, C), normal(rng, B, H, W, K)
    inputs = jnp.asarray(features), jnp.asarray(logits)
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), *inputs, train=False))
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.2, 1.0, leaf.shape).astype(np.float32) - 0.4, shapes
    )
    for stats in variables["batch_stats"].values():
        stats["var"] += 1

    def layer(x, name, first=0):
        """1x1 convolution, BN, ReLU; the elements of the original's `Sequential`."""
        params, norm = variables["params"], f"{name}_{first + 1}"
        conv, stats = params[f"{name}_{first}"], variables["batch_stats"][norm]
        x = x @ conv["kernel"][0, 0] + conv["bias"]
        x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        return np.maximum(x * params[norm]["scale"] + params[norm]["bias"], 0)

    # The 3x3 convolution in front, as nine of 1x1.
    conv = variables["params"]["conv3x3_0"]
    padded = np.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = conv["bias"] + sum(
        padded[:, i : i + H, j : j + W] @ conv["kernel"][i, j] for i in range(3) for j in range(3)
    )
    norm, stats = variables["params"]["conv3x3_1"], variables["batch_stats"]["conv3x3_1"]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    x = np.maximum(x * norm["scale"] + norm["bias"], 0)

    share = np.exp(logits) / np.exp(logits).sum((1, 2), keepdims=True)
    objects = np.einsum("bhwk,bhwc->bkc", share, x)
    query = layer(layer(x, "f_pixel"), "f_pixel", 2)
    key = layer(layer(objects, "f_object"), "f_object", 2)
    context = layer(attended(query, key, layer(objects, "f_down")), "f_up")
    x = layer(np.concatenate([context, x], axis=-1), "conv_bn_dropout")
    classifier = variables["params"]["classifier"]
    expected = x @ classifier["kernel"][0, 0] + classifier["bias"]

    result = head.apply(variables, *inputs, train=False).logits
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (spatial_gather, [(1, 8, 8, 2), (1, 8, 8, 3)]),
        (object_attention, [(1, 8, 8, 2), (1, 3, 2), (1, 3, 2)]),
    ],
)
def test_softmaxes_of_bfloat16_are_taken_in_float32(function, shapes):
    arrays = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    program = jax.make_jaxpr(function)(*arrays)
    assert program.out_avals[0].dtype == jnp.bfloat16
    exponentials = [line for line in str(program).splitlines() if re.search(r"= exp2?\b", line)]
    assert exponentials and all(":f32[" in line for line in exponentials)
