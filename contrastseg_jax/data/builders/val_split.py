"""Drawing a val out of images that have no splits, by their names, in whole sequences.

Frames of one sequence look alike: with some of them in train and others in val, scores would tell
how well train was learnt by heart.
"""

import hashlib
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from contrastseg_jax.errors import InputError
from contrastseg_jax.text import count_of

LAST_NUMBER = re.compile(r"[\W_]*\d+[\W_]*$")
MAX_NAMED = 10  # sequences, in a description
UNITS = ("sequence", "image")  # what `data.val_unit` may be


@dataclass(frozen=True)
class Draw:
    """What was drawn of all images."""

    val: frozenset[str]  # names of the images; the others are train
    description: dict[str, str]  # by split


def draw_val(names: Sequence[str], fraction: float, unit: str) -> Draw:
    """Images for val: whole sequences, or single images, that make up about a share of all.

    A function of the names alone, in whatever order: sequences stand in the order of a hash of
    their name, and each is taken that does not exceed the share; then the smallest of the others,
    if that comes closer to it. At least one is taken and one left, so the number is off by less
    than the images of one sequence.

    Args:
        names: of all images, each once: their paths without suffix.
        fraction: the share of the images that val is to have, above 0 and below 1.
        unit: "sequence" as `sequences` finds them, or "image".

    Raises:
        InputError: there is a single sequence, or image.
    """
    groups = sequences(names) if unit == "sequence" else {name: [name] for name in names}
    setting = f"data.val_fraction = {fraction}"
    if len(names) < 2:
        raise InputError(f"{setting}: the only image is {names[0]}; train and val need one each")
    if len(groups) < 2:
        raise InputError(
            f"{setting}: all {len(names)} images are taken for one sequence, whose images are named"
            f" '{next(iter(groups))}' and a number, and a sequence is not divided; put each"
            " sequence into a folder of its own, or, if they are no frames of one, let single"
            " images be drawn: --config.data.val_unit=image"
        )
    order = sorted(groups, key=lambda group: (hashlib.sha256(group.encode()).digest(), group))
    wanted, taken, left, number = fraction * len(names), [], [], 0
    for group in order:
        fits = number + len(groups[group]) <= wanted
        (taken if fits else left).append(group)
        number += len(groups[group]) if fits else 0
    smallest = min(left, key=lambda group: len(groups[group]))
    excess = number + len(groups[smallest]) - wanted
    if not taken or (len(left) > 1 and excess < wanted - number):
        taken.append(smallest)
    val = frozenset(name for group in taken for name in groups[group])
    return Draw(val, _description(val, taken, groups, setting, unit))


def sequences(names: Sequence[str]) -> dict[str, list[str]]:
    """The images by sequence.

    Where images lie in several folders, a folder is a sequence; of those in the folder above them
    all, or in a single one, a sequence has one name up to its last number: 0001TP_006690 is of
    0001TP. An ending that all these names share is left out first, such as _leftImg8bit.
    """
    home = os.path.commonpath([posixpath.dirname(name) for name in names])
    in_home = [name for name in names if posixpath.dirname(name) == home]
    ending = os.path.commonprefix([posixpath.basename(name)[::-1] for name in in_home])[::-1]
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        folder = posixpath.dirname(name)
        if folder == home:
            folder = LAST_NUMBER.sub("", name.removesuffix(ending))
        groups[folder].append(name)
    return dict(groups)


def _description(
    val: frozenset[str], taken: Sequence[str], groups: dict[str, list[str]], setting: str, unit: str
) -> dict[str, str]:
    """Of each split how much it has of all, and of val which sequences."""
    num_images = sum(map(len, groups.values()))
    parts = {"train": (num_images - len(val), len(groups) - len(taken))}
    parts["val"] = len(val), len(taken)
    texts = {}
    for split, (number, num_groups) in parts.items():
        text = f"{number} of {count_of(num_images, 'image')}"
        if unit == "sequence":
            text += f" in {num_groups} of {count_of(len(groups), 'sequence')}"
            if split == "val":
                more = ", …" if len(taken) > MAX_NAMED else ""
                text += f" ({', '.join(sorted(taken)[:MAX_NAMED])}{more})"
        texts[split] = f"{text}, drawn by {setting}"
    return texts
