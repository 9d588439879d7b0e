"""How well the vectors of pixels are sorted by class: cosines, silhouette, and a map by t-SNE.

NumPy, and scikit-learn for the map. Vectors are compared by their cosine, as the contrast loss
compares them. Dimensions: `n` pixels, `c` values of a vector, `k` classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Integer
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

Vectors = Float[np.ndarray, "n c"]
Labels = Integer[np.ndarray, " n"]
ByClass = Float64[np.ndarray, " k"]  # NaN for a class without pixels

MIN_PIXELS = 8  # fewer make no map
# Of t-SNE: about how many neighbours of a pixel count. More than a third of the pixels, and all
# would be neighbours.
MAX_PERPLEXITY = 30.0


class Cosines(NamedTuple):
    """Mean cosines of pairs of pixels: both of one class, or of two."""

    intra: float
    inter: float
    intra_of: ByClass
    inter_of: ByClass


def unit_length(vectors: Vectors) -> Float64[np.ndarray, "n c"]:
    """The vectors divided by their length; one of zeros has no direction and stays."""
    vectors = vectors.astype(np.float64)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


def mean_cosines(vectors: Vectors, label: Labels, num_classes: int) -> Cosines:
    """Mean cosines over all pairs, and over the pairs that have a pixel of a class.

        intra_c = mean of u_i · u_j,  i ≠ j both of class c
        inter_c = mean of u_i · u_j,  i of class c, j of another

    NaN where there is no pair. Sums over pairs are products of sums: n² cosines never exist.
    """
    unit = unit_length(vectors)
    count, total = _class_sums(unit, label, num_classes)
    with_itself = np.bincount(label, np.square(unit).sum(-1), minlength=num_classes)
    intra, num_intra = np.square(total).sum(-1) - with_itself, count * (count - 1)
    inter, num_inter = (total * (total.sum(0) - total)).sum(-1), count * (len(label) - count)
    return Cosines(
        float(_mean(intra.sum(), num_intra.sum())),
        float(_mean(inter.sum(), num_inter.sum())),
        _mean(intra, num_intra),
        _mean(inter, num_inter),
    )


def silhouette(vectors: Vectors, label: Labels, num_classes: int) -> Float64[np.ndarray, " n"]:
    """How much nearer each pixel is to its own class than to any other, from -1 to 1.

        s_i = (b_i - a_i) / max(a_i, b_i)

    by the distance 1 - cosine. a_i: mean distance to the other pixels of i's class; b_i: the
    smallest mean distance to the pixels of another class. 0 for the only pixel of a class.

    Rousseeuw, "Silhouettes", 1987; `sklearn.metrics.silhouette_samples(metric="cosine")`, but
    without its n² distances: a mean distance is 1 less the product with the mean vector.

    Raises:
        ValueError: the labels are of fewer than two classes.
    """
    unit = unit_length(vectors)
    count, total = _class_sums(unit, label, num_classes)
    if np.count_nonzero(count) < 2:
        raise ValueError("a silhouette needs pixels of two classes")
    rows = np.arange(len(label))
    distances = count - unit @ total.T  # to all pixels of each class
    to_itself = 1 - np.square(unit).sum(-1)  # 1 for a vector of zeros, whose distance is 0 too
    within = np.maximum(distances[rows, label] - to_itself, 0) / np.maximum(count[label] - 1, 1)
    between = np.where(count > 0, distances / np.maximum(count, 1), np.inf)
    between[rows, label] = np.inf
    between = np.maximum(between.min(axis=1), 0)
    larger = np.maximum(within, between)
    values = np.divide(between - within, larger, out=np.zeros_like(larger), where=larger > 0)
    return np.where(count[label] == 1, 0.0, values)


def scores(vectors: Vectors, label: Labels, class_names: Sequence[str]) -> dict[str, Any]:
    """Silhouette and mean cosines, over all pixels and of each class that has some."""
    num_classes = len(class_names)
    cosines, values = (
        mean_cosines(vectors, label, num_classes),
        silhouette(vectors, label, num_classes),
    )

    def entry(silhouettes: Any, intra: Any, inter: Any) -> dict[str, float]:
        return {
            "silhouette": float(silhouettes.mean()),
            "intra_cosine": float(intra),
            "inter_cosine": float(inter),
        }

    return entry(values, cosines.intra, cosines.inter) | {
        "classes": {
            class_names[i]: entry(values[label == i], cosines.intra_of[i], cosines.inter_of[i])
            for i in np.unique(label).tolist()
        }
    }


def perplexity(num_pixels: int) -> float:
    """The perplexity of a map of so many pixels."""
    return min(MAX_PERPLEXITY, (num_pixels - 1) / 3)


def tsne(vectors: Vectors) -> Float32[np.ndarray, "n 2"]:
    """Places in a plane: pixels whose vectors point the same way lie near each other.

    Of unit vectors, whose squared distance is 2 - 2 cosine. The same vectors give the same map.

    Van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008.
    """
    unit = unit_length(vectors).astype(np.float32)
    start: Any = principal_plane(unit)
    method = TSNE(perplexity=perplexity(len(unit)), init=start, random_state=0)
    # Sums of several threads depend on their number; and on a busy machine those of OpenMP wait for
    # each other, which made the map of 718 pixels ten times slower.
    with threadpool_limits(1):
        return method.fit_transform(unit).astype(np.float32)


def principal_plane(vectors: Float32[np.ndarray, "n c"]) -> Float32[np.ndarray, "n 2"]:
    """The vectors in the plane in which they vary most, made small: where t-SNE starts from.

    As scikit-learn's `init="pca"`, which cannot start from one value each, or from vectors that are
    all the same, as those of a collapsed network are.
    """
    centered = vectors - vectors.mean(axis=0)
    axes = np.linalg.svd(centered, full_matrices=False)[2][:2]
    plane = np.zeros((len(vectors), 2), np.float32)
    plane[:, : len(axes)] = centered @ axes.T
    spread = plane[:, 0].std()
    return plane * np.float32(1e-4 / spread) if spread > 1e-6 else np.zeros_like(plane)


def _class_sums(
    unit: Float64[np.ndarray, "n c"], label: Labels, num_classes: int
) -> tuple[ByClass, Float64[np.ndarray, "k c"]]:
    """Number of pixels of each class, and the sum of their vectors."""
    is_of_class = (label == np.arange(num_classes)[:, None]).astype(np.float64)
    return is_of_class.sum(1), is_of_class @ unit


def _mean(sums: Any, counts: Any) -> Any:
    """Sums over counts; NaN where nothing was counted."""
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
