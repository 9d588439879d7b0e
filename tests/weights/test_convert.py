"""Conversion: what is written, what is said of it, and nothing at all where something is wrong."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from paths import STORED
from recipe import recipe_tensors
from safetensors.numpy import save_file
from small import setup_of
from state_dicts import backbone_of, flax_variables, tiny

from contrastseg_jax.config.load import override
from contrastseg_jax.errors import InputError
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.setup.resolve import initial_variables, load_network
from contrastseg_jax.structs import IMAGENET
from contrastseg_jax.weights import parity, pretrained
from contrastseg_jax.weights.convert import convert, convert_run

pytestmark = pytest.mark.slow


def source_of(folder, tensors):
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


def part_of_original():
    return {key: array for key, array in tiny().items() if key.startswith("backbone.")}


def test_variables_record_and_report(tmp_path, capsys):
    tensors = tiny(num_classes=7, proj_dim=12)
    queues = {"segment_queue": np.zeros((7, 4, 12), np.float32), "segment_queue_ptr": np.zeros(7)}
    counter = {"backbone.bn1.num_batches_tracked": np.array(3)}
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    convert(source_of(tmp_path, tensors | queues | counter), tmp_path / "out")

    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(tmp_path / "out" / "variables")
    expected = flax_variables(tensors)
    assert jax.tree.structure(stored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, stored, expected)

    record = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert record["networks"] == ["hrnet_tiny"] and record["source"] == "x.safetensors"
    assert (record["num_classes"], record["proj_dim"]) == (7, 12)
    assert len(record["sha256"]) == 64

    said = capsys.readouterr().out
    size = sum(leaf.size for leaf in jax.tree.leaves(expected["params"]))
    assert "x.safetensors: hrnet_tiny with 7 classes and a projection head (12)" in said
    assert f"parameters: {size:,}" in said
    assert "1 segment_queue, 1 segment_queue_ptr" in said and "1 num_batches_tracked" in said
    kernel = expected["params"]["cls_head"]["conv1"]["kernel"]
    row = next(line for line in said.splitlines() if "params/cls_head/conv1/kernel" in line)
    mean, std = (float(cell) for cell in row.split("|")[-3:-1])
    np.testing.assert_allclose([mean, std], [kernel.mean(), kernel.std()], rtol=1e-2)
    assert (tmp_path / "out" / "report.txt").read_text() in said


@pytest.mark.parametrize(
    ("tensors", "channel_order", "mean", "std"),
    [
        (tiny(), "BGR", [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]),
        (part_of_original(), "BGR", [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]),
        (backbone_of("hrnet_tiny"), "RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        (backbone_of("fcn_r18"), "RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        (backbone_of("deeplabv3_r18"), "BGR", [122.7717, 115.9465, 102.9801], [1.0, 1.0, 1.0]),
    ],
    ids=["original", "its backbone", "hrnet", "resnet", "deep stem"],
)
def test_conventions_of_images_go_with_the_weights(tmp_path, tensors, channel_order, mean, std):
    convert(source_of(tmp_path, tensors), tmp_path / "out")
    image_format = json.loads((tmp_path / "out" / "weights.json").read_text())["image_format"]
    assert image_format == {"channel_order": channel_order, "mean": mean, "std": std}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone.conv1.weight", np.nan, "backbone.conv1.weight: .* not finite"),
        ("backbone.bn1.running_var", -1.0, "backbone.bn1.running_var: .* negative variance"),
        ("extra.weight", 0.0, "extra.weight .*no such tensor"),
    ],
)
def test_weights_that_cannot_be_used_leave_nothing_behind(tmp_path, key, value, message):
    tensors = tiny()
    tensors[key] = np.full(tensors.get(key, np.zeros(3)).shape, value, np.float32)
    with pytest.raises(InputError, match=message):
        convert(source_of(tmp_path, tensors), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_missing_auxiliary_head_is_reported(tmp_path, capsys):
    tensors = {
        f"backbone.{key}": array for key, array in backbone_of("fcn_r18").items()
    } | of_torchvisions_fcn(width=128, num_classes=7)
    convert(source_of(tmp_path, tensors), tmp_path / "out")
    said = capsys.readouterr().out
    assert "fcn_r18 with 7 classes" in said
    assert "missing: the auxiliary head, randomly initialised by training" in said


def of_torchvisions_fcn(width, num_classes):
    """The tensors of its head, for a ResNet-18."""
    shapes = {"0.weight": (width, 512, 3, 3), "4.weight": (num_classes, width, 1, 1)}
    shapes |= {f"1.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
    shapes["4.bias"] = (num_classes,)
    return {f"classifier.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}


def test_a_convnext_is_converted_without_its_classifier(tmp_path, capsys):
    """Names and shapes are torchvision's own."""
    with np.load(STORED / "peers" / "torchvision_convnext_tiny.npz") as arrays:
        tensors = recipe_tensors(json.loads(str(arrays["meta"]))["shapes"])
    convert(source_of(tmp_path, tensors), tmp_path / "out")
    said = capsys.readouterr().out
    networks = ("fcn_convnext_tiny", "deeplabv3plus_convnext_tiny", "ocr_convnext_tiny")
    assert f"x.safetensors: the backbone of {', '.join(networks)}" in said
    assert "not used: 4 classifier" in said and "parameters: 27,818,592" in said
    weights = pretrained.read(tmp_path / "out", "ocr_convnext_tiny")
    assert (weights.networks, weights.image_format) == (networks, IMAGENET)

    model = zoo.build_model("fcn_convnext_tiny", num_classes=3, proj_dim=4, dropout_rate=0.0)
    fresh = segmenter.init_variables(model, 0)
    started = pretrained.start_from(
        tmp_path / "out", "fcn_convnext_tiny", ("a", "b", "c"), fresh, strict=False
    )
    assert jax.tree.structure(started) == jax.tree.structure(fresh)
    block = started["params"]["backbone"]["features_5_8"]
    kernel = tensors["features.5.8.block.3.weight"]
    np.testing.assert_array_equal(block["block_3"]["kernel"], kernel.T)
    scale = tensors["features.5.8.layer_scale"]
    np.testing.assert_array_equal(block["layer_scale"].ravel(), scale.ravel())
    np.testing.assert_array_equal(started["params"]["neck"]["fuse_1"]["scale"], 1)


