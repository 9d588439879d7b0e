"""Flags of the command line: what is said of them before anything is read or written."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver
from paths import ROOT
from small import SETTINGS, make_config

from contrastseg_jax import cli, commands
from contrastseg_jax.errors import InputError
from contrastseg_jax.evaluation import compare
from contrastseg_jax.run.workdir import record_config

CONFIG = f"--config={ROOT / 'configs' / 'default.py'}:toy,memory"


def arguments_of(*texts, settings=()):
    with flagsaver.flagsaver():
        cli.FLAGS(["main.py", *texts])
        return cli.read_arguments(settings)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode=convert", "--input=x", "--output=gs://bucket/x"],
        ["--mode=train", CONFIG, "--workdir=s3://bucket/x"],
        ["--mode=predict", "--workdir=w", "--input=gs://x", "--output=y"],
        ["--mode=compare", "--runs=a", "--runs=gs://x", "--output=y"],
        ["--mode=embed", "--runs=x", "--runs=gs://y"],
    ],
)
def test_folders_must_be_on_a_disk(arguments):
    with pytest.raises(
        InputError, match="--(output|workdir|input|runs)=.*://.*: must be on a local"
    ):
        arguments_of(*arguments)


@pytest.mark.parametrize("mode", cli.COMMANDS)
def test_flags_that_a_mode_needs_or_does_not_use_are_named(mode, tmp_path):
    command = cli.COMMANDS[mode]
    texts = {name: f"--{name}={tmp_path / name}" for name in command.needs}
    assert arguments_of(f"--mode={mode}", *texts.values()).given == {"mode", *texts}
    for name in command.needs:
        for others in ({**texts, name: ""}, {**texts, name: f"--{name}="}):
            with pytest.raises(InputError, match=f"^--{name}: required by --mode={mode}$"):
                arguments_of(f"--mode={mode}", *filter(None, others.values()))
    values = {"quick": "true", "time_limit": "1", "num_processes": "2", "process_id": "0"}
    used = {*command.needs, *command.reads}
    others = {"config", "workdir", "checkpoint", "split", "input", "runs", "output"}
    for name in {*values, *others} - used:
        unused = f"--{name}={values.get(name, 'x')}"
        with pytest.raises(InputError, match=f"^--{name}: not used by --mode={mode}$"):
            arguments_of(f"--mode={mode}", *texts.values(), unused)


def test_a_conversion_has_no_settings_and_one_input(tmp_path):
    texts = ("--mode=convert", "--input=x", f"--output={tmp_path}")
    with pytest.raises(InputError, match=r"^--config\.seed=1: not used by --mode=convert$"):
        arguments_of(*texts, settings=["seed=1"])
    with pytest.raises(InputError, match="^--input=x y: --mode=convert takes one$"):
        arguments_of(*texts, "--input=y")


def test_runs_are_compared_in_the_order_given(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(compare, "compare_runs", lambda *given: called.append(given))
    texts = ("--mode=compare", "--runs=b", "--runs=a", f"--output={tmp_path}")
    commands.run_compare(arguments_of(*texts))
    commands.run_compare(arguments_of(*texts, "--checkpoint=best", "--split=test"))
    assert called == [
        (("b", "a"), "latest", "val", tmp_path),
        (("b", "a"), "best", "test", tmp_path),
    ]
    with pytest.raises(InputError, match="^--runs: required by --mode=compare$"):
        arguments_of(*texts, "--runs=")


@pytest.mark.parametrize("mode", cli.COMMANDS)
def test_each_mode_runs_its_command(mode, tmp_path, monkeypatch):
    command, called = cli.COMMANDS[mode], []
    monkeypatch.setitem(cli.COMMANDS, mode, dataclasses.replace(command, run=called.append))
    texts = [f"--{name}={tmp_path / name}" for name in command.needs]
    with flagsaver.flagsaver():
        cli.FLAGS(["main.py", f"--mode={mode}", *texts])
        cli.main(["main.py"], [])
        assert called == [cli.read_arguments([])]


@pytest.mark.parametrize("sub", ["", "/sub", "/sub/sub"])
@pytest.mark.parametrize("name", ["workdir", "output"])
def test_a_file_cannot_hold_results(tmp_path, name, sub):
    (tmp_path / "file").write_text("x")
    folders = {"workdir": tmp_path, "output": tmp_path, name: f"{tmp_path / 'file'}{sub}"}
    arguments = [f"--{flag}={path}" for flag, path in folders.items()]
    with pytest.raises(InputError, match=f"--{name}=.*: .*/file is a file, not a folder"):
        arguments_of("--mode=predict", "--input=x", *arguments)


def test_what_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.os, "access", lambda path, _: path != tmp_path / "closed")
    (tmp_path / "closed").mkdir()
    for arguments in (
        ["--mode=eval", f"--workdir={tmp_path / 'closed'}"],
        ["--mode=predict", "--workdir=w", "--input=x", f"--output={tmp_path / 'closed' / 'a'}"],
        ["--mode=plan", CONFIG, f"--output={tmp_path / 'closed' / 'a.json'}"],
    ):
        with pytest.raises(InputError, match="closed.*: cannot be written .*ion denied"):
            arguments_of(*arguments)


@pytest.mark.parametrize("text", ["Unable to allocate 233. GiB", ""])
def test_too_little_memory_is_no_traceback(monkeypatch, text):
    def fail(_):
        raise MemoryError(text)

    monkeypatch.setattr(commands, "config_for", fail)
    with flagsaver.flagsaver():
        cli.FLAGS(["main.py", CONFIG, "--workdir=w"])
        with pytest.raises(SystemExit, match=f"error: out of memory: {text or 'an alloc'}"):
            cli.main(["main.py"], [])


def test_without_flags_the_usage_is_shown():
    """Every mode with the flags that it needs, and others that it reads in brackets."""
    result = subprocess.run([sys.executable, ROOT / "main.py"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    for mode, command in cli.COMMANDS.items():
        (line,) = re.findall(rf"^  --mode={mode} +(.*) \[(.*)\]$", result.stderr, re.MULTILINE)
        assert line[0].split() == [f"--{name}" for name in command.needs]
        assert all(f"--{name}" in result.stderr for name in command.reads)
    assert max(map(len, result.stderr.splitlines())) <= 100
    assert "python main.py --config=configs/quickstart.py --workdir=runs/quickstart" in (
        result.stderr
    )


def test_the_usage_outside_a_checkout_names_recipes():
    lines = cli.usage("contrastseg").splitlines()
    assert lines[0] == "usage: contrastseg --mode=MODE --FLAG=VALUE ..."
    assert "    contrastseg --config=quickstart --workdir=runs/quickstart" in lines
    assert not any("main.py" in line for line in lines)


def test_results_of_an_evaluation_may_lie_outside_a_closed_workdir(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(cli.os, "access", lambda path, _: path != closed)
    arguments = ["--mode=eval", f"--workdir={closed}"]
    with pytest.raises(InputError, match="cannot be written .*; write elsewhere with --out"):
        arguments_of(*arguments)
    arguments_of(*arguments, f"--output={tmp_path / 'scores'}")


def test_the_home_folder_is_spelt_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = arguments_of("--mode=convert", "--input=~/x.pth", "--output=~/w")
    assert cli.local_path("input", *arguments.input) == tmp_path / "x.pth"
    assert arguments.output == tmp_path / "w"
    assert arguments.workdir == Path()


def test_a_checkpoint_is_converted_of_a_run_alone(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"x")
    for source in (tmp_path / "x.pth", tmp_path):
        texts = ("--mode=convert", f"--output={tmp_path / 'w'}", f"--input={source}")
        arguments = arguments_of(*texts, "--checkpoint=best")
        with pytest.raises(InputError, match=f"best: --input={source} is not a run folder"):
            commands.run_convert(arguments)


def test_init_is_refused_in_the_folder_of_another_run(tmp_path):
    """Its scores would stand among those of the run."""
    texts = ("--mode=eval", "--checkpoint=init", f"--workdir={tmp_path}", CONFIG)

    def config_from(folder):
        settings = [*SETTINGS, f"model.init_from={folder}"]
        return commands.config_for(arguments_of(*texts, settings=settings))

    config = config_from("/other")  # before there is a run
    assert config.model.init_from == "/other"
    run = make_config("model.init_from=/mine", "model.channel_order=BGR")
    record_config(tmp_path, run)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    assert config_from("/mine") == run
    with pytest.raises(InputError, match="model.init_from = '/other': the run has '/mine'"):
        config_from("/other")


def test_photographs_to_predict_may_come_from_another_camera(tmp_path):
    """What a config file leaves at its default is no wish: only the command line's word counts."""
    record_config(tmp_path, make_config("data.exif_orientation=applied"))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    predict = ("--mode=predict", f"--workdir={tmp_path}", "--input=x", f"--output={tmp_path}")

    def config_of(*texts, settings=()):
        return commands.config_for(arguments_of(*texts, settings=settings))

    assert config_of(*predict).data.exif_orientation == "applied"
    wishes = ["data.exif_orientation=stored", "data.bit_depth=12"]
    config = config_of(*predict, settings=wishes)
    assert (config.data.exif_orientation, config.data.bit_depth) == ("stored", 12)
    with pytest.raises(InputError, match=r"data\.short_side = 8: the run has 0"):
        config_of(*predict, settings=[*wishes, "data.short_side=8"])
    assert config_of(*predict, CONFIG, settings=[*SETTINGS, *wishes]) == config
    with pytest.raises(InputError, match="exif_orientation = 'stored': the run has 'applied'"):
        config_of(*predict, CONFIG, settings=SETTINGS)
    with pytest.raises(InputError, match="bit_depth = 12: the run has 0"):
        config_of("--mode=eval", f"--workdir={tmp_path}", settings=wishes)


def test_every_flag_is_an_argument_of_some_command():
    defined = {flag.name for flag in cli.FLAGS.get_key_flags_for_module(cli.__name__)}
    fields = {field.name for field in dataclasses.fields(cli.Arguments)} - {"settings", "given"}
    used = {name for command in cli.COMMANDS.values() for name in (*command.needs, *command.reads)}
    assert defined == fields == used | {"mode"}
