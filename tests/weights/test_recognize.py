"""What a state dict is of; where nothing fits, what keeps the nearest from fitting."""

import re

import golden
import numpy as np
import pytest
import state_dicts
from state_dicts import bare_name, original_name, spelt_out

from contrastseg_jax.errors import InputError
from contrastseg_jax.weights.recognize import Recognized, recognize
from contrastseg_jax.weights.torch_names import locate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("original", "name", "proj_dim"),
    [
        ("hrnet_w48", "hrnet_w48", 0),
        ("hrnet_w48_contrast", "hrnet_w48", 256),
        ("hrnet_w48_ocr_contrast", "hrnet_w48_ocr", 256),
        ("deeplab_v3", "deeplabv3_r101", 0),
        ("deeplab_v3_contrast", "deeplabv3_r101", 256),
    ],
)
def test_the_originals_networks(original, name, proj_dim):
    tensors = {
        f"module.{key}": state_dicts.empty((), shape)
        for key, shape in golden.shapes(original).items()
    }
    assert recognize(locate(tensors), source="x.pth") == Recognized((name,), 19, proj_dim)


def test_number_of_classes_and_length_of_embeddings_are_those_of_the_file():
    tensors = spelt_out("hrnet_tiny", original_name, num_classes=7, proj_dim=12)
    assert recognize(locate(tensors), source="x.pth") == Recognized(("hrnet_tiny",), 7, 12)


@pytest.mark.parametrize(
    ("name", "networks"),
    [
        ("hrnet_w18_small", ("hrnet_w18_small", "hrnet_w18_small_ocr")),
        ("fcn_r50", ("fcn_r50", "deeplabv3_r50_torchvision", "deeplabv3plus_r50")),
        ("fcn_r34", ("fcn_r34", "deeplabv3_r34_torchvision", "deeplabv3plus_r34")),
        ("ocr_r101", ("deeplabv3_r101", "ocr_r101")),
        (
            "fcn_convnext_tiny",
            ("fcn_convnext_tiny", "deeplabv3plus_convnext_tiny", "ocr_convnext_tiny"),
        ),
    ],
)
def test_a_backbone_is_of_all_networks_that_stand_on_it(name, networks):
    tensors = spelt_out(name, bare_name)
    tensors = {key: array for key, array in tensors.items() if not re.match(r"\w+_head|neck", key)}
    tensors["fc.weight"] = state_dicts.empty((), (1000, 2048))
    assert recognize(locate(tensors), source="x.pth") == Recognized(networks, 0, 0)


def test_what_does_not_fit_the_nearest_is_listed():
    tensors = spelt_out("hrnet_tiny", original_name)
    del tensors["cls_head.1.0.bias"]
    tensors["neck.weight"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as error:
        recognize(locate(tensors), source="x.pth")
    assert str(error.value).splitlines() == [
        "2 problems in x.pth, read as hrnet_tiny:",
        "  - neck.weight (3,): unexpected, the network has no such tensor",
        "  + cls_head.bn1.bias (120,): missing",
    ]


def torchvision_name(path):
    part, _, module = path.partition("/")
    heads = {"cls_head": "classifier", "aux_head": "aux_classifier"}
    if part in heads:
        return f"{heads[part]}.{ {'conv1': 0, 'bn1': 1, 'conv2': 4}[module] }"
    return f"backbone.{bare_name(path)}"


def test_an_auxiliary_head_that_only_training_needs_may_be_missing():
    """torchvision builds none unless it is asked to, or loads its own weights."""
    tensors = spelt_out("fcn_r18", torchvision_name, num_classes=7)
    without = {key: array for key, array in tensors.items() if "aux" not in key}
    assert len(without) < len(tensors)
    for state in (tensors, without):
        assert recognize(locate(state), source="x.pth") == Recognized(("fcn_r18",), 7, 0)
    some = without | {key: array for key, array in tensors.items() if "aux_classifier.0" in key}
    with pytest.raises(InputError, match=r"\+ aux_head.conv2.weight \(7, 64, 1, 1\): missing"):
        recognize(locate(some), source="x.pth")


@pytest.mark.slow
def test_an_auxiliary_head_that_guides_must_be_there():
    tensors = {
        key: state_dicts.empty((), shape)
        for key, shape in golden.shapes("hrnet_w48_ocr").items()
        if not key.startswith("aux_head")
    }
    with pytest.raises(InputError, match="aux_head.conv1.weight .*missing"):
        recognize(locate(tensors), source="x.pth")


def test_another_architecture_is_refused():
    tensors = {"patch_embed.proj.weight": np.zeros((8, 3, 4, 4), np.float32)}
    with pytest.raises(
        InputError, match=r"x.pth: its tensors \(patch_embed.proj.weight, …\) match"
    ):
        recognize(locate(tensors), source="x.pth")
