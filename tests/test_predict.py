"""Predictions of files and folders, good and bad."""

import io
import re

import jax
import numpy as np
import pytest
from PIL import ExifTags, Image
from small import ROOT

from contrastseg_jax import config as config_lib
from contrastseg_jax.build import dataset_spec
from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.images import encode_png
from contrastseg_jax.errors import InputError
from contrastseg_jax.predict import find_images, predict_image, predict_run


@pytest.fixture
def photos(trained, tmp_path):
    """Two good images of different sizes, one in a sub-folder, and one that is cut short."""
    config, _ = trained
    data = open_split(dataset_spec(config), "val")[0]["image"]
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    (folder / "a.png").write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        image.resize((50, 41)).save(folder / "trip" / "b.jpg")
    (folder / "bad.png").write_bytes(data[: len(data) // 2])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_with_one_corrupt_file(trained, photos, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(InputError, match="1 problem in .*photos") as error:
        predict_run(*trained, "latest", photos, output)
    assert "bad.png: unreadable image file" in str(error.value)
    written = sorted(path.relative_to(output).as_posix() for path in output.rglob("*.*"))
    assert written == [
        *("legend.png", "masks/a.png", "masks/trip/b.png"),
        *("overlays/a.jpg", "overlays/trip/b.jpg"),
    ]
    with Image.open(output / "masks" / "trip" / "b.png") as mask:
        assert mask.mode == "L" and mask.size == (50, 41)
        assert set(np.unique(mask)) <= {0, 1, 2}
    with Image.open(output / "overlays" / "trip" / "b.jpg") as overlay:
        assert overlay.size == (50, 41)


def test_one_file(trained, photos, tmp_path):
    predict_run(*trained, "best", photos / "a.png", tmp_path / "out")
    assert (tmp_path / "out" / "masks" / "a.png").exists()


def test_a_photograph_that_viewers_turn_is_taken_as_stored_and_said_to_be(
    trained, tmp_path, caplog
):
    caplog.set_level("INFO", "contrastseg_jax")
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (50, 41)).save(tmp_path / "x.jpg", exif=note)
    predict_run(*trained, "latest", tmp_path / "x.jpg", tmp_path / "out")
    assert "1 of them taken as stored, which EXIF data ask viewers to turn" in caplog.text
    with Image.open(tmp_path / "out" / "masks" / "x.png") as mask:
        assert mask.size == (50, 41)


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png", "webp"])
def test_a_photograph_is_turned_where_that_is_asked_for(trained, tmp_path, caplog, suffix):
    caplog.set_level("INFO", "contrastseg_jax")
    config, workdir = trained
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (50, 41)).save(tmp_path / f"x.{suffix}", exif=note)
    config = config_lib.replaced(config, {"data.exif_orientation": "applied"})
    predict_run(config, workdir, "latest", tmp_path / f"x.{suffix}", tmp_path / "out")
    assert "EXIF" not in caplog.text
    for result in ("masks/x.png", "overlays/x.jpg"):
        with Image.open(tmp_path / "out" / result) as picture:
            assert picture.size == (41, 50)


def test_the_input_folder_may_hold_the_output(trained, photos):
    output = photos / "out"
    (photos / "bad.png").unlink()
    predict_run(*trained, "latest", photos, output)
    assert sorted(find_images(photos, output)) == ["a", "trip/b"]


def test_predictions_are_those_of_the_evaluation_at_any_size(trained):
    """Padding is cut off, and a resized image's prediction comes back at its own size."""
    config, _ = trained
    seen = []

    def logits_fn(variables, image):
        seen.append(image.shape)
        logits = np.zeros((*image.shape[:3], 3), np.float32)
        half = image.shape[2] // 2
        logits[:, :, :half, 1] = logits[:, :, half:, 0] = 1  # of the padded image's columns
        return jax.numpy.asarray(logits)

    image = np.zeros((40, 64, 3), np.uint8)
    prediction = predict_image(config, logits_fn, {}, image)
    assert seen == [(1, 64, 64, 3)]
    np.testing.assert_array_equal(prediction, [[1] * 32 + [0] * 32] * 40)
    half = config_lib.override(config, ["data.short_side=20"])
    prediction = predict_image(half, logits_fn, {}, image)
    assert seen[1] == (1, 32, 32, 3) and prediction.shape == (40, 64)
    np.testing.assert_array_equal(prediction, [[1] * 32 + [0] * 32] * 40)


def test_inputs_that_are_none(tmp_path):
    with pytest.raises(InputError, match="--input=.*nothing: no such file or folder"):
        find_images(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(InputError, match="must be another folder than --input"):
        find_images(tmp_path, tmp_path)
    with pytest.raises(InputError, match="holds no image"):
        find_images(tmp_path, tmp_path / "out")
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(encode_png(np.zeros((2, 2), np.uint8)))
    with pytest.raises(InputError, match="would overwrite those of"):
        find_images(tmp_path, tmp_path / "out")


def test_the_quickstart_predicts_the_held_out_photographs(tmp_path):
    (folder,) = re.findall(r"--input=(\S+)", (ROOT / "Makefile").read_text())
    assert len(find_images(ROOT / folder, tmp_path)) == 9
    assert folder in (ROOT / "README.md").read_text()
