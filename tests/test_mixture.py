"""Mixtures: known weights come back, against oracles that try every set of learnwares."""

from itertools import combinations

import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import minimize

from learnware_jax.selection.mixture import greedy_mixture, mixture_weights
from learnware_jax.selection.pool import build_pool
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME

D, M = 8, 6
IDS = [f"lw{i}" for i in range(M)]
GAUSSIAN = Gaussian(0.5)
KERNELS = pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)


def specs(count, *, seed=0):
    rng = np.random.default_rng(seed)
    return [
        RKME(oracle.unit_rows(rng, 10, D, spread=0.5), rng.dirichlet(np.ones(10)))
        for _ in range(count)
    ]


def pool_of(learnwares, kernel=GAUSSIAN, n=30):
    count = len(learnwares)
    ids = [f"lw{i}" for i in range(count)]
    return build_pool(learnwares, kernel, ids=ids, n=[n] * count, residual=[0.0] * count)


def mix(weights, learnwares):
    """The specification whose embedding is exactly that convex combination."""
    return RKME(
        np.concatenate([spec.z for spec in learnwares]),
        np.concatenate([w * spec.beta for w, spec in zip(weights, learnwares, strict=True)]),
    )


def by_id(mixture):
    return dict(zip(mixture.ids, mixture.weights, strict=True))


