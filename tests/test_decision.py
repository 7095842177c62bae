"""Decisions: a learnware or none, at a rate of false acceptance that holds."""

import json

import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.selection.decision import calibrate_threshold, held_out_distances, select
from learnware_jax.selection.interval import intervals, undominated
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import rank
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME

D = 8


def specs(count, *, points=10, seed=0):
    rng = np.random.default_rng(seed)
    return [
        RKME(oracle.unit_rows(rng, points, D), rng.dirichlet(np.ones(points))) for _ in range(count)
    ]


IDS = ("law", "medicine", "sport", "music")
GAUSSIAN = Gaussian(0.5)
POOL = build_pool(specs(4), GAUSSIAN, ids=IDS, n=[30] * 4, residual=[1e-3] * 4)
USER = specs(4)[2]


def test_a_selection_puts_together_ranking_intervals_and_separation():
    chosen = select(USER, POOL, n=25, residual=2e-3, threshold=0.1, top_k=3, level=0.8)
    found = rank([USER], POOL, n=[25], top_k=3)
    index, distance = found.index[0], found.distance[0]
    assert chosen.ids == tuple(IDS[i] for i in index)
    assert chosen.ids[0] == chosen.decision == "sport"
    assert_array_equal(chosen.distance, distance)
    lower, upper = intervals(USER, POOL, distance, index, n=25, residual=2e-3, level=0.8)
    assert_array_equal(chosen.lower, lower)
    assert_array_equal(chosen.upper, upper)
    kept = undominated(USER, POOL, distance, index, n=25, level=0.8)
    assert chosen.undominated == tuple(np.array(chosen.ids)[kept]) == ("sport",)
    # A level that leaves no error leaves everybody in.
    everybody = select(USER, POOL, n=25, residual=2e-3, threshold=0.1, level=1 - 1e-14)
    assert everybody.undominated == everybody.ids


def test_none_fits_beyond_the_threshold_and_the_threshold_itself_still_fits():
    options = {"n": 25, "residual": 0.0}
    nearest = select(USER, POOL, threshold=np.inf, **options).distance[0]
    for threshold, decision in (
        (float(nearest), "sport"),
        (float(np.nextafter(nearest, -1)), "none"),
        (-np.inf, "none"),
    ):
        assert select(USER, POOL, threshold=threshold, **options).decision == decision


def test_a_selection_can_be_written_as_json():
    chosen = select(USER, POOL, n=25, residual=0.0, threshold=0.1)
    written = {name: np.asarray(value).tolist() for name, value in chosen._asdict().items()}
    assert json.loads(json.dumps(written)) == written
    assert written["decision"] == "sport" and set(written["ids"]) == set(IDS)


@pytest.mark.parametrize(
    "rate, threshold",
    [
        (0.1, 0.1),  # k = floor(10 x 0.1) = 1
        (0.19, 0.1),
        (0.2, 0.2),
        (0.3, 0.3),
        (0.7, 0.7),
        (0.95, 0.9),
        (0.09, -np.inf),  # k = 0
    ],
)
def test_a_threshold_is_an_order_statistic(rate, threshold):
    nearest = np.array([0.3, 0.1, 0.9, 0.2, 0.8, 0.4, 0.7, 0.5, 0.6])
    assert calibrate_threshold(nearest, false_acceptance=rate) == threshold
    assert_array_equal(nearest[:3], [0.3, 0.1, 0.9])


def test_rounding_costs_no_order_statistic():
    assert 100 * 0.29 < 29  # in floating point
    assert calibrate_threshold(np.arange(1.0, 100.0), false_acceptance=0.29) == 29


@pytest.mark.parametrize("tasks, rate", [(9, 0.1), (20, 0.1), (35, 0.05), (12, 0.5)])
def test_false_acceptance_stays_within_the_rate(tasks, rate):
    """Exactly floor((t + 1) rate) / (t + 1) for continuous distances: no more, and not far less."""
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(4000, tasks + 1))
    accepted = [d[-1] <= calibrate_threshold(d[:-1], false_acceptance=rate) for d in draws]
    exact = np.floor((tasks + 1) * rate + 1e-9) / (tasks + 1)
    assert exact <= rate
    assert abs(np.mean(accepted) - exact) < 3.5 * np.sqrt(exact * (1 - exact) / 4000)


def test_held_out_distances_are_to_the_nearest_of_another_group():
    learnwares, groups = specs(6), ["a", "b", "a", "c", "b", "a"]
    n = [20, 30, 40, 50, 60, 70]
    pool = build_pool(learnwares, GAUSSIAN, ids=list("uvwxyz"), n=n, residual=[0.0] * 6)

    def unbiased(p, n_p, q, n_q):
        selves = sum(
            (oracle.inner(GAUSSIAN, spec, spec) - 1) * rows / (rows - 1)
            for spec, rows in ((p, n_p), (q, n_q))
        )
        return selves + 2 - 2 * oracle.inner(GAUSSIAN, p, q)

    wanted = [
        min(
            unbiased(learnwares[i], n[i], learnwares[j], n[j])
            for j in range(6)
            if groups[j] != groups[i]
        )
        for i in range(6)
    ]
    assert_allclose(held_out_distances(pool, groups), wanted, atol=2e-7)


@pytest.mark.parametrize("groups", [["a", "b"], ["a"] * 4])
def test_bad_groups_are_refused(groups):
    with pytest.raises(ValueError, match=f"held_out_distances: got {len(groups)} groups"):
        held_out_distances(POOL, groups)


@pytest.mark.parametrize(
    "nearest, rate, message",
    [
        ([], 0.1, "got 0 distances"),
        ([0.1, np.nan], 0.1, "got 2 distances"),
        ([0.1, np.inf], 0.1, "all finite"),
        ([0.1], 0.0, "rate 0.0"),
        ([0.1], 1.0, "rate 1.0"),
    ],
)
def test_bad_calibration_is_refused(nearest, rate, message):
    with pytest.raises(ValueError, match=f"calibrate_threshold: .*{message}"):
        calibrate_threshold(np.array(nearest), false_acceptance=rate)
