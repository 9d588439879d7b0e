"""Known failures of contrast are said, and a healthy run is left alone."""

import json
import math

import pytest
from small import make_config

from contrastseg_jax.evaluation.diagnosis import logged_symptoms, symptoms

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
        (
            {"negative_similarity": 0.76},
            "collapse",
            "hardly more similar (0.80) than negatives (0.7",
        ),
        (
            {"contrast": FLOOR},
            "floor",
            "of embeddings that do not separate the classes, 8.88;",
        ),
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


@pytest.mark.parametrize("selection", ["hardest", "semi_hard"])
def test_pairs_chosen_for_being_hard_are_no_symptom(selection):
    """Of an embedding that separates its classes well, they look collapsed."""
    values = HEALTHY | {"positive_similarity": 0.1, "negative_similarity": 0.3, "contrast": 12.0}
    config = make_config(*SETTINGS, f"contrast.negatives={selection}")
    assert symptoms(values, 900, config) == {}
    assert "collapse" in symptoms(values, 900, make_config(*SETTINGS))


def test_another_objective_has_metrics_of_its_own():
    assert symptoms({"contrast": 1.0, "loss": 2.0}, 900, make_config(*SETTINGS)) == {}


def test_what_a_run_had_logged_last_until_a_step_counts(tmp_path):
    config = make_config(*SETTINGS)
    assert logged_symptoms(tmp_path, 900, config) == []  # has logged nothing

    def line(step, changed):
        values = {f"train/{key}": value for key, value in (HEALTHY | changed).items()}
        return json.dumps({"step": step, "train/loss": 1.0, **values}) + "\n"

    (tmp_path / "metrics.jsonl").write_text(
        line(800, {"memory_age": 2000.0})
        + json.dumps({"step": 900, "val/mean_iou": 0.5})
        + "\n"
        + line(950, {"gradient_ratio": None})  # not finite
        + line(1000, {"negative_similarity": 0.8})[:-5]  # by a kill
    )
    (stale,) = logged_symptoms(tmp_path, 900, config)
    assert "are 2000 steps old on average" in stale
    assert logged_symptoms(tmp_path, 700, config) == []
    assert logged_symptoms(tmp_path, 1000, config) == []
