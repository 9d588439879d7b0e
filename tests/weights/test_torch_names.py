"""PyTorch state dicts: a place for every tensor, a tensor for every leaf."""

import re

import golden
import jax
import numpy as np
import pytest
import state_dicts
from state_dicts import bare_name, filled, flax_variables, spelt_out

from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.weights import torch_names
from contrastseg_jax.weights.torch_names import locate

# The original's name, the name here, whether it has a projection head.
NETWORKS = [
    ("hrnet_w48", "hrnet_w48", False),
    ("hrnet_w48_contrast", "hrnet_w48", True),
    ("hrnet_w48_ocr", "hrnet_w48_ocr", False),
    ("hrnet_w48_ocr_contrast", "hrnet_w48_ocr", True),
    ("deeplab_v3", "deeplabv3_r101", False),
    ("deeplab_v3_contrast", "deeplabv3_r101", True),
]


def expected_of(name, has_head=False):
    proj_dim = 256 if has_head else 0
    model = zoo.build_model(name, num_classes=19, proj_dim=proj_dim, dropout_rate=0.0)
    return segmenter.variable_shapes(model)


def empty(shape):
    return state_dicts.empty((), shape)


def stored_tensors(name):
    return {key: empty(shape) for key, shape in golden.shapes(name).items()}


@pytest.mark.parametrize(("original", "name", "has_head"), NETWORKS, ids=lambda v: str(v))
def test_every_tensor_has_its_place_and_every_leaf_is_filled(original, name, has_head):
    tensors = stored_tensors(original)
    expected = expected_of(name, has_head)
    variables = filled(tensors, expected)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    counters = sum(key.endswith("num_batches_tracked") for key in tensors)
    assert len(jax.tree.leaves(variables)) == len(tensors) - counters


def test_the_model_with_memory_is_the_contrast_one_without_its_queues():
    tensors = stored_tensors("hrnet_w48_contrast")
    wrapped = {f"module.encoder_q.{key}": array for key, array in tensors.items()}
    for key, (_, shape) in golden_queues().items():
        wrapped[f"module.{key}"] = empty(tuple(shape))
    assert len(wrapped) == len(tensors) + 4
    filled(wrapped, expected_of("hrnet_w48", has_head=True))


def golden_queues():
    return {
        f"{queue}_queue{suffix}": ("float32", (19, 10, 256)[: 1 if suffix else 3])
        for queue in ("segment", "pixel")
        for suffix in ("", "_ptr")
    }


def test_ocr_on_resnet_has_the_originals_names():
    """No list of its keys is stored; these are written from the facts of its modules."""
    heads = {
        "cls_head/classifier": "head",
        "cls_head/conv3x3_0": "conv_3x3.0",
        "cls_head/conv3x3_1": "conv_3x3.1.0",
        "cls_head/conv_bn_dropout_0": "spatial_ocr_head.conv_bn_dropout.0",
        "cls_head/conv_bn_dropout_1": "spatial_ocr_head.conv_bn_dropout.1.0",
        "aux_head/conv1": "dsn_head.0",
        "aux_head/bn1": "dsn_head.1.0",
        "aux_head/conv2": "dsn_head.3",
    }
    block = "spatial_ocr_head.object_context_block"
    for layer, elements in (("f_pixel", 4), ("f_object", 4), ("f_down", 2), ("f_up", 2)):
        for i in range(elements):
            heads[f"cls_head/{layer}_{i}"] = f"{block}.{layer}.{i}{'.0' if i % 2 else ''}"

    def rename(path):
        if not path.startswith("backbone/"):
            return heads[path]
        return path.replace("/", ".").replace("_", ".")

    tensors = spelt_out("ocr_r101", rename)
    assert "backbone.layer4.0.downsample.1.running_var" in tensors
    filled(tensors, expected_of("ocr_r101"))


@pytest.mark.parametrize("name", ["fcn_r50", "deeplabv3_r50_torchvision"])
def test_torchvisions_networks_have_their_places(name):
    deeplab = {"refine_0": "1", "refine_1": "2", "refine_2": "4"}
    deeplab |= {"aspp/b4_0": "0.convs.4.1", "aspp/b4_1": "0.convs.4.2"}
    deeplab |= {f"aspp/b{i}_{j}": f"0.convs.{i}.{j}" for i in range(4) for j in (0, 1)}
    deeplab |= {f"aspp/project_{i}": f"0.project.{i}" for i in (0, 1)}
    fcn = {"conv1": "0", "bn1": "1", "conv2": "4"}

    def rename(path):
        part, _, module = path.partition("/")
        if part == "aux_head":
            return f"aux_classifier.{fcn[module]}"
        if part == "cls_head":
            return f"classifier.{(deeplab if 'aspp' in path or 'refine' in path else fcn)[module]}"
        return path.replace("/", ".").replace("_", ".")

    filled(spelt_out(name, rename), expected_of(name))


BACKBONES = [
    ("fcn_r18", lambda path: path),  # torchvision's and timm's ResNet
    ("fcn_r50", lambda path: path),
    ("deeplabv3_r101", lambda path: path.removeprefix("resinit.")),  # its ImageNet file
    ("deeplabv3_r101", lambda path: path),
    ("hrnet_w18", lambda path: path),
    ("fcn_convnext_small", lambda path: path),
    ("fcn_convnext_tiny", lambda path: f"backbone.{path}"),
]


