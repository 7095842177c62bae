"""Reduced-set compression: n embedded rows to m weighted points with nearly the same embedding.

    minimise over z and beta   J = |sum_i w_i k(x_i, .) - sum_j beta_j k(z_j, .)|^2

with beta on the simplex; w_i is 1/n unless the rows come with weights. The default is a
Gauss-Newton method in the RKHS with beta eliminated (variable projection, Golub and Pereyra 1973;
Kaufman's approximation, 1975): each step makes one pass over the rows, and everything else costs
O(m^2 d). Random rows, k-means and herding stand behind the same signature as baselines; of these,
random rows and herding publish real rows.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, PRNGKeyArray, Real

from learnware_jax.specification.herding import herd_indices
from learnware_jax.specification.kernels import (
    Kernel,
    deficit_inner,
    deficit_sums,
    matmul,
    scan_blocks,
    squared_distances,
)
from learnware_jax.specification.rkme import RKME, check_rkme, check_rows, on_sphere, unbias
from learnware_jax.specification.simplex import duality_gap, interior_point, solve_simplex

# Points are fitted to a random sample of at most this many rows; their weights still see all.
FIT_ROWS = 32768
# Up to this many rows the residual is exact; beyond, it is estimated from pairs of so many.
RESIDUAL_ROWS = 16384
_HERDING_CANDIDATES = 10_000
_BLOCK = 4096

logger = logging.getLogger(__name__)


class Reduced(NamedTuple):
    """A reduced set and how well it does."""

    spec: RKME  # z (m, d) float32, beta (m,) float64 on the simplex
    n: int  # rows of the full sample, without those of weight zero
    residual: float  # squared MMD to the full sample; rounding or sampling may leave it below 0
    gap: float  # certified excess of the weights' objective b'Kb/2 - c'b over its minimum
    iterations: int  # accepted Gauss-Newton steps (or k-means rounds); 0 where nothing iterates


def _offsets(kernel, z):
    """The parts of k(z_i, z_j) and c(z_i) that the deficits leave out, up to a constant in c."""
    # Weights that sum to one do not see where the origin is; near z, large numbers do not cancel.
    squares = kernel.per_square * ((z - z.mean(0)) ** 2).sum(1)
    return kernel.constant + squares[:, None] + squares, squares


def _data_pass(kernel, z, x, weights):
    """Over all rows: sum_x w deficit, sum_x w slope and sum_x w slope x, for every point z."""
    z = z.astype(x.dtype)
    center = z.mean(0)

    def body(rows, w):
        t = squared_distances(z, rows, center)
        slope = kernel.slope(t) * w
        return matmul(kernel.deficit(t), w), slope.sum(1), matmul(slope, rows)

    zero = jnp.zeros(len(z), jnp.float64)
    return scan_blocks(body, (zero, zero, jnp.zeros(z.shape, jnp.float64)), x, weights, _BLOCK)


def _model_step(kernel, z, beta, k_slope, k_curvature, k, gradient, damping, tangent):
    """The damped Gauss-Newton step: at most 15 conjugate-gradient steps on (A + D) v = -gradient.

    With delta = z_i - z_j, the metric of the features is d_i d_j k = -2 slope I - 4 curvature
    delta delta'; A is that metric weighted by beta, minus what a change of beta could do as well.
    """
    # The direction need not be exact, and float64 products are slow on accelerators.
    z, beta, k, k_slope, k_curvature, gradient = (
        a.astype(jnp.float32) for a in (z, beta, k, k_slope, k_curvature, gradient)
    )
    damping = damping.astype(jnp.float32)
    # 1e-4 of ridge: neighbouring points make k nearly singular.
    factor = jax.scipy.linalg.cho_factor(k + 1e-4 * jnp.eye(len(k), dtype=k.dtype))
    diagonal = (-2 * jnp.diagonal(k_slope) * beta**2)[:, None]

    def metric(v):
        v = tangent(v)
        along = matmul(z, v.T) - (z * v).sum(1)  # (z_i - z_j) . v_j
        bent = k_curvature * beta * along
        move = -2 * matmul(k_slope, beta[:, None] * v)
        move = move - 4 * (z * bent.sum(1)[:, None] - matmul(bent, z))
        refit = jax.scipy.linalg.cho_solve(factor, matmul(-2 * k_slope * along, beta))
        pull = matmul(k_slope, refit[:, None] * z)
        move = move - 2 * (z * matmul(k_slope, refit)[:, None] - pull)
        return tangent(beta[:, None] * move) + damping * diagonal * v

    step, _ = jax.scipy.sparse.linalg.cg(
        metric, -gradient, maxiter=15, tol=1e-3, M=lambda v: v / diagonal
    )
    return tangent(step)


@partial(jax.jit, static_argnames="sphere")
@partial(jax.vmap, in_axes=(0, 0, 0, None, None, None))
def _gauss_newton(z, x, weights, kernel, steps, sphere):
    """Points after `steps` Levenberg-Marquardt steps from z, and how many of them were accepted."""
    m = len(z)
    reach = 10 * jnp.maximum(jnp.abs(x).max(), jnp.abs(z).max())

    def evaluate(z):
        sums = _data_pass(kernel, z, x, weights)
        t = squared_distances(z, z)
        k_offset, c_offset = _offsets(kernel, z)
        k = kernel.deficit(t) + k_offset
        beta = interior_point(k, sums[0] + c_offset, iterations=14).beta
        objective = beta @ kernel.deficit(t) @ beta - 2 * beta @ sums[0]
        return z, sums, t, k, beta, objective

    def tangent(v, z):
        along = (v * z).sum(1, keepdims=True).astype(v.dtype) * z.astype(v.dtype)
        # Without the barrier XLA (0.10.2, CPU) compiles the conjugate gradients wrongly from about
        # 64 points on: their result is then whatever is in memory.
        return v - along if sphere else jax.lax.optimization_barrier(v)

    def step(_, state):
        (z, (_, x_slope, x_pull), t, k, beta, objective), damping, accepted = state
        k_slope, k_curvature = kernel.slope(t), kernel.curvature(t)
        from_points = z * (k_slope @ beta)[:, None] - k_slope @ (beta[:, None] * z)
        from_rows = z * x_slope[:, None] - x_pull
        # A point whose weight vanishes would never move again: give each at least a share.
        share = jnp.maximum(beta, 0.2 / m)
        gradient = tangent(2 * share[:, None] * (from_points - from_rows), z)
        z_tangent = partial(tangent, z=z)
        moved = z + _model_step(
            kernel, z, share, k_slope, k_curvature, k, gradient, damping, z_tangent
        )
        if sphere:
            moved = moved / jnp.linalg.norm(moved, axis=1, keepdims=True)
        trial = evaluate(moved)
        # Far out, where the model of the objective may send points, float32 distances overflow.
        better = (trial[-1] < objective) & (jnp.abs(moved) < reach).all()
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), trial, state[0])
        damping = jnp.where(better, 0.4 * damping, 5 * damping)
        return kept, damping, accepted + better

    start = (evaluate(z.astype(jnp.float64)), jnp.asarray(1e-2, jnp.float64), jnp.zeros((), int))
    (z, *_), _, accepted = jax.lax.fori_loop(0, steps, step, start)
    return z.astype(jnp.float32), accepted


def _pad_length(n: int) -> int:
    """n rounded up to a multiple of 64, or by at most 1/8: few different shapes are compiled."""
    step = max(64, 1 << max(0, (n - 1).bit_length() - 4))
    return -(-n // step) * step


def _padded(x, length: int, weights=None):
    """Rows of x as float32, padded to `length`, and weights: 0 for padding, else 1 by default."""
    rows = np.empty((length, x.shape[1]), np.float32)
    # Padding far from the rows would cost digits: repeat one of them.
    rows[: len(x)], rows[len(x) :] = x, x[0]
    padded = np.zeros(length, np.float32)
    padded[: len(x)] = 1 if weights is None else weights
    return rows, padded


def mean_deficits(kernel, z, x, weights=None):
    """sum_x w deficit(|z_i - x|^2) for every z_i, w = 1/n by default; x lies on the host, may have
    any length, and is read in pieces. Call it where JAX has float64 switched on.
    """
    piece = min(_pad_length(len(x)), 16 * _BLOCK)
    total = np.zeros(len(z))
    for start in range(0, len(x), piece):
        some = slice(start, start + piece)
        rows, padded = _padded(x[some], piece, None if weights is None else weights[some])
        total += np.asarray(deficit_sums(kernel, z, rows, padded, block=_BLOCK))
    return total / len(x) if weights is None else total


def _some_rows(rng, x, count, weights=None):
    """x and its weights, or `count` random rows, in their order (x may be memory-mapped).

    Without weights no row is drawn twice. With weights the draws are independent, and a row weighs
    as often as it was drawn.
    """
    if len(x) <= count:
        return x, weights
    if weights is None:
        return x[np.sort(rng.choice(len(x), count, replace=False))], None
    times = rng.multinomial(count, weights)
    return x[times > 0], times[times > 0] / count


def _residual(rng, kernel, z, beta, cross, own, x, weights):
    """Squared MMD between all rows of x and (z, beta); `cross` = mean deficits of z against x, and
    `own` = those between the points, weighted by beta twice.

    With more than RESIDUAL_ROWS rows, pairs of rows come from a random subsample: a U-statistic of
    the kernel centred at the reduced set, whose own term k(x, x) enters exactly.
    """
    n = len(x)
    sample, sample_weights = _some_rows(rng, x, RESIDUAL_ROWS, weights)
    whole = len(sample) == n
    sample_cross = cross if whole else mean_deficits(kernel, z, sample, sample_weights)
    rows, padded = _padded(sample, _pad_length(len(sample)), sample_weights)
    pairs = float(deficit_inner(kernel, rows, padded, rows, padded))
    if weights is not None:
        # Independent draws: two different ones are any two rows, also one row twice.
        pairs = pairs if whole else unbias(pairs, RESIDUAL_ROWS)
        return float(pairs - 2 * beta @ sample_cross + own)
    count = len(sample)
    distinct = unbias(pairs / count**2, count) - 2 * beta @ sample_cross + own
    same = own - 2 * beta @ cross
    return float((1 - 1 / n) * distinct + same / n)


def _start_points(rng, x, weights, m, start, sphere):
    if start == "rows":
        rows = np.sort(rng.choice(len(x), m, replace=False, p=weights)) if m < len(x) else slice(m)
        return np.asarray(x[rows], np.float32)
    z = rng.standard_normal((m, x.shape[1]), np.float32)
    if sphere:
        return z / np.linalg.norm(z, axis=1, keepdims=True)
    if weights is None:
        return (x.mean(0) + x.std(0) * z).astype(np.float32)
    mean = weights @ x
    return (mean + np.sqrt(weights @ (x - mean) ** 2) * z).astype(np.float32)


class _Fit(NamedTuple):
    """What Gauss-Newton is to do for one sample: from where, and to which rows."""

    start: np.ndarray
    rows: np.ndarray
    weights: np.ndarray | None


def _gauss_newton_points(fits, kernel, steps, sphere):
    """Points for a group of fits that have the same m, in one compiled call."""
    length = _pad_length(max(len(fit.rows) for fit in fits))
    rows, weights = zip(*(_padded(fit.rows, length, fit.weights) for fit in fits), strict=True)
    counts = [[len(fit.rows) if fit.weights is None else 1] for fit in fits]
    z, accepted = _gauss_newton(
        np.stack([fit.start for fit in fits]),
        np.stack(rows),
        np.stack(weights) / np.array(counts, np.float32),
        kernel,
        steps,
        sphere,
    )
    return [(z, None, int(a)) for z, a in zip(np.asarray(z), np.asarray(accepted), strict=True)]


def _random_points(rng, x, weights, m, kernel):
    return _start_points(rng, x, weights, m, "rows", False), None, 0


def _kmeans_points(rng, x, weights, m, kernel):
    from sklearn.cluster import KMeans

    seed = int(rng.integers(2**31))
    fit = KMeans(m, n_init=1, max_iter=100, random_state=seed)
    fit.fit(np.asarray(x, np.float32), sample_weight=weights)
    return fit.cluster_centers_.astype(np.float32), None, fit.n_iter_


def _herding_points(rng, x, weights, m, kernel):
    # All rows of a smaller sample are candidates, whatever they weigh.
    candidates = np.asarray(_some_rows(rng, x, _HERDING_CANDIDATES, weights)[0], np.float32)
    squares = (candidates.astype(np.float64) ** 2).sum(1)
    c = mean_deficits(kernel, candidates, x, weights) + kernel.per_square * squares
    picks = np.asarray(herd_indices(kernel, jnp.asarray(c), jnp.asarray(candidates), count=m))
    distinct, counts = np.unique(picks, return_counts=True)
    return candidates[distinct], counts / m, 0


_BASELINES = {"random": _random_points, "kmeans": _kmeans_points, "herding": _herding_points}
REDUCERS = ("gauss_newton", *_BASELINES)
PUBLISHING = ("random", "herding")  # their points are rows


def reduce_many(
    key: PRNGKeyArray,
    samples: Sequence[Real[ArrayLike, "_ d"]],
    m: int,
    kernel: Kernel,
    *,
    weights: Sequence[Float[ArrayLike, " _"]] | None = None,
    method: str = "gauss_newton",
    start: str = "rows",
    steps: int = 50,
) -> list[Reduced]:
    """A reduced set of at most m points for each sample; Gauss-Newton fits all in one vmapped call.

    Arguments:
      key: every random choice follows from it; same key, same machine, same bits.
      samples: rows (n_t, d) of each task, n_t free; NumPy arrays, memory-mapped ones included, are
        read in pieces.
      m: points; a sample of n <= m rows gets n points.
      weights: (n_t,) for each sample, on the simplex: how much every row counts, 1/n_t by default.
        A union of reduced sets is such a sample. Rows of weight zero are left out.
      method: "gauss_newton", or a baseline: "random" (rows), "kmeans", "herding" (equal weights).
        All but herding weigh their points by the simplex QP over all rows.
      start: where Gauss-Newton starts. "rows": random rows of the sample; with n <= m they are
        returned as they are. "noise": random directions (off the sphere: Gaussian noise of the
        sample's mean and variance), which stay further from every row.
      steps: Gauss-Newton steps, one pass over the rows each.

    Raises ValueError or TypeError for m < 1, an unknown method or start, empty samples, rows that
    are not finite, samples of different dimension, or weights that are not one a row, negative, or
    do not sum to one.
    """
    if m < 1 or steps < 0:
        raise ValueError(f"reduce: got m={m}, steps={steps}; want m >= 1 and steps >= 0.")
    if method not in REDUCERS or start not in ("rows", "noise"):
        raise ValueError(
            f"reduce: got method={method!r}, start={start!r}; want a method of {REDUCERS} and a "
            "start of ('rows', 'noise')."
        )
    given: list[Any] = [None] * len(samples) if weights is None else list(weights)
    if len(given) != len(samples):
        raise ValueError(
            f"reduce: got {len(given)} arrays of weights, {len(samples)} samples; want as many."
        )
    checked = [
        _checked(x, w, where=f"reduce: sample {i}")
        for i, (x, w) in enumerate(zip(samples, given, strict=True))
    ]
    dimensions = sorted({x.shape[1] for x, _ in checked})
    if len(dimensions) > 1:
        raise ValueError(
            f"reduce: samples have dimensions {dimensions}; embed all of them with one encoder."
        )
    seeds = np.random.SeedSequence(np.asarray(jax.random.key_data(key)).tolist())
    rngs = [np.random.default_rng(s) for s in seeds.spawn(len(samples))]
    points: list[Any] = [None] * len(samples)
    with jax.enable_x64(True):
        groups = {}
        for i, (rng, (x, w)) in enumerate(zip(rngs, checked, strict=True)):
            if len(x) < m:
                logger.info("reduce: sample %d has %d rows, so it gets as many points.", i, len(x))
            size = min(m, len(x))
            if len(x) <= m and start == "rows" and method == "gauss_newton":
                share = np.full(len(x), 1 / len(x)) if w is None else w
                points[i] = np.asarray(x, np.float32), share, 0
            elif method == "gauss_newton":
                rows, row_weights = _some_rows(rng, x, FIT_ROWS, w)
                sphere = on_sphere(rows)
                # Rows that were drawn by weight may be fewer than the points.
                source = (rows, None) if w is None else (x, w)
                z = _start_points(rng, *source, size, start, sphere)
                groups.setdefault((size, sphere), {})[i] = _Fit(z, rows, row_weights)
            else:
                points[i] = _BASELINES[method](rng, x, w, size, kernel)
        for (_, sphere), fits in groups.items():
            fitted = _gauss_newton_points(list(fits.values()), kernel, steps, sphere)
            for i, result in zip(fits, fitted, strict=True):
                points[i] = result
        parts = zip(rngs, checked, points, strict=True)
        return [_weigh(rng, kernel, x, w, *p) for rng, (x, w), p in parts]


def _checked(x, weights, *, where):
    """Rows, and their weights as float64 that sum to one; rows of weight zero are left out."""
    if weights is None:
        return check_rows(x, where=where), None
    x, weights = map(np.asarray, check_rkme(RKME(x, weights), where=where))
    weights = weights / weights.sum(dtype=np.float64)
    real = weights > 0
    return (x, weights) if real.all() else (x[real], weights[real])


def _weigh(rng, kernel, x, weights, z, beta, iterations):
    """Weights by QP unless given, the certificate, and the residual."""
    cross = mean_deficits(kernel, z, x, weights)
    wide = jnp.asarray(z, jnp.float64)
    deficits = kernel.deficit(squared_distances(wide, wide))
    k_offset, c_offset = _offsets(kernel, wide)
    k, c = np.asarray(deficits + k_offset), np.asarray(cross + c_offset)
    if beta is None:
        solution = solve_simplex(k, c)
        beta, gap = np.asarray(solution.beta), float(solution.gap)
    else:
        gap = float(duality_gap(jnp.asarray(k), jnp.asarray(c), jnp.asarray(beta)))
    own = beta @ np.asarray(deficits) @ beta
    residual = _residual(rng, kernel, z, beta, cross, own, x, weights)
    return Reduced(RKME(z, beta), len(x), residual, gap, iterations)


def reduce(
    key: PRNGKeyArray,
    x: Real[ArrayLike, "n d"],
    m: int,
    kernel: Kernel,
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    **options,
) -> Reduced:
    """A reduced set of at most m points for one sample; options and errors as in `reduce_many`.

    >>> import jax
    >>> import numpy as np
    >>> from learnware_jax import reduce
    >>> from learnware_jax.specification.kernels import Gaussian
    >>> x = np.random.default_rng(0).normal(size=(200, 2))
    >>> reduced = reduce(jax.random.key(0), x, 10, Gaussian(0.5), start="noise")
    >>> reduced.spec.z.shape, reduced.n, bool(reduced.residual < 1e-3)
    ((10, 2), 200, True)
    """
    several = None if weights is None else [weights]
    return reduce_many(key, [x], m, kernel, weights=several, **options)[0]
