"""What a config makes."""

import re

import jax
import numpy as np
import pytest
from small import ROOT, make_config

from contrastseg_jax import build
from contrastseg_jax import config as config_lib
from contrastseg_jax.errors import InputError
from contrastseg_jax.models import segmenter


def test_state_holds_what_the_variant_needs():
    for variant, has_head, has_bank in (
        ("ce", False, False),
        ("contrast", True, False),
        ("memory", True, True),
    ):
        config = make_config(variant=variant)
        model, (tx, _) = build.build_model(config, 3), build.build_optimizer(config)
        state = build.abstract_state(config, model, tx)
        assert ("proj_head" in state.params) == has_head
        assert (state.memory is not None) == has_bank
        assert state.ema is None


@pytest.mark.parametrize("name", ["hrnet_tiny_ocr", "deeplabv3plus_r18"])
def test_all_but_the_backbone_takes_longer_steps(name):
    config = make_config(f"model.name={name}", "optim.head_lr_multiplier=10")
    tx, _ = build.build_optimizer(config)
    params = segmenter.variable_shapes(build.build_model(config, 3))["params"]
    ones = jax.tree.map(lambda x: np.ones((), np.float32), params)
    updates, _ = tx.update(ones, tx.init(ones), ones)
    steps = {part: {float(x) for x in jax.tree.leaves(updates[part])} for part in updates}
    assert {"backbone", "cls_head", "proj_head"} < steps.keys()
    (short,) = steps.pop("backbone")
    for longer in steps.values():
        assert [*longer] == pytest.approx([10 * short])


def test_bank_has_the_sizes_of_the_config():
    config = make_config("memory.dtype=bfloat16", "memory.segment_size=0")
    model, (tx, _) = build.build_model(config, 3), build.build_optimizer(config)
    bank = build.abstract_state(config, model, tx).memory
    assert bank.pixel.shape == (3, 16, 16) and bank.pixel.dtype == "bfloat16"
    assert bank.segment.shape == (3, 0, 16)


def test_the_network_computes_as_the_config_says():
    config = make_config("model.dtype=bfloat16", "model.remat=('layer1', 'stage4')")
    build.check(config, mode="train")
    model = build.build_model(config, 3)
    assert model.dtype == "bfloat16" and model.backbone.remat == ("layer1", "stage4")


def test_stages_that_the_network_does_not_have_are_listed():
    config = make_config("model.remat=('stage4', 'layer4', 5)", "model.dtype=float16")
    with pytest.raises(InputError) as error:
        build.check(config, mode="train")
    text = str(error.value)
    assert "model.remat names 'layer4': must be stages of hrnet_tiny: layer1, stage2" in text
    assert "model.remat names 5" in text and "'stage4':" not in text
    assert "model.dtype = 'float16': must be one of float32, bfloat16" in text


@pytest.mark.parametrize(
    ("model", "rate"),
    [
        ("hrnet_w48", 0.1),
        ("fcn_r50", 0.1),
        ("hrnet_w48_ocr", 0.05),
        ("ocr_r101", 0.05),
        ("deeplabv3_r101", 0.0),
        ("deeplabv3_r101_torchvision", 0.5),
        ("deeplabv3plus_r50", 0.1),
    ],
)
def test_dropout_is_that_of_the_original(model, rate):
    config = config_lib.load(f"{ROOT / 'configs' / 'default.py'}:{model}")
    assert build.build_model(config, 3).cls_head.dropout_rate == rate
    config = config_lib.override(config, ["model.dropout_rate=0.3"])
    assert build.build_model(config, 3).cls_head.dropout_rate == 0.3


@pytest.mark.parametrize(
    ("model", "rate"),
    [
        ("fcn_r50", 0.1),
        ("hrnet_w48_ocr", 0.0),
        ("ocr_r101", 0.05),
        ("deeplabv3_r101", 0.0),
        ("deeplabv3_r101_torchvision", 0.1),
    ],
)
def test_dropout_of_auxiliary_heads_is_that_of_the_original(model, rate):
    config = config_lib.load(f"{ROOT / 'configs' / 'default.py'}:{model}")
    assert build.build_model(config, 3).aux_head.dropout_rate == pytest.approx(rate)


def test_the_batch_size_is_checked_where_it_is_used():
    config = make_config("train.batch_size=3")
    build.check(config, mode="eval")
    with pytest.raises(InputError, match="train.batch_size = 3.*2 devices"):
        build.check(config, mode="train")


def problems(*overrides, num_devices=2, device_bytes=1 << 30):
    config = make_config(*overrides)
    return build.contrast_problems(
        config, num_classes=3, num_devices=num_devices, device_bytes=device_bytes
    )


def test_a_bank_that_fits_is_no_problem():
    assert problems() == []
    assert problems("memory.segment_size=0", "memory.sharding=slots") == []
    assert problems("contrast.negatives=semi_hard", "contrast.num_negatives=8") == []
    assert problems("contrast.candidates=none", "memory.pixel_size=1") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["memory.pixel_size=11"], r"pixel_size = 11: .* 12 rows .*\(3 for each of 4 images\)"),
        (["memory.segment_size=3"], r"segment_size = 3: one step may enqueue 4 rows"),
        (["memory.sharding=slots", "memory.pixel_size=17"], r"pixel_size = 17: .*2 devices.*18"),
        (["memory.pixel_size=2000000"], r"3 classes x 2000004 slots x 16 float32 take 0.4 GiB"),
        (["contrast.positives=random"], r"num_positives = 1024: .* at most 115"),
        (["contrast.negatives=hardest"], r"num_negatives = 2048: .* at most 136"),
        (
            ["contrast.positives=semi_hard", "contrast.max_views=10", "contrast.candidates=batch"],
            r"num_positives = 1024: .* at most 39, .* 0 slots .* 96 anchors",
        ),
        (
            ["contrast.negatives=random", "contrast.candidates=batch"],
            r"num_negatives = 2048: .* at most 96",
        ),
    ],
)
def test_what_the_bank_cannot_hold_is_refused_with_figures(overrides, message):
    (problem,) = problems(*overrides, device_bytes=1 << 29)
    assert re.search(message, problem)


def test_more_candidates_than_can_be_drawn_from_are_refused():
    overrides = ["memory.pixel_size=6000000", "contrast.negatives=random", "model.proj_dim=1"]
    (problem,) = problems(*overrides)
    assert "at most 16777216 candidates; there are 18000108" in problem


def test_check_lists_the_problems_of_the_bank_in_training_alone():
    config = make_config("memory.pixel_size=5", "contrast.negatives=random")
    build.check(config, mode="eval")
    with pytest.raises(InputError, match=r"(?s)pixel_size = 5.*num_negatives = 2048"):
        build.check(config, mode="train")


def test_padding_is_the_mean_colour():
    assert build.pad_color(make_config()) == (124, 116, 104)
