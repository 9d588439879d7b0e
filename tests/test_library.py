"""The examples of docs/library.md, run as they stand there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT
from PIL import Image

import contrastseg_jax
from contrastseg_jax.config.load import load_config
from contrastseg_jax.export import stablehlo

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
TOY, PREDICTIONS, TRAINING, EXPORTED = EXAMPLES


def test_the_toy_embedding_is_trained(capsys):
    variables = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(TOY, variables)
    metrics = variables["metrics"]
    assert metrics["positive_similarity"] > 0.3 > 0.1 > metrics["negative_similarity"]
    assert re.fullmatch(
        r"loss .*, positives 0\.\d\d, negatives -?0\.\d\d\n", capsys.readouterr().out
    )
    assert int(variables["bank"].pixel_count.min()) == 200


def test_a_network_is_loaded_and_predicts(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(trained[1])
    image = np.random.default_rng(0).integers(0, 256, (30, 45, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(PREDICTIONS, variables)
    assert variables["mask"].shape == (30, 45)
    assert variables["shares"].shape == (30, 45, len(variables["network"].class_names))
    assert "(" in capsys.readouterr().out


def test_an_exported_network_is_run(tmp_path, monkeypatch):
    (tmp_path / "exported").mkdir()
    program = stablehlo.serialize(lambda image: image.astype(jnp.float32), (512, 512))
    (tmp_path / "exported" / "512x512.stablehlo").write_bytes(program)
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(EXPORTED, variables)
    assert variables["logits"].shape == (2, 512, 512, 3)


def test_a_run_is_trained_and_evaluated(trained, tmp_path, monkeypatch, capsys):
    """The recipe's place is taken by that of the tests' small run."""
    asked = []

    def small_config(name, overrides):
        asked.append(load_config(name, overrides))
        return trained[0]

    monkeypatch.setattr(contrastseg_jax, "load_config", small_config, raising=False)
    monkeypatch.chdir(tmp_path)
    exec(TRAINING, {})
    assert asked[0].train.num_steps == 20
    assert (tmp_path / "runs" / "python" / "config.json").is_file()
    assert 0 <= float(capsys.readouterr().out) <= 1


@pytest.mark.parametrize("name", ["runs/none", "."])
def test_evaluating_what_is_no_run_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="no config.json; train a run there first"):
        contrastseg_jax.evaluate(name)
