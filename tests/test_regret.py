"""How good a ranking is: numbers by hand, and SciPy and scikit-learn beside them."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.metrics import balanced_accuracy_score

from learnware_jax.selection.regret import balanced_accuracy, gap_closed, kendall, regret


def test_regret_by_hand():
    scores, truth = np.array([0.1, 0.9, 0.9, 0.3]), np.array([0.8, 0.5, 0.6, 0.7])
    # Of the two highest scores the first in the pool counts as first.
    expected = [0.3, 0.2, 0.1, 0.0]
    assert_allclose([regret(scores, truth, k) for k in (1, 2, 3, 4)], expected, atol=1e-15)
    assert regret(scores, truth) == regret(scores, truth, 1)


def test_one_of_several_best_is_no_regret():
    scores, truth = np.array([1.0, 3.0, 2.0]), np.array([0.1 + 0.2, 0.1 + 0.2, 0.0])
    assert regret(scores, truth) == 0


def test_kendall_by_hand():
    # True places 0, 1, 2: exchanges weigh 3/2, 4/3 and 5/6, together 11/3.
    truth = np.array([3.0, 2.0, 1.0])
    cases = {
        (3, 2, 1): 1,
        (1, 2, 3): -1,
        (2, 3, 1): (4 / 3 + 5 / 6 - 3 / 2) / (11 / 3),
        (3, 1, 2): (3 / 2 + 4 / 3 - 5 / 6) / (11 / 3),
        (1, 3, 2): (5 / 6 - 3 / 2 - 4 / 3) / (11 / 3),  # by places of scores it were -2/11
    }
    for scores, expected in cases.items():
        assert_allclose(kendall(np.array(scores, float), truth), expected, rtol=1e-12)


def test_kendall_does_not_know_the_order_of_the_pool():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 4, (2, 12)).astype(float)
    tau = kendall(scores, truth)
    assert -1 < tau < 1
    for _ in range(5):
        order = rng.permutation(12)
        assert_allclose(kendall(scores[order], truth[order]), tau, rtol=1e-12)
    assert_allclose(kendall(100 + 3 * scores, np.exp(truth)), tau, rtol=1e-12)


def test_kendall_of_constants():
    truth, same = np.array([3.0, 2.0, 1.0]), np.full(3, 0.1)
    assert kendall(same, truth) == 0
    assert np.isnan(kendall(truth, same))
    assert np.isnan(kendall(same, same))
    assert np.isnan(kendall(truth[:1], truth[:1]))


@pytest.mark.parametrize("function", [regret, kendall])
@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        ([1.0, 2.0], [1.0], r"got scores of shape \(2,\) and truth of shape \(1,\)"),
        ([], [], r"at least one learnware"),
        ([1.0, np.nan], [1.0, 2.0], r"1 scores are not finite"),
        ([1.0, 2.0], [np.inf, np.nan], r"2 truth are not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(function, scores, truth, message):
    with pytest.raises(ValueError, match=rf"^{function.__name__}: .*{message}"):
        function(np.array(scores), np.array(truth))


@pytest.mark.parametrize("k", [0, -1, 3])
def test_regret_refuses_k_outside_of_the_pool(k):
    with pytest.raises(ValueError, match=rf"regret: got k={k}; want 1 to 2"):
        regret(np.ones(2), np.ones(2), k)


def test_gap_closed():
    assert_allclose(gap_closed(0.7, 0.5, 0.9), 0.5)
    assert gap_closed(0.5, 0.5, 0.75) == 0
    assert gap_closed(0.25, 0.5, 0.75) == -1
    assert np.isnan(gap_closed(0.5, 0.5, 0.5))
    assert np.isnan(gap_closed(0.75, 0.75, 0.5))
    with pytest.raises(ValueError, match=r"gap_closed: got 0.1, nan, 0.3"):
        gap_closed(0.1, np.nan, 0.3)


def test_balanced_accuracy_by_hand():
    wanted = ["yes"] * 4 + ["no"]
    value, error = balanced_accuracy(["yes", "yes", "yes", None, "maybe"], wanted)
    # Recalls 3/4 of four rows and 0 of one.
    assert_allclose(value, 0.375, rtol=1e-14)
    assert_allclose(error, np.sqrt(0.75 * 0.25 / 4) / 2, rtol=1e-14)


def test_balanced_accuracy_is_that_of_scikit_learn_with_the_error_of_a_bootstrap():
    rng = np.random.default_rng(0)
    wanted = rng.choice(4, 80, p=[0.5, 0.3, 0.15, 0.05])
    predicted = np.where(rng.random(80) < 0.7, wanted, rng.integers(0, 4, 80))
    value, error = balanced_accuracy(predicted.tolist(), wanted.tolist())
    assert_allclose(value, balanced_accuracy_score(wanted, predicted), rtol=1e-14)
    rows = [np.flatnonzero(wanted == label) for label in range(4)]
    again = [
        np.mean([(predicted == wanted)[rng.choice(r, len(r))].mean() for r in rows])
        for _ in range(4000)
    ]
    assert_allclose(error, np.std(again), rtol=0.05)


def test_balanced_accuracy_refuses_lists_that_do_not_fit():
    for predicted, wanted in ((["a"], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match=r"balanced_accuracy: got \d predictions for \d"):
            balanced_accuracy(predicted, wanted)
