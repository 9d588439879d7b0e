"""The memory bank (Sec. 3.2): ring buffers of pixels and of class means, one pair per class.

Slots are filled only by real embeddings and are invalid until then; the bank starts empty.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from contrastseg_jax.contrast.devices import AXIS
from contrastseg_jax.contrast.grouped_sort import sort_by_group
from contrastseg_jax.structs import Candidates, MemoryBank


def init_memory(
    *, num_classes: int, pixel_size: int, segment_size: int, proj_dim: int, dtype: str = "float32"
) -> MemoryBank:
    """An empty bank of `pixel_size` and `segment_size` slots per class; size 0 leaves one out."""
    # Each counter an array of its own: a buffer can be donated only once.
    return MemoryBank(
        pixel=jnp.zeros((num_classes, pixel_size, proj_dim), dtype),
        pixel_age=jnp.zeros((num_classes, pixel_size), jnp.int32),
        pixel_head=jnp.zeros(num_classes, jnp.int32),
        pixel_count=jnp.zeros(num_classes, jnp.int32),
        segment=jnp.zeros((num_classes, segment_size, proj_dim), dtype),
        segment_age=jnp.zeros((num_classes, segment_size), jnp.int32),
        segment_head=jnp.zeros(num_classes, jnp.int32),
        segment_count=jnp.zeros(num_classes, jnp.int32),
    )


def enqueue(
    bank: MemoryBank,
    pixel: tuple[Float[Array, "b k v d"], Bool[Array, "b k v"]],
    segment: tuple[Float[Array, "b k 1 d"], Bool[Array, "b k 1"]],
    *,
    mesh: Mesh | None = None,
) -> MemoryBank:
    """Write the rows of a global batch, in example order, over the oldest slots.

    `pixel` and `segment` are rows and their `valid` masks as `pixel_keys` and `segment_keys` give
    them; invalid rows leave no trace, nor do any that are not finite: a slot outlives the step that
    fills it. More new rows than slots: the last ones stay. `mesh`: the devices over which the slots
    are split, each of which writes the rows that fall in its own.
    """
    pixels = bank.pixel, bank.pixel_age, bank.pixel_head, bank.pixel_count
    segments = bank.segment, bank.segment_age, bank.segment_head, bank.segment_count
    return MemoryBank(
        *_write(*pixels, *pixel, mesh=mesh),
        *_write(*segments, *segment, mesh=mesh),
    )


def pixel_keys(
    embedding: Float[Array, "b hs ws d"],
    label: Int[Array, "b hs ws"],
    rng: Key[Array, " b"],
    *,
    num_classes: int,
    pixels_per_class: int,
) -> tuple[Float[Array, "b k v d"], Bool[Array, "b k v"]]:
    """Up to `pixels_per_class` random pixels of each class of each image (V in the paper)."""
    index, valid = draw_pixels(
        label, rng, num_classes=num_classes, pixels_per_class=pixels_per_class
    )
    return values_at(embedding, index), valid


def draw_pixels(
    label: Int[Array, "b hs ws"],
    rng: Key[Array, " b"],
    *,
    num_classes: int,
    pixels_per_class: int,
) -> tuple[Int[Array, "b k v"], Bool[Array, "b k v"]]:
    """The flat indices of the pixels that `pixel_keys` takes, and which of them are any."""

    def draw(label: Int[Array, " n"], rng: Key[Array, ""]) -> tuple[Array, Array]:
        order, start, size = sort_by_group(label, rng, num_groups=num_classes)
        view = jnp.arange(pixels_per_class, dtype=jnp.int32)[None, :]
        valid = view < size[:, None]
        return order[jnp.where(valid, start[:, None] + view, 0)], valid

    return jax.vmap(draw)(label.reshape(len(label), -1), rng)


def values_at(
    values: Shaped[Array, "b hs ws d"], index: Int[Array, "b k v"]
) -> Shaped[Array, "b k v d"]:
    """What a map has at the flat indices of some pixels."""
    b, _, _, d = values.shape
    rows = jnp.take_along_axis(
        values.reshape(b, -1, d), index.reshape(b, -1, 1), axis=1, mode="clip"
    )
    return rows.reshape(*index.shape, d)


def segment_keys(
    embedding: Float[Array, "b hs ws d"], label: Int[Array, "b hs ws"], *, num_classes: int
) -> tuple[Float[Array, "b k 1 d"], Bool[Array, "b k 1"]]:
    """The mean embedding of each class of each image, brought to unit length.

    NaN where a pixel of the class is not finite; what other pixels hold does not matter.
    """
    b, _, _, d = embedding.shape
    pixels = embedding.reshape(b, -1, d)
    finite = jnp.isfinite(pixels).all(-1)
    # A product with the one-hot labels: a scatter of so many rows is six times as slow. It adds
    # 0 times every pixel of the other classes, which must be finite for that.
    member = jax.nn.one_hot(label.reshape(b, -1), num_classes, axis=1, dtype=embedding.dtype)
    total = jnp.einsum(
        "bkn,bnd->bkd",
        member,
        jnp.where(finite[..., None], pixels, 0.0),
        precision=lax.Precision.HIGHEST,
    )
    length = jnp.linalg.norm(total, axis=-1, keepdims=True)
    mean = total / jnp.maximum(length, 1e-12)
    spoilt = ((member > 0) & ~finite[:, None]).any(-1)
    mean = jnp.where(spoilt[..., None], jnp.nan, mean)
    return mean[:, :, None], member.any(-1)[:, :, None]


def memory_candidates(bank: MemoryBank) -> tuple[Candidates, ...]:
    """The slots of each queue that is in use, those never written marked invalid.

    No gradient flows into them.
    """
    queues = (bank.pixel, bank.pixel_count), (bank.segment, bank.segment_count)
    return tuple(_slots(*lax.stop_gradient(queue)) for queue in queues if queue[0].size)


def fill_ratio(bank: MemoryBank) -> Float[Array, " k"]:
    """Share of each class's slots that have been written, both queues together."""
    written = (bank.pixel_count + bank.segment_count).astype(jnp.float32)
    return written / (bank.pixel.shape[1] + bank.segment.shape[1])


