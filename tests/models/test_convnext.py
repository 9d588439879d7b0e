"""ConvNeXt: against a literal one in PyTorch, where it is here; sizes, names, what is left out."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from recipe import recipe_tensors
from state_dicts import filled

from contrastseg_jax.models import zoo
from contrastseg_jax.models.backbones import convnext
from contrastseg_jax.models.backbones.convnext import (
    CONVNEXT_SPECS,
    ConvNeXt,
    ConvNeXtBlock,
    ConvNeXtSpec,
)
from contrastseg_jax.models.heads.fusion import FusionNeck
from contrastseg_jax.models.segmenter import init_variables, variable_shapes

pytestmark = pytest.mark.slow

LAYERS = ("layer1", "layer2", "layer3", "last")
SMALL = ConvNeXtSpec((1, 2, 1, 1), widths=(4, 6, 8, 10))


@pytest.fixture
def image():
    """Sides that are multiples of 32: of others the ends are filled up here, left out there."""
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 96, 3)), jnp.float32)


def convnext_in_torch(torch, spec):
    """torchvision's, written out: `features` of modules with its names."""
    nn = torch.nn

    class Permute(nn.Module):
        def __init__(self, *axes):
            super().__init__()
            self.axes = axes

        def forward(self, x):
            return x.permute(self.axes)

    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.block = nn.Sequential(
                nn.Conv2d(width, width, 7, padding=3, groups=width),
                Permute(0, 2, 3, 1),
                nn.LayerNorm(width, eps=1e-6),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
                Permute(0, 3, 1, 2),
            )
            self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

        def forward(self, x):
            return x + self.layer_scale * self.block(x)

    first = spec.widths[0]
    layers = [nn.Sequential(nn.Conv2d(3, first, 4, stride=4), LayerNorm2d(first, eps=1e-6))]
    for i, (width, num_blocks) in enumerate(zip(spec.widths, spec.num_blocks, strict=True)):
        if i > 0:
            norm = LayerNorm2d(spec.widths[i - 1], eps=1e-6)
            conv = nn.Conv2d(spec.widths[i - 1], width, 2, stride=2)
            layers.append(nn.Sequential(norm, conv))
        layers.append(nn.Sequential(*(Block(width) for _ in range(num_blocks))))
    return nn.ModuleDict({"features": nn.Sequential(*layers)})


def maps_in_torch(model, x):
    maps = []
    for i, layer in enumerate(model["features"]):
        x = layer(x)
        maps += [x] if i % 2 else []
    return maps


@pytest.mark.torch
def test_features_and_gradients_are_those_of_pytorch(image):
    torch = needs.package("torch")
    theirs = convnext_in_torch(torch, SMALL)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    tensors = recipe_tensors(shapes)
    theirs.load_state_dict({name: torch.as_tensor(array) for name, array in tensors.items()})
    x = torch.as_tensor(np.array(image).transpose(0, 3, 1, 2)).requires_grad_()
    maps = maps_in_torch(theirs, x)
    probes = [np.cos(np.arange(y[0].numel())).reshape(y.shape[1:]) for y in maps]
    probes = [probe.astype(np.float32) for probe in probes]
    pairs = zip(maps, probes, strict=True)
    sum((y * torch.as_tensor(probe)).sum() for y, probe in pairs).backward()

    model = ConvNeXt(SMALL)
    expected = {"params": {"backbone": variable_shapes(model)["params"]}}
    params = filled(tensors, expected)["params"]["backbone"]

    def probed(params, image):
        features = model.apply({"params": params}, image, train=False)
        total = 0.0
        for name, probe in zip(LAYERS, probes, strict=True):
            probe = np.broadcast_to(probe.transpose(1, 2, 0), features[name].shape)
            total += jnp.vdot(features[name], probe)
        return total, features

    gradient = jax.jit(jax.grad(probed, argnums=(0, 1), has_aux=True))
    (by_params, by_image), features = gradient(params, image)
    for name, y in zip(LAYERS, maps, strict=True):
        y = y.detach().numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(features[name], y, rtol=0, atol=1e-5 * np.abs(y).max())
    close = np.testing.assert_allclose
    close(by_image, x.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-3, atol=1e-4)
    gradients = {name: value.grad.numpy() for name, value in theirs.named_parameters()}
    by_torch = flatten_dict(filled(gradients, expected)["params"]["backbone"], sep="/")
    for name, result in flatten_dict(by_params, sep="/").items():
        close(
            result, by_torch[name], rtol=0, atol=1e-4 * np.abs(by_torch[name]).max(), err_msg=name
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # torchvision's without the classifier: a LayerNorm of 768 and 1000 * 768 + 1000
        ("convnext_tiny", 28_589_128 - 770_536),
        ("convnext_small", 50_223_688 - 770_536),
    ],
)
def test_number_of_parameters(name, expected):
    variables = variable_shapes(ConvNeXt(CONVNEXT_SPECS[name]))
    assert list(variables) == ["params"]  # no BatchNorm, so no statistics
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (1, 1), (30, 50)])
def test_any_image_size_gives_features_of_all_strides(size):
    model = ConvNeXt(SMALL)
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = variable_shapes(model)
    features = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image)
    for name, stride, width in zip(LAYERS, (4, 8, 16, 32), SMALL.widths, strict=True):
        assert features[name].shape == (1, *(-(-side // stride) for side in size), width)


def test_blocks_are_left_out_image_by_image_in_training_alone():
    block, rate = ConvNeXtBlock(0.4), 0.4
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 2, 2, 4)), jnp.float32)
    params = init_variables_of(block, x)
    params["layer_scale"] = np.ones_like(params["layer_scale"])
    whole = block.apply({"params": params}, x, False) - x

    rngs = {"dropout": jax.random.key(0)}
    drawn = block.apply({"params": params}, x, True, rngs=rngs) - x
    left_out = np.all(np.asarray(drawn) == 0, axis=(1, 2, 3))
    assert abs(left_out.mean() - rate) < 0.1
    there = np.asarray(whole)[~left_out] / (1 - rate)
    np.testing.assert_allclose(np.asarray(drawn)[~left_out], there, rtol=1e-4, atol=1e-5)


