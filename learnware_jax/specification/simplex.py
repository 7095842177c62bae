"""Quadratic programs over the probability simplex: min b'Kb/2 - c'b with b >= 0 and sum b = 1.

Three solvers share one certificate. With g = Kb - c, convexity gives f(b) - f* <= g'b - min g
(Jaggi 2013, "Revisiting Frank-Wolfe", section 2), so every result carries a bound on its own error.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, ArrayLike, Bool, Float, Int

_POLISH_SIZE = 1024  # a masked Cholesky of this size takes tens of milliseconds on a CPU
_MAX_ITERATIONS = 1_000_000
_TILE = 256


class QPResult(NamedTuple):
    """A point of the simplex and a certified bound on how far its objective is from the optimum."""

    beta: Float[ArrayLike, " n"]
    gap: Float[ArrayLike, ""]  # f(beta) - min f is at most this
    iterations: Int[ArrayLike, ""]
    converged: Bool[ArrayLike, ""]


def _gradient(k, c, beta):
    # Accelerators would otherwise round K to a few bits, and the gap with it; dot products below
    # are written as sums for the same reason.
    return jnp.matmul(k, beta, precision=jax.lax.Precision.HIGHEST) - c


def duality_gap(
    k: Float[Array, "n n"], c: Float[Array, " n"], beta: Float[Array, " n"]
) -> Float[Array, ""]:
    """g'b - min g with g = Kb - c: at least f(b) - min f for b in the simplex and K >= 0."""
    gradient = _gradient(k, c, beta)
    # Subtracting first keeps every term non-negative: no cancellation near the optimum.
    return jnp.sum(beta * (gradient - gradient.min()))


def pairwise_frank_wolfe(
    k: Float[Array, "n n"],
    c: Float[Array, " n"],
    *,
    tolerance: Float[ArrayLike, ""],
    max_iterations: Int[ArrayLike, ""],
    start: Float[Array, " n"] | None = None,
) -> QPResult:
    """Move weight between two coordinates at a time with exact line search: O(n) a step.

    Lacoste-Julien and Jaggi 2015, algorithm 2; the coordinate that gives weight away is the one
    with the largest decrease. Starts at the best vertex, argmin K_ii/2 - c_i, unless given `start`.
    """
    diagonal = jnp.diagonal(k)
    if start is None:
        best = jnp.argmin(diagonal / 2 - c)
        start, gradient = jnp.zeros_like(c).at[best].set(1), k[best] - c
    else:
        gradient = _gradient(k, c, start)

    def unfinished(state):
        beta, gradient, iterations = state
        # Half: rounding in the running gradient must not undo the certificate below.
        gap = jnp.sum(beta * (gradient - gradient.min()))
        return (gap > tolerance / 2) & (iterations < max_iterations)

    def step(state):
        beta, gradient, iterations = state
        i = jnp.argmin(gradient)
        slope = gradient - gradient[i]
        # Rows that nearly coincide have curvature 0 or, after rounding, below: move all weight.
        curvature = jnp.maximum(diagonal + diagonal[i] - 2 * k[i], jnp.finfo(k.dtype).tiny)
        length = jnp.minimum(slope / curvature, beta)
        j = jnp.argmax(length * (slope - length * curvature / 2))
        moved = length[j]
        beta = beta.at[j].add(-moved).at[i].add(moved)
        return beta, gradient + moved * (k[i] - k[j]), iterations + 1

    beta, _, iterations = jax.lax.while_loop(
        unfinished, step, (start, gradient, jnp.zeros((), jnp.int32))
    )
    beta = beta / beta.sum()
    gap = duality_gap(k, c, beta)
    return QPResult(beta, gap, iterations, gap <= tolerance)


