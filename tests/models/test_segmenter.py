"""Whole networks: parity with the original, and what is computed when."""

from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from recipe import recipe_array
from state_dicts import flax_variables

from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.heads.projection import ProjectionHead
from contrastseg_jax.weights.recognize import LAST_LAYERS
from contrastseg_jax.weights.torch_names import locate

pytestmark = pytest.mark.slow

TINY = zoo.build_model("hrnet_tiny", num_classes=4, proj_dim=16, dropout_rate=0.5)


@pytest.fixture(scope="module")
def tiny_variables():
    return segmenter.init_variables(TINY, 0)


def num_params(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


def output_shapes(name, *image_shape, train=True):
    """Of logits, auxiliary logits and embeddings."""
    model = zoo.build_model(name, num_classes=19, proj_dim=256, dropout_rate=0.1)

    def init_and_apply(rng, image):
        variables = model.init(rng, image, train=False)
        rngs = {"dropout": rng}
        if not train:
            return model.apply(variables, image, train=False)
        return model.apply(variables, image, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    image = jax.ShapeDtypeStruct((*image_shape, 3), jnp.float32)
    output = jax.eval_shape(init_and_apply, jax.random.key(0), image)
    return [
        x if x is None else x.shape for x in (output.logits, output.aux_logits, output.embedding)
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("hrnet_tiny", "hrnet_w18_small", "hrnet_w48", "hrnet_tiny_ocr"),
        *("fcn_r34", "deeplabv3_r50", "deeplabv3_r152_torchvision", "ocr_r18"),
        *("deeplabv3plus_r18", "deeplabv3plus_r101"),
        *("fcn_convnext_tiny", "deeplabv3plus_convnext_small", "ocr_convnext_tiny"),
    ],
)
def test_a_network_gives_logits_and_embeddings_of_one_size(name):
    logits, aux_logits, embedding = output_shapes(name, 2, 65, 97)
    # 65x97 is 17x25 at stride 4 and 9x13 at stride 8, whatever the max-pool's rounding.
    is_fine = any(part in name for part in ("hrnet", "plus", "convnext"))
    size = (17, 25) if is_fine else (9, 13)
    assert logits == (2, *size, 19)
    assert embedding == (2, *size, 256)
    has_aux = "ocr" in name or name.startswith(("fcn_r", "deeplabv3_"))
    assert aux_logits == (logits if has_aux else None)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("deeplabv3_r101", (512, 1024), (65, 129)),  # facts of the original
        ("deeplabv3_r101", (64, 96), (9, 13)),
        ("deeplabv3_r101_torchvision", (512, 1024), (64, 128)),
        ("hrnet_tiny_ocr", (512, 1024), (128, 256)),
        ("hrnet_tiny_ocr", (360, 480), (90, 120)),
        ("hrnet_w18_small", (375, 500), (94, 125)),
        ("deeplabv3_r50", (375, 500), (48, 63)),
        ("deeplabv3plus_r50", (375, 500), (94, 125)),
        ("deeplabv3plus_r50", (360, 480), (90, 120)),
        ("ocr_r50", (360, 480), (46, 61)),
        ("fcn_r18", (1, 1), (1, 1)),
        ("deeplabv3_r50", (1, 1), (1, 1)),
        ("ocr_r50", (1, 1), (1, 1)),
        ("deeplabv3plus_r18", (1, 1), (1, 1)),
        ("hrnet_tiny_ocr", (1, 1), (1, 1)),
    ],
)
def test_any_image_size_fits(name, size, expected):
    assert output_shapes(name, 1, *size, train=False)[0] == (1, *expected, 19)


