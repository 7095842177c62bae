"""Pools: what they keep of a learnware, however and whenever it was added."""

import jax
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.selection.pool import build_pool, extend, stack
from learnware_jax.selection.ranking import distances
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME

D = 8
GAUSSIAN = Gaussian(0.5)


def learnwares(count, *, points=10, seed=0):
    rng = np.random.default_rng(seed)
    return [
        RKME(oracle.unit_rows(rng, points, D), rng.dirichlet(np.ones(points))) for _ in range(count)
    ]


def arguments(count, *, start=0):
    return {
        "ids": [f"lw{i}" for i in range(start, start + count)],
        "n": [20 + i for i in range(start, start + count)],
        "residual": [0.01 * i for i in range(start, start + count)],
    }


def pool_of(specs, kernel=GAUSSIAN):
    return build_pool(specs, kernel, **arguments(len(specs)))


def used(pool):
    """Everything a pool holds of its learnwares, without spare rows."""
    count = len(pool.ids)
    return {
        field: np.asarray(getattr(pool, field))[:count]
        for field in ("z", "z_squared", "beta", "self_term", "n", "residual")
    } | {"ids": pool.ids, "center": pool.center}


def assert_same(a, b):
    for field, value in used(a).items():
        assert_array_equal(used(b)[field], value, err_msg=field)


@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
def test_self_terms_are_the_unbiased_ones_of_the_oracle(kernel):
    specs = learnwares(5)
    pool = pool_of(specs, kernel)
    for spec, n, term in zip(specs, pool.n, pool.self_term, strict=False):
        # Without the kernel's constant part, which is 1 also for Linear on unit rows.
        biased = oracle.inner(kernel, spec, spec) - 1
        assert_allclose(term, biased * n / (n - 1), atol=4e-8)


def test_self_term_of_two_points_by_hand():
    x = np.zeros((2, D), np.float32)
    x[1, 0] = 2.0  # |x_0 - x_1|^2 = 4, so the only distinct pair has the deficit e^-2 - 1
    pool = build_pool([RKME(x, np.array([0.5, 0.5]))], GAUSSIAN, ids=["a"], n=[2], residual=[0.0])
    assert_allclose(pool.self_term[0], np.exp(-2) - 1, rtol=1e-7)


def test_a_learnware_of_one_row_keeps_its_only_self_term():
    spec = RKME(np.ones((1, D), np.float32), np.ones(1))
    pool = build_pool([spec], GAUSSIAN, ids=["a"], n=[1], residual=[0.0])
    assert pool.self_term[0] == 0


@pytest.mark.parametrize("first", [1, 5, 16, 19])
def test_extend_equals_building_in_one_go(first):
    specs = learnwares(20)
    grown = extend(pool_of(specs[:first]), specs[first:], **arguments(20 - first, start=first))
    assert_same(pool_of(specs), grown)
    assert grown.z.shape == (32, 10, D)


def test_capacity_doubles_and_spare_rows_weigh_nothing():
    specs = learnwares(17)
    assert pool_of(specs[:16]).z.shape[0] == 16
    pool = pool_of(specs)
    assert pool.z.shape[0] == pool.beta.shape[0] == pool.self_term.shape[0] == 32
    assert not np.asarray(pool.beta)[17:].any()


def test_a_larger_specification_widens_the_pool_and_moves_nothing():
    small, large = learnwares(4), learnwares(2, points=23, seed=1)
    users = learnwares(2, seed=2)
    before = pool_of(small)
    after = extend(before, large, **arguments(2, start=4))
    assert after.z.shape == (16, 23, D)
    assert_array_equal(np.asarray(after.beta)[:4, :10], np.asarray(before.beta)[:4])
    assert not np.asarray(after.beta)[:4, 10:].any()
    assert_array_equal(after.self_term[:4], before.self_term[:4])
    assert_allclose(
        distances(users, after, n=[9, 9])[:, :4], distances(users, before, n=[9, 9]), atol=1e-7
    )


def test_extend_leaves_the_old_pool_as_it_was():
    specs = learnwares(6)
    old = pool_of(specs[:4])
    copies = {field: np.array(value) for field, value in used(old).items()}
    extend(old, specs[4:], **arguments(2, start=4))
    assert_same(pool_of(specs[:4]), old)
    for field, value in used(old).items():
        assert_array_equal(value, copies[field])


