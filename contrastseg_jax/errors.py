"""The one error for bad input, and how errors are told; `main.py` shows the rest as faults."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence

OS_ERROR = r"(?:os_error_code='|OS error |\[Errno )(\d+)"  # in texts of TensorStore, and others
log = logging.getLogger("contrastseg_jax")
_warned: set[str] = set()


class InputError(ValueError):
    """Bad input of the user: names the file or setting, its value and the rule it breaks."""


def listed(title: str, problems: Sequence[str], *, limit: int = 20) -> InputError:
    """One error for many problems: the first `limit` of them under a title with their number."""
    lines = [f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {title}:"]
    lines += [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  and {len(problems) - limit} more")
    return InputError("\n".join(lines))


def reason(error: BaseException) -> str:
    """One line that says what went wrong: that of an InputError, or of the operating system.

    TensorStore hides the number of an error of the system in a long text.
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
    """Within, an error is a warning, the first time: nothing else is to be lost with `what`."""
    try:
        yield
    except Exception as error:
        warn_once(what, f"{what}: {reason(error)}; going on without it")


def warn_once(subject: str, message: str) -> None:
    """Warn, unless there was a warning of this subject before."""
    if subject not in _warned:
        log.warning(message)
    _warned.add(subject)
