"""Is a learnware what it says? Its model's answers to texts like those that it is specified by.

Texts are herded from the published specification out of a public corpus
(`specification.herding`). A model that was made for them tells them apart by its answers, in the
words of its card; one that has nothing to do with them does not. No answer need be known, and so
right ones are not told from wrong ones: a model that consistently gives each text the wrong label
passes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from learnware_jax.selection.mixture import Mixture, mixture_weights
from learnware_jax.selection.pool import Pool, members
from learnware_jax.specification.herding import herd_indices
from learnware_jax.specification.kernels import Kernel, mean_embedding
from learnware_jax.specification.rkme import RKME, check_rkme, check_rows


def herd_distinct(
    spec: RKME, kernel: Kernel, candidates: Float[np.ndarray, "n d"], count: int
) -> list[int]:
    """Places of the first `count` different candidates that herding picks for a specification.

    At most 8 picks for each of `count` are looked at: fewer places come back where the same
    candidates are picked again and again. ValueError for a specification that `check_rkme` refuses,
    another dimension, or count < 1.
    """
    check_rkme(spec, where="herd_distinct")
    check_rows(candidates, where="herd_distinct: candidates")
    if count < 1 or candidates.shape[1] != np.shape(spec.z)[1]:
        raise ValueError(
            f"herd_distinct: got count={count} and candidates of dimension {candidates.shape[1]} "
            f"for a specification of dimension {np.shape(spec.z)[1]}; want at least 1, and one "
            "encoder for both."
        )
    rows = jnp.asarray(candidates, jnp.float32)
    with jax.enable_x64(True):
        c = mean_embedding(kernel, rows, jnp.asarray(spec.z, jnp.float32), jnp.asarray(spec.beta))
        picks = np.asarray(herd_indices(kernel, c, rows, count=8 * count))
    return list(dict.fromkeys(picks.tolist()))[:count]


def entropy(p: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n"]:
    """-sum p log p over the last axis, in nats."""
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(-1))


def told(p: Float[np.ndarray, "n v"], labels: Sequence[int] = ()) -> float:
    """How well a model tells n texts apart by its next token, 0 to 1.

    p are its probabilities of every token after each text's prompt, `labels` the tokens that the
    answers on its card begin with. With labels: the probability of any of them, times the mutual
    information between text and label, I = H(mean q) - mean H(q) with q the probabilities given
    that it is a label, over log(number of labels). Without: I of all tokens over H(mean p).
    Exchanging labels, the same way for all texts, changes nothing. ValueError for probabilities
    that are negative or do not sum to one (to 1e-2), fewer than two texts or labels, or labels that
    are repeated or no tokens.
    """
    p = np.asarray(p, np.float64)
    if len(p) < 2 or p.min() < 0 or np.abs(p.sum(1) - 1).max() > 1e-2:
        raise ValueError(
            f"told: got p of shape {p.shape}, sums up to {p.sum(1).max():.3g}; want probabilities "
            "of at least two texts, rows that sum to one."
        )
    places = list(labels)
    if not places:
        mean = entropy(p.mean(0))
        return float((mean - entropy(p).mean()) / mean) if mean > 0 else 0.0
    if len(set(places)) < max(len(places), 2) or min(places) < 0 or max(places) >= p.shape[1]:
        raise ValueError(
            f"told: got labels {places}; want two or more different tokens below {p.shape[1]}."
        )
    q = p[:, places]
    mass = q.sum(1)
    # A text whose labels have no probability tells nothing.
    q = np.where(mass[:, None] > 0, q, 1.0)
    q = q / q.sum(1, keepdims=True)
    information = entropy(q.mean(0)) - entropy(q).mean()
    return float(mass.mean() * information / np.log(len(places)))


def rank_p_value(own: float, others: Sequence[float]) -> float:
    """(1 + number of others that are at least `own`) / (1 + number of others).

    Were `own` and the others exchangeable, it would be at most a with probability at most a.
    """
    at_least = np.asarray(others, float) >= own
    return float((1 + at_least.sum()) / (1 + len(others)))


def lowest_honest(honest: Sequence[float], rate: float) -> float:
    """The score below which a learnware is flagged: the k-th smallest of n honest ones.

    k is the whole part of rate (n + 1): one more honest learnware, exchangeable with these, is
    flagged with probability at most `rate`. -inf, so that nothing is flagged, where n is too small
    for that rate. ValueError for a rate that is not between 0 and 1.
    """
    if not 0 < rate < 1:
        raise ValueError(f"lowest_honest: got rate={rate}; want more than 0 and less than 1.")
    scores = np.sort(np.asarray(honest, float))
    k = int(rate * (len(scores) + 1) + 1e-9)
    return float(scores[k - 1]) if k else -np.inf


def among_others(pool: Pool) -> list[Mixture]:
    """For every specification of a pool the mixture of the others that is closest to it.

    A squared MMD that is small for the pool says that it holds nothing of its own: it is a copy
    (one heavy weight) or a mixture of others (many). No model is run. ValueError for fewer than
    two learnwares.
    """
    count = len(pool.ids)
    if count < 2:
        raise ValueError(f"among_others: got {count} learnware; want at least 2.")
    return [
        mixture_weights(spec, pool, candidates=[j for j in range(count) if j != i])
        for i, spec in enumerate(members(pool))
    ]
