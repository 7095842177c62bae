"""Two-stage ranking of large pools: bounds from sketches for all, exact distances for few.

The first stage reads one short code a learnware and bounds its distance from below. The closest by
these are measured; whatever has a lower bound beyond the k-th of them cannot be among the first k,
and the rest is measured too: the top k is then the exact one, and says so (the filter-and-refine
search of Seidl and Kriegel, SIGMOD 1998, with the bounds of `specification.sketch.project`).

The codes are divided over a mesh of devices, of one host or of several, and specifications are read
by the host that holds them. The order of a ranking is settled in float64, learnware by learnware,
so that it does not depend on how many devices there are.
"""

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from learnware_jax.selection.pool import round_up, self_deficits, stack
from learnware_jax.specification.kernels import Kernel, matmul, squared_distances
from learnware_jax.specification.rkme import RKME, check_rkme, unbias
from learnware_jax.specification.sketch import round_up_float32

AXIS = "pool"
# Learnwares of one matrix product of the first stage: their codes, widened, stay in cache.
_BLOCK = 4096
# Users who share a first stage: it keeps a number for each of them and every learnware.
_USERS = 8
# Bytes of points that are measured in one program.
_BYTES = 64 << 20
_FLOAT32 = np.finfo(np.float32)


class Sketches(NamedTuple):
    """What the first stage reads of up to C learnwares, divided over a mesh along C."""

    code: Array  # (C, s)
    scale: Float[Array, " C"]
    error: Float[Array, " C"]
    rest: Float[Array, " C"] | None  # None where sketches estimate distances and bound none
    shift: Float[Array, " C"]  # unbiased less biased self term; infinite where no learnware is


class Specifications(NamedTuple):
    """What the second stage reads of M learnwares; arrays may be memory-mapped."""

    kernel: Kernel
    z: Float[np.ndarray, "M m d"]  # float32
    beta: Float[np.ndarray, "M m"]  # float64, on the simplex
    self_term: Float[np.ndarray, " M"]  # float64, unbiased


class Found(NamedTuple):
    """The closest learnwares of every user, closest first."""

    index: Int[np.ndarray, "q k"]
    distance: Float[np.ndarray, "q k"]  # unbiased squared MMD, float64
    measured: Int[np.ndarray, " q"]  # how many learnwares were measured
    certified: Bool[np.ndarray, " q"]  # whether no other learnware can be closer


def pool_mesh(
    # jax names its class by an assignment.
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh of these devices (default: all, of every process), for `place`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )


def capacity_of(count: int, devices: int) -> int:
    """Rows that `place` makes of `count` learnwares: at most 1/8 more, or 16 a device."""
    return round_up(-(-count // devices)) * devices


def place(
    mesh: Mesh,
    code: np.ndarray,
    scale: np.ndarray,
    error: np.ndarray,
    rest: np.ndarray | None,
    shift: np.ndarray,
) -> Sketches:
    """The sketches of M learnwares on the devices of a mesh; each process reads its own rows only.

    Arguments are as in `Sketches`, (M, ...) arrays that may be memory-mapped. Positions in rankings
    are rows of these. An infinite shift takes a learnware out.
    """
    count, capacity = len(code), capacity_of(len(code), mesh.size)

    def put(array, dtype, fill):
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))

        def part(index):
            begin, end, _ = index[0].indices(capacity)
            found = np.full((end - begin, *array.shape[1:]), fill, dtype)
            found[: max(0, min(end, count) - begin)] = array[begin : min(end, count)]
            return found

        return jax.make_array_from_callback((capacity, *array.shape[1:]), sharding, part)

    return Sketches(
        put(code, code.dtype, 0),
        put(scale, np.float32, 0),
        put(error, np.float32, 0),
        None if rest is None else put(rest, np.float32, 0),
        put(-round_up_float32(-np.asarray(shift)), np.float32, np.inf),
    )


