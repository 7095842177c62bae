"""Rankings against dense float64 sums, and everything that must not change them."""

import os
import subprocess
import sys

import jax
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.selection import pool as pool_module
from learnware_jax.selection import ranking
from learnware_jax.selection.pool import build_pool, extend
from learnware_jax.selection.ranking import cross_deficits, distances, own_deficits, rank
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME, from_rows

D, M = 8, 12
GAUSSIAN = Gaussian(0.5)
# Kernel values are float32: one rounding is 6e-8 of the kernel's scale, and a distance doubles it.
# Sums average it, over ten points in most tests. Linear has deficits up to 2, the others up to 1.
ATOL = 2e-7
KERNELS = pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)


def tolerance(kernel):
    return 2 * ATOL if kernel.name == "linear" else ATOL


def specs(count, *, points=10, seed=0):
    rng = np.random.default_rng(seed)
    return [
        RKME(oracle.unit_rows(rng, points, D), rng.dirichlet(np.ones(points))) for _ in range(count)
    ]


def pool_of(learnwares, kernel=GAUSSIAN, n=30):
    count = len(learnwares)
    ids = [f"lw{i}" for i in range(count)]
    return build_pool(learnwares, kernel, ids=ids, n=[n] * count, residual=[0.0] * count)


def expected(kernel, user, learnware, n_user, n_learnware):
    """Squared MMD with self terms from distinct pairs: (n V - diagonal) / (n - 1)."""

    def unbiased(spec, n):
        diagonal = np.asarray(spec.beta, np.float64) @ np.diag(oracle.gram(kernel, spec.z, spec.z))
        return (n * oracle.inner(kernel, spec, spec) - diagonal) / (n - 1)

    cross = oracle.inner(kernel, user, learnware)
    return unbiased(user, n_user) + unbiased(learnware, n_learnware) - 2 * cross


@KERNELS
def test_distances_agree_with_dense_float64(kernel):
    learnwares = specs(M, points=100)
    users = [*specs(2, points=100, seed=1), *specs(1, points=5, seed=2)]
    got = distances(users, pool_of(learnwares, kernel), n=[50, 40, 5])
    wanted = [
        [expected(kernel, user, learnware, n, 30) for learnware in learnwares]
        for user, n in zip(users, [50, 40, 5], strict=True)
    ]
    error = np.abs(got - wanted).max(1)
    assert (error < tolerance(kernel) * np.array([0.3, 0.3, 1])).all()  # few points average less


@KERNELS
def test_whole_samples_give_the_u_statistic(kernel):
    rng = np.random.default_rng(4)
    x, y = oracle.unit_rows(rng, 14, D), oracle.unit_rows(rng, 10, D)
    got = distances([from_rows(x)], pool_of([from_rows(y)], kernel, n=10), n=[14])
    assert_allclose(got[0, 0], oracle.squared_mmd_unbiased(kernel, x, y), atol=tolerance(kernel))


@KERNELS
def test_a_specification_is_closest_to_itself(kernel):
    learnwares = specs(M)
    found = rank(learnwares, pool_of(learnwares, kernel), n=[30] * M)
    assert_array_equal(found.index[:, 0], np.arange(M))
    # The biased distance is 0; without pairs i = j, two self terms shrink by 30 / 29.
    for spec, distance in zip(learnwares, found.distance[:, 0], strict=True):
        wanted = 2 * (oracle.inner(kernel, spec, spec) - 1) / 29
        assert_allclose(distance, wanted, atol=tolerance(kernel))
        assert distance < 0  # never clipped


def test_coinciding_points_have_no_laplace_distance():
    """A root of rounding in |u - z|^2 would be 3e-4, not 1e-8."""
    laplace = oracle.ALL_KERNELS[2]
    rng = np.random.default_rng(5)
    points = [from_rows(10 * rng.standard_normal((1, D)).astype(np.float32)) for _ in range(M)]
    assert_array_equal(np.diagonal(distances(points, pool_of(points, laplace), n=[1] * M)), 0)


def test_two_single_points_by_hand():
    x = np.zeros((2, D), np.float32)
    x[1, :2] = [3.0, 4.0]  # at distance 5
    pool = pool_of([from_rows(x[1:])], Gaussian(0.04), n=1)
    assert_allclose(distances([from_rows(x[:1])], pool, n=[1]), 2 - 2 * np.exp(-1), rtol=1e-7)


def test_one_row_is_ranked_by_its_biased_distance():
    user = specs(1, points=1, seed=3)[0]
    learnwares = specs(M)
    pool = pool_of(learnwares)
    found = rank([user], pool, n=[1])
    assert np.isfinite(found.distance).all()
    far = [expected(GAUSSIAN, user, learnware, 2, 30) for learnware in learnwares]
    assert_allclose(found.distance[0], np.sort(far), atol=ATOL)  # its own term is 0 either way


