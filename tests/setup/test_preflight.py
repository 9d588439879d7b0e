"""Settings that do not fit each other, the network, the data set or the machine."""

import re

import pytest
from small import make_config

from contrastseg_jax.errors import InputError
from contrastseg_jax.setup.preflight import check, contrast_problems


def test_class_weights_must_fit_the_classes():
    config = make_config("loss.class_weights=(1.0, 2.0)", "contrast.temperature=-1")
    with pytest.raises(InputError, match="loss.class_weights has 2 numbers.*3 classes") as error:
        check(config, mode="predict")
    assert "contrast.temperature = -1.0" in str(error.value)  # all in one error


def test_stages_and_types_that_there_are_pass():
    check(
        make_config(
            *("model.name=hrnet_tiny", "model.dtype=bfloat16", "model.remat=('layer1', 'stage4')"),
            "model.freeze=('backbone',)",
        ),
        mode="train",
    )


def test_stages_that_the_network_does_not_have_are_listed():
    config = make_config(
        *("model.name=hrnet_tiny", "model.remat=('stage4', 'layer4', 5)", "model.dtype=float16"),
        "model.freeze=('stem', 'layer4')",
    )
    with pytest.raises(InputError) as error:
        check(config, mode="train")
    text = str(error.value)
    assert "model.remat names 'layer4': must be stages of hrnet_tiny: layer1, stage2" in text
    assert "model.freeze names 'layer4': must be parts of hrnet_tiny: backbone, stem" in text
    assert "model.remat names 5" in text and "'stage4':" not in text
    assert "model.dtype = 'float16': must be one of float32, bfloat16" in text


def test_splits_that_the_data_set_never_has_are_listed():
    check(make_config("data.train_splits=('val', 'train')"), mode="train")
    config = make_config("data.train_splits=('train', 'train_extra', 'test')")
    with pytest.raises(InputError, match="2 problems") as error:
        check(config, mode="audit")
    for split in ("train_extra", "test"):
        line = f"data.train_splits names '{split}': must be splits of synthetic: train, val"
        assert line in str(error.value)
    cityscapes = ["data.name=cityscapes", "data.root=/data"]
    check(make_config(*cityscapes, "data.train_splits=('train', 'train_extra')"), mode="audit")


def test_the_batch_size_is_checked_where_it_is_used():
    config = make_config("train.batch_size=3")
    check(config, mode="eval")
    with pytest.raises(InputError, match="train.batch_size = 3.*2 devices"):
        check(config, mode="train")


def problems(*overrides, num_devices=2, device_bytes=1 << 30):
    config = make_config(*overrides)
    return contrast_problems(
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
        (["memory.pixel_size=2000000"], r"3 classes x 2000004 slots x 16 float32 takes 0.4 GiB"),
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


def test_the_number_of_anchors_in_a_message_is_that_of_the_map():
    """A crop of 64x64 has 16x16 cells, a sixteenth of which are 16."""
    overrides = ["contrast.anchors_per_image=0", "augment.crop_size=(64, 64)"]
    (problem,) = problems(*overrides, "contrast.negatives=random", "contrast.candidates=batch")
    assert "at most 64, of 3 classes, 0 slots a class and 64 anchors in the batch" in problem


@pytest.mark.parametrize(
    ("overrides", "layer", "remedy"),
    [
        (["model.name=deeplabv3_r18"], "cls_head/aspp/b4_1", "train.batch_size to 8"),
        (["model.name=deeplabv3plus_r18"], "neck/aspp/b4_1", "train.batch_size to 8"),
        (
            ["model.name=deeplabv3plus_convnext_tiny"],
            "neck/aspp/b0_1 and 5 more layers",
            "train.batch_size to 8, or augment.crop_size",
        ),
        (
            ["model.name=hrnet_tiny"],
            r"backbone/\S+ and \d more layers",
            "train.batch_size to 8, or augment.crop_size",
        ),
    ],
    ids=["pooled", "pooled in the neck", "neck on a small crop", "small crop"],
)
def test_one_value_has_no_variance(overrides, layer, remedy):
    """DeepLabV3's mean over the image on crops of any size, HRNet's stride of 32 on small ones."""
    config = make_config("train.batch_size=1", *overrides)
    with pytest.raises(InputError) as error:
        check(config, mode="train", num_devices=1)
    first, *others = str(error.value).splitlines()[1:]
    assert not others
    assert re.search(rf"train.batch_size = 1, augment.crop_size = \(32, 32\): .*{layer}", first)
    assert first.endswith(f"raise {remedy}")
    check(config, mode="eval")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=deeplabv3_r18", "train.batch_size=4"], r"4 values \(cls_head/aspp/b4_1\)"),
        (["model.name=ocr_r18", "train.batch_size=1"], r"3 values .*: raise train.batch_size to 3"),
        (["model.name=deeplabv3_r18", "train.batch_size=8", "contrast.candidates=batch"], None),
        (["model.name=hrnet_tiny", "train.batch_size=2", "augment.crop_size=(64, 64)"], None),
        (["model.name=fcn_convnext_tiny", "train.batch_size=1"], None),
        (["model.name=hrnet_tiny", "train.batch_size=1", "model.freeze=('backbone',)"], None),
        (
            [
                *("model.name=deeplabv3_r18", "train.batch_size=8", "train.accumulation_steps=2"),
                "contrast.candidates=batch",
            ],
            r"4 values .*: raise train.batch_size to 16, or lower train.accumulation_steps, now 2",
        ),
    ],
    ids=[
        *("pooled", "one vector per class", "eight images", "eight places"),
        *("none in the backbone", "frozen", "micro-batches"),
    ],
)
def test_few_values_are_a_warning(overrides, said, caplog):
    check(make_config(*overrides), mode="plan", num_devices=1)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (said is not None)
    assert said is None or re.search(said, warnings[0])


def test_check_lists_the_problems_of_the_bank_in_training_alone():
    config = make_config("memory.pixel_size=5", "contrast.negatives=random")
    check(config, mode="eval")
    with pytest.raises(InputError, match=r"(?s)pixel_size = 5.*num_negatives = 2048"):
        check(config, mode="train")
