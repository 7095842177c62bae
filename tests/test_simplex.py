"""Simplex quadratic programs, against closed forms, enumeration of supports, and scipy."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize

from learnware_jax.specification.simplex import (
    QPResult,
    duality_gap,
    interior_point,
    pairwise_frank_wolfe,
    polish,
    solve_simplex,
)


def in_float64(function, *args, **kwargs):
    with jax.enable_x64(True):
        args = [jnp.asarray(a) for a in args]
        kwargs = {name: jnp.asarray(value) for name, value in kwargs.items()}
        return jax.tree.map(np.asarray, jax.jit(function)(*args, **kwargs))


def frank_wolfe(k, c):
    return in_float64(pairwise_frank_wolfe, k, c, tolerance=1e-12, max_iterations=100_000)


def interior(k, c, **kwargs):
    return in_float64(interior_point, k, c, **kwargs)


SOLVERS = pytest.mark.parametrize("solve", [solve_simplex, interior, frank_wolfe])


def objective(k, c, beta):
    return beta @ k @ beta / 2 - c @ beta


def reference_gap(k, c, beta):
    gradient = k @ beta - c
    return gradient @ beta - gradient.min()


def clustered(n, seed, d=384, clusters=20):
    """Unit-norm rows about random centres in a subspace, like embeddings of sentences."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, 24)))[0]
    centres = rng.normal(size=(clusters, 24))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    low = centres[rng.integers(clusters, size=n)] + 0.14 * rng.normal(size=(n, 24))
    x = low @ basis.T + 0.023 * rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def gaussian(x, y, gamma):
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.exp(-gamma * np.maximum(squared, 0))


def reduced_set(z, x, gamma):
    """The problem whose solution weights the points z to match the mean embedding of x."""
    k = gaussian(z, z, gamma)
    return (k + k.T) / 2, gaussian(z, x, gamma).mean(axis=1)


def enumerate_supports(k, c):
    """The optimum by brute force: solve the KKT system of every support, keep the best feasible."""
    n, best, best_value = len(c), None, np.inf
    for size in range(1, n + 1):
        for support in map(list, combinations(range(n), size)):
            system = np.ones((size + 1, size + 1))
            system[:size, :size], system[size, size] = k[np.ix_(support, support)], 0
            solution = np.linalg.lstsq(system, np.append(c[support], 1), rcond=None)[0][:size]
            beta = np.zeros(n)
            beta[support] = solution
            if (solution >= 0).all() and abs(beta.sum() - 1) < 1e-9:
                value = objective(k, c, beta)
                if value < best_value:
                    best, best_value = beta, value
    return best


@pytest.mark.parametrize(
    ("k", "c", "expected"),
    [
        ([[2.0]], [5.0], [1]),
        # b_1 = (K_22 - K_12 + c_1 - c_2) / (K_11 + K_22 - 2 K_12), clipped to [0, 1].
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.0], [0.75, 0.25]),
        ([[2.0, 0.5], [0.5, 1.0]], [0.0, 0.0], [0.25, 0.75]),
        ([[1.0, 0.0], [0.0, 1.0]], [3.0, 0.0], [1, 0]),
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, 0.0], [1, 0]),  # exactly at the corner: slope 0
        # K = I projects c onto the simplex; a diagonal K with c = 0 gives b ~ 1 / K_ii.
        (np.eye(3), [1.0, 0.5, -2.0], [0.75, 0.25, 0]),
        (np.diag([1.0, 2.0, 4.0]), [0.0, 0.0, 0.0], [4 / 7, 2 / 7, 1 / 7]),
        # K = 0: all weight on the largest c.
        (np.zeros((3, 3)), [1.0, 3.0, 2.0], [0, 1, 0]),
    ],
)
@SOLVERS
def test_closed_forms(solve, k, c, expected):
    result = solve(np.array(k), np.array(c))
    # f - f* >= |b - b*|^2 / 2 for curvature >= 1: a gap of 1e-12 leaves b within 1.4e-6.
    assert_allclose(result.beta, expected, atol=2e-6 if solve is frank_wolfe else 2e-8)
    assert result.converged


