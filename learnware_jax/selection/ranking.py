"""Ranking: the distance from users to every learnware of a pool, in one jitted, chunked program."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from learnware_jax.selection.pool import Pool, self_deficits, stack
from learnware_jax.specification.kernels import matmul
from learnware_jax.specification.rkme import RKME, check_rkme, unbias

# Points and kernel values of one step: they should stay in the cache that two cores share.
_CHUNK_BYTES = 8 << 20
# Rows of users in one program: what a chunk of one learnware makes of them still fits.
_USER_ROWS = 800
# float32 sums of this many terms keep the last digit; longer ones go on in float64.
_SHORT_SUM = 4
# Dimensions of one product. Points of more, as vectors of parameters are, go through in slices,
# whose products are summed in float64: whole, no chunk fits in cache, and a digit is lost.
_SLICE = 4096


class Ranking(NamedTuple):
    """The closest learnwares of each user, closest first."""

    index: Int[np.ndarray, "q k"]  # positions in pool.ids
    distance: Float[np.ndarray, "q k"]  # unbiased squared MMD, float64


@partial(jax.jit, static_argnames="shards")
def _cross_deficits(kernel, z, z_squared, beta, users, weights, products=None, *, shards):
    """sum_ij weights_i beta_j deficit(|u_i - z_j|^2) for users (Q, K, d), pool (C, m, d).

    K is 1 or divisible by 4. One matrix product a chunk of the pool (and slice of d), then the
    kernel and its weighted sum while the chunk is in cache. Users' points are the rows: the
    products come out with the pool along the lanes. For one row `products` are given (see
    `_one_row_products`), and the whole pool is one chunk.
    A chunk is made of as many consecutive learnwares of each of the `shards` that C is divided
    into, so that every device works on its own part of every chunk and no points move.
    """
    (capacity, m, d), (q, k, _) = z.shape, users.shape
    if q * k == 1:
        width, chunk = d, capacity
    else:
        width = min(d, _SLICE)
        # A power of two that divides the capacity.
        chunk = 1 << max(_CHUNK_BYTES // (4 * m * (q * k + width)), 1).bit_length() - 1
        chunk = max(shards, min(chunk, capacity & -capacity))
    steps = capacity // chunk
    rows = users.reshape(q * k, d)
    # Squares in two float32 parts: rounded to one, they would make most of the error.
    pool = [
        a.reshape(shards, steps, chunk // shards, *a.shape[1:])
        for a in (z, *_parts(z_squared), beta)
    ]
    # Three axes: a slice of more is copied number by number.
    flat, count = z.reshape(shards, -1, d), chunk // shards * m
    rows_high, rows_low = _parts((rows.astype(jnp.float64) ** 2).sum(1)[:, None])

    def sliced(i):
        def add(total, begin):
            # The last slice is moved back to fit; what it repeats counts as zero.
            start = jnp.minimum(begin, d - width)
            points = jax.lax.dynamic_slice(flat, (0, i * count, start), (shards, count, width))
            part = jax.lax.dynamic_slice_in_dim(rows, start, width, 1)
            part = jnp.where(start + jnp.arange(width) >= begin, part, 0)
            return total + matmul(part, points.reshape(-1, width).T), None

        return jax.lax.scan(add, jnp.zeros((q * k, chunk * m)), jnp.arange(0, d, width))[0]

    def body(_, i):
        points, high, low, b = (jax.lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in pool)
        if products is None:
            cross = matmul(rows, points.reshape(-1, d).T) if d == width else sliced(i)
        else:
            cross = products.astype(jnp.float64).sum(1)[None]
        squares = rows_high.astype(cross.dtype) + high.reshape(-1)
        t = (squares - 2 * cross) + (rows_low + low.reshape(-1))
        # As in `squared_distances`: what rounding cannot tell from zero is zero.
        t = jnp.where(t > 4 * jnp.finfo(jnp.float32).eps * squares, t, 0.0)
        terms = kernel.deficit(t).reshape(q, k, -1) * weights[:, :, None]
        short = terms.reshape(q, -1, min(k, _SHORT_SUM), chunk * m).sum(2)
        sums = short.astype(jnp.float64).sum(1).reshape(q, *b.shape)
        return None, (sums * b).sum(3)

    parts = jax.lax.scan(body, None, jnp.arange(steps))[1]
    return parts.transpose(1, 2, 0, 3).reshape(q, capacity)


@jax.jit
def _one_row_products(row, points):
    """Inner products of one row with every point of a pool, (C m, 4): their sums over quarters.

    On CPUs XLA takes ten times as long for one row as for this: four of them, each zero but for
    its quarter, behind the points. Added in float64, they have a digit more, too. A program of its
    own that ends here: fused with what follows, the product would run on one core.
    """
    row, points = row.reshape(-1), points.reshape(-1, points.shape[-1])
    quarter = 4 * jnp.arange(row.size) // row.size
    quarters = jnp.where(quarter == jnp.arange(4)[:, None], row, 0)
    return matmul(points, quarters.T)


def _parts(x):
    """float64 as the sum of two float32: the nearest, and the rest."""
    high = x.astype(jnp.float32)
    return high, (x - high).astype(jnp.float32)


def _stacked(users, pool):
    for i, user in enumerate(users):
        check_rkme(user, where=f"rank: user {i}")
        if np.shape(user.z)[1] != len(pool.center):
            raise ValueError(
                f"rank: user {i} has dimension {np.shape(user.z)[1]}, the pool has "
                f"{len(pool.center)}; embed both with one encoder."
            )
    # Sizes in steps of the short sum: fewer shapes to compile, and whole sums. A user who is one
    # point, as a vector of parameters is, stays one.
    points = max(len(user.beta) for user in users)
    z, beta = stack(users, 1 if points == 1 else -(-points // _SHORT_SUM) * _SHORT_SUM)
    # Weights are rounded once, for own terms too: most of the error then cancels in a distance.
    return z, beta.astype(np.float32)


def cross_deficits(users: Sequence[RKME], pool: Pool) -> Float[np.ndarray, "q M"]:
    """<mu_u, mu_l> of every user and learnware, without the constant part of the kernel.

    sum_ij a_i b_j deficit(|u_i - z_j|^2), float64 from float32 products. Raises as `distances`.
    """
    z, beta = _stacked(users, pool)
    z = z - pool.center
    batch = max(1, _USER_ROWS // z.shape[1])
    with jax.enable_x64(True):
        cross = [
            _cross_deficits(
                pool.kernel,
                pool.z,
                pool.z_squared,
                pool.beta,
                z[i : i + batch],
                beta[i : i + batch],
                _one_row_products(z[i], pool.z) if z[i : i + batch, :, 0].size == 1 else None,
                shards=len(pool.z.sharding.device_set),
            )
            for i in range(0, len(z), batch)
        ]
    return np.concatenate(cross)[:, : len(pool.ids)]


def own_deficits(users: Sequence[RKME], pool: Pool) -> Float[np.ndarray, " q"]:
    """<mu_u, mu_u> of every user, as `cross_deficits`."""
    return self_deficits(pool.kernel, *_stacked(users, pool))


def distances(users: Sequence[RKME], pool: Pool, *, n: Sequence[int]) -> Float[np.ndarray, "q M"]:
    """Unbiased squared MMD between every user and every learnware of the pool, float64.

    Arguments:
      users: specifications (or whole samples, `from_rows`) of any sizes, weights on the simplex.
      n: rows behind each user's specification. With n = 1 the user's own term cannot be unbiased;
        it is the same for all learnwares, so their order stands.

    Never clipped or rooted: unbiased estimates are negative half the time for equal distributions.
    Raises ValueError for no user, users that `check_rkme` refuses or of another dimension than the
    pool, or another number of n than of users.
    """
    if not len(users) or len(n) != len(users):
        raise ValueError(
            f"rank: got {len(users)} users and {len(n)} n; want at least one user and one n each."
        )
    cross = cross_deficits(users, pool)
    own = [unbias(*pair) for pair in zip(own_deficits(users, pool), n, strict=True)]
    return np.asarray(own)[:, None] + pool.self_term[: len(pool.ids)] - 2 * cross


def rank(
    users: Sequence[RKME], pool: Pool, *, n: Sequence[int], top_k: int | None = None
) -> Ranking:
    """The `top_k` closest learnwares (default: all) of every user, by `distances`.

    Equal distances keep the order of the pool. ValueError also for top_k < 1.

    >>> import numpy as np
    >>> from learnware_jax import RKME, build_pool, rank
    >>> from learnware_jax.specification.kernels import Linear
    >>> specs = [RKME(np.array([[x]]), np.array([1.0])) for x in (3.0, 1.0)]
    >>> pool = build_pool(specs, Linear(), ids=["far", "near"], n=[1, 1], residual=[0.0, 0.0])
    >>> found = rank([RKME(np.array([[0.5]]), np.array([1.0]))], pool, n=[1])
    >>> [pool.ids[i] for i in found.index[0]], found.distance[0].tolist()
    (['near', 'far'], [0.25, 6.25])
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"rank: got top_k={top_k}; want at least 1.")
    distance = distances(users, pool, n=n)
    index = np.argsort(distance, axis=1, kind="stable")[:, :top_k]
    return Ranking(index, np.take_along_axis(distance, index, axis=1))
