"""The method on 1, 2, 4 and 8 devices, with the bank whole on each or split over them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Everything that `eight_devices.py` writes."""
    path = tmp_path_factory.mktemp("eight") / "results.npz"
    environment = os.environ | {
        "JAX_CACHE": str(ROOT / ".cache" / "jax"),
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(
        [sys.executable, ROOT / "tests" / "eight_devices.py", path],
        env=environment,
        timeout=500,
        check=True,
    )
    return dict(np.load(path))


@pytest.mark.parametrize("strategy", ["all", "random", "hardest", "semi_hard"])
def test_loss_gradient_diagnostics_and_bank_do_not_depend_on_devices(computed, strategy):
    """Neither on their number nor on where the bank lies."""
    cases = {}
    for name, array in computed.items():
        case, _, index = name.rpartition("/")
        if case.endswith(f"/{strategy}"):
            cases.setdefault(case, {})[int(index)] = array
    reference = cases.pop(f"1/replicated/{strategy}")
    assert len(cases) >= 3
    assert reference[0] > 0
    for case, arrays in cases.items():
        assert arrays.keys() == reference.keys()
        for index, expected in reference.items():
            np.testing.assert_allclose(
                arrays[index], expected, rtol=2e-6, atol=2e-7, err_msg=f"{case}, array {index}"
            )


@pytest.mark.parametrize("sharding", ["replicated", "slots"])
def test_the_bank_never_travels(computed, sharding):
    """No collective of the compiled step moves as much as one device's part of a queue.

    The largest is the all-reduce of the gradient of the largest kernel.
    """
    hlo = str(computed[f"hlo/{sharding}"])
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
    assert computed[f"traces/{sharding}"] == 1
