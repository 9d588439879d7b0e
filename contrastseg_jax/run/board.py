"""Metrics and pictures of a run: `metrics.jsonl`, TensorBoard's event files, other trackers."""

import contextlib
import json
import math
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from contrastseg_jax.errors import best_effort
from contrastseg_jax.files import to_json, write_atomically
from contrastseg_jax.run.workdir import evaluation_folder

# tensorboardX imports PyTorch if it is installed, which takes seconds and 200 MB, and is not used
# here. None in `sys.modules` makes that import fail.
_hidden = "torch" not in sys.modules
if _hidden:
    sys.modules["torch"] = cast(Any, None)
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402 # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402 # pyright: ignore

if _hidden:
    del sys.modules["torch"]


SCORE = "val/mean_iou"  # in the lines of evaluations
RGB = 3  # a colour space of TensorBoard
# A tracker besides TensorBoard: takes the step, numbers by name and files of pictures.
Sink = Callable[[int, Mapping[str, float], Sequence[Path]], None]


@dataclass(frozen=True)
class Board:
    """Where numbers and pictures go, besides `metrics.jsonl`."""

    events: EventsWriter | None  # of TensorBoard; None: the event file cannot be written
    sinks: tuple[Sink, ...] = ()


@contextlib.contextmanager
def open_metrics_log(workdir: Path, start_step: int, sinks: Sequence[Sink] = ()) -> Iterator[Board]:
    """`open_board`, closed on exit."""
    board = open_board(workdir, start_step, sinks)
    try:
        yield board
    finally:
        close_board(board)


def open_board(workdir: Path, start_step: int, sinks: Sequence[Sink] = ()) -> Board:
    """Continue the metrics after `start_step`; a file that cannot be written is a warning.

    Steps that a killed run logged and will repeat are dropped. Event files cannot be truncated, so
    the rest of `metrics.jsonl` is written into a new one.
    """
    events, lines, path = None, None, workdir / "metrics.jsonl"
    with best_effort(str(path)):
        lines = []
        if path.exists():
            lines = _lines_until(path.read_text(), start_step)
            write_atomically(path, "".join(lines))
    # Not tensorboardX's SummaryWriter: its writer thread dies on a full disk, and further writes
    # then block for ever.
    folder = (workdir / "tensorboard").absolute()
    with best_effort(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*") if lines is not None else ():
            old.unlink()
        events = EventsWriter(str(folder / "events"))
        # Makes a running TensorBoard discard the steps of the old files.
        restart = SessionLog(status=SessionLog.START)
        events.write_event(Event(step=0, session_log=restart, wall_time=time.time()))
        for text in lines or ():
            line = json.loads(text)
            pictures = evaluation_pictures(workdir, line["step"]) if SCORE in line else ()
            events.write_event(_event(line, pictures))
        events.flush()
    return Board(events, tuple(sinks))


def evaluation_pictures(workdir: Path, step: int) -> list[Path]:
    """The pictures of the evaluation of val after a step."""
    return sorted(evaluation_folder(workdir, step).glob("*.png"))


def write_metrics(
    workdir: Path,
    board: Board,
    step: int,
    values: Mapping[str, float],
    pictures: Sequence[Path] = (),
) -> None:
    """Append one line; values that are not finite (IoU of an absent class) become null.

    `pictures`: PNG files for TensorBoard and other trackers.
    """
    path, line = workdir / "metrics.jsonl", {"step": step, "time": round(time.time(), 3), **values}
    with best_effort(str(path)), path.open("a") as file:
        file.write(to_json(line) + "\n")
    if board.events:
        with best_effort(str(workdir / "tensorboard")):
            board.events.write_event(_event(line, pictures))
            board.events.flush()
    for sink in board.sinks:
        with best_effort("a tracker"):
            sink(step, values, pictures)


def close_board(board: Board) -> None:
    """Flush and close the event file."""
    if board.events:
        with best_effort("TensorBoard"):
            board.events.close()


def _event(line: Mapping[str, Any], pictures: Sequence[Path] = ()) -> Event:
    """A line of `metrics.jsonl` as a TensorBoard event, with its original time, and pictures."""
    # Not tensorboardX's `scalar`, which is ASCII only: 天 and 地 would both become `_`.
    scalars = [
        Summary.Value(
            tag=key.encode(errors="backslashreplace").decode(),
            simple_value=math.nan if value is None else value,
        )
        for key, value in line.items()
        if key not in ("step", "time")
    ]
    wall_time, shown = line.get("time", time.time()), [_picture(path) for path in pictures]
    return Event(step=line["step"], summary=Summary(value=scalars + shown), wall_time=wall_time)


def _picture(path: Path) -> Any:
    png = path.read_bytes()
    width, height = struct.unpack(">II", png[16:24])  # of the header
    image = Summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=png)
    return Summary.Value(tag=f"val/{path.stem}", image=image)


def _lines_until(text: str, last_step: int) -> list[str]:
    """The complete lines up to `last_step`; a kill may have truncated the last one."""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if _step(line) <= last_step]


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return math.inf
