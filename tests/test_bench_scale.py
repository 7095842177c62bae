"""The benchmark of search in large pools: its arithmetic, and a run at its smallest."""

import json

import numpy as np
import pytest

from configs import bench_scale as bench_scale_config
from experiments import bench_scale
from experiments.bench_scale import Material, perturbed, pieces


def test_pieces_cover_every_row_once():
    for count in (1, 4096, 4097, 10_000):
        rows = [i for part in pieces(count) for i in range(part.start, part.stop)]
        assert rows == list(range(count))


def test_perturbed_specifications_stay_near_their_bases():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 3, 50))
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    rows = rng.normal(size=(30, 50))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    material = Material(z.astype(np.float32), np.full((2, 3), 1 / 3), rows.astype(np.float32))
    moved, beta = perturbed(np.random.default_rng(1), material, 400)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(beta.sum(1), 1)
    # Gamma(8) weights, normalised: a coefficient of variation of sqrt(2 / 3 / 8) and a bit less.
    assert np.std(beta) * 3 == pytest.approx((2 / 3 / 8) ** 0.5, rel=0.1)
    closest = np.linalg.norm(moved[:, None] - z, axis=3).sum(2).min(1) / 3
    assert closest.min() > 0.02 and closest.max() < 0.5
    assert len(np.unique(moved.reshape(400, -1), axis=0)) == 400


def test_the_smallest_run(tmp_path):
    config = bench_scale_config.get_config("smoke")
    config.workdir = str(tmp_path)
    config.pools.ladder.sizes, config.others = (150, 300), (("means", "float32"),)
    config.adding, config.vectors.learnwares = 150, 120
    output = bench_scale.run(config)
    assert json.loads((tmp_path / "results.json").read_text()) == output
    kinds = [(row["learnwares"], row["sketch"].split(",")[0]) for row in output["rows"]]
    assert kinds == [
        *((150, "landmarks 64"), (150, "means"), (300, "landmarks 64"), (300, "means")),
        (120, "count sketch"),
    ]
    for row in output["rows"]:
        assert row["certified"] == row["sketch"].startswith("landmarks")
        assert 0.3 < row["recall_at_10"] <= row["recall_at_100"] <= 1
        assert (row["pruned"] > 0.1) == row["certified"]
        assert row["ms_range"][0] <= row["ms_per_query"] <= row["ms_range"][1]
    for pool in output["pools"]:
        assert pool["check"]["same_first"] == 1
        assert pool["check"]["greatest_difference"] < 1e-6
        assert all(row["same_first"] for row in pool["exact"]["side_by_side"])
    (adding,) = [pool["adding"] for pool in output["pools"] if "adding" in pool]
    assert adding["compilations"] == 0 and adding["folders"] == 150
    # Nothing of the pools stays.
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "scale.png", "scale.svg"}


def test_a_full_disk_is_found_before_any_work(tmp_path):
    config = bench_scale_config.get_config("smoke")
    config.workdir, config.pools.ladder.sizes = str(tmp_path / "work"), (10**12,)
    with pytest.raises(OSError, match="GB free; the largest pool takes"):
        bench_scale.run(config)
    assert not (tmp_path / "work").exists()


def test_overlap_by_hand():
    found = np.array([[1, 2, 3], [4, 5, 6]])
    assert bench_scale._overlap(found, np.array([[3, 9], [4, 6]])) == 0.75
