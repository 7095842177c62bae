"""From a ranking to a decision: which learnware a user should take, or none of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from learnware_jax.selection.interval import intervals, undominated
from learnware_jax.selection.pool import Pool, members
from learnware_jax.selection.ranking import distances, rank
from learnware_jax.specification.rkme import RKME

NONE_FITS = "none"


class Selection(NamedTuple):
    """One user's ranking, how sure it is, and what follows from it."""

    ids: tuple[str, ...]  # closest first
    distance: Float[np.ndarray, " k"]  # unbiased squared MMD
    lower: Float[np.ndarray, " k"]
    upper: Float[np.ndarray, " k"]
    undominated: tuple[str, ...]  # may be the closest; the first is one of them
    decision: str  # an id, or "none": use the base model


def select(
    user: RKME,
    pool: Pool,
    *,
    n: int,
    residual: float,
    threshold: float,
    top_k: int | None = None,
    level: float = 0.9,
) -> Selection:
    """Rank the pool for one user and decide.

    The decision is the closest learnware, or "none" when even that one is further than `threshold`
    (from `calibrate_threshold`). Other arguments and errors as in `rank` and `intervals`.

    >>> import jax
    >>> import numpy as np
    >>> from learnware_jax import build_pool, reduce, select
    >>> from learnware_jax.specification.kernels import Gaussian
    >>> rng = np.random.default_rng(0)
    >>> kernel = Gaussian(0.1)
    >>> low, high, mine = (
    ...     reduce(jax.random.key(0), rng.normal(center, 1, (50, 2)), 10, kernel)
    ...     for center in (-2, 2, 2)
    ... )
    >>> pool = build_pool(
    ...     [low.spec, high.spec],
    ...     kernel,
    ...     ids=["low", "high"],
    ...     n=[low.n, high.n],
    ...     residual=[low.residual, high.residual],
    ... )
    >>> found = select(mine.spec, pool, n=mine.n, residual=mine.residual, threshold=0.1)
    >>> found.decision, found.undominated, bool(found.upper[0] < found.lower[1])
    ('high', ('high',), True)
    """
    ranking = rank([user], pool, n=[n], top_k=top_k)
    index, distance = ranking.index[0], ranking.distance[0]
    lower, upper = intervals(user, pool, distance, index, n=n, residual=residual, level=level)
    alike = undominated(user, pool, distance, index, n=n, level=level)
    ids = tuple(pool.ids[i] for i in index)
    return Selection(
        ids=ids,
        distance=distance,
        lower=lower,
        upper=upper,
        undominated=tuple(i for i, keep in zip(ids, alike, strict=True) if keep),
        decision=ids[0] if distance[0] <= threshold else NONE_FITS,
    )


def calibrate_threshold(nearest: Float[np.ndarray, " t"], *, false_acceptance: float) -> float:
    """The distance within which a user is served, at a stated rate of false acceptance.

    `nearest` holds, for each of t held-out tasks that no learnware of the pool fits, the distance
    to the closest learnware. The result is their k-th smallest, k = floor((t + 1) rate): a further
    such task, exchangeable with these, comes within it with probability at most `false_acceptance`
    (split conformal prediction; Vovk et al. 2005). With k = 0 nothing is ever served: -infinity.
    ValueError for no tasks, distances that are not finite, or a rate outside (0, 1).
    """
    nearest = np.sort(np.asarray(nearest, np.float64))
    if not 0 < false_acceptance < 1 or not nearest.size or not np.isfinite(nearest).all():
        raise ValueError(
            f"calibrate_threshold: got {nearest.size} distances and rate {false_acceptance}; want "
            "at least one distance, all finite, and a rate between 0 and 1."
        )
    # The small slack keeps (t + 1) rate = 3 from becoming 2.999....
    k = int((len(nearest) + 1) * false_acceptance + 1e-9)
    return float(nearest[k - 1]) if k else -np.inf


def held_out_distances(pool: Pool, groups: Sequence[str]) -> Float[np.ndarray, " M"]:
    """For each learnware, the unbiased squared MMD to the closest one of another group.

    With domains as groups, every learnware plays a user whose domain the pool has not: a dock
    calibrates its own threshold from these (`calibrate_threshold`). A stated rate then supposes
    that further domains are exchangeable with the pool's, and that tasks of one domain are no more
    alike than others; and a user has one domain more to be close to than a learnware left out. It
    holds roughly, not exactly. ValueError unless there is one group a learnware, and at least two
    groups.
    """
    named = np.asarray(groups)
    if len(groups) != len(pool.ids) or len(set(groups)) < 2:
        raise ValueError(
            f"held_out_distances: got {len(groups)} groups, {len(set(groups))} of them different, "
            f"for {len(pool.ids)} learnwares; want one each, and at least two different."
        )
    distance = distances(members(pool), pool, n=pool.n[: len(pool.ids)].tolist())
    return np.where(named[:, None] != named, distance, np.inf).min(1)