def init_variables_of(block, x):
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, False))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_the_rate_rises_from_block_to_block():
    """torchvision's: the rate times the block's index over that of the last."""
    rates = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, ConvNeXtBlock) and context.method_name == "__call__":
            rates.append(context.module.drop_rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        variable_shapes(ConvNeXt(CONVNEXT_SPECS["convnext_small"]))
    np.testing.assert_allclose(rates, 0.4 * np.arange(36) / 35)


def test_it_starts_with_blocks_that_add_next_to_nothing():
    params = init_variables(ConvNeXt(SMALL), 0)["params"]
    assert set(np.unique(params["features_3_1"]["layer_scale"])) == {np.float32(1e-6)}
    np.testing.assert_array_equal(params["features_0_1"]["scale"], 1)
    np.testing.assert_array_equal(params["features_3_1"]["block_0"]["bias"], 0)
    kernel = init_variables(ConvNeXt(ConvNeXtSpec((1, 1, 1, 1))), 0)["params"]["features_7_0"]
    of_fan_in = {"block_0": 49, "block_3": 768}  # a channel of its own, or all
    for name, fan_in in of_fan_in.items():
        std = kernel[name]["kernel"].std()
        np.testing.assert_allclose(std, np.sqrt(2 / fan_in), rtol=0.02)


def test_recomputing_changes_neither_names_nor_gradients(image):
    variables = init_variables(ConvNeXt(SMALL), 0)

    def gradient(model):
        def probe(variables):
            return jnp.square(model.apply(variables, image, train=False)["last"]).mean()

        return jax.grad(probe)

    plain, again = ConvNeXt(SMALL), ConvNeXt(SMALL, remat=("features_1", "features_7"))
    programs = [str(jax.make_jaxpr(gradient(model))(variables)) for model in (plain, again)]
    assert "remat" in programs[1] and "remat" not in programs[0]
    results = [jax.jit(gradient(model))(variables) for model in (plain, again)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), *results)


def test_bfloat16_is_of_the_layers_alone(image):
    model = ConvNeXt(SMALL)
    variables = init_variables(model, 0)
    evaluate = jax.jit(lambda image: model.apply(variables, image, train=False)["last"])
    full, half = evaluate(image), evaluate(image.astype("bfloat16"))
    assert half.dtype == "bfloat16"
    difference = np.linalg.norm(half.astype("float32") - full)
    assert 0 < difference < 0.03 * np.linalg.norm(full)


@pytest.mark.parametrize("name", ["fcn", "deeplabv3plus", "ocr"])
def test_a_single_pixel_trains_to_finite_values(name, monkeypatch):
    spec = dataclasses.replace(SMALL, drop_rate=0.5)
    network = f"{name}_convnext_tiny"
    small = dataclasses.replace(zoo.NETWORKS[network], backbone=convnext.backbone(spec))
    monkeypatch.setitem(zoo.NETWORKS, network, small)
    model = zoo.build_model(network, num_classes=3, proj_dim=4, dropout_rate=0.1)
    variables = init_variables(model, 0)
    assert "backbone" not in variables["batch_stats"]

    @jax.jit
    def train(image):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, image, train=True, rngs=rngs, mutable=["batch_stats"])

    for leaf in jax.tree.leaves(train(jnp.ones((1, 1, 1, 3)))):
        assert np.all(np.isfinite(leaf))


@pytest.mark.torch
def test_fused_features_are_the_written_out_ones():
    torch = needs.package("torch")
    rng = np.random.default_rng(0)
    sizes = {"layer1": (8, 6, 4), "layer2": (4, 3, 6), "layer3": (2, 2, 8), "last": (1, 1, 10)}
    maps = {name: rng.normal(size=(2, *size)).astype(np.float32) for name, size in sizes.items()}
    neck = FusionNeck(width=5)
    inputs = jax.tree.map(jnp.asarray, maps)
    shapes = jax.eval_shape(lambda: neck.init(jax.random.key(0), inputs, train=False))
    variables = jax.tree.map(lambda x: rng.uniform(0.2, 1, x.shape).astype(np.float32), shapes)
    params, stats = variables["params"], variables["batch_stats"]["fuse_1"]

    joined = []
    for name, x in maps.items():
        norm, project = params[f"{name}_norm"], params[f"{name}_project"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = (x * norm["scale"] + norm["bias"]) @ project["kernel"][0, 0] + project["bias"]
        x = torch.as_tensor(x.transpose(0, 3, 1, 2))
        joined.append(
            torch.nn.functional.interpolate(x, (8, 6), mode="bilinear", align_corners=True)
        )
    x = torch.cat(joined, 1).numpy().transpose(0, 2, 3, 1) @ params["fuse_0"]["kernel"][0, 0]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    expected = np.maximum(x * params["fuse_1"]["scale"] + params["fuse_1"]["bias"], 0)
    result = neck.apply(variables, inputs, train=False)
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)