@partial(jax.jit, donate_argnums=0)
def put_row(sketches: Sketches, row: Int[Array, ""], learnware: Sketches) -> Sketches:
    """Sketches with those of one learnware, (1, ...) arrays, at position `row`, in place.

    While positions are left (see `capacity_of`), a learnware joins without a compilation.
    """

    def put(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, 0)

    return jax.tree.map(put, sketches, learnware)


def _bounds(sketches, users, rests, first):
    """Lower bounds (q, C) of one device, and its `first` closest by estimate."""
    code, scale, error, rest, shift = sketches
    count = len(code)
    block = min(_BLOCK, count & -count)
    user_squares = (users * users).sum(1)[:, None]

    def body(_, i):
        c, s, e, o = (
            jax.lax.dynamic_slice_in_dim(a, i * block, block) for a in (code, scale, error, shift)
        )
        c = c.astype(jnp.float32)
        cross = matmul(users, c.T) * s
        squares = user_squares + (c * c).sum(1) * s * s
        square = jnp.maximum(squares - 2 * cross, 0)
        if rest is None:
            return None, square + o
        r = jax.lax.dynamic_slice_in_dim(rest, i * block, block)
        near = jnp.maximum(jnp.sqrt(square) - e, 0)
        # The most that rounding can add: sums of s products, each off by a share of these squares.
        squares = squares + r * r + (rests * rests)[:, None]
        slack = (c.shape[1] + 16) * (_FLOAT32.eps * squares + _FLOAT32.tiny)
        return None, near**2 + (r - rests[:, None]) ** 2 - slack + o

    parts = jax.lax.scan(body, None, jnp.arange(count // block))[1]
    lower = parts.transpose(1, 0, 2).reshape(len(users), count)
    # Rests of different learnwares are nearly orthogonal: a guess, where the bound must be sure.
    guess = lower if rest is None else lower + 2 * rest * rests[:, None]
    return lower, _closest(guess, first)


def _closest(values, count):
    """Positions of the `count` smallest values over all devices, and these, the smallest first."""
    local = min(count, values.shape[1])
    found, index = jax.lax.top_k(-values, local)
    index = index + jax.lax.axis_index(AXIS) * values.shape[1]
    found, index = (
        jax.lax.all_gather(a, AXIS, axis=1, tiled=True) for a in (found, index.astype(jnp.int32))
    )
    found, order = jax.lax.top_k(found, count)
    return jnp.take_along_axis(index, order, 1), -found


def _sharded(mesh, function, in_specs, out_specs):
    # A gathered top k is the same on all devices, which the check of replication cannot see.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def shortlist(
    sketches: Sketches,
    coordinates: Float[np.ndarray, "q s"],
    rest: Float[np.ndarray, " q"] | None,
    *,
    count: int,
) -> tuple[Float[Array, "q C"], Int[Array, "q count"], Float[Array, "q count"]]:
    """The first stage for a few users: every learnware's lower bound, and the closest by estimate.

    Returns lower bounds on squared MMD plus `shift` (estimates, where sketches bound nothing) that
    stay divided over the devices, and positions and estimates of the `count` closest. ValueError
    for a count beyond the capacity C.
    """
    if not 0 < count <= len(sketches.code):
        raise ValueError(f"shortlist: got count={count}; want 1 to {len(sketches.code)}.")
    mesh = sketches.code.sharding.mesh
    short = np.zeros(len(coordinates)) if rest is None else rest
    stage = np.asarray(coordinates, np.float32), np.asarray(short, np.float32)
    lower, (index, guess) = _first_stage(sketches, *stage, mesh=mesh, first=count)
    return lower, index, guess


@partial(jax.jit, static_argnames=("mesh", "first"))
def _first_stage(sketches, users, rests, *, mesh, first):
    rows, columns = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
    everywhere = PartitionSpec()
    function = partial(_bounds, first=first)
    specs = (rows, everywhere, everywhere), (columns, (everywhere, everywhere))
    return _sharded(mesh, function, *specs)(sketches, users, rests)


@partial(jax.jit, static_argnames="mesh")
def _count_below(lower, limits, *, mesh):
    def count(lower, limits):
        return jax.lax.psum((lower <= limits[:, None]).sum(1), AXIS)

    specs = (PartitionSpec(None, AXIS), PartitionSpec()), PartitionSpec()
    return _sharded(mesh, count, *specs)(lower, limits)


@partial(jax.jit, static_argnames=("mesh", "count"))
def _smallest(lower, *, mesh, count):
    function = partial(_closest, count=count)
    specs = (PartitionSpec(None, AXIS),), (PartitionSpec(), PartitionSpec())
    return _sharded(mesh, function, *specs)(lower)[0]


@jax.jit
def _cross32(kernel, user, weights, z, beta):
    """Bounds for <mu_u, mu_l> of one user and learnwares (c, m, d), in deficits: (2, c).

    From one float32 product. A distance is off by at most a share of its squares, deficits fall
    with the distance, and a sum is off by at most a share of itself.
    """
    k, d = user.shape
    center, rows = (weights @ user).astype(jnp.float32), z.reshape(-1, d)
    user, rows = user - center, rows - center
    squares = (user * user).sum(1)[:, None] + (rows * rows).sum(1)
    t = squares - 2 * matmul(user, rows.T)
    off = (d + 16) * (_FLOAT32.eps * squares + _FLOAT32.tiny)
    far, near = (jnp.maximum(t + sign * off, 0) for sign in (1, -1))
    values = jnp.stack([weights.astype(jnp.float32) @ kernel.deficit(a) for a in (far, near)])
    cross = (values.reshape(2, *beta.shape) * beta).sum(2)
    share = (k + 16) * _FLOAT32.eps
    return cross * jnp.array([[1 + share], [1 - share]])  # deficits are negative


@jax.jit
def _cross64(kernel, user, weights, z, beta):
    """<mu_u, mu_l> in float64, one learnware after another: a number depends on no other. (1, c)"""
    user, weights = user.astype(jnp.float64), weights.astype(jnp.float64)

    def one(learnware):
        z, beta = learnware
        deficits = kernel.deficit(squared_distances(z.astype(jnp.float64), user))
        return beta @ deficits @ weights

    return jax.lax.map(one, (z, beta))[None]


class _User(NamedTuple):
    z: np.ndarray
    beta: np.ndarray
    shift: float  # unbiased less biased self term
    self_term: float  # unbiased


def search(
    users: Sequence[RKME],
    coordinates: Float[np.ndarray, "q s"],
    rest: Float[np.ndarray, " q"] | None,
    sketches: Sketches,
    specifications: Specifications,
    *,
    n: Sequence[int],
    top_k: int,
    most: int | None = None,
) -> Found:
    """The `top_k` closest learnwares of every user, by unbiased squared MMD.

    Arguments:
      users: specifications, as for `ranking.distances`; n: rows behind each of them.
      coordinates, rest: their sketches, made like those of the learnwares (see `project`); `rest`
        is None where `sketches.rest` is: such sketches estimate distances and bound none.
      sketches: of all learnwares, from `place`. Every host of a mesh calls with the same users;
        where they differ in a bit, those of process 0 count.
      specifications: of the same learnwares in the same order; each host reads points and weights
        of those rows alone whose sketches its devices hold.
      most: at most so many learnwares are measured for a user (default: as many as it takes).
        Without bounds, it is how many: those with the closest sketches.

    A certified ranking is the one that float64 distances to all learnwares give; it is certified
    unless `most` cut it short or there are no bounds. (What float64 cannot resolve in `rest`, about
    1e-9 of own terms, is beyond it.) Equal distances keep the order of the pool.
    There are fewer than `top_k` where there are fewer learnwares. Weights are made to sum to one.

    Raises ValueError for no user, users that `check_rkme` refuses or of another dimension than the
    learnwares, arguments whose shapes do not match (on several hosts: or differ between them),
    n < 1, top_k < 1, most < top_k, no learnware, or neither bounds nor `most`.
    """
    _check(users, coordinates, rest, sketches, specifications, n, top_k, most)
    size = max(len(user.beta) for user in users)
    z, beta = stack(users, 1 if size == 1 else -(-size // 4) * 4)
    beta /= beta.sum(1, keepdims=True)
    biased = self_deficits(specifications.kernel, z, beta)
    z, beta, biased, coordinates, rest, n = _agree(
        (z, beta, biased, coordinates, rest, np.array(n)), specifications
    )
    unbiased = np.array([unbias(*pair) for pair in zip(biased, n.tolist(), strict=True)])
    each = [_User(*user) for user in zip(z, beta, unbiased - biased, unbiased, strict=True)]
    found = []
    for i in range(0, len(each), _USERS):
        some = slice(i, i + _USERS)
        stage = coordinates[some], None if rest is None else rest[some]
        found += _search(each[some], stage, sketches, specifications, top_k, most)
    return Found(*map(np.stack, zip(*found, strict=True)))


def _check(users, coordinates, rest, sketches, specifications, n, top_k, most):
    if not 0 < len(users) == len(n) == len(coordinates):
        raise ValueError(
            f"search: got {len(users)} users, {len(n)} n and {len(coordinates)} rows of "
            "coordinates; want at least one user, and one of each a user."
        )
    dimension, width = np.shape(specifications.z)[2], sketches.code.shape[1]
    for i, user in enumerate(users):
        check_rkme(user, where=f"search: user {i}")
        if np.shape(user.z)[1] != dimension:
            raise ValueError(
                f"search: user {i} has dimension {np.shape(user.z)[1]}, the learnwares "
                f"{dimension}; embed both with one encoder."
            )
    if min(n) < 1:
        raise ValueError(f"search: got n={list(n)}; want at least one row behind every user.")
    if rest is not None and np.shape(rest) != (len(users),):
        raise ValueError(
            f"search: got rest of shape {np.shape(rest)} for {len(users)} users; want one number a "
            "user."
        )
    counts = [np.shape(a)[0] for a in specifications[1:]]
    if len(set(counts)) > 1 or counts[0] > len(sketches.code):
        raise ValueError(
            f"search: got specifications with {counts} rows of z, beta and self_term, and sketches "
            f"of up to {len(sketches.code)}; want the same learnwares in all of them."
        )
    if np.shape(coordinates)[1] != width or (rest is None) != (sketches.rest is None):
        raise ValueError(
            f"search: users have {np.shape(coordinates)[1]} coordinates and "
            f"{'no' if rest is None else 'a'} rest, the learnwares {width} and "
            f"{'no' if sketches.rest is None else 'a'} rest; sketch both in the same way."
        )
    if top_k < 1 or (most is not None and most < top_k):
        raise ValueError(f"search: got top_k={top_k}, most={most}; want 1 <= top_k <= most.")
    if rest is None and most is None:
        raise ValueError(
            "search: these sketches bound no distance; say by `most` how many to measure."
        )


def _agree(arrays, specifications) -> Any:
    """The arrays of process 0 in every process: one bit that differs, and they would part ways."""
    if jax.process_count() == 1:
        return arrays
    arrays = [None if a is None else np.ascontiguousarray(a) for a in arrays]
    shapes = str([None if a is None else (a.shape, a.dtype.str) for a in arrays])
    what = zlib.crc32(f"{shapes} {np.shape(specifications.z)}".encode())
    everyone = multihost_utils.process_allgather(np.array([what], np.uint32))
    if len(set(np.ravel(everyone).tolist())) > 1:
        raise ValueError(
            "search: processes have users of different sizes, or pools; give all of them the same "
            f"files (here users are {shapes}, the pool {np.shape(specifications.z)})."
        )
    # As integers: float64 would be rounded on its way.
    given = [a for a in arrays if a is not None]
    bits = iter(multihost_utils.broadcast_one_to_all([a.view(np.uint32) for a in given]))
    return [None if a is None else np.array(next(bits)).view(a.dtype) for a in arrays]


def _search(users, stage, sketches, specifications, top_k, most):
    """(index, distance, measured, certified) of each of a few users."""
    mesh, capacity = sketches.code.sharding.mesh, len(sketches.code)
    measure = partial(_distances, specifications, mesh, capacity // mesh.size)
    bounded = sketches.rest is not None
    most = min(most or capacity, capacity)
    first = min(-(-top_k // 16) * 16, most) if bounded else most
    lower, candidates, guess = shortlist(sketches, *stage, count=first)
    there = int(np.isfinite(np.asarray(guess)[0]).sum())  # fewer than `first` in a small pool
    if not there:
        raise ValueError("search: the pool has no learnware; add some, or rank another pool.")
    top_k, candidates = min(top_k, there), np.asarray(candidates)[:, :there]
    near = [measure(_cross32, *pair) for pair in zip(users, candidates, strict=True)]
    counts, others = np.full(len(users), there), candidates
    if bounded:
        limits = [
            _kth(distance, top_k) - user.shift for user, distance in zip(users, near, strict=True)
        ]
        counts = np.asarray(_count_below(lower, round_up_float32(np.array(limits)), mesh=mesh))
        width = min(1 << (min(int(counts.max()), most) - 1).bit_length(), capacity)
        others = np.asarray(_smallest(lower, mesh=mesh, count=width))
    results = []
    for i, user in enumerate(users):
        rows = others[i, : counts[i]]
        new = rows[~np.isin(rows, candidates[i])]
        certified = bounded and len(rows) == counts[i] and len(new) + there <= most
        new = np.sort(new[: most - there])
        rows = np.concatenate([candidates[i], new])
        distance = np.concatenate([near[i], measure(_cross32, user, new)], 1)
        finalists = np.sort(rows[distance[0] <= _kth(distance, top_k)])
        (distance,) = measure(_cross64, user, finalists)
        order = np.argsort(distance, kind="stable")[:top_k]
        results.append((finalists[order], distance[order], len(rows), certified))
    return results


def _kth(bounds, k):
    """A number that the k-th smallest distance is not above, from (lower, upper) bounds."""
    return np.partition(bounds[1], k - 1)[k - 1]


def _distances(specifications, mesh, part, program, user, rows):
    """Distances from a user to the learnwares at `rows`, each by the process that holds it.

    (2, c) lower and upper bounds, or (1, c), by `program`. `part` is how many rows a device holds.
    """
    kernel, z, beta, self_term = specifications
    owners = np.array([device.process_index for device in mesh.devices.flat])[rows // part]
    mine = np.flatnonzero(owners == jax.process_index())
    found = np.full((1 if program is _cross64 else 2, len(rows)), np.inf)
    m, d = np.shape(z)[1:]
    together = 1 << max(1, _BYTES // (4 * m * max(d, len(user.z)))).bit_length() - 1
    with jax.enable_x64(True):
        for start in range(0, len(mine), together):
            piece = mine[start : start + together]
            # Few shapes are compiled: what is missing is filled up by repetition.
            chosen = rows[np.resize(piece, min(together, round_up(len(piece))))]
            weights = np.asarray(beta[chosen])
            weights = weights / weights.sum(1, keepdims=True)
            cross = np.asarray(program(kernel, user.z, user.beta, z[chosen], weights))
            own = user.self_term + self_term[rows[piece]]
            # The greatest product is the least distance.
            found[:, piece] = own - 2 * cross[::-1, : len(piece)]
    return found if jax.process_count() == 1 else _least(found)


def _least(values):
    """The elementwise minimum over processes."""
    size = 1 << max(4, (values.shape[1] - 1).bit_length())
    padded = np.pad(values, ((0, 0), (0, size - values.shape[1])))
    everyone = multihost_utils.process_allgather(padded.view(np.uint32))
    return np.ascontiguousarray(everyone).view(np.float64).min(0)[:, : values.shape[1]]
