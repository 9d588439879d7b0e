"""What a rule of a setting is, and the kinds of rules that several settings share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from contrastseg_jax.config.tree import Config


@dataclass(frozen=True)
class Rule:
    """What holds for a good value, in the config that has it, and the sentence that says so."""

    holds: Callable[[Any, Config], bool]
    sentence: str
    names: tuple[str, ...] = ()  # the values that there are; an error suggests the nearest


# NaN, of which every comparison is false, breaks each of these.


def at_least(smallest: int) -> Rule:
    """A number from `smallest` on."""
    return Rule(lambda value, _: value >= smallest, f"must be at least {smallest}")


def above(bound: int) -> Rule:
    """A number larger than `bound`."""
    return Rule(lambda value, _: value > bound, f"must be > {bound}")


def not_negative() -> Rule:
    """A number from 0 on."""
    return Rule(lambda value, _: value >= 0, "must not be negative")


def between(smallest: int, largest: int) -> Rule:
    """A number from `smallest` to `largest`, both included."""
    return Rule(lambda value, _: smallest <= value <= largest, f"must be in {smallest}..{largest}")


def from_below(smallest: int, bound: int) -> Rule:
    """A number from `smallest` on that stays below `bound`."""
    sentence = f"must be at least {smallest} and below {bound}"
    return Rule(lambda value, _: smallest <= value < bound, sentence)


def one_of(*names: str) -> Rule:
    """One of the names."""
    return Rule(lambda value, _: value in names, f"must be one of {', '.join(names)}", names)


def pair(smallest: int, sentence: str) -> Rule:
    """Two whole numbers from `smallest` on."""
    return Rule(lambda value, _: len(value) == 2 and are_whole(value, smallest), sentence)


def increasing(sentence: str) -> Rule:
    """Two numbers above 0, the second not below the first."""
    return Rule(lambda value, _: len(value) == 2 and 0 < value[0] <= value[1], sentence)


def text() -> Rule:
    """Text that can be a path, and be written to any file."""
    return Rule(lambda value, _: is_text(value), "must be UTF-8, without NUL")


def is_text(value: str) -> bool:
    """Whether it can be a path, and be written to any file: it is UTF-8 and has no NUL."""
    return "\0" not in value and value.encode(errors="ignore").decode() == value


def is_number(value: str) -> bool:
    """Whether a text is a number."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def are_whole(values: Sequence[Any], smallest: int, largest: float = math.inf) -> bool:
    """Whether all are whole numbers in a range."""
    return all(isinstance(value, int) and smallest <= value <= largest for value in values)


def are_numbers(values: Sequence[Any], smallest: float, largest: float = math.inf) -> bool:
    """Whether all are numbers in a range."""
    return all(isinstance(value, (int, float)) and smallest <= value <= largest for value in values)
