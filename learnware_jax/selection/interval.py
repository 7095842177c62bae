"""How sure a ranking is: an interval on every distance, and which learnwares may be the closest."""

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
    at_user: Float[np.ndarray, "k m"]  # h at the user's points
    own_variance: Float[np.ndarray, " k"]  # of h under the learnware's weights
    user_pairs: Float[np.ndarray, " k"]  # mean square of the doubly centred kernel, user x user
    own_pairs: Float[np.ndarray, " k"]  # learnware x learnware
    cross_pairs: Float[np.ndarray, " k"]  # user x learnware


@jax.jit
def _moments(kernel, u, a, z, b):
    center = u.mean(0)

    def deficits(x, y):
        return kernel.deficit(squared_distances(x, y, center)).astype(jnp.float64)

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
            at_user=h_u,
            own_variance=b @ (h_z - b @ h_z) ** 2,
            user_pairs=user_pairs,
            own_pairs=distinct_pairs(b, k_zz),
            cross_pairs=a @ centred(a, k_uz, b) ** 2 @ b,
        )

    return jax.lax.map(lambda zb: one(*zb), (z, b))


def _measured(user: RKME, pool: Pool, index) -> _Moments:
    with jax.enable_x64(True):
        moments = _moments(
            pool.kernel,
            jnp.asarray(np.asarray(user.z, np.float32) - pool.center),
            jnp.asarray(user.beta, jnp.float64),
            pool.z[index],
            pool.beta[index].astype(jnp.float64),
        )
        return _Moments(*map(np.asarray, moments))


def _variance(weights, values):
    """Of every row of values, under the weights."""
    weights = np.asarray(weights, np.float64)
    return (values - (values @ weights)[:, None]) ** 2 @ weights


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

    Two parts add up. Sampling: a Student quantile (one degree of freedom less than rows of the user
    or of the learnware, whichever has fewer) times the standard error of the unbiased estimate,
    with the first- and second-order terms of its Hoeffding decomposition (Sutherland et al., arXiv
    1611.04488; Serfling 1980, section 5.2), whose moments are taken under the weights of the two
    specifications. Up to sqrt(3) too wide where the two distributions nearly agree: the first-order
    terms then vanish, but their estimates do not.
    Compression: what moving each embedding by its residual could do at most, by the triangle
    inequality.

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
    moments, own_n = _measured(user, pool, index), np.maximum(pool.n[index], 2)
    variance = (
        4 * _variance(user.beta, moments.at_user) / (n - 1)
        + 4 * moments.own_variance / (own_n - 1)
        + 2 * moments.user_pairs / (n * (n - 1))
        + 2 * moments.own_pairs / (own_n * (own_n - 1))
        + 4 * moments.cross_pairs / (n * own_n)
    )
    sampling = stats.t.ppf((1 + level) / 2, np.minimum(n, own_n) - 1) * np.sqrt(variance)
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
    level: float = 0.9,
) -> Bool[np.ndarray, " k"]:
    """Which of the learnwares pool.ids[index] may be the closest: a confidence set of the best.

    index[0] is the first of the whole pool. The learnware whose distribution is truly the closest
    is kept with probability `level`, about: of learnwares that are equally close, each one is. It
    could only leave for another that comes first by chance; so a learnware leaves when it is
    further than the first by more than a Student quantile, at (1 - level) / (M - 1) for M
    learnwares in the pool (Bonferroni), times the standard error of the difference. That is the
    multiple comparison with the best (Hsu, Annals of Statistics 12, 1984) by tests of relative
    similarity (Bounliphone et al., arXiv 1511.04581), with the samples of both learnwares beside
    the user's. Compression is not counted.

    ValueError for n < 2 or a level outside (0, 1).
    """
    if n < 2 or not 0 < level < 1:
        raise ValueError(
            f"undominated: got n={n}, level={level}; want n >= 2 and a level between 0 and 1."
        )
    moments, own_n = _measured(user, pool, index), np.maximum(pool.n[index], 2)
    # The user's rows are the same for both: much of what they add to either distance cancels. No
    # terms of second order: embeddings are of samples too, and put these into the estimates twice.
    contrast = 2 * (moments.at_user - moments.at_user[0])
    own = 4 * moments.own_variance / (own_n - 1)
    variance = _variance(user.beta, contrast) / (n - 1) + own + own[0]
    rows = np.minimum(np.minimum(own_n, own_n[0]), n)
    quantile = stats.t.ppf(1 - (1 - level) / max(len(pool.ids) - 1, 1), rows - 1)
    return distance - distance[0] <= quantile * np.sqrt(variance)
