"""Columns of text as a terminal shows them, in which letters may be wide or combine."""

import unicodedata
from collections.abc import Sequence


def display_width(text: str) -> int:
    """The cells of a terminal that a text takes: two for a wide letter, none for an accent."""
    return sum(_cells(letter) for letter in unicodedata.normalize("NFC", text))


def ljust(text: str, width: int) -> str:
    """The text, filled up to `width` cells on the right."""
    return text + " " * (width - display_width(text))


def rjust(text: str, width: int) -> str:
    """The text, filled up to `width` cells on the left."""
    return " " * (width - display_width(text)) + text


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns as wide as their widest cell: the first flush left, the others right."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([ljust(row[0], widths[0]), *map(rjust, row[1:], widths[1:])]) for row in rows]


def _cells(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):  # accents, joiners
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "FW" else 1