def test_distances_do_not_depend_on_the_size_of_a_chunk(monkeypatch):
    learnwares, users = specs(20), specs(2, seed=1)
    pool = pool_of(learnwares)  # capacity 32
    whole = distances(users, pool, n=[50, 50])
    for chunk in (1, 4):
        ranking._cross_deficits.clear_cache()
        monkeypatch.setattr(ranking, "_CHUNK_BYTES", chunk * 4 * 10 * (2 * 16 + D))
        assert_allclose(distances(users, pool, n=[50, 50]), whole, atol=ATOL)
    ranking._cross_deficits.clear_cache()


def test_users_are_ranked_in_batches_of_any_size(monkeypatch):
    pool, users = pool_of(specs(M)), specs(5, seed=1)
    whole = distances(users, pool, n=[50] * 5)
    monkeypatch.setattr(ranking, "_USER_ROWS", 2 * 16)
    assert_allclose(distances(users, pool, n=[50] * 5), whole, atol=ATOL)
    monkeypatch.setattr(ranking, "_USER_ROWS", 1)
    assert_allclose(distances(users, pool, n=[50] * 5), whole, atol=ATOL)


def test_padding_changes_nothing():
    learnwares, user = specs(M), specs(1, seed=1)[0]
    alone = np.array([distances([user], pool_of([spec]), n=[50])[0, 0] for spec in learnwares])
    together = pool_of(learnwares)
    wide = extend(
        together,
        specs(9, points=23, seed=6),
        ids=[f"x{i}" for i in range(9)],
        n=[9] * 9,
        residual=[0.0] * 9,
    )  # more points, and more capacity
    beside = distances([user, *specs(1, points=40, seed=7)], wide, n=[50, 9])
    assert_allclose(distances([user], together, n=[50])[0], alone, atol=ATOL)
    assert_allclose(beside[0, :M], alone, atol=ATOL)


def test_users_together_and_apart_are_the_same():
    pool = pool_of(specs(M))
    users = [*specs(3, seed=1), *specs(1, points=33, seed=2)]
    apart = [distances([user], pool, n=[n])[0] for user, n in zip(users, [9, 8, 7, 6], strict=True)]
    assert_allclose(distances(users, pool, n=[9, 8, 7, 6]), apart, atol=ATOL)


def test_order_of_learnwares_points_and_users_does_not_matter():
    learnwares, users = specs(M), specs(3, seed=1)
    n = [50, 40, 30]
    got = distances(users, pool_of(learnwares), n=n)
    rng = np.random.default_rng(8)

    def shuffled(spec):
        order = rng.permutation(len(spec.beta))
        return RKME(spec.z[order], spec.beta[order])

    lw, us = rng.permutation(M), rng.permutation(3)
    permuted = distances(
        [shuffled(users[i]) for i in us],
        pool_of([shuffled(learnwares[i]) for i in lw]),
        n=[n[i] for i in us],
    )
    assert_allclose(permuted, got[us][:, lw], atol=ATOL)


def test_top_k_is_the_head_of_the_ranking():
    pool, users = pool_of(specs(M)), specs(3, seed=1)
    whole = rank(users, pool, n=[50] * 3)
    distance = distances(users, pool, n=[50] * 3)
    assert (np.diff(whole.distance, axis=1) >= 0).all()
    assert_array_equal(np.sort(whole.index, axis=1), np.tile(np.arange(M), (3, 1)))
    assert_array_equal(whole.distance, np.take_along_axis(distance, whole.index, 1))
    for k in (1, 4, M + 5):
        head = rank(users, pool, n=[50] * 3, top_k=k)
        assert_array_equal(head.index, whole.index[:, :k])
        assert_array_equal(head.distance, whole.distance[:, :k])


def test_equal_distances_keep_the_order_of_the_pool():
    near, far = specs(2)
    found = rank([near], pool_of([far, near] * 20), n=[30])  # small sorts are stable in any case
    assert_array_equal(found.index, [[*range(1, 40, 2), *range(0, 40, 2)]])


def test_negative_distances_are_ranked_as_they_are():
    spec = specs(1)[0]
    twins = build_pool([spec] * 2, GAUSSIAN, ids=["a", "b"], n=[30, 5], residual=[0.0] * 2)
    found = rank([spec], twins, n=[30])
    assert found.distance[0, 0] < found.distance[0, 1] < 0
    assert_array_equal(found.index, [[1, 0]])


def test_unbiased_distances_of_equal_distributions_are_negative_half_the_time():
    rng = np.random.default_rng(9)
    samples = rng.standard_normal((60, 10, D)).astype(np.float32) / 3
    learnwares, users = ([from_rows(x) for x in part] for part in (samples[:30], samples[30:]))
    distance = distances(users, pool_of(learnwares, n=10), n=[10] * 30)
    assert 0.3 < (distance < 0).mean() < 0.7
    assert abs(distance.mean()) < 0.2 * distance.std()


def test_results_do_not_depend_on_the_callers_x64_setting():
    learnwares, users = specs(M), specs(3, seed=1)
    outside = rank(users, pool_of(learnwares), n=[50] * 3)
    with jax.enable_x64(True):
        inside = rank(users, pool_of(learnwares), n=[50] * 3)
    assert_array_equal(inside.distance, outside.distance)
    assert_array_equal(inside.index, outside.index)
    assert outside.distance.dtype == np.float64