@pytest.mark.parametrize(("name", "renamed"), BACKBONES)
def test_a_bare_backbone_fills_the_backbone(name, renamed):
    def rename(path):
        return renamed(bare_name(path))

    tensors = spelt_out(name, rename)
    tensors = {key: array for key, array in tensors.items() if not re.search("_head|neck", key)}
    of_classifier = {"fc.weight": empty((1000, 2048)), "fc.bias": empty((1000,))}
    of_classifier["bn1.num_batches_tracked"] = empty(())
    if name.startswith("hrnet"):
        of_classifier["incre_modules.0.0.conv1.weight"] = empty((32, 18, 1, 1))
    if "convnext" in name:
        of_classifier["classifier.0.weight"] = of_classifier["classifier.0.bias"] = empty((768,))
        of_classifier["backbone.classifier.2.weight"] = empty((1000, 768))
    expected = {
        collection: {"backbone": parts["backbone"]}
        for collection, parts in expected_of(name).items()
        if "backbone" in parts
    }
    filled(tensors | of_classifier, expected)


def test_kernels_are_transposed_and_the_rest_is_as_it_was():
    rng = np.random.default_rng(0)
    kernel, scale = rng.normal(size=(4, 3, 2, 1)), rng.normal(size=5)
    tensors = {"backbone.conv1.weight": kernel, "backbone.bn1.weight": scale}
    tensors["backbone.bn1.running_var"] = scale + 1
    variables = flax_variables(tensors)
    backbone = variables["params"]["backbone"]
    assert backbone["conv1"]["kernel"].shape == (2, 1, 3, 4)
    assert backbone["conv1"]["kernel"][1, 0, 2, 3] == np.float32(kernel[3, 2, 1, 0])
    np.testing.assert_array_equal(backbone["bn1"]["scale"], scale.astype(np.float32))
    var = variables["batch_stats"]["backbone"]["bn1"]["var"]
    np.testing.assert_array_equal(var, (scale + 1).astype(np.float32))


def test_layouts_of_linear_layers_depthwise_kernels_and_scales():
    rng = np.random.default_rng(0)
    linear, scale, kernel = (rng.normal(size=s) for s in ((6, 2), (6, 1, 1), (6, 1, 3, 4)))
    block = "features.1.0"
    tensors = {f"{block}.block.3.weight": linear, f"{block}.layer_scale": scale}
    tensors[f"{block}.block.0.weight"] = kernel
    block = flax_variables(tensors)["params"]["backbone"]["features_1_0"]
    np.testing.assert_array_equal(block["block_3"]["kernel"], linear.T.astype(np.float32))
    np.testing.assert_array_equal(block["layer_scale"], scale.reshape(1, 1, 6).astype(np.float32))
    assert block["block_0"]["kernel"].shape == (3, 4, 1, 6)
    assert block["block_0"]["kernel"][1, 2, 0, 5] == np.float32(kernel[5, 0, 1, 2])

    expected = {"params": {"backbone": {"features_1_0": block}}}
    assert torch_names.mismatches(locate(tensors), expected) == []
    del tensors["features.1.0.block.3.weight"], tensors["features.1.0.layer_scale"]
    assert sorted(torch_names.mismatches(locate(tensors), expected)) == [
        "+ backbone.features.1.0.block.3.weight (6, 2): missing",
        "+ backbone.features.1.0.layer_scale (6, 1, 1): missing",
    ]


def test_all_that_does_not_fit_is_listed_at_once():
    expected = {"params": {"cls_head": {"conv1": {"kernel": empty((3, 3, 2, 4))}}}}
    expected["params"]["cls_head"]["conv2"] = {"kernel": empty((1, 1, 4, 5))}
    tensors = {"cls_head.0.weight": empty((4, 2, 1, 1)), "module.neck.weight": empty((7, 3, 1, 1))}
    assert torch_names.mismatches(locate(tensors), expected) == [
        "! cls_head.0.weight: is (4, 2, 1, 1), must be (4, 2, 3, 3)",
        "- module.neck.weight (7, 3, 1, 1): unexpected, the network has no such tensor",
        "+ cls_head.conv2.weight (5, 4, 1, 1): missing",
    ]


def test_what_is_missing_of_a_backbone_has_its_name_in_pytorch():
    tensors = spelt_out("hrnet_tiny", state_dicts.original_name)
    of_backbone = sorted(key for key in tensors if key.startswith("backbone."))
    heads = {key: array for key, array in tensors.items() if key not in of_backbone}
    problems = torch_names.mismatches(locate(heads), expected_of("hrnet_tiny"))
    assert sorted(problems) == [f"+ {key} {tensors[key].shape}: missing" for key in of_backbone]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "module._orig_mod.", "model.net."])
def test_wrappers_of_a_model_are_taken_off(prefix):
    tensors = {
        f"{prefix}{key}": array
        for key, array in spelt_out("hrnet_tiny", state_dicts.original_name).items()
    }
    filled(tensors, expected_of("hrnet_tiny"))


def test_one_leaf_is_not_filled_twice():
    expected = {"params": {"cls_head": {"conv1": {"bias": empty((4,))}}}}
    tensors = {"cls_head.0.bias": empty((4,)), "module.cls_head.0.bias": empty((4,))}
    assert torch_names.mismatches(locate(tensors), expected) == [
        "- module.cls_head.0.bias: duplicate of cls_head.0.bias"
    ]
