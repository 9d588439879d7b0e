"""The config that a run's folder has, and which others are refused there."""

import json

import pytest

from contrastseg_jax.config.load import override, schema
from contrastseg_jax.errors import InputError
from contrastseg_jax.run.workdir import (
    evaluation_folder,
    has_stalled,
    read_config,
    record_config,
    record_images,
    recorded_images,
)


def test_a_workdir_belongs_to_one_config(tmp_path):
    config = override(schema(), ["seed=1", "data.class_names=('a', 'b')"])
    record_config(tmp_path, config)
    record_config(tmp_path, config)
    assert read_config(tmp_path) == config
    moved = read_config(tmp_path, ["data.root=/elsewhere"])
    assert moved.data.root == "/elsewhere"
    other = override(config, ["seed=2", "contrast.temperature=0.2"])
    record_config(tmp_path, other)  # nothing was trained yet, so nothing is lost
    record_config(tmp_path, config)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        record_config(tmp_path, other)
    assert "seed = 2: the run has 1" in str(error.value)
    assert "contrast.temperature = 0.2: the run has 0.1" in str(error.value)
    other = override(config, ["model.init_from=/w", "model.channel_order=BGR"])
    with pytest.raises(InputError, match="(?s)1 problem .*model.init_from = '/w': the run has ''"):
        record_config(tmp_path, other)
    with pytest.raises(InputError, match="seed = 3: the run has 1"):
        read_config(tmp_path, ["seed=3"])


def test_foreign_and_damaged_workdirs(tmp_path):
    with pytest.raises(InputError, match="has no config.json"):
        read_config(tmp_path)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(InputError, match="has checkpoints but no config.json"):
        record_config(tmp_path, schema())
    (tmp_path / "config.json").write_text('{"seed": 0')
    with pytest.raises(InputError, match="config.json: not a config"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 0.5, "sed": 1}')
    with pytest.raises(InputError, match="sed: no such setting, did you mean seed") as error:
        read_config(tmp_path)
    assert "seed = 0.5: must be a whole number" in str(error.value)
    (tmp_path / "config.json").write_text('{"seed": 7}')  # written before the other settings came
    assert read_config(tmp_path) == override(schema(), ["seed=7"])
    with pytest.raises(InputError, match=r"contrast.temperature = 0.2: the run has 0\.1"):
        record_config(tmp_path, override(schema(), ["seed=7", "contrast.temperature=0.2"]))
    with pytest.raises(InputError, match="config.json: is a file"):
        record_config(tmp_path / "config.json", schema())


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("train_images", "data.train_subset"),
        ("split/train", "data.val_fraction"),
        ("split/val", "data.val_fraction"),
    ],
)
def test_a_run_goes_on_with_the_images_it_has_begun_with(tmp_path, name, setting):
    file = tmp_path / f"{name}.txt"
    assert recorded_images(tmp_path, name) is None
    record_images(tmp_path, {name: ["a", "b"]}, resume=False)
    assert file.read_text() == "a\nb\n" and recorded_images(tmp_path, name) == ["a", "b"]
    record_images(tmp_path, {name: ["a", "b"]}, resume=True)
    message = f"{name}.txt: the run has begun with other images than {setting} now gives"
    with pytest.raises(InputError, match=message):
        record_images(tmp_path, {name: ["a", "c"]}, resume=True)
    record_images(tmp_path, {name: ["a", "c", "d"]}, resume=False)  # nothing was trained yet
    assert file.read_text() == "a\nc\nd\n"
    record_images(tmp_path, {name: []}, resume=False)
    assert not file.exists()


def test_a_run_stalls_when_the_last_scores_are_none_of_them_the_best(tmp_path):
    for step, score in ((2, 0.3), (4, 0.5), (6, 0.5), (8, 0.4), (10, 0.6)):
        folder = evaluation_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"mean_iou": score}))
    assert not has_stalled(tmp_path, 0, 8) and not has_stalled(tmp_path, 1, 4)
    assert has_stalled(tmp_path, 1, 6) and has_stalled(tmp_path, 2, 8)  # of equals the first
    assert not has_stalled(tmp_path, 3, 8) and not has_stalled(tmp_path, 1, 10)
    assert not has_stalled(tmp_path / "none", 1, 8)
