"""Intervals and sets of the best: formulas by hand, and their promises by simulation."""

import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from learnware_jax.selection.interval import intervals, undominated
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import rank
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME, from_rows

D = 8
GAUSSIAN = Gaussian(0.5)
KERNELS = pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)


def specs(count, *, points=10, seed=0):
    rng = np.random.default_rng(seed)
    return [
        RKME(oracle.unit_rows(rng, points, D), rng.dirichlet(np.ones(points))) for _ in range(count)
    ]


def pool_of(learnwares, kernel=GAUSSIAN, *, n=30, residual=0.0):
    count = len(learnwares)
    ids = [f"lw{i}" for i in range(count)]
    return build_pool(learnwares, kernel, ids=ids, n=[n] * count, residual=[residual] * count)


def at(*coordinate):
    row = np.zeros((1, D), np.float32)
    row[0, : len(coordinate)] = coordinate
    return row


def variance(kernel, user, learnware, n, own_n):
    """Of the unbiased squared MMD, by its Hoeffding decomposition, sum by sum."""
    (x, a), (y, b) = user, learnware
    k_xx, k_yy, k_xy = (oracle.gram(kernel, p, q) for p, q in ((x, x), (y, y), (x, y)))

    def of_witness(weights, values):
        return weights @ values**2 - (weights @ values) ** 2

    def centred_square(i, j, k, left, right):
        return (k[i, j] - left @ k[:, j] - k[i] @ right + left @ k @ right) ** 2

    def mean_square(k, left, right, distinct):
        pairs = [
            (left[i] * right[j], centred_square(i, j, k, left, right))
            for i in range(len(left))
            for j in range(len(right))
            if not (distinct and i == j)
        ]
        weight, square = np.array(pairs).T
        return weight @ square / weight.sum()

    return (
        4 / (n - 1) * of_witness(a, k_xx @ a - k_xy @ b)
        + 4 / (own_n - 1) * of_witness(b, k_xy.T @ a - k_yy @ b)
        + 2 / (n * (n - 1)) * mean_square(k_xx, a, a, True)
        + 2 / (own_n * (own_n - 1)) * mean_square(k_yy, b, b, True)
        + 4 / (n * own_n) * mean_square(k_xy, a, b, False)
    )


@KERNELS
def test_the_sampling_part_is_a_student_quantile_of_the_standard_error(kernel):
    """Its degrees of freedom are those of the smaller sample, be it the learnware's."""
    learnwares, user = specs(4), specs(1, seed=1)[0]
    own_n = [30, 30, 5, 12]
    pool = build_pool(learnwares, kernel, ids=list("abcd"), n=own_n, residual=[0.0] * 4)
    distance, index = np.array([0.3, 0.1, 0.2]), np.array([2, 0, 3])
    lower, upper = intervals(user, pool, distance, index, n=12, residual=0.0, level=0.8)
    error = np.sqrt([variance(kernel, user, learnwares[i], 12, own_n[i]) for i in index])
    quantile = np.array([1.533206, 1.363430, 1.363430])  # at 0.9, with 4, 11 and 11
    assert_allclose(upper - distance, quantile * error, rtol=2e-6)
    assert_allclose(distance - lower, quantile * error, rtol=2e-6)


def test_compression_adds_what_the_triangle_inequality_allows():
    # Two points at |x - y|^2 = 2 under gamma = 0.5: the MMD is sqrt(2 - 2 / e) = 1.1243847.
    user, learnware = from_rows(at(0.0)), from_rows(at(1.0, 1.0))
    pool = pool_of([learnware], residual=0.01)
    mmd = np.sqrt(2 - 2 / np.e)
    distance, index = np.array([mmd**2]), np.array([0])
    lower, upper = intervals(user, pool, distance, index, n=50, residual=0.04)
    assert_allclose(upper, (mmd + 0.2 + 0.1) ** 2, rtol=1e-6)  # roots of 0.04 and 0.01
    assert_allclose(lower, (mmd - 0.2 - 0.1) ** 2, rtol=1e-6)
    # A shift past the MMD reaches zero and no further.
    lower, upper = intervals(user, pool, distance, index, n=50, residual=4.0)
    assert_allclose(lower, 0, atol=1e-6)
    assert_allclose(upper, (mmd + 2.1) ** 2, rtol=1e-6)


