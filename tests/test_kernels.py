"""Kernels and blocked sums, against values by hand, derivatives by JAX, and float64 NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import ALL_KERNELS

from learnware_jax.specification.kernels import (
    Gaussian,
    InverseMultiquadric,
    Laplace,
    Linear,
    MultiGaussian,
    deficit_inner,
    deficit_sums,
    from_dict,
    gram,
    mean_embedding,
    median_gamma,
    squared_distances,
    to_dict,
)

EVERY_KERNEL = pytest.mark.parametrize("kernel", ALL_KERNELS, ids=oracle.kernel_name)
N, M, D = 90, 6, 8


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x, z = (rng.standard_normal((rows, D)).astype(np.float32) for rows in (N, M))
    # Of any sign, as they are in the difference of two embeddings.
    return x, z, rng.standard_normal(N).astype(np.float32)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Gaussian(0.5), np.exp(-2)),
        (MultiGaussian(np.array([0.25, 0.5])), (np.exp(-1) + np.exp(-2)) / 2),
        (Laplace(0.5), np.exp(-1)),
        (InverseMultiquadric(2.0), 1 / 3),
        (Linear(), 1.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_two_points_at_distance_two(kernel, expected):
    x, y = np.array([[1.0, 0.0]], np.float32), np.array([[1.0, 2.0]], np.float32)
    assert_allclose(gram(kernel, x, y), [[expected]], rtol=1e-6)
    assert_allclose(gram(kernel, x, x), [[1.0]], rtol=1e-6)  # |x| = 1


@EVERY_KERNEL
@pytest.mark.parametrize(("x64", "tolerance"), [(False, 2e-6), (True, 1e-14)])
def test_gram(data, kernel, x64, tolerance):
    x, z, _ = data
    with jax.enable_x64(x64):
        result = gram(kernel, *(a.astype(np.float64 if x64 else np.float32) for a in (x, z)))
    assert result.dtype == (np.float64 if x64 else np.float32)
    assert_allclose(result, oracle.gram(kernel, x, z), rtol=tolerance, atol=tolerance)


@EVERY_KERNEL
@pytest.mark.parametrize("t", [1e-7, 1e-3, 0.3, 20.0])
def test_deficits_keep_their_digits_however_small(kernel, t):
    t = np.float32(t)  # the oracle must see the same number
    exact = oracle.deficit(kernel, np.float64(t))
    assert_allclose(kernel.deficit(jnp.asarray(t)), exact, rtol=1e-6)
    assert kernel.deficit(jnp.zeros(())) == 0


@EVERY_KERNEL
def test_slope_and_curvature_are_derivatives_of_the_deficit(kernel):
    with jax.enable_x64(True):
        t = jnp.array([0.01, 0.3, 1.0, 7.0])
        # Laplace is rounded off at the origin: shift its argument as the docstring says.
        shift = (0.05 / kernel.gamma) ** 2 if kernel.name == "laplace" else 0.0
        first = jax.grad(lambda t: kernel.deficit(t + shift))
        assert_allclose(kernel.slope(t), jax.vmap(first)(t), rtol=1e-12)
        assert_allclose(kernel.curvature(t), jax.vmap(jax.grad(first))(t), rtol=1e-12)
        at_zero = kernel.slope(jnp.zeros(1)), kernel.curvature(jnp.zeros(1)), [first(-shift)]
        assert np.isfinite(at_zero).all()


def test_squared_distances_by_hand():
    x, y = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 0.0], [3.0, 0.0], [6.0, 8.0]])
    assert_allclose(squared_distances(x, y), [[0, 9, 100], [25, 16, 25]], rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_squared_distances_far_from_the_origin(data, offset):
    x, z = data[0] + np.float32(offset), data[1] + np.float32(offset)
    exact = ((x[:, None].astype(np.float64) - z[None]) ** 2).sum(-1)
    assert_allclose(squared_distances(x, z), exact, atol=4e-6 * np.median(exact))


def test_coincident_rows_have_distance_zero(data):
    x = 1000 + data[0]
    assert_array_equal(np.diagonal(squared_distances(x, x)), 0)


@EVERY_KERNEL
@pytest.mark.parametrize("block", [7, 64])  # neither divides 90 rows or 6 points
def test_blocked_sums_equal_dense_sums(data, kernel, block):
    x, z, a = (values.astype(np.float64) for values in data)
    b = np.arange(M) - 1.5
    dense = oracle.deficit(kernel, ((x[:, None] - z[None]) ** 2).sum(-1))
    with jax.enable_x64(True):
        sums = deficit_sums(kernel, z, x, a, block=block)
        inner = deficit_inner(kernel, x, a, z, b, block=block)
    assert_allclose(sums, a @ dense, rtol=1e-12, atol=1e-12)
    assert_allclose(inner, a @ dense @ b, rtol=1e-12, atol=1e-12)


def test_float32_sums_are_kept_in_float64_where_it_is_on():
    # 4,096 blocks of one row: in float32 the running sum would lose 1e-5.
    x = np.full((4096, D), 0.1, np.float32)
    z, weights = np.zeros((1, D), np.float32), np.ones(4096, np.float32)
    with jax.enable_x64(True):
        sums = deficit_sums(Linear(), z, x, weights, block=1)
    assert sums.dtype == np.float64
    assert_allclose(sums, -4096 * D * 0.1**2 / 2, rtol=3e-7)


def test_jit_changes_nothing(data):
    x, z, weights = data
    compiled = deficit_inner(Laplace(0.7), x, weights, z, weights[:M], block=64)
    with jax.disable_jit():
        eager = deficit_inner(Laplace(0.7), x, weights, z, weights[:M], block=64)
    assert_allclose(eager, compiled, rtol=1e-5)


def test_temporaries_do_not_grow_with_the_rows():
    def temporaries(n):
        arrays = [jax.ShapeDtypeStruct(s, np.float32) for s in ((100, 64), (n, 64), (n,))]
        compiled = deficit_sums.lower(Gaussian(0.5), *arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(5_000), temporaries(50_000)
    assert many < few + 1024 and many < 4 * 2**20  # the numbers of the blocks take 4 bytes each


def test_another_bandwidth_does_not_recompile(data):
    x, z, weights = data
    deficit_sums(Gaussian(0.5), z, x, weights)
    compiled = deficit_sums._cache_size()
    deficit_sums(Gaussian(0.6), z, x, weights)
    assert deficit_sums._cache_size() == compiled


@EVERY_KERNEL
def test_mean_embedding(data, kernel):
    x, z, weights = data
    dense = oracle.gram(kernel, z, x)
    assert_allclose(mean_embedding(kernel, z, x), dense.mean(1), atol=1e-5)
    assert_allclose(mean_embedding(kernel, z, x, weights), dense @ weights, atol=2e-4)
    balanced = np.r_[np.ones(N // 2), -np.ones(N // 2)].astype(np.float32)  # total weight 0
    assert_allclose(mean_embedding(kernel, z, x, balanced), dense @ balanced, atol=2e-4)


@pytest.mark.parametrize(
    "kernel", [k for k in ALL_KERNELS if hasattr(k, "gamma")] + [MultiGaussian([0.5, 2])]
)
def test_parameters_do_not_widen_float32(kernel):
    with jax.enable_x64(True):
        t = jnp.ones(3, jnp.float32)
        assert (
            kernel.deficit(t).dtype == kernel.slope(t).dtype == kernel.curvature(t).dtype == t.dtype
        )


@EVERY_KERNEL
def test_description_round_trip(kernel):
    description = to_dict(kernel)
    assert description["name"] == kernel.name
    assert json.loads(json.dumps(description)) == description
    again = from_dict(description)
    assert type(again) is type(kernel) and to_dict(again) == description
    t = jnp.linspace(0, 3, 7)
    assert_array_equal(again.deficit(t), kernel.deficit(t))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("gaussian", "got 'gaussian'; want a dict whose 'name' is one of"),
        ({"gamma": 1.0}, "want a dict whose 'name'"),
        ({"name": "cosine"}, "'gaussian', 'inverse_multiquadric', 'laplace', 'linear', 'multi"),
        ({"name": ["gaussian"], "gamma": 1.0}, "want a dict whose 'name'"),
        ({"name": "gaussian"}, r"kernel gaussian: got parameters \[\]; want \['gamma'\]"),
        ({"name": "linear", "gamma": 1.0}, r"got parameters \['gamma'\]; want \[\]"),
        ({"name": "laplace", "gamma": 1.0, "p": 2}, r"got parameters \['gamma', 'p'\]"),
        ({"name": "gaussian", "gamma": 0.0}, "gamma=0.0; want one positive number"),
        ({"name": "gaussian", "gamma": -1}, "gamma=-1; want one positive"),
        ({"name": "gaussian", "gamma": np.nan}, "gamma=nan; want one positive"),
        ({"name": "gaussian", "gamma": np.inf}, "gamma=inf; want one positive"),
        ({"name": "gaussian", "gamma": 10**400}, "want one positive"),
        ({"name": "gaussian", "gamma": "0.5"}, "gamma='0.5'; want one positive"),
        ({"name": "gaussian", "gamma": True}, "gamma=True; want one positive"),
        ({"name": "gaussian", "gamma": None}, "gamma=None; want one positive"),
        ({"name": "gaussian", "gamma": [0.5]}, r"gamma=\[0.5\]; want one positive"),
        ({"name": "multi_gaussian", "gammas": 0.5}, "gammas=0.5; want a list of positive"),
        ({"name": "multi_gaussian", "gammas": []}, r"gammas=\[\]; want a list of positive"),
        ({"name": "multi_gaussian", "gammas": [1.0, 0.0]}, "want a list of positive"),
        ({"name": "multi_gaussian", "gammas": [1.0, [2.0]]}, "want a list of positive"),
    ],
)
def test_bad_descriptions(description, message):
    with pytest.raises(ValueError, match=message):
        from_dict(description)


def test_median_gamma_by_hand():  # squared distances of 0, 1, 3 on a line: 1, 4, 9
    x = np.array([[0.0], [1.0], [3.0]])
    assert median_gamma(jax.random.key(0), x) == 0.25
    assert median_gamma(jax.random.key(0), 1e-8 * x) == np.float32(0.25e16)
    assert median_gamma(jax.random.key(0), 2**20 + x) == 0.25


def test_median_gamma_of_a_subsample(data):
    x = data[0]
    square = ((x[:, None] - x[None]).astype(np.float64) ** 2).sum(-1)
    whole = 1 / np.median(square[np.triu_indices(N, 1)])
    key = jax.random.key(1)
    assert_allclose(median_gamma(key, x), whole, rtol=1e-6)
    some = median_gamma(key, x, max_rows=30)
    assert some != whole and abs(some / whole - 1) < 0.2
    assert median_gamma(key, x, max_rows=30) == some == np.float32(some)
    assert median_gamma(jax.random.key(2), x, max_rows=30) != some
    with jax.enable_x64(True):
        assert median_gamma(key, x, max_rows=30) == some


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((1, 3)), r"median_gamma: got 1 row\(s\); want at least 2"),
        (
            np.array([[1.0], [1.0], [1.0], [1.0], [1.3]]),
            "median squared distance of 0; .*duplicate",
        ),
        (np.array([[0.3], [np.nan], [0.1]]), "median squared distance of nan"),
    ],
)
def test_median_gamma_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        median_gamma(jax.random.key(0), x)
