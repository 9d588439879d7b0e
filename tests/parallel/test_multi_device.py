"""The method on 1 to 8 devices, with the bank whole on each or split over them."""

import os
import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from paths import ROOT
from program import TIMEOUT

pytestmark = pytest.mark.multiprocess

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def compute(folder, **settings):
    """Everything that `eight_devices.py` writes: arrays by kind, case and name."""
    path = folder / "results.npz"
    environment = os.environ | {
        "JAX_CACHE": str(ROOT / ".cache" / "jax"),
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "eight_devices.py", path],
        env=environment | settings,
        timeout=TIMEOUT,
        check=True,
    )
    computed = defaultdict(lambda: defaultdict(dict))
    for name, array in np.load(path).items():
        kind, _, rest = name.partition("/")
        case, _, key = rest.rpartition("/")
        computed[kind][case][key] = array
    return computed


@pytest.fixture(scope="module")
def in_float64(tmp_path_factory):
    return compute(tmp_path_factory.mktemp("float64"), FLOAT64="1")


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    return compute(tmp_path_factory.mktemp("float32"))


@pytest.mark.parametrize("strategy", ["all", "random"])
def test_loss_gradient_diagnostics_and_bank_do_not_depend_on_devices(in_float64, strategy):
    """Neither on their number nor on where the bank lies."""
    cases = in_float64[strategy]
    reference = cases.pop("1/replicated")
    assert len(cases) == 3
    assert reference["0"] > 0 and reference["0"].dtype == np.float64
    for case, arrays in cases.items():
        assert arrays.keys() == reference.keys()
        for key, expected in reference.items():
            np.testing.assert_allclose(
                arrays[key], expected, rtol=1e-11, atol=1e-12, err_msg=f"{case}, array {key}"
            )


@pytest.mark.parametrize("strategy", ["semi_hard", "hardest"])
def test_nor_do_selections_by_hardness(in_float32, strategy):
    """But for rounding: of the result, and of embeddings, magnified as it is on one device."""
    cases = in_float32[strategy]
    reference, moved = cases.pop("1/replicated"), cases.pop("moved")
    assert len(cases) == 3
    assert reference["0"] > 0
    for case, arrays in cases.items():
        assert arrays.keys() == reference.keys()
        for key, expected in reference.items():
            by_rounding = np.abs(moved[key] - expected).max()
            by_rounding += np.finfo(np.float32).eps * np.abs(expected).max()
            error = np.abs(arrays[key] - expected).max()
            assert error <= 8 * by_rounding, f"{case}, array {key}"


def test_training_does_not_depend_on_devices(in_float64):
    """Metrics and the whole state, bank included, after three steps."""
    layouts = in_float64["training"]
    reference = layouts.pop("1")
    assert len(layouts) == 2
    assert reference["[0][2]['contrast']"] > 0
    for layout, arrays in layouts.items():
        assert arrays.keys() == reference.keys()
        for path, expected in reference.items():
            np.testing.assert_allclose(
                arrays[path], expected, rtol=1e-8, atol=1e-10, err_msg=f"{layout}: {path}"
            )


@pytest.mark.parametrize("sharding", ["replicated", "slots"])
def test_the_bank_never_travels(in_float32, sharding):
    """No collective of the compiled step moves as much as one device's part of a queue.

    The largest is the all-reduce of the gradient of the largest kernel.
    """
    hlo = str(in_float32["hlo"][""][sharding])
    moved = [
        int(np.prod([int(length) for length in shape.split(",") if length]))
        for result, _ in COLLECTIVE.findall(hlo)
        for shape in re.findall(r"\w+\[([\d,]*)\]", result)
    ]
    num_classes, slots, dim, num_devices = 3, 65536, 16, 8
    part = slots // num_devices if sharding == "slots" else slots
    assert f"f32[{num_classes},{part},{dim}]" in hlo  # the pixel queue of one device
    assert len(moved) > 10
    assert max(moved) < num_classes * dim * slots // num_devices
    # Nor does a device copy it: the new rows go where the old ones were.
    assert not re.search(rf"f32\[{num_classes},{part},{dim}\]\S* copy\(", hlo)
    assert in_float32["traces"][""][sharding] == 1
