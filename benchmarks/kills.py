"""One of several processes killed, again and again at any moment: is anything lost or corrupted?

    python benchmarks/kills.py --workdir=runs/kills --kills=20

A run of `main.py` on the embedded photographs, in processes of this machine that meet on loopback.
Each time a random process gets SIGKILL at a random moment, while it starts, compiles, trains, saves
or evaluates; the others must end by themselves; then all are started again. In the end every loss
and every array of the state must be, bit for bit, that of a run which nothing has disturbed.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from contrastseg_jax.parallel import sharding
from contrastseg_jax.run import checkpoint_reader
from contrastseg_jax.run.workdir import read_config, saved_steps
from contrastseg_jax.setup.resolve import resolve
from contrastseg_jax.training.optim import build_optimizer
from contrastseg_jax.training.state import abstract_state

ROOT = Path(__file__).parents[1]
START_TIMEOUT = 60  # seconds after which a process ends that has not met the others
ENDS_WITHIN = 90  # seconds in which those that are left must have ended
SETTINGS = (
    *("train.batch_size=4", "train.num_steps=300", "train.log_steps=1", "eval.num_pictures=1"),
    *("train.checkpoint_steps=10", "train.eval_steps=50", "contrast.warmup_steps=10"),
    "augment.crop_size=(32, 32)",
)

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "workdir", "runs/kills", "Folder of the two runs; only the disturbed one starts anew."
)
flags.DEFINE_integer("kills", 20, "How often a process is killed.")
flags.DEFINE_integer("num_processes", 2, "Processes of a run.")
flags.DEFINE_float("longest", 30, "Seconds after the start until which a process is killed.")
flags.DEFINE_integer("seed", 0, "Of moments and processes.")

Group = list[subprocess.Popen[bytes]]


def main(_: list[str]) -> None:
    """Prints a row for every kill, then what the run was compared in."""
    workdir, rng = Path(FLAGS.workdir), np.random.default_rng(FLAGS.seed)
    whole, killed = workdir / "whole", workdir / "killed"
    workdir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(killed, ignore_errors=True)
    run_to_its_end(whole)
    print("| kill | process | after, s | last step | others ended after, s | whole checkpoint |")
    print("| --- | --- | --- | --- | --- | --- |")
    slowest = 0.0
    for number in range(1, FLAGS.kills + 1):
        group, moment = start(killed), rng.uniform(0, FLAGS.longest)
        victim = int(rng.integers(len(group)))
        time.sleep(moment)
        if any(process.poll() is not None for process in group):
            sys.exit(f"ended before it was killed: see {log_file(killed)}")
        group[victim].kill()
        ended = time_until_end(group)
        slowest = max(slowest, ended)
        steps = [step for step, _ in losses(killed)]
        saved = max(checkpoints(killed), default=0)
        print(f"| {number} | {victim} | {moment:.1f} | {max(steps, default=0)} ", end="")
        print(f"| {ended:.1f} | {saved} |", flush=True)
    run_to_its_end(killed)

    expected, got = losses(whole), losses(killed)
    states = final_state(whole), final_state(killed)
    differing = [path for path, x in states[0].items() if not np.array_equal(x, states[1][path])]
    print(f"\nslowest end of the others: {slowest:.1f} s")
    print(f"losses of {len(expected)} steps: {'the same' if expected == got else 'DIFFERENT'}")
    print(f"arrays of the state that differ: {len(differing)} of {len(states[0])}")
    if expected != got or differing or states[0].keys() != states[1].keys():
        sys.exit("the run that was killed is not the run that was not")


def start(workdir: Path) -> Group:
    """The processes of a run, in sessions of their own; what they say goes to a file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    with log_file(workdir).open("ab") as log:
        return [
            subprocess.Popen(
                [
                    *(sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}"),
                    f"--config={ROOT / 'configs' / 'quickstart.py'}",
                    *(f"--config.{setting}" for setting in SETTINGS),
                    *(f"--coordinator={coordinator}", f"--process_id={index}"),
                    f"--num_processes={FLAGS.num_processes}",
                    f"--start_timeout={START_TIMEOUT}",
                ],
                env=os.environ
                | {"JAX_PLATFORMS": "cpu", "NPROC": "32"}
                | {"JAX_COMPILATION_CACHE_DIR": str(workdir.with_name("compiled"))},
                stdout=log,
                stderr=log,
            )
            for index in range(FLAGS.num_processes)
        ]


def log_file(workdir: Path) -> Path:
    """Where the processes of a run write."""
    return workdir.with_suffix(".log")


def run_to_its_end(workdir: Path) -> None:
    """A run that nothing disturbs."""
    if any(process.wait() for process in start(workdir)):
        sys.exit(f"a run failed: see {log_file(workdir)}")


def time_until_end(group: Group) -> float:
    """Seconds until the last process has ended."""
    since = time.monotonic()
    try:
        for process in group:
            process.wait(max(0.0, since + ENDS_WITHIN - time.monotonic()))
    except subprocess.TimeoutExpired:
        for process in group:
            process.kill()
        sys.exit(f"a process was still there {ENDS_WITHIN} s after another was killed")
    return time.monotonic() - since


def losses(workdir: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of the log; a kill may have cut the last one short."""
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            values = json.loads(line)
            if "train/loss" in values:
                found.append((values["step"], values["train/loss"]))
    return found


def checkpoints(workdir: Path) -> list[int]:
    """The steps of the whole checkpoints; Orbax gives others another name until they are."""
    return saved_steps(workdir)


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by its path."""
    config = read_config(workdir)
    setup = resolve(config)
    state = abstract_state(setup, build_optimizer(config)[0])
    everywhere = sharding.replicated(setup.mesh)
    step = checkpoint_reader.find_intact(workdir, "latest")
    state = checkpoint_reader.restore(workdir, step, state, everywhere)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(state)}


if __name__ == "__main__":
    app.run(main)
