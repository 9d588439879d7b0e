"""Many problems are one error."""

from contrastseg_jax.errors import InputError, listed


def test_problems_are_counted_and_the_first_are_listed():
    error = listed("the data", [f"file {i}" for i in range(23)])
    lines = str(error).splitlines()
    assert isinstance(error, InputError)
    assert lines[0] == "23 problems in the data:"
    assert lines[1] == "  file 0" and lines[-1] == "  and 3 more" and len(lines) == 22
    assert str(listed("x", ["one"])) == "1 problem in x:\n  one"
