"""Several scales, flips and windows, against literal versions with PIL and loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import make_config, setup_of

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation.evaluate import evaluate, evaluate_run, make_evaluator
from contrastseg_jax.evaluation.loaded_network import load_setup
from contrastseg_jax.evaluation.protocols import (
    configured,
    multi_scale,
    protocol_name,
    sliding_window,
    whole_image,
)
from contrastseg_jax.setup.resolve import load_network

STRIDE, CLASSES = 4, 3
KERNEL = np.random.default_rng(1).normal(size=(5, 5, 3, CLASSES)).astype(np.float32)


def network(image):
    """A convolution of stride 4, whose cells see their surroundings: of any size."""
    return jax.lax.conv_general_dilated(
        jnp.asarray(image, jnp.float32) / 255,
        jnp.asarray(KERNEL),
        (STRIDE, STRIDE),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def photos(height, width, number=2):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (number, height, width, 3), np.uint8)


def interpolated(logits, row, column):
    """Bilinear, at a place in units of cells."""
    top, left = int(row), int(column)
    bottom, right = min(top + 1, logits.shape[0] - 1), min(left + 1, logits.shape[1] - 1)
    v, h = row - top, column - left
    upper = (1 - h) * logits[top, left] + h * logits[top, right]
    lower = (1 - h) * logits[bottom, left] + h * logits[bottom, right]
    return (1 - v) * upper + v * lower


def resized(array, height, width):
    """Aligned corners, one cell at a time."""
    rows = np.linspace(0, array.shape[0] - 1, height)
    columns = np.linspace(0, array.shape[1] - 1, width)
    return np.array([[interpolated(array, r, c) for c in columns] for r in rows])


def pil_resized(image, height, width):
    bands = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(3)]
    done = [np.asarray(b.resize((width, height), Image.Resampling.BILINEAR)) for b in bands]
    return np.stack(done, axis=-1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(24, 32), (27, 41)])
def test_scales_and_flips_are_the_literal_mean(size, flip):
    image, scales = photos(*size), (0.5, 1.0, 1.75)
    protocol = functools.partial(multi_scale, each=whole_image, scales=scales, flip=flip)
    found = jax.jit(functools.partial(protocol, network))(image)
    for photo, logits in zip(image, found, strict=True):
        total, grid = [], logits.shape[:2]
        for scale in scales:
            height, width = round(scale * size[0]), round(scale * size[1])
            seen = pil_resized(photo, height, width) if scale != 1 else photo
            passes = [seen, seen[:, ::-1]] if flip else [seen]
            for number, one in enumerate(passes):
                own = np.asarray(network(one[None]))[0]
                total.append(resized(own[:, ::-1] if number else own, *grid))
        np.testing.assert_allclose(logits, np.mean(total, axis=0), atol=2e-4)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize(("size", "window"), [((40, 64), (32, 32)), ((37, 50), (32, 64))])
def test_windows_are_the_literal_mean(size, window, overlap):
    image = photos(*size)
    protocol = functools.partial(sliding_window, window=window, overlap=overlap)
    found = np.asarray(jax.jit(functools.partial(protocol, network))(image))
    grid = found.shape[1:3]
    positions = [np.linspace(0, side - 1, cells) for side, cells in zip(size, grid, strict=True)]
    total, number = np.zeros(found.shape), np.zeros(grid)
    height, width = (min(pair) for pair in zip(size, window, strict=True))
    for top in starts(size[0], height, overlap):
        for left in starts(size[1], width, overlap):
            part = image[:, top : top + height, left : left + width]
            own = np.asarray(network(part))
            for r, c in np.ndindex(*grid):
                y, x = positions[0][r] - top, positions[1][c] - left
                if -0.5 <= y < height - 0.5 and -0.5 <= x < width - 0.5:
                    row = np.clip(y / (height - 1), 0, 1) * (own.shape[1] - 1)
                    column = np.clip(x / (width - 1), 0, 1) * (own.shape[2] - 1)
                    number[r, c] += 1
                    for b in range(len(image)):
                        total[b, r, c] += interpolated(own[b], row, column)
    assert number.min() >= 1
    np.testing.assert_allclose(found, total / number[..., None], atol=1e-4)


def starts(size, window, overlap):
    step, found = round(window * (1 - overlap)), [0]
    while found[-1] + window < size:
        found.append(min(found[-1] + step, size - window))
    return found


def test_a_window_as_large_as_the_image_is_the_whole_image():
    image = photos(24, 30)
    found = sliding_window(network, jnp.asarray(image), window=(64, 64), overlap=0.5)
    np.testing.assert_allclose(found, network(image), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ((), "whole_image"),
        (("eval.flip=True",), "multi_scale(each=whole_image, scales=(1.0,), flip=True)"),
        (("eval.window=(64, 64)",), "sliding_window(window=(64, 64), overlap=0.5)"),
        (
            ("eval.window=(64, 64)", "eval.scales=(0.5, 1.0)"),
            "multi_scale(each=sliding_window(window=(64, 64), overlap=0.5), scales=(0.5, 1.0),"
            " flip=False)",
        ),
    ],
)
def test_settings_choose_the_protocol(settings, name):
    assert protocol_name(configured(make_config(*settings))) == name


def test_evaluation_and_prediction_see_an_image_alike(trained, tmp_path):
    """By all of it at once, on one and on two devices."""
    _, workdir = trained
    settings = ("eval.scales=(0.75, 1.0)", "eval.flip=True", "eval.window=(32, 48)")
    config = make_config(*settings)
    results = []
    for num_devices in (1, 2):
        setup = setup_of(config, num_devices=num_devices)
        source = open_split(setup.data, "val")
        variables, step = load_network(setup, workdir, "latest")
        evaluator = make_evaluator(setup, source, "val")
        folder = tmp_path / str(num_devices)
        results.append(evaluate(evaluator, variables, step, folder=folder, workdir=workdir))
    assert results[0]["confusion"] == results[1]["confusion"]
    network = load_setup(setup_of(config, num_devices=1), workdir, "latest")
    predicted = np.zeros(len(network.class_names), int)
    for record in source:
        (tmp_path / "x.png").write_bytes(record["image"])
        with Image.open(tmp_path / "x.png") as image:
            prediction = network.predict(np.asarray(image))
        (tmp_path / "x.png").write_bytes(record["label"])
        with Image.open(tmp_path / "x.png") as label:
            known = np.asarray(label) != 255
        predicted += np.bincount(prediction[known], minlength=len(predicted))
    np.testing.assert_array_equal(np.sum(results[0]["confusion"], axis=0), predicted)


def test_scores_of_another_protocol_are_kept_apart(trained, tmp_path):
    _, workdir = trained
    setup = setup_of(make_config("eval.flip=True"))
    with pytest.raises(InputError, match=r"eval.flip = True \(the run: False\): .*--output=FOLDER"):
        evaluate_run(setup, workdir, "latest", "val")
    evaluate_run(setup, workdir, "latest", "val", tmp_path / "out")
    assert (tmp_path / "out" / "metrics.json").is_file()
