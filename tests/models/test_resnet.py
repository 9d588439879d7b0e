"""ResNet: strides, dilations, the max-pool's rounding, names; against PyTorch where it is here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import needs
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from contrastseg_jax.models.backbones.resnet import RESNET_SPECS, ResNet, block_plan, max_pool
from contrastseg_jax.models.segmenter import init_variables, variable_shapes

R50, R101 = RESNET_SPECS["r50"], RESNET_SPECS["r101"]
ORIGINAL = dataclasses.replace(R101, output_stride=8, stem="deep", ceil_mode=True)


def plan(spec=R50, **changes):
    return block_plan(dataclasses.replace(spec, **changes))


def equations(spec, size=64):
    """All operations of a network on an image, in their order."""
    model = ResNet(spec)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(
        variable_shapes(model), image
    )
    return jaxpr.eqns


def convolutions(spec, size=64):
    """Kernel size, stride, dilation and padding of every convolution, as they are executed."""
    found = []
    for equation in equations(spec, size):
        if equation.primitive.name == "conv_general_dilated":
            spec = equation.params["dimension_numbers"].rhs_spec
            kernel = equation.invars[1].aval.shape
            found.append(
                (
                    kernel[spec[2]],
                    equation.params["window_strides"][0],
                    equation.params["rhs_dilation"][0],
                    equation.params["padding"][0],
                )
            )
    return found


def test_the_originals_backbone_convolves_as_it_should():
    """The stem, then the 3x3 convolutions of the layers: facts of the original as it was run."""
    of_3x3 = [c for c in convolutions(ORIGINAL) if c[0] == 3]
    stem = [(3, 2, 1, (1, 1)), (3, 1, 1, (1, 1)), (3, 1, 1, (1, 1))]
    layer1 = 3 * [(3, 1, 1, (1, 1))]
    layer2 = [(3, 2, 1, (1, 1))] + 3 * [(3, 1, 1, (1, 1))]
    layer3 = [(3, 1, 1, (1, 1))] + 22 * [(3, 1, 2, (2, 2))]
    layer4 = [(3, 1, 2, (2, 2))] + 2 * [(3, 1, 4, (4, 4))]
    assert of_3x3 == stem + layer1 + layer2 + layer3 + layer4
    # The stride of a projected shortcut goes as well: of 1x1 kernels, one reads every second pixel.
    slices = [e.params["strides"] for e in equations(ORIGINAL) if e.primitive.name == "slice"]
    assert [strides for strides in slices if strides not in (None, (1, 1, 1, 1))] == [(1, 2, 2, 1)]


def test_strides_and_dilations_by_output_stride():
    once = (1, (1, 1))
    layer1, layer2 = 3 * [once], [(2, (1, 1)), once, once, once]
    assert plan() == [layer1, layer2, [(2, (1, 1))] + 5 * [once], [(2, (1, 1)), once, once]]
    layer4 = [(1, (1, 2)), (1, (2, 2)), (1, (2, 2))]
    assert plan(output_stride=16)[2:] == [[(2, (1, 1))] + 5 * [once], layer4]
    layer3 = [(1, (1, 2))] + 5 * [(1, (2, 2))]
    layer4 = [(1, (2, 4)), (1, (4, 4)), (1, (4, 4))]
    assert plan(output_stride=8)[2:] == [layer3, layer4]


def test_multi_grid_multiplies_the_dilations_of_layer4():
    assert plan(output_stride=8, multi_grid=(1, 1, 1)) == plan(output_stride=8)
    expected = [(1, (2, 4)), (1, (8, 8)), (1, (16, 16))]
    assert plan(output_stride=8, multi_grid=(1, 2, 4))[3] == expected
    assert plan(output_stride=8, multi_grid=(1, 2, 4))[2] == plan(output_stride=8)[2]
    expected = [(1, (2, 4)), (1, (4, 4)), (1, (8, 8))]
    assert plan(output_stride=16, multi_grid=(2, 2, 4))[3] == expected
    assert plan(multi_grid=(1, 2, 4)) == plan()


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # torchvision's without the classifier: 1000 * (512 or 2048) + 1000 parameters
        ("r18", 11_689_512 - 513_000),
        ("r34", 21_797_672 - 513_000),
        ("r50", 25_557_032 - 2_049_000),
        ("r101", 44_549_160 - 2_049_000),
        ("r152", 60_192_808 - 2_049_000),
    ],
)
def test_number_of_parameters(name, expected):
    params = variable_shapes(ResNet(RESNET_SPECS[name]))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_number_of_parameters_of_the_originals_backbone():
    params = variable_shapes(ResNet(ORIGINAL))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 42_623_936


def test_names_are_those_of_the_original():
    params = flatten_dict(variable_shapes(ResNet(ORIGINAL))["params"], sep="/")
    kernels = {name: leaf.shape for name, leaf in params.items() if name.endswith("kernel")}
    expected = {
        "resinit/conv1/kernel": (3, 3, 3, 64),
        "resinit/conv3/kernel": (3, 3, 64, 128),
        "layer1_0/conv1/kernel": (1, 1, 128, 64),
        "layer1_0/downsample_0/kernel": (1, 1, 128, 256),
        "layer3_22/conv2/kernel": (3, 3, 256, 256),
        "layer4_0/downsample_0/kernel": (1, 1, 1024, 2048),
    }
    assert expected.items() <= kernels.items()
    assert sum("downsample" in name for name in kernels) == 4


@pytest.mark.parametrize(
    ("spec", "size", "expected"),
    [
        (ORIGINAL, (512, 1024), (65, 129)),
        (ORIGINAL, (1024, 2048), (129, 257)),
        (ORIGINAL, (64, 128), (9, 17)),
        (ORIGINAL, (65, 129), (9, 17)),
        (dataclasses.replace(R50, output_stride=8), (512, 1024), (64, 128)),
        (dataclasses.replace(R50, output_stride=16), (512, 1024), (32, 64)),
        (R50, (360, 480), (12, 15)),
        (RESNET_SPECS["r18"], (375, 500), (12, 16)),
        (R50, (1, 1), (1, 1)),
    ],
)
def test_size_of_the_features(spec, size, expected):
    model = ResNet(spec)
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = variable_shapes(model)
    features = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image)
    channels = 512 if spec.block == "basic" else 2048
    assert features["last"].shape == (1, *expected, channels)
    assert features["layer1"].shape[3] == channels // 8
    assert features["layer3"].shape[3] == channels // 2


@pytest.mark.torch
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool_is_that_of_pytorch(ceil_mode):
    torch = needs.package("torch")
    pool = torch.nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
    rng = np.random.default_rng(0)
    for size in ((1, 1), (2, 3), (4, 5), (7, 8), (16, 1)):
        x = rng.normal(size=(1, *size, 2)).astype(np.float32) - 5  # below the padding's 0, if it is
        expected = pool(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(max_pool(jnp.asarray(x), ceil_mode=ceil_mode), expected)


def test_max_pool_on_its_own():
    x = jnp.arange(-16.0, 0.0).reshape(1, 4, 4, 1)
    floor = max_pool(x, ceil_mode=False)[0, :, :, 0]
    np.testing.assert_array_equal(floor, [[-11, -9], [-3, -1]])
    ceil = max_pool(x, ceil_mode=True)[0, :, :, 0]
    np.testing.assert_array_equal(ceil, [[-11, -9, -9], [-3, -1, -1], [-3, -1, -1]])


def test_recomputing_changes_neither_names_nor_gradients():
    spec = dataclasses.replace(RESNET_SPECS["r18"], num_blocks=(1, 1, 1, 1), output_stride=8)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 24, 3)), jnp.float32)
    variables = init_variables(ResNet(spec), 0)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def gradient(model):
        def probe(params):
            variables = {"params": params, "batch_stats": batch_stats}
            features, _ = model.apply(variables, image, train=True, mutable=["batch_stats"])
            return jnp.square(features["last"]).mean()

        return jax.grad(probe)

    again = ResNet(spec, remat=("layer1", "layer4"))
    plain_program = str(jax.make_jaxpr(gradient(ResNet(spec)))(params))
    program = str(jax.make_jaxpr(gradient(again))(params))
    assert "remat" in program and "remat" not in plain_program
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, jax.jit(gradient(again))(params), jax.jit(gradient(ResNet(spec)))(params))
