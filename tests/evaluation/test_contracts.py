"""The contracts of a metric and of a protocol, by one of a few lines each."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from small import setup_of

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.evaluation.evaluate import evaluate, make_evaluator
from contrastseg_jax.evaluation.metrics import METRICS, Metric
from contrastseg_jax.evaluation.protocols import protocol_name, whole_image
from contrastseg_jax.report.image_counts import read_image_counts
from contrastseg_jax.setup.resolve import load_network

pytestmark = pytest.mark.slow


def count_pixels(label, prediction, *, num_classes):
    return {
        "labelled": jnp.sum(label < num_classes, dtype=jnp.int32),
        "first": jnp.sum((prediction == 0) & (label < num_classes), dtype=jnp.int32),
    }


def share_of_first(counts, class_names):
    return {"first": class_names[0], "share": float(counts["first"] / counts["labelled"])}


@pytest.fixture
def scored(trained, tmp_path):
    """Scores of the small run, with a protocol."""
    config, workdir = trained
    setup = setup_of(config)
    variables, step = load_network(setup, workdir, "latest")
    source = open_split(setup.data, "val")

    def score(**settings):
        evaluator = make_evaluator(setup, source, "val", **settings)
        return evaluate(evaluator, variables, step, folder=tmp_path, workdir=workdir)

    return score


def test_a_metric_is_counted_beside_the_others(scored, monkeypatch):
    monkeypatch.setitem(METRICS, "share", Metric(count_pixels, share_of_first))
    results = scored()
    predicted = np.sum(results["confusion"], axis=0)
    assert results["first"] == "class_0"
    assert results["share"] == pytest.approx(predicted[0] / predicted.sum())


def test_a_protocol_combines_the_logits_of_several_passes(scored, tmp_path):
    """Of an image and its mirror image, with weights that show which was which."""

    def mirrored_alone(network, image):
        mirrored = network(image[:, :, ::-1])[:, :, ::-1]
        return mirrored + 0.0 * network(image)

    plain, mirrored = scored(), scored(protocol=mirrored_alone)
    assert read_image_counts(tmp_path).protocol == "mirrored_alone"
    assert np.sum(plain["confusion"]) == np.sum(mirrored["confusion"])
    assert plain["confusion"] != mirrored["confusion"]  # a network of few steps is not symmetric

    def back_again(network, image):
        return mirrored_alone(lambda x: network(x[:, :, ::-1])[:, :, ::-1], image)

    again = scored(protocol=back_again)
    assert np.abs(np.subtract(plain["confusion"], again["confusion"])).sum() <= 2


def test_a_protocol_is_named_with_its_settings():
    assert protocol_name(whole_image) == "whole_image"
    scaled = functools.partial(whole_image, scales=(0.5, 1.0))
    assert protocol_name(scaled) == "whole_image(scales=(0.5, 1.0))"
