"""Herding, against its formula written out and the embedding that it must follow."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.specification.herding import herd, herd_indices
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME, from_rows

KEY = jax.random.key(0)
M, D, COUNT = 6, 8, 40


@pytest.fixture(scope="module")
def spec():
    rng = np.random.default_rng(0)
    beta = rng.random(M)
    return RKME(oracle.unit_rows(rng, M, D, spread=2), beta / beta.sum())


@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
def test_picks_follow_the_formula(kernel):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, D)).astype(np.float32)
    k, c = oracle.gram(kernel, x, x), oracle.gram(kernel, x, x[:20]).mean(1)
    expected = []
    for t in range(1, 13):
        expected.append(int(np.argmax(t * c - sum(k[s] for s in expected))))
    assert expected[0] == np.argmax(c)
    with jax.enable_x64(True):
        picks = herd_indices(kernel, jnp.asarray(c), x, count=12)
    assert_array_equal(picks, expected)


def test_two_candidates_by_hand():
    # k(a, b) = e^-1, weights 2/3 and 1/3: a, then b, then a, so that the mean is the embedding.
    z = np.array([[0.0], [1.0]], np.float32)
    spec = RKME(z, np.array([2 / 3, 1 / 3]))
    assert_array_equal(herd(KEY, spec, Gaussian(1.0), 3, candidates=z[::-1]), z[[0, 1, 0]])


def test_candidates_that_hold_the_points_are_picked_by_weight(spec):
    others = oracle.unit_rows(np.random.default_rng(2), 60, D, spread=5)
    rows = herd(KEY, spec, Gaussian(8.0), 200, candidates=np.concatenate([others, spec.z]))
    shares = (rows[:, None] == spec.z[None]).all(-1).mean(0)
    assert_allclose(shares, spec.beta, atol=0.02)


def test_samples_follow_the_embedding(spec):
    kernel = Gaussian(0.5)
    before = jax.tree.map(np.copy, spec)
    rows = herd(KEY, spec, kernel, COUNT)
    assert rows.shape == (COUNT, D) and rows.dtype == np.float32
    assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    # As many independent draws from the points themselves are further off, though unbiased.
    rng = np.random.default_rng(3)
    draws = [spec.z[rng.choice(M, COUNT, p=spec.beta)] for _ in range(20)]
    herded = oracle.squared_mmd(kernel, from_rows(rows), spec)
    drawn = np.median([oracle.squared_mmd(kernel, from_rows(x), spec) for x in draws])
    assert 3 * herded < drawn
    few = oracle.squared_mmd(kernel, from_rows(rows[:4]), spec)
    assert 4 * herded < few
    assert not (rows[:, None] == spec.z[None]).all(-1).any()  # noise was added to every point
    jax.tree.map(assert_array_equal, spec, before)


def test_off_the_sphere_rows_keep_their_lengths(spec):
    tall = spec._replace(z=5 * spec.z + 100)
    lengths = np.linalg.norm(herd(KEY, tall, Gaussian(0.02), COUNT), axis=1)
    assert_allclose(lengths.mean(), tall.beta @ np.linalg.norm(tall.z, axis=1), rtol=0.01)


def test_spread_is_a_share_of_the_median_distance():
    # Two points at distance 10: noise of expected length 10 * 0.1 in any dimension.
    spec = RKME(np.zeros((2, 64), np.float32), np.array([0.5, 0.5]))
    spec.z[1, 0] = 10
    rows = herd(KEY, spec, Gaussian(1e-6), 200, spread=0.1, candidates_per_sample=1)
    lengths = np.linalg.norm(rows[:, None] - spec.z[None], axis=-1).min(1)
    assert_allclose(lengths.mean(), 1.0, rtol=0.05)


def test_candidates_come_from_points_by_weight():
    spec = RKME(np.array([[0.0], [10.0]], np.float32), np.array([0.9, 0.1]))
    # One candidate for one sample: what is herded is the draw.
    draws = [
        herd(jax.random.key(i), spec, Gaussian(0.5), 1, candidates_per_sample=1, spread=0.01)
        for i in range(60)
    ]
    assert abs(np.mean(np.concatenate(draws) < 5) - 0.9) < 0.15  # 4 standard errors


def test_one_point_has_a_scale_too():
    rows = herd(KEY, RKME(np.ones((1, D)), np.ones(1)), Gaussian(0.5), 5)
    assert 0.01 < np.linalg.norm(rows - 1, axis=1).max() < 1


def test_key_decides(spec):
    first = herd(KEY, spec, Gaussian(0.5), COUNT)
    assert_array_equal(herd(KEY, spec, Gaussian(0.5), COUNT), first)
    with jax.enable_x64(True):
        assert_array_equal(herd(KEY, spec, Gaussian(0.5), COUNT), first)
    assert (herd(jax.random.key(1), spec, Gaussian(0.5), COUNT) != first).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "herd: got count=0; want at least 1"),
        ({"spec": RKME(np.eye(2), np.array([1.5, -0.5]))}, "herd: weights must be non-negative"),
        ({"spec": RKME(np.full((1, 2), np.nan), np.ones(1))}, "herd: z: 1 of 1 rows hold NaN"),
        ({"candidates": np.ones((3, 5))}, "candidates of dimension 5 for a specification of dimen"),
        ({"candidates": np.full((3, 2), np.inf)}, "herd: candidates: 3 of 3 rows hold"),
        ({"candidates": np.ones((0, 2))}, r"herd: candidates: got shape \(0, 2\)"),
    ],
)
def test_refuses(change, message):
    arguments = {"spec": RKME(np.eye(2), np.array([0.5, 0.5])), "count": 3} | change
    with pytest.raises(ValueError, match=message):
        herd(KEY, kernel=Gaussian(1.0), **arguments)
