"""Classification and projection head against plain NumPy."""

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest

from contrastseg_jax.models.heads.deeplab import DeepLabV3Head, DeepLabV3PlusHead, DeepLabV3PlusNeck
from contrastseg_jax.models.heads.fcn import FCNHead
from contrastseg_jax.models.heads.projection import ProjectionHead


@pytest.fixture
def features():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 7, 6)), jnp.float32)


def random_variables(model, *features):
    """Variables without the zeros and ones of an initialisation, which would hide mistakes."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *features, train=False))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 1.0, leaf.shape), leaf.dtype), shapes
    )


def batch_norm_relu(x, variables):
    params, stats = variables["params"]["bn1"], variables["batch_stats"]["bn1"]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return np.maximum(x * params["scale"] + params["bias"], 0)


def test_fcn_head_is_the_written_out_one(features):
    head = FCNHead(num_classes=3, dropout_rate=0.1)
    variables = jax.tree.map(np.asarray, random_variables(head, features))
    conv1, conv2 = variables["params"]["conv1"], variables["params"]["conv2"]
    assert "bias" not in conv2

    padded = np.pad(np.asarray(features), ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = conv1["bias"] + sum(
        padded[:, i : i + 5, j : j + 7] @ conv1["kernel"][i, j] for i in range(3) for j in range(3)
    )
    expected = batch_norm_relu(x, variables) @ conv2["kernel"][0, 0]
    result = head.apply(variables, features, train=False).logits
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_dropout_removes_whole_channels_in_training_only(features):
    # One class with all weights 1 on top of constant channels: the logit counts the kept ones.
    head = FCNHead(num_classes=1, dropout_rate=0.5)
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), features, train=False))
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    variables["params"]["bn1"]["bias"] = jnp.ones(6)
    variables["params"]["conv2"]["kernel"] = jnp.ones((1, 1, 6, 1))

    np.testing.assert_array_equal(head.apply(variables, features, train=False).logits, 6)
    draws = [
        head.apply(
            variables, features, train=True, rngs={"dropout": jax.random.key(i)}, mutable=True
        )[0].logits
        for i in range(5)
    ]
    for logits in draws:
        np.testing.assert_array_equal(logits, np.broadcast_to(logits[:, :1, :1], logits.shape))
        assert set(np.unique(logits)) <= {0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0}
    assert len(np.unique(draws)) > 1


def test_projection_head_is_the_written_out_one(features):
    head = ProjectionHead(proj_dim=4)
    variables = jax.tree.map(np.asarray, random_variables(head, features))
    conv1, conv2 = variables["params"]["conv1"], variables["params"]["conv2"]

    x = np.asarray(features) @ conv1["kernel"][0, 0] + conv1["bias"]
    x = batch_norm_relu(x, variables) @ conv2["kernel"][0, 0] + conv2["bias"]
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
    result = head.apply(variables, features, train=False)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


def test_a_vector_of_zeros_has_no_gradient(features):
    head = ProjectionHead(proj_dim=4)
    variables = random_variables(head, features)
    variables["params"]["conv2"] = jax.tree.map(jnp.zeros_like, variables["params"]["conv2"])

    def probe(params):
        return jnp.sum(head.apply({**variables, "params": params}, features, train=False))

    np.testing.assert_array_equal(head.apply(variables, features, train=False), 0)
    for leaf in jax.tree.leaves(jax.grad(probe)(variables["params"])):
        np.testing.assert_array_equal(leaf, 0)


class TorchLayers:
    """The layers of a head by name, in PyTorch: an independent convolution and BatchNorm."""

    def __init__(self, torch, variables):
        self.functional, self.as_tensor = torch.nn.functional, torch.as_tensor
        self.params, self.stats = variables["params"], variables["batch_stats"]

    def conv(self, x, name, dilation=1):
        kernel = np.array(self.params[name]["kernel"]).transpose(3, 2, 0, 1)
        bias = self.params[name].get("bias")
        return self.functional.conv2d(
            x,
            self.as_tensor(kernel),
            None if bias is None else self.as_tensor(np.array(bias)),
            padding=dilation * (kernel.shape[2] // 2),
            dilation=dilation,
        )

    def bn(self, x, name):
        values = (*self.stats[name].values(), *self.params[name].values())
        assert [*self.stats[name], *self.params[name]] == ["mean", "var", "bias", "scale"]
        mean, var, bias, scale = (self.as_tensor(np.array(value)) for value in values)
        return self.functional.batch_norm(x, mean, var, scale, bias)

    def conv_bn_relu(self, x, name, dilation=1):
        return self.bn(self.conv(x, f"{name}_0", dilation), f"{name}_1").relu()


def aspp_in_torch(torch, variables, x, rates):
    layers = TorchLayers(torch, {part: tree["aspp"] for part, tree in variables.items()})
    pooled = layers.conv_bn_relu(x.mean((2, 3), keepdim=True), "b4")
    branches = [layers.conv_bn_relu(x, "b0")]
    branches += [layers.conv_bn_relu(x, f"b{i + 1}", rate) for i, rate in enumerate(rates)]
    branches.append(torch.nn.functional.interpolate(pooled, x.shape[2:], mode="bilinear"))
    return layers.conv_bn_relu(torch.cat(branches, 1), "project")


@pytest.mark.torch
@pytest.mark.parametrize(
    "settings", [{}, {"project_size": 1, "refine_relu": True}], ids=["original", "torchvision"]
)
def test_deeplab_head_is_the_written_out_one(features, settings):
    torch = needs.package("torch")
    head = DeepLabV3Head(3, 0.5, width=4, rates=(1, 2, 3), **settings)
    variables = random_variables(head, features)
    x = torch.as_tensor(np.array(features).transpose(0, 3, 1, 2))
    x = aspp_in_torch(torch, variables, x, (1, 2, 3))
    layers = TorchLayers(torch, variables)
    x = layers.bn(layers.conv(x, "refine_0"), "refine_1")
    expected = layers.conv(x.relu() if settings else x, "refine_2").numpy().transpose(0, 2, 3, 1)
    result = head.apply(variables, features, train=False).logits
    np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.torch
def test_deeplab_plus_is_the_written_out_one(features):
    torch = needs.package("torch")
    low = jnp.asarray(np.random.default_rng(3).normal(size=(2, 17, 25, 5)), jnp.float32)
    neck, head = DeepLabV3PlusNeck(rates=(1, 2, 3)), DeepLabV3PlusHead(3, 0.5)
    maps = {"last": features, "layer1": low}
    of_neck = random_variables(neck, maps)
    joined = neck.apply(of_neck, maps, train=False)
    assert joined.shape == (2, 17, 25, 304)

    x, y = (torch.as_tensor(np.array(v).transpose(0, 3, 1, 2)) for v in (features, low))
    x = aspp_in_torch(torch, of_neck, x, (1, 2, 3))
    x = torch.nn.functional.interpolate(x, (17, 25), mode="bilinear", align_corners=True)
    x = torch.cat([x, TorchLayers(torch, of_neck).conv_bn_relu(y, "low_level")], 1)
    expected = x.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(joined, expected, rtol=1e-3, atol=1e-3)

    of_head = random_variables(head, joined)
    layers = TorchLayers(torch, of_head)
    for i in (1, 2):
        x = layers.bn(layers.conv(x, f"conv{i}"), f"bn{i}").relu()
    expected = layers.conv(x, "conv3").numpy().transpose(0, 2, 3, 1)
    result = head.apply(of_head, joined, train=False).logits
    np.testing.assert_allclose(result, expected, rtol=1e-3)
