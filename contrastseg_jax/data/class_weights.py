"""Class weights from how many pixels the classes have, and these counts of a prepared split."""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer

from contrastseg_jax.data.audit.examples import in_parallel
from contrastseg_jax.data.images import decode_mask
from contrastseg_jax.data.joined import Joined
from contrastseg_jax.data.labels import train_id_table, value_counts
from contrastseg_jax.data.prepared import Records
from contrastseg_jax.data.spec import LabelMap
from contrastseg_jax.data.subset import Subset
from contrastseg_jax.errors import best_effort
from contrastseg_jax.files import write_atomically

CACHE = "mask_values.npz"  # in the folder of prepared records, beside them
DIGITS = 4  # of a weight that count
log = logging.getLogger("contrastseg_jax")


@dataclass(frozen=True)
class ClassCounts:
    """Pixels of each class, and all pixels of the images in which it occurs."""

    pixels: Integer[np.ndarray, " k"]
    image_pixels: Integer[np.ndarray, " k"]


def median_frequency_weights(counts: ClassCounts) -> Float[np.ndarray, " k"]:
    """Class weights median(f) / f_c (Eigen & Fergus, ICCV 2015, section 4.3.2).

    f_c: pixels of class c over all pixels of the images in which c occurs. A class that never
    occurs has the weight 1.
    """
    pixels = counts.pixels.astype(np.float64)
    occurs: Bool[np.ndarray, " k"] = pixels > 0
    weights = np.ones(len(pixels))
    if occurs.any():
        frequency = pixels[occurs] / counts.image_pixels[occurs]
        weights[occurs] = np.median(frequency) / frequency
    return weights


def enet_weights(counts: ClassCounts) -> Float[np.ndarray, " k"]:
    """Class weights 1 / ln(1.02 + p_c) (Paszke et al., ENet, 2016), p_c: share of labelled pixels.

    They lie between 1.4 and 50.5.
    """
    return 1 / np.log(1.02 + counts.pixels / max(counts.pixels.sum(), 1))


CLASS_WEIGHTS: dict[str, Callable[[ClassCounts], Float[np.ndarray, " k"]]] = {
    "median_frequency": median_frequency_weights,
    "enet": enet_weights,
}


def computed_weights(counts: ClassCounts, formula: str) -> tuple[float, ...]:
    """The class weights by a formula of `CLASS_WEIGHTS`, rounded to what a log can show."""
    return tuple(float(f"{weight:.{DIGITS}g}") for weight in CLASS_WEIGHTS[formula](counts))


def count_classes(source: Sequence[dict[str, bytes]], label_map: LabelMap) -> ClassCounts:
    """The pixels of each class in prepared records, of several splits or of a part of them.

    The masks of a split are read once: pixels of each mask value are kept beside the records, image
    by image, so that they serve every part and every label map.
    """
    values = _mask_values(source)
    num_classes = len(label_map.names)
    classes = np.zeros((len(values), 256), np.int64)
    for value, class_id in enumerate(train_id_table(label_map)):
        classes[:, class_id] += values[:, value]
    image_pixels = (classes > 0).T.astype(np.int64) @ classes.sum(axis=1)
    return ClassCounts(classes.sum(axis=0)[:num_classes], image_pixels[:num_classes])


def _mask_values(records: Sequence[dict[str, bytes]]) -> Int64[np.ndarray, "n 256"]:
    """The pixels of each mask value in each record."""
    if isinstance(records, Subset):
        return _mask_values(records.records)[list(records.indices)]
    if isinstance(records, Joined):
        return np.concatenate([_mask_values(split) for split in records.splits])
    cache = records.folder / CACHE if isinstance(records, Records) else None
    stored = _stored(cache) if cache else None
    if stored is not None and len(stored) == len(records):
        return stored

    def count(index: int) -> Int64[np.ndarray, "256"]:
        record = records[index]
        return value_counts(decode_mask(record["label"], f"label {record['name'].decode()}"))

    log.info(f"counting the classes in {len(records)} masks")
    counts = np.stack([*in_parallel(count, range(len(records)), "Counting classes")])
    if cache:
        content = io.BytesIO()
        np.savez_compressed(content, counts=counts)
        with best_effort(str(cache)):  # the folder may be read-only
            write_atomically(cache, content.getvalue())
    return counts


def _stored(cache: Path) -> Int64[np.ndarray, "n 256"] | None:
    """What an earlier start has counted; None: nothing that can be read."""
    try:
        with np.load(io.BytesIO(cache.read_bytes())) as stored:
            return stored["counts"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
