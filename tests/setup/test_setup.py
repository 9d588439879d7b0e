"""What a config makes."""

import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from paths import ROOT
from small import make_config, setup_of

from contrastseg_jax.config.load import load_config, override
from contrastseg_jax.data.spec import Decoding
from contrastseg_jax.models import segmenter
from contrastseg_jax.run.compilation_cache import set_compilation_cache
from contrastseg_jax.setup.resolve import (
    build_model,
    image_format,
    num_anchors,
    num_cells,
    pad_color,
)
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import abstract_state


def test_state_holds_what_the_variant_needs():
    for variant, has_head, has_bank in (
        ("ce", False, False),
        ("contrast", True, False),
        ("memory", True, True),
    ):
        config = make_config(variant=variant)
        state = abstract_state(setup_of(config), build_optimizer(config)[0])
        assert ("proj_head" in state.params) == has_head
        assert (state.memory is not None) == has_bank
        assert state.ema is None


@pytest.mark.parametrize(
    ("name", "crop_size", "cells", "expected"),
    [
        ("hrnet_tiny", (32, 32), 8 * 8, 16),
        ("hrnet_tiny", (128, 128), 32 * 32, 64),
        ("hrnet_tiny", (512, 1024), 128 * 256, 512),
        ("deeplabv3_r18", (256, 512), 33 * 65, 134),
    ],
)
def test_anchors_are_a_sixteenth_of_the_cells(name, crop_size, cells, expected):
    settings = f"model.name={name}", f"augment.crop_size={crop_size}"
    for given, number in ((0, expected), (7, 7)):
        config = make_config(*settings, f"contrast.anchors_per_image={given}")
        model = build_model(config, 3)
        assert num_anchors(config, model) == number
        assert num_cells(config, model) == cells


def test_recipes_of_published_data_sets_keep_their_number_of_anchors():
    numbers = {}
    for path in (ROOT / "configs").glob("*.py"):
        numbers[path.stem] = load_config(str(path)).contrast.anchors_per_image
    published = {"ade20k", "camvid", "cityscapes", "coco_stuff", "pascal_context"}
    assert numbers == {name: 512 if name in published else 0 for name in numbers}


@pytest.mark.parametrize("name", ["hrnet_tiny_ocr", "deeplabv3plus_r18"])
def test_all_but_the_backbone_takes_longer_steps(name):
    config = make_config(f"model.name={name}", "optim.head_lr_multiplier=10")
    tx, _ = build_optimizer(config)
    params = segmenter.variable_shapes(build_model(config, 3))["params"]
    ones = jax.tree.map(lambda x: np.ones((), np.float32), params)
    updates, _ = tx.update(ones, tx.init(ones), ones)
    steps = {part: {float(x) for x in jax.tree.leaves(updates[part])} for part in updates}
    assert {"backbone", "cls_head", "proj_head"} < steps.keys()
    (short,) = steps.pop("backbone")
    for longer in steps.values():
        assert [*longer] == pytest.approx([10 * short])


def test_bank_has_the_sizes_of_the_config():
    config = make_config("memory.dtype=bfloat16", "memory.segment_size=0")
    bank = abstract_state(setup_of(config), build_optimizer(config)[0]).memory
    assert bank.pixel.shape == (3, 16, 16) and bank.pixel.dtype == "bfloat16"
    assert bank.segment.shape == (3, 0, 16)


def test_the_network_computes_as_the_config_says():
    config = make_config("model.dtype=bfloat16", "model.remat=('layer1', 'stage4')")
    model = build_model(config, 3)
    assert model.dtype == "bfloat16" and model.backbone.remat == ("layer1", "stage4")


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
    config = load_config(f"{ROOT / 'configs' / 'default.py'}:{model}")
    assert build_model(config, 3).cls_head.dropout_rate == rate
    config = override(config, ["model.dropout_rate=0.3"])
    assert build_model(config, 3).cls_head.dropout_rate == 0.3


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
    config = load_config(f"{ROOT / 'configs' / 'default.py'}:{model}")
    assert build_model(config, 3).aux_head.dropout_rate == pytest.approx(rate)


@pytest.fixture
def cache_dir():
    """JAX's setting, which the test may change."""
    yield
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
    compilation_cache.reset_cache()


def test_a_cache_that_cannot_be_written_is_one_line(cache_dir, tmp_path, monkeypatch, caplog):
    """Of JAX's warnings for each program; other warnings are shown as ever."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "compilation_cache").write_text("a file, in which nothing can be written")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = []
        monkeypatch.setattr(warnings, "showwarning", lambda *details: shown.append(details[0]))
        set_compilation_cache(make_config(), tmp_path)
        compilation_cache.reset_cache()
        for size in (3, 5, 7):
            jax.jit(lambda x: x + 1)(np.ones(size)).block_until_ready()
        warnings.warn("another", stacklevel=1)
    assert [str(message) for message in shown] == ["another"]
    (line,) = [line for line in caplog.messages if "compilation cache" in line]
    assert line.startswith(
        f"{tmp_path / 'compilation_cache'}: the compilation cache cannot be read or written"
    )
    assert "FileExistsError" in line


@pytest.mark.parametrize(
    ("variable", "setting", "workdir", "folder"),
    [
        ("/env", "/set", "/run", "/env"),
        ("", "/set", "/run", "/set"),
        ("", "~/set", None, "/home/x/set"),
        ("", "", "/run", "/run/compilation_cache"),
        ("", "", None, None),
    ],
)
def test_where_compiled_programs_are_kept(
    cache_dir, monkeypatch, variable, setting, workdir, folder
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    config = make_config(f"parallel.compilation_cache={setting}")
    set_compilation_cache(config, workdir and Path(workdir))
    assert jax.config.jax_compilation_cache_dir == folder


def test_padding_is_the_mean_colour():
    assert pad_color(image_format(make_config())) == (124, 116, 104)


def test_preprocessing_is_that_of_the_config():
    settings = ("data.short_side=17", "data.exif_orientation=applied", "data.bit_depth=12")
    setup = setup_of(make_config(*settings, "model.image_mean=(9.6, 2.0, 3.0)"))
    found = setup.preprocessing
    assert (found.short_side, found.pad_color) == (17, (10, 2, 3))
    assert found.decoding == Decoding(exif_orientation="applied", bit_depth=12)
    assert found.label_map is setup.classes
