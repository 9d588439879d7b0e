"""What a config makes."""

import jax
import pytest
from small import make_config

from contrastseg_jax import build
from contrastseg_jax.errors import InputError


def test_state_holds_what_the_variant_needs():
    for variant, has_head, has_bank in (
        ("ce", False, False),
        ("contrast", True, False),
        ("memory", True, True),
    ):
        config = make_config(variant=variant)
        model, (tx, _) = build.build_model(config, 3), build.build_optimizer(config)
        state = jax.eval_shape(lambda c=config, m=model, t=tx: build.init_state(c, m, t))
        assert ("proj_head" in state.params) == has_head
        assert (state.memory is not None) == has_bank
        assert state.ema is None


def test_bank_has_the_sizes_of_the_config():
    config = make_config("memory.dtype=bfloat16", "memory.segment_size=0")
    model, (tx, _) = build.build_model(config, 3), build.build_optimizer(config)
    bank = build.init_state(config, model, tx).memory
    assert bank.pixel.shape == (3, 16, 16) and bank.pixel.dtype == "bfloat16"
    assert bank.segment.shape == (3, 0, 16)


def test_the_batch_size_is_checked_where_it_is_used():
    config = make_config("train.batch_size=3")
    build.check(config, mode="eval")
    with pytest.raises(InputError, match="train.batch_size = 3.*2 devices"):
        build.check(config, mode="train")


def test_padding_is_the_mean_colour():
    assert build.pad_color(make_config()) == (124, 116, 104)
