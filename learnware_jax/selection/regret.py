"""How good a ranking is, and a selection, where the true score of every learnware is known."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def _checked(where, scores, truth):
    scores, truth = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    if scores.shape != truth.shape or not scores.size:
        raise ValueError(
            f"{where}: got scores of shape {scores.shape} and truth of shape {truth.shape}; want "
            "one of each a learnware, and at least one learnware."
        )
    for name, values in (("scores", scores), ("truth", truth)):
        if not np.isfinite(values).all():
            raise ValueError(f"{where}: {(~np.isfinite(values)).sum()} {name} are not finite.")
    return scores, truth


def regret(scores: Float[np.ndarray, " M"], truth: Float[np.ndarray, " _"], k: int = 1) -> float:
    """The best truth, less the best truth among the k learnwares of highest score; 0 or more.

    Regret@k of Poth et al. (EMNLP 2021) without their division by the best truth. Equal scores keep
    the pool's order. Zero exactly where one of the truly best is among the k: `regret(...) == 0` is
    the top-k hit. ValueError for lengths that differ, no learnware, values that are not finite, or
    k that is not between 1 and M.
    """
    scores, truth = _checked("regret", scores, truth)
    if not 1 <= k <= len(scores):
        raise ValueError(f"regret: got k={k}; want 1 to {len(scores)}, the number of learnwares.")
    top = np.argsort(-scores, kind="stable")[:k]
    return float(truth.max() - truth[top].max())


def kendall(scores: Float[np.ndarray, " M"], truth: Float[np.ndarray, " _"]) -> float:
    """Weighted Kendall tau of scores and truth, -1 to 1: mistakes at the top count most.

    Vigna, WWW 2015, hyperbolic and additive, as `scipy.stats.weightedtau` has it: an exchange of
    the learnwares at true places r and s (from 0) weighs 1/(r + 1) + 1/(s + 1). Places are those by
    truth alone, equal truths by score (SciPy's default averages with places by score). Pairs of
    equal score or equal truth count neither for nor against. Scores that are all equal rank
    nothing: 0. Where all truths are equal nothing can be ranked: nan, and so with one learnware.
    Errors as in `regret`.
    """
    from scipy.stats import weightedtau

    scores, truth = _checked("kendall", scores, truth)
    if (truth == truth[0]).all():
        return np.nan
    if (scores == scores[0]).all():
        return 0.0
    # With rank=None SciPy takes places by its first argument, ties by the second.
    return float(weightedtau(truth, scores, rank=None).statistic)


def gap_closed(selected: float, random: float, oracle: float) -> float:
    """(selected - random) / (oracle - random): the share of the gap that selection closes.

    1 is the oracle's selection, 0 a random one; negative where selection is worse than that. nan
    where the oracle is no better than random. ValueError for values that are not finite.
    """
    if not np.isfinite([selected, random, oracle]).all():
        raise ValueError(f"gap_closed: got {selected}, {random}, {oracle}; want finite numbers.")
    gap = oracle - random
    return float((selected - random) / gap) if gap > 0 else np.nan


def balanced_accuracy(predicted: Sequence[Hashable], wanted: Sequence[Hashable]) -> Estimate:
    """The mean over the labels that occur in `wanted` of the share of their rows that are right.

    0 to 1; `sklearn.metrics.balanced_accuracy_score`, except that predictions outside of these
    labels (None, say) are wrong without a warning. The standard error holds the rows of every label
    as drawn independently: sqrt(sum_l r_l (1 - r_l) / n_l) / L, with recall r_l of n_l rows. Labels
    with one row, or all right, add nothing to it: with few rows it is too small. ValueError for
    lengths that differ or no row.
    """
    if len(predicted) != len(wanted) or not len(wanted):
        raise ValueError(
            f"balanced_accuracy: got {len(predicted)} predictions for {len(wanted)} answers; want "
            "one each, and at least one."
        )
    right: dict[Hashable, list[bool]] = {}
    for guess, label in zip(predicted, wanted, strict=True):
        right.setdefault(label, []).append(guess == label)
    recall = np.array([np.mean(hits) for hits in right.values()])
    count = np.array([len(hits) for hits in right.values()])
    error = np.sqrt((recall * (1 - recall) / count).sum()) / len(count)
    return Estimate(float(recall.mean()), float(error))
