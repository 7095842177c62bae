"""The cosine of means, by hand."""

import numpy as np
import oracle
from numpy.testing import assert_allclose, assert_array_equal

from learnware_jax.selection.baselines import mean_cosine
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
