"""A file is the old one or the new one."""

import errno
import os
import threading
from pathlib import Path

import pytest

from contrastseg_jax import files
from contrastseg_jax.errors import InputError
from contrastseg_jax.files import (
    lock,
    require_disk_space,
    require_literal,
    to_json,
    write_atomically,
)


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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_worth_a_warning(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    for wait in (False, True):
        lock(tmp_path / ".lock", wait=wait).close()
    message = f"{tmp_path}: its file system has no locks ({os.strerror(number)})"
    assert caplog.text.count(message) == 1


def test_an_error_of_a_lock_that_says_something_else_stays_one(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        lock(tmp_path / ".lock")


def test_room_that_is_needed(tmp_path):
    require_disk_space(tmp_path, 1000)
    with pytest.raises(OSError, match=r"No space left on device: .* needs 1,000,000,000,000,000,"):
        require_disk_space(tmp_path, 10**18)


@pytest.mark.parametrize(
    ("text", "misread", "message"),
    [
        ("a\\b", files.ORBAX_MISREADS, r"'\\', which would be read as /"),
        ("gs:/x", files.ORBAX_MISREADS, "'gs:/', which would be read as a bucket"),
        ("gs:", files.ORBAX_MISREADS, "'gs:/', which would be read as a bucket"),
        ("a?b", files.TFDS_MISREADS, "'[?]', which would be read as the end of the path"),
        ("a\0b", files.ORBAX_MISREADS, "the character NUL"),
        (os.fsdecode(b"a\xff"), files.TFDS_MISREADS, "bytes that are not UTF-8"),
    ],
)
def test_paths_that_are_others_to_a_library_are_refused(text, misread, message):
    with pytest.raises(InputError, match=f"(?s)^--workdir=.*: must not contain {message}"):
        require_literal(Path(text), "--workdir", misread)


@pytest.mark.parametrize(
    "text", ["exp[1]", "a*b", "{a}", "a%20b", "a#b", " ", "-a", "~", "写真", "/"]
)
def test_other_paths_are_taken(text):
    require_literal(Path(text), "--workdir", files.ORBAX_MISREADS | files.TFDS_MISREADS)
