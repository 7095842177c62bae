"""Whether a model is what its specification says: numbers by hand, and oracles in NumPy."""

import itertools

import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose

from learnware_jax.selection.genuine import (
    among_others,
    entropy,
    herd_distinct,
    lowest_honest,
    rank_p_value,
    told,
)
from learnware_jax.selection.pool import build_pool
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME, from_rows

GAMMA = 0.5


def pool_of(specs):
    count = len(specs)
    ids = [str(i) for i in range(count)]
    return build_pool(specs, Gaussian(GAMMA), ids=ids, n=[100] * count, residual=[0.0] * count)


def sphere(seed, n, d=4):
    return oracle.unit_rows(np.random.default_rng(seed), n, d).astype(np.float32)


def test_entropy_by_hand():
    assert_allclose(entropy(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])), [np.log(2), 0.0])


@pytest.mark.parametrize(
    ("p", "labels", "wanted"),
    [
        # Certain, and each text another label; a tenth of the probability is on no label.
        ([[0.9, 0.0, 0.1], [0.0, 0.9, 0.1]], [0, 1], 0.9),
        # log 2 - H(3/4) = 0.130812 nats, over log 2.
        ([[0.75, 0.25, 0.0], [0.25, 0.75, 0.0]], [0, 1], 0.188722),
        # The same of a half: the labels have a half, and the tenth-wise rest does not count.
        ([[0.375, 0.125, 0.5], [0.125, 0.375, 0.5]], [0, 1], 0.094361),
        # One answer to everything, however certain.
        ([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05]], [0, 1], 0.0),
        # No probability on any label.
        ([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]], [0, 1], 0.0),
        # Two of three labels are used: log 2 / log 3.
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0, 1, 2], 0.630930),
        # Without labels: (log 4 - log 2) / log 4.
        ([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], [], 0.5),
        ([[1.0, 0.0], [1.0, 0.0]], [], 0.0),
    ],
)
def test_told_by_hand(p, labels, wanted):
    assert told(np.array(p), labels) == pytest.approx(wanted, abs=1e-6)


def test_consistently_wrong_labels_are_not_seen():
    """What the check cannot find: the same answers under exchanged names."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(0.3 * np.ones(6), size=9)
    exchanged = p[:, [2, 0, 1, 3, 4, 5]]
    assert told(exchanged, [0, 1, 2]) == pytest.approx(told(p, [0, 1, 2]))
    # Answers shuffled over the texts' halves of a mixture are another matter: less is told.
    blurred = (p + p[::-1]) / 2
    assert told(blurred, [0, 1, 2]) < 0.8 * told(p, [0, 1, 2])


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        ([[1.0, 0.0]], [], r"told: got p of shape \(1, 2\)"),
        ([[0.5, 0.4], [0.5, 0.5]], [], r"rows that sum to one"),
        ([[1.5, -0.5], [0.5, 0.5]], [], r"rows that sum to one"),
        ([[0.5, 0.5], [0.5, 0.5]], [0], r"got labels \[0\]; want two or more different tokens"),
        ([[0.5, 0.5], [0.5, 0.5]], [1, 1], r"got labels \[1, 1\]"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], r"tokens below 2"),
    ],
)
def test_what_is_no_answer_is_refused(p, labels, message):
    with pytest.raises(ValueError, match=message):
        told(np.array(p), labels)


def herded(kernel, spec, x, steps):
    """Herding by its definition: at step t the most of t mu(x) - sum of k(x, earlier picks)."""
    mu, k = oracle.gram(kernel, x, spec.z) @ spec.beta, oracle.gram(kernel, x, x)
    picks = []
    for t in range(1, steps + 1):
        picks.append(int(np.argmax(t * mu - k[picks].sum(0))))
    return picks


def test_herded_places_are_those_of_the_definition():
    kernel, x = Gaussian(GAMMA), sphere(1, 40)
    spec = RKME(sphere(2, 5), np.array([0.4, 0.3, 0.1, 0.1, 0.1]))
    picks = herded(kernel, spec, x, 64)
    assert len(set(picks[:8])) < 8 or len(set(picks)) < 64  # some are picked again
    assert herd_distinct(spec, kernel, x, 8) == list(dict.fromkeys(picks))[:8]


def test_a_small_corpus_gives_fewer_places():
    x = sphere(3, 2)
    assert sorted(herd_distinct(from_rows(x), Gaussian(GAMMA), x, 5)) == [0, 1]
    with pytest.raises(ValueError, match=r"candidates of dimension 3 .* dimension 4"):
        herd_distinct(from_rows(x), Gaussian(GAMMA), sphere(3, 2, 3), 5)
    with pytest.raises(ValueError, match=r"got count=0"):
        herd_distinct(from_rows(x), Gaussian(GAMMA), x, 0)


def test_rank_p_value_is_exact_for_every_order():
    assert rank_p_value(0.5, [0.1, 0.5, 0.9]) == 0.75  # ties count against it
    values = [
        rank_p_value(order[0], order[1:]) for order in itertools.permutations([0.0, 1.0, 2.0, 3.0])
    ]
    for level in (0.25, 0.5, 0.75, 1.0):
        assert np.mean([value <= level for value in values]) == level


def test_lowest_honest_flags_as_many_as_it_says():
    scores = [0.7, 0.3, 0.9, 0.5, 0.8, 0.4, 0.6]
    assert lowest_honest(scores, 0.125) == 0.3 and lowest_honest(scores, 0.25) == 0.4
    assert lowest_honest(scores, 0.12) == -np.inf
    everyone = [*scores, 0.45]
    # Any of 8 may be the new one: it is below the others' threshold for 1, 2, ... of them.
    for count in (1, 2, 3):
        flagged = [
            each < lowest_honest([other for other in everyone if other != each], count / 8)
            for each in everyone
        ]
        assert sum(flagged) == count
    with pytest.raises(ValueError, match=r"got rate=1\.0"):
        lowest_honest(scores, 1.0)


def test_copies_and_mixtures_hold_nothing_of_their_own():
    first, second, third = (from_rows(sphere(seed, 30)) for seed in (4, 5, 6))
    both = RKME(
        np.concatenate([first.z, second.z]), np.concatenate([0.3 * first.beta, 0.7 * second.beta])
    )
    alone, _ = among_others(pool_of([first, second]))
    wanted = oracle.squared_mmd(Gaussian(GAMMA), first, second)
    assert alone.squared_mmd == pytest.approx(wanted, abs=1e-6)
    found = among_others(pool_of([first, second, third, both]))
    assert abs(found[3].squared_mmd) < 1e-6
    weights = dict(zip(found[3].ids, found[3].weights, strict=True))
    assert weights["1"] == pytest.approx(0.7, abs=1e-3)
    assert weights["0"] == pytest.approx(0.3, abs=1e-3)
    # The third is the only one that is not made of the others.
    assert found[2].squared_mmd > 1e-3
    copied = among_others(pool_of([first, second, first._replace()]))
    assert abs(copied[2].squared_mmd) < 1e-6 and copied[2].ids == ("0",)
    with pytest.raises(ValueError, match=r"got 1 learnware; want at least 2"):
        among_others(pool_of([first]))
