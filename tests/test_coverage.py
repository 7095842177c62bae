"""The measurement of coverage: its true distances against quadrature, its tallies by hand."""

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from configs import coverage as coverage_config
from experiments import coverage
from experiments.coverage import RELATIONS, Normals, Specified, Sphere
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import from_rows


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    config = coverage_config.get_config("smoke").lock()
    config.workdir = str(tmp_path_factory.mktemp("coverage"))
    found = coverage.run(config)
    folder = Path(config.workdir)
    assert json.loads((folder / "results.json").read_text()) == found
    assert {file.name for file in folder.iterdir()} == {
        *("results.json", "report.md", "coverage.png", "coverage.svg"),
    }
    return found


def test_intervals_are_counted_by_law_relation_and_rows(output):
    rows = output["intervals"]
    counts = {(r["law"], r["specification"], r["n"]): r["replicates"] for r in rows}
    assert counts == {
        ("sphere, d = 384", "whole", 16): 12,
        ("sphere, d = 384", "whole", 64): 6,
        ("sphere, d = 384", "reduced", 16): 4,
        ("real tasks", "whole", 16): 3,
        ("real tasks", "reduced", 16): 3,
    }
    for row in rows:
        assert (row["squared_mmd"] == 0) == (row["relation"] == "equal")
        low, high = row["coverage_interval"]
        assert low <= row["coverage"] <= high
        if row["specification"] == "whole":
            assert row["coverage"] == row["sampling_coverage"]
            assert row["width"] == row["sampling_width"]
        else:
            assert row["coverage"] >= row["sampling_coverage"]
            assert row["width"] > 1.1 * row["sampling_width"]
    # A closer look at a law is narrower: more rows of the user, then of the learnware.
    width = {
        (r["n"], r["learnware_n"], r["relation"]): r["width"]
        for r in rows
        if r["law"].startswith("sphere") and r["specification"] == "whole"
    }
    for relation in RELATIONS:
        assert width[64, 64, relation] < width[16, 64, relation] < width[16, 16, relation]


def test_sets_of_the_best_hold_what_is_not_separated_without_adjustment(output):
    scenes = {(row["scene"], row["specification"]) for row in output["best"]}
    assert len(scenes) == len(output["best"]) == 8
    for row in output["best"]:
        assert row["size"] >= row["unadjusted_size"] >= 1
        assert row["excluded"] <= row["any_excluded"] <= row["unadjusted_any_excluded"]


def grid_1d():
    x, step = np.linspace(-9, 9, 1201, retstep=True)
    return x[:, None], step


def test_the_distance_of_normal_mixtures_is_that_of_quadrature():
    p = Normals(np.array([0.4, 0.6]), np.array([[-1.0], [0.5]]), 0.8)
    q = Normals(np.array([1.0]), np.array([[1.0]]), 1.3)
    x, step = grid_1d()

    def mass(law):
        scaled = (x - law.means.T) / law.scale
        return np.exp(-(scaled**2) / 2) @ law.weights / law.scale / np.sqrt(2 * np.pi) * step

    difference = mass(p) - mass(q)
    wanted = difference @ oracle.gram(Gaussian(0.7), x, x) @ difference
    assert_allclose(coverage.true_squared_mmd(p, q, 0.7), wanted, rtol=1e-9)


def test_the_distance_of_two_normal_laws_by_hand():
    # x - y is N(0, 2) within a law and N(1, 2) across: 2 / sqrt(1 + 4 gamma) (1 - exp(-1 / 6)).
    p, q = (Normals(np.ones(1), np.array([[m]]), 1.0) for m in (0.0, 1.0))
    wanted = 2 / np.sqrt(3) * (1 - np.exp(-0.5 / 3))
    assert_allclose(coverage.true_squared_mmd(p, q, 0.5), wanted, rtol=1e-12)


@pytest.mark.parametrize("cosine, concentration", [(1.0, 1.0), (0.3, 4.0), (-1.0, 4.0)])
def test_the_distance_on_the_sphere_is_that_of_quadrature(cosine, concentration):
    height, weight = np.polynomial.legendre.leggauss(40)
    angle = 2 * np.pi * np.arange(80) / 80
    ring = np.sqrt(1 - height**2)[:, None]
    height = np.broadcast_to(height[:, None], (40, 80))
    x = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], -1).reshape(-1, 3)
    area = np.repeat(weight / 80, 80)
    p = Sphere(np.array([0.0, 0.0, 1.0]), 4.0)
    q = Sphere(np.array([np.sqrt(1 - cosine**2), 0.0, cosine]), concentration)

    def mass(law):
        found = area * np.exp(law.concentration * (x @ law.mean))
        return found / found.sum()

    difference = mass(p) - mass(q)
    wanted = difference @ oracle.gram(Gaussian(0.6), x, x) @ difference
    assert_allclose(coverage.true_squared_mmd(p, q, 0.6), wanted, rtol=1e-8)


