"""Anchors and candidates as rows and columns of similarities, and which of their pairs count."""

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from contrastseg_jax.contrast.devices import Split, part_of_anchors
from contrastseg_jax.structs import Anchors, Candidates

NO_CLASS = 1 << 30  # the label of rows and columns that take part in nothing; sorts behind all
NO_ANCHOR = -1  # for a candidate that is no anchor
MASKED = -1e30  # stands for minus infinity where a real one would turn differences into NaN


class Side(enum.Enum):
    """The two kinds of candidates that an anchor has."""

    POSITIVES = "positives"
    NEGATIVES = "negatives"


class Rows(NamedTuple):
    """Anchors: embeddings divided by the temperature, and which of the batch's anchors they are."""

    embedding: Float[Array, "r d"]
    label: Int[Array, " r"]
    anchor: Int[Array, " r"]


class Columns(NamedTuple):
    """Candidates, which anchor each is itself if any, and its rank in the random order."""

    embedding: Float[Array, "c d"]
    label: Int[Array, " c"]
    anchor: Int[Array, " c"]
    rank: Int[Array, " c"]


class Limits(NamedTuple):
    """What each row selects: ranks below `rank`, of a hardness of at least `hardness`."""

    rank: Int[Array, " r"]
    hardness: Float[Array, " r"]


def sorted_rows(
    anchors: Anchors, *, temperature: float, split: Split
) -> tuple[Rows, Int[Array, " r"]]:
    """This device's anchors by class, those that are not valid last, and where each one was."""
    label = jnp.where(anchors.valid, anchors.label.astype(jnp.int32), NO_CLASS).reshape(-1)
    place = jnp.argsort(label).astype(jnp.int32)
    embedding = jnp.where(anchors.valid[..., None], anchors.embedding.astype(jnp.float32), 0.0)
    embedding = embedding.reshape(-1, embedding.shape[-1])[place] / temperature
    return Rows(embedding, label[place], part_of_anchors(split) * label.size + place), place


def columns_of(candidates: Candidates, rank: Int[Array, "*c"] | None) -> Columns:
    """A set as one list, with the labels of what is not valid taken away."""
    label = jnp.where(candidates.valid, candidates.label.astype(jnp.int32), NO_CLASS).reshape(-1)
    anchor = candidates.anchor
    if anchor is None:
        anchor = jnp.full(label.shape, NO_ANCHOR, jnp.int32)
    if rank is None:
        rank = jnp.zeros(label.shape, jnp.int32)
    embedding = candidates.embedding.reshape(-1, candidates.embedding.shape[-1])
    return Columns(embedding, label, anchor.astype(jnp.int32).reshape(-1), rank.reshape(-1))


def is_selected(
    rows: Rows,
    columns: Columns,
    similarity: Float[Array, "r c"],
    limits: Limits | None,
    side: Side,
) -> Bool[Array, "r c"]:
    """Which columns are positives (or negatives) of which rows, inside the rows' limits if any."""
    same = columns.label[None, :] == rows.label[:, None]
    selected = columns.label[None, :] != NO_CLASS
    if side is Side.POSITIVES:
        selected &= same & (columns.anchor[None, :] != rows.anchor[:, None])
    else:
        selected &= ~same
    if limits is not None:
        selected &= columns.rank[None, :] < limits.rank[:, None]
        # Not `>=`: a similarity that is not a number must be seen, and it is above no limit.
        selected &= ~(hardness_of(similarity, side) < limits.hardness[:, None])
    return selected


def hardness_of(similarity: Float[Array, "r c"], side: Side) -> Float[Array, "r c"]:
    """Negatives are hard where they are similar to their anchor, positives where they are not."""
    return -similarity if side is Side.POSITIVES else similarity


def finite(columns: Columns) -> Float[Array, "c d"]:
    """Embeddings in float32, with zeros for what takes part in nothing and may hold NaN."""
    embedding = columns.embedding.astype(jnp.float32)
    return jnp.where(columns.label[:, None] != NO_CLASS, embedding, 0.0)


def tied(embedding: Float[Array, "c d"], place: Int[Array, "..."]) -> Float[Array, "c d"]:
    """The same; on a CPU, what takes the rows at a place out of it is not done before the place is.

    XLA has no bfloat16 on a CPU: it takes rows out of all embeddings in float32, and would widen
    these once, in front of the loop over places, for a copy twice as large as they are. What waits
    for a place that changes stays in the loop, where it is fused: only the rows are widened.
    """
    return lax.platform_dependent(
        *(embedding, place),
        cpu=lambda embedding, place: lax.optimization_barrier((embedding, place))[0],
        default=lambda embedding, _: embedding,
    )


def dot(first: Float[Array, "x y"], second: Float[Array, "y z"]) -> Float[Array, "x z"]:
    """A product in full float32, also where hardware would take fewer bits."""
    return jnp.matmul(first, second, precision=lax.Precision.HIGHEST)
