"""Predictions of files and folders, good and bad."""

import errno
import io
import re

import jax
import numpy as np
import pytest
from paths import ROOT
from PIL import ExifTags, Image
from small import make_config, setup_of

from contrastseg_jax.config.load import override
from contrastseg_jax.config.tree import replaced
from contrastseg_jax.data import preprocess
from contrastseg_jax.data.dataset import dataset_spec, open_split
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import loaded_network, predict
from contrastseg_jax.evaluation.inputs import find_images
from contrastseg_jax.evaluation.loaded_network import of_setup
from contrastseg_jax.evaluation.predict import predict_run
from contrastseg_jax.parallel import device_memory


def on_one_device(config, workdir):
    return setup_of(config, num_devices=1), workdir


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
        predict_run(*on_one_device(*trained), "latest", [str(photos)], output)
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
    predict_run(*on_one_device(*trained), "best", [str(photos / "a.png")], tmp_path / "out")
    assert (tmp_path / "out" / "masks" / "a.png").exists()


def test_an_exif_orientation_is_ignored_with_a_message(trained, tmp_path, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (50, 41)).save(tmp_path / "x.jpg", exif=note)
    predict_run(*on_one_device(*trained), "latest", [str(tmp_path / "x.jpg")], tmp_path / "out")
    assert "1 image with an EXIF orientation, which was ignored" in caplog.text
    with Image.open(tmp_path / "out" / "masks" / "x.png") as mask:
        assert mask.size == (50, 41)


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png", "webp"])
def test_a_photograph_is_rotated_by_exif_orientation_if_applied(trained, tmp_path, caplog, suffix):
    caplog.set_level("INFO", "contrastseg_jax")
    config, workdir = trained
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (50, 41)).save(tmp_path / f"x.{suffix}", exif=note)
    config = replaced(config, {"data.exif_orientation": "applied"})
    predict_run(
        *on_one_device(config, workdir), "latest", [str(tmp_path / f"x.{suffix}")], tmp_path / "out"
    )
    assert "EXIF" not in caplog.text
    for result in ("masks/x.png", "overlays/x.jpg"):
        with Image.open(tmp_path / "out" / result) as picture:
            assert picture.size == (41, 50)


@pytest.mark.parametrize(("rule", "number"), [("stored", "2"), ("applied", "1")])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_sizes_are_those_that_the_network_will_see(tmp_path, caplog, suffix, rule, number):
    """Of a picture that viewers turn and of one that stands upright as it is stored."""
    caplog.set_level("INFO", "contrastseg_jax")
    note = Image.Exif()
    note[ExifTags.Base.Orientation] = 6
    files = {name: tmp_path / f"{name}.{suffix}" for name in ("rotated", "upright")}
    Image.new("RGB", (90, 40)).save(files["rotated"], exif=note)
    Image.new("RGB", (40, 90)).save(files["upright"])
    predict._by_size(setup_of(make_config(f"data.exif_orientation={rule}")), files)
    assert (
        f"2 images to predict; compiling the network for {number} padded image size" in caplog.text
    )


def test_the_input_folder_may_hold_the_output(trained, photos):
    output = photos / "out"
    (photos / "bad.png").unlink()
    predict_run(*on_one_device(*trained), "latest", [str(photos)], output)
    assert sorted(find_images([str(photos)], output).files) == ["a", "trip/b"]


def test_predictions_are_those_of_the_evaluation_at_any_size(trained):
    """Padding is cut off, and a resized image's prediction comes back at its own size."""
    config, _ = trained
    seen = []

    def logits_fn(image):
        seen.append(image.shape)
        logits = np.zeros((*image.shape[:3], 3), np.float32)
        half = image.shape[2] // 2
        logits[:, :, :half, 1] = logits[:, :, half:, 0] = 1  # of the padded image's columns
        return jax.numpy.asarray(logits)

    image = np.zeros((40, 64, 3), np.uint8)
    prediction = of_setup(setup_of(config), logits_fn).predict(image)
    assert seen == [(1, 64, 64, 3)]
    np.testing.assert_array_equal(prediction, [[1] * 32 + [0] * 32] * 40)
    half = override(config, ["data.short_side=20"])
    prediction = of_setup(setup_of(half), logits_fn).predict(image)
    assert seen[1] == (1, 32, 32, 3) and prediction.shape == (40, 64)
    np.testing.assert_array_equal(prediction, [[1] * 32 + [0] * 32] * 40)


