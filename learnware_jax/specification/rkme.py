"""Reduced kernel mean embeddings (RKME): a task as m weighted points, and distances between tasks.

Reference: Wu, Xu, Liu and Zhou, arXiv 2001.07135; MMD: Gretton et al., JMLR 13 (2012).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real

from learnware_jax.specification.kernels import (
    Kernel,
    deficit_inner,
    mean_embedding,
    wide_dtype,
)


class RKME(NamedTuple):
    """The function mu = sum_j beta_j k(z_j, .). A whole sample is one too: its rows, each 1/n.

    >>> import numpy as np
    >>> from learnware_jax import RKME
    >>> from learnware_jax.specification.kernels import Gaussian
    >>> from learnware_jax.specification.rkme import squared_mmd
    >>> p = RKME(np.array([[0.0]]), np.array([1.0]))
    >>> q = RKME(np.array([[0.0], [1.0]]), np.array([0.5, 0.5]))
    >>> round(float(squared_mmd(p, q, Gaussian(1.0))), 4)  # half of 1 - exp(-1)
    0.3161
    """

    z: Float[ArrayLike, "m d"]
    beta: Float[ArrayLike, " m"]


def from_rows(x: Real[ArrayLike, "n d"]) -> RKME:
    """The empirical mean embedding of all rows: z = x, beta = 1/n."""
    return RKME(x, np.full(len(x), 1 / len(x)))


def check_rows(x, *, where: str) -> np.ndarray:
    """x as an (n, d) array, unchanged; ValueError or TypeError saying what is wrong with it.

    Empty, not two-dimensional, not numbers, or with rows that are not finite or so large that
    float32 cannot hold their distances (they are counted and the first is named; nothing is
    imputed).
    """
    array = np.asarray(x)
    if array.dtype.kind not in "fiu":
        raise TypeError(
            f"{where}: got {array.dtype} values; want rows (n, d) of float16, float32 or float64."
        )
    if array.ndim != 2:
        raise ValueError(f"{where}: got shape {array.shape}; want rows (n, d).")
    if not array.size:
        raise ValueError(f"{where}: got shape {array.shape}; want at least one row and one column.")
    # The norm of a row says it all, and unlike a mask of x it is small: x may be memory-mapped.
    # Squares of differences reach 4 |x|^2; not less than a limit also holds for NaN.
    bad = ~(_squared_norms(array) < np.finfo(np.float32).max / 4)
    if bad.any():
        raise ValueError(
            f"{where}: {bad.sum()} of {len(array)} rows hold NaN or infinity or overflow float32, "
            f"the first is row {bad.argmax()}; remove or repair them."
        )
    return array


def _squared_norms(x):
    with np.errstate(over="ignore"):
        return np.einsum("nd,nd->n", x, x, dtype=np.float32, casting="same_kind")


def on_sphere(x: Real[ArrayLike, "n d"]) -> bool:
    """Whether every row has unit norm, as sentence embeddings do (to 1e-3)."""
    return bool(np.abs(_squared_norms(np.asarray(x)) - 1).max() < 2e-3)


def check_rkme(spec: RKME, *, signed: bool = False, where: str = "check_rkme") -> RKME:
    """`spec` itself, if its arrays are finite, fit together, and its weights lie on the simplex.

    With `signed`, weights may be any finite numbers. ValueError or TypeError otherwise.
    """
    z = check_rows(spec.z, where=f"{where}: z")
    beta = np.asarray(spec.beta)
    if beta.dtype.kind != "f" or beta.shape != (len(z),):
        raise ValueError(
            f"{where}: got beta of shape {beta.shape} and type {beta.dtype} for {len(z)} points; "
            "want one floating-point weight a point."
        )
    if not np.isfinite(beta).all():
        raise ValueError(f"{where}: {int((~np.isfinite(beta)).sum())} weights are NaN or infinite.")
    if not signed and (beta.min() < 0 or abs(beta.sum(dtype=np.float64) - 1) > 1e-5):
        raise ValueError(
            f"{where}: weights must be non-negative and sum to one; got a smallest weight of "
            f"{beta.min():.3g} and a sum of {beta.sum(dtype=np.float64):.6g}. Normalise them, or "
            "ask for signed weights by name."
        )
    return spec


def _arrays(spec: RKME):
    """z and beta, in float32 at least: float16 is for storage."""
    arrays = map(jnp.asarray, spec)
    return tuple(a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays)


def _moments(spec: RKME):
    """sum_i beta_i and sum_i beta_i |z_i|^2."""
    z, beta = _arrays(spec)
    beta = beta.astype(wide_dtype())
    return beta.sum(), (beta * (z * z).sum(1)).sum()


def inner(p: RKME, q: RKME, kernel: Kernel) -> Float[Array, ""]:
    """<mu_p, mu_q> = sum_ij p.beta_i q.beta_j k(p.z_i, q.z_j)."""
    (x, a), (y, b) = _arrays(p), _arrays(q)
    (p_mass, p_square), (q_mass, q_square) = _moments(p), _moments(q)
    squares = p_square * q_mass + p_mass * q_square
    offset = kernel.constant * p_mass * q_mass + kernel.per_square * squares
    return deficit_inner(kernel, x, a, y, b) + offset


def self_deficit(p: RKME, kernel: Kernel) -> Float[Array, ""]:
    """sum_ij beta_i beta_j deficit(|z_i - z_j|^2): <mu_p, mu_p> without the part that cancels."""
    x, a = _arrays(p)
    return deficit_inner(kernel, x, a, x, a)


def squared_mmd(p: RKME, q: RKME, kernel: Kernel) -> Float[Array, ""]:
    """|mu_p - mu_q|^2 in the RKHS, for any weights (Gretton et al. 2012, Lemma 6, V-statistic).

    Not rooted. Biased upwards as an estimate between the distributions behind two samples. In
    exact arithmetic not negative; in float32 it may be, by about 1e-7.
    """
    (x, a), (y, b) = _arrays(p), _arrays(q)
    cross = deficit_inner(kernel, x, a, y, b)
    # What the deficits leave out of the three terms, factored: zero for equal masses.
    (p_mass, p_square), (q_mass, q_square) = _moments(p), _moments(q)
    excess = p_mass - q_mass
    offset = excess * (kernel.constant * excess + 2 * kernel.per_square * (p_square - q_square))
    return self_deficit(p, kernel) + self_deficit(q, kernel) - 2 * cross + offset


def unbias(deficit, n: int):
    """A self term from pairs i = j and i != j, turned into one from i != j alone: n / (n - 1).

    Pairs i = i have deficit zero, so the V-statistic of deficits is (n - 1) / n of the U-statistic.
    From one row no such estimate exists, and the V-statistic is kept.
    """
    return deficit * (n / max(n - 1, 1))


def squared_mmd_unbiased(
    p: RKME, q: RKME, kernel: Kernel, *, n_p: int, n_q: int
) -> Float[Array, ""]:
    """Unbiased estimate of the squared MMD between the distributions behind two specifications.

    p and q stand for samples of n_p and n_q rows; their weights must sum to one. For whole samples
    this is the U-statistic (Gretton et al. 2012, Lemma 6). Negative about half the time for equal
    distributions: it is neither clipped nor rooted.
    """
    (x, a), (y, b) = _arrays(p), _arrays(q)
    cross = deficit_inner(kernel, x, a, y, b)
    selves = unbias(self_deficit(p, kernel), n_p) + unbias(self_deficit(q, kernel), n_q)
    return selves - 2 * cross


def witness(p: RKME, q: RKME, kernel: Kernel, x: Float[ArrayLike, "n d"]) -> Float[Array, " n"]:
    """mu_p(x) - mu_q(x): positive where p has more mass than q (Gretton et al. 2012, s. 2.3)."""
    return mean_embedding(kernel, x, *_arrays(p)) - mean_embedding(kernel, x, *_arrays(q))
