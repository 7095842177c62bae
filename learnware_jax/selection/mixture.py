"""Users whose task is a mixture of several learnwares' tasks (the instance-recurrent case).

Reference: Wu, Xu, Liu and Zhou, arXiv 2001.07135.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from learnware_jax.selection.pool import Pool, biased_self_terms, members, round_up
from learnware_jax.selection.ranking import cross_deficits, own_deficits
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.simplex import solve_simplex


class Mixture(NamedTuple):
    """A convex combination of learnwares' embeddings that is close to a user's."""

    ids: tuple[str, ...]  # heaviest first
    weights: Float[np.ndarray, " k"]  # positive, sum to one
    squared_mmd: float  # between the mixture and the user's specification, biased
    gap: float  # certified excess of squared_mmd / 2 over its minimum for these learnwares


def _gram_rows(pool: Pool, index: Sequence[int]) -> Float[np.ndarray, "k M"]:
    """<mu_i, mu_j> of learnwares i in `index` and all j, with one for what the deficits lack.

    For the linear kernel that is exact on unit rows only, but on the simplex any constant cancels.
    """
    return 1 + cross_deficits(members(pool, index), pool)


def _among(pool: Pool, index: list[int]) -> Pool:
    # The first fills the capacity up, without an id.
    spare = round_up(len(index)) - len(index)
    rows = np.array(index + index[:1] * spare)
    fields = ("z", "z_squared", "beta", "self_term", "n", "residual")
    kept = {name: getattr(pool, name)[rows] for name in fields}
    return pool._replace(**kept, ids=tuple(pool.ids[i] for i in index))


def _mixture(pool, index, gram, c, own) -> Mixture:
    solution = solve_simplex((gram + gram.T) / 2, c)
    weights = np.asarray(solution.beta)
    order = [i for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
    return Mixture(
        ids=tuple(pool.ids[index[i]] for i in order),
        weights=weights[order],
        squared_mmd=float(weights @ gram @ weights - 2 * c @ weights + own),
        gap=float(solution.gap),
    )


def mixture_weights(user: RKME, pool: Pool, *, candidates: Sequence[int] | None = None) -> Mixture:
    """The mixture closest to the user: w on the simplex with the least |sum_l w_l mu_l - mu_u|^2.

    Solved to a certified gap on the Gram matrix of the candidates' embeddings; `candidates` are
    positions in pool.ids, by default all; k of them cost k rankings of a pool of k. Learnwares that
    are nearly the same share their weight in no particular way: read such weights together.
    ValueError for no candidates, or candidates that are repeated or not in the pool.
    """
    count = len(pool.ids)
    index = list(range(count) if candidates is None else candidates)
    if not index or len(set(index)) < len(index) or min(index) < 0 or max(index) >= count:
        raise ValueError(
            f"mixture_weights: got candidates {index}; want different positions in pool.ids, from "
            f"0 to {count - 1}, and at least one."
        )
    if candidates is not None:
        pool, index = _among(pool, index), range(len(index))
    gram = _gram_rows(pool, index)
    c = 1 + cross_deficits([user], pool)[0]
    return _mixture(pool, index, gram, c, 1 + float(own_deficits([user], pool)[0]))


def greedy_mixture(
    user: RKME, pool: Pool, *, max_size: int = 5, tolerance: float = 0.05
) -> Mixture:
    """A mixture of few learnwares, found by adding one at a time.

    Each round adds the learnware towards which the best step lowers the squared MMD most, then fits
    all weights anew; it stops at `max_size`, or when a round lowers the squared MMD by less than
    the fraction `tolerance`. One ranking of the pool a round.
    """
    if max_size < 1 or not 0 <= tolerance < 1:
        raise ValueError(
            f"greedy_mixture: got max_size={max_size}, tolerance={tolerance}; want max_size >= 1 "
            "and a tolerance in [0, 1)."
        )
    c = 1 + cross_deficits([user], pool)[0]
    own = 1 + float(own_deficits([user], pool)[0])
    diagonal = 1 + biased_self_terms(pool)
    index = [int(np.argmin(diagonal - 2 * c))]
    rows = _gram_rows(pool, index)
    best = _mixture(pool, index, rows[:, index], c[index], own)
    while len(index) < min(max_size, len(pool.ids)):
        weights = dict(zip(best.ids, best.weights, strict=True))
        w = np.array([weights.get(pool.ids[i], 0.0) for i in index])
        towards = w @ rows  # <mixture, mu_l> of every l
        norm = w @ towards[index]
        slope = (c - towards) - (c[index] @ w - norm)
        length = np.maximum(diagonal - 2 * towards + norm, 1e-12)
        step = np.clip(slope / length, 0, 1)
        gain = step * (2 * slope - step * length)
        gain[index] = -np.inf
        index = [*index, int(np.argmax(gain))]
        rows = np.concatenate([rows, _gram_rows(pool, index[-1:])])
        wider = _mixture(pool, index, rows[:, index], c[index], own)
        # Below 1e-7 float32 kernel values tell nothing.
        if best.squared_mmd - wider.squared_mmd < max(tolerance * best.squared_mmd, 1e-7):
            break
        best = wider
    return best
