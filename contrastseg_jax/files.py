"""Atomic writes, file locks, and checks of disk space and paths."""

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from contrastseg_jax.errors import InputError, warn_once

log = logging.getLogger("contrastseg_jax")

CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # without locks

# Parts of a path that the libraries writing there do not take literally, and their meaning there.
ORBAX_MISREADS = {"\\": "/", "gs:/": "a bucket of Google Cloud"}  # TensorStore, Orbax
TFDS_MISREADS = {"?": "the end of the path"}  # TFDS


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers, and a killed process, leave the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Does not contain the file's name, so that it fits into the 255 bytes file systems allow.
    partial = path.with_name(f".{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise


def lock(path: Path, *, wait: bool = False) -> IO[str]:
    """Lock a file until the returned handle is closed or the process ends.

    On a file system without locks this only warns.

    Raises:
        InputError: another process holds the lock, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        _flock(file, wait)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            file.close()
            message = f"{path.parent}: another process is training in this folder"
            raise InputError(message) from error
        if error.errno not in CANNOT_LOCK:
            file.close()
            raise
        warn_once(
            str(path),
            f"{path.parent}: its file system has no locks ({error.strerror}), so nothing keeps a"
            " second process from writing there at the same time",
        )
    return file


def require_disk_space(folder: Path, needed: int) -> None:
    """Raise an OSError if the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No space left on device: {folder} needs {needed:,} bytes, {free:,} are free",
        )


def require_literal(path: Path, name: str, misread: Mapping[str, str]) -> None:
    """Raise an InputError if the library that writes to a path, given as `name`, would misread it.

    `misread`: ORBAX_MISREADS or TFDS_MISREADS.
    """
    text = f"{path.absolute()}/"
    found = [
        f"'{part}', which would be read as {other}"
        for part, other in misread.items()
        if part in text
    ]
    if "\0" in text:
        found.append("the character NUL")
    if any("\ud800" <= character <= "\udfff" for character in text):
        found.append("bytes that are not UTF-8")
    if found:
        raise InputError(f"{name}={path}: must not contain {found[0]}; choose another folder")


def _flock(file: IO[str], wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        log.info(f"{Path(file.name).parent}: waiting for another process")
        fcntl.flock(file, fcntl.LOCK_EX)


def to_json(value: Any) -> str:
    """JSON of nested dicts, lists and numbers; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
