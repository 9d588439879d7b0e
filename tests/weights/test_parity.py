"""Networks of torchvision and timm: against what they computed, and against them where they are.

Outputs are in float32, whose rounding is 6e-8; after up to a hundred layers they differ by 4e-7 to
4e-6 of the largest value.
"""

import json
import sys

import golden
import needs
import numpy as np
import pytest
import recipe
import small
from paths import STORED
from state_dicts import filled, flax_variables

from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.backbones import convnext
from contrastseg_jax.models.backbones.convnext import CONVNEXT_SPECS
from contrastseg_jax.models.backbones.resnet import RESNET_SPECS, ResNet
from contrastseg_jax.weights import parity
from contrastseg_jax.weights.torch_names import locate

pytestmark = pytest.mark.slow

DATA = STORED / "peers"


def stored(name):
    """The outputs by name, which of their values they are, and the recipe's state dict."""
    with np.load(DATA / f"{name}.npz") as arrays:
        outputs = dict(arrays)
    meta = json.loads(str(outputs.pop("meta")))
    return outputs, meta["every"], recipe.recipe_tensors(meta["shapes"])


def assert_close(result, expected, every=(1, 1, 1)):
    """Equal but for rounding; `expected` has only some values, in PyTorch's layout."""
    channels, rows, columns = every
    result = golden.to_torch(result)[:, ::channels, ::rows, ::columns]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def of_backbone(variables):
    return {collection: {"backbone": parts["backbone"]} for collection, parts in variables.items()}


def whole_patches():
    """The image without what is more than a multiple of 32."""
    return recipe.image()[:, :64, :64]


def build(network):
    return zoo.build_model(network, num_classes=21, proj_dim=0, dropout_rate=0.0)


# --- Against what is stored (tests/helpers/make_peers.py) -----------------------------------------


def test_hrnet_is_timms():
    """timm's with bilinear fusion; its own, which repeats pixels, moves features by up to 21 %."""
    outputs, every, tensors = stored("timm_hrnet_w18")
    expected = of_backbone(segmenter.variable_shapes(build("hrnet_w18")))
    variables = filled(tensors, expected)
    features = parity.own_output("hrnet_w18", 0, variables, recipe.image())
    assert_close(features, outputs["features"], every)


def test_resnet_is_timms():
    outputs, every, tensors = stored("timm_resnet50")
    model = ResNet(RESNET_SPECS["r50"])
    shapes = segmenter.variable_shapes(model)
    expected = {collection: {"backbone": leaves} for collection, leaves in shapes.items()}
    variables = filled(tensors, expected)

    @small.jax.jit
    def evaluate(variables, image):
        backbone = {collection: parts["backbone"] for collection, parts in variables.items()}
        return model.apply(backbone, image, train=False)["last"]

    features = evaluate(variables, recipe.image())
    assert_close(features, outputs["features"], every)


def test_deeplabv3_is_torchvisions():
    outputs, every, tensors = stored("torchvision_deeplabv3_resnet101")
    model = build("deeplabv3_r101_torchvision")
    variables = filled(tensors, segmenter.variable_shapes(model))

    @small.jax.jit
    def evaluate(variables, image):
        output, state = model.apply(
            variables,
            image,
            train=False,
            mutable="intermediates",
            capture_intermediates=lambda module, _: module.name == "backbone",
        )
        (features,) = state["intermediates"]["backbone"]["__call__"]
        of_aux_head = {collection: parts["aux_head"] for collection, parts in variables.items()}
        return output.logits, model.aux_head.apply(
            of_aux_head, features["layer3"], train=False
        ).logits

    logits, aux_logits = evaluate(variables, recipe.image())
    assert_close(logits, outputs["logits"], every)
    assert_close(aux_logits, outputs["aux_logits"], every)


