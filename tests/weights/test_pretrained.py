"""Weights to start from: what is taken of them, what stays fresh, what is refused."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from small import make_config, setup_of
from state_dicts import backbone_of, flax_variables, tiny

from contrastseg_jax.config.load import override
from contrastseg_jax.errors import InputError
from contrastseg_jax.models import segmenter
from contrastseg_jax.run.workdir import require_same_config
from contrastseg_jax.setup.preflight import check, weights_problems
from contrastseg_jax.setup.resolve import (
    adopt_image_format,
    image_format,
    initial_variables,
    log,
    pad_color,
)
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import init_state
from contrastseg_jax.weights import pretrained
from contrastseg_jax.weights.convert import convert
from contrastseg_jax.weights.torch_names import merge


def converted(folder, tensors):
    save_file(tensors, folder / "x.safetensors")
    convert(folder / "x.safetensors", folder / "weights")
    return folder / "weights"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Converted weights of `hrnet_tiny` with 3 classes and embeddings of 16."""
    return converted(tmp_path_factory.mktemp("whole"), tiny(num_classes=3, proj_dim=16))


def start(folder, *overrides, variant="memory"):
    config = make_config(
        "model.name=hrnet_tiny", f"model.init_from={folder}", *overrides, variant=variant
    )
    setup = setup_of(config)
    return initial_variables(setup), segmenter.init_variables(setup.model, config.seed)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_whole_network_is_taken_as_it_is(whole):
    variables, _ = start(whole)
    assert_same(variables, flax_variables(tiny(num_classes=3, proj_dim=16)))


def test_other_classes_and_embeddings_leave_the_last_layers_fresh(whole, caplog):
    caplog.set_level("INFO", pretrained.log.name)
    variables, fresh = start(whole, "model.proj_dim=8", "data.synthetic.num_classes=5")
    given = flax_variables(tiny(num_classes=3, proj_dim=16))
    for collection, parts in given.items():
        assert_same(variables[collection]["backbone"], parts["backbone"])
        for part in ("cls_head", "proj_head"):
            for layer in parts[part]:
                source = fresh if layer == "conv2" else given
                assert_same(variables[collection][part][layer], source[collection][part][layer])
    assert "initialised from x.safetensors" in caplog.text
    assert (
        "cls_head/conv2 (size 5, weights have 3), proj_head/conv2 (size 8, weights have 16)"
        in caplog.text
    )


def test_without_contrast_the_projection_head_is_left_out(whole, caplog):
    caplog.set_level("INFO", pretrained.log.name)
    variables, _ = start(whole, variant="ce")
    assert "not used: proj_head" in caplog.text
    given = flax_variables(tiny(num_classes=3))
    assert_same(variables, given)


@pytest.mark.parametrize("kind", ["whole", "backbone"])
def test_on_another_head_only_the_backbone_is_taken(kind, whole, tmp_path, caplog):
    caplog.set_level("INFO", pretrained.log.name)
    folder = whole if kind == "whole" else converted(tmp_path, backbone_of("hrnet_tiny"))
    config = make_config("model.name=hrnet_tiny", f"model.init_from={folder}")
    config = override(config, ["model.name=hrnet_tiny_ocr"])
    setup = setup_of(config)
    fresh = segmenter.init_variables(setup.model, config.seed)
    variables = initial_variables(setup)
    given = flax_variables(tiny(num_classes=3))["params"]["backbone"]
    assert_same(variables["params"]["backbone"], given)
    for part in ("aux_head", "cls_head", "proj_head"):
        assert_same(variables["params"][part], fresh["params"][part])
    assert "aux_head (missing)" in caplog.text
    of_another = kind == "whole"
    for part in ("cls_head", "proj_head"):
        reason = "of another network" if of_another else "missing"
        assert f"{part} ({reason})" in caplog.text


def test_the_state_and_its_averages_start_from_the_weights(whole):
    config = make_config("model.name=hrnet_tiny", f"model.init_from={whole}", "optim.ema_decay=0.9")
    setup, (tx, _) = setup_of(config), build_optimizer(config)
    state = init_state(setup, tx, initial_variables(setup))
    given = flax_variables(tiny(num_classes=3, proj_dim=16))
    assert_same(state.params, given["params"])
    assert_same(jax.device_get(state.ema), given)


def test_images_are_as_the_weights_need_them(whole, tmp_path, caplog):
    """The original's HRNet reads BGR, with statistics in the order of RGB."""
    config = adopt_image_format(
        make_config("model.name=hrnet_tiny", f"model.init_from={whole}"), None
    )
    found = image_format(config)
    assert found.channel_order == "BGR"
    assert found.mean == (103.53, 116.28, 123.675)
    assert found.std == (57.375, 57.12, 58.395)
    assert pad_color(image_format(config)) == (104, 116, 124)

    caplog.set_level("INFO", log.name)
    settings = ["model.image_std=(1.0, 2.0, 3.0)", "model.image_mean=(103.53, 116.28, 123.675)"]
    said = make_config("model.name=hrnet_tiny", f"model.init_from={whole}", *settings)
    of_config = image_format(adopt_image_format(said, None))
    assert of_config.std == (1.0, 2.0, 3.0) and of_config.channel_order == "BGR"
    assert "BGR; red, green, blue have mean (103.53, 116.28, 123.675), std (57.375" in caplog.text
    assert "overridden by the config: model.image_std = (1.0, 2.0, 3.0)" in caplog.text

    of_imagenet = converted(tmp_path, backbone_of("hrnet_tiny"))
    config = adopt_image_format(
        make_config("model.name=hrnet_tiny", f"model.init_from={of_imagenet}"), None
    )
    assert image_format(config) == image_format(
        make_config(
            "model.name=hrnet_tiny",
        )
    )


