"""Which pixels are drawn, what a network says of them, and the page of whole runs."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from program import run
from small import make_config, setup_of

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.images import decode_image, decode_mask, encode_png
from contrastseg_jax.data.preprocess import pad
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import embed
from contrastseg_jax.evaluation.embed import (
    cell_labels,
    coarsest_maps,
    draw_pixels,
    drawn_images,
    embed_runs,
    label_maps,
    pixel_vectors,
    quotas,
    read_vectors,
)
from contrastseg_jax.evaluation.evaluate import make_evaluator
from contrastseg_jax.models.segmenter import describe_pixels
from contrastseg_jax.ops.normalize import normalize
from contrastseg_jax.ops.resize import label_at_stride
from contrastseg_jax.setup.resolve import initial_variables
from contrastseg_jax.structs import IGNORE_LABEL
from contrastseg_jax.training.train import train


def test_quotas_are_even_and_what_a_rare_class_lacks_others_have(monkeypatch):
    monkeypatch.setattr(embed, "MAX_PIXELS", 100)
    monkeypatch.setattr(embed, "MAX_PER_CLASS", 60)
    np.testing.assert_array_equal(quotas(np.array([1000, 0, 10, 1000])), [45, 0, 10, 45])
    np.testing.assert_array_equal(quotas(np.array([1000, 10, 20])), [60, 10, 20])
    assert quotas(np.full(33, 50)).sum() <= 100
    np.testing.assert_array_equal(quotas(np.zeros(3, np.int64)), 0)


def test_drawn_pixels_have_their_labels_and_are_the_same_again(monkeypatch):
    monkeypatch.setattr(embed, "MAX_PER_CLASS", 20)
    rng = np.random.default_rng(1)
    maps = [
        rng.choice([0, 1, 4, IGNORE_LABEL], size=size).astype(np.uint8)
        for size in ((5, 8), (9, 3), (8, 8))
    ]
    pixels = draw_pixels(maps)
    assert np.bincount(pixels.label).tolist() == [20, 20, 0, 0, 20]
    places = [*zip(pixels.image.tolist(), *pixels.cell.T.tolist(), strict=True)]
    assert len(set(places)) == 60
    assert [maps[image][row, column] for image, row, column in places] == pixels.label.tolist()
    again = draw_pixels(maps)
    np.testing.assert_array_equal(again.image, pixels.image)
    np.testing.assert_array_equal(again.cell, pixels.cell)


@pytest.mark.parametrize("size", [(64, 96), (65, 129), (16, 24)])
def test_a_cell_has_the_label_that_training_gives_it(size):
    label = np.random.default_rng(0).integers(5, size=size).astype(np.uint8)
    grid = (-(-size[0] // 8), -(-size[1] // 8))
    expected = label_at_stride(jnp.asarray(label[None]), grid)[0]
    np.testing.assert_array_equal(cell_labels(label, size, size, grid), expected)


def test_cells_of_a_resized_image_find_their_labels():
    """The image half as large as its label, padded to 32x32: cells of the padding have none."""
    label = np.arange(40, dtype=np.uint8)[:, None].repeat(60, 1)
    cells = cell_labels(label, (20, 30), (32, 32), (8, 8))
    np.testing.assert_array_equal(cells[:5, 0], [0, 8, 16, 24, 32])
    assert np.all(cells[5:] == IGNORE_LABEL)
    np.testing.assert_array_equal(cells[0] == IGNORE_LABEL, [False] * 8)


def test_images_are_drawn_from_a_long_split(monkeypatch):
    source = [{"name": str(i).encode()} for i in range(20)]
    assert [*drawn_images(source)] == source
    monkeypatch.setattr(embed, "MAX_IMAGES", 5)
    drawn = drawn_images(source)
    assert len(drawn) == 5 and drawn.indices == tuple(sorted(set(drawn.indices)))
    assert drawn.indices == drawn_images(source).indices != (0, 1, 2, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ce", "contrast"])
@pytest.mark.parametrize("eval_batch_size", [2, 4])
def test_vectors_are_those_of_the_drawn_cells(tmp_path, variant, eval_batch_size):
    overrides = (f"data.prepared_dir={tmp_path}", f"eval.batch_size={eval_batch_size}")
    setup = setup_of(make_config(*overrides, variant=variant))
    variables, source = initial_variables(setup), open_split(setup.data, "val")
    evaluator = make_evaluator(setup, source, "val")
    grids = coarsest_maps([evaluator])
    maps = label_maps(evaluator, grids)
    pixels = draw_pixels(maps)
    vectors = read_vectors(evaluator, variables, pixels, grids)
    assert vectors.keys() == {"features", *(["embedding"] if variant == "contrast" else [])}
    for image_id, record in enumerate(source):
        image = pad(decode_image(record["image"], "x"), (64, 64), setup.preprocessing.pad_color)
        label = pad(decode_mask(record["label"], "x"), (64, 64), IGNORE_LABEL)
        embedding, features = describe_pixels(
            setup.model, variables, normalize(jnp.asarray(image[None]), setup.image_format)
        )
        expected = {"embedding": embedding, "features": features}
        grid = features.shape[1:3]
        np.testing.assert_array_equal(
            maps[image_id], label_at_stride(jnp.asarray(label[None]), grid)[0]
        )
        of_image = pixels.image == image_id
        rows, columns = pixels.cell[of_image].T
        for kind, values in vectors.items():
            of_cells = np.asarray(expected[kind])[0, rows, columns]
            np.testing.assert_allclose(values[of_image], of_cells, rtol=1e-3, atol=1e-4)


def test_a_finer_map_is_read_where_a_label_would_be(monkeypatch):
    """Cell i of 3 lies at floor(i · 8 / 3) of 8, and at i of 3."""
    setup = setup_of(make_config(variant="ce"))
    places = jnp.array([[[0, 0], [1, 2], [2, 1]]], jnp.int32)
    image = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    for side, expected in ((8, [[0, 0], [2, 5], [5, 2]]), (3, [[0, 0], [1, 2], [2, 1]])):
        marks = jnp.stack(jnp.mgrid[:side, :side].astype(jnp.float32), axis=-1)[None]
        monkeypatch.setattr(embed, "describe_pixels", lambda *_, x=marks: (None, x))
        found = pixel_vectors({}, image, places, setup=setup, grid=(3, 3))
        np.testing.assert_array_equal(found["features"][0], expected)


@pytest.fixture(scope="module")
def two_runs(trained, tmp_path_factory):
    """A run with cross entropy alone beside the one with a bank, on one device."""
    config, workdir = trained
    plain = tmp_path_factory.mktemp("plain") / "plain"
    prepared = config.data.prepared_dir
    train(setup_of(make_config(f"data.prepared_dir={prepared}", variant="ce")), plain)
    return plain, workdir


def setups_of(workdirs):
    config = json.loads((workdirs[0] / "config.json").read_text())
    prepared = f"data.prepared_dir={config['data']['prepared_dir']}"
    return [setup_of(make_config(prepared, variant=variant)) for variant in ("ce", "memory")]


@pytest.mark.slow
def test_the_page_of_two_runs(two_runs, tmp_path):
    main = [sys.executable, str(ROOT / "tests" / "helpers" / "toy_main.py"), "--mode=embed"]
    runs = [f"--runs={workdir}" for workdir in two_runs]
    result = run([*main, *runs, "--checkpoint=best", f"--output={tmp_path / 'out'}"])
    assert result.returncode == 0, result.stderr
    assert "run, features before the logits" in result.stderr
    results = json.loads((tmp_path / "out" / "embedding.json").read_text())
    plain, contrast = results["runs"]
    assert (plain["name"], plain["shown"]) == ("plain", "features")
    assert (contrast["name"], contrast["shown"]) == ("run", "embedding")
    assert plain["scores"].keys() == {"features"}
    assert contrast["scores"].keys() == {"features", "embedding"}
    assert contrast["sizes"]["embedding"] == 16
    num_pixels = results["num_pixels"]
    assert num_pixels > 100
    for numbers in (*results["pixels"].values(), plain["map"], contrast["map"]):
        assert len(numbers) == num_pixels
    with Image.open(tmp_path / "out" / "embedding.png") as picture:
        assert picture.width == 1200 and 600 < picture.height < 800
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert "data:image/png;base64," in (tmp_path / "out" / "embedding.html").read_text()

    absent = run([*main, *runs, "--checkpoint=77", f"--output={tmp_path / 'other'}"])
    assert absent.returncode == 1
    assert f"--runs={two_runs[0]}: --checkpoint=77: must be latest, best or one of" in absent.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_results_lie_in_the_first_run_by_default_and_are_replaced(two_runs):
    folder = two_runs[0] / "embedding"
    for number in (2, 1):
        embed_runs(setups_of(two_runs)[:number], two_runs[:number], "latest")
        written = sorted(path.name for path in folder.iterdir())
        assert written == ["embedding.html", "embedding.json", "embedding.png"]
        assert len(json.loads((folder / "embedding.json").read_text())["runs"]) == number


@pytest.mark.slow
def test_an_output_that_cannot_be_a_folder(two_runs, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"^--output=\S+file: cannot be written \(.*File exists"):
        embed_runs(setups_of(two_runs), two_runs, "latest", tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes with labelled pixels: none; a silhouette needs at least 2"),
        ([1], "classes with labelled pixels: class_1; a silhouette needs at least 2"),
        ([0, 2], "has 2 labelled pixels at the stride of the networks; a map needs at least 8"),
    ],
)
def test_labels_of_which_no_map_can_be_made(two_runs, tmp_path, monkeypatch, classes, message):
    mask = np.full((48, 64), IGNORE_LABEL, np.uint8)
    mask[0, : 16 * len(classes) : 16] = classes
    source = open_split(setups_of(two_runs)[0].data, "val")
    masked = [{**source[0], "label": encode_png(mask)}]
    monkeypatch.setattr(embed, "open_split", lambda *_: masked)
    with pytest.raises(InputError, match=f"^synthetic, split val: {message}$"):
        embed_runs(setups_of(two_runs), two_runs, "latest", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_values_that_are_not_finite_are_named(two_runs, tmp_path, monkeypatch):
    def broken(*_):
        return {"features": np.full((200, 3), np.inf, np.float32)}

    monkeypatch.setattr(embed, "read_vectors", broken)
    with pytest.raises(FloatingPointError, match="^plain: features of step 6 are not finite"):
        embed_runs(setups_of(two_runs), two_runs, "latest", tmp_path / "out")
