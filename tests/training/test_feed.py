"""What the step is fed with."""

from contextlib import closing
from itertools import islice

import numpy as np
from small import make_config, setup_of

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.training.feed import make_batches


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
