"""Specifications of rows that arrive in pieces, of parts, and of what does not fit memory.

A `Stream` is what has to be remembered of all rows so far: their number, their mean, their mean
embedding at some anchors, and a uniform sample of them. Its size does not depend on the number of
rows. The rows of the sample get calibrated weights (Deville and Sarndal, JASA 87, 1992): those
nearest to equal ones under which the mean and the embedding at the anchors are those of all rows.
The weighted sample is then compressed as any other (`reduce`).

The sample is the rows with the least of independent random priorities, which follow from the key
and a row's place. So it does not depend on the pieces, and the samples of two streams merge into
one of both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Float, PRNGKeyArray, Real, UInt32, UInt64

from learnware_jax.specification.kernels import Kernel, squared_distances, to_dict
from learnware_jax.specification.reduce import (
    FIT_ROWS,
    RESIDUAL_ROWS,
    Reduced,
    mean_deficits,
    reduce,
)
from learnware_jax.specification.rkme import (
    RKME,
    check_rkme,
    check_rows,
    from_rows,
    self_deficit,
    unbias,
)

# Rows are worked off in blocks of so many, wherever pieces begin: so sums are the same to the bit,
# and a row that comes alone does not cost a pass of its own.
_BLOCK = 16384
# As a share of the mean variance of what is calibrated: rounding in float32 is less, and must not
# be followed.
_RIDGE = 1e-7


class Stream(NamedTuple):
    """What is kept of the rows so far. It holds real rows: treat it as the data themselves."""

    seed: UInt32[np.ndarray, " s"]  # the key; with a row's place it gives the row's priority
    kernel: Kernel
    anchors: Float[np.ndarray, "j d"]
    capacity: int
    n: int  # rows so far, with those that are pending
    total: Float[np.ndarray, " d"]  # float64: sum of all rows but pending ones
    sums: Float[np.ndarray, " j"]  # float64: of deficit(|anchor - x|^2) over the same rows
    rows: Float[np.ndarray, "r d"]  # the sample, in order of arrival; r <= capacity
    priorities: UInt64[np.ndarray, " r"]
    pending: Float[np.ndarray, "p d"]  # the newest rows, less than a block of them


def start(
    key: PRNGKeyArray,
    anchors: Real[ArrayLike, "j d"],
    kernel: Kernel,
    *,
    capacity: int = FIT_ROWS,
) -> Stream:
    """A stream of no rows.

    Arguments:
      key: fixes which rows are kept. Streams that shall be merged need different ones, such as
        `jax.random.fold_in(key, part)`.
      anchors: points at which the mean embedding of all rows is kept, such as 256 of the first
        rows, or of all; the same for streams that shall be merged. They leave with nothing that is
        published.
      kernel: that of the specification.
      capacity: rows in the sample; by default as many as one-shot compression fits points to.

    ValueError or TypeError for bad anchors, or a capacity that is less than four times the number
    of things to agree on (anchors and columns): weights would follow noise.
    """
    anchors = np.asarray(check_rows(anchors, where="start: anchors"), np.float32)
    least = 4 * sum(anchors.shape)
    if capacity < least:
        raise ValueError(
            f"start: got capacity={capacity} for {anchors.shape[0]} anchors of dimension "
            f"{anchors.shape[1]}; want at least {least}, four times both. Keep more rows, or give "
            "fewer anchors."
        )
    j, d = anchors.shape
    return Stream(
        seed=np.asarray(jax.random.key_data(key)),
        kernel=kernel,
        anchors=anchors,
        capacity=capacity,
        n=0,
        total=np.zeros(d),
        sums=np.zeros(j),
        rows=np.zeros((0, d), np.float32),
        priorities=np.zeros(0, np.uint64),
        pending=np.zeros((0, d), np.float32),
    )


def update(stream: Stream, x: Real[ArrayLike, "n d"]) -> Stream:
    """The stream after the rows x; how they are cut into calls makes no difference, to the bit.

    ValueError or TypeError for rows of another dimension, none, or such as are not finite.
    """
    x = check_rows(x, where="update")
    if x.shape[1] != stream.anchors.shape[1]:
        raise ValueError(
            f"update: got rows of dimension {x.shape[1]}, the stream has {stream.anchors.shape[1]};"
            " embed all of them with one encoder."
        )
    done = 0
    while len(stream.pending) + len(x) - done >= _BLOCK:
        taken = done + _BLOCK - len(stream.pending)
        stream = _settle(_append(stream, x[done:taken]))
        done = taken
    return _append(stream, x[done:])


def merge(a: Stream, b: Stream) -> Stream:
    """The stream of the rows of both, those of a first; more rows may follow.

    ValueError if the two have different kernels, anchors or capacities, or one key: their samples
    would not be independent.
    """
    for field, differ in (
        ("kernel", to_dict(a.kernel) != to_dict(b.kernel)),
        ("anchors", not np.array_equal(a.anchors, b.anchors)),
        ("capacity", a.capacity != b.capacity),
    ):
        if differ:
            raise ValueError(
                f"merge: the streams have different {field}; start all parts with the same. What "
                "was streamed otherwise can be finished, with four times the points, and merged by "
                "merge_reduced."
            )
    if np.array_equal(a.seed, b.seed):
        raise ValueError(
            "merge: both streams were started with one key, so their samples are not independent; "
            "start each with its own, as jax.random.fold_in(key, part)."
        )
    a, b = _settle(a), _settle(b)
    priorities, rows = _least(
        np.concatenate([a.priorities, b.priorities]),
        np.concatenate([a.rows, b.rows]),
        a.capacity,
    )
    return a._replace(
        n=a.n + b.n,
        total=a.total + b.total,
        sums=a.sums + b.sums,
        rows=rows,
        priorities=priorities,
    )


def mean_of(stream: Stream) -> Float[np.ndarray, " d"]:
    """The mean of all rows so far, in float64. ValueError if there are none."""
    stream = _settle(_not_empty(stream, where="mean_of"))
    return stream.total / stream.n


def sample_of(stream: Stream) -> RKME:
    """The rows that are kept, and their weights (float64, on the simplex): an RKME of all rows.

    Up to `capacity` rows all are kept, and weigh the same. ValueError if there are none.
    """
    stream = _settle(_not_empty(stream, where="sample_of"))
    rows, count = stream.rows, len(stream.rows)
    if stream.n == count:
        return RKME(rows, np.full(count, 1 / count))
    # (1 + features . slope) / count, by least squares around equal weights. Features are centred
    # before the products, as numbers far from zero would cancel.
    deficits = np.asarray(_deficits(stream.kernel, stream.anchors, rows))
    features = np.concatenate([deficits.T, rows], axis=1).astype(np.float64)
    mean = features.mean(0)
    features -= mean
    gap = np.concatenate([stream.sums, stream.total]) / stream.n - mean
    covariance = features.T @ features / count
    ridge = _RIDGE * np.trace(covariance) / len(gap) + np.finfo(float).tiny
    slope = np.linalg.solve(covariance + ridge * np.eye(len(gap)), gap)
    # A few of many thousands come out below zero; the simplex is what everything else expects.
    weights = np.maximum(1 + features @ slope, 0)
    return RKME(rows, weights / weights.sum())


def finish(key: PRNGKeyArray, stream: Stream, m: int, **options) -> Reduced:
    """A reduced set of at most m points of all rows so far; the stream may go on.

    Options and errors are those of `reduce`, and up to `capacity` rows so is the result, to the
    bit. Beyond, points and weights are fitted to `sample_of(stream)`, and the residual is an
    estimate of the squared MMD to all n rows; by fitting to the sample it is a few per cent too
    small. ValueError if there are no rows.
    """
    stream = _settle(_not_empty(stream, where="finish"))
    rows, weights = sample_of(stream)
    if stream.n == len(rows):
        return reduce(key, rows, m, stream.kernel, **options)
    reduced = reduce(key, rows, m, stream.kernel, weights=weights, **options)
    return reduced._replace(n=stream.n, residual=_residual(stream, reduced.spec))


def merge_reduced(
    key: PRNGKeyArray,
    specs: Sequence[RKME],
    m: int,
    kernel: Kernel,
    *,
    n: Sequence[int],
    residual: Sequence[float],
    **options,
) -> Reduced:
    """A reduced set of at most m points out of those of parts, without any of their rows.

    Arguments:
      specs: one a part, with weights on the simplex, made with this kernel.
      n, residual: of each part, the number of its rows and the squared MMD to them (as in `Reduced`
        and in headers); a part counts as many times as it has rows.
      options: those of `reduce`.

    The `residual` of the result is a bound for the squared MMD to all rows, not an estimate: the
    distance to the union of the parts, and the root mean square of theirs, added (triangle
    inequality). Raises ValueError or TypeError for lists of different length or none, n < 1, a
    residual that is not finite, specifications that are unsound or of different dimension.
    """
    if not 0 < len(specs) == len(n) == len(residual):
        raise ValueError(
            f"merge_reduced: got {len(specs)} specifications, {len(n)} n and {len(residual)} "
            "residuals; want one of each a part."
        )
    for i, spec in enumerate(specs):
        check_rkme(spec, where=f"merge_reduced: part {i}")
        if n[i] < 1 or not np.isfinite(residual[i]):
            raise ValueError(
                f"merge_reduced: part {i} has n={n[i]} and residual={residual[i]}; want at least "
                "one row and a finite number."
            )
    dimensions = sorted({np.shape(spec.z)[1] for spec in specs})
    if len(dimensions) > 1:
        raise ValueError(
            f"merge_reduced: the parts have dimensions {dimensions}; embed all of them with one "
            "encoder."
        )
    shares = np.array(n, np.float64) / sum(n)
    z = np.concatenate([np.asarray(spec.z) for spec in specs])
    weights = np.concatenate([s * np.asarray(p.beta) for s, p in zip(shares, specs, strict=True)])
    reduced = reduce(key, z, m, kernel, weights=weights, **options)
    parts = shares @ np.maximum(residual, 0)
    bound = (np.sqrt(max(reduced.residual, 0)) + np.sqrt(parts)) ** 2
    return reduced._replace(n=sum(n), residual=float(bound))


@jax.jit
def _deficits(kernel, anchors, rows):
    return kernel.deficit(squared_distances(anchors, rows, anchors.mean(0)))


def _not_empty(stream, *, where):
    if stream.n < 1:
        raise ValueError(f"{where}: the stream has no rows yet; update it with some.")
    return stream


def _append(stream, x):
    return stream._replace(
        n=stream.n + len(x),
        pending=np.concatenate([stream.pending, np.asarray(x, np.float32)]),
    )


def _settle(stream):
    """The stream with its pending rows in the sums and in the sample."""
    block = stream.pending
    if not len(block):
        return stream
    with jax.enable_x64(True):
        sums = mean_deficits(stream.kernel, stream.anchors, block, np.ones(len(block)))
    # One draw a row, at the row's place.
    draws = np.random.PCG64(np.random.SeedSequence(stream.seed.tolist()))
    draws.advance(stream.n - len(block))
    priorities, rows = _least(
        np.concatenate([stream.priorities, draws.random_raw(len(block))]),
        np.concatenate([stream.rows, block]),
        stream.capacity,
    )
    return stream._replace(
        total=stream.total + block.sum(0, dtype=np.float64),
        sums=stream.sums + sums,
        rows=rows,
        priorities=priorities,
        pending=block[:0],
    )


def _least(priorities, rows, count):
    """The `count` rows of least priority, in their order, with their priorities."""
    if len(rows) > count:
        kept = np.sort(np.argpartition(priorities, count)[:count])
        priorities, rows = priorities[kept], rows[kept]
    return priorities, rows


def _residual(stream, spec):
    """The squared MMD between all n rows and `spec`, estimated from the sample.

    A U-statistic with equal weights: it takes off the noise of a uniform sample, of which
    calibrated weights have less. That `spec` was fitted to the same rows makes it a little too
    small, as it follows what noise calibration leaves.
    """
    _, rows = _least(stream.priorities, stream.rows, RESIDUAL_ROWS)
    with jax.enable_x64(True):
        own = float(self_deficit(spec, stream.kernel))
        pairs = unbias(float(self_deficit(from_rows(rows), stream.kernel)), len(rows))
        cross = spec.beta @ mean_deficits(stream.kernel, spec.z, rows)
    # Pairs of two rows, and of a row with itself.
    distinct, same = pairs - 2 * cross + own, own - 2 * cross
    return float((1 - 1 / stream.n) * distinct + same / stream.n)