@pytest.mark.parametrize("name", ["deeplabv3_r18", "deeplabv3plus_r18", "hrnet_tiny_ocr"])
def test_a_single_pixel_trains_to_finite_values(name):
    model = zoo.build_model(name, num_classes=3, proj_dim=4, dropout_rate=0.1)
    variables = segmenter.init_variables(model, 0)

    @jax.jit
    def train(image):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, image, train=True, rngs=rngs, mutable=["batch_stats"])

    for leaf in jax.tree.leaves(train(jnp.asarray(random_image(1, 1, 1)))):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    ("name", "proj_dim", "expected"),
    [
        ("hrnet_w48", 0, 70_006_560),  # these are the original's
        ("hrnet_w48", 256, 70_711_696),
        ("hrnet_w48_ocr", 0, 74_522_182),
        ("hrnet_w48_ocr", 256, 75_227_318),
        ("deeplabv3_r101", 0, 89_570_278),
        ("deeplabv3_r101", 256, 94_295_270),
        ("ocr_r101", 0, 57_988_838),
        ("hrnet_w32", 0, 31_389_696),
        ("hrnet_w40", 0, 48_774_416),
        # torchvision's have 21 classes: 42,004,074 and 35,322,218
        ("deeplabv3_r50_torchvision", 0, 42_004_074 - 2 * (257 + 257)),
        ("fcn_r50", 0, 35_322_218 - 2 * (513 + 257)),
    ],
)
def test_number_of_parameters(name, proj_dim, expected):
    model = zoo.build_model(name, num_classes=19, proj_dim=proj_dim, dropout_rate=0.0)
    assert num_params(segmenter.variable_shapes(model)["params"]) == expected


@pytest.mark.parametrize("name", ["hrnet_tinny", "HRNET_W48", "pspnet"])
def test_unknown_name_is_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match="model.name = .*nearest: .*hrnet_") as error:
        zoo.build_model(name, num_classes=4, proj_dim=16, dropout_rate=0.1)
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

    again = segmenter.init_variables(TINY, 0)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other = segmenter.init_variables(TINY, 1)["params"]
    assert np.any(other["cls_head"]["conv1"]["kernel"] != kernel)


def test_networks_that_differ_in_a_head_start_alike(tiny_variables):
    plain = zoo.build_model("hrnet_tiny", num_classes=4, proj_dim=0, dropout_rate=0.5)
    params = segmenter.init_variables(plain, 0)["params"]
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

    plain = zoo.build_model("hrnet_tiny", num_classes=4, proj_dim=0, dropout_rate=0.5)
    assert operations(TINY) == operations(plain)


@pytest.mark.parametrize("name", ["hrnet_tiny_ocr", "deeplabv3plus_r18"])
def test_bfloat16_is_of_the_layers_alone(name):
    """Parameters, statistics, results and gradients are float32, and near those of float32."""
    settings = {"num_classes": 3, "proj_dim": 4, "dropout_rate": 0.0}
    full = zoo.build_model(name, **settings)
    half = zoo.build_model(name, **settings, dtype="bfloat16")
    assert shapes(segmenter.variable_shapes(half)) == shapes(segmenter.variable_shapes(full))
    variables = segmenter.init_variables(half, 0)
    params, batch_stats = variables["params"], variables["batch_stats"]
    image = jnp.asarray(random_image(2, 64, 64))

    def probe(params, model):
        variables = {"params": params, "batch_stats": batch_stats}
        output, updates = model.apply(variables, image, train=True, mutable=["batch_stats"])
        return jnp.square(output.logits).mean(), (output, updates["batch_stats"])

    gradient = jax.grad(probe, has_aux=True)
    by_params, (output, updates) = jax.eval_shape(partial(gradient, model=half), params)
    assert shapes(by_params) == shapes(params) and shapes(updates) == shapes(batch_stats)
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype("float32")}

    program = str(jax.make_jaxpr(partial(probe, model=half))(params))
    convolutions = [line for line in program.splitlines() if "= conv_general_dilated" in line]
    assert convolutions and all(":bf16[" in line for line in convolutions)

    @partial(jax.jit, static_argnames="model")
    def evaluate(params, *, model):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, image, train=False).logits

    expected, result = evaluate(params, model=full), evaluate(params, model=half)
    difference = np.linalg.norm(result - expected)
    assert 0 < difference / np.linalg.norm(expected) < 0.03