def polish(
    k: Float[Array, "n n"], c: Float[Array, " n"], beta: Float[Array, " n"]
) -> Float[Array, " n"]:
    """The exact optimum on the support of beta, if that is feasible and has a smaller gap.

    Returns beta unchanged otherwise, as where K is singular on it. Of a larger support only
    the 1,024 greatest weights are solved for.
    """
    size = min(beta.shape[0], _POLISH_SIZE)
    weight, index = jax.lax.top_k(beta, size)
    support = weight > 0
    pair = support[:, None] & support[None, :]
    k_support = jnp.where(pair, k[index[:, None], index[None, :]], jnp.eye(size, dtype=k.dtype))
    factor = jnp.linalg.cholesky(k_support)
    rhs = jnp.stack([jnp.where(support, c[index], 0), support.astype(c.dtype)], axis=1)
    free, ones = cho_solve((factor, True), rhs).T
    solved = jnp.where(support, free + ones * (1 - free.sum()) / ones.sum(), 0)
    candidate = jnp.zeros_like(beta).at[index].set(solved / solved.sum())
    # NaN from a failed factorisation compares false, so it is never kept.
    better = duality_gap(k, c, candidate) < duality_gap(k, c, beta)
    return jnp.where(better & (candidate >= 0).all(), candidate, beta)


def interior_point(
    k: Float[Array, "n n"],
    c: Float[Array, " n"],
    *,
    iterations: int = 25,
    mask: Bool[Array, " n"] | None = None,
) -> QPResult:
    """Mehrotra's predictor-corrector with a fixed number of steps, so that it can be vmapped.

    Only variables where `mask` is true (at least one) exist: the others get weight exactly 0 and
    their rows of k and c are never read. `iterations` counts the steps that moved; converged means
    a gap of at most 1e-9, or 16 units of rounding where that is more (float32).
    Nocedal and Wright 2006, algorithm 16.4.
    """
    eps = jnp.finfo(k.dtype).eps
    mask = jnp.ones(c.shape, bool) if mask is None else mask
    real = mask.astype(k.dtype)
    count = real.sum()
    k = jnp.where(mask[:, None] & mask[None, :], k, 0)
    c = jnp.where(mask, c, 0)

    def over_simplex(gradient):  # gradient minus its least real entry, 0 where masked
        return jnp.where(mask, gradient - jnp.where(mask, gradient, jnp.inf).min(), 0)

    # Masked variables stand at beta = slack = 1 with direction 0: no division by their zeros.
    beta = jnp.where(mask, 1 / count, 1)
    gradient = _gradient(k, c, real / count)
    spread = over_simplex(gradient)
    scale = jnp.maximum(jnp.abs(k).max(), spread.max())
    slack = jnp.where(mask, spread + 1e-2 * scale, 1)
    level = (gradient - slack)[jnp.argmax(mask)]  # K beta - c = level + slack

    def longest(value, change):
        ratio = jnp.where(change < 0, -value / jnp.where(change < 0, change, -1), jnp.inf)
        return jnp.minimum(1, 0.995 * ratio.min())

    def step(state, _):
        beta, level, slack = state
        complementarity = jnp.sum(real * beta * slack) / count
        dual = _gradient(k, c, real * beta) - real * (level + slack)
        primal = jnp.sum(real * beta) - 1
        factor = jnp.linalg.cholesky(k + jnp.diag(slack / beta))

        def direction(target):
            rhs = jnp.stack([real * target / beta - dual, real], axis=1)
            free, ones = cho_solve((factor, True), rhs).T
            d_level = -(primal + free.sum()) / ones.sum()
            d_beta = free + d_level * ones
            d_slack = real * (target - slack * d_beta) / beta
            return d_beta, d_level, d_slack

        def length(d_beta, d_slack):
            return jnp.minimum(longest(beta, d_beta), longest(slack, d_slack))

        d_beta, _, d_slack = direction(-beta * slack)
        size = length(d_beta, d_slack)
        predicted = jnp.sum(real * (beta + size * d_beta) * (slack + size * d_slack)) / count
        centre = (predicted / complementarity) ** 3 * complementarity
        d_beta, d_level, d_slack = direction(centre - beta * slack - d_beta * d_slack)
        size = length(d_beta, d_slack)
        moved = (beta + size * d_beta, level + size * d_level, slack + size * d_slack)
        # Past this point rounding decides, and a failed factorisation gives NaN: stay.
        usable = complementarity > 1e-3 * eps * scale
        usable &= jnp.isfinite(moved[0]).all() & jnp.isfinite(moved[2]).all()
        return jax.tree.map(lambda new, old: jnp.where(usable, new, old), moved, state), usable

    (beta, _, _), usable = jax.lax.scan(step, (beta, level, slack), length=iterations)
    beta = real * beta
    beta = beta / beta.sum()
    gap = jnp.sum(beta * over_simplex(_gradient(k, c, beta)))
    converged = gap <= jnp.maximum(1e-9, 16 * eps * scale)
    return QPResult(beta, gap, usable.sum(dtype=jnp.int32), converged)