def fit(kernel, user, learnwares):
    """The least squared MMD to a convex combination of these, by a general-purpose solver."""
    gram = np.array([[oracle.inner(kernel, p, q) for q in learnwares] for p in learnwares])
    cross = np.array([oracle.inner(kernel, user, p) for p in learnwares])
    own = oracle.inner(kernel, user, user)

    def objective(w):
        return w @ gram @ w - 2 * cross @ w + own

    found = minimize(
        objective,
        np.full(len(learnwares), 1 / len(learnwares)),
        jac=lambda w: 2 * (gram @ w - cross),
        bounds=[(0, 1)] * len(learnwares),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.fun, found.x


@KERNELS
@pytest.mark.parametrize("solve", [mixture_weights, greedy_mixture])
def test_the_weights_of_a_known_mixture_come_back(kernel, solve):
    learnwares = specs(M)
    user = mix([0.3, 0.5, 0.2], [learnwares[i] for i in (4, 1, 2)])
    found = solve(user, pool_of(learnwares, kernel))
    assert found.ids[:3] == ("lw1", "lw4", "lw2")  # heaviest first
    assert_allclose(found.weights[:3], [0.5, 0.3, 0.2], atol=2e-5)
    assert found.weights[3:].sum() < 2e-5
    assert abs(found.squared_mmd) < 2e-7
    assert 0 <= found.gap <= 1e-9


@KERNELS
def test_weights_agree_with_a_general_purpose_solver(kernel):
    learnwares, user = specs(M), specs(1, seed=1)[0]
    found = mixture_weights(user, pool_of(learnwares, kernel))
    least, weights = fit(kernel, user, learnwares)
    assert_allclose(found.squared_mmd, least, atol=2e-7)
    assert_allclose([by_id(found).get(f"lw{i}", 0) for i in range(M)], weights, atol=1e-4)
    assert found.gap <= 1e-9
    assert (found.weights > 0).all() and (np.diff(found.weights) <= 0).all()
    assert_allclose(found.weights.sum(), 1, atol=1e-12)
    single = min(oracle.squared_mmd(kernel, user, spec) for spec in learnwares)
    assert found.squared_mmd < single


def test_linear_mixtures_of_rows_that_are_not_unit():
    """|x|^2 / 2, which the deficits leave out, is then neither constant nor below one."""
    linear = oracle.ALL_KERNELS[-1]
    learnwares = [RKME(5 * spec.z + i, spec.beta) for i, spec in enumerate(specs(4))]
    user = mix([0.7, 0.3], learnwares[1:3])
    found = mixture_weights(user, pool_of(learnwares, linear))
    assert_allclose([by_id(found)[i] for i in ("lw1", "lw2")], [0.7, 0.3], atol=1e-4)
    assert abs(found.squared_mmd) < 1e-4  # of squared norms around 100


def test_candidates_are_the_only_ones_considered():
    learnwares, user = specs(M), specs(1, seed=1)[0]
    pool = pool_of(learnwares)
    found = mixture_weights(user, pool, candidates=[5, 0, 3])
    least, weights = fit(GAUSSIAN, user, [learnwares[i] for i in (5, 0, 3)])
    assert_allclose(found.squared_mmd, least, atol=2e-7)
    assert_allclose([by_id(found).get(i, 0) for i in ("lw5", "lw0", "lw3")], weights, atol=1e-4)
    alone = mixture_weights(user, pool, candidates=[2])
    assert alone.ids == ("lw2",) and alone.weights == [1]
    assert_allclose(alone.squared_mmd, oracle.squared_mmd(GAUSSIAN, user, learnwares[2]), atol=2e-7)


def test_near_duplicates_share_their_weight():
    learnwares = specs(3)
    rng = np.random.default_rng(2)
    twin = learnwares[1]._replace(
        z=learnwares[1].z + 1e-4 * rng.standard_normal((10, D)).astype(np.float32)
    )
    user = mix([0.6, 0.4], learnwares[:2])
    found = mixture_weights(user, pool_of([*learnwares, twin, learnwares[1]]))
    weights = by_id(found)
    assert_allclose(weights["lw0"], 0.6, atol=1e-4)
    assert_allclose(sum(weights.get(f"lw{i}", 0) for i in (1, 3, 4)), 0.4, atol=1e-4)
    assert abs(found.squared_mmd) < 2e-7


@KERNELS
def test_greedy_starts_at_the_nearest_and_takes_the_best_step(kernel):
    learnwares, user = specs(M), mix([0.4, 0.35, 0.25], specs(3, seed=3))
    pool = pool_of(learnwares, kernel)
    one = greedy_mixture(user, pool, max_size=1)
    distance = [oracle.squared_mmd(kernel, user, spec) for spec in learnwares]
    first = int(np.argmin(distance))
    assert one.ids == (f"lw{first}",)
    assert_allclose(one.squared_mmd, min(distance), atol=4e-7)

    steps = np.linspace(0, 1, 2001)

    def best_step(other):  # on the segment from the first to it
        p, q = learnwares[first], learnwares[other]
        d, b = (oracle.squared_mmd(kernel, user, spec) for spec in (p, q))
        between = oracle.squared_mmd(kernel, p, q)
        return ((1 - steps) * d + steps * b - steps * (1 - steps) * between).min()

    second = min(set(range(M)) - {first}, key=best_step)
    two = greedy_mixture(user, pool, max_size=2, tolerance=0.0)
    assert set(two.ids) == {f"lw{first}", f"lw{second}"}
    assert_allclose(
        two.squared_mmd, fit(kernel, user, [learnwares[i] for i in (first, second)])[0], atol=4e-7
    )


def test_greedy_finds_the_best_pair_of_a_mixture_of_two():
    learnwares = specs(M)
    user = mix([0.55, 0.45], [learnwares[0], learnwares[5]])
    pairs = {
        pair: fit(GAUSSIAN, user, [learnwares[i] for i in pair])[0]
        for pair in combinations(range(M), 2)
    }
    assert min(pairs, key=pairs.get) == (0, 5)
    found = greedy_mixture(user, pool_of(learnwares))
    assert found.ids == ("lw0", "lw5")


def test_greedy_stops_by_size_and_by_tolerance():
    learnwares, user = specs(M), specs(1, seed=1)[0]
    pool = pool_of(learnwares)
    values = [greedy_mixture(user, pool, max_size=k, tolerance=0.0) for k in range(1, M + 1)]
    squared = np.array([mixture.squared_mmd for mixture in values])
    assert (np.diff(squared) <= 1e-12).all()
    assert_allclose(squared[-1], mixture_weights(user, pool).squared_mmd, atol=2e-7)
    assert len(values[2].ids) == 3
    # A tolerance between the relative gains of two rounds stops before the second.
    gains = 1 - squared[1:] / squared[:-1]
    assert gains[0] > gains[1]
    stopped = greedy_mixture(user, pool, tolerance=(gains[0] + gains[1]) / 2)
    assert stopped.ids == values[1].ids


def test_greedy_keeps_one_learnware_for_a_user_that_is_one():
    learnwares = specs(M)
    for i, user in enumerate(learnwares):
        found = greedy_mixture(user, pool_of(learnwares))
        assert found.ids[0] == f"lw{i}"
        assert found.weights[0] > 1 - 1e-5
        assert abs(found.squared_mmd) < 2e-7


def test_the_unbiased_self_terms_of_a_pool_do_not_enter():
    learnwares, user = specs(M), specs(1, seed=1)[0]
    few, many = (greedy_mixture(user, pool_of(learnwares, n=n)) for n in (2, 10**6))
    assert few.ids == many.ids
    assert_allclose(few.weights, many.weights, atol=1e-6)
    nearest = greedy_mixture(user, pool_of(learnwares), max_size=1).ids
    for i in range(M):  # twice the self term would make learnware i look closer
        n = [2 if j == i else 10**6 for j in range(M)]
        mixed = build_pool(learnwares, GAUSSIAN, ids=IDS, n=n, residual=[0.0] * M)
        assert greedy_mixture(user, mixed, max_size=1).ids == nearest


@pytest.mark.parametrize("candidates", [[], [0, 0], [-1], [M]])
def test_bad_candidates_are_refused(candidates):
    with pytest.raises(ValueError, match="mixture_weights: got candidates"):
        mixture_weights(specs(1)[0], pool_of(specs(M)), candidates=candidates)


@pytest.mark.parametrize("options", [{"max_size": 0}, {"tolerance": -0.1}, {"tolerance": 1.0}])
def test_bad_limits_are_refused(options):
    with pytest.raises(ValueError, match="greedy_mixture: got max_size="):
        greedy_mixture(specs(1)[0], pool_of(specs(M)), **options)
