"""Distances between embeddings: values by hand, closed forms of Gaussians, float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import ALL_KERNELS

from learnware_jax.specification.kernels import Gaussian, Laplace, Linear
from learnware_jax.specification.rkme import (
    RKME,
    check_rkme,
    check_rows,
    from_rows,
    inner,
    on_sphere,
    self_deficit,
    squared_mmd,
    squared_mmd_unbiased,
    unbias,
    witness,
)

EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS, ids=oracle.kernel_name)
N, D = 60, 8


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return oracle.unit_rows(rng, N, D), oracle.unit_rows(rng, N, D)


def weighted(rng, *, total):
    """Points with weights of both signs that sum to `total`."""
    beta = rng.standard_normal(N) / N
    beta += (total - beta.sum()) / N
    return RKME(rng.standard_normal((N, D)).astype(np.float32), beta)


def points(*z, beta):
    return RKME(np.array(z, np.float32), np.array(beta, np.float32))


# At squared distance 4 and with unit weights, |phi(x) - phi(y)|^2 = 2 - 2 k; c = (2, 0) has norm 2.
@pytest.mark.parametrize(
    ("kernel", "k"), [(Gaussian(0.5), np.exp(-2)), (Laplace(0.5), np.exp(-1))], ids=str
)
def test_two_points_by_hand(kernel, k):
    p, q = points([1, 0], beta=[1]), points([1, 2], beta=[1])
    assert_allclose(squared_mmd(p, q, kernel), 2 - 2 * k, rtol=1e-6)
    assert_allclose(inner(p, q, kernel), k, rtol=1e-6)
    # |2 phi(x) + 3 phi(y)|^2 = 4 + 9 + 12 k
    p, q = p._replace(beta=np.float32([2])), q._replace(beta=np.float32([-3]))
    assert_allclose(squared_mmd(p, q, kernel), 13 + 12 * k, rtol=1e-6)
    # A pair against one of its points: |phi(x)/2 + phi(y)/2 - phi(x)|^2 = (1 - k) / 2.
    pair = points([1, 0], [1, 2], beta=[0.5, 0.5])
    assert_allclose(squared_mmd(pair, points([1, 0], beta=[1]), kernel), (1 - k) / 2, rtol=1e-6)


def test_linear_kernel_gives_the_distance_of_weighted_means():
    p = points([1, 0], [3, 2], beta=[0.25, 0.75])  # mean (2.5, 1.5)
    q = points([0, 0], [1, 1], beta=[1.0, 0.5])  # (0.5, 0.5), weights sum to 1.5
    assert_allclose(squared_mmd(p, q, Linear()), 2**2 + 1**2, rtol=1e-6)
    assert_allclose(inner(p, q, Linear()), 2.5 * 0.5 + 1.5 * 0.5, rtol=1e-6)


def normal(mean, scale, nodes=24):
    """A one-dimensional normal as weighted points that integrate it to rounding (Gauss-Hermite)."""
    t, w = np.polynomial.hermite_e.hermegauss(nodes)
    return RKME((mean + scale * t)[:, None], w / w.sum())


@pytest.mark.parametrize(("a", "s", "b", "r"), [(0, 1, 1.5, 0.5), (0, 1, 0, 0.5), (2, 1, 2.1, 1)])
def test_normal_distributions(a, s, b, r):
    """For X ~ N(a, s^2), Y ~ N(b, r^2) and v = 1 + 2 gamma (s^2 + r^2):

    E exp(-gamma (X - Y)^2) = v^(-1/2) exp(-gamma (a - b)^2 / v).
    """
    gamma = 0.2

    def expected(a, s, b, r):
        v = 1 + 2 * gamma * (s**2 + r**2)
        return np.exp(-gamma * (a - b) ** 2 / v) / np.sqrt(v)

    exact = expected(a, s, a, s) + expected(b, r, b, r) - 2 * expected(a, s, b, r)
    with jax.enable_x64(True):
        result = squared_mmd(normal(a, s), normal(b, r), Gaussian(gamma))
    assert_allclose(result, exact, rtol=1e-6)


@EVERY_KERNEL
@pytest.mark.parametrize("totals", [(1, 1), (0.3, -2), (0, 0)], ids=str)
def test_any_weights(kernel, totals):
    rng = np.random.default_rng(1)
    p, q = weighted(rng, total=totals[0]), weighted(rng, total=totals[1])
    for x64, tolerance in ((False, 1e-5), (True, 1e-13)):
        with jax.enable_x64(x64):
            wide = [RKME(s.z.astype(np.float64), s.beta) for s in (p, q)]
            distance, product = squared_mmd(*wide, kernel), inner(*wide, kernel)
        assert distance.dtype == (np.float64 if x64 else np.float32)
        assert_allclose(distance, oracle.squared_mmd(kernel, p, q), atol=tolerance)
        assert_allclose(product, oracle.inner(kernel, p, q), atol=tolerance)


@EVERY_KERNEL
def test_float32_error_on_unit_rows(rows, kernel):
    x, y = map(from_rows, rows)
    exact = oracle.squared_mmd(kernel, x, y)
    assert abs(squared_mmd(x, y, kernel) - exact) < 4e-7
    with jax.enable_x64(True):  # float32 distances, float64 sums
        assert abs(squared_mmd(x, y, kernel) - exact) < 1e-7


@EVERY_KERNEL
def test_permuted_copy_is_at_distance_zero(rows, kernel):
    x = rows[0]
    copy = x[np.random.default_rng(2).permutation(N)]
    assert abs(squared_mmd(from_rows(x), from_rows(copy), kernel)) < 4e-7


@EVERY_KERNEL
def test_far_from_the_origin(kernel):
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((N, D)).astype(np.float32) for _ in range(2))
    far = [from_rows(1000 + a) for a in (x, y + np.float32(0.1))]
    near = [RKME(s.z.astype(np.float64) - 1000, s.beta) for s in far]
    with jax.enable_x64(True):  # float32 distances, float64 sums
        assert_allclose(squared_mmd(*far, kernel), oracle.squared_mmd(kernel, *near), atol=3e-6)


@EVERY_KERNEL
def test_unbiased_is_the_u_statistic(rows, kernel):
    p, q = map(from_rows, rows)
    result = squared_mmd_unbiased(p, q, kernel, n_p=N, n_q=N)
    assert_allclose(result, oracle.squared_mmd_unbiased(kernel, *rows), atol=5e-7)


def test_unbiased_with_samples_of_different_size(rows):
    x, y = rows[0][:7], rows[1]
    result = squared_mmd_unbiased(from_rows(x), from_rows(y), Gaussian(0.5), n_p=7, n_q=N)
    assert_allclose(result, oracle.squared_mmd_unbiased(Gaussian(0.5), x, y), atol=5e-7)


def test_unbiased_of_one_row_keeps_its_own_term(rows):
    one, y = rows[0][:1], rows[1]
    result = squared_mmd_unbiased(from_rows(one), from_rows(y), Gaussian(0.5), n_p=1, n_q=N)
    k, cross = (oracle.gram(Gaussian(0.5), a, y) for a in (y, one))
    assert_allclose(result, 1 + (k.sum() - N) / (N * (N - 1)) - 2 * cross.mean(), atol=5e-7)


def test_unbiased_estimates_average_to_the_truth():
    # Samples of 5 from N(0, 1) and N(1, 1): with gamma = 1/4, E k is 2^(-1/2), times e^(-1/8)
    # across; the biased estimate is off by 2 (1 - 2^(-1/2)) / 5 = 0.117.
    x = np.random.default_rng(4).standard_normal((2, 4000, 5, 1))
    one = jax.jit(
        jax.vmap(
            lambda x, y: squared_mmd_unbiased(
                RKME(x, jnp.full(5, 0.2)),
                RKME(y + 1, jnp.full(5, 0.2)),
                Gaussian(0.25),
                n_p=5,
                n_q=5,
            )
        )
    )
    draws = np.asarray(one(*x))
    truth = 2 * 2**-0.5 * (1 - np.exp(-0.125))
    assert abs(draws.mean() - truth) < 4 * draws.std() / np.sqrt(len(draws)) < 0.02


def test_unbias():  # two rows at deficit -1: the V-statistic is -1/2, the pair i != j has -1
    assert unbias(-0.5, 2) == -1
    assert unbias(-0.5, 1) == -0.5


@EVERY_KERNEL
def test_self_deficit_is_what_the_constant_leaves(rows, kernel):
    p = from_rows(rows[0])  # unit norm: the constant part is 1 for every kernel
    assert_allclose(self_deficit(p, kernel), oracle.inner(kernel, p, p) - 1, atol=5e-7)


@jax.jit
def gradient(z, beta, q, kernel):
    return jax.grad(lambda z: squared_mmd(RKME(z, beta), q, kernel))(z)


@EVERY_KERNEL
def test_gradient_of_the_points(kernel):
    rng = np.random.default_rng(5)
    z, beta = rng.standard_normal((4, 3)), np.array([0.4, 0.3, 0.2, 0.1])
    q = RKME(rng.standard_normal((5, 3)), np.full(5, 0.2))
    with jax.enable_x64(True):
        result = gradient(z, beta, q, kernel)
    for i in np.ndindex(4, 3):
        step = np.zeros((4, 3))
        step[i] = 1e-5
        ahead, behind = (oracle.squared_mmd(kernel, RKME(a, beta), q) for a in (z + step, z - step))
        assert_allclose(result[i], (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)
    # Points that coincide pull each other nowhere: together they feel what one would alone.
    z[1] = z[0]
    with jax.enable_x64(True):
        twins = gradient(z, beta, q, kernel)
        merged = gradient(z, np.array([0.7, 0.0, 0.2, 0.1]), q, kernel)
    assert_allclose(twins[0] + twins[1], merged[0], rtol=1e-12)
    assert_allclose(twins[2:], merged[2:], rtol=1e-12)


def test_witness_by_hand():  # at x: 1 - exp(-2), at y: exp(-2) - 1, halfway 0
    p, q = points([0, 0], beta=[1]), points([0, 2], beta=[1])
    values = witness(p, q, Gaussian(0.5), np.array([[0, 0], [0, 2], [0, 1]], np.float32))
    assert_allclose(values, [1 - np.exp(-2), np.exp(-2) - 1, 0], atol=1e-6)


@EVERY_KERNEL
def test_witness(kernel):
    rng = np.random.default_rng(6)
    p, q = weighted(rng, total=0.7), weighted(rng, total=0)
    x = rng.standard_normal((7, D)).astype(np.float32)
    expected = oracle.gram(kernel, x, p.z) @ p.beta - oracle.gram(kernel, x, q.z) @ q.beta
    assert_allclose(witness(p, q, kernel, x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_narrow_rows_are_widened_first(dtype):
    rng = np.random.default_rng(7)
    x, y = ((3 * rng.standard_normal((N, D))).astype(dtype) for _ in range(2))
    p, q = from_rows(x), from_rows(y)
    exact = oracle.squared_mmd(Gaussian(0.05), p, q)
    assert_allclose(squared_mmd(p, q, Gaussian(0.05)), exact, atol=4e-7)


def test_from_rows_weighs_rows_equally():
    spec = from_rows(np.eye(4, 3))
    assert_array_equal(spec.z, np.eye(4, 3))
    assert_array_equal(spec.beta, [0.25] * 4)
    assert check_rkme(spec) is spec


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([[0.6, 0.8], [0, -1]], True),
        ([[0.6, 0.8], [0, 0]], False),
        ([[1.0009, 0]], True),
        ([[1.0012, 0]], False),
        ([[0.9988, 0]], False),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_on_sphere(x, expected, dtype):
    assert on_sphere(np.array(x, dtype)) is expected


def test_on_sphere_sums_half_precision_in_float32():
    assert on_sphere(oracle.unit_rows(np.random.default_rng(8), 50, 384).astype(np.float16))


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.array([["a"]]), TypeError, "here: got <U1 values; want rows"),
        (np.array([[True]]), TypeError, "here: got bool values"),
        (np.array([[None]]), TypeError, "here: got object values"),
        (np.array([[1j]]), TypeError, "here: got complex128 values"),
        (np.ones(3), ValueError, r"here: got shape \(3,\); want rows \(n, d\)"),
        (np.ones((2, 3, 4)), ValueError, r"here: got shape \(2, 3, 4\); want rows"),
        (np.ones((0, 3)), ValueError, r"here: got shape \(0, 3\); want at least one row"),
        (np.ones((3, 0)), ValueError, r"here: got shape \(3, 0\); want at least one row"),
        ([[1, 2], [NAN, 0], [0, INF], [3, 4]], ValueError, "2 of 4 rows hold NaN or inf.* row 1;"),
        ([[1, 2], [3, 4], [0, -INF]], ValueError, "1 of 3 rows hold .* the first is row 2;"),
        ([[1, 2], [1e308, 0]], ValueError, "1 of 2 rows .* or overflow float32, .* row 1;"),
        (np.float16([[1, 2], [NAN, 0]]), ValueError, "1 of 2 rows .* row 1;"),
    ],
)
def test_check_rows_refuses(x, error, message):
    before = np.array(x)
    with pytest.raises(error, match=message):
        check_rows(x, where="here")
    assert_array_equal(np.array(x), before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_check_rows_returns_the_same_array(dtype):
    x = np.arange(6, dtype=dtype).reshape(3, 2)
    assert check_rows(x, where="here") is x


def test_the_largest_rows_that_pass_have_finite_distances():
    limit = np.sqrt(np.finfo(np.float32).max / 4)
    x = np.array([[0.999 * limit, 0], [-0.999 * limit, 0]], np.float32)
    check_rows(x, where="here")
    assert squared_mmd(from_rows(x[:1]), from_rows(x[1:]), Gaussian(1.0)) == 2
    with pytest.raises(ValueError, match="overflow"):
        check_rows(1.002 * x, where="here")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": np.full((2, 1), NAN)}, ValueError, "spec: z: 2 of 2 rows hold NaN"),
        ({"z": np.ones(2)}, ValueError, r"spec: z: got shape \(2,\)"),
        ({"z": np.array([["a"]])}, TypeError, "spec: z: got <U1 values"),
        ({"beta": np.ones(3) / 3}, ValueError, r"spec: got beta of shape \(3,\) .* for 2 points"),
        ({"beta": np.ones((2, 1)) / 2}, ValueError, r"got beta of shape \(2, 1\)"),
        ({"beta": np.array([1, 0])}, ValueError, "and type int64 for 2 points; want one floating"),
        ({"beta": np.array([NAN, INF])}, ValueError, "spec: 2 weights are NaN or infinite"),
        ({"beta": np.array([-0.2, 1.2])}, ValueError, "a smallest weight of -0.2 and a sum of 1."),
        ({"beta": np.array([0.5, 0.4])}, ValueError, "smallest weight of 0.4 and a sum of 0.9."),
    ],
)
def test_check_rkme_refuses(change, error, message):
    spec = RKME(np.array([[0.0], [1.0]]), np.array([0.5, 0.5]))._replace(**change)
    with pytest.raises(error, match=message):
        check_rkme(spec, where="spec")


def test_signed_weights_are_a_choice_by_name():
    spec = RKME(np.eye(2), np.array([-0.5, 3.0]))
    assert check_rkme(spec, signed=True) is spec
    with pytest.raises(ValueError, match="check_rkme: 1 weights are NaN"):
        check_rkme(spec._replace(beta=np.array([NAN, 1])), signed=True)
    # Weights of a float32 program sum to one within its rounding.
    check_rkme(RKME(np.eye(100), np.full(100, 0.01, np.float32)))
