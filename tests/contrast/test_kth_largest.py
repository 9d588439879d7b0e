"""The k-th largest value against a sort, of whole rows and of rows over two devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastseg_jax.contrast.devices import AXIS, Split
from contrastseg_jax.contrast.kth_largest import kth_largest, kth_largest_approximate
from contrastseg_jax.parallel import sharding


def rows_with_ties():
    """Values of both signs, zeros, the masked ones of a selection, and some twice."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 40)).astype(np.float32) * 10.0 ** rng.integers(-20, 20, (5, 40))
    values[:, 1], values[:, 5], values[:, 9:20] = 0.0, -1e30, values[:, 20:31]
    return values.astype(np.float32), np.array([1, 2, 11, 30, 40], np.int32)


@pytest.mark.parametrize("find", [kth_largest, kth_largest_approximate])
def test_it_is_that_of_a_sort(find):
    values, k = rows_with_ties()
    if find is kth_largest_approximate:
        find = functools.partial(find, largest_k=40)
    expected = np.take_along_axis(-np.sort(-values), k[:, None] - 1, axis=1)[:, 0]
    found = jax.jit(functools.partial(find, split=Split.NOTHING))(values, k)
    np.testing.assert_array_equal(found, expected)
    over_devices = jax.shard_map(
        functools.partial(find, split=Split.CANDIDATES),
        mesh=sharding.make_mesh(jax.devices()[:2]),
        in_specs=(PartitionSpec(None, AXIS), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    found = jax.jit(over_devices)(jnp.asarray(values), jnp.asarray(k))
    np.testing.assert_array_equal(found, expected)