def test_inputs_are_never_modified():
    specs = learnwares(3)
    copies = [RKME(spec.z.copy(), spec.beta.copy()) for spec in specs]
    for spec in specs:
        spec.z.flags.writeable = spec.beta.flags.writeable = False
    pool_of(specs)
    for spec, copy in zip(specs, copies, strict=True):
        assert_array_equal(spec.z, copy.z)
        assert_array_equal(spec.beta, copy.beta)


def test_a_pool_is_the_same_under_any_x64_setting():
    specs = learnwares(3)
    with jax.enable_x64(True):
        inside = pool_of(specs)
    outside = pool_of(specs)
    assert_same(outside, inside)
    assert inside.z.dtype == outside.z.dtype == np.float32
    assert inside.beta.dtype == outside.beta.dtype == np.float64


@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
def test_data_far_from_the_origin_keeps_its_digits(kernel):
    """Without centring, distances between points 1000 from the origin would lose seven digits."""
    rng = np.random.default_rng(3)
    far = 1000 + rng.standard_normal((4, 10, D)).astype(np.float32)
    specs = [RKME(z, np.full(10, 0.1)) for z in far]
    pool = build_pool(specs[1:], kernel, ids=["a", "b", "c"], n=[10] * 3, residual=[0.0] * 3)
    wanted = [oracle.squared_mmd_unbiased(kernel, far[0], z) for z in far[1:]]
    assert_allclose(distances(specs[:1], pool, n=[10])[0], wanted, atol=2e-6)


def test_stack_pads_with_real_points_of_weight_zero():
    short, long = learnwares(1, points=3)[0], learnwares(1, points=5, seed=1)[0]
    z, beta = stack([short, long])
    assert_array_equal(z[0, :3], short.z)
    assert_array_equal(z[0, 3:], short.z[[0, 0]])
    assert_array_equal(beta[0], [*short.beta, 0, 0])
    assert_array_equal(z[1], long.z)
    assert_array_equal(stack([short], 16)[1][0], [*short.beta, *np.zeros(13)])


def bad(**changes):
    specs = changes.pop("specs", None)
    return (learnwares(2) if specs is None else specs), {
        "ids": ["a", "b"],
        "n": [9, 9],
        "residual": [0.0, 0.0],
        **changes,
    }


FIRST, SECOND = learnwares(2)
BAD = {
    "none": (bad(specs=[], ids=[], n=[], residual=[]), "at least one"),
    "ids": (bad(ids=["a"]), "2 specifications, 1 ids, 2 n and 2 residuals"),
    "n": (bad(n=[9]), "2 ids, 1 n"),
    "residual": (bad(residual=[0.0] * 3), "3 residuals"),
    "repeated": (bad(ids=["a", "a"]), r"ids \['a'\] occur twice"),
    "dimension": (
        bad(specs=[FIRST, SECOND._replace(z=SECOND.z[:, :5])]),
        "b has dimension 5, the others 8",
    ),
    "signed": (
        bad(specs=[FIRST, SECOND._replace(beta=SECOND.beta - 0.2)]),
        "pool: b: weights must be non-negative",
    ),
    "NaN": (
        bad(specs=[FIRST, SECOND._replace(z=np.where(np.arange(10)[:, None] == 4, np.nan, 1))]),
        "pool: b: z: 1 of 10 rows hold NaN.*the first is row 4",
    ),
    "first": (bad(specs=[FIRST._replace(beta=FIRST.beta[:3]), SECOND]), r"beta of shape \(3,\)"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_is_wrong(given, message):
    specs, kwargs = given
    with pytest.raises(ValueError, match=message):
        build_pool(specs, GAUSSIAN, **kwargs)


def test_extend_checks_like_build():
    pool = pool_of(learnwares(2))
    with pytest.raises(ValueError, match=r"ids \['lw1'\] occur twice"):
        extend(pool, learnwares(1), ids=["lw1"], n=[5], residual=[0.0])
    with pytest.raises(ValueError, match="at least one learnware"):
        extend(pool, [], ids=[], n=[], residual=[])
