"""What a run says of itself."""

import numpy as np
from small import make_config

from contrastseg_jax.training.progress import data_advice, interval_means


def test_steps_that_compare_nothing_have_no_part_in_the_means_of_the_contrast():
    """Zeros of the contrast's warm-up, or of crops without a pair, are not measured ones."""
    nothing = {"loss": 3.0, "contrast": 0.0, "positive_similarity": 0.0, "positives_per_anchor": 0}
    pairs = {"loss": 5.0, "contrast": 8.0, "positive_similarity": 0.5, "positives_per_anchor": 2}
    means = {"contrast": 8.0, "positive_similarity": 0.5, "positives_per_anchor": 2}
    assert interval_means([nothing, pairs]) == {"loss": 4.0, **means}
    assert interval_means([nothing, nothing]) == {"loss": 3.0}
    assert interval_means([]) == {}
    assert interval_means([{"loss": 3.0}, {"loss": 4.0}]) == {"loss": 3.5}
    lost = pairs | {"contrast": np.nan}
    assert np.isnan(interval_means([pairs, lost])["contrast"])


def test_a_run_that_waits_for_data_is_told_what_to_raise():
    config = make_config("data.num_workers=3", "data.cache_size=40")
    assert data_advice(0.2, config) == ""
    advice = data_advice(0.43, config)
    assert "waits for data 43% of the time" in advice
    for setting in ("num_threads (now 2)", "num_workers (now 3)", "cache_size (now 40)"):
        assert f"data.{setting}" in advice