def test_a_float64_user_is_ranked_as_the_float32_one():
    pool, user = pool_of(specs(M)), specs(1, seed=1)[0]
    wide = RKME(np.float64(user.z), np.float64(user.beta))
    assert_array_equal(distances([wide], pool, n=[50]), distances([user], pool, n=[50]))


def test_a_further_learnware_and_user_of_the_same_size_class_compile_nothing():
    learnwares = specs(6)
    pool = pool_of(learnwares[:5])
    rank(specs(1, points=13, seed=1), pool, n=[50])
    compiled = ranking._cross_deficits._cache_size(), pool_module._self_deficits._cache_size()
    pool = extend(pool, learnwares[5:], ids=["new"], n=[30], residual=[0.0])
    first_extension = pool_module._self_deficits._cache_size()
    rank(specs(1, points=15, seed=2), pool, n=[40])
    assert ranking._cross_deficits._cache_size() == compiled[0]
    assert pool_module._self_deficits._cache_size() == first_extension <= compiled[1] + 1
    extend(pool, specs(1, seed=3), ids=["newer"], n=[30], residual=[0.0])
    assert pool_module._self_deficits._cache_size() == first_extension


@KERNELS
def test_deficits_are_inner_products_less_the_constant(kernel):
    learnwares, users = specs(M), specs(3, seed=1)
    pool = pool_of(learnwares, kernel)
    cross = [[oracle.inner(kernel, user, spec) - 1 for spec in learnwares] for user in users]
    own = [oracle.inner(kernel, user, user) - 1 for user in users]
    assert_allclose(cross_deficits(users, pool), cross, atol=tolerance(kernel))
    assert_allclose(own_deficits(users, pool), own, atol=tolerance(kernel))


def test_inputs_are_never_modified():
    users = specs(2, seed=1)
    copies = [RKME(user.z.copy(), user.beta.copy()) for user in users]
    rank(users, pool_of(specs(M)), n=[50, 50])
    for user, copy in zip(users, copies, strict=True):
        assert_array_equal(user.z, copy.z)
        assert_array_equal(user.beta, copy.beta)


USER = specs(1, seed=1)[0]
BAD = {
    "nobody": (([], []), {}, "got 0 users and 0 n"),
    "n": (([USER, USER], [5]), {}, "got 2 users and 1 n"),
    "top_k": (([USER], [5]), {"top_k": 0}, "got top_k=0"),
    "dimension": (
        ([USER, USER._replace(z=USER.z[:, :3])], [5, 5]),
        {},
        "user 1 has dimension 3, the pool has 8",
    ),
    "signed": (
        ([USER._replace(beta=-USER.beta)], [5]),
        {},
        "rank: user 0: weights must be non-negative",
    ),
    "NaN": (
        ([USER, USER._replace(z=np.where(np.arange(10)[:, None] > 7, np.nan, USER.z))], [5, 5]),
        {},
        "rank: user 1: z: 2 of 10 rows hold NaN.*the first is row 8",
    ),
}


@pytest.mark.parametrize("given, options, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_is_wrong(given, options, message):
    users, n = given
    with pytest.raises(ValueError, match=message):
        rank(users, pool_of(specs(3)), n=n, **options)


EIGHT_DEVICES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from learnware_jax.selection import ranking
from learnware_jax.selection.pool import build_pool
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME

assert jax.device_count() == 8
rng = np.random.default_rng(0)
z = rng.standard_normal((63, 10, 8)).astype(np.float32)
z /= np.linalg.norm(z, axis=-1, keepdims=True)
specs = [RKME(rows, rng.dirichlet(np.ones(10))) for rows in z]
users, learnwares = specs[:3], specs[3:]
pool = build_pool(
    learnwares, Gaussian(0.5), ids=[str(i) for i in range(60)], n=[30] * 60, residual=[0.0] * 60
)
mesh = jax.make_mesh((8,), ("pool",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("pool"))
with jax.enable_x64(True):
    parts = ("z", "z_squared", "beta")
    arrays = {name: jax.device_put(getattr(pool, name), split) for name in parts}
sharded = pool._replace(**arrays)
ranking._CHUNK_BYTES = 16 * 4 * 10 * (3 * 12 + 8)  # four steps of sixteen learnwares
one, eight = (ranking.rank(users, p, n=[20, 30, 40]) for p in (pool, sharded))
np.testing.assert_array_equal(eight.index, one.index)
np.testing.assert_allclose(eight.distance, one.distance, rtol=0, atol=1e-7)

with jax.enable_x64(True):
    points, weights = np.zeros((3, 12, 8), np.float32), np.zeros((3, 12), np.float32)
    given = pool.kernel, *arrays.values(), points, weights
    program = ranking._cross_deficits.lower(*given, shards=8)
    program = program.compile().as_text()
assert "f32[1,4,2,10,8]" in program  # 8 learnwares a device, in four steps of two
assert "all-gather" not in program and "all-to-all" not in program
"""


def test_eight_devices_rank_as_one_and_move_no_points():
    """A pool sharded along its capacity goes through the same code as any other."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
