"""A part of a split, by share, by number or by a list of names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contrastseg_jax.errors import InputError, listed

SEED = 0  # the same part in every run, whatever its own seed
SETTING = "data.train_subset"


@dataclass(frozen=True)
class Subset(Sequence):
    """Some records of a split, in their order there. Can be pickled where the records can."""

    records: Sequence[dict[str, bytes]]
    indices: tuple[int, ...]

    def __len__(self) -> int:
        """Number of records."""
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record, still encoded."""
        return self.records[self.indices[index]]


def subset(records: Sequence[dict[str, bytes]], which: str) -> Sequence[dict[str, bytes]]:
    """The part of a split that `which` names.

    Args:
        records: of the split.
        which: a share below 1, a number, a file that lists names of images, or empty for all.

    Raises:
        InputError: the split is smaller, or has no image of a listed name; the list cannot be read,
            is empty or names an image twice.
    """
    if not which:
        return records
    try:
        wanted = float(which)
    except ValueError:
        return Subset(records, _listed(records, Path(which)))
    number = int(wanted) if wanted >= 1 else max(1, round(wanted * len(records)))
    if number > len(records):
        raise InputError(
            f"{SETTING} = '{which}': must be at most {len(records)}, the images of the split"
        )
    # The first of one permutation, so that a smaller part lies inside a larger one.
    drawn = np.random.default_rng(SEED).permutation(len(records))[:number]
    return Subset(records, tuple(sorted(drawn.tolist())))


def image_names(records: Sequence[dict[str, bytes]]) -> list[str]:
    """The name of each image."""
    return [record["name"].decode() for record in records]


def _listed(records: Sequence[dict[str, bytes]], file: Path) -> tuple[int, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise InputError(f"{SETTING} = '{file}': cannot be read ({reason})") from error
    wanted = [line.strip() for line in lines if line.strip()]
    if not wanted:
        raise InputError(f"{SETTING} = '{file}': lists no image")
    names = image_names(records)
    index = {name: i for i, name in enumerate(names)}
    problems = [f"{name}: no such image in the split" for name in wanted if name not in index]
    several = [name for name, count in Counter(names).items() if count > 1 and name in wanted]
    problems += [f"{name}: several of data.train_splits have such an image" for name in several]
    twice = [name for name, count in Counter(wanted).items() if count > 1]
    problems += [f"{name}: listed twice" for name in twice]
    if problems:
        example = next(iter(index))
        raise listed(f"{SETTING} = '{file}' (a name there: {example})", problems)
    return tuple(sorted(index[name] for name in wanted))