def mean_age(bank: MemoryBank) -> Float[Array, ""]:
    """Steps since a slot was written, the mean over those in use; 0 for an empty bank."""
    total = number = jnp.zeros((), jnp.float32)
    for age, count in ((bank.pixel_age, bank.pixel_count), (bank.segment_age, bank.segment_count)):
        written = _is_written(age.shape, count)
        total += jnp.sum(jnp.where(written, age, 0).astype(jnp.float32))
        number += jnp.sum(written, dtype=jnp.float32)
    return total / jnp.maximum(number, 1.0)


def _write(
    slots: Float[Array, "k m d"],
    age: Int[Array, "k m"],
    head: Int[Array, " k"],
    count: Int[Array, " k"],
    rows: Float[Array, "b k v d"],
    valid: Bool[Array, "b k v"],
    *,
    mesh: Mesh | None,
) -> tuple[Float[Array, "k m d"], Int[Array, "k m"], Int[Array, " k"], Int[Array, " k"]]:
    """Append each class's valid and finite rows to its ring buffer, a step later."""
    size = slots.shape[1]
    if size == 0:
        return slots, age, head, count
    rows = jnp.moveaxis(rows, 1, 0).reshape(slots.shape[0], -1, slots.shape[2])
    valid = jnp.moveaxis(valid, 1, 0).reshape(slots.shape[0], -1) & jnp.isfinite(rows).all(-1)
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    total = valid.sum(1, dtype=jnp.int32)
    # A row that a later one of the same step would overwrite is not written at all: the order in
    # which a scatter writes twice to one slot is undefined.
    stays = valid & (rank >= total[:, None] - size)
    slot = jnp.where(stays, (head[:, None] + rank) % size, size)
    scatter = _scatter
    if mesh is not None:
        whole, split = PartitionSpec(), PartitionSpec(None, AXIS)
        scatter = jax.shard_map(
            functools.partial(_scatter, axis=AXIS),
            mesh=mesh,
            in_specs=(split, whole, whole),
            out_specs=split,
        )
    slots = scatter(slots, rows.astype(slots.dtype), slot)
    age = scatter(age + 1, jnp.zeros(slot.shape, age.dtype), slot)
    return slots, age, (head + total) % size, jnp.minimum(count + total, size)


def _scatter(
    slots: Shaped[Array, "k m *d"],
    rows: Shaped[Array, "k r *d"],
    slot: Int[Array, "k r"],
    axis: str | None = None,
) -> Shaped[Array, "k m *d"]:
    """Put each row into its slot, or nowhere if the slot is not among those of this device."""
    size = slots.shape[1]
    slot = slot - lax.axis_index(axis) * size if axis else slot
    slot = jnp.where(slot < 0, size, slot)  # a negative index would count from the end
    cls = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
    return slots.at[cls, slot].set(rows, mode="drop")


def _slots(slots: Float[Array, "k m d"], count: Int[Array, " k"]) -> Candidates:
    shape = slots.shape[:2]
    label = jnp.broadcast_to(jnp.arange(shape[0], dtype=jnp.int32)[:, None], shape)
    return Candidates(slots, label, _is_written(shape, count), stop_gradient=True)


def _is_written(shape: tuple[int, ...], count: Int[Array, " k"]) -> Bool[Array, "k m"]:
    """The slots that are in use: the first `count` of each class."""
    return jnp.arange(shape[1], dtype=jnp.int32)[None, :] < count[:, None]
