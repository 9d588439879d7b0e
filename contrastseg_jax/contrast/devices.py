"""What lies in parts over the devices of a mesh, and sums over those parts."""

import enum
from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int

AXIS = "data"  # the mesh's one axis


class Split(enum.Enum):
    """What is split over the devices; everything else is whole on each of them."""

    NOTHING = "nothing"
    ANCHORS = "anchors"
    CANDIDATES = "candidates"


def sum_over_anchors(tree: Any, split: Split) -> Any:
    """The sum of what each device has found for its own anchors."""
    return lax.psum(tree, AXIS) if split is Split.ANCHORS else tree


def sum_over_candidates(tree: Any, split: Split) -> Any:
    """The sum of what each device has found in its own candidates."""
    return lax.psum(tree, AXIS) if split is Split.CANDIDATES else tree


def max_over_candidates(x: Float[Array, "*shape"], split: Split) -> Float[Array, "*shape"]:
    """The largest of what each device has found in its own candidates."""
    return lax.pmax(x, AXIS) if split is Split.CANDIDATES else x


def part_of_anchors(split: Split) -> int | Int[Array, ""]:
    """Which part of the anchors this device has."""
    return lax.axis_index(AXIS) if split is Split.ANCHORS else 0


def part_of_candidates(split: Split) -> tuple[int | Int[Array, ""], int]:
    """Which part of every set this device has, out of how many."""
    return (lax.axis_index(AXIS), lax.axis_size(AXIS)) if split is Split.CANDIDATES else (0, 1)
