"""How sure a mean over items is: the same computed on items drawn again, with replacement."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Interval(NamedTuple):
    """The ends of an interval, in the unit of what they enclose."""

    lower: float
    upper: float


def resampled(rng: np.random.Generator, count: int, draws: int) -> Int[np.ndarray, "draws count"]:
    """Places, 0 to count - 1, of `count` items drawn with replacement; a row a draw.

    Efron, Annals of Statistics 1979. Statistics that are compared take the same places: their
    differences are then paired. ValueError for no item or no draw.
    """
    if count < 1 or draws < 1:
        raise ValueError(f"resampled: got count={count} and draws={draws}; want at least 1 each.")
    return rng.integers(count, size=(draws, count))


def interval(values: Float[np.ndarray, " draws"], level: float) -> Interval:
    """The percentile interval: it leaves (1 - level) / 2 of the draws out on either side.

    In the unit of the values. Draws in which a statistic is undefined, NaN, are left out: the
    interval is then that of the draws in which it is defined. ValueError if no draw is left, for
    infinite values, or a level that is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"interval: got level={level}; want more than 0 and less than 1.")
    kept = values[~np.isnan(values)]
    if not kept.size or not np.isfinite(kept).all():
        raise ValueError(
            f"interval: of {len(values)} values {len(kept)} are numbers and "
            f"{np.isinf(kept).sum()} infinite; want at least one number, and none infinite."
        )
    return Interval(*np.quantile(kept, [(1 - level) / 2, (1 + level) / 2]).tolist())


def balanced_draws(
    rng: np.random.Generator,
    correct: Bool[np.ndarray, "k n"],
    wanted: Sequence[Hashable],
    draws: int,
) -> Float[np.ndarray, "draws k"]:
    """Balanced accuracy, 0 to 1, of k models on n rows drawn again, `draws` times.

    `wanted` holds the labels of the rows. Rows are drawn within each label, as many as it has: the
    balanced accuracy of `regret.balanced_accuracy` is defined in every draw. All models see the
    same rows, so that differences between columns are paired. ValueError for lengths that differ,
    no row or no draw.
    """
    if correct.shape[1] != len(wanted) or not len(wanted):
        raise ValueError(
            f"balanced_draws: got {correct.shape[1]} rows for {len(wanted)} answers; want one "
            "each, and at least one."
        )
    if draws < 1:
        raise ValueError(f"balanced_draws: got draws={draws}; want at least 1.")
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(wanted):
        rows.setdefault(label, []).append(row)
    total = np.zeros((draws, len(correct)))
    for own in rows.values():
        # How often each row is drawn is all that matters; a product is faster than places.
        times = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=draws)
        total += times.astype(np.float64) @ correct[:, own].T.astype(np.float64) / len(own)
    return total / len(rows)
