"""Several processes with real collectives, through `main.py`: as one, told to stop, killed."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from small import ROOT, SETTINGS, make_config
from test_end_to_end import TRAIN, command, environment, logged_steps, run

from contrastseg_jax import build, checkpoint, distributed

TIMEOUT = 240  # seconds, of anything that is waited for
AFTER_A_KILL = 60  # seconds in which the processes that are left must have ended
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


@pytest.fixture(scope="module")
def prepared_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def start():
    """Starts main.py in several processes; what still runs at a test's end is killed."""
    started = []

    def start(
        arguments, num_processes, num_devices=1, of_process=None, timeout=TIMEOUT, devices_of=None
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        group = [
            subprocess.Popen(
                (arguments[index] if isinstance(arguments[0], list) else arguments)
                + [f"--coordinator={coordinator}", f"--num_processes={num_processes}"]
                + [f"--process_id={index}", f"--start_timeout={timeout}"]
                + (of_process or {}).get(index, []),
                env=environment((devices_of or {}).get(index, num_devices)),
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(num_processes)
        ]
        started.extend(group)
        return group

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ended(group, timeout=TIMEOUT):
    """Exit status and messages of each process."""
    messages = [process.communicate(timeout=timeout)[1] for process in group]
    return [process.returncode for process in group], messages


def wait_for_step(workdir, step, group):
    deadline = time.monotonic() + TIMEOUT
    while max(logged_steps(workdir), default=0) < step:
        assert all(process.poll() is None for process in group), ended(group)
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    with contextlib.closing(checkpoint.open_reader(workdir)) as manager:
        return checkpoint.restore(manager, 12, state, everywhere)


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


@pytest.mark.parametrize(
    ("of_process", "message"),
    [
        (
            {1: ["--config.optim.learning_rate=0.5"]},
            "optim.learning_rate: process 0 has 0.01, process 1 has 0.5",
        ),
        ({1: ["--workdir=ELSEWHERE"]}, "process 1 does not see what process 0 writes there"),
        (
            {i: ["--config.train.batch_size=3"] for i in (0, 1)},
            "train.batch_size = 3: must be a multiple of the 2 devices, e.g. 2 or 4",
        ),
        (
            {1: ["--config.data.synthetic.num_examples=(7, 3)"]},
            "data.synthetic.num_examples: process 0 has [6, 3], process 1 has [7, 3]",
        ),
    ],
    ids=["settings", "workdir", "batch size", "data"],
)
def test_what_differs_between_processes_is_named_by_all(
    prepared_dir, tmp_path, start, of_process, message
):
    elsewhere = str(tmp_path / "elsewhere")
    of_process = {
        index: [text.replace("ELSEWHERE", elsewhere) for text in texts]
        for index, texts in of_process.items()
    }
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN)
    statuses, messages = ended(start(arguments, 2, of_process=of_process))
    assert statuses == [1, 1]
    for index, text in enumerate(messages):
        assert f"error: process {index} of 2: " in text and message in text
        assert "Traceback" not in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_code_that_differs_is_named_by_all(prepared_dir, tmp_path, start):
    for name in ("contrastseg_jax", "configs", "main.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / "contrastseg_jax" / "losses.py").open("a") as file:
        file.write("# other\n")
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN)
    other = [arguments[0], str(tmp_path / "main.py"), *arguments[2:]]
    group = start([arguments, other], num_processes=2)
    statuses, messages = ended(group)
    assert statuses == [1, 1]
    for text in messages:
        assert "code: process 0 has" in text and "process 1 has" in text and "Traceback" not in text


def test_numbers_of_devices_and_processes_that_differ(prepared_dir, tmp_path, start):
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN)
    statuses, messages = ended(start(arguments, num_processes=2, devices_of={1: 2}))
    assert statuses == [1, 1]
    for text in messages:
        assert "devices of a process: process 0 has 1, process 1 has 2" in text

    group = start(arguments, num_processes=2, of_process={1: ["--num_processes=3"]})
    statuses, messages = ended(group, timeout=AFTER_A_KILL)
    assert all(statuses)
    assert "--num_processes=3: process 0 was started with 2" in messages[1]
    assert not (tmp_path / "run").exists()


def test_a_process_without_the_others_gives_up(prepared_dir, tmp_path, start):
    arguments = command(prepared_dir, tmp_path / "run", *TRAIN)
    group = start(arguments, num_processes=2, timeout=4)
    group[1].kill()
    statuses, messages = ended(group)
    assert statuses[0] == 1
    assert "process 0 of 2: not all processes have met at localhost" in messages[0]
    assert "within --start_timeout=4 s" in messages[0]

    result = run(
        [*arguments, "--coordinator=localhost:1", "--num_processes=2", "--process_id=1"]
        + ["--start_timeout=4"]
    )
    assert result.returncode == 1
    assert "process 1 of 2: not all processes have met at localhost:1 within" in result.stderr
    assert not (tmp_path / "run").exists()
