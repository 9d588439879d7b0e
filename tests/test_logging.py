"""What a run writes down, and what a resumed one keeps of it."""

import json
import math

from contrastseg_jax.logging import close_board, open_board, write_metrics


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_valid_json_line_each(tmp_path):
    board = open_board(tmp_path, 0)
    write_metrics(tmp_path, board, 1, {"train/loss": 1.5})
    write_metrics(tmp_path, board, 2, {"val/iou_snow": math.nan})
    close_board(board)
    assert read(tmp_path) == [{"step": 1, "train/loss": 1.5}, {"step": 2, "val/iou_snow": None}]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_resuming_drops_what_comes_again(tmp_path):
    board = open_board(tmp_path, 0)
    for step in (1, 2, 3):
        write_metrics(tmp_path, board, step, {"train/loss": float(step)})
    close_board(board)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')  # killed while writing
    close_board(open_board(tmp_path, 2))
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
