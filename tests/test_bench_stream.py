"""The benchmark of streams at its smoke size, and its referee against dense float64."""

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose

from configs import bench_stream as bench_stream_config
from experiments import bench_stream
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME, from_rows

GAMMA = 0.3


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    config = bench_stream_config.get_config("smoke").lock()
    config.workdir = str(tmp_path_factory.mktemp("bench"))
    found = bench_stream.run(config)
    assert json.loads((Path(config.workdir) / "results.json").read_text()) == found
    assert [file.name for file in Path(config.workdir).iterdir()] == ["results.json"]
    return found


@pytest.fixture(scope="module")
def x():
    """Rows of few directions, sorted, with clusters."""
    rng = np.random.default_rng(0)
    return oracle.unit_rows(rng, 600, 5)[np.sort(rng.integers(600, size=900))]


def test_every_way_comes_close_to_compression_at_once(output):
    rows = {row["way"]: row for row in output["rows"]}
    assert list(rows) == [
        "one-shot",
        "streamed",
        "streamed, equal weights",
        "merged streams, 2 parts",
        "merged specifications, 10 points",
    ]
    for row in rows.values():
        assert len(row["mmd2"]) == len(row["residual"]) == len(row["seconds"]) == 2
        assert row["peak_bytes"] > 1e8
        assert row["own_term_error"] < 0.05 * rows["one-shot"]["mmd2"][0]
    assert rows["one-shot"]["ratio"] == pytest.approx(1)
    assert max(rows["streamed"]["ratios"] + rows["merged streams, 2 parts"]["ratios"]) < 1.03
    assert min(rows["streamed, equal weights"]["ratios"]) > 1.03
    assert max(rows["merged specifications, 10 points"]["ratios"]) < 1.1


def test_numbers_follow_from_the_runs():
    cell = {"mmd2": [2.0, 4.0], "residual": [1.5, 3.0], "seconds": [9.0, 2.0], "peak_bytes": 7}
    found = bench_stream.summary(cell, [1.0, 3.0], 10)
    assert found["ratios"] == [1.0, 2.0] and found["ratio"] == 1.5
    assert found["estimate"] == 0.75
    assert (found["seconds_median"], found["rows_per_second"]) == (2.0, 5.0)
    single = bench_stream.summary(cell | {"mmd2": [4.0], "seconds": [9.0]}, [1.0, 3.0], 10)
    assert (single["ratio"], single["seconds_median"]) == (2.0, 9.0)


def test_slow_ways_have_one_seed():
    config = bench_stream_config.get_config("full")
    few = {
        (way, n)
        for way in bench_stream.ways_of(config.to_dict())
        for n in config.rows
        if len(bench_stream._seeds(way, n, config)) == 1
    }
    assert few == {
        ("merged specifications, 100 points", 1_000_000),
        ("merged specifications, 200 points", 100_000),
        ("merged specifications, 200 points", 1_000_000),
    }


def test_mean_values_are_those_of_float64(x):
    z = np.random.default_rng(1).standard_normal((7, 5))
    wanted = oracle.gram(Gaussian(GAMMA), z, x).mean(1)
    assert_allclose(bench_stream.mean_values(x, z, GAMMA), wanted, rtol=0, atol=3e-8)


def test_the_own_term_is_unbiased_and_its_error_is_what_it_says(x):
    k, rng = oracle.gram(Gaussian(GAMMA), x, x), np.random.default_rng(2)
    values, errors = [], []
    for _ in range(200):
        places, rows = np.split(rng.choice(len(x), 90, replace=False), [30])
        value, error = bench_stream.own_term(
            x[places].astype(float), k[places].mean(1), x[rows].astype(float), len(x), GAMMA
        )
        values.append(value - k.mean())
        errors.append(error)
    spread = np.std(values)
    assert abs(np.mean(values)) < 3 * spread / np.sqrt(200)
    assert_allclose(np.sqrt(np.mean(np.square(errors))), spread, rtol=0.25)
    # A plain mean over pairs of the same 90 rows is off by far more.
    assert spread < 0.1 * np.std(
        [k[np.ix_(r, r)].mean() for r in (rng.choice(900, 90) for _ in errors)]
    )


def test_the_own_term_of_all_rows_is_exact(x):
    # Narrow, so that much is left outside of what 300 places span.
    k, order = oracle.gram(Gaussian(30.0), x, x), np.random.default_rng(4).permutation(len(x))
    places, rows = np.split(order, [300])
    value, _ = bench_stream.own_term(
        x[places].astype(float), k[places].mean(1), x[rows].astype(float), len(x), 30.0
    )
    assert_allclose(value, k.mean(), rtol=1e-4)


def test_the_referee_gives_the_squared_mmd(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    rng = np.random.default_rng(3)
    specs = [
        (rng.standard_normal((4, 5)).astype(np.float32), rng.dirichlet(np.ones(4))) for _ in "ab"
    ]
    settings = {"seed": 0, "referee": {"rows": 600, "places": 300}}
    values, error = bench_stream._referee(tmp_path / "x.npy", GAMMA, specs, settings)
    wanted = [
        oracle.squared_mmd(Gaussian(GAMMA), from_rows(x.astype(float)), RKME(*s)) for s in specs
    ]
    # Every row is used, so nothing is left to chance; the difference has no own term.
    assert_allclose(values, wanted, rtol=0, atol=1e-6)
    assert_allclose(values[0] - values[1], wanted[0] - wanted[1], rtol=0, atol=2e-7)
    assert error < 1e-5
