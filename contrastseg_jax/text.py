"""Counts with plurals, and text columns aligned by display width (wide characters, accents)."""

import unicodedata
from collections.abc import Sequence


def count_of(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 image", "2 images"; `plural`: where it is not noun + s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def display_width(text: str) -> int:
    """Terminal cells taken by a text: two per wide character, none per combining one."""
    return sum(_cells(letter) for letter in unicodedata.normalize("NFC", text))


def ljust(text: str, width: int) -> str:
    """The text, left-aligned in `width` terminal cells."""
    return text + " " * (width - display_width(text))


def rjust(text: str, width: int) -> str:
    """The text, right-aligned in `width` terminal cells."""
    return " " * (width - display_width(text)) + text


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([ljust(row[0], widths[0]), *map(rjust, row[1:], widths[1:])]) for row in rows]


def _cells(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):  # accents, joiners
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "FW" else 1