@jax.jit
def _solve(k, c, start, tolerance):
    result = pairwise_frank_wolfe(
        k, c, tolerance=tolerance, max_iterations=_MAX_ITERATIONS, start=start
    )
    beta = polish(k, c, result.beta)
    gap = duality_gap(k, c, beta)
    return result._replace(beta=beta, gap=gap, converged=gap <= tolerance)


def _asymmetry(k):
    """max |k - k'|, by tiles that fit in cache: a transposed pass over a large k is slow."""
    tiles = range(0, k.shape[0], _TILE)
    return max(
        np.abs(k[i : i + _TILE, j : j + _TILE] - k[j : j + _TILE, i : i + _TILE].T).max()
        for i in tiles
        for j in tiles
        if j >= i
    )


def _checked(k, c, start):
    k, c = np.asarray(k, np.float64), np.asarray(c, np.float64)
    if k.ndim != 2 or k.shape[0] != k.shape[1] or c.shape != k.shape[:1] or c.size == 0:
        raise ValueError(
            f"solve_simplex: k has shape {k.shape} and c {c.shape}; pass (n, n) and (n,), n >= 1."
        )
    if not (np.isfinite(k).all() and np.isfinite(c).all()):
        bad = np.flatnonzero(~(np.isfinite(k).all(axis=1) & np.isfinite(c)))
        raise ValueError(
            f"solve_simplex: {bad.size} of {c.size} rows of k or c are not finite, "
            f"the first at index {bad[0]}; remove or repair the points that made them."
        )
    asymmetry, largest = _asymmetry(k), np.abs(np.diagonal(k)).max()
    if asymmetry > 1e-12 * largest:
        raise ValueError(
            f"solve_simplex: k differs from its transpose by {asymmetry:.1e} (largest diagonal "
            f"entry {largest:.1e}), which would void the certificate; pass (k + k.T) / 2."
        )
    if start is None:
        return k, c, None
    start = np.asarray(start, np.float64)
    if start.shape != c.shape or not (start >= 0).all() or not abs(start.sum() - 1) <= 1e-6:
        raise ValueError(
            f"solve_simplex: start has shape {start.shape}, least entry {start.min(initial=0):.1e} "
            f"and sum {start.sum():.6g}; pass {c.shape} non-negative numbers that sum to 1."
        )
    return k, c, start / start.sum()


def solve_simplex(
    k: Float[ArrayLike, "..."],
    c: Float[ArrayLike, "..."],
    *,
    tolerance: float = 1e-9,
    start: Float[ArrayLike, "..."] | None = None,
) -> QPResult:
    """The minimiser of b'Kb/2 - c'b over the simplex in float64, as NumPy values.

    k is (n, n), c and start (n,). Frank-Wolfe to `tolerance`, then `polish`. A gap above
    `tolerance` sets converged to False, after at most a million steps.
    Raises ValueError for other shapes, non-finite entries, an asymmetric k, or a start outside the
    simplex. That k is positive semidefinite, without which the gap bounds nothing, is not checked.
    """
    k, c, start = _checked(k, c, start)
    with jax.enable_x64(True):
        return QPResult(*jax.tree.map(np.asarray, _solve(k, c, start, tolerance)))
