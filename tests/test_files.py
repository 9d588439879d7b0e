"""A file is the old one or the new one."""

import os
import threading

import pytest

from contrastseg_jax.errors import InputError
from contrastseg_jax.files import lock, to_json, write_atomically


def test_text_and_bytes_are_written_into_new_folders(tmp_path):
    write_atomically(tmp_path / "a" / "x.txt", "grün\n")
    write_atomically(tmp_path / "a" / "y.bin", b"\x00")
    assert (tmp_path / "a" / "x.txt").read_text(encoding="utf-8") == "grün\n"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x.txt", "y.bin"]


def test_the_old_content_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_folder_is_locked_by_one_at_a_time(tmp_path):
    with lock(tmp_path / "run" / ".lock"):
        with pytest.raises(InputError, match="run: another process is training in this folder"):
            lock(tmp_path / "run" / ".lock")
    lock(tmp_path / "run" / ".lock").close()


def test_a_lock_may_be_waited_for(tmp_path, caplog):
    caplog.set_level("INFO", "contrastseg_jax")
    held = lock(tmp_path / ".lock")
    threading.Timer(0.3, held.close).start()
    with lock(tmp_path / ".lock", wait=True):
        assert held.closed
    assert f"{tmp_path}: waiting for another process" in caplog.text


def test_json_has_null_for_what_is_not_finite():
    text = to_json({"a": [1.5, float("nan")], "b": {"c": float("inf")}, "d": 3})
    assert text == '{"a": [1.5, null], "b": {"c": null}, "d": 3}'
