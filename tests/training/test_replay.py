"""A step taken again: its numbers are those that it had, and what is not finite has a name."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import make_batch, make_config, setup_of, start

from contrastseg_jax.errors import InputError
from contrastseg_jax.training.replay import examine, replay

pytestmark = pytest.mark.slow


def test_a_step_taken_again_has_the_numbers_that_it_had(trained, tmp_path, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    config, whole = trained
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    for step in (5, 6):
        replay(setup_of(config), workdir, step)
    assert "taking the steps from 5 to 6 again" in caplog.text
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if line["step"] == 6 and "train/loss" in line]
    *_, found = both = [
        json.loads((workdir / "replay" / step / "replay.json").read_text()) for step in "56"
    ]
    for name in ("loss", "cross_entropy", "contrast"):
        mean = np.mean([each["metrics"][name] for each in both])
        np.testing.assert_allclose(mean, logged[f"train/{name}"], rtol=1e-5, err_msg=name)
    assert found["not_finite"] == {"gradients": [], "batch_stats": []}
    batch = np.load(workdir / "replay" / "6" / "batch.npz")
    assert batch["image"].shape == (4, 32, 32, 3) and batch["label"].shape == (4, 32, 32)
    assert len(found["images"]) == 4 and (workdir / "replay" / "6" / "batch.png").exists()
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before
    with pytest.raises(InputError, match=r"--replay=7: must be in 1..6"):
        replay(setup_of(config), workdir, 7)


def test_what_is_not_finite_is_named():
    config = make_config("contrast.warmup_steps=0")
    _, state, _ = start(config)
    state.params["cls_head"]["conv2"]["kernel"] *= jnp.inf
    with jax.debug_nans(False):
        found = examine(setup_of(config), state, make_batch())
    assert not np.isfinite(found["metrics"]["loss"])
    assert any("cls_head/conv2" in name for name in found["not_finite"]["gradients"])
    assert found["not_finite"]["batch_stats"] == []
