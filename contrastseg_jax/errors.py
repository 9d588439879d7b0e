"""The one error for bad input, so that `main.py` can tell it from a fault of the program."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input of the user: names the file or setting, its value and the rule it breaks."""


def listed(title: str, problems: Sequence[str], *, limit: int = 20) -> InputError:
    """One error for many problems: the first `limit` of them under a title with their number."""
    lines = [f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {title}:"]
    lines += [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  and {len(problems) - limit} more")
    return InputError("\n".join(lines))
