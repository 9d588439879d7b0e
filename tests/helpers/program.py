"""`main.py` as users run it: in a process of its own, or in several; TOY with a small network."""

import io
import json
import os
import socket
import struct
import subprocess
import sys
import time

import compile_fast
from paths import ROOT
from small import SETTINGS
from tensorboardX.proto.event_pb2 import Event

# Seconds, of anything that is waited for: no more than a guard against what hangs, so that a busy
# machine is given its time.
TIMEOUT = 600
TRAIN = [f"--config={ROOT / 'configs' / 'default.py'}:hrnet_tiny,memory"]
TOY = [f"--config={ROOT / 'configs' / 'default.py'}:toy,memory"]


def command(prepared_dir, workdir, *flags, settings=SETTINGS):
    main = ROOT / "tests" / "helpers" / "toy_main.py" if TOY[0] in flags else ROOT / "main.py"
    overrides = [f"--config.{text}" for text in settings]
    overrides.append(f"--config.data.prepared_dir={prepared_dir}")
    return [sys.executable, str(main), f"--workdir={workdir}", *overrides, *flags]


def environment(num_devices=1):
    return os.environ | {
        "XLA_FLAGS": compile_fast.flags(num_devices),
        "NPROC": "32",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def run(arguments, num_devices=1):
    return subprocess.run(
        arguments,
        env=environment(num_devices),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
    )


def start_group(
    arguments, num_processes, num_devices=1, of_process=None, timeout=TIMEOUT, devices_of=None
):
    """`main.py` in several processes that meet at a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    return [
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


def logged_steps(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if "train/loss" in line]


def require_prompt_end(killed):
    """That the processes left after one was killed at a time have ended within the 60 s promised.

    Longer on a machine with more to do than it has processors.
    """
    busy = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    assert time.monotonic() - killed < 60 * busy


def events(workdir):
    """All that TensorBoard's files hold: records of a length, a checksum, data, a checksum."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = io.BytesIO(path.read_bytes())
        while header := content.read(12):
            (length,) = struct.unpack("<Q", header[:8])
            yield Event.FromString(content.read(length))
            content.read(4)


def scalars(workdir):
    """Name, step, value and time of each scalar in TensorBoard's files."""
    return [
        (value.tag, event.step, value.simple_value, event.wall_time)
        for event in events(workdir)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def ended(group, timeout=TIMEOUT):
    """Exit status and messages of each process."""
    messages = [process.communicate(timeout=timeout)[1] for process in group]
    return [process.returncode for process in group], messages
