"""An export: run without this package, compared with the checkpoint, whole or not there."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_config, setup_of

from contrastseg_jax.errors import InputError
from contrastseg_jax.export import export, stablehlo
from contrastseg_jax.export.export import export_run, largest_difference, parse_size
from contrastseg_jax.library import load
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.setup.resolve import load_network

RUN_ALONE = """
import sys
from jax import export
import numpy as np
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.asarray(program.call(images)))
assert "contrastseg_jax" not in sys.modules and "flax" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    config, workdir = trained
    folder = tmp_path_factory.mktemp("export") / "network"
    setup = setup_of(config, num_devices=1)
    export_run(setup, workdir, "latest", ("32x48", "64x64", "32x48"), folder)
    return folder


def test_the_card_says_what_goes_in_and_comes_out(exported, trained):
    card = json.loads((exported / "card.json").read_text())
    assert card["programs"] == ["32x48.stablehlo", "64x64.stablehlo"]
    assert {path.name for path in exported.iterdir()} == {"card.json", *card["programs"]}
    network = load(trained[1], checkpoint="latest")
    assert card["classes"] == list(network.class_names)
    assert [tuple(color) for color in card["palette"]] == list(network.palette)
    assert card["step"] == card["val"]["step"] and "mean_iou" in card["val"]
    assert card["record"]["starts"] and jax.__version__ in card["lifetime"]
    assert not [path for path in exported.parent.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("number", [1, 3])
def test_a_process_with_jax_alone_gives_the_networks_logits(exported, trained, tmp_path, number):
    images = np.random.default_rng(5).integers(0, 256, (number, 32, 48, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    files = exported / "32x48.stablehlo", tmp_path / "images.npy", tmp_path / "logits.npy"
    subprocess.run([sys.executable, "-c", RUN_ALONE, *map(str, files)], check=True, timeout=300)
    logits = np.load(files[2])
    setup = setup_of(trained[0], num_devices=1)
    variables, _ = load_network(setup, trained[1], "latest")
    expected = export.image_logits(variables, jnp.asarray(images), setup=setup)
    assert logits.shape == expected.shape == (number, 32, 48, 3)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_it_is_loaded_as_the_run_is(exported, trained):
    """Images take the smallest program that they fit into."""
    network, run = load(exported), load(trained[1], checkpoint="latest")
    assert (network.class_names, network.palette) == (run.class_names, run.palette)
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_allclose(network.logits(image), run.logits(image), atol=1e-4)
    assert network.predict(image[:20, :30]).shape == (20, 30)
    assert network.predict(image[:60, :30]).shape == (60, 30)
    with pytest.raises(
        InputError, match="the image has 65x30 pixels .* exported for, 32x48, 64x64"
    ):
        network.predict(np.zeros((65, 30, 3), np.uint8))


def test_a_damaged_export_is_named(exported, tmp_path):
    for name, text in (("card.json", "{}"), ("64x64.stablehlo", "cut short")):
        folder = tmp_path / name
        shutil.copytree(exported, folder)
        (folder / name).write_text(text)
        with pytest.raises(InputError, match=f"{name}: damaged"):
            load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hrnet_tiny_ocr", "deeplabv3_r18", "fcn_convnext_tiny"])
def test_every_kind_of_network_is_lowered_for_every_platform(name):
    model = zoo.build_model(name, num_classes=3)
    variables = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), segmenter.variable_shapes(model)
    )

    def logits_of(image):
        return model.apply(variables, image.astype(jnp.float32), train=False).logits

    program = jax.export.deserialize(bytearray(stablehlo.serialize(logits_of, (32, 32))))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert program.in_avals[0].shape[1:] == (32, 32, 3)


def test_a_program_that_differs_is_refused(tmp_path):
    path = tmp_path / "8x8.stablehlo"
    path.write_bytes(stablehlo.serialize(lambda image: image.astype(jnp.float32), (8, 8)))
    assert largest_difference(path, lambda image: image.astype(np.float32), (8, 8)) == 0.0
    with pytest.raises(InputError, match=r"8x8.stablehlo: its logits differ by .* is rounding"):
        largest_difference(path, lambda image: image.astype(np.float32) + 1, (8, 8))
    path.write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"8x8.stablehlo: cannot be run by itself \("):
        largest_difference(path, lambda image: image, (8, 8))


@pytest.mark.parametrize("text", ["512", "axb", "0x4", "4x", "4x-4", "4x4x4", ""])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(InputError, match=f"--size={text}: must be HEIGHTxWIDTH"):
        parse_size(text)


def test_a_folder_in_use_is_left_alone_and_nothing_is_half_written(trained, tmp_path, monkeypatch):
    setup = setup_of(make_config(), num_devices=1)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="used: must be an empty folder, or one to be made"):
        export_run(setup, trained[1], "latest", (), tmp_path / "used")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stablehlo, "serialize", fail)
    with pytest.raises(InputError, match=r"new: cannot be written \(No space left on device\)"):
        export_run(setup, trained[1], "latest", ("32x32",), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
