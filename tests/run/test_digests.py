"""A digest against splitmix64 in Python's own integers; the same however an array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from contrastseg_jax.parallel import sharding
from contrastseg_jax.run import digests

MASK = 2**64 - 1


def splitmix64(counter):
    z = (counter + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def literal(array):
    total = 0
    for place, element in enumerate(array.reshape(-1)):
        bits = int.from_bytes(element.tobytes(), "little")
        total += splitmix64((bits + place * 0x9E3779B97F4A7C15) & MASK)
    return f"{total & MASK:016x}"


def test_splitmix64_is_that_of_its_authors():
    """The first numbers of the generator with seed 1234567, as published with splitmix64.c."""
    state, numbers = 1234567, []
    for _ in range(2):
        numbers.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert numbers == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_a_digest_is_the_same_on_any_devices(dtype):
    array = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(jnp.dtype(dtype))
    expected = f"{dtype}[3,8,5] {literal(array)}"
    assert digests.array_digest(array) == expected
    assert digests.array_digest(np.asfortranarray(array)) == expected
    for devices, spec in ((1, ()), (2, ()), (2, (None, "data"))):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert digests.state_digests({"x": [placed]}) == {"x.0": expected}


def test_arrays_of_no_and_of_many_elements(monkeypatch):
    assert digests.array_digest(np.zeros((0, 3), np.float32)) == f"float32[0,3] {0:016x}"
    one = np.float32(3)
    assert digests.array_digest(np.asarray(one)) == f"float32[] {literal(np.asarray(one))}"
    array = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    whole = digests.array_digest(array)
    monkeypatch.setattr(digests, "BLOCK_SIZE", 5)  # in many pieces
    assert digests.array_digest(array) == whole
    parts = sum(digests.part_sum(array[i : i + 3], (i, 0), array.shape) for i in (0, 3, 6))
    assert digests.format_digest(array.dtype, array.shape, parts) == whole


def test_what_changes_a_digest():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    swapped, negative = array.copy(), array.copy()
    swapped[0, 0], swapped[2, 3] = array[2, 3], array[0, 0]
    negative[0, 0] = -0.0
    others = [swapped, negative, array.reshape(4, 3), array.view(np.int32), array.T]
    assert len({digests.array_digest(other) for other in (array, *others)}) == 6
