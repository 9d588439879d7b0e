"""What a run says of itself."""

import jax.numpy as jnp
import numpy as np
import pytest
from small import make_config

from contrastseg_jax.progress import data_advice, require_finite


def test_a_loss_that_is_not_finite_stops_the_run():
    history = [{"loss": jnp.asarray(1.0)}, {"loss": jnp.asarray(np.inf)}]
    with pytest.raises(FloatingPointError, match="last 2 steps before step 11"):
        require_finite(history, 10)
    require_finite(history[:1], 9)


def test_a_run_that_waits_for_data_is_told_what_to_raise():
    config = make_config("data.num_workers=3", "data.cache_size=40")
    assert data_advice(0.2, config) == ""
    advice = data_advice(0.43, config)
    assert "waits for data 43% of the time" in advice
    for setting in ("num_threads (now 2)", "num_workers (now 3)", "cache_size (now 40)"):
        assert f"data.{setting}" in advice
