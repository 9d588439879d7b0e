"""`main.py` as users run it: a process of its own, killed, resumed, given bad input."""

import json
import signal
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from paths import ROOT
from program import TOY, TRAIN, command, logged_steps, run, scalars
from safetensors.numpy import save_file
from small import SETTINGS
from state_dicts import tiny

from contrastseg_jax.data.images import encode_png

pytestmark = pytest.mark.slow


def final_state(workdir):
    """Every array of the last checkpoint, by its path."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(state)}


def test_a_killed_run_resumes_bit_for_bit(prepared_dir, tmp_path, monkeypatch):
    """SIGKILL between two checkpoints; parameters, optimiser and bank end as if never killed."""
    settings = (*SETTINGS, "train.num_steps=14", "train.log_steps=1", "optim.ema_decay=0.9")
    whole = command(prepared_dir, tmp_path / "whole", *TOY, settings=settings)
    result = run(whole)
    assert result.returncode == 0, result.stderr

    killed = command(prepared_dir, tmp_path / "killed", *TOY, settings=settings)
    monkeypatch.setenv("SIGNAL_AT", "8:SIGKILL")
    assert run(killed).returncode == -signal.SIGKILL
    assert max(logged_steps(tmp_path / "killed")) == 8
    monkeypatch.delenv("SIGNAL_AT")

    result = run(killed)
    assert result.returncode == 0, result.stderr
    assert "resuming from step" in result.stderr
    assert logged_steps(tmp_path / "killed") == list(range(1, 15))
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    logged = [(key, line["step"]) for line in map(json.loads, lines) for key in line]
    shown = [(key, step) for key, step, *_ in scalars(tmp_path / "killed")]
    assert sorted(shown) == sorted(entry for entry in logged if entry[0] not in ("step", "time"))
    expected, got = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    assert expected.keys() == got.keys()
    assert any("memory" in path for path in got) and any("ema" in path for path in got)
    for path, array in expected.items():
        np.testing.assert_array_equal(got[path], array, err_msg=path)

    again = run(killed)  # a finished run stays as it is
    assert again.returncode == 0 and "training already finished, at step 14" in again.stderr
    assert logged_steps(tmp_path / "killed") == list(range(1, 15))


def test_modes_read_the_config_from_the_workdir(trained, tmp_path):
    _, workdir = trained
    main = [sys.executable, str(ROOT / "tests" / "helpers" / "toy_main.py"), f"--workdir={workdir}"]
    evaluated = run([*main, "--mode=eval", "--checkpoint=best"], num_devices=2)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "mean IoU" in evaluated.stderr and "index.html" in evaluated.stderr

    (tmp_path / "photos").mkdir()
    image = np.random.default_rng(0).integers(256, size=(40, 50, 3)).astype(np.uint8)
    (tmp_path / "photos" / "good.png").write_bytes(encode_png(image))
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"no image")
    output = tmp_path / "out"
    predict = [*main, "--mode=predict", f"--input={tmp_path / 'photos'}", f"--output={output}"]
    predicted = run(predict)
    assert predicted.returncode == 1
    assert "bad.jpg: unreadable image file" in predicted.stderr
    assert "Traceback" not in predicted.stderr
    assert (output / "masks" / "good.png").exists() and (output / "legend.png").exists()


def test_converted_weights_are_evaluated_trained_and_gone_on_without(prepared_dir, tmp_path):
    save_file(tiny(num_classes=3, proj_dim=16), tmp_path / "released.safetensors")
    weights = tmp_path / "weights"
    convert = [sys.executable, str(ROOT / "main.py"), "--mode=convert", f"--output={weights}"]
    result = run([*convert, f"--input={tmp_path / 'released.safetensors'}"])
    assert result.returncode == 0, result.stderr
    assert "released.safetensors: hrnet_tiny with 3 classes" in result.stdout

    settings = (*SETTINGS, "train.num_steps=3", f"model.init_from={weights}")
    training = command(prepared_dir, tmp_path / "run", *TRAIN, settings=settings)
    other = [*training, "--mode=eval", "--checkpoint=init", "--config.data.synthetic.num_classes=4"]
    result = run(other)
    assert result.returncode == 1
    assert "cls_head/conv2 (size 4, weights have 3)" in result.stderr
    result = run([*training, "--mode=eval", "--checkpoint=init"])  # before there is a run
    assert result.returncode == 0, result.stderr
    assert "mean IoU" in result.stderr and "BGR" in result.stderr

    result = run(training)
    assert result.returncode == 0, result.stderr
    assert "initialised from released.safetensors" in result.stderr
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["model"]["channel_order"] == "BGR"

    weights.rename(tmp_path / "moved")
    assert "training already finished" in run(training).stderr
    result = run([*training, "--mode=eval"])  # with the config that it was trained with
    assert result.returncode == 0, result.stderr
    settings += ("contrast.temperature=0",)
    result = run(command(prepared_dir, tmp_path / "other", *TRAIN, settings=settings))
    assert (
        result.returncode == 1 and "must be a run with a checkpoint, or a folder" in result.stderr
    )
    assert "contrast.temperature = 0.0: must be > 0" in result.stderr
    assert not (tmp_path / "other").exists()


def test_the_audit_fails_where_training_would(prepared_dir, tmp_path):
    for split in ("train", "val"):
        image = np.random.default_rng(len(split)).integers(256, size=(40, 50, 3)).astype(np.uint8)
        for kind, data in (("images", image), ("labels", np.full((40, 50), 3, np.uint8))):
            (tmp_path / kind / split).mkdir(parents=True)
            (tmp_path / kind / split / "a.png").write_bytes(encode_png(data))
    settings = ("data.name=folder", f"data.root={tmp_path}", "data.class_names=('a', 'b', 'c')")
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN, "--mode=audit", settings=settings)
    failed = run(arguments)
    assert failed.returncode == 1 and "error: 4 errors in the data" in failed.stderr, failed.stderr
    assert "unknown mask value(s) 3 in 2000 of 2000 pixels" in failed.stdout

    passed = run([*arguments, "--config.data.class_names=('a', 'b', 'c', 'd')"])
    assert passed.returncode == 0, passed.stderr
    assert "errors: none" in passed.stdout and "warnings: 2" in passed.stdout
    assert {p.name for p in (tmp_path / "run" / "audit").iterdir()} == {
        "audit.json",
        "overlays.png",
    }


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ([], ["--config: required by --mode=train"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py: no such file"]),
        (["--mode=eval"], ["has no config.json"]),
        (["--mode=audit"], ["--config: required, as --workdir=", "contains no run"]),
        (["--mode=predict"], ["--input: required by --mode=predict"]),
        (["--mode=predict", "--input=x", "--output=y"], ["has no config.json"]),
        (["--mode=convert", "--input=x"], ["--output: required by --mode=convert"]),
        (["--mode=convert", "--input=x", "--output=y"], ["--workdir: not used by --mode=convert"]),
        ([*TRAIN, "--mode=audit", "--process_id=1"], ["--process_id: not used by --mode=audit"]),
        ([*TRAIN, "--mode=eval", "--checkpoint=init"], ["needs --config.model.init_from=FOLDER"]),
        ([*TRAIN, "--checkpoint=init"], ["--checkpoint=init: training resumes from the latest"]),
        ([*TRAIN, "stray"], ["stray: not recognised"]),
        (
            [*TRAIN, "--config.trian.num_steps=2", "--config.seed=x"],
            ["trian.num_steps: no such setting, did you mean train.num_steps?", "seed = x: must"],
        ),
        (
            [*TRAIN, "--config.sed=2", "--config.contrast.temperature=0"],
            ["sed: no such setting, did you mean seed?", "contrast.temperature = 0.0: must be > 0"],
        ),
        (
            [*TRAIN, "--config.train.batch_size=3", "--config.contrast.temperature=0"],
            ["train.batch_size = 3: must be a multiple of the 2 devices, e.g. 2 or 4", "> 0"],
        ),
        (
            [*TRAIN, "--config.data.name=camvid", "--config.data.root=/no/such/folder"],
            ["/no/such/folder", "train.txt"],
        ),
    ],
    ids=lambda value: value[-1][-40:] if value else "nothing",
)
def test_bad_input_ends_in_one_message_and_leaves_nothing(prepared_dir, tmp_path, flags, messages):
    workdir = tmp_path / "run"
    settings = () if flags and "mode" in flags[0] else SETTINGS
    arguments = command(prepared_dir, workdir, *flags, settings=settings)
    result = run(arguments, num_devices=2)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for message in ("error: ", *messages):
        assert message in result.stderr
    assert not workdir.exists()


def test_a_workdir_of_another_config_is_refused(trained):
    config, workdir = trained
    arguments = command(config.data.prepared_dir, workdir, *TOY, "--config.seed=5")
    result = run(arguments, num_devices=2)
    assert result.returncode == 1
    assert "contains a run of another config" in result.stderr and "seed = 5: the run has 0" in (
        result.stderr
    )