def test_a_residual_below_zero_by_rounding_counts_as_zero():
    user, pool = specs(1, seed=1)[0], pool_of(specs(1), residual=-1e-8)
    args = (user, pool, np.array([0.1]), np.array([0]))
    plain = intervals(user, pool_of(specs(1)), *args[2:], n=9, residual=0.0)
    assert_array_equal(intervals(*args, n=9, residual=-1e-8), plain)


def test_intervals_contain_the_distance_and_narrow_with_level_and_rows():
    user = specs(1, seed=1)[0]
    widths = []
    for n, level in ((5, 0.95), (5, 0.9), (50, 0.9), (5000, 0.9)):
        pool = pool_of(specs(4), n=10 * n, residual=1e-3)
        found = rank([user], pool, n=[n])
        lower, upper = intervals(
            user, pool, found.distance[0], found.index[0], n=n, residual=1e-3, level=level
        )
        assert (lower < found.distance[0]).all() and (found.distance[0] < upper).all()
        widths.append(upper - lower)
    assert (np.diff(widths, axis=0) < 0).all()


def simulate(shift, scale, *, repetitions=300, rows=30, seed=0):
    """Unbiased distances of fresh samples of two normal laws, their intervals, and the truth."""
    rng = np.random.default_rng(seed)

    def samples(shift, scale):
        x = scale * rng.standard_normal((repetitions, rows, 2)) + [shift, 0]
        return [from_rows(rows.astype(np.float32)) for rows in x]

    def kernel_mean(shift, variance):  # E k(x, y) for x - y ~ N((shift, 0), variance I)
        return np.exp(-0.5 * shift**2 / (1 + variance)) / (1 + variance)

    truth = kernel_mean(0, 2) + kernel_mean(0, 2 * scale**2) - 2 * kernel_mean(shift, 1 + scale**2)
    users, learnwares = samples(0, 1), samples(shift, scale)
    pool = pool_of(learnwares, n=rows)
    found = []
    for i, user in enumerate(users):
        one = np.array([i])
        # An interval moves with its distance: found around 0, and moved below.
        found.append(np.ravel(intervals(user, pool, np.zeros(1), one, n=rows, residual=0.0)))
    lower, upper = np.transpose(found)
    pairs = zip(users, learnwares, strict=True)
    distance = np.array([oracle.squared_mmd_unbiased(GAUSSIAN, x.z, y.z) for x, y in pairs])
    return distance, distance + lower, distance + upper, truth


@pytest.mark.parametrize(
    "shift, scale, conservative",
    [(0.0, 1.0, True), (0.7, 1.0, False), (1.5, 1.0, False), (0.0, 2.0, False)],
    ids=["equal", "near", "far", "wider"],
)
def test_standard_errors_and_coverage_are_as_promised(shift, scale, conservative):
    distance, lower, upper, truth = simulate(shift, scale)
    deviation = distance.std()
    assert abs(distance.mean() - truth) < 4 * deviation / np.sqrt(len(distance))
    error = np.sqrt((((upper - lower) / 2 / stats.t.ppf(0.95, 29)) ** 2).mean())
    # Between equal laws the first-order terms vanish but their estimates do not: sqrt(3) too much.
    low, high = (1.3, 2.0) if conservative else (0.85, 1.15)
    assert low < error / deviation < high
    covered = (lower <= truth) & (truth <= upper)
    assert covered.mean() >= 0.88


def margin(user, first, other, n, n_first, n_other, quantile):
    """A quantile times the standard error of a difference of distances, sum by sum."""

    def spread(spec, left, right, rows):  # of 2 (left - right) over the points of spec
        h = [oracle.gram(GAUSSIAN, spec.z, side.z) @ side.beta for side in (left, right)]
        h = 2 * (h[0] - h[1])
        return (spec.beta @ h**2 - (spec.beta @ h) ** 2) / (rows - 1)

    squares = [
        spread(user, first, other, n),
        spread(first, user, first, n_first),
        spread(other, user, other, n_other),
    ]
    return quantile * np.sqrt(sum(squares))


