"""Where numbers go: `metrics.jsonl`, TensorBoard and the terminal."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """TensorBoard files that go on after `start_step`, in a workdir whose `metrics.jsonl` does too.

    A run that was killed has logged steps that it will take again: they are dropped from both.
    TensorBoard's files cannot be shortened, so what was logged is written into a new one.
    """
    path, folder = workdir / "metrics.jsonl", workdir / "tensorboard"
    lines = _lines_until(path.read_text(), start_step) if path.exists() else []
    write_atomically(path, "".join(lines))
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    # A TensorBoard that shows the old files forgets all steps from `purge_step` on.
    board = tensorboardX.SummaryWriter(str(folder), purge_step=0)
    for line in lines:
        _show(board, json.loads(line))
    board.flush()
    return board


def write_metrics(
    workdir: Path, board: tensorboardX.SummaryWriter, step: int, values: Mapping[str, float]
) -> None:
    """Append one line of numbers; what is not finite (IoU of an absent class) becomes null."""
    line = {"step": step, "time": round(time.time(), 3), **values}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(to_json(line) + "\n")
    _show(board, line)
    board.flush()


def _show(board: tensorboardX.SummaryWriter, line: Mapping[str, Any]) -> None:
    """Give a line of `metrics.jsonl` to TensorBoard, with the time at which it was logged."""
    for key, value in line.items():
        if key not in ("step", "time"):
            value = math.nan if value is None else value
            board.add_scalar(key, value, line["step"], walltime=line.get("time"))


def _lines_until(text: str, last_step: int) -> list[str]:
    """The whole lines of steps up to `last_step`; a kill may have cut the last line short."""
    return [
        line
        for line in text.splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] <= last_step
    ]
