"""Several runs: how they are found, and that all are of the same data."""

import pytest
from small import make_config

from contrastseg_jax.errors import InputError
from contrastseg_jax.run.several import find_workdirs, read_configs, run_names
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
    configs = read_configs([first, second])
    assert [config.train.num_steps for config in configs] == [6, 7]


def test_each_run_must_have_a_checkpoint(run_of):
    good, bare = run_of("good"), run_of("bare")
    (bare / "checkpoints" / "6").rmdir()
    with pytest.raises(InputError, match=f"^--runs={bare}: contains no finished checkpoint"):
        read_configs([good, bare])


def test_runs_are_found_below_folders_and_through_links(run_of, tmp_path):
    runs = [run_of(f"{arm}/seed_{seed}") for arm in ("ce", "memory") for seed in (0, 1)]
    assert find_workdirs([str(tmp_path)]) == runs
    assert find_workdirs([str(tmp_path / "memory"), str(runs[1])]) == [*runs[2:], runs[1]]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "b").symlink_to(runs[0])
    (tmp_path / "linked" / "loop").symlink_to(tmp_path / "linked")
    (tmp_path / "linked" / ".hidden").symlink_to(tmp_path / "memory")
    (tmp_path / "linked" / "config.json").write_text("{}")  # no run
    assert find_workdirs([str(tmp_path / "linked")]) == [tmp_path / "linked" / "b"]


def test_a_run_with_evaluations_alone_is_one(run_of, tmp_path):
    run = run_of("copied")
    (run / "checkpoints" / "6").rmdir()
    (run / "checkpoints").rename(run / "eval")
    assert find_workdirs([str(tmp_path)]) == [run]


def test_folders_without_runs_and_runs_given_twice(run_of, tmp_path):
    run = run_of("run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(run)
    for name, message in (
        ("mine", "no such folder"),
        ("run/config.json", "no such folder"),
        ("empty", "contains no run, a folder with config.json and checkpoints or eval"),
        ("link", f"the run {tmp_path / 'link'} is given twice, by --runs={run} as well"),
    ):
        with pytest.raises(InputError) as error:
            find_workdirs([str(run), str(tmp_path / name)])
        assert str(error.value) == f"--runs={tmp_path / name}: {message}"


def test_every_setting_in_which_the_data_differ_is_named(run_of, tmp_path):
    first = run_of("a")
    folder = ("data.name=folder", f"data.root={tmp_path}", "data.class_names=('x', 'y')")
    second = run_of("b", *folder, "data.short_side=32", "eval.pad_multiple=8")
    third = run_of("c", "data.synthetic.num_classes=4")
    with pytest.raises(InputError) as error:
        read_configs([first, second, third])
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