def test_what_one_file_costs_does_not_end_a_folder(trained, photos, tmp_path, monkeypatch):
    """Too little memory, too many pixels, a name without room for a suffix: a line each."""
    (photos / "bad.png").unlink()
    data = (photos / "a.png").read_bytes()
    (photos / ("n" * 251 + ".jpg")).write_bytes(data)  # the mask's name just fits
    for suffix in (".jpg", ".png"):  # these keep it, and do not fit
        (photos / ("m" * 251 + suffix)).write_bytes(data)
    for name, size in (("deep", (64, 90)), ("long", (4, 1000))):
        Image.new("RGB", size).save(photos / f"{name}.png")
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 96 * 288)
    resize_image = loaded_network.resize_image

    def fail(image, size):
        if size == (90, 64):
            raise MemoryError("Unable to allocate 42.4 GiB")
        return resize_image(image, size)

    monkeypatch.setattr(loaded_network, "resize_image", fail)
    with pytest.raises(InputError) as error:
        predict_run(*on_one_device(*trained), "latest", [str(photos)], tmp_path / "out")
    title, *lines = str(error.value).splitlines()
    assert title == f"4 problems in {photos}:"
    told = {re.search(r"/(\w)\w*\.(\w+): ", line).groups(): line for line in lines}
    assert set(told) == {("d", "png"), ("l", "png"), ("m", "jpg"), ("m", "png")}
    assert "out of memory (Unable to allocate 42.4 GiB)" in told["d", "png"]
    assert told["l", "png"].endswith(
        "has 4x1000 pixels, padded by eval.pad_multiple = 32 to 32x1024; at most 27,648 pixels are"
        " evaluated, cut it into tiles"
    )
    assert "results cannot be written (File name too long)" in told["m", "jpg"]
    masks = {path.stem[0] for path in (tmp_path / "out" / "masks").rglob("*.png")}
    assert masks == {"a", "b", "n"}
    assert not list((tmp_path / "out").rglob(".*"))  # nothing half-written


def test_an_image_for_which_memory_is_missing_is_told_before_it_is_used(
    trained, photos, tmp_path, monkeypatch
):
    (photos / "bad.png").unlink()
    monkeypatch.setattr(device_memory, "free_bytes", lambda: 1000)
    with pytest.raises(InputError) as error:
        predict_run(*on_one_device(*trained), "latest", [str(photos)], tmp_path / "out")
    title, *lines = str(error.value).splitlines()
    assert title == f"2 problems in {photos}:"
    for name, line in zip(("a.png", "trip/b.jpg"), sorted(lines), strict=True):
        assert re.fullmatch(
            rf"  {photos / name}: needs 0\.\d GiB of memory, 0\.0 GiB are free", line
        )


def test_a_full_disk_ends_it_and_what_was_left_is_named(trained, photos, tmp_path, monkeypatch):
    def fail(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    (photos / "bad.png").unlink()
    monkeypatch.setattr(predict, "write_atomically", fail)
    with pytest.raises(InputError, match="(?s)2 problems in .*No space left on.*: not pred"):
        predict_run(*on_one_device(*trained), "latest", [str(photos)], tmp_path / "out")


def test_an_overlay_too_long_for_a_jpeg_is_a_png(trained, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    monkeypatch.setattr(predict, "JPEG_SIDE", 50)
    for name, width in (("long", 51), ("short", 50)):
        Image.new("RGB", (width, 20)).save(tmp_path / f"{name}.png")
    predict_run(*on_one_device(*trained), "latest", [str(tmp_path / "*.png")], tmp_path / "out")
    overlays = sorted(path.name for path in (tmp_path / "out" / "overlays").iterdir())
    assert overlays == ["long.png", "short.jpg"]
    assert "1 overlay written as PNG: a side is too long for JPEG" in caplog.text


def test_masks_of_something_else_are_not_replaced(trained, photos, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(b"drawn by hand")
    with pytest.raises(InputError, match="masks contains files that are not predictions"):
        predict_run(*on_one_device(*trained), "latest", [str(photos)], tmp_path)
    assert (tmp_path / "masks" / "a.png").read_bytes() == b"drawn by hand"


def test_an_output_that_cannot_be_written_is_found_at_the_start(trained, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "overlays").touch()
    with pytest.raises(InputError, match="--output=.*out: cannot be written .*File exists"):
        predict_run(*on_one_device(*trained), "latest", [str(photos)], tmp_path / "out")
    assert not (tmp_path / "out" / "masks" / "a.png").exists()


def test_the_quickstart_predicts_the_held_out_photographs(tmp_path):
    (folder,) = re.findall(r"--input=(\S+)", (ROOT / "Makefile").read_text())
    assert len(find_images([str(ROOT / folder)], tmp_path).files) == 9
    assert folder in (ROOT / "README.md").read_text()
