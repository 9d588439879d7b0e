"""Counts with their nouns, and columns of text as a terminal shows them."""

import unicodedata

from contrastseg_jax.text import count_of, display_width, ljust, rjust, table


def test_width_counts_the_cells_of_a_terminal():
    widths = {"road": 4, "道路": 4, "ｗ": 2, "ﾊ": 1, "한": 2, "é": 1, "a\u200db": 2, "": 0}
    for text, width in widths.items():
        assert display_width(text) == width
        assert display_width(unicodedata.normalize("NFD", text)) == width
        assert len(ljust(text, 6)) - len(text) == len(rjust(text, 6)) - len(text) == 6 - width
    assert display_width("\udce9") == 1  # of a name that is not UTF-8


def test_one_is_singular_and_none_plural():
    counts = [count_of(number, "batch", "batches") for number in (0, 1, 2)]
    assert counts == ["0 batches", "1 batch", "2 batches"]
    assert [count_of(number, "image") for number in (1, 3)] == ["1 image", "3 images"]


def test_columns_are_aligned_under_wide_letters():
    assert table([("class", "pixels"), ("道路", "7"), ("한국 tree", "12")]) == [
        "class      pixels",
        "道路            7",
        "한국 tree      12",
    ]
