"""Whole networks: parity with the original, and what is computed when."""

import importlib.util
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_weights
from flax.traverse_util import flatten_dict

from contrastseg_jax.models import segmenter
from contrastseg_jax.models.heads import ProjectionHead

GOLDEN = Path(__file__).parents[2] / "shared/reference/golden"
TINY = segmenter.build("hrnet_tiny", num_classes=4, proj_dim=16, dropout_rate=0.5)


@pytest.fixture(scope="module")
def tiny_variables():
    params, batch_stats = segmenter.init_variables(TINY, 0)
    return {"params": params, "batch_stats": batch_stats}


def num_params(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


@pytest.mark.parametrize("name", segmenter.model_names())
def test_output_shapes_at_stride_4(name):
    model = segmenter.build(name, num_classes=19, proj_dim=256, dropout_rate=0.1)

    def init_and_apply(rng, image):
        variables = model.init(rng, image, train=False)
        rngs = {"dropout": rng}
        return model.apply(variables, image, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    output = jax.eval_shape(init_and_apply, jax.random.key(0), jnp.zeros((2, 65, 97, 3)))
    assert output.logits.shape == (2, 17, 25, 19)
    assert output.aux_logits is None
    assert output.embedding.shape == (2, 17, 25, 256)


@pytest.mark.parametrize("name", ["hrnet_tinny", "HRNET_W48", "pspnet"])
def test_unknown_name_is_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match="model.name = .*nearest: .*hrnet_") as error:
        segmenter.build(name, num_classes=4, proj_dim=16, dropout_rate=0.1)
    assert name in str(error.value)


def test_init_agrees_with_linen_in_names_shapes_and_types(tiny_variables):
    image = jnp.zeros((1, 32, 32, 3))
    expected = jax.eval_shape(lambda rng: TINY.init(rng, image, train=False), jax.random.key(0))
    assert shapes(tiny_variables) == shapes(expected)


def test_init_is_he_normal_and_a_function_of_the_seed(tiny_variables):
    params, batch_stats = tiny_variables["params"], tiny_variables["batch_stats"]
    kernel = params["cls_head"]["conv1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / np.prod(kernel.shape[:3])), rtol=0.02)
    np.testing.assert_array_equal(params["cls_head"]["conv1"]["bias"], 0)
    np.testing.assert_array_equal(params["backbone"]["bn1"]["scale"], 1)
    np.testing.assert_array_equal(batch_stats["backbone"]["bn1"]["mean"], 0)
    np.testing.assert_array_equal(batch_stats["backbone"]["bn1"]["var"], 1)

    again, _ = segmenter.init_variables(TINY, 0)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other, _ = segmenter.init_variables(TINY, 1)
    assert np.any(other["cls_head"]["conv1"]["kernel"] != kernel)


def test_networks_that_differ_in_a_head_start_alike(tiny_variables):
    plain = segmenter.build("hrnet_tiny", num_classes=4, proj_dim=0, dropout_rate=0.5)
    params, _ = segmenter.init_variables(plain, 0)
    assert "proj_head" not in params
    for part in ("backbone", "cls_head"):
        jax.tree.map(np.testing.assert_array_equal, params[part], tiny_variables["params"][part])


def test_images_of_a_batch_do_not_influence_each_other_in_evaluation(tiny_variables):
    evaluate = jax.jit(lambda image: TINY.apply(tiny_variables, image, train=False).logits)
    image = jnp.asarray(random_image(3, 33, 49))
    changed = image.at[1].set(random_image(33, 49, seed=1))
    before, after = evaluate(image), evaluate(changed)
    np.testing.assert_array_equal(before[::2], after[::2])
    assert np.all(np.any(before[1] != after[1], axis=-1))


def test_evaluation_needs_no_rng_and_gives_no_embedding(tiny_variables):
    output = jax.eval_shape(
        lambda image: TINY.apply(tiny_variables, image, train=False), jnp.zeros((1, 33, 49, 3))
    )
    assert output.logits.shape == (1, 9, 13, 4)
    assert output.embedding is None


def test_training_draws_dropout_and_updates_statistics(tiny_variables):
    @jax.jit
    def train(rng):
        return TINY.apply(
            tiny_variables, image, train=True, rngs={"dropout": rng}, mutable=["batch_stats"]
        )

    image = jnp.asarray(random_image(2, 32, 32))
    output, updates = train(jax.random.key(0))
    other, _ = train(jax.random.key(1))
    assert np.any(output.logits != other.logits)
    np.testing.assert_array_equal(output.embedding, other.embedding)  # no dropout on its way
    length = np.linalg.norm(output.embedding, axis=-1)
    np.testing.assert_allclose(length, 1, rtol=1e-6)
    for old, new in zip(
        jax.tree.leaves(tiny_variables["batch_stats"]),
        jax.tree.leaves(updates["batch_stats"]),
        strict=True,
    ):
        assert np.any(old != new)


def test_evaluation_does_not_compute_the_projection_head(tiny_variables):
    def operations(model):
        def evaluate(variables, image):
            return model.apply(variables, image, train=False)

        cost = jax.jit(evaluate).lower(tiny_variables, jnp.zeros((1, 32, 32, 3))).cost_analysis()
        return cost["flops"]

    plain = segmenter.build("hrnet_tiny", num_classes=4, proj_dim=0, dropout_rate=0.5)
    assert operations(TINY) == operations(plain)


# --- Parity with the original, whose outputs are stored in ../shared ------------------------------


# Compiling costs far more than running here.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def golden():
    """Arrays in PyTorch's layout, the input image among them."""
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here")
    with np.load(GOLDEN / "models/hrnet_w48_contrast.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def image():
    image = np.random.Generator(np.random.PCG64(11)).normal(size=(2, 3, 64, 96))
    return image.astype(np.float32).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def recipe_array():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here")
    spec = importlib.util.spec_from_file_location("recipe", GOLDEN / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.recipe_array


@pytest.fixture(scope="module")
def golden_tensors(recipe_array):
    """The original's weights of the stored case: a function of names and shapes."""
    state = json.loads((GOLDEN / "models/hrnet_w48_contrast.keys.json").read_text())["state"]
    return {
        key: recipe_array(key, shape, dtype)
        for key, (dtype, shape) in state.items()
        if not key.endswith("num_batches_tracked")
    }


@pytest.fixture(scope="module")
def w48():
    # The stored outputs were computed without dropout.
    return segmenter.build("hrnet_w48", num_classes=19, proj_dim=256, dropout_rate=0.0)


def to_torch(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def test_every_tensor_of_the_original_has_its_place(w48, golden_tensors):
    expected = jax.eval_shape(
        lambda rng: w48.init(rng, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0)
    )
    variables = torch_weights.flax_variables(golden_tensors)
    assert shapes(variables) == shapes(expected)
    assert len(jax.tree.leaves(variables)) == len(golden_tensors)
    assert num_params(variables["params"]) == 70_711_696


def test_evaluation_is_that_of_the_original(w48, golden_tensors, golden, image):
    @quick_jit
    def evaluate(variables, image):
        output, state = w48.apply(
            variables,
            image,
            train=False,
            mutable="intermediates",
            capture_intermediates=lambda module, _: module.name == "backbone",
        )
        (features,) = state["intermediates"]["backbone"]["__call__"]
        proj_head = {collection: parts["proj_head"] for collection, parts in variables.items()}
        return output.logits, ProjectionHead(256).apply(proj_head, features, train=False)

    logits, embedding = evaluate(torch_weights.flax_variables(golden_tensors), image)
    np.testing.assert_allclose(to_torch(logits), golden["eval_seg"], rtol=0, atol=1e-4)
    subset = to_torch(embedding)[:, :, ::5, ::5]
    np.testing.assert_allclose(subset, golden["eval_embed_sub"], rtol=0, atol=1e-5)


def test_training_is_that_of_the_original(w48, golden_tensors, golden, image):
    @quick_jit
    def train(variables, image):
        return w48.apply(variables, image, train=True, mutable=["batch_stats"])

    output, updates = train(torch_weights.flax_variables(golden_tensors), image)
    np.testing.assert_allclose(to_torch(output.logits), golden["train_seg"], rtol=0, atol=2e-4)
    subset = to_torch(output.embedding)[:, :, ::5, ::5]
    np.testing.assert_allclose(subset, golden["train_embed_sub"], rtol=0, atol=2e-5)

    keys = [key for key in golden_tensors if "running" in key]
    updates = flatten_dict(updates)
    lengths = np.array([np.linalg.norm(updates[torch_weights.flax_path(key, 1)]) for key in keys])
    ratio = golden["running_after_l2"] / lengths
    of_mean = np.array([key.endswith("mean") for key in keys])
    np.testing.assert_allclose(ratio[of_mean], 1, rtol=1e-5)
    # The original's variance is unbiased; at stride 32 there are 12 positions in the batch.
    assert np.all(ratio[~of_mean] >= 1 - 1e-6)
    assert np.all(ratio[~of_mean] <= 12 / 11)


@pytest.mark.skipif(
    "SLOW_TESTS" not in os.environ, reason="compiles for minutes; runs where SLOW_TESTS is set"
)
def test_gradients_are_those_of_the_original(w48, golden_tensors, golden, image, recipe_array):
    variables = torch_weights.flax_variables(golden_tensors)

    def probe(params, image):
        output, _ = w48.apply(
            {**variables, "params": params}, image, train=True, mutable=["batch_stats"]
        )
        loss = 0.0
        for key, value in (("seg", output.logits), ("embed", output.embedding)):
            _, h, w, c = value.shape
            weight = recipe_array(f"R.{key}.probe", (1, c, h, w)).transpose(0, 2, 3, 1)
            loss += jnp.vdot(jnp.broadcast_to(weight, value.shape), value) / len(image)
        return loss

    gradient = quick_jit(jax.value_and_grad(probe, argnums=(0, 1)))
    loss, (by_params, by_image) = gradient(variables["params"], image)
    np.testing.assert_allclose(loss, golden["probe_loss"], rtol=1e-4)
    # In float64, with weights not rounded to float32, they agree to 4e-8; float32 loses digits in
    # BatchNorms over 12 positions.
    subset, expected = to_torch(by_image)[:, :, ::4, ::4], golden["grad_input_sub"]
    np.testing.assert_allclose(subset, expected, rtol=0, atol=0.03 * np.abs(expected).max())
    keys = [key for key in golden_tensors if "running" not in key]
    by_params = flatten_dict({"params": by_params})
    lengths = [
        np.linalg.norm(by_params[torch_weights.flax_path(key, golden_tensors[key].ndim)])
        for key in keys
    ]
    np.testing.assert_allclose(lengths, golden["grad_param_l2"], rtol=0.01, atol=1e-6)