def test_gap_bounds_the_excess_objective():  # K = I, c = (1/2, 0), b = (1/2, 1/2): g = (0, 1/2)
    k, c, beta = np.eye(2), np.array([0.5, 0.0]), np.array([0.5, 0.5])
    assert_allclose(in_float64(duality_gap, k, c, beta), 0.25, rtol=1e-15)
    assert_allclose(objective(k, c, beta) - objective(k, c, solve_simplex(k, c).beta), 0.0625)


@pytest.mark.parametrize("rank", [9, 3, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_enumeration_of_supports(seed, rank):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(9, rank))
    k, c = features @ features.T, rng.normal(size=9)
    k = (k + k.T) / 2
    expected = enumerate_supports(k, c)
    for solve in (solve_simplex, interior, frank_wolfe):
        beta = solve(k, c).beta
        assert_allclose(objective(k, c, beta), objective(k, c, expected), atol=1e-8)
        if rank == 9 and solve is not frank_wolfe:  # unique
            assert_allclose(beta, expected, atol=1e-8)


def test_agrees_with_scipy():
    x = clustered(500, seed=0)
    k, c = reduced_set(x[:40], x, gamma=0.5)
    slsqp = minimize(
        lambda b: objective(k, c, b),
        np.full(40, 1 / 40),
        jac=lambda b: k @ b - c,
        bounds=[(0, 1)] * 40,
        constraints={"type": "eq", "fun": lambda b: b.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    for result in (solve_simplex(k, c), interior(k, c)):
        assert_allclose(objective(k, c, result.beta), slsqp.fun, atol=1e-8)


@pytest.mark.parametrize("gamma", [50.0, 0.6, 0.1, 1e-3, 1e-6])
def test_kernel_problems_meet_the_kkt_conditions(gamma):
    x = clustered(1000, seed=1)
    k, c = reduced_set(x[:100], x, gamma)
    exact, inner = solve_simplex(k, c), interior(k, c)
    for result in (exact, inner):
        assert result.converged and result.gap <= 1e-9
        assert_allclose(result.gap, reference_gap(k, c, result.beta), atol=1e-14)
        assert result.beta.min() >= 0
        assert_allclose(result.beta.sum(), 1, rtol=1e-14)
        gradient = k @ result.beta - c
        slack = gradient - gradient.min()
        assert_allclose(slack * result.beta, 0, atol=1e-9)  # complementarity
    assert_allclose(objective(k, c, exact.beta), objective(k, c, inner.beta), atol=1e-8)


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-5])
def test_near_duplicate_points_share_the_weight_of_one(noise):
    x = clustered(500, seed=2)
    z = x[:20]
    twins = np.repeat(z, 2, axis=0) + noise * np.random.default_rng(0).normal(size=(40, 384))
    alone = solve_simplex(*reduced_set(z, x, gamma=0.6))
    k, c = reduced_set(twins, x, gamma=0.6)
    for result in (solve_simplex(k, c), interior(k, c)):
        assert result.converged and reference_gap(k, c, result.beta) <= 1e-9
        assert_allclose(result.beta.reshape(20, 2).sum(1), alone.beta, atol=1e-3)


def test_a_thousand_variables():
    x = clustered(2000, seed=3)
    k, c = reduced_set(x[:1000], x, gamma=0.6)
    result = solve_simplex(k, c)
    assert result.converged and result.beta.min() >= 0
    assert_allclose(result.beta.sum(), 1, rtol=1e-14)
    assert reference_gap(k, c, result.beta) <= 1e-12  # Frank-Wolfe stops near 1e-9; polish is exact


def test_mixture_over_a_large_pool_starts_at_the_best_vertex():
    # c = K w makes w the optimum by construction, with f* = -w'Kw/2.
    rng = np.random.default_rng(4)
    features = np.maximum(rng.normal(size=(2000, 16)) @ rng.normal(size=(16, 100)), 0) / 12
    k = gaussian(features, features, 0.5)
    k = (k + k.T) / 2
    weights = np.zeros(2000)
    weights[[3, 50, 700]] = 0.5, 0.3, 0.2
    c = k @ weights
    result = solve_simplex(k, c)
    assert result.converged
    assert objective(k, c, result.beta) - objective(k, c, weights) <= 1e-9
    assert_allclose(result.beta, weights, atol=1e-4)
    uniform = solve_simplex(k, c, start=np.full(2000, 1 / 2000))
    assert 5 * result.iterations < uniform.iterations  # it need not empty 2,000 coordinates


def test_frank_wolfe_stopped_early_reports_its_true_gap():
    x = clustered(500, seed=5)
    k, c = reduced_set(x[:40], x, gamma=0.6)
    result = in_float64(pairwise_frank_wolfe, k, c, tolerance=1e-9, max_iterations=20)
    excess = objective(k, c, result.beta) - objective(k, c, solve_simplex(k, c).beta)
    assert result.iterations == 20 and not result.converged
    assert_allclose(result.gap, reference_gap(k, c, result.beta), rtol=1e-9)
    assert 1e-9 < excess <= result.gap


def test_unattainable_tolerance_is_reported_not_raised():
    rng = np.random.default_rng(6)
    features = rng.normal(size=(3, 3))
    k, c = features @ features.T + 1e-3 * np.eye(3), 1e-3 * rng.normal(size=3)
    result = solve_simplex((k + k.T) / 2, c, tolerance=-1.0)
    assert not result.converged and result.gap <= 1e-12


@pytest.mark.parametrize("solve", [solve_simplex, interior])
def test_permuting_the_variables_permutes_the_weights(solve):
    x = clustered(500, seed=7)
    k, c = reduced_set(x[:40], x, gamma=0.6)
    order = np.random.default_rng(0).permutation(40)
    permuted = solve(k[np.ix_(order, order)], c[order]).beta
    assert_allclose(permuted, solve(k, c).beta[order], atol=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_interior_point_follows_the_units_of_the_objective(scale):
    x = clustered(500, seed=8)
    k, c = reduced_set(x[:40], x, gamma=0.6)
    assert_allclose(interior(scale * k, scale * c).beta, interior(k, c).beta, atol=1e-8)


@pytest.mark.parametrize("solve", [solve_simplex, interior])
def test_same_bits_twice_and_inputs_untouched(solve):
    x = clustered(500, seed=9)
    k, c = reduced_set(x[:40], x, gamma=0.1)
    k_before, c_before = k.copy(), c.copy()
    first = solve(k, c)
    for a, b in zip(first, solve(k, c), strict=True):
        assert_array_equal(a, b)
    assert_array_equal(k, k_before)
    assert_array_equal(c, c_before)


def test_vmapped_interior_point_equals_single_calls():
    x = clustered(500, seed=10)
    problems = [reduced_set(x[i : i + 20], x, g) for i, g in ((0, 50.0), (20, 0.6), (40, 1e-4))]
    batch = in_float64(jax.vmap(interior_point), *map(np.stack, zip(*problems, strict=True)))
    for i, (k, c) in enumerate(problems):
        assert_allclose(batch.beta[i], interior(k, c).beta, atol=1e-12)
        assert batch.gap[i] <= 1e-9 and batch.converged[i]


@pytest.mark.parametrize("real", [range(20), range(20, 40), range(0, 40, 2), [17]])
def test_masked_variables_do_not_exist(real):
    x = clustered(500, seed=11)
    real = np.array(real)
    k, c = reduced_set(x[real], x, gamma=0.6)
    padded_k, padded_c = np.full((40, 40), np.nan), np.full(40, np.nan)
    padded_k[np.ix_(real, real)], padded_c[real] = k, c
    mask = np.isin(np.arange(40), real)
    result, alone = interior(padded_k, padded_c, mask=mask), interior(k, c)
    assert_array_equal(result.beta[~mask], 0)
    assert_allclose(result.beta[mask], alone.beta, atol=1e-12)
    assert_allclose(result.gap, alone.gap, atol=1e-14)
    assert result.converged


@pytest.mark.parametrize("solve", [interior_point, pairwise_frank_wolfe])
def test_float32_stays_float32(solve):
    x = clustered(500, seed=12)
    k, c = (a.astype(np.float32) for a in reduced_set(x[:40], x, gamma=0.6))
    options = {} if solve is interior_point else dict(tolerance=1e-5, max_iterations=10_000)
    result: QPResult = solve(jnp.asarray(k), jnp.asarray(c), **options)
    assert result.beta.dtype == result.gap.dtype == jnp.float32
    assert result.converged
    beta = np.asarray(result.beta, np.float64)
    assert reference_gap(k.astype(np.float64), c.astype(np.float64), beta / beta.sum()) <= 1e-5


def test_start_at_the_optimum_needs_no_step():
    x = clustered(500, seed=13)
    k, c = reduced_set(x[:40], x, gamma=0.6)
    best = solve_simplex(k, c)
    again = solve_simplex(k, c, start=best.beta)
    assert best.iterations > 0 and again.iterations == 0
    assert_allclose(again.beta, best.beta, atol=1e-12)


def test_polish_solves_the_support_exactly():  # K = I projects c: (3/4, 1/4, 0)
    k, c = np.eye(3), np.array([1.0, 0.5, -2.0])
    beta = in_float64(polish, k, c, np.array([0.7, 0.3, 0.0]))
    assert_allclose(beta, [0.75, 0.25, 0], atol=1e-15)


@pytest.mark.parametrize(
    ("k", "c", "beta"),
    [
        (np.eye(3), [1.0, 0.5, -2.0], [0.6, 0.3, 0.1]),  # the optimum of this support is negative
        (np.ones((2, 2)), [1.0, 0.0], [0.5, 0.5]),  # singular
        (np.eye(1030), np.zeros(1030), np.r_[2, np.ones(1029)] / 1031),  # the first 1,024 do worse
    ],
)
def test_polish_declines(k, c, beta):
    beta = np.array(beta)
    assert_array_equal(in_float64(polish, k, np.array(c), beta), beta)


@pytest.mark.parametrize(
    ("k", "c", "start", "message"),
    [
        (np.eye(3)[:2], np.zeros(3), None, r"shape \(2, 3\)"),
        (np.eye(3), np.zeros(2), None, r"c \(2,\)"),
        (np.zeros((0, 0)), np.zeros(0), None, "n >= 1"),
        (np.diag([1.0, np.nan, np.inf]), np.zeros(3), None, "2 of 3 rows .* first at index 1"),
        (np.eye(3), np.array([0.0, 0.0, np.inf]), None, "1 of 3 rows .* first at index 2"),
        (np.eye(600) + 1e-3 * np.eye(600, k=599), np.zeros(600), None, "transpose by 1.0e-03"),
        (np.eye(3), np.zeros(3), np.ones(2) / 2, r"start has shape \(2,\)"),
        (np.eye(3), np.zeros(3), np.array([2.0, -1.0, 0.0]), "least entry -1"),
        (np.eye(3), np.zeros(3), np.array([0.5, 0.2, 0.2]), "sum 0.9;"),
        (np.eye(3), np.zeros(3), np.array([0.5, 0.5, np.nan]), "non-negative"),
    ],
)
def test_bad_inputs(k, c, start, message):
    with pytest.raises(ValueError, match=message):
        solve_simplex(k, c, start=start)
