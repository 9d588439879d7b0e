"""Scores and maps of the vectors of pixels, against literal NumPy and scikit-learn."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import silhouette_samples

from contrastseg_jax.data.spec import LabelMap
from contrastseg_jax.report import embedding, embedding_page

CLASSES = LabelMap(
    ("red", "<green>", "absent", "_blue"),
    ((255, 0, 0), (0, 255, 0), (200, 0, 200), (0, 0, 255)),
    {i: i for i in range(4)},
)


@pytest.fixture
def vectors():
    """Of three of four classes, one of them with a single pixel, and one vector without length."""
    rng = np.random.default_rng(0)
    label = np.array([0] * 9 + [1] * 6 + [3], np.uint8)
    values = rng.normal(size=(4, 5))[label] + rng.normal(size=(16, 5))
    values[2] = 0
    return values.astype(np.float32), label


def cosine(a, b):
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / lengths if lengths else 0.0


def test_cosines_are_means_over_pairs(vectors):
    values, label = vectors
    pairs = [
        (label[i], label[j], cosine(values[i], values[j]))
        for i in range(16)
        for j in range(16)
        if i != j
    ]
    result = embedding.mean_cosines(values, label, 4)
    assert result.intra == pytest.approx(np.mean([c for a, b, c in pairs if a == b]))
    assert result.inter == pytest.approx(np.mean([c for a, b, c in pairs if a != b]))
    for class_id in (0, 1):
        expected = np.mean([c for a, b, c in pairs if a == b == class_id])
        assert result.intra_of[class_id] == pytest.approx(expected)
    for class_id in (0, 1, 3):
        expected = np.mean([c for a, b, c in pairs if a == class_id != b])
        assert result.inter_of[class_id] == pytest.approx(expected)
    assert np.isnan(result.intra_of[2:]).all()  # no pixel, and one
    assert np.isnan(result.inter_of[2])


def test_silhouette_is_that_of_scikit_learn(vectors):
    values, label = vectors
    expected = silhouette_samples(values, label, metric="cosine")
    result = embedding.silhouette(values, label, 4)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert result[15] == 0  # the only one of its class
    far = embedding.silhouette(np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), 2)
    np.testing.assert_array_equal(far, 1)
    same = embedding.silhouette(np.ones((4, 3)), np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_a_silhouette_needs_two_classes():
    with pytest.raises(ValueError, match="two classes"):
        embedding.silhouette(np.ones((4, 3)), np.zeros(4, np.int64), 2)


def test_scores_are_of_all_pixels_and_of_the_classes_that_have_some(vectors):
    values, label = vectors
    scores = embedding.scores(values, label, CLASSES.names)
    assert [*scores["classes"]] == ["red", "<green>", "_blue"]
    expected = silhouette_samples(values, label, metric="cosine")
    assert scores["silhouette"] == pytest.approx(expected.mean())
    assert scores["classes"]["red"]["silhouette"] == pytest.approx(expected[:9].mean())


def test_a_map_keeps_groups_together_and_is_the_same_again():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, 2], 20)
    values = 3 * np.eye(3, 8)[label] + rng.normal(scale=0.1, size=(60, 8))
    values *= rng.uniform(0.1, 10, size=(60, 1))  # lengths do not matter
    places = embedding.tsne(values)
    np.testing.assert_array_equal(embedding.tsne(values), places)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    nearest = np.argsort(distances, axis=1)[:, 1:6]
    assert np.all(label[nearest] == label[:, None])


@pytest.mark.parametrize("shape", [(8, 1), (8, 16), (40, 2)])
@pytest.mark.parametrize("collapsed", [False, True])
def test_a_map_of_few_values_or_of_equal_vectors_is_finite(shape, collapsed):
    values = np.random.default_rng(0).normal(size=shape)
    places = embedding.tsne(values[:1].repeat(len(values), 0) if collapsed else values)
    assert places.shape == (shape[0], 2) and np.isfinite(places).all()


def results_of(vectors, names):
    values, label = vectors
    scores = embedding.scores(values, label, CLASSES.names)
    places = np.random.default_rng(0).normal(size=(len(label), 2)).tolist()
    run = {"network": "toy", "step": 6, "shown": "features", "sizes": {"features": 5}}
    run |= {"scores": {"features": scores}, "map": places}
    return {
        "data": "synthetic",
        "split": "val",
        "num_images": 3,
        "num_pixels": len(label),
        "perplexity": 5.0,
        "runs": [{"name": name, **run} for name in names],
        "pixels": {"image": ["a"] * len(label), "cell": [[0, 0]] * 16, "label": label.tolist()},
    }


@pytest.mark.parametrize("num_runs", [1, 2, 4])
def test_the_picture_has_a_panel_for_each_run_in_the_colours_of_the_classes(
    vectors, tmp_path, num_runs
):
    names = [f"$run_{i}" for i in range(num_runs)]
    embedding_page.save_maps(tmp_path / "x.png", results_of(vectors, names), CLASSES)
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.array(picture.convert("RGB"))
    assert pixels.shape[1] == 600 * min(num_runs, 3)
    assert pixels.shape[0] > 600 * (1 if num_runs < 4 else 2)
    width = pixels.shape[1] // min(num_runs, 3)
    for column in range(min(num_runs, 3)):
        panel = pixels[:650, column * width : (column + 1) * width].reshape(-1, 3)
        for class_id, least in ((0, 80), (1, 50), (3, 8)):
            found = (panel == CLASSES.palette[class_id]).all(axis=1).sum()
            assert found >= least, (column, class_id)
        assert not (panel == CLASSES.palette[2]).all(axis=1).any()
    legend = pixels[-60:].reshape(-1, 3)
    for class_id in (0, 1, 3):
        assert (legend == CLASSES.palette[class_id]).all(axis=1).sum() > 100


def test_the_page_holds_the_picture_and_the_scores(vectors, tmp_path):
    results = results_of(vectors, ["<CE>", "CONTRAST"])
    embedding_page.save_embedding(tmp_path, results, CLASSES)
    page = (tmp_path / "embedding.html").read_text()
    picture = base64.b64encode((tmp_path / "embedding.png").read_bytes()).decode()
    assert f"data:image/png;base64,{picture}" in page
    assert "&lt;CE&gt;, features before the logits" in page and "<CE>" not in page
    silhouette = results["runs"][0]["scores"]["features"]["silhouette"]
    assert page.count(f"<td>{silhouette:.3f}</td>") >= 2
    assert "&lt;green&gt;" in page and "absent" not in page
    assert "<td>nan" not in page  # of the class with one pixel: no pair
    stored = json.loads((tmp_path / "embedding.json").read_text())
    assert stored["runs"][0]["scores"]["features"]["classes"]["_blue"]["intra_cosine"] is None
    assert stored["runs"][1]["map"] == results["runs"][1]["map"]