def test_convnext_is_torchvisions():
    """Its features of an image with sides that are multiples of 32, and their gradient."""
    outputs, every, tensors = stored("torchvision_convnext_tiny")
    model = convnext.backbone(CONVNEXT_SPECS["convnext_tiny"]).build(())
    expected = {"params": {"backbone": segmenter.variable_shapes(model)["params"]}}
    params = filled(tensors, expected)["params"]["backbone"]

    def energy(image):
        features = model.apply({"params": params}, image, train=False)["last"]
        return small.jax.numpy.square(features).mean(), features

    gradient, features = small.jax.jit(small.jax.grad(energy, has_aux=True))(whole_patches())
    assert_close(features, outputs["features"], every)
    assert_close(gradient, outputs["gradient"], every)


# --- Against the libraries themselves -------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name", "network", "num_classes"),
    [
        ("timm", "hrnet_w18_small_v2", "hrnet_w18_small", 0),
        ("torchvision.models", "resnet18", "fcn_r18", 0),
        ("torchvision.models", "convnext_small", "fcn_convnext_small", 0),
        ("torchvision.models.segmentation", "fcn_resnet50", "fcn_r50", 21),
        ("torchvision.models.segmentation", "deeplabv3_resnet50", "deeplabv3_r50_torchvision", 21),
    ],
)
def test_our_network_computes_what_its_peer_does(library, name, network, num_classes):
    make = {
        "timm": lambda timm: timm.create_model(name),
        "torchvision.models": lambda models: getattr(models, name)(),
        "torchvision.models.segmentation": lambda models: getattr(models, name)(
            weights=None, weights_backbone=None, aux_loss=True
        ),
    }
    if "resnet18" in name:  # the peer is timm's, wherever its weights are from
        needs.package("timm")
    model = make[library](needs.package(library))
    shapes = {f"module.{key}": tuple(value.shape) for key, value in model.state_dict().items()}
    tensors = recipe.recipe_tensors(shapes)
    image = whole_patches() if "convnext" in name else recipe.image()
    expected = parity.peer_output((network,), locate(tensors), image)
    variables = flax_variables(tensors)
    result = parity.own_output(network, num_classes, variables, image)
    assert result.dtype == expected.dtype == np.float32
    assert_close(result, golden.to_torch(expected))

    # What has no place in a network makes no difference.
    used = locate(tensors).tensors
    assert len(used) < len(tensors)
    again = parity.peer_output((network,), locate(used), image)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(
    ("network", "tensor"),
    [
        ("hrnet_tiny", "conv1.weight"),
        ("hrnet_w48", "cls_head.0.weight"),  # the original's whole networks
        ("deeplabv3_r101", "backbone.resinit.conv1.weight"),
        ("deeplabv3_r101", "decoder.layer_aspp.b0.0.weight"),
        ("fcn_r18", "classifier.4.weight"),
        ("deeplabv3plus_r50", "classifier.4.weight"),
    ],
)
def test_some_networks_have_no_peer(network, tensor):
    tensors = {tensor: np.zeros((3, 3, 3, 3), np.float32)}
    assert parity.peer_output((network,), locate(tensors), recipe.image()) is None


@pytest.mark.parametrize("tensor", ["conv1.weight", "classifier.4.weight"])
def test_a_library_that_cannot_be_imported_is_no_peer(tensor, monkeypatch):
    def fail(name):
        raise RuntimeError(f"operator {name}::nms does not exist")

    monkeypatch.setattr(parity.importlib, "import_module", fail)
    tensors = {tensor: np.zeros((3, 3, 3, 3), np.float32)}
    assert parity.peer_output(("fcn_r50",), locate(tensors), recipe.image()) is None


@pytest.mark.parametrize("tensor", ["conv1.weight", "classifier.4.weight"])
def test_without_the_libraries_there_is_no_peer(tensor, monkeypatch):
    for library in ("torch", "torchvision", "torchvision.models.segmentation", "timm"):
        monkeypatch.setitem(sys.modules, library, None)
    tensors = {tensor: np.zeros((3, 3, 3, 3), np.float32)}
    assert parity.peer_output(("fcn_r50",), locate(tensors), recipe.image()) is None