def test_whole_numbers_are_no_weights(tmp_path):
    """But counters are whole numbers; quantised weights lack the scale that they need."""
    tensors = tiny() | {"backbone.bn1.num_batches_tracked": np.array(3)}
    tensors["backbone.conv1.weight"] = tensors["backbone.conv1.weight"].astype(np.int8)
    with pytest.raises(InputError) as error:
        convert(source_of(tmp_path, tensors), tmp_path / "out")
    (line,) = str(error.value).splitlines()[1:]
    assert line == "  backbone.conv1.weight: is int8, must be floating-point"


def test_what_is_in_the_output_is_not_overwritten(tmp_path):
    source = source_of(tmp_path, tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for output in (tmp_path / "out", source):
        with pytest.raises(InputError, match="must be a new folder, or an empty one"):
            convert(source, output)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, r"\d$"), (1.01, ", which is more than rounding$")],
)
def test_the_report_judges_the_difference_to_a_peer(tmp_path, monkeypatch, factor, verdict):
    def peer_output(networks, state, pixels):
        variables = segmenter.unflatten(state.leaves)
        return factor * parity.own_output(networks[0], 0, variables, pixels)

    monkeypatch.setattr(parity, "peer_output", peer_output)
    convert(source_of(tmp_path, backbone_of("hrnet_tiny")), tmp_path / "out")
    (line,) = re.findall("compared .*", (tmp_path / "out" / "report.txt").read_text())
    assert re.search(verdict, line)


