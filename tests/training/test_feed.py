"""What the step is fed with."""

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from small import make_config, setup_of

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.subset import image_names
from contrastseg_jax.errors import InputError
from contrastseg_jax.training.feed import make_batches
from contrastseg_jax.training.start import open_data


def test_every_variant_sees_the_same_batches(tmp_path):
    """So that runs of one seed can be compared pair by pair."""
    seen = {}
    for variant in ("ce", "contrast", "memory"):
        prepared = f"data.prepared_dir={tmp_path / 'prepared'}"
        setup = setup_of(make_config(prepared, "train.num_steps=5", variant=variant))
        with closing(make_batches(setup, open_split(setup.data, "train"), 2)) as batches:
            seen[variant] = list(islice(batches, 3))
    for others in (seen["contrast"], seen["memory"]):
        for batch, other in zip(seen["ce"], others, strict=True):
            for field in ("image", "label", "example_id"):
                np.testing.assert_array_equal(getattr(batch, field), getattr(other, field))


def test_training_reads_the_part_that_is_named(tmp_path, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    prepared = f"data.prepared_dir={tmp_path / 'prepared'}"
    whole, _ = open_data(setup_of(make_config(prepared)))
    part, evaluator = open_data(setup_of(make_config(prepared, "data.train_subset=4")))
    assert len(part) == 4 and set(image_names(part)) < set(image_names(whole))
    assert len(evaluator.source) == 3
    assert "4 training images of 6, by data.train_subset = '4'; 3 validation" in caplog.text
    with pytest.raises(InputError, match="data.train_subset = '7': must be at most 6"):
        open_data(setup_of(make_config(prepared, "data.train_subset=7")))
