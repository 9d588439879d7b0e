"""A network loaded from Python: a run's, or one of converted weights; images of every kind."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from contrastseg_jax.data.dataset import dataset_spec, open_split
from contrastseg_jax.errors import InputError
from contrastseg_jax.library import load
from contrastseg_jax.ops.resize import resize_bilinear
from contrastseg_jax.weights.convert import convert_run


@pytest.fixture(scope="module")
def network(trained):
    return load(trained[1], checkpoint="latest")


@pytest.fixture(scope="module")
def photo(trained):
    data = open_split(dataset_spec(trained[0]), "val")[0]["image"]
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_it_knows_its_classes(network):
    assert network.class_names == network.preprocessing.label_map.names
    assert len(network.palette) == len(network.class_names)


def test_the_three_outputs_belong_together(network, photo):
    """At the size of the image, whose sides no stride divides."""
    image = photo[:37, :51]
    logits, shares = network.logits(image), network.probabilities(image)
    assert logits.shape == shares.shape == (37, 51, len(network.class_names))
    assert logits.dtype == shares.dtype == np.float32
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(shares, exponent / exponent.sum(-1, keepdims=True), rtol=1e-4)
    prediction = network.predict(image)
    assert prediction.dtype == np.uint8 and prediction.shape == (37, 51)
    np.testing.assert_array_equal(prediction, logits.argmax(-1))


def test_logits_are_the_networks_resized(network, photo):
    padded = np.zeros((64, 64, 3), np.uint8)
    padded[:] = network.preprocessing.pad_color
    padded[:40, :50] = photo[:40, :50]
    at_stride = network.logits_fn(padded[None])
    expected = resize_bilinear(jax.numpy.asarray(at_stride), (64, 64))[0, :40, :50]
    np.testing.assert_allclose(network.logits(photo[:40, :50]), expected, atol=1e-5)


def test_files_arrays_stacks_and_lists_are_taken(network, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.png")
    alone = network.predict(photo)
    np.testing.assert_array_equal(network.predict(tmp_path / "a.png"), alone)
    np.testing.assert_array_equal(network.predict(str(tmp_path / "a.png")), alone)
    np.testing.assert_array_equal(network.predict(jax.numpy.asarray(photo)), alone)
    stack = network.predict(np.stack([photo, photo[::-1]]))
    assert isinstance(stack, np.ndarray) and stack.shape == (2, *photo.shape[:2])
    np.testing.assert_array_equal(stack[0], alone)
    several = network.predict([tmp_path / "a.png", photo[:20, :33]])
    assert isinstance(several, list) and several[1].shape == (20, 33)
    np.testing.assert_array_equal(several[0], alone)
    assert network.predict(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1)


def test_converted_weights_are_loaded_as_the_run_they_come_from(trained, network, photo, tmp_path):
    convert_run(trained[1], "latest", tmp_path / "weights")
    converted = load(tmp_path / "weights")
    assert converted.class_names == network.class_names
    np.testing.assert_allclose(
        converted.logits(photo[:32, :32]), network.logits(photo[:32, :32]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 of shape \(4, 4, 3\): must be uint8"),
        (np.zeros((4, 4), np.uint8), r"uint8 of shape \(4, 4\): must be uint8, \(height"),
        (np.zeros((1, 4, 4, 4), np.uint8), r"\(1, 4, 4, 4\): must be"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\): must have pixels"),
    ],
)
def test_arrays_that_are_no_images_are_refused(network, images, expected):
    with pytest.raises(ValueError, match=expected):
        network.predict(images)


def test_files_that_are_no_images_are_named(network, tmp_path):
    (tmp_path / "x.jpg").write_text("no image")
    for path, expected in ((tmp_path / "none.jpg", "No such file"), (tmp_path / "x.jpg", "x.jpg")):
        with pytest.raises(InputError, match=expected):
            network.predict(path)


def test_folders_without_a_network_are_named(trained, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="must be a run with a checkpoint, or a folder written"):
        load(tmp_path)
    with pytest.raises(InputError, match="checkpoint"):
        load(trained[1], checkpoint="77")