@pytest.mark.parametrize(
    "n, n_first, n_last, quantile, last",
    # Of Student at 1 - 0.2 / 5, with one degree of freedom less than the fewest rows of three.
    [
        (3, 40, 40, 3.319764, 3.319764),
        (40, 13, 40, 1.912313, 1.912313),
        (40, 40, 3, 1.797514, 3.319764),
    ],
)
def test_a_learnware_leaves_when_it_is_further_by_a_student_quantile(
    n, n_first, n_last, quantile, last
):
    learnwares, user = specs(6), specs(1, seed=1)[0]
    rows = [40, 40, n_first, 40, 40, n_last]
    pool = build_pool(learnwares, GAUSSIAN, ids=list("abcdef"), n=rows, residual=[0.01] * 6)
    index = np.array([2, 0, 1, 3, 4, 5])
    margins = [0] + [
        margin(user, learnwares[2], learnwares[i], n, n_first, rows[i], q)
        for i, q in zip(index[1:], [*[quantile] * 4, last], strict=True)
    ]
    for slack, wanted in ((0.999, True), (1.001, False)):
        distance = 0.2 + slack * np.array(margins)
        kept = undominated(user, pool, distance, index, n=n, level=0.8)
        assert_array_equal(kept, [True] + [wanted] * 5)


def test_learnwares_that_are_not_shown_count():
    """Between the quantiles 1.304, for one other learnware at 0.9, and 1.798, for five."""
    learnwares, user = specs(6), specs(1, seed=1)[0]
    further = margin(user, learnwares[0], learnwares[1], 40, 40, 40, 1.5)
    args = (user, pool_of(learnwares, n=40), np.array([0, further]), np.array([0, 1]))
    assert_array_equal(undominated(*args, n=40, level=0.8), [True, True])
    alone = (user, pool_of(learnwares[:2], n=40), *args[2:])
    assert_array_equal(undominated(*alone, n=40, level=0.9), [True, False])


def test_the_closest_is_kept_at_its_level_where_chance_puts_others_first():
    """Ten laws equally far from the user's. Tests of the user's rows alone, each at the level of
    this set, leave one of them out for more than a third of users.
    """
    rng = np.random.default_rng(0)
    turn = 2 * np.pi * np.arange(10) / 10
    centres = 0.8 * np.stack([np.cos(turn), np.sin(turn)], 1)
    left_out, alone = [], []
    for _ in range(150):
        learnwares = [
            from_rows((c + rng.standard_normal((30, 2))).astype(np.float32)) for c in centres
        ]
        user = from_rows(rng.standard_normal((40, 2)).astype(np.float32))
        pool = pool_of(learnwares)
        found = rank([user], pool, n=[40])
        index, distance = found.index[0], found.distance[0]
        kept = undominated(user, pool, distance, index, n=40, level=0.9)
        left_out.append(0 not in index[kept])
        k = np.stack([oracle.gram(GAUSSIAN, user.z, spec.z).mean(1) for spec in learnwares])
        d = 2 * (k[index[0]] - k[0])
        further = distance[index == 0][0] - distance[0]
        alone.append(further > stats.t.ppf(0.9, 39) * d.std(ddof=1) / np.sqrt(40))
    assert np.mean(left_out) < 0.1
    assert np.mean(alone) > 1 / 3


def test_the_first_and_its_copies_stay_and_the_far_go():
    near, far, user = *specs(2), specs(1)[0]
    # Copies at both ends of a chunk, where a matrix product may round differently.
    pool = pool_of([near, *[far] * 20, near])
    found = rank([user], pool, n=[1000])
    kept = undominated(user, pool, found.distance[0], found.index[0], n=1000)
    assert set(found.index[0, :2]) == {0, 21}
    assert_array_equal(kept, [True, True] + [False] * 20)


BAD = [({"n": 1}, "n=1"), ({"n": 9, "level": 0.0}, "level=0"), ({"n": 9, "level": 1.0}, "level=1")]


@pytest.mark.parametrize("options, message", BAD)
def test_what_cannot_be_estimated_is_refused(options, message):
    args = (specs(1, seed=1)[0], pool_of(specs(1)), np.zeros(1), np.array([0]))
    with pytest.raises(ValueError, match=f"intervals: got {message}"):
        intervals(*args, residual=0.0, **options)
    with pytest.raises(ValueError, match=f"undominated: got .*{message}"):
        undominated(*args, **options)
