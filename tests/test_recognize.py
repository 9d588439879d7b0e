"""What a state dict is of; where nothing fits, what keeps the nearest from fitting."""

import golden
import numpy as np
import pytest
import state_dicts
from state_dicts import bare_name, original_name, spelt_out

from contrastseg_jax.errors import InputError
from contrastseg_jax.models.recognize import Recognized, recognize


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
        f"module.{key}": state_dicts.empty((), tuple(shape))
        for key, (_, shape) in golden.keys(original).items()
    }
    assert recognize(tensors, source="x.pth") == Recognized((name,), 19, proj_dim)


def test_number_of_classes_and_length_of_embeddings_are_those_of_the_file():
    tensors = spelt_out("hrnet_tiny", original_name, num_classes=7, proj_dim=12)
    assert recognize(tensors, source="x.pth") == Recognized(("hrnet_tiny",), 7, 12)


@pytest.mark.parametrize(
    ("name", "networks"),
    [
        ("hrnet_w18_small", ("hrnet_w18_small", "hrnet_w18_small_ocr")),
        ("fcn_r50", ("fcn_r50", "deeplabv3_r50_torchvision", "deeplabv3plus_r50")),
        ("fcn_r34", ("fcn_r34", "deeplabv3_r34_torchvision", "deeplabv3plus_r34")),
        ("ocr_r101", ("deeplabv3_r101", "ocr_r101")),
    ],
)
def test_a_backbone_is_of_all_networks_that_stand_on_it(name, networks):
    tensors = spelt_out(name, bare_name)
    tensors = {key: array for key, array in tensors.items() if "_head" not in key}
    tensors["fc.weight"] = state_dicts.empty((), (1000, 2048))
    assert recognize(tensors, source="x.pth") == Recognized(networks, 0, 0)


def test_what_does_not_fit_the_nearest_is_listed():
    tensors = spelt_out("hrnet_tiny", original_name)
    del tensors["cls_head.1.0.bias"]
    tensors["neck.weight"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as error:
        recognize(tensors, source="x.pth")
    assert str(error.value).splitlines() == [
        "2 problems in x.pth, read as hrnet_tiny:",
        "  - neck.weight (3,): the network has no place for it",
        "  + params/cls_head/bn1/bias (120,): no tensor fills it",
    ]


def test_another_architecture_is_refused():
    tensors = {"patch_embed.proj.weight": np.zeros((8, 3, 4, 4), np.float32)}
    with pytest.raises(InputError, match=r"x.pth: its tensors \(patch_embed.proj.weight, …\) are"):
        recognize(tensors, source="x.pth")
