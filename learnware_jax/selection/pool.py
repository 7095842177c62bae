"""A pool: the specifications of many learnwares, stacked and padded so that one program ranks them.

Padding has weight zero. The capacity doubles when it is used up, so adding a learnware seldom
changes a shape, and a compiled ranking keeps serving a growing pool.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from learnware_jax.specification.kernels import Kernel
from learnware_jax.specification.rkme import RKME, check_rkme, self_deficit, unbias


class Pool(NamedTuple):
    """Up to C specifications of at most m points each; the first len(ids) rows are in use."""

    kernel: Kernel
    center: Float[Array, " d"]  # subtracted from every point, against cancellation in distances
    z: Float[Array, "C m d"]  # float32, centred
    z_squared: Float[Array, "C m"]  # float64: |z|^2 of the centred points
    beta: Float[Array, "C m"]  # float64, so that only kernel values are rounded
    self_term: Float[np.ndarray, " C"]  # float64: unbiased sum_ij beta_i beta_j deficit
    n: np.ndarray  # (C,) int: rows behind each specification
    residual: Float[np.ndarray, " C"]  # float64: squared MMD lost by compression
    ids: tuple[str, ...]


def round_up(count: int) -> int:
    """A capacity for `count` learnwares: at most 1/8 more, or 15, and divisible by 16 or more, so
    that chunks of a power of two come out even."""
    step = max(16, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


def stack(
    specs: Sequence[RKME], points: int | None = None
) -> tuple[Float[np.ndarray, "q m d"], Float[np.ndarray, "q m"]]:
    """Points and weights of several specifications, padded to one size with weight zero.

    `points` is that size; by default the largest of `specs`.
    """
    size = max(len(spec.beta) for spec in specs) if points is None else points
    z = np.zeros((len(specs), size, np.shape(specs[0].z)[1]), np.float32)
    beta = np.zeros((len(specs), size), np.float64)
    for i, spec in enumerate(specs):
        z[i, : len(spec.beta)], beta[i, : len(spec.beta)] = spec.z, spec.beta
        # A padding point far from the rest would cost digits: repeat a real one.
        z[i, len(spec.beta) :] = spec.z[0]
    return z, beta


@jax.jit
def _self_deficits(kernel, z, beta):
    # All in float64: it is done once a specification, and every distance has this error.
    def one(rows):
        return self_deficit(RKME(*(a.astype(jnp.float64) for a in rows)), kernel)

    return jax.lax.map(one, (z, beta))


def self_deficits(
    kernel: Kernel, z: Float[np.ndarray, "q m d"], beta: Float[np.ndarray, "q m"]
) -> Float[np.ndarray, " q"]:
    """`self_deficit` of every specification of a stack, float64, by one program."""
    if z.shape[1] == 1:
        return np.zeros(len(z))  # no two points
    with jax.enable_x64(True):
        return np.asarray(_self_deficits(kernel, jnp.asarray(z), jnp.asarray(beta)))


def _rows(specs, n, residual, ids, kernel, center, points):
    """Everything that a pool keeps of some learnwares, as NumPy arrays without spare capacity."""
    z, beta = stack(specs, points)
    selves = [unbias(*pair) for pair in zip(self_deficits(kernel, z, beta), n, strict=True)]
    z -= center
    # float64 in einsum's buffers: a float64 copy of the points would be twice the pool.
    z_squared = np.einsum("cmd,cmd->cm", z, z, dtype=np.float64)
    return z, z_squared, beta, selves, list(n), list(residual), ids


def _usable(n, residual):
    return n >= 1 and np.isfinite(residual)


def build_pool(
    specs: Sequence[RKME],
    kernel: Kernel,
    *,
    ids: Sequence[str],
    n: Sequence[int],
    residual: Sequence[float],
) -> Pool:
    """A pool of these learnwares.

    Arguments:
      specs: their reduced sets, weights on the simplex.
      ids: their names, all different.
      n: the number of rows that each specification was made from (for unbiased self terms).
      residual: the squared MMD between those rows and the reduced set; an estimate of it may be
        negative, and then counts as zero.

    Raises ValueError for no learnware, lists of different length, a repeated id, n < 1, a residual
    that is not finite, a specification that `check_rkme` refuses, or different dimensions.

    >>> import numpy as np
    >>> from learnware_jax import RKME, build_pool
    >>> from learnware_jax.specification.kernels import Gaussian
    >>> specs = [RKME(np.array([[0.0], [x]]), np.array([0.5, 0.5])) for x in (1.0, 2.0)]
    >>> kernel, ids = Gaussian(1.0), ["near", "far"]
    >>> pool = build_pool(specs, kernel, ids=ids, n=[40, 40], residual=[0.0, 0.0])
    >>> pool.ids
    ('near', 'far')
    """
    if not len(specs):
        raise ValueError("build_pool: got no specification; want at least one.")
    check_rkme(specs[0], where="build_pool: the first specification")
    center = np.einsum("m,md->d", specs[0].beta, specs[0].z).astype(np.float32)
    empty = Pool(
        kernel=kernel,
        center=center,
        z=np.zeros((0, 0, len(center)), np.float32),
        z_squared=np.zeros((0, 0)),
        beta=np.zeros((0, 0)),
        self_term=np.zeros(0),
        n=np.zeros(0, np.int64),
        residual=np.zeros(0),
        ids=(),
    )
    return extend(empty, specs, ids=ids, n=n, residual=residual)


def extend(
    pool: Pool,
    specs: Sequence[RKME],
    *,
    ids: Sequence[str],
    n: Sequence[int],
    residual: Sequence[float],
) -> Pool:
    """The pool with more learnwares at its end; arguments and errors as in `build_pool`."""
    if not 0 < len(specs) == len(ids) == len(n) == len(residual):
        raise ValueError(
            f"pool: got {len(specs)} specifications, {len(ids)} ids, {len(n)} n and "
            f"{len(residual)} residuals; want one of each a learnware, and at least one learnware."
        )
    all_ids = (*pool.ids, *ids)
    if len(set(all_ids)) != len(all_ids):
        repeated = sorted({i for i in all_ids if all_ids.count(i) > 1})
        raise ValueError(f"pool: ids {repeated} occur twice; remove one of each or rename it.")
    for name, spec in zip(ids, specs, strict=True):
        check_rkme(spec, where=f"pool: {name}")
        if np.shape(spec.z)[1] != len(pool.center):
            raise ValueError(
                f"pool: {name} has dimension {np.shape(spec.z)[1]}, the others "
                f"{len(pool.center)}; embed all of them with one encoder."
            )
    bad = [name for name, *r in zip(ids, n, residual, strict=True) if not _usable(*r)]
    if bad:
        raise ValueError(f"pool: n must be at least 1 and residual finite; not so for {bad}.")
    count = len(pool.ids)
    points = max(pool.z.shape[1], *(len(spec.beta) for spec in specs))
    capacity = len(pool.z)
    if capacity < len(all_ids):
        capacity = max(2 * capacity, round_up(len(all_ids)))
    *arrays, ids = _rows(specs, n, residual, ids, pool.kernel, pool.center, points)

    def grown(old, new):
        shape = (capacity, *((points,) if old.ndim > 1 else ()), *old.shape[2:])
        out = np.zeros(shape, old.dtype)
        out[(slice(count), *(slice(s) for s in old.shape[1:]))] = old[:count]
        out[count : len(all_ids)] = new
        return out

    old = (pool.z, pool.z_squared, pool.beta, pool.self_term, pool.n, pool.residual)
    new = [grown(np.asarray(a), b) for a, b in zip(old, arrays, strict=True)]
    with jax.enable_x64(True):
        z, z_squared, beta = map(jnp.asarray, new[:3])
    return pool._replace(
        z=z,
        z_squared=z_squared,
        beta=beta,
        self_term=new[3],
        n=new[4],
        residual=new[5],
        ids=all_ids,
    )


def biased_self_terms(pool: Pool) -> Float[np.ndarray, " M"]:
    """sum_ij beta_i beta_j deficit of the embeddings as they are: `self_term` without `unbias`."""
    n = pool.n[: len(pool.ids)]
    return pool.self_term[: len(pool.ids)] * np.where(n > 1, (n - 1) / n, 1.0)


def members(pool: Pool, index: Sequence[int] | None = None) -> list[RKME]:
    """The specifications in a pool (at positions `index`, by default all), points put back."""
    index = range(len(pool.ids)) if index is None else index
    rows = np.asarray(index)
    z = np.asarray(pool.z[rows]) + pool.center
    return [RKME(*pair) for pair in zip(z, np.asarray(pool.beta[rows]), strict=True)]
