"""The method in one call: anchors, candidates, their loss, and the bank after it (Sec. 3.2)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from contrastseg_jax.contrast import memory_bank
from contrastseg_jax.contrast.anchors import batch_candidates, sample_anchors
from contrastseg_jax.contrast.loss import pixel_contrast_loss
from contrastseg_jax.contrast.streaming import Metrics
from contrastseg_jax.contrast.unit_length import to_unit_length
from contrastseg_jax.structs import IGNORE_LABEL, MemoryBank


class BankKeys(NamedTuple):
    """What each image of a batch gives to the bank: rows and their `valid` masks."""

    pixel: tuple[Float[Array, "b k v d"], Bool[Array, "b k v"]]
    segment: tuple[Float[Array, "b k 1 d"], Bool[Array, "b k 1"]]
    right: Bool[Array, "b k v"]  # which of the pixels were predicted correctly


def contrast_step(
    embedding: Float[Array, "... d"],
    label: Int[Array, "..."],
    logits: Float[Array, "... k"],
    bank: MemoryBank | None,
    rng: Key[Array, ""],
    *,
    candidates: str = "both",
    anchors: str = "hard",
    anchors_per_image: int = 0,
    max_views: int = 100,
    pixels_per_class: int = 10,
    only_correct_keys: bool = False,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    mesh: Mesh | None = None,
    **selection: Any,
) -> tuple[Float[Array, ""], Metrics, MemoryBank | None]:
    """The contrast loss of a batch, what to log of it, and the bank with the batch in it.

    `embedding`: of any length, brought to unit length here. The first axis is that of the images,
    the others, of any number, those of their pixels; [n, d] is one image. `label`: classes; any
    value outside of 0..k-1 is ignored. `logits` tell hard pixels from easy ones, no gradient flows
    into them. `bank`: `init_memory`'s, or None for the batch alone. Of one image size and number
    of classes the function compiles once; inside a `jit` the batch may be split over devices.

    `candidates`: batch, memory or both. `anchors`: hard or random. `anchors_per_image`: 0 takes a
    sixteenth of the pixels, 16..512. `pixels_per_class`: enqueued of each image.
    `only_correct_keys`: enqueue what is predicted correctly. `mesh`: devices to compute on, over
    whose axis "data" the images are split; without, the compiler decides. The rest, `positives`,
    `negatives` and what belongs to them, as in `pixel_contrast_loss`. Defaults: the paper's.

    Raises:
        ValueError: shapes do not belong together, or there is nothing to contrast with.
    """
    _check(embedding, label, logits, bank, candidates)
    maps = [_as_maps(x, label.ndim) for x in (embedding, label[..., None], logits)]
    embedding, logits = to_unit_length(maps[0].astype(jnp.float32)), maps[2]
    num_classes, label = logits.shape[-1], maps[1][..., 0].astype(jnp.int32)
    label = jnp.where((label >= 0) & (label < num_classes), label, IGNORE_LABEL)
    prediction = lax.argmax(logits, logits.ndim - 1, jnp.int32)
    image_rng, key_rng = jax.random.split(rng, (2, len(label)))
    loss, metrics = contrast_loss(
        embedding,
        label,
        prediction,
        bank,
        image_rng,
        rng,
        num_classes=num_classes,
        candidates=candidates,
        anchors=anchors,
        anchors_per_image=anchors_per_image,
        max_views=max_views,
        temperature=temperature,
        base_temperature=base_temperature,
        mesh=mesh,
        **selection,
    )
    if bank is None:
        return loss, metrics, None
    keys = bank_keys(
        lax.stop_gradient(embedding),
        label,
        prediction,
        key_rng,
        num_classes=num_classes,
        pixels_per_class=pixels_per_class,
        only_correct=only_correct_keys,
    )
    bank = memory_bank.enqueue(bank, keys.pixel, keys.segment)
    return loss, metrics | bank_metrics(bank, keys), bank


def contrast_loss(
    embedding: Float[Array, "b hs ws d"],
    label: Int[Array, "b hs ws"],
    prediction: Int[Array, "b hs ws"],
    bank: MemoryBank | None,
    image_rng: Key[Array, " b"],
    rng: Key[Array, ""],
    *,
    num_classes: int,
    candidates: str,
    anchors: str,
    anchors_per_image: int,
    max_views: int,
    **settings: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """Eq. 3 between sampled anchors and candidates, and diagnostics.

    `image_rng` draws the anchors, `rng` positives and negatives. `candidates`: batch, memory or
    both. `settings`: as `pixel_contrast_loss` takes them.
    """
    sampled = sample_anchors(
        embedding,
        label,
        prediction,
        image_rng,
        num_classes=num_classes,
        anchors_per_image=num_anchors(anchors_per_image, label.shape[1:]),
        max_views=max_views,
        strategy=anchors,
    )
    sets = (batch_candidates(sampled),) if candidates in ("batch", "both") else ()
    if bank is not None and candidates in ("memory", "both"):
        sets += memory_bank.memory_candidates(bank)
    return pixel_contrast_loss(sampled, sets, rng, **settings)


def bank_keys(
    embedding: Float[Array, "b hs ws d"],
    label: Int[Array, "b hs ws"],
    prediction: Int[Array, "b hs ws"],
    image_rng: Key[Array, " b"],
    *,
    num_classes: int,
    pixels_per_class: int,
    only_correct: bool,
) -> BankKeys:
    """Pixels and class means of each image.

    `image_rng` draws the pixels. `only_correct`: keys are made of pixels that the network predicts
    correctly alone (Alonso et al., ICCV 2021).
    """
    correct = prediction == label
    if only_correct:
        label = jnp.where(correct, label, IGNORE_LABEL)
    index, valid = memory_bank.draw_pixels(
        label, image_rng, num_classes=num_classes, pixels_per_class=pixels_per_class
    )
    right = memory_bank.values_at(correct[..., None], index)[..., 0]
    return BankKeys(
        pixel=(memory_bank.values_at(embedding, index), valid),
        segment=memory_bank.segment_keys(embedding, label, num_classes=num_classes),
        right=valid & right,
    )


def bank_metrics(bank: MemoryBank, keys: BankKeys) -> Metrics:
    """How full a bank is, how old its rows are, and the share of new ones that are right."""
    fill = memory_bank.fill_ratio(bank)
    metrics = {
        "memory_fill": fill.mean(),
        "memory_fill_min": fill.min(),
        "memory_age": memory_bank.mean_age(bank),
    }
    if bank.pixel.size:
        drawn = keys.right, keys.pixel[1]
        num_right, num_keys = (jnp.sum(x, dtype=jnp.float32) for x in drawn)
        metrics["correct_keys"] = num_right / jnp.maximum(num_keys, 1.0)
    return metrics


def num_anchors(given: int, map_size: tuple[int, ...]) -> int:
    """Anchors per image: `given`, or if that is 0, by the size of the embedding map.

    A sixteenth of its cells, clipped to 16..512. The cost of the contrast loss is quadratic in the
    anchors, that of the network linear in the cells.
    """
    return given or min(max(math.prod(map_size) // 16, 16), 512)


def _check(
    embedding: Array, label: Array, logits: Array, bank: MemoryBank | None, candidates: str
) -> None:
    if not embedding.shape[:-1] == label.shape == logits.shape[:-1] or not label.ndim:
        raise ValueError(
            f"embedding {embedding.shape}, label {label.shape} and logits {logits.shape}: must"
            " agree in all axes but the last of embedding and logits (label_at_stride brings the"
            " labels of images to the size of a map)"
        )
    if candidates not in ("batch", "memory", "both"):
        raise ValueError(f"candidates = {candidates!r}: must be batch, memory or both")
    if bank is None and candidates == "memory":
        raise ValueError("candidates = 'memory': needs a bank, as init_memory makes it")
    num_classes, length = logits.shape[-1], embedding.shape[-1]
    if num_classes > IGNORE_LABEL:
        raise ValueError(f"logits of {num_classes} classes: at most {IGNORE_LABEL}")
    if bank is not None:
        expected = bank.pixel.shape[0], bank.pixel.shape[-1]
        if (num_classes, length) != expected:
            raise ValueError(
                f"{num_classes} classes, embeddings of length {length}: the bank was made for"
                f" {expected[0]} and {expected[1]}"
            )


def _as_maps(x: Array, num_axes: int) -> Array:
    """[b, ..., d] as [b, 1, n, d]; [n, d] as one image. `num_axes`: all but the last."""
    b = x.shape[0] if num_axes > 1 else 1
    return x.reshape(b, 1, -1, x.shape[-1])
