"""How sure a ranking is: an interval on every distance, and who is separated from the first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from learnware_jax.selection.pool import Pool
from learnware_jax.specification.kernels import squared_distances
from learnware_jax.specification.rkme import RKME


class _Moments(NamedTuple):
    """Of one user and one learnware; h = mu_user - mu_learnware is their witness function."""

    squared: Float[np.ndarray, " k"]  # |h|^2 between the reduced sets
    user_variance: Float[np.ndarray, " k"]  # of h under the user's weights
    own_variance: Float[np.ndarray, " k"]  # of h under the learnware's weights
    user_pairs: Float[np.ndarray, " k"]  # mean square of the doubly centred kernel, user x user
    own_pairs: Float[np.ndarray, " k"]  # learnware x learnware
    cross_pairs: Float[np.ndarray, " k"]  # user x learnware


@jax.jit
def _moments(kernel, u, a, z, b):
    center = u.mean(0)

    def deficits(x, y):
        return kernel.deficit(squared_distances(x, y, center)).astype(jnp.float64)

    def variance(weights, h):
        return weights @ (h - weights @ h) ** 2

    def centred(left, k, right):
        return k - left @ k - (k @ right)[:, None] + left @ k @ right

    def distinct_pairs(weights, k):
        square = centred(weights, k, weights) ** 2
        same = weights**2
        off = weights @ square @ weights - same @ jnp.diagonal(square)
        return off / jnp.maximum(1 - same.sum(), 1e-12)

    k_uu = deficits(u, u)
    user_pairs = distinct_pairs(a, k_uu)

    def one(z, b):
        k_zz, k_uz = deficits(z, z), deficits(u, z)
        h_u, h_z = k_uu @ a - k_uz @ b, k_uz.T @ a - k_zz @ b
        return _Moments(
            squared=a @ h_u - b @ h_z,
            user_variance=variance(a, h_u),
            own_variance=variance(b, h_z),
            user_pairs=user_pairs,
            own_pairs=distinct_pairs(b, k_zz),
            cross_pairs=a @ centred(a, k_uz, b) ** 2 @ b,
        )

    return jax.lax.map(lambda zb: one(*zb), (z, b))


def intervals(
    user: RKME,
    pool: Pool,
    distance: Float[np.ndarray, " k"],
    index: Int[np.ndarray, " k"],
    *,
    n: int,
    residual: float,
    level: float = 0.9,
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Lower and upper ends of an interval on the squared MMD to each learnware pool.ids[index].

    Two parts add up. Sampling: a Student quantile (n - 1 degrees of freedom) times the standard
    error of the unbiased estimate, with the first- and second-order terms of its Hoeffding
    decomposition (Sutherland et al., arXiv 1611.04488; Serfling 1980, section 5.2), whose moments
    are taken under the weights of the two specifications. Up to sqrt(3) too wide where the two
    distributions nearly agree: the first-order terms then vanish, but their estimates do not.
    Compression: what moving each embedding
    by its residual could do at most, by the triangle inequality.

    Arguments:
      distance: unbiased squared MMD, as `rank` returns it.
      n, residual: rows behind the user's specification, and squared MMD lost by its compression
        (0 for whole samples).
      level: nominal coverage of the sampling part, in (0, 1).

    Raises ValueError for n < 2, where no variance can be estimated, or a level outside (0, 1).
    """
    if n < 2:
        raise ValueError(
            f"intervals: got n={n}; the sampling error of a task needs at least 2 rows. Give more "
            "texts, or use `rank` alone."
        )
    if not 0 < level < 1:
        raise ValueError(f"intervals: got level={level}; want a number between 0 and 1.")
    with jax.enable_x64(True):
        moments = _Moments(
            *map(
                np.asarray,
                _moments(
                    pool.kernel,
                    jnp.asarray(np.asarray(user.z, np.float32) - pool.center),
                    jnp.asarray(user.beta, jnp.float64),
                    pool.z[index],
                    pool.beta[index].astype(jnp.float64),
                ),
            )
        )
    own_n = np.maximum(pool.n[index], 2)
    variance = (
        4 * moments.user_variance / (n - 1)
        + 4 * moments.own_variance / (own_n - 1)
        + 2 * moments.user_pairs / (n * (n - 1))
        + 2 * moments.own_pairs / (own_n * (own_n - 1))
        + 4 * moments.cross_pairs / (n * own_n)
    )
    sampling = stats.t.ppf((1 + level) / 2, n - 1) * np.sqrt(variance)
    shift = np.sqrt(max(residual, 0)) + np.sqrt(np.maximum(pool.residual[index], 0))
    mmd = np.sqrt(np.maximum(moments.squared, 0))
    lower = distance - sampling - (mmd**2 - np.maximum(mmd - shift, 0) ** 2)
    return lower, distance + sampling + ((mmd + shift) ** 2 - mmd**2)


def undominated(
    user: RKME,
    pool: Pool,
    distance: Float[np.ndarray, " k"],
    index: Int[np.ndarray, " k"],
    *,
    n: int,
    level: float = 0.95,
) -> Bool[np.ndarray, " k"]:
    """Which of the learnwares pool.ids[index] are not separated from the first, index[0].

    For learnware b the difference of squared MMDs to the first, a, is a mean over the user's rows
    of D(x) = 2 (mu_a(x) - mu_b(x)) plus a constant; b is separated when the difference exceeds the
    one-sided Student quantile times sd(D) / sqrt(n). O(n) a pair. It takes the pool's embeddings as
    given and ignores that the first was chosen as the best of many: "separated", not a p-value.

    ValueError for n < 2 or a level outside (0, 1).
    """
    if n < 2 or not 0 < level < 1:
        raise ValueError(
            f"undominated: got n={n}, level={level}; want n >= 2 and a level between 0 and 1."
        )
    weights = np.asarray(user.beta, np.float64)
    with jax.enable_x64(True):
        u = jnp.asarray(np.asarray(user.z, np.float32) - pool.center)
        embedded = np.asarray(
            _embeddings_at(pool.kernel, u, pool.z[index], pool.beta[index].astype(jnp.float64))
        )
    contrast = 2 * (embedded[:1] - embedded)
    variance = (contrast - (contrast @ weights)[:, None]) ** 2 @ weights
    margin = stats.t.ppf(level, n - 1) * np.sqrt(variance / (n - 1))
    return distance - distance[0] <= margin


@jax.jit
def _embeddings_at(kernel, u, z, b):
    """mu_l(u_i) of every learnware l, without the kernel's constant part: (k, m_u)."""
    center = u.mean(0)

    def one(zb):
        z, b = zb
        return kernel.deficit(squared_distances(u, z, center)).astype(jnp.float64) @ b

    return jax.lax.map(one, (z, b))
