"""A backbone that the package does not know: what it says of itself is all that is needed."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipe import recipe_tensors
from safetensors.numpy import save_file

from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.backbones.contract import Backbone, TorchNames
from contrastseg_jax.models.heads.fcn import FCNHead
from contrastseg_jax.models.layers import conv_bn
from contrastseg_jax.models.zoo import NetworkSpec
from contrastseg_jax.structs import ImageFormat
from contrastseg_jax.weights import pretrained
from contrastseg_jax.weights.convert import convert

pytestmark = pytest.mark.slow


class Plain(nn.Module):
    remat: tuple[str, ...]
    freeze: tuple[str, ...]

    @nn.compact
    def __call__(self, image, *, train):
        train = train and "entry" not in self.freeze
        return {"last": nn.relu(conv_bn(image, 4, 3, stride=2, train=train, name="entry"))}


PLAIN = Backbone(
    build=Plain,
    stages=("entry",),
    parts={"entry": ("entry",)},
    weights="plain",
    torch_names=TorchNames("Plain", re.compile(r"entry\..*"), unused=re.compile(r"top\..*")),
    recognizes=lambda shapes: ("entry_0", "kernel") in shapes,
    image_format=ImageFormat(channel_order="BGR"),
)
SHAPES = {f"entry.1.{name}": (4,) for name in ("weight", "bias", "running_mean", "running_var")}
SHAPES |= {"entry.0.weight": (4, 3, 3, 3), "top.weight": (10, 4)}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(zoo.NETWORKS, "fcn_plain", NetworkSpec(PLAIN, FCNHead))


@pytest.fixture
def model():
    return zoo.build_model(
        "fcn_plain", num_classes=3, proj_dim=0, dropout_rate=0.0, remat=("entry",)
    )


def test_it_trains(model):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    label = jnp.asarray(rng.integers(3, size=(2, 4, 4)))
    variables = segmenter.init_variables(model, 0)

    @jax.value_and_grad
    def loss_fn(params):
        own = variables | {"params": params}
        output, _ = model.apply(own, image, train=True, mutable=["batch_stats"])
        chosen = jnp.take_along_axis(nn.log_softmax(output.logits), label[..., None], axis=-1)
        return -chosen.mean()

    before, gradient = loss_fn(variables["params"])
    assert np.any(gradient["backbone"]["entry_0"]["kernel"])
    stepped = jax.tree.map(lambda x, g: x - 0.1 * g, variables["params"], gradient)
    assert loss_fn(stepped)[0] < before
    assert zoo.stage_names("fcn_plain") == ("entry",)
    assert zoo.part_names("fcn_plain") == ("backbone", "entry")


@pytest.mark.parametrize(
    ("prefix", "channel_order"), [("", "BGR"), ("module.backbone.", "RGB")], ids=["bare", "part"]
)
def test_its_files_are_recognised_and_converted(tmp_path, model, prefix, channel_order):
    tensors = recipe_tensors(SHAPES)
    if prefix:
        del tensors["top.weight"]
    save_file({f"{prefix}{key}": array for key, array in tensors.items()}, tmp_path / "x")
    convert(tmp_path / "x", tmp_path / "out")
    weights = pretrained.read(tmp_path / "out", "fcn_plain")
    assert (weights.networks, weights.num_classes) == (("fcn_plain",), 0)
    assert weights.image_format == ImageFormat(channel_order=channel_order)

    fresh = segmenter.init_variables(model, 0)
    names = ("a", "b", "c")
    started = pretrained.start_from(tmp_path / "out", "fcn_plain", names, fresh, strict=False)
    backbone = started["params"]["backbone"]
    kernel = tensors["entry.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(backbone["entry_0"]["kernel"], kernel)
    np.testing.assert_array_equal(backbone["entry_1"]["scale"], tensors["entry.1.weight"])
    jax.tree.map(
        np.testing.assert_array_equal, started["params"]["cls_head"], fresh["params"]["cls_head"]
    )
