"""Many problems are one error; what went wrong is one line."""

import errno

from contrastseg_jax.errors import InputError, listed, reason


def test_problems_are_counted_and_the_first_are_listed():
    error = listed("the data", [f"file {i}" for i in range(23)])
    lines = str(error).splitlines()
    assert isinstance(error, InputError)
    assert lines[0] == "23 problems in the data:"
    assert lines[1] == "  file 0" and lines[-1] == "  and 3 more" and len(lines) == 22
    assert str(listed("x", ["one"])) == "1 problem in x:\n  one"


def raised(error, cause=None):
    """An error as it is caught, with what it was raised from."""
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_an_error_is_told_in_one_line():
    full = OSError(errno.ENOSPC, "No space left on device")
    of_tensorstore = ValueError("RESOURCE_EXHAUSTED: Error writing [os_error_code='28']\nat x.cc")
    for error in (full, of_tensorstore, raised(ValueError("Orbax failed"), full)):
        assert reason(error) == "No space left on device"
    # What a cause says of the system names no file.
    of_file = InputError("x.png: cannot be read (Input/output error)\nsecond line")
    assert reason(raised(of_file, OSError(errno.EIO, "Input/output error"))) == (
        "x.png: cannot be read (Input/output error)"
    )
    assert reason(OSError("truncated")) == "truncated"
    assert reason(KeyError("x")) == "KeyError: 'x'"
