"""Several processes with real collectives, through `main.py`: told to stop, killed, as one."""

import json
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from program import TIMEOUT, TOY, command, ended, logged_steps, require_prompt_end, run
from small import SETTINGS

pytestmark = pytest.mark.multiprocess

RUN = (
    *SETTINGS,
    "train.num_steps=12",
    "train.eval_steps=12",
    "train.log_steps=1",
    "train.checkpoint_steps=2",
    "optim.ema_decay=0.9",
)
FLOAT64 = ("model.dtype=float64", "memory.dtype=float64")


def losses(workdir):
    """Loss by step, and the scores."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], key): line[key] for line in lines for key in line if "loss" in key}, {
        line["step"]: line["val/mean_iou"] for line in lines if "val/mean_iou" in line
    }


def final_state(workdir):
    """Every array after the last step by its path, whatever devices wrote it."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        folder = workdir / "checkpoints" / "12" / "default"
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(folder, restore_args=as_numpy)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def test_a_run_goes_on_through_stops_and_kills_on_other_numbers_of_processes(
    prepared_dir, tmp_path, start, monkeypatch
):
    """Its losses, scores and final state are those of one process that was never stopped.

    In float64, in which other orders of summation make no difference that could hide a fault.
    """
    monkeypatch.setenv("FLOAT64", "1")
    settings = (*RUN, *FLOAT64)
    whole = tmp_path / "whole"
    result = run(command(prepared_dir, whole, *TOY, settings=settings), num_devices=2)
    assert result.returncode == 0, result.stderr
    workdir = tmp_path / "run"
    arguments = command(prepared_dir, workdir, *TOY, settings=settings)

    monkeypatch.setenv("SIGNAL_AT", "1:SIGTERM:1")
    statuses, messages = ended(start(arguments, num_processes=2, num_devices=2))
    assert statuses == [143, 143], messages
    stopped = max(logged_steps(workdir))
    for text in messages:
        assert f"stopped and saved after step {stopped};" in text
    assert "process 1: stopped" in messages[1] and "loss" not in messages[1]

    split = [*arguments, "--config.parallel.fsdp=True", "--config.memory.sharding=slots"]
    monkeypatch.setenv("SIGNAL_AT", f"{stopped + 1}:SIGKILL:2")
    group = start(split, num_processes=4)
    group[2].wait(TIMEOUT)
    killed = time.monotonic()
    statuses, messages = ended(group)
    require_prompt_end(killed)
    assert statuses[2] == -signal.SIGKILL and all(statuses), messages
    # Python's message where a collective fails, JAX's own where its coordinator is faster.
    for index in (0, 1, 3):
        ends = (f"error: process {index} of 4: ", "Terminating process because the JAX")
        assert any(text in messages[index] for text in ends), messages
    assert f"resuming from step {stopped} of 12" in messages[0]

    monkeypatch.delenv("SIGNAL_AT")
    result = run(arguments, num_devices=2)
    assert result.returncode == 0, result.stderr
    assert logged_steps(workdir) == list(range(1, 13))
    (expected, scores), (got, got_scores) = losses(whole), losses(workdir)
    assert got.keys() == expected.keys() and got_scores == scores
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-9)
    expected, got = final_state(whole), final_state(workdir)
    assert got.keys() == expected.keys()
    assert expected["['memory']['pixel']"].dtype == np.float64
    for path, array in expected.items():
        np.testing.assert_allclose(got[path], array, rtol=1e-7, atol=1e-9, err_msg=path)

    evaluation = workdir / "eval" / "12"
    before = json.loads((evaluation / "metrics.json").read_text())
    (evaluation / "metrics.json").unlink()
    evaluate = [*arguments[:2], f"--workdir={workdir}", "--mode=eval"]
    statuses, messages = ended(start(evaluate, num_processes=2))
    assert statuses == [0, 0], messages
    assert json.loads((evaluation / "metrics.json").read_text())["confusion"] == before["confusion"]


def test_a_run_of_which_a_process_was_killed_ends_bit_for_bit_as_if_it_was_not(
    prepared_dir, tmp_path, start, monkeypatch
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    statuses, messages = ended(start(command(prepared_dir, whole, *TOY, settings=RUN), 2))
    assert statuses == [0, 0], messages
    arguments = command(prepared_dir, killed, *TOY, settings=RUN)
    monkeypatch.setenv("SIGNAL_AT", "5:SIGKILL:0")
    statuses, messages = ended(start(arguments, num_processes=2))
    assert statuses[0] == -signal.SIGKILL and all(statuses), messages
    monkeypatch.delenv("SIGNAL_AT")
    statuses, messages = ended(start(arguments, num_processes=2))
    assert statuses == [0, 0], messages
    assert "resuming from step" in messages[0]
    assert losses(killed) == losses(whole)
    expected, got = final_state(whole), final_state(killed)
    assert got.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(got[path], array, err_msg=path)
