"""Several splits as one."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Records = Sequence[dict[str, bytes]]


@dataclass(frozen=True)
class Joined(Sequence):
    """The records of several splits, one after the other. Can be pickled where they can."""

    splits: tuple[Records, ...]
    ends: tuple[int, ...]  # of each split, the index after its last record

    def __len__(self) -> int:
        """Number of records."""
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The record, still encoded."""
        index = range(len(self))[index]
        number = bisect_right(self.ends, index)
        split = self.splits[number]
        return split[index - self.ends[number] + len(split)]


def joined(splits: Sequence[Records]) -> Records:
    """The records of all the splits; of a single one, the split itself."""
    if len(splits) == 1:
        return splits[0]
    return Joined(tuple(splits), tuple(accumulate(map(len, splits))))