def test_recomputed_stages_change_no_gradient(tiny_variables):
    image = jnp.asarray(random_image(2, 32, 32))
    plain = zoo.build_model("hrnet_tiny", num_classes=4, proj_dim=16, dropout_rate=0.0)
    again = plain.clone(backbone=plain.backbone.clone(remat=("layer1", "stage2", "stage4")))

    def gradient(model):
        def probe(params):
            variables = {**tiny_variables, "params": params}
            output, _ = model.apply(variables, image, train=True, mutable=["batch_stats"])
            return jnp.square(output.logits).mean()

        return jax.grad(probe)

    params = tiny_variables["params"]
    assert shapes(segmenter.variable_shapes(again)["params"]) == shapes(params)
    assert str(jax.make_jaxpr(gradient(again))(params)).count("remat") >= 3
    close = partial(np.testing.assert_allclose, rtol=0.02, atol=1e-5)
    jax.tree.map(close, jax.jit(gradient(again))(params), jax.jit(gradient(plain))(params))


def test_auxiliary_heads_are_computed_where_something_reads_them():
    def aux_logits(name):
        return output_shapes(name, 1, 33, 33, train=False)[1]

    assert aux_logits("deeplabv3_r18") is aux_logits("fcn_r18") is None
    assert aux_logits("ocr_r18") == (1, 5, 5, 19)


# --- Parity with the original, whose outputs are stored in ../shared ------------------------------


@pytest.fixture(
    scope="module",
    # Name there and here; how far train-mode logits and embeddings may be off; the fewest positions
    # that a BatchNorm sees; how far gradients may be off, relatively. DeepLab's BatchNorm of the
    # image's mean sees 2, which magnifies rounding: PyTorch's own float32 logits are off by 3e-3.
    # In float64, with weights not rounded to float32, logits agree to 5e-10, gradients to 5e-8.
    params=[
        ("hrnet_w48_contrast", "hrnet_w48", 2e-4, 2e-5, 12, 0.01),
        ("deeplab_v3_contrast", "deeplabv3_r101", 1e-2, 1e-3, 2, 0.04),
    ],
    ids=lambda case: case[0],
)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def stored(case):
    return golden.outputs(case[0])


@pytest.fixture(scope="module")
def tensors(case):
    return golden.tensors(case[0])


@pytest.fixture(scope="module")
def model(case):
    # The stored outputs were computed without dropout.
    return zoo.build_model(case[1], num_classes=19, proj_dim=256, dropout_rate=0.0)