def test_a_run_that_goes_on_needs_the_weights_no_longer(tmp_path):
    config = make_config("model.name=hrnet_tiny", "model.init_from=/gone")
    run = override(config, ["model.channel_order=BGR", "model.image_std=(1.0, 1.0, 1.0)"])
    followed = adopt_image_format(config, run)
    assert image_format(followed) == image_format(run)
    with pytest.raises(InputError, match="model.init_from = '/gone': must be a run"):
        adopt_image_format(config, None)


def test_a_setting_that_overruled_the_weights_must_not_be_dropped(whole, tmp_path):
    config = make_config("model.name=hrnet_tiny", f"model.init_from={whole}")
    said = override(config, ["model.image_std=(1.0, 2.0, 3.0)"])
    run = adopt_image_format(said, None)
    require_same_config(adopt_image_format(said, run), run, tmp_path)
    followed = adopt_image_format(config, run)
    with pytest.raises(InputError, match=r"model.image_std = \(57.*: the run has \(1.0, 2.0"):
        require_same_config(followed, run, tmp_path)


def test_weights_must_be_on_a_disk():
    config = make_config("model.name=hrnet_tiny", "model.init_from=gs://bucket/x")
    with pytest.raises(InputError, match="model.init_from = 'gs://bucket/x': must be on a local"):
        check(config, mode="eval", reads_weights=True)


def test_another_backbone_is_refused_with_the_networks_that_have_it(whole):
    config = make_config("model.name=hrnet_tiny", f"model.init_from={whole}")
    config = override(config, ["model.name=hrnet_w18_small"])
    with pytest.raises(InputError, match="x.safetensors is for hrnet_tiny") as error:
        adopt_image_format(config, None)
    assert "model.name = 'hrnet_w18_small' does not use" in str(error.value)
    assert str(error.value).endswith("these use it: hrnet_tiny, hrnet_tiny_ocr")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "{",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"hrnet_tiny"', '"hrnet_huge"'),
        lambda text: text.replace("BGR", "GBR"),
        lambda text: text.replace("123.675", '"high"'),
        lambda text: text.replace("57.375,", ""),
        lambda text: text.replace('"files"', '"filed"'),
    ],
)
def test_a_damaged_record_is_refused(whole, tmp_path, change):
    (tmp_path / "weights.json").write_text(change((whole / "weights.json").read_text()))
    with pytest.raises(InputError, match=r"weights.json: is damaged .* convert the weights again"):
        pretrained.read(tmp_path, "hrnet_tiny")


@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
@pytest.mark.parametrize("name", ["manifest.ocdbt", "ocdbt.process_0/d/*", "_METADATA"])
def test_damaged_arrays_are_refused_before_they_are_read(whole, tmp_path, damage, name):
    """Changed bytes are numbers like others to whoever reads them."""
    folder = shutil.copytree(whole, tmp_path / "weights")
    path = max((folder / "variables").glob(name), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    message = f"variables: {path.relative_to(folder / 'variables')} is missing or not as converted"
    with pytest.raises(InputError, match=message):
        start(folder)
    (problem,) = weights_problems(make_config("model.name=hrnet_tiny", f"model.init_from={folder}"))
    assert re.search(message, problem)


def test_layers_of_another_width_that_are_not_the_last_are_refused(whole):
    given = flax_variables(tiny(num_classes=3, proj_dim=16))
    fresh = jax.tree.map(np.zeros_like, given)
    given["params"]["cls_head"]["bn1"]["bias"] = np.zeros(60, np.float32)
    with pytest.raises(InputError, match=r"cls_head/bn1/bias: is \(60,\), must be \(120,\)"):
        merge(given, fresh, parts=None, source="folder")


def test_arrays_without_a_place_in_a_part_that_is_there_are_refused():
    fresh = flax_variables(tiny())
    given = flax_variables(tiny(proj_dim=16))  # a whole part more is left out, which the log says
    given["params"]["backbone"]["layer1_1"] = {"conv1": {"kernel": np.zeros((1, 1, 2, 3))}}
    with pytest.raises(InputError, match="layer1_1/conv1/kernel: unexpected") as error:
        merge(given, fresh, parts=None, source="folder")
    assert "1 problem in folder" in str(error.value)


def test_what_is_no_folder_of_weights_is_told_what_it_is(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(InputError, match=r"--mode=convert --input=\S+x.pth --output=FOLDER writes"):
        pretrained.read(tmp_path / "x.pth", "hrnet_tiny")
    (tmp_path / "checkpoints").mkdir()  # but no config
    with pytest.raises(InputError, match=r"must be a run with a checkpoint, or a folder written"):
        pretrained.read(tmp_path, "hrnet_tiny")


def test_arrays_that_do_not_fit_their_record_are_refused(tmp_path):
    folder = converted(tmp_path, backbone_of("hrnet_tiny"))
    record = json.loads((folder / "weights.json").read_text())
    record["networks"] = ["hrnet_w18_small", "hrnet_w18_small_ocr"]
    (folder / "weights.json").write_text(json.dumps(record))
    config = override(
        make_config("model.name=hrnet_tiny", f"model.init_from={folder}"),
        ["model.name=hrnet_w18_small"],
    )
    with pytest.raises(InputError, match=r"problems in .*weights:\n  .*: is .*, must be "):
        initial_variables(setup_of(config))
