"""A file is the old one or the new one."""

import os

import pytest

from contrastseg_jax.files import write_atomically


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
