"""The cosine of means, by hand."""

import numpy as np
import oracle
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.selection.baselines import mean_cosine
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME, from_rows


def points(*rows):
    return np.array(rows, np.float32)


def test_cosines_are_centred_by_the_pool_and_weighted():
    # Means (2, 0) and (0, 2); their centre is (1, 1), their directions (1, -1) and (-1, 1).
    learnwares = [
        RKME(points([4, 0], [0, 0]), np.array([0.5, 0.5])),
        RKME(points([0, 1], [0, 5]), np.array([0.75, 0.25])),
    ]
    users = [from_rows(points([2, 0])), from_rows(points([2, 1])), from_rows(points([3, 3]))]
    cosines = mean_cosine(users, learnwares)
    assert_allclose(cosines, [[1, -1], [np.sqrt(0.5), -np.sqrt(0.5)], [0, 0]], atol=1e-12)


def test_a_mean_at_the_centre_has_cosine_zero():
    """A sum of equal numbers, divided, is not always the number: what is left is no direction."""
    rng = np.random.default_rng(0)
    same = RKME(oracle.unit_rows(rng, 10, 8), rng.dirichlet(np.ones(10)))
    mean = same.beta @ same.z
    assert (np.stack([mean] * 7).mean(0) != mean).any()
    assert_array_equal(mean_cosine([same, from_rows(points([1] * 8))], [same] * 7), 0)
    assert_array_equal(mean_cosine([same], [from_rows(points([0] * 8))]), 0)


def test_scale_and_place_do_not_matter_and_order_follows():
    rng = np.random.default_rng(0)
    specs = [RKME(oracle.unit_rows(rng, 10, 8), rng.dirichlet(np.ones(10))) for _ in range(9)]
    cosines = mean_cosine(specs[:3], specs[3:])
    moved = [RKME(3 * spec.z + 2, spec.beta) for spec in specs]
    assert_allclose(mean_cosine(moved[:3], moved[3:]), cosines, atol=2e-6)
    assert_allclose(mean_cosine(specs[2:0:-1], specs[3:]), cosines[2:0:-1], atol=1e-14)
    assert_allclose(np.diag(mean_cosine(specs, specs)), 1)


def test_where_means_agree_and_spreads_differ_only_the_kernel_tells():
    """Three tasks around one mean, told apart by their spread: a hit by means is luck (1 in 3)."""
    scales = np.repeat([0.5, 1.0, 2.0], 12)
    rng = np.random.default_rng(0)

    def task(scale):
        return from_rows((scale * rng.standard_normal((200, 4))).astype(np.float32))

    learnwares, users = [task(scale) for scale in scales[::12]], [task(scale) for scale in scales]
    pool = build_pool(learnwares, Gaussian(0.25), ids="abc", n=[200] * 3, residual=[0.0] * 3)
    by_kernel = distances(users, pool, n=[200] * len(users)).argmin(1)
    by_mean = mean_cosine(users, learnwares).argmax(1)
    wanted = np.repeat(range(3), 12)
    assert_array_equal(by_kernel, wanted)
    assert (by_mean == wanted).mean() < 0.6
