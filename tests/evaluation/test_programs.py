"""Programs are compiled once per shape, forgotten when there are many, refused when too large."""

import jax.numpy as jnp
import numpy as np
import pytest

from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import programs
from contrastseg_jax.parallel import device_memory


def test_one_program_per_shape_and_no_more_than_are_kept(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    traced = []

    def add(x, *, number):
        traced.append((x.shape, number))
        return x + number

    by_shape = programs.by_shape(add)
    for size, number in ((1, 1), (2, 1), (1, 1), (1, 2), (2, 1), (1, 1)):
        result = programs.run(by_shape, np.zeros(size, np.int32), number=number)
        np.testing.assert_array_equal(result, [number] * size)
    assert traced == [((1,), 1), ((2,), 1), ((1,), 2), ((1,), 1)]


@pytest.mark.slow
def test_memory_is_known_before_a_program_runs(monkeypatch):
    def outer(x):
        return jnp.sort(x[:, None] * x[None], axis=0).sum()  # 64 MiB

    by_shape = programs.by_shape(outer)
    x = np.ones(4096, np.float32)
    monkeypatch.setattr(device_memory, "free_bytes", lambda: 1 << 20)
    with pytest.raises(InputError, match=r"needs 0\.\d GiB of memory, 0\.0 GiB are free"):
        by_shape(x)
    monkeypatch.setattr(device_memory, "free_bytes", lambda: 1 << 30)
    assert programs.run(by_shape, x) == 4096**2
