"""The benchmark of accelerators, in small and on a CPU."""

import json
import subprocess
import sys

import pytest
from paths import ROOT
from program import TIMEOUT, environment

ROWS = {"landcover": 1, "train": 1, "bank": 2, "evaluate": 2, "parity": 4}


@pytest.mark.slow
def test_every_part_has_its_rows(tmp_path):
    output = tmp_path / "accelerator.json"
    output.write_text(json.dumps({"of_another_call": {"rows": []}}))
    command = [sys.executable, "benchmarks/accelerator.py", "--tiny", f"--output={output}"]
    settings = environment() | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, result.stderr

    parts = json.loads(output.read_text())
    assert parts.pop("of_another_call") == {"rows": []}
    assert {name: len(part["rows"]) for name, part in parts.items()} == ROWS
    for name, part in parts.items():
        assert part["platform"] == "cpu" and part["tiny"]
        assert f"\n{name}, cpu" in result.stdout  # its table
        assert not [row["error"] for row in part["rows"] if "error" in row]
    train, evaluate = parts["train"]["rows"], parts["evaluate"]["rows"]
    assert all(row["images_per_second"] > 0 for row in train + evaluate)
    assert all(row["peak_memory_gib"] > 0 and row["share_of_peak"] is None for row in train)
    assert all(row["loss_ms"] > 0 and row["enqueue_ms"] > 0 for row in parts["bank"]["rows"])
    for row in parts["parity"]["rows"]:  # a CPU with itself
        assert row["value"] > 0
        assert row["difference_of_loss"] < 1e-6 and row["difference_of_gradient"] < 1e-4
    assert 0 <= parts["landcover"]["rows"][0]["mean_iou"] <= 1
