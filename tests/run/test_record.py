"""What is kept of where numbers come from."""

import json
import re
import subprocess

from small import make_config, setup_of

from contrastseg_jax.data.dataset import open_split
from contrastseg_jax.data.prepared import fingerprint
from contrastseg_jax.run import record


def test_a_run_and_its_evaluations_say_what_they_are_of(trained):
    config, workdir = trained
    (start,) = record.read_starts(workdir)
    assert start["step"] == 0 and start["seed"] == config.seed
    assert start["start_weights"] == {"source": "random"}
    assert start["data"]["name"] == "synthetic"
    assert start["data"]["images"] == {"train": 6, "val": 3}
    assert start["devices"]["count"] == 2 and start["devices"]["processes"] == 1
    assert start["versions"].keys() > {"contrastseg_jax", "python", "jax", "flax"}
    of_evaluation = json.loads((workdir / "eval" / "6" / "record.json").read_text())
    assert of_evaluation["starts"] == [start]
    assert of_evaluation["config"] == json.loads((workdir / "config.json").read_text())
    assert (of_evaluation["split"], of_evaluation["step"]) == ("val", 6)
    assert of_evaluation["data"]["fingerprint"] == start["data"]["fingerprints"]["val"]
    assert start["data"]["fingerprints"]["train"] != start["data"]["fingerprints"]["val"]


def test_each_start_is_kept_and_a_new_run_begins_anew(tmp_path):
    record.add_start(tmp_path, {"step": 0}, resume=False)
    record.add_start(tmp_path, {"step": 4}, resume=True)
    assert record.read_starts(tmp_path) == [{"step": 0}, {"step": 4}]
    record.add_start(tmp_path, {"step": 0}, resume=False)
    assert record.read_starts(tmp_path) == [{"step": 0}]
    (tmp_path / "record.json").write_text("{")
    assert record.read_starts(tmp_path) == []


def test_equal_data_have_one_fingerprint_wherever_they_are_prepared(tmp_path):
    splits = [
        open_split(setup_of(make_config(f"data.prepared_dir={tmp_path / name}")).data, "val")
        for name in "ab"
    ]
    assert splits[0].folder != splits[1].folder
    assert fingerprint(splits[0]) == fingerprint(splits[1])
    assert fingerprint(list(splits[0])) == ""


def test_the_revision_is_that_of_the_code_and_not_of_a_repository_around_it(tmp_path):
    package = tmp_path / "site-packages" / "contrastseg_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert record.git_revision(package) == ""
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), (*name, "commit", "-q", "--allow-empty", "-m", "a")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert record.git_revision(package) == ""
    for command in (("add", "."), (*name, "commit", "-q", "-m", "b")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{40}", record.git_revision(package))
    (package / "__init__.py").write_text("1")
    assert re.fullmatch("[0-9a-f]{40}-dirty", record.git_revision(package))
