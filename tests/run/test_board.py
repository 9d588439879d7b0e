"""What a run writes down, and what a resumed one keeps of it."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from program import events, scalars

from contrastseg_jax.data.images import encode_png
from contrastseg_jax.run.board import (
    close_board,
    evaluation_pictures,
    open_board,
    write_metrics,
)
from contrastseg_jax.run.workdir import evaluation_folder


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_valid_json_line_each(tmp_path):
    before = round(time.time(), 3)
    board = open_board(tmp_path, 0)
    write_metrics(tmp_path, board, 1, {"train/loss": 1.5})
    write_metrics(tmp_path, board, 2, {"val/iou_snow": math.nan})
    close_board(board)
    lines = read(tmp_path)
    assert before <= lines[0].pop("time") <= lines[1].pop("time") <= time.time() + 0.001  # rounded
    assert lines == [{"step": 1, "train/loss": 1.5}, {"step": 2, "val/iou_snow": None}]
    (loss, snow) = scalars(tmp_path)
    assert loss[:3] == ("train/loss", 1, 1.5)
    assert snow[:2] == ("val/iou_snow", 2) and math.isnan(snow[2])


def test_resuming_drops_what_comes_again(tmp_path):
    board = open_board(tmp_path, 0)
    for step in (1, 2, 3):
        write_metrics(tmp_path, board, step, {"train/loss": float(step)})
    close_board(board)
    logged = read(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # killed while writing
    board = open_board(tmp_path, 2)
    write_metrics(tmp_path, board, 3, {"train/loss": 30.0})
    close_board(board)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    found = scalars(tmp_path)
    assert [scalar[:3] for scalar in found] == [
        *(("train/loss", 1, 1.0), ("train/loss", 2, 2.0), ("train/loss", 3, 30.0))
    ]
    assert [scalar[3] for scalar in found[:2]] == [line["time"] for line in logged[:2]]
    # By which a TensorBoard that has read the old files forgets them.
    starts = [event.step for event in events(tmp_path) if event.session_log.status]
    assert starts == [0]


def test_classes_of_any_name_have_a_curve_of_their_own(tmp_path):
    board = open_board(tmp_path, 6)
    names = ["val/iou_天", "val/iou_地", "val/iou_a b", "val/iou_\udcff"]
    write_metrics(tmp_path, board, 7, dict.fromkeys(names, 0.5))
    close_board(board)
    assert read(tmp_path)[0].items() >= dict.fromkeys(names, 0.5).items()
    shown = [*names[:3], "val/iou_\\udcff"]
    assert [scalar[:3] for scalar in scalars(tmp_path)] == [(name, 7, 0.5) for name in shown]


@pytest.mark.parametrize("lost", ["metrics.jsonl", "tensorboard"])
def test_what_cannot_be_written_is_one_warning(tmp_path, caplog, lost):
    if lost == "tensorboard":
        (tmp_path / lost).write_text("a file")
    else:
        (tmp_path / lost).mkdir()
    board = open_board(tmp_path, 0)
    for step in (1, 2, 3):
        write_metrics(tmp_path, board, step, {"train/loss": 1.5})
    close_board(board)
    assert caplog.text.count("WARNING") == 1 and f"{tmp_path / lost}: " in caplog.text
    if lost == "tensorboard":
        assert len(read(tmp_path)) == 3
    else:
        assert len(scalars(tmp_path)) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_no_tracker(tmp_path, caplog):
    board = open_board(tmp_path, 0)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    for step in range(30):  # more than a queue would take
        write_metrics(tmp_path, board, step, {"train/loss": 1.5})
    close_board(board)
    assert caplog.text.count(f"{tmp_path / 'metrics.jsonl'}: No space left on device") == 1


def test_a_line_that_is_damaged_is_dropped(tmp_path):
    lines = ['{"step": 1}', '{"step": 2, "tr{"step": 3}', "[]", '{"step": 4}']
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    close_board(open_board(tmp_path, 9))
    assert [line["step"] for line in read(tmp_path)] == [1, 4]


def test_pytorch_is_not_imported():
    """Which tensorboardX would do, for seconds; who imports it later, gets it."""
    code = "import sys; from contrastseg_jax.run import board; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_pictures_of_evaluations_are_in_tensorboard_after_a_restart_too(tmp_path):
    folder = evaluation_folder(tmp_path, 4)
    folder.mkdir(parents=True)
    png = encode_png(np.arange(30, dtype=np.uint8).reshape(2, 5, 3))
    (folder / "000007.png").write_bytes(png)
    board = open_board(tmp_path, 0)
    write_metrics(tmp_path, board, 3, {"train/loss": 1.0})
    write_metrics(tmp_path, board, 4, {"val/mean_iou": 0.5}, evaluation_pictures(tmp_path, 4))
    close_board(board)
    for _ in range(2):
        shown = [
            (value.tag, event.step, value.image)
            for event in events(tmp_path)
            for value in event.summary.value
            if value.HasField("image")
        ]
        ((tag, step, image),) = shown
        assert (tag, step) == ("val/000007", 4) and image.encoded_image_string == png
        assert (image.height, image.width, image.colorspace) == (2, 5, 3)
        close_board(open_board(tmp_path, 4))


def test_other_trackers_get_the_same_and_cannot_stop_a_run(tmp_path, caplog):
    got = []

    def broken(*_):
        raise ConnectionError("no network")

    board = open_board(tmp_path, 0, (broken, lambda *arguments: got.append(arguments)))
    write_metrics(tmp_path, board, 1, {"train/loss": 1.5})
    close_board(board)
    assert got == [(1, {"train/loss": 1.5}, ())]
    assert "a tracker: no network; continuing without it" in caplog.text