def test_a_peer_of_another_version_stops_no_conversion(tmp_path, monkeypatch):
    def peer_output(*_):
        raise RuntimeError("Missing key(s) in state_dict: x\nand more")

    monkeypatch.setattr(parity, "peer_output", peer_output)
    convert(source_of(tmp_path, tiny()), tmp_path / "out")
    report = (tmp_path / "out" / "report.txt").read_text()
    assert report.endswith("not compared: Missing key(s) in state_dict: x\n")


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    source = source_of(tmp_path, tiny())

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(InputError, match=r"--output=.*out: cannot be written \(no space left\)"):
        convert(source, tmp_path / "new" / "newer" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    """Orbax's threads would go on writing, and complaining, after the error."""
    source = source_of(tmp_path, tiny())
    usage = SimpleNamespace(total=0, used=0, free=1_000_000)
    monkeypatch.setattr(pretrained.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", lambda *_: pytest.fail("writes"))
    with pytest.raises(
        InputError, match=r"--output=.*No space left on device: .*1,000,000 are free"
    ):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_empty_folder_is_filled_not_replaced(tmp_path, monkeypatch):
    """It may be a mount point, a link or the current folder."""
    source = source_of(tmp_path, tiny())
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    before = empty.stat().st_ino
    convert(source, link)
    written = {"report.txt", "variables", "weights.json"}
    assert link.is_symlink() and empty.stat().st_ino == before
    assert {path.name for path in empty.iterdir()} == written

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(source, Path("."))
    assert {path.name for path in (tmp_path / "here").iterdir()} == written
    with pytest.raises(InputError, match=r"--output=\S+sub: cannot be written \(Not a directory\)"):
        convert(source, source / "sub")


def test_a_run_is_what_another_starts_from(trained, caplog):
    """As it is: the newest checkpoint, without optimiser and bank."""
    caplog.set_level("INFO", pretrained.log.name)
    config, workdir = trained
    expected, step = load_network(setup_of(config), workdir, "latest")
    named = override(config, [f"model.init_from={workdir}"])
    started = initial_variables(setup_of(named), strict=True)
    jax.tree.map(np.testing.assert_array_equal, started, jax.device_get(expected))
    assert f"initialised from run, step {step} ({workdir})" in caplog.text
    without = override(named, ["contrast.candidates=none"])
    started = initial_variables(setup_of(without), strict=True)
    assert "proj_head" not in started["params"]
    assert "not used: proj_head" in caplog.text
    assert pretrained.read(workdir, "toy").proj_dim == 16
    with pytest.raises(
        InputError, match="run is for toy, whose backbone model.name = 'hrnet_tiny'"
    ):
        pretrained.read(workdir, "hrnet_tiny")


def test_a_checkpoint_of_a_run_is_what_another_starts_from(trained, tmp_path, capsys, caplog):
    config, workdir = trained
    setup = setup_of(config)
    convert_run(workdir, "4", tmp_path / "out")
    assert "run, step 4: toy with 3 classes and a projection head (16)" in (capsys.readouterr().out)
    config = override(config, [f"model.init_from={tmp_path / 'out'}"])
    expected, _ = load_network(setup, workdir, "4")
    started = initial_variables(setup_of(config), strict=True)
    jax.tree.map(np.testing.assert_array_equal, started, jax.device_get(expected))
    assert pretrained.read(tmp_path / "out", "toy").image_format == IMAGENET
    names = ["data.name=folder", "data.class_names=('a', 'b', 'c')"]
    renamed = override(config, names)
    initial_variables(setup_of(renamed))
    assert "it was trained on the classes class_0, class_1, class_2: the last layer" in caplog.text
    caplog.clear()
    other = override(renamed, ["model.name=toy_ocr"])
    initial_variables(setup_of(other))  # takes the backbone alone
    assert "the last layer is loaded anyway" not in caplog.text
    with pytest.raises(InputError, match="classes class_0, class_1, class_2, the data set has a, "):
        initial_variables(setup_of(renamed), strict=True)
    with pytest.raises(InputError, match="init: must be latest, best or a"):
        convert_run(workdir, "init", tmp_path / "other")
    with pytest.raises(InputError, match="--checkpoint=5: must be latest, best"):
        convert_run(workdir, "5", tmp_path / "other")
    assert not (tmp_path / "other").exists()
