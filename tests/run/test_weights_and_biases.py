"""Weights & Biases without a network: what its own files then hold."""

import os
import subprocess
import sys

import pytest
from paths import ROOT
from small import make_config

from contrastseg_jax.config.load import to_json
from contrastseg_jax.errors import InputError
from contrastseg_jax.run.weights_and_biases import ID_FILE
from contrastseg_jax.setup import preflight

# In a process of its own: wandb starts another one, and threads.
PROGRAM = """
import sys
from pathlib import Path
from contrastseg_jax.config.load import from_json
from contrastseg_jax.run.board import open_metrics_log, write_metrics
from contrastseg_jax.run.weights_and_biases import open_sinks
workdir, step = Path(sys.argv[1]), int(sys.argv[2])
config = from_json((workdir / "config.json").read_text(), "config.json")
with open_sinks(workdir, config) as sinks, open_metrics_log(workdir, step, sinks) as board:
    write_metrics(workdir, board, step + 1, {"train/loss": 1.5})
"""


def log_offline(workdir, step):
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(workdir), str(step)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_numbers_and_config_are_logged_and_a_resumed_run_is_the_same_one(tmp_path):
    pytest.importorskip("wandb")
    workdir = tmp_path / "my_run"
    workdir.mkdir()
    config = make_config("train.wandb_project=contrast")
    (workdir / "config.json").write_text(to_json(config))
    for step in (0, 1):
        result = log_offline(workdir, step)
        assert result.returncode == 0, result.stderr
    name = (workdir / ID_FILE).read_text()
    logged = b"".join(path.read_bytes() for path in workdir.glob(f"wandb/offline-*/*{name}.wandb"))
    assert logged.count(b"train/loss") >= 2
    for text in (b"contrast", b"my_run", b"anchors_per_image"):
        assert text in logged


def test_without_the_package_there_is_an_error_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(preflight, "is_installed", lambda: False)
    with pytest.raises(InputError, match="wandb_project = 'x': needs the package wandb"):
        preflight.set_up(make_config("train.wandb_project=x"), mode="train")