def test_evaluation_is_that_of_the_original(model, tensors, stored):
    @jax.jit
    def evaluate(variables, image):
        output, state = model.apply(
            variables,
            image,
            train=False,
            mutable="intermediates",
            capture_intermediates=lambda module, _: module.name == "backbone",
        )
        features = state["intermediates"]["backbone"]["__call__"][0]["last"]
        proj_head = {collection: parts["proj_head"] for collection, parts in variables.items()}
        return output.logits, ProjectionHead(256).apply(proj_head, features, train=False)

    logits, embedding = evaluate(flax_variables(tensors), golden.image())
    np.testing.assert_allclose(golden.to_torch(logits), stored["eval_seg"], rtol=0, atol=1e-4)
    subset = golden.to_torch(embedding)[:, :, ::5, ::5]
    np.testing.assert_allclose(subset, stored["eval_embed_sub"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def trained(model, tensors):
    """Of one program: a probe and its gradients, the outputs, and the updated statistics."""

    def probe(params, image, batch_stats):
        output, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            image,
            train=True,
            mutable=["batch_stats"],
        )
        outputs = {"seg": output.logits, "embed": output.embedding}
        if output.aux_logits is not None:
            outputs["seg_aux"] = output.aux_logits
        loss = 0.0
        for key, value in outputs.items():
            _, h, w, c = value.shape
            weight = recipe_array(f"R.{key}.probe", (1, c, h, w)).transpose(0, 2, 3, 1)
            loss += jnp.vdot(jnp.broadcast_to(weight, value.shape), value) / len(image)
        return loss, (output, updates)

    variables = flax_variables(tensors)
    gradient = jax.jit(jax.value_and_grad(probe, argnums=(0, 1), has_aux=True))
    return gradient(variables["params"], golden.image(), variables["batch_stats"])


def test_training_is_that_of_the_original(trained, tensors, stored, case):
    _, _, of_logits, of_embedding, fewest, _ = case
    (_, (output, updates)), _ = trained
    logits = golden.to_torch(output.logits)
    np.testing.assert_allclose(logits, stored["train_seg"], rtol=0, atol=of_logits)
    if "train_seg_aux" in stored:
        logits = golden.to_torch(output.aux_logits)
        np.testing.assert_allclose(logits, stored["train_seg_aux"], rtol=0, atol=of_logits)
    subset = golden.to_torch(output.embedding)[:, :, ::5, ::5]
    np.testing.assert_allclose(subset, stored["train_embed_sub"], rtol=0, atol=of_embedding)

    paths = locate(tensors).paths
    keys = [key for key in paths if "running" in key]
    updates = flatten_dict(updates)
    lengths = np.array([np.linalg.norm(updates[paths[key]]) for key in keys])
    ratio = stored["running_after_l2"] / lengths
    of_mean = np.array([key.endswith("mean") for key in keys])
    # What follows DeepLab's BatchNorm of 2 positions: to round the weights once more moves these
    # means, in float64, 20 times as far as any other.
    magnified = np.array(["aspp.project" in key or "refine" in key for key in keys])
    np.testing.assert_allclose(ratio[of_mean & ~magnified], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[of_mean & magnified], 1, rtol=1e-4)
    # The original's variance is unbiased.
    assert np.all(ratio[~of_mean] >= 1 - 1e-6)
    assert np.all(ratio[~of_mean] <= fewest / (fewest - 1))


def test_gradients_are_those_of_the_original(trained, tensors, stored, case):
    (loss, _), (by_params, by_image) = trained
    of_gradient = case[5]
    np.testing.assert_allclose(loss, stored["probe_loss"], rtol=of_gradient / 10)
    # In float64, with weights not rounded to float32, HRNet's agree to 4e-8; float32 loses digits
    # in BatchNorms over few positions.
    subset, expected = golden.to_torch(by_image)[:, :, ::4, ::4], stored["grad_input_sub"]
    np.testing.assert_allclose(
        subset, expected, rtol=0, atol=3 * of_gradient * np.abs(expected).max()
    )
    paths = locate(tensors).paths
    by_params = flatten_dict({"params": by_params})
    lengths = [
        np.linalg.norm(by_params[path]) for key, path in paths.items() if "running" not in key
    ]
    np.testing.assert_allclose(lengths, stored["grad_param_l2"], rtol=of_gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "proj_dim"),
    [
        *(("hrnet_tiny", 0), ("hrnet_tiny", 4), ("hrnet_tiny_ocr", 4), ("deeplabv3plus_r18", 4)),
        *(("deeplabv3_r18", 0), ("deeplabv3_r18_torchvision", 0)),
    ],
)
def test_features_are_those_of_which_the_logits_are_made(name, proj_dim):
    model = zoo.build_model(name, num_classes=3, proj_dim=proj_dim, dropout_rate=0.1)
    variables = segmenter.init_variables(model, 0)
    assert variables.keys() == {"params", "batch_stats"}
    image = jnp.asarray(random_image(2, 33, 49))
    logits = jax.jit(lambda x: model.apply(variables, x, train=False).logits)(image)
    embedding, features = jax.jit(partial(segmenter.describe_pixels, model, variables))(image)
    last = last_layer(variables)
    expected = np.asarray(features) @ last["kernel"][0, 0] + last.get("bias", np.float32(0))
    np.testing.assert_allclose(expected, logits, rtol=1e-3, atol=1e-3)
    if proj_dim:
        assert embedding.shape == (*features.shape[:3], 4)
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1, rtol=1e-5)
    else:
        assert embedding is None


@pytest.mark.parametrize(
    "name", ["fcn_r34", "ocr_r18", "fcn_convnext_tiny", "deeplabv3plus_convnext_tiny"]
)
def test_features_are_as_many_as_the_last_layer_reads(name):
    model = zoo.build_model(name, num_classes=3, proj_dim=4, dropout_rate=0.1)
    shapes = segmenter.variable_shapes(model)
    image = jax.ShapeDtypeStruct((1, 33, 49, 3), jnp.float32)
    describe = partial(segmenter.describe_pixels, model)
    embedding, features = jax.eval_shape(describe, shapes, image)
    assert features.shape[-1] == last_layer(shapes)["kernel"].shape[2]
    assert features.shape[1:3] == embedding.shape[1:3] == segmenter.map_size(model, (33, 49))


def last_layer(variables):
    head = variables["params"]["cls_head"]
    return next(head[layer] for layer in LAST_LAYERS if layer in head)
