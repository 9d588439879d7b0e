"""What a run writes down, and what a resumed one keeps of it."""

import json
import math
import time

from program import events, scalars

from contrastseg_jax.logging import close_board, open_board, write_metrics


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_valid_json_line_each(tmp_path):
    before = round(time.time(), 3)
    board = open_board(tmp_path, 0)
    write_metrics(tmp_path, board, 1, {"train/loss": 1.5})
    write_metrics(tmp_path, board, 2, {"val/iou_snow": math.nan})
    close_board(board)
    lines = read(tmp_path)
    assert before <= lines[0].pop("time") <= lines[1].pop("time") <= time.time()
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
