"""Folders that are compared: each a run, all of the same data."""

import pytest
from small import make_config

from contrastseg_jax.errors import InputError
from contrastseg_jax.run.several import read_runs, run_names
from contrastseg_jax.run.workdir import record_config


@pytest.fixture
def run_of(tmp_path):
    """Makes a folder that looks like that of a run with a checkpoint."""

    def make(name, *overrides, variant="ce"):
        folder = tmp_path / name
        record_config(folder, make_config(*overrides, variant=variant))
        (folder / "checkpoints" / "6").mkdir(parents=True)
        return folder

    return make


def test_runs_of_the_same_data_may_differ_in_all_else(run_of):
    settings = ("train.num_steps=7", "data.num_threads=1", "data.prepared_dir=elsewhere")
    first, second = run_of("a"), run_of("b", *settings, variant="memory")
    configs = read_runs([first, second])
    assert [config.train.num_steps for config in configs] == [6, 7]


def test_each_folder_must_be_a_run_with_a_checkpoint(run_of, tmp_path):
    good, bare = run_of("good"), run_of("bare")
    (bare / "checkpoints" / "6").rmdir()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=f"^--runs={folder}: is not the folder of a run"):
            read_runs([good, folder])
    with pytest.raises(InputError, match=f"^--runs={bare}: contains no finished checkpoint"):
        read_runs([good, bare])
    again = good / ".." / "good"
    with pytest.raises(InputError, match=f"^--runs={again}: is named twice"):
        read_runs([good, again])


def test_every_setting_in_which_the_data_differ_is_named(run_of, tmp_path):
    first = run_of("a")
    folder = ("data.name=folder", f"data.root={tmp_path}", "data.class_names=('x', 'y')")
    second = run_of("b", *folder, "data.short_side=32", "eval.pad_multiple=8")
    third = run_of("c", "data.synthetic.num_classes=4")
    with pytest.raises(InputError) as error:
        read_runs([first, second, third])
    title, *problems = str(error.value).splitlines()
    given = f"--runs={first} --runs={second} --runs={third}"
    assert title == f"6 problems in {given}, whose data differ:"
    assert sorted(problems) == [
        f"  data.class_names = () in {first}, ('x', 'y') in {second}",
        f"  data.name = 'synthetic' in {first}, 'folder' in {second}",
        f"  data.root = '' in {first}, '{tmp_path}' in {second}",
        f"  data.short_side = 0 in {first}, 32 in {second}",
        f"  data.synthetic.num_classes = 3 in {first}, 4 in {third}",
        f"  eval.pad_multiple = 32 in {first}, 8 in {second}",
    ]


def test_a_run_is_called_by_its_folder_unless_another_is_too(tmp_path):
    assert run_names([tmp_path / "ce", tmp_path / "contrast"]) == ["ce", "contrast"]
    same = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert run_names(same) == [str(path) for path in same]
