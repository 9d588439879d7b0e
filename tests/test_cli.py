"""Flags of the command line: what is said of them before anything is read or written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver
from paths import ROOT
from small import SETTINGS, make_config

from contrastseg_jax import cli
from contrastseg_jax.errors import InputError
from contrastseg_jax.run.workdir import record_config

CONFIG = f"--config={ROOT / 'configs' / 'default.py'}:toy,memory"


@pytest.fixture(autouse=True)
def flags():
    with flagsaver.flagsaver():
        yield cli.FLAGS


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode=convert", "--input=x", "--output=gs://bucket/x"],
        ["--mode=train", CONFIG, "--workdir=s3://bucket/x"],
        ["--mode=predict", "--workdir=w", "--input=gs://x", "--output=y"],
    ],
)
def test_folders_must_be_on_a_disk(flags, arguments):
    flags(["main.py", *arguments])
    with pytest.raises(InputError, match="--(output|workdir|input)=.*://.*: must be on a local"):
        cli.require_flags([])


@pytest.mark.parametrize("sub", ["", "/sub", "/sub/sub"])
@pytest.mark.parametrize("name", ["workdir", "output"])
def test_a_file_cannot_hold_results(flags, tmp_path, name, sub):
    (tmp_path / "file").write_text("x")
    folders = {"workdir": tmp_path, "output": tmp_path, name: f"{tmp_path / 'file'}{sub}"}
    arguments = [f"--{flag}={path}" for flag, path in folders.items()]
    flags(["main.py", "--mode=predict", "--input=x", *arguments])
    with pytest.raises(InputError, match=f"--{name}=.*: .*/file is a file, not a folder"):
        cli.require_flags([])


def test_what_cannot_be_written_is_named_before_the_work(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.os, "access", lambda path, _: path != tmp_path / "closed")
    (tmp_path / "closed").mkdir()
    for arguments in (
        ["--mode=eval", f"--workdir={tmp_path / 'closed'}"],
        ["--mode=predict", "--workdir=w", "--input=x", f"--output={tmp_path / 'closed' / 'a'}"],
        ["--mode=plan", CONFIG, f"--output={tmp_path / 'closed' / 'a.json'}"],
    ):
        with flagsaver.flagsaver():
            flags(["main.py", *arguments])
            with pytest.raises(InputError, match="closed.*: cannot be written .*ion denied"):
                cli.require_flags([])


@pytest.mark.parametrize("text", ["Unable to allocate 233. GiB", ""])
def test_too_little_memory_is_no_traceback(flags, monkeypatch, text):
    def fail(_):
        raise MemoryError(text)

    monkeypatch.setattr(cli, "load_config", fail)
    flags(["main.py", CONFIG, "--workdir=w"])
    with pytest.raises(SystemExit, match=f"error: not enough memory: {text or 'an alloc'}"):
        cli.main(["main.py"], [])


def test_without_flags_the_usage_is_shown():
    """Every mode with the flags that it needs, and others that it reads in brackets."""
    result = subprocess.run([sys.executable, ROOT / "main.py"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    for mode, names in cli.NEEDED.items():
        (line,) = re.findall(rf"^  --mode={mode} +(.*) \[(.*)\]$", result.stderr, re.MULTILINE)
        assert line[0].split() == [f"--{name}" for name in names]
        assert all(f"--{name}" in result.stderr for name in cli.OPTIONAL[mode])
    assert max(map(len, result.stderr.splitlines())) <= 100
    assert "python main.py --config=configs/quickstart.py --workdir=runs/quickstart" in (
        result.stderr
    )


def test_results_of_an_evaluation_may_lie_outside_a_closed_workdir(flags, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(cli.os, "access", lambda path, _: path != closed)
    arguments = ["main.py", "--mode=eval", f"--workdir={closed}"]
    flags(arguments)
    with pytest.raises(InputError, match="cannot be written .*; results go elsewhere with --out"):
        cli.require_flags([])
    flags([*arguments, f"--output={tmp_path / 'scores'}"])
    cli.require_flags([])


def test_the_home_folder_is_spelt_out(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags(["main.py", "--mode=convert", "--input=~/x.pth", "--output=~/w"])
    cli.require_flags([])
    assert cli.path_of("input") == tmp_path / "x.pth"
    assert cli.path_of("output") == tmp_path / "w"
    assert cli.path_of("workdir") == Path()


def test_a_checkpoint_is_converted_of_a_run_alone(flags, tmp_path):
    (tmp_path / "x.pth").write_bytes(b"x")
    flags(["main.py", "--mode=convert", "--output=w", "--input=x", "--checkpoint=best"])
    cli.require_flags([])
    for source in (tmp_path / "x.pth", tmp_path):
        with pytest.raises(InputError, match=f"best: --input={source} is no folder of a run"):
            cli.convert_weights(source, tmp_path / "w")


def test_init_is_refused_in_the_folder_of_another_run(flags, tmp_path):
    """Its scores would stand among those of the run."""
    flags(["main.py", "--mode=eval", "--checkpoint=init", f"--workdir={tmp_path}", CONFIG])
    config = cli.load_config([*SETTINGS, "model.init_from=/other"])  # before there is a run
    assert config.model.init_from == "/other"
    run = make_config("model.init_from=/mine", "model.channel_order=BGR")
    record_config(tmp_path, run)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    assert cli.load_config([*SETTINGS, "model.init_from=/mine"]) == run
    with pytest.raises(InputError, match="model.init_from = '/other': the run has '/mine'"):
        cli.load_config([*SETTINGS, "model.init_from=/other"])


def test_photographs_to_predict_may_come_from_another_camera(flags, tmp_path):
    """What a config file leaves at its default is no wish: only the command line's word counts."""
    record_config(tmp_path, make_config("data.exif_orientation=applied"))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    flags(["main.py", "--mode=predict", f"--workdir={tmp_path}", "--input=x", "--output=y"])
    assert cli.load_config([]).data.exif_orientation == "applied"
    wishes = ["data.exif_orientation=stored", "data.bit_depth=12"]
    config = cli.load_config(wishes)
    assert (config.data.exif_orientation, config.data.bit_depth) == ("stored", 12)
    with pytest.raises(InputError, match=r"data\.short_side = 8: the run has 0"):
        cli.load_config([*wishes, "data.short_side=8"])
    flags(["main.py", "--mode=predict", f"--workdir={tmp_path}", CONFIG])
    assert cli.load_config([*SETTINGS, *wishes]) == config
    with pytest.raises(InputError, match="exif_orientation = 'stored': the run has 'applied'"):
        cli.load_config(list(SETTINGS))
    flags(["main.py", "--mode=eval", f"--workdir={tmp_path}"])
    with pytest.raises(InputError, match="bit_depth = 12: the run has 0"):
        cli.load_config(wishes)
