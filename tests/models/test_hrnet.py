"""HRNet: sizes, resolutions, names and padding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from contrastseg_jax.models.backbones.hrnet import HRNET_SPECS, HRNet, HRNetSpec
from contrastseg_jax.models.layers import conv
from contrastseg_jax.models.segmenter import init_variables

SMALL = HRNetSpec((4, 6, 8, 10), num_modules=(1, 1, 2), num_blocks=1, stem_width=3)


def init_shapes(spec):
    def init(rng):
        return HRNet(spec).init(rng, jnp.zeros((1, 32, 32, 3)), train=False)

    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hrnet_w18_small", 3_860_720),
        ("hrnet_w18", 9_562_260),
        ("hrnet_w48", 65_325_120),  # the original's, without its heads
    ],
)
def test_number_of_parameters(name, expected):
    params = init_shapes(HRNET_SPECS[name])["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (1, 1), (30, 50)])
def test_any_image_size_gives_all_branches_at_stride_4(size):
    def init_and_apply(rng, image):
        features, _ = HRNet(SMALL).init_with_output(rng, image, train=False)
        return features["last"]

    features = jax.eval_shape(init_and_apply, jax.random.key(0), jnp.zeros((2, *size, 3)))
    assert features.shape == (2, -(-size[0] // 4), -(-size[1] // 4), sum(SMALL.widths))


def test_names_are_those_of_the_original():
    params = flatten_dict(init_shapes(SMALL)["params"], sep="/")
    kernels = {name: leaf.shape for name, leaf in params.items() if name.endswith("kernel")}
    expected = {
        "conv1/kernel": (3, 3, 3, 3),
        "layer1_0/downsample_0/kernel": (1, 1, 3, 12),
        "transition1_0_0/kernel": (3, 3, 12, 4),
        "transition1_1_0_0/kernel": (3, 3, 12, 6),
        "transition3_3_0_0/kernel": (3, 3, 8, 10),  # from the last branch only
        "stage4_1/branches_3_0/conv2/kernel": (3, 3, 10, 10),
        "stage4_1/fuse_layers_0_3_0/kernel": (1, 1, 10, 4),
        "stage4_1/fuse_layers_3_0_1_0/kernel": (3, 3, 4, 4),
        "stage4_1/fuse_layers_3_0_2_0/kernel": (3, 3, 4, 10),
    }
    assert expected.items() <= kernels.items()
    assert {name for name in kernels if name.startswith("transition")} == {
        "transition1_0_0/kernel",
        "transition1_1_0_0/kernel",
        "transition2_2_0_0/kernel",
        "transition3_3_0_0/kernel",
    }


@pytest.mark.parametrize("size", [4, 5])
def test_stride_2_reads_the_even_pixels(size):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return conv(x, 1, 3, stride=2, name="conv1")

    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    x = jnp.arange(float(size**2)).reshape(1, size, size, 1)
    result = Layer().apply({"params": {"conv1": {"kernel": kernel}}}, x)
    np.testing.assert_array_equal(result, x[:, ::2, ::2])


@pytest.mark.slow
def test_odd_sizes_run_and_differentiate():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 49, 3)), jnp.float32)
    model = HRNet(SMALL)
    variables = init_variables(model, 0)
    params, batch_stats = variables["params"], variables["batch_stats"]

    @jax.jit
    @jax.grad
    def gradient(params):
        features, _ = model.apply(
            {"params": params, "batch_stats": batch_stats},
            image,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.square(features["last"]).sum()

    for leaf in jax.tree.leaves(gradient(params)):
        assert np.all(np.isfinite(leaf))
