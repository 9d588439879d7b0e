"""Several processes with real collectives, through `main.py`: told to stop, killed, as one."""

import json
import signal
import time

import jax
import numpy as np
from program import AFTER_A_KILL, TRAIN, command, ended, logged_steps, run, wait_for_step
from small import SETTINGS, make_config

from contrastseg_jax import build, checkpoint, distributed

RUN = (
    *SETTINGS,
    # Rounding is not magnified: by BatchNorm on small maps, anchors chosen by prediction, speed.
    "augment.crop_size=(64, 64)",
    "contrast.anchors=random",
    "optim.learning_rate=0.001",
    "train.num_steps=12",
    "train.eval_steps=12",
    "train.log_steps=1",
    "train.checkpoint_steps=2",
    "optim.ema_decay=0.9",
)


def losses(workdir):
    """Loss by step, and the scores."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], key): line[key] for line in lines for key in line if "loss" in key}, {
        line["step"]: line["val/mean_iou"] for line in lines if "val/mean_iou" in line
    }


def final_state(workdir):
    """Read here, on other devices than those that wrote it."""
    config = make_config(*RUN)
    state = build.abstract_state(
        config, build.build_model(config, num_classes=3), build.build_optimizer(config)[0]
    )
    everywhere = distributed.replicated(distributed.make_mesh())
    assert checkpoint.find_whole(workdir, "latest") == 12
    return checkpoint.restore(workdir, 12, state, everywhere)


def test_a_run_goes_on_through_stops_and_kills_on_other_numbers_of_processes(
    prepared_dir, tmp_path, start
):
    """Its losses, scores and final state are those of one process that was never stopped."""
    whole = tmp_path / "whole"
    result = run(command(prepared_dir, whole, *TRAIN, settings=RUN), num_devices=4)
    assert result.returncode == 0, result.stderr
    workdir = tmp_path / "run"
    arguments = command(prepared_dir, workdir, *TRAIN, settings=RUN)

    group = start(arguments, num_processes=2, num_devices=2)
    wait_for_step(workdir, 1, group)
    group[1].send_signal(signal.SIGTERM)
    statuses, messages = ended(group)
    assert statuses == [143, 143], messages
    stopped = max(logged_steps(workdir))
    for text in messages:
        assert f"SIGTERM: stopped after step {stopped}, which is saved" in text
    assert "process 1: SIGTERM" in messages[1] and "loss" not in messages[1]

    split = [*arguments, "--config.parallel.fsdp=True", "--config.memory.sharding=slots"]
    group = start(split, num_processes=4)
    wait_for_step(workdir, stopped + 1, group)
    group[2].kill()
    killed = time.monotonic()
    statuses, messages = ended(group, timeout=AFTER_A_KILL)
    assert time.monotonic() - killed < AFTER_A_KILL
    assert statuses[2] == -signal.SIGKILL and all(statuses), messages
    # Python's message where a collective fails, JAX's own where its coordinator is faster.
    for index in (0, 1, 3):
        ends = (f"error: process {index} of 4: ", "Terminating process because the JAX")
        assert any(text in messages[index] for text in ends), messages
    assert f"going on after step {stopped} of 12" in messages[0]
    reached = max(logged_steps(workdir))

    group = start(arguments, num_processes=2, num_devices=2)
    wait_for_step(workdir, reached + 1, group)
    group[0].send_signal(signal.SIGTERM)
    statuses, messages = ended(group)
    assert statuses == [143, 143], messages

    result = run(arguments, num_devices=4)
    assert result.returncode == 0, result.stderr
    assert logged_steps(workdir) == list(range(1, 13))
    (expected, scores), (got, got_scores) = losses(whole), losses(workdir)
    assert got.keys() == expected.keys() and got_scores.keys() == scores.keys()
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-4)
    np.testing.assert_allclose(list(got_scores.values()), list(scores.values()), atol=5e-3)
    expected, got = (final_state(folder).memory for folder in (whole, workdir))
    for counter in ("pixel_head", "pixel_count", "segment_head", "segment_count"):
        np.testing.assert_array_equal(getattr(got, counter), getattr(expected, counter))
    np.testing.assert_allclose(got.pixel, expected.pixel, atol=1e-3)

    evaluation = workdir / "eval" / "12"
    before = json.loads((evaluation / "metrics.json").read_text())
    (evaluation / "metrics.json").unlink()
    evaluate = [*arguments[:2], f"--workdir={workdir}", "--mode=eval"]
    statuses, messages = ended(start(evaluate, num_processes=2))
    assert statuses == [0, 0], messages
    assert json.loads((evaluation / "metrics.json").read_text())["confusion"] == before["confusion"]


def test_a_run_of_which_a_process_was_killed_ends_bit_for_bit_as_if_it_was_not(
    prepared_dir, tmp_path, start
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    statuses, messages = ended(start(command(prepared_dir, whole, *TRAIN, settings=RUN), 2))
    assert statuses == [0, 0], messages
    arguments = command(prepared_dir, killed, *TRAIN, settings=RUN)
    group = start(arguments, num_processes=2)
    wait_for_step(killed, 5, group)
    group[0].kill()
    statuses, messages = ended(group, timeout=AFTER_A_KILL)
    assert all(statuses), messages
    statuses, messages = ended(start(arguments, num_processes=2))
    assert statuses == [0, 0], messages
    assert "going on after step" in messages[0]
    assert losses(killed) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, final_state(killed), final_state(whole))
