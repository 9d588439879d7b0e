"""The error for bad input, and error messages; any other exception is a bug, with a traceback."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence

OS_ERROR = r"(?:os_error_code='|OS error |\[Errno )(\d+)"  # in messages of TensorStore and others
log = logging.getLogger("contrastseg_jax")
_warned: set[str] = set()


class InputError(ValueError):
    """Bad user input: names the file or setting, its value and the rule it breaks."""


def listed(title: str, problems: Sequence[str], *, limit: int = 20) -> InputError:
    """One InputError listing the first `limit` problems, with their number and a title."""
    lines = [f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {title}:"]
    lines += [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  and {len(problems) - limit} more")
    return InputError("\n".join(lines))


def reason(error: BaseException) -> str:
    """The cause in one line: an InputError's message, or the operating system's.

    TensorStore buries the errno in a long message.
    """
    line = str(error).strip().partition("\n")[0][:200]
    if isinstance(error, InputError):  # names the file too, which its cause may not
        return line
    cause: BaseException | None = error
    while cause is not None:
        if strerror := getattr(cause, "strerror", None):
            return strerror
        if number := re.search(OS_ERROR, str(cause)):
            return os.strerror(int(number[1]))
        cause = cause.__cause__ or cause.__context__
    return line if isinstance(error, OSError) else f"{type(error).__name__}: {line}"


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Turn errors inside the block into one warning: failing to write `what` must not end a run."""
    try:
        yield
    except Exception as error:
        warn_once(what, f"{what}: {reason(error)}; continuing without it")


def warn_once(subject: str, message: str) -> None:
    """Warn, once per subject."""
    if subject not in _warned:
        log.warning(message)
    _warned.add(subject)
