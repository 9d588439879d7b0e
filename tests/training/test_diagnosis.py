"""Known failures of contrast are said, and a healthy run is left alone."""

import math

import pytest
from small import make_config

from contrastseg_jax.training.diagnosis import symptoms

HEALTHY = {
    "contrast": 2.0,
    "negatives_per_anchor": 500.0,
    "positive_similarity": 0.8,
    "negative_similarity": 0.1,
    "gradient_ratio": 0.2,
    "memory_age": 40.0,
}
# T / T_base is 0.1 / 0.07
FLOOR = math.log(501) / 0.7
SETTINGS = ("train.num_steps=1000", "contrast.warmup_steps=100", "contrast.ramp_steps=100")


@pytest.mark.parametrize(
    ("changed", "name", "text"),
    [
        ({}, None, ""),
        ({"negative_similarity": 0.76}, "collapse", "no more similar (0.80) than negatives (0.76)"),
        ({"contrast": FLOOR}, "floor", "is that of embeddings that tell nothing apart, log(1 + n"),
        ({"contrast": 0.97 * FLOOR}, None, ""),
        ({"memory_age": 1500.0}, "stale", "are 1500 steps old on average"),
        ({"gradient_ratio": 0.002}, "weight", "2.0e-03 of that of the segmentation loss"),
    ],
)
def test_each_failure_has_its_sentence(changed, name, text):
    found = symptoms(HEALTHY | changed, 900, make_config(*SETTINGS))
    assert list(found) == ([name] if name else [])
    assert all(text in sentence for sentence in found.values())


@pytest.mark.parametrize(("step", "is_judged"), [(279, False), (281, True)])
def test_contrast_is_given_time(step, is_judged):
    """A tenth of the steps after its warm-up and ramp."""
    found = symptoms(HEALTHY | {"memory_age": 1e4}, step, make_config(*SETTINGS))
    assert bool(found) is is_judged


def test_a_run_without_contrast_has_no_symptoms():
    assert symptoms({"loss": 1.0, "cross_entropy": 1.0}, 900, make_config(variant="ce")) == {}


def test_the_weight_is_not_judged_where_contrast_trains_alone():
    config = make_config(*SETTINGS, "loss.segmentation_weight=0.0")
    assert symptoms(HEALTHY | {"gradient_ratio": 0.0}, 900, config) == {}
