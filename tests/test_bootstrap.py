"""The bootstrap: numbers by hand, standard errors known in closed form, and SciPy beside it."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from learnware_jax.selection.bootstrap import balanced_draws, interval, resampled
from learnware_jax.selection.regret import balanced_accuracy


def test_every_item_is_drawn_equally_often_and_may_be_drawn_again():
    places = resampled(np.random.default_rng(0), 5, 20_000)
    assert places.shape == (20_000, 5)
    # A place is each item with probability 1/5; five standard errors of 100,000 draws.
    assert_allclose(np.bincount(places.ravel()) / 1e5, 0.2, atol=5 * np.sqrt(0.2 * 0.8 / 1e5))
    # All five different: 5!/5^5.
    different = (np.sort(places, 1) == np.arange(5)).all(1).mean()
    assert_allclose(different, 120 / 3125, atol=0.007)


def test_the_error_of_a_mean_is_that_of_its_formula():
    values = np.array([1.0, 2.0, 4.0, 8.0])
    means = values[resampled(np.random.default_rng(0), 4, 40_000)].mean(1)
    assert_allclose(means.std(), values.std() / 2, rtol=0.02)


def test_draws_are_those_of_the_seed():
    first, again, other = (resampled(np.random.default_rng(s), 9, 3) for s in (1, 1, 2))
    assert_array_equal(first, again)
    assert (first != other).any()


def test_interval_by_hand():
    # Of 0 to 100 the lowest and the highest 2.5 %, in any order.
    values = np.random.default_rng(0).permutation(101).astype(float)
    assert_allclose(interval(values, 0.95), (2.5, 97.5))
    assert_allclose(interval(values, 0.5), (25, 75))
    assert interval(np.array([3.0]), 0.95) == (3, 3)


def test_undefined_draws_are_left_out():
    values = np.arange(101.0)
    holes = np.concatenate([values, np.full(40, np.nan)])
    assert interval(holes, 0.9) == interval(values, 0.9)
    assert_allclose(interval(holes, 0.9), (5, 95))


def test_interval_is_that_of_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=30)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = interval(values[resampled(np.random.default_rng(2), 30, 20_000)].mean(1), 0.95)
    assert_allclose(ours, theirs, atol=0.02)


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [
        ([1.0], 1.0, "level=1.0"),
        ([1.0], 0.0, "level=0.0"),
        ([np.nan, np.nan], 0.9, "of 2 values 0 are numbers"),
        ([], 0.9, "of 0 values 0 are numbers"),
        ([1.0, np.inf, np.nan], 0.9, "of 3 values 2 are numbers and 1 infinite"),
    ],
)
def test_interval_refuses_what_has_none(values, level, message):
    with pytest.raises(ValueError, match=rf"^interval: .*{message}"):
        interval(np.array(values, float), level)


def test_every_draw_has_every_label():
    # One row of a rare label: a draw without it would not be balanced. It is right in model 0 only.
    correct = np.array([[False] * 9 + [True], [False] * 10, [True] * 10])
    draws = balanced_draws(np.random.default_rng(0), correct, ["common"] * 9 + ["rare"], 50)
    assert_array_equal(draws, np.tile([0.5, 0.0, 1.0], (50, 1)))


def test_draws_spread_about_the_balanced_accuracy_by_its_standard_error():
    rng = np.random.default_rng(0)
    wanted = rng.choice(3, 90, p=[0.6, 0.3, 0.1]).tolist()
    correct = rng.random((2, 90)) < np.array([[0.8], [0.4]])
    draws = balanced_draws(rng, correct, wanted, 20_000)
    for model in range(2):
        guesses = np.where(correct[model], wanted, -1).tolist()
        value, error = balanced_accuracy(guesses, wanted)
        assert_allclose(draws[:, model].mean(), value, atol=5 * error / np.sqrt(20_000))
        assert_allclose(draws[:, model].std(), error, rtol=0.03)


def test_draws_are_those_of_loops_over_places():
    rng = np.random.default_rng(3)
    wanted, correct = ["a", "b", "a", "a", "b"], rng.random((2, 5)) < 0.5
    draws = balanced_draws(np.random.default_rng(0), correct, wanted, 40_000)
    again = np.empty((40_000, 2))
    labels = [[0, 2, 3], [1, 4]]
    parts = [np.array(own)[resampled(rng, len(own), 40_000)] for own in labels]
    for model in range(2):
        again[:, model] = np.mean([correct[model][part].mean(1) for part in parts], 0)
    assert_allclose(np.cov(draws.T), np.cov(again.T), atol=2e-3)
    assert_allclose(draws.mean(0), again.mean(0), atol=6e-3)


def test_models_see_the_same_rows():
    correct = np.random.default_rng(0).random((1, 40)) < 0.5
    wanted = (np.arange(40) % 3).tolist()
    both = np.concatenate([correct, correct, ~correct])
    draws = balanced_draws(np.random.default_rng(0), both, wanted, 100)
    assert draws[:, 0].std() > 0.01
    assert_array_equal(draws[:, 0], draws[:, 1])
    assert_allclose(draws[:, 0] + draws[:, 2], 1, rtol=1e-14)


def test_balanced_draws_refuse_what_does_not_fit():
    rng, correct = np.random.default_rng(0), np.ones((2, 3), bool)
    for rows, wanted, draws, message in (
        (correct, ["a", "b"], 5, "got 3 rows for 2 answers"),
        (correct[:, :0], [], 5, "got 0 rows for 0 answers"),
        (correct, ["a"] * 3, 0, "got draws=0"),
    ):
        with pytest.raises(ValueError, match=rf"^balanced_draws: {message}"):
            balanced_draws(rng, rows, wanted, draws)
    for count, draws in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=rf"resampled: got count={count} and draws={draws}"):
            resampled(rng, count, draws)
