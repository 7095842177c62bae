"""Reduced sets: certificates and residuals in float64 NumPy, edge cases, and equal results."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.specification import kernels
from learnware_jax.specification import reduce as reduce_module
from learnware_jax.specification.kernels import Gaussian, Linear
from learnware_jax.specification.reduce import REDUCERS, Reduced, reduce, reduce_many
from learnware_jax.specification.rkme import RKME, from_rows

# One shape for nearly all tests: Gauss-Newton compiles once for it, padded to 128 rows.
N, M, D = 120, 6, 8
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    centres = oracle.unit_rows(rng, 6, D, spread=3)
    rows = centres[rng.integers(6, size=N)] + 0.15 * rng.standard_normal((N, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def kernel(x):
    return Gaussian(kernels.median_gamma(KEY, x))


def residual(kernel, x, result):
    return oracle.squared_mmd(kernel, from_rows(np.asarray(x, np.float64)), result.spec)


def assert_same(a: Reduced, b: Reduced):
    jax.tree.map(assert_array_equal, a, b)


def assert_sound(kernel, x, result, points):
    assert result.spec.z.shape == (points, x.shape[1]) and result.n == len(x)
    assert np.isfinite(result.spec.z).all()
    assert result.spec.beta.min() >= 0
    assert_allclose(result.spec.beta.sum(), 1, rtol=1e-12)
    assert_allclose(result.residual, residual(kernel, x, result), atol=4e-7)


def test_gauss_newton_is_far_better_than_the_baselines(x, kernel):
    mine = reduce(KEY, x, M, kernel)
    assert mine.iterations > 0
    for method, factor in (("random", 3), ("herding", 3), ("kmeans", 1.5)):
        other = reduce(KEY, x, M, kernel, method=method)
        assert factor * mine.residual < other.residual, method
    # It hardly matters where it starts.
    others = [reduce(jax.random.key(i), x, M, kernel).residual for i in range(1, 4)]
    assert max(others) < 2 * mine.residual


def test_no_step_leaves_the_start(x, kernel):
    start = reduce(KEY, x, M, kernel, method="random")
    stopped = reduce(KEY, x, M, kernel, steps=0)
    assert stopped.iterations == 0
    assert_array_equal(stopped.spec.z, start.spec.z)


def test_points_stay_on_the_sphere_only_where_rows_lie_on_it(x, kernel):
    unit = reduce(KEY, x, M, kernel).spec.z
    assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    scaled = x * np.linspace(0.5, 2, N, dtype=np.float32)[:, None]
    result = reduce(KEY, scaled, M, kernel)
    assert_sound(kernel, scaled, result, M)
    assert np.abs(np.linalg.norm(result.spec.z, axis=1) - 1).max() > 0.1
    assert 2 * result.residual < reduce(KEY, scaled, M, kernel, method="random").residual
    # Where the origin lies means nothing to a kernel of differences.
    far = reduce(KEY, 1000 + scaled, M, kernel)
    near = reduce(KEY, (1000 + scaled) - np.float32(1000), M, kernel)
    assert_allclose(far.residual, near.residual, rtol=0.02)
    assert far.residual == pytest.approx(residual(kernel, 1000 + scaled, far), abs=4e-7)


@pytest.mark.parametrize("method", ["random", "kmeans"])
def test_linear_weights_far_from_the_origin(x, method):
    far = 1000 + x
    result = reduce(KEY, far, M, Linear(), method=method)
    near = result._replace(spec=result.spec._replace(z=result.spec.z.astype(np.float64) - 1000))
    assert_allclose(result.residual, residual(Linear(), far - 1000.0, near), atol=1e-6)
    assert result.gap < 1e-9


@pytest.mark.parametrize("n", [1, 4, M])
@pytest.mark.parametrize("method", REDUCERS)
def test_no_more_rows_than_points(x, kernel, method, n):
    result = reduce(KEY, x[:n], M, kernel, method=method)
    assert_sound(kernel, x[:n], result, len(result.spec.beta))
    if method == "herding":
        assert len(result.spec.beta) <= n
    else:
        z, rows = (np.unique(a, axis=0) for a in (result.spec.z, x[:n]))
        assert_allclose(z, rows, atol=0 if method != "kmeans" else 1e-7)
        assert_allclose(result.spec.beta, 1 / n, atol=1e-5)
        assert abs(result.residual) < 4e-7


def test_fewer_rows_than_points_are_logged(x, kernel, caplog):
    with caplog.at_level("INFO"):
        reduce_many(KEY, [x[:M], x[:4]], M, kernel, method="random")
    assert caplog.messages == ["reduce: sample 1 has 4 rows, so it gets as many points."]


@pytest.mark.parametrize("kernel", [Gaussian(0.5), Linear()], ids=oracle.kernel_name)
def test_herding_weighs_its_picks_by_their_number(x, kernel):
    # Few different rows of several lengths, so that some are picked again.
    rows = np.repeat(x[:5] * np.arange(1, 6, dtype=np.float32)[:, None] / 4, N // 5, axis=0)
    k = oracle.gram(kernel, rows, rows)
    picks = []
    for t in range(1, M + 1):
        picks.append(int(np.argmax(np.round(t * k.mean(1) - sum(k[s] for s in picks), 6))))
    index, counts = np.unique(picks, return_counts=True)
    assert counts.max() > 1
    spec = reduce(KEY, rows, M, kernel, method="herding").spec
    for i, count in zip(index, counts, strict=True):
        assert_allclose(spec.beta[(spec.z == rows[i]).all(1)].sum(), count / M)


def test_one_row_from_noise_is_found(x, kernel):  # the optimum is the row itself
    result = reduce(KEY, x[:1], M, kernel, start="noise")
    assert_allclose(result.spec.z, x[:1], atol=1e-3)
    assert_array_equal(result.spec.beta, [1.0])
    assert abs(result.residual) < 1e-6


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("method", REDUCERS)
def test_degenerate_rows(x, kernel, method):
    twins = np.tile(x[:2], (N // 2, 1))  # two different rows
    equal = np.tile(x[:1], (N, 1))
    zero = np.concatenate([x[: N - 1], np.zeros((1, D), np.float32)])
    antipodes = np.concatenate([twins[: N // 2], -twins[: N // 2]])
    for rows in (twins, equal, zero, antipodes):
        result = reduce(KEY, rows, M, kernel, method=method)
        assert_sound(kernel, rows, result, len(result.spec.beta))
        if rows is equal:  # one point says all
            assert abs(result.residual) < 1e-6


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_other_types_mean_their_values(x, kernel, dtype):
    rows = (4 * x).astype(dtype)
    assert_same(reduce(KEY, rows, M, kernel), reduce(KEY, rows.astype(np.float32), M, kernel))


def test_results_do_not_depend_on_x64_or_on_where_rows_live(x, kernel, tmp_path):
    expected = reduce(KEY, x, M, kernel)
    assert expected.spec.z.dtype == np.float32 and expected.spec.beta.dtype == np.float64
    with jax.enable_x64(True):
        assert_same(reduce(KEY, x, M, kernel), expected)
    assert_same(reduce(KEY, jax.numpy.asarray(x), M, kernel), expected)
    np.save(tmp_path / "x.npy", x)
    assert_same(reduce(KEY, np.load(tmp_path / "x.npy", mmap_mode="r"), M, kernel), expected)
    assert_same(reduce(jax.random.PRNGKey(0), x, M, kernel), expected)


def test_a_batch_gives_what_its_samples_give(x, kernel):
    samples = [x[:70], x[:4], x[20:], 2 * x, x]  # unit norm, too few, unit norm, not, unit norm
    batch = reduce_many(KEY, samples, M, kernel)
    for i, sample in enumerate(samples):
        # Rows that are returned as they are keep the place, and with it the random numbers.
        alone = reduce_many(KEY, [*[x[:2]] * i, sample], M, kernel)[i]
        assert batch[i].n == len(sample)
        assert_allclose(batch[i].residual, alone.residual, rtol=2e-3, atol=1e-6)
        assert_allclose(batch[i].spec.z, alone.spec.z, atol=0.02)
        assert_sound(kernel, sample, batch[i], min(M, len(sample)))


def test_samples_of_similar_size_share_compiled_programs(x, kernel):
    programs = (
        reduce_module._gauss_newton,
        reduce_module.deficit_sums,
        reduce_module.deficit_inner,
    )
    reduce(KEY, x, M, kernel)
    compiled = [program._cache_size() for program in programs]
    for n in (70, 99, 128):
        reduce(KEY, np.concatenate([x, x])[:n], M, Gaussian(0.3))
    assert [program._cache_size() for program in programs] == compiled


def test_noise_start_keeps_away_from_rows(x, kernel):
    def nearest(result):
        return np.linalg.norm(x[:, None] - result.spec.z[None], axis=-1).min(0)

    start = reduce(KEY, x, M, kernel, start="noise", steps=0)
    assert nearest(start).min() > 0.1
    assert nearest(reduce(KEY, x, M, kernel, steps=0)).max() == 0
    end = reduce(KEY, x, M, kernel, start="noise")
    assert nearest(end).min() > 0.01
    assert_allclose(np.linalg.norm(start.spec.z, axis=1), 1, atol=1e-6)
    assert_sound(kernel, x, end, M)
    assert end.residual < 2.5 * reduce(KEY, x, M, kernel).residual
    # Off the sphere it has the mean and the variance of the sample.
    tall = np.random.default_rng(1).standard_normal((N, D)) * np.arange(1, D + 1) + 7
    z = np.concatenate(
        [
            reduce(jax.random.key(i), tall, M, kernel, start="noise", steps=0).spec.z
            for i in range(9)
        ]
    )
    assert_allclose(z.mean(0), 7, atol=4)
    assert_allclose(z.std(0), np.arange(1, D + 1), rtol=0.4)


def test_large_samples_weigh_all_rows_and_estimate_the_residual(x, kernel, monkeypatch):
    # Ordered, so that a subsample of the first rows would show.
    x = x[np.argsort(x[:, 0])]
    exact = residual(kernel, x, reduce(KEY, x, 40, kernel, method="herding"))
    monkeypatch.setattr(reduce_module, "FIT_ROWS", 70)
    monkeypatch.setattr(reduce_module, "RESIDUAL_ROWS", 70)
    fitted = reduce(KEY, x, M, kernel)
    # The points come from a part of the rows; their weights are optimal for all.
    k, c = (
        oracle.gram(kernel, fitted.spec.z, fitted.spec.z),
        oracle.gram(kernel, fitted.spec.z, x).mean(1),
    )
    gradient = k @ fitted.spec.beta - c
    assert gradient @ fitted.spec.beta - gradient.min() < 1e-6
    # Herding draws nothing here, so only the residual's pairs differ between keys.
    draws = np.array(
        [reduce(jax.random.key(i), x, 40, kernel, method="herding").residual for i in range(100)]
    )
    assert 0 < draws.std() < 0.004  # 0.0057 for pairs that are not centred at the reduced set
    assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(len(draws))


def test_long_samples_are_read_in_pieces(x, kernel, monkeypatch):
    monkeypatch.setattr(reduce_module, "_BLOCK", 4)  # pieces of 64 rows: the last one is short
    result = reduce(KEY, x, M, kernel, method="random")
    assert_sound(kernel, x, result, M)


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).dirichlet(np.full(N, 0.3))


@pytest.mark.parametrize("method", REDUCERS)
def test_rows_count_by_their_weights(x, kernel, weights, method):
    result = reduce(KEY, x, M, kernel, method=method, weights=weights)
    target = RKME(x.astype(np.float64), weights)
    exact = oracle.squared_mmd(kernel, target, result.spec)
    assert_allclose(result.residual, exact, atol=4e-7)
    assert result.n == N
    k, c = oracle.gram(kernel, result.spec.z, result.spec.z), oracle.gram(kernel, result.spec.z, x)
    gradient = k @ result.spec.beta - c @ weights
    gap = gradient @ result.spec.beta - gradient.min()
    assert_allclose(result.gap, gap, atol=1e-6)
    if method != "random":  # which may be lucky: what does not see the weights is further away
        blind = reduce(KEY, x, M, kernel, method=method).spec
        assert exact < 0.8 * oracle.squared_mmd(kernel, target, blind)


@pytest.mark.parametrize("method", ["gauss_newton", "kmeans", "herding"])
def test_a_weight_is_as_good_as_repetition(x, kernel, method):
    rows, times = x[:60], np.arange(60) % 3 + 1
    repeated = reduce(KEY, np.repeat(rows, times, 0), M, kernel, method=method, start="noise")
    weighted = reduce(KEY, rows, M, kernel, method=method, start="noise", weights=times / 120)
    if method == "herding":
        order = [np.lexsort(r.spec.z.T) for r in (repeated, weighted)]
        assert_allclose(repeated.spec.z[order[0]], weighted.spec.z[order[1]], atol=1e-6)
    assert_allclose(weighted.residual, repeated.residual, rtol=0.05, atol=4e-7)


def test_one_centre_of_kmeans_is_the_weighted_mean(x, kernel, weights):
    result = reduce(KEY, x, 1, kernel, method="kmeans", weights=weights)
    assert_allclose(result.spec.z[0], weights @ x, atol=1e-6)


def test_equal_weights_are_none(x, kernel):
    plain = reduce(KEY, x, M, kernel, start="noise")
    equal = reduce(KEY, x, M, kernel, start="noise", weights=np.full(N, 1 / N, np.float32))
    assert_allclose(equal.spec.z, plain.spec.z, atol=0.02)
    assert_allclose(equal.residual, plain.residual, rtol=2e-3)


def test_rows_of_weight_zero_are_left_out(x, kernel):
    weights = np.where(np.arange(N) % 2, 2 / N, 0)
    result = reduce(KEY, x, M, kernel, weights=weights)
    assert_same(result, reduce(KEY, x[1::2], M, kernel, weights=weights[1::2]))
    assert result.n == N // 2
    few = reduce(KEY, x[:4], M, kernel, weights=np.array([0.5, 0.0, 0.2, 0.3]))
    assert_array_equal(few.spec.z, x[[0, 2, 3]])
    assert_array_equal(few.spec.beta, [0.5, 0.2, 0.3])
    assert abs(few.residual) < 4e-7


def test_starts_follow_the_weights(x, kernel):
    heavy = np.where(np.arange(N) < M, 0.999 / M, 0.001 / (N - M))
    started = reduce(KEY, x, M, kernel, steps=0, weights=heavy).spec.z
    assert np.mean([(x[:M] == z).all(1).any() for z in started]) > 0.7
    tall = np.random.default_rng(1).standard_normal((N, D)) * 3 + 7
    tall[:M] = np.arange(M)[:, None]
    z = np.concatenate(
        [
            reduce(jax.random.key(i), tall, M, kernel, start="noise", steps=0, weights=heavy).spec.z
            for i in range(9)
        ]
    )
    assert_allclose(z.mean(0), 2.5, atol=1)
    assert_allclose(z.std(0), np.std(np.arange(M)), rtol=0.4)


def test_large_weighted_samples_weigh_all_rows_and_estimate_the_residual(
    x, kernel, weights, monkeypatch
):
    monkeypatch.setattr(reduce_module, "FIT_ROWS", 70)
    monkeypatch.setattr(reduce_module, "RESIDUAL_ROWS", 70)
    monkeypatch.setattr(reduce_module, "_BLOCK", 4)  # pieces of 64 rows
    fitted = reduce(KEY, x, M, kernel, weights=weights)
    k = oracle.gram(kernel, fitted.spec.z, fitted.spec.z)
    gradient = k @ fitted.spec.beta - oracle.gram(kernel, fitted.spec.z, x) @ weights
    assert gradient @ fitted.spec.beta - gradient.min() < 1e-6
    # The points are drawn to where the weight is.
    target = RKME(x.astype(np.float64), weights)
    blind = reduce(KEY, x, M, kernel).spec
    exact = oracle.squared_mmd(kernel, target, fitted.spec)
    assert exact < 0.8 * oracle.squared_mmd(kernel, target, blind)
    # Herding draws nothing here, so only the residual's pairs differ between keys.
    runs = [
        reduce(jax.random.key(i), x, 40, kernel, method="herding", weights=weights)
        for i in range(100)
    ]
    exact = oracle.squared_mmd(kernel, target, runs[0].spec)
    draws = np.array([run.residual for run in runs])
    assert draws.std() > 0
    assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(len(draws))


def test_one_row_may_weigh_nearly_all_of_a_large_sample(x, kernel, monkeypatch):
    monkeypatch.setattr(reduce_module, "FIT_ROWS", 70)
    weights = np.where(np.arange(N) == 7, 1.0, 1e-12)
    result = reduce(KEY, x, M, kernel, weights=weights / weights.sum())
    assert len(result.spec.beta) == M
    assert abs(result.residual) < 1e-6


SHARES = np.full(3, 1 / 3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([SHARES, SHARES], "reduce: got 2 arrays of weights, 1 samples; want as many"),
        ([np.full(2, 0.5)], r"sample 0: got beta of shape \(2,\) .* for 3 points; want one"),
        ([np.array([0.5, 0.6, -0.1])], "sample 0: weights must be non-negative and sum to one"),
        (
            [SHARES * 2],
            "non-negative and sum to one; got a smallest weight of 0.667 and a sum of 2",
        ),
        ([np.array([np.nan, 0.5, 0.5])], "sample 0: 1 weights are NaN"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        reduce_many(KEY, [np.eye(3)], 2, Gaussian(1.0), weights=weights)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"m": 0}, ValueError, "reduce: got m=0, steps=50; want m >= 1 and steps >= 0"),
        ({"m": -3}, ValueError, "got m=-3"),
        ({"steps": -1}, ValueError, "got m=2, steps=-1"),
        ({"method": "lloyd"}, ValueError, "got method='lloyd', start='rows'; want a method of"),
        ({"start": "kmeans"}, ValueError, r"start='kmeans'; .* a start of \('rows', 'noise'\)"),
        ({"samples": [np.eye(3), np.ones((0, 3))]}, ValueError, r"reduce: sample 1: got shape \(0"),
        ({"samples": [np.eye(3), np.eye(2)]}, ValueError, r"dimensions \[2, 3\]; embed all"),
        ({"samples": [np.diag([1, np.nan])]}, ValueError, "sample 0: 1 of 2 rows .* row 1; remove"),
        ({"samples": [np.diag([1e308, 1])]}, ValueError, "sample 0: 1 of 2 rows .* row 0; remove"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        reduce_many(KEY, **({"samples": [np.eye(3)], "m": 2, "kernel": Gaussian(1.0)} | arguments))


def test_no_samples_give_no_results():
    assert reduce_many(KEY, [], 3, Gaussian(1.0)) == []


def test_a_step_that_does_not_help_is_not_taken():
    """More steps never lose ground, in a run of which some steps are refused."""
    x, key = oracle.unit_rows(np.random.default_rng(0), 120, 8), jax.random.key(0)
    runs = [reduce(key, x, 6, Gaussian(0.1), steps=steps) for steps in range(0, 31, 2)]
    assert runs[-1].iterations < 30
    assert np.diff([run.residual for run in runs]).max() <= 0


def test_points_off_the_sphere_move_also_where_they_are_many():
    """64 points of 64 coordinates: compiled without care, no step is taken, or a wild one."""
    x = (np.random.default_rng(0).normal(size=(192, 64)) / 8).astype(np.float32)
    kernel, key = Gaussian(0.1), jax.random.key(0)
    ours = reduce(key, x, 64, kernel, start="noise", steps=30)
    rows = reduce(key, x, 64, kernel, method="random")
    assert ours.iterations >= 8
    assert ours.residual < 0.3 * rows.residual
    assert np.abs(np.asarray(ours.spec.z)).max() < 2


def test_a_step_out_of_reach_is_not_taken(monkeypatch):
    """Points at 1e21: distances overflow to what looks like no distance at all."""
    monkeypatch.setattr(
        reduce_module, "_model_step", lambda kernel, z, *_: jnp.full(z.shape, 1e21, jnp.float32)
    )
    x = np.random.default_rng(0).normal(size=(70, 3)).astype(np.float32)
    reduce_module._gauss_newton.clear_cache()
    found = reduce(jax.random.key(0), x, 7, Gaussian(0.1), start="noise", steps=3)
    reduce_module._gauss_newton.clear_cache()
    assert found.iterations == 0
    assert np.abs(np.asarray(found.spec.z)).max() < 10
