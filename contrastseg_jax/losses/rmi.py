"""Region mutual information: each class's labels and probabilities as regions, not as pixels."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int, UInt8

from contrastseg_jax.ops.resize import resize_bilinear

RIDGE = 1e-3  # added to the diagonals of covariances (original: `_POS_ALPHA`)
FLOOR = 1e-6  # added to probabilities (original: `_CLIP_MIN`)
# Rounding of a float32 Cholesky factorisation, as a share of the matrix's trace.
SHIFT = 32 * float(np.finfo(np.float32).eps)


def rmi(
    logits: Float[Array, "b hs ws k"],
    label: UInt8[Array, "b h w"],
    *,
    radius: int = 3,
    pool_size: int = 3,
    bce_share: float = 0.5,
) -> Float[Array, ""]:
    """λ · BCE + (1 - λ) · RMI, λ = `bce_share`, with a sigmoid for each class.

    BCE: the sum over classes and labelled pixels of binary cross entropies, over the number of
    these pixels plus 1. RMI: labels y and probabilities p of a class are max-pooled by `pool_size`,
    and each `radius` x `radius` square of them is a vector of d = radius² numbers; then

        Σ_c mean_images log det(S_c + αI) / (2 d)
        S_c = Cov(y) - Cov(y, p) (Cov(p) + αI)⁻¹ Cov(p, y)

    with sums over the squares of an image as covariances and α = 1e-3. Logits are brought to the
    label's size. Pixels without a class are ignored, whatever their logits, and so is an image that
    has no other.

    One class after another, each computed again for the gradient: what is held at the label's size
    are maps of one class.

    Zhao et al., NeurIPS 2019, Eq. 13 and 14. Original: `RMILoss`, in float64; how this is stable in
    float32: `log_determinant`.
    """
    num_classes, size = logits.shape[-1], (label.shape[1], label.shape[2])
    labelled = label < num_classes

    def of_class(
        item: tuple[Int[Array, ""], Float[Array, "b hs ws"]],
    ) -> tuple[Float[Array, ""], Float[Array, " b"]]:
        class_id, logits = item
        logits = resize_bilinear(logits[..., None], size)[..., 0].astype(jnp.float32)
        logits = jnp.where(labelled, logits, 0.0)
        true = (label == class_id.astype(label.dtype)).astype(jnp.float32)
        bce = jnp.where(labelled, jax.nn.softplus(logits) - true * logits, 0.0).sum()
        p = jnp.where(labelled, jax.nn.sigmoid(logits), 0.0) + FLOOR
        y_squares, p_squares = (squares(x, radius, pool_size) for x in (true, p))
        return bce, log_determinant(y_squares, p_squares) / (2 * radius**2)

    classes = jnp.arange(num_classes, dtype=jnp.int32)
    bce, bound = lax.map(
        jax.checkpoint(of_class, prevent_cse=False), (classes, jnp.moveaxis(logits, -1, 0))
    )
    num_pixels = labelled.sum(dtype=jnp.float32)
    counts = labelled.any((1, 2))
    mean = jnp.where(counts, bound.sum(0), 0.0).sum() / jnp.maximum(
        counts.sum(dtype=jnp.float32), 1
    )
    return bce_share * bce.sum() / (num_pixels + 1) + (1 - bce_share) * mean


def squares(x: Float[Array, "b h w"], radius: int, pool_size: int) -> Float[Array, "b d n"]:
    """The squares of a max-pooled map, less their mean over the image."""
    window, margin = (1, pool_size, pool_size), pool_size // 2
    padding = ((0, 0), (margin, margin), (margin, margin))
    x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, padding)
    h, w = x.shape[1] - radius + 1, x.shape[2] - radius + 1
    shifted = [x[:, i : i + h, j : j + w] for i in range(radius) for j in range(radius)]
    vectors = jnp.stack(shifted, axis=1).reshape(x.shape[0], radius**2, h * w)
    return vectors - vectors.mean(axis=2, keepdims=True)


def log_determinant(y: Float[Array, "b d n"], p: Float[Array, "b d n"]) -> Float[Array, " b"]:
    """log det(S + αI), S what a linear prediction of `y` from `p` leaves of its covariance.

    S = Cov(y) - Cov(y, p) (Cov(p) + αI)⁻¹ Cov(p, y) is a difference of numbers that grow with the
    image and may cancel to less than their rounding. It equals R Rᵀ + α W Wᵀ, with the ridge
    regression W = Cov(y, p) (Cov(p) + αI)⁻¹ and what it leaves, R = y - W p: a sum of squares.
    S is the smallest of these over all W, so an error of W enters squared, and no gradient need
    pass through W.

    Both inverses are those of matrices that rounding may leave without one. So vectors are first
    multiplied by the inverse L⁻¹ of a factor that is shifted as far as rounding asks, which makes
    their covariances small numbers beside α L⁻¹ L⁻ᵀ; log det(S + αI) is then 2 log det L more,
    for whatever L, so that L is a constant too (Fukaya et al., "Shifted Cholesky QR", 2020).
    """
    eye = RIDGE**0.5 * jnp.eye(y.shape[1], dtype=y.dtype)
    eye = jnp.broadcast_to(eye, (y.shape[0], *eye.shape))
    (p, ridge), _ = whitened([p, eye])
    constant_p = lax.stop_gradient(p)
    covariance = gram(constant_p, constant_p) + gram(ridge, ridge)
    transposed = jnp.linalg.solve(covariance, gram(constant_p, lax.stop_gradient(y)))
    w = jnp.swapaxes(transposed, 1, 2)
    parts, factor = whitened([y - product(w, p), product(w, ridge), eye])
    rest = jnp.linalg.cholesky(total_gram(parts))
    return log_diagonal(factor) + log_diagonal(rest)


def whitened(
    parts: list[Float[Array, "b d _"]],
) -> tuple[list[Float[Array, "b d _"]], Float[Array, "b d d"]]:
    """Vectors multiplied by L⁻¹, and L, a constant: L Lᵀ is the covariance of all, shifted."""
    covariance = total_gram(lax.stop_gradient(parts))
    shift = SHIFT * jnp.trace(covariance, axis1=1, axis2=2)[:, None, None]
    eye = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)[None]
    factor = jnp.linalg.cholesky(covariance + shift * eye)
    return [solve_triangular(factor, part, lower=True) for part in parts], factor


def log_diagonal(factor: Float[Array, "b d d"]) -> Float[Array, " b"]:
    """The logarithm of the determinant of L Lᵀ."""
    return 2 * jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)).sum(-1)


def gram(x: Float[Array, "b d n"], y: Float[Array, "b e n"]) -> Float[Array, "b d e"]:
    """Products of rows."""
    return product(x, jnp.swapaxes(y, 1, 2))


def total_gram(parts: list[Float[Array, "b d _"]]) -> Float[Array, "b d d"]:
    """The covariance of vectors that come in parts."""
    first, *others = (gram(part, part) for part in parts)
    return sum(others, first)


def product(x: Float[Array, "b d n"], y: Float[Array, "b n e"]) -> Float[Array, "b d e"]:
    """The matrix product, in full float32 on accelerators too."""
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
