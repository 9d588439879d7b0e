"""Where numbers go: `metrics.jsonl`, TensorBoard and the terminal."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import absl.logging
import tensorboardX

from contrastseg_jax.files import to_json, write_atomically

log = logging.getLogger("contrastseg_jax")


def start_logging(process: int = 0) -> None:
    """Plain lines on standard error; of the libraries, and of processes but 0, what is wrong."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    handler = logging.StreamHandler()
    name = f"process {process}: " if process else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if process else logging.INFO)


def open_board(workdir: Path, start_step: int) -> tensorboardX.SummaryWriter:
    """TensorBoard files that go on after `start_step`, in a workdir whose log does too.

    A run that was killed has logged steps that it will take again: they are dropped.
    """
    path = workdir / "metrics.jsonl"
    if path.exists():
        write_atomically(path, "".join(_lines_until(path.read_text(), start_step)))
    return tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)


def write_metrics(
    workdir: Path, board: tensorboardX.SummaryWriter, step: int, values: Mapping[str, float]
) -> None:
    """Append one line of numbers; what is not finite (IoU of an absent class) becomes null."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(to_json({"step": step, **values}) + "\n")
    for key, value in values.items():
        board.add_scalar(key, value, step)
    board.flush()


def _lines_until(text: str, last_step: int) -> list[str]:
    """The whole lines of steps up to `last_step`; a kill may have cut the last line short."""
    return [
        line
        for line in text.splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] <= last_step
    ]
