"""A run that an earlier version trained to step 3 of 6 is still resumed, evaluated and used."""

import json
import tarfile

import numpy as np
import pytest
from paths import STORED
from PIL import Image
from small import setup_of

from contrastseg_jax.evaluation.predict import predict_run
from contrastseg_jax.run.workdir import read_config
from contrastseg_jax.training.train import train

pytestmark = pytest.mark.slow

# Of the network `toy`, on one device; its checkpoint has no digests. `metrics.jsonl`: what the
# version before the package had rooms made of it.
FORMER = STORED / "run"


@pytest.fixture
def former(tmp_path):
    """Config and workdir of the run."""
    with tarfile.open(FORMER / "workdir.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    settings = [f"data.prepared_dir={tmp_path / 'prepared'}"]
    return read_config(tmp_path / "run", settings), tmp_path / "run"


def test_it_predicts_what_it_predicted(former, tmp_path):
    config, workdir = former
    setup = setup_of(config, num_devices=1)
    predict_run(setup, workdir, "3", [str(FORMER / "image.png")], tmp_path / "out")
    with Image.open(tmp_path / "out" / "masks" / "image.png") as mask:
        found = np.asarray(mask)
    with Image.open(FORMER / "mask.png") as mask:
        expected = np.asarray(mask)
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() < 0.005  # where rounding decides


def test_it_is_resumed_to_the_numbers_that_it_had(former, caplog):
    """Losses of three steps, and the scores after them, on a processor that may round otherwise."""
    config, workdir = former
    train(setup_of(config, num_devices=1), workdir)
    assert "has no digests" in caplog.text
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {key: value for line in lines if line["step"] == 6 for key, value in line.items()}
    for line in (FORMER / "metrics.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            if key.startswith(("train/", "val/")):
                assert found[key] == pytest.approx(value, rel=0.01, abs=0.005), key