def test_the_series_in_384_dimensions_is_what_samples_say():
    rng = np.random.default_rng(0)
    p, q = (coverage.families()["sphere, d = 384"].learnwares[r] for r in ("near", "far"))
    rows = [coverage.draw(rng, law, 3000) for law in (p, q)]
    found = oracle_unbiased(Gaussian(0.1), *rows)
    assert_allclose(coverage.true_squared_mmd(p, q, 0.1), found, rtol=0.03)


def oracle_unbiased(kernel, x, y):
    """As `oracle.squared_mmd_unbiased`, by products: for many rows."""

    def k(x, y):
        return np.exp(-kernel.gamma * (2 - 2 * x.astype(np.float64) @ y.T.astype(np.float64)))

    def distinct(x):
        values = k(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return distinct(x) + distinct(y) - 2 * k(x, y).mean()


def test_rows_are_drawn_from_the_law():
    rng = np.random.default_rng(3)
    direction = np.array([2.0, -1.0, 2.0]) / 3
    x = coverage.draw(rng, Sphere(direction, 3.0), 40_000).astype(np.float64)
    assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-6)
    # In three dimensions the mean is coth(3) - 1 / 3 along the direction.
    assert_allclose(x.mean(0), (1 / np.tanh(3) - 1 / 3) * direction, atol=0.008)
    law = Normals(np.array([0.25, 0.75]), np.array([[4.0, 0.0], [0.0, 2.0]]), 0.5)
    x = coverage.draw(rng, law, 40_000)
    assert_allclose(x.mean(0), [1, 1.5], atol=0.04)
    # Within and between: 1/4 + 3/16 16 and 1/4 + 3/16 4.
    assert_allclose(x.var(0), [3.25, 1.0], rtol=0.03)


def test_distances_of_populations_leave_out_pairs_of_a_row_with_itself():
    rng = np.random.default_rng(0)
    tasks = [oracle.unit_rows(rng, n, 6) for n in (30, 20, 25)]
    found = coverage.population_distances(tasks, Gaussian(0.5))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        wanted = oracle.squared_mmd_unbiased(Gaussian(0.5), tasks[i], tasks[j])
        assert_allclose([found[i, j], found[j, i]], wanted, atol=1e-7)
    assert_array_equal(np.diag(found), 0)


def whole(x):
    return Specified(from_rows(x.astype(np.float32)), len(x), 0.0)


def test_a_set_is_counted_against_what_is_truly_closest():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 200, 2))
    user = whole(x[0])
    pool = coverage._pool([whole(x[1]), whole(x[2] + 3), whole(x[3])], Gaussian(0.5))
    for closest, missed, any_missed in (([0], 0, 0), ([1], 1, 1), ([2, 1], 0, 1)):
        outcome = coverage._set_outcome(user, pool, closest, 0.9)
        assert outcome[:3] == [missed, any_missed, 2]


@pytest.mark.parametrize("n, level, quantile", [(5, 0.9, 1.533206), (200, 0.99, 2.345238)])
def test_what_sets_are_compared_with_is_a_student_test_of_the_users_rows(n, level, quantile):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, n, 2))
    kernel, user = Gaussian(0.5), whole(x[0])
    first, other = whole(x[1]), whole(x[2] + 0.3)
    d = 2 * (
        oracle.gram(kernel, x[0], x[1]).mean(1) - oracle.gram(kernel, x[0], x[2] + 0.3).mean(1)
    )
    margin = quantile * d.std(ddof=1) / np.sqrt(n)
    pool, index = coverage._pool([first, other], kernel), np.array([0, 1])
    for slack, kept in ((0.999, True), (1.001, False)):
        found = coverage.unadjusted(user, pool, np.array([0, slack * margin]), index, level)
        assert_array_equal(found, [True, kept])


def test_thresholds_meet_users_of_other_domains():
    """Four domains on a line, two of them in the dock: a threshold is how far these two are apart.

    Users of the other two are accepted if the dock is of 0 or 1 and of 8 or 9, 4 pairs of 6.
    """
    config = coverage_config.get_config("smoke")
    config.abstention.tasks = ("fiqa", "asdiv", "piqa", "molecules")
    config.abstention.rates, config.abstention.splits = (0.2, 0.5), 120
    rng = np.random.default_rng(0)
    catalogue = {
        name: (0.05 * rng.standard_normal((48, 3)) + [place, 0, 0]).astype(np.float32)
        for name, place in zip(config.abstention.tasks, (0, 1, 8, 9), strict=True)
    }
    never, half = coverage.abstention(config, catalogue, Gaussian(0.01))
    # floor(3 x 0.2) = 0: nobody is ever served.
    assert never["never_served"] == never["false_abstention"] == 1
    assert never["false_acceptance"] == 0
    assert half["never_served"] == half["false_abstention"] == 0
    assert abs(half["false_acceptance"] - 4 / 6) < 0.13
    low, high = half["false_acceptance_interval"]
    assert low <= half["false_acceptance"] <= high


def test_a_level_that_is_none_is_refused():
    config = coverage_config.get_config("smoke")
    config.level = 1.0
    with pytest.raises(ValueError, match=r"coverage: got level=1\.0"):
        coverage.run(config)
