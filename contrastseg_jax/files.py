"""Writing files so that nothing is ever half there."""

import fcntl
import json
import logging
import math
import os
import threading
from pathlib import Path
from typing import IO, Any

from contrastseg_jax.errors import InputError

log = logging.getLogger("contrastseg_jax")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a kill, finds the old or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, whatever the name: both must fit into the 255 bytes that file systems allow.
    partial = path.with_name(f".{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise


def lock(path: Path, *, wait: bool = False) -> IO[str]:
    """Hold a lock until the file that is returned is closed, at the latest when the process ends.

    Raises:
        InputError: another process holds it, and `wait` does not say to wait for that one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            file.close()
            message = f"{path.parent}: another process is training in this folder"
            raise InputError(message) from error
        log.info(f"{path.parent}: waiting for another process")
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def to_json(value: Any) -> str:
    """JSON of nested dicts, lists and numbers; what is not finite, which JSON lacks, is null."""
    return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
