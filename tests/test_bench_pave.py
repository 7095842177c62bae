"""The benchmark of parameter vectors at its smoke size, and the ranking of points so long."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from configs import bench_pave as bench_pave_config
from experiments import bench_pave
from learnware_jax.selection import ranking
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.specification.rkme import RKME, from_rows
from learnware_jax.specification.sketch import make_sketch


def smoke():
    return bench_pave_config.get_config("smoke").lock()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    config = smoke()
    config.workdir = str(tmp_path_factory.mktemp("bench"))
    found = bench_pave.run(config)
    assert json.loads((Path(config.workdir) / "results.json").read_text()) == found
    return found


@pytest.fixture(scope="module")
def vectors():
    return bench_pave.synthetic(smoke())


def by_way(rows):
    return {row["way"]: row for row in rows}


def test_vectors_a_minute_follow_from_the_times(output):
    made = output["vectors"]
    assert made["numbers"] == 2 * 2 * (32 + 16 + 16)  # layers, rank, outputs of query, key, value
    seconds = {name: np.array(taken) for name, taken in made["seconds"].items()}
    assert {len(taken) for taken in seconds.values()} == {2}
    each = {
        "fits of the true loss, one after another": seconds["alone"] / (3 * 2) * 400,
        "fits of the true loss, 3 in one program": seconds["together"] / (3 * 2) * 400,
        "gradients of 8 rows, then 400 steps to them": seconds["gradients"] + seconds["linear"],
        "gradients of 8 rows, then 2 steps to them": seconds["gradients"]
        + seconds["linear, short"],
        "another 400 steps to the same gradients": seconds["linear"],
        "one-step gradient of 8 rows": seconds["one step"],
    }
    rows = by_way(made["ways"])
    assert rows.keys() == each.keys()
    first = each["fits of the true loss, one after another"]
    for way, taken in each.items():
        assert rows[way]["vectors_a_minute"]["median"] == pytest.approx(np.median(60 / taken))
        assert rows[way]["times_as_fast"]["low"] == pytest.approx((first / taken).min())
    rate = made["steps_a_minute"]["median"]
    assert rate == pytest.approx(400 * rows[next(iter(rows))]["vectors_a_minute"]["median"])


def test_all_ways_make_the_same_vector(output):
    for name, cosine in output["vectors"]["checks"].items():
        assert 0.99 < cosine < 1.00001, name


def test_ratios_of_ranking_follow_from_the_times(output):
    ranked = output["ranking"]
    seconds = {name: np.array(taken) for name, taken in ranked["seconds"].items()}
    torch = importlib.util.find_spec("torch") is not None
    peer = f"loop of cosines, {'torch' if torch else 'NumPy'}"
    assert (ranked["torch_threads"] > 0) == torch
    assert list(seconds) == [
        bench_pave.OURS,
        peer,
        bench_pave.PRODUCT,
        bench_pave.SUM,
        bench_pave.SKETCHED,
    ]
    ours = seconds[bench_pave.OURS]
    assert len(ours) == 3
    assert ranked["loop_over_ours"]["median"] == pytest.approx(np.median(seconds[peer] / ours))
    memory = np.minimum(seconds[bench_pave.PRODUCT], seconds[bench_pave.SUM])
    assert ranked["ours_over_memory"]["high"] == pytest.approx((ours / memory).max())
    rows = by_way(ranked["ways"])
    assert rows[peer]["ms_a_user"]["low"] == pytest.approx(1e3 * seconds[peer].min())
    rates = 4 * 80 * 5_000 / seconds[bench_pave.PRODUCT] / 1e9
    got = rows[bench_pave.PRODUCT]["gigabytes_a_second"]["median"]
    assert got == pytest.approx(np.median(rates))
    batch = np.array(ranked["batch_seconds"][bench_pave.OURS])
    assert rows["ours, 4 users"]["ms_a_user"]["median"] == pytest.approx(1e3 * np.median(batch) / 4)


def test_ranking_is_that_of_float64_and_of_the_loop(output):
    ranked = output["ranking"]
    assert ranked["top_same_as_float64"] and ranked["top_same_as_loop"]
    assert 0 < ranked["max_error"] < 2e-6


def test_recall_of_sketches_is_that_of_a_recount(output, vectors):
    config, sketch = smoke(), output["ranking"]["sketch"]
    assert (sketch["bytes"], sketch["bytes_exact"]) == (4 * 64, 4 * 5_000)
    place, sign = map(np.asarray, make_sketch(jax.random.key(config.seed), 5_000, 64))
    short = {}
    for name, x in vectors._asdict().items():
        short[name] = np.zeros((len(x), 64))
        for row, vector in zip(short[name], x, strict=True):
            np.add.at(row, place, sign * vector.astype(np.float64))
        short[name] /= np.linalg.norm(short[name], axis=1, keepdims=True)
    wanted = np.argsort(-vectors.users.astype(np.float64) @ vectors.learnwares.T, axis=1)[:, :10]
    chosen = np.argsort(-short["users"] @ short["learnwares"].T, axis=1)
    for name, count in (("recall_alone", 10), ("recall", 20)):
        shares = [np.isin(w, c[:count]).mean() for w, c in zip(wanted, chosen, strict=True)]
        assert sketch[name] == pytest.approx(np.mean(shares))
    assert 0.3 < sketch["recall_alone"] < sketch["recall"] <= 1


def test_recall_by_hand():
    wanted = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert bench_pave.recall(np.array([[3, 2, 9, 8], [7, 6, 5, 1]]), wanted) == (2 / 4 + 3 / 4) / 2


def test_synthetic_vectors_have_the_shares_of_their_groups(vectors):
    config = smoke().ranking
    for x in vectors:
        assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    cosines = vectors.users @ vectors.learnwares.T
    own = np.equal.outer(np.arange(4), np.arange(80) % config.groups)
    # sqrt(share of the one * share of the other), and chance of 1 / sqrt(5,000).
    assert np.sqrt(0.02 * 0.5) - 0.06 < cosines[own].min()
    assert cosines[own].max() < np.sqrt(0.7 * 0.5) + 0.06
    assert np.abs(cosines[~own]).max() < 0.06


def test_the_loop_ranks_by_cosine_and_leaves_out_what_is_not_finite():
    learnwares = np.array([[3, 4], [0, 9], [np.nan, 1], [1, 0], [-1, 0]], np.float32)
    call = bench_pave.peer_loop(learnwares, np.array([2, 0], np.float32))[1]
    assert call() == [3, 0, 1, 4]


# ---- points of so many dimensions that they go through in slices


def ranked_by_hand(kernel, users, learnwares):
    return [[oracle.squared_mmd(kernel, u, z) for z in learnwares] for u in users]


def biased(kernel, users, learnwares):
    """Distances with n so great that unbiasing changes nothing."""
    n = [10**12] * len(learnwares)
    ids = [str(i) for i in range(len(learnwares))]
    pool = build_pool(learnwares, kernel, ids=ids, n=n, residual=[0.0] * len(ids))
    return distances(users, pool, n=n[:1] * len(users))


@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
@pytest.mark.parametrize("width", [5, 12])
def test_slices_of_any_width_give_the_same_distances(monkeypatch, kernel, width):
    rng = np.random.default_rng(0)

    def one(points):
        return RKME(oracle.unit_rows(rng, points, 13), rng.dirichlet(np.ones(points)))

    learnwares, users = [one(10) for _ in range(20)], [one(6), one(1), one(3)]
    monkeypatch.setattr(ranking, "_SLICE", width)
    monkeypatch.setattr(ranking, "_CHUNK_BYTES", 4 * 4 * 10 * (3 * 8 + width))
    ranking._cross_deficits.clear_cache()
    got = biased(kernel, users, learnwares)
    ranking._cross_deficits.clear_cache()
    assert_allclose(got, ranked_by_hand(kernel, users, learnwares), atol=8e-7)


@pytest.mark.parametrize("kernel", oracle.ALL_KERNELS, ids=oracle.kernel_name)
@pytest.mark.parametrize("dimension", [4, 13, 5_000])
def test_one_point_against_points(kernel, dimension):
    """A user of one point is a program of its own; beside others it goes through the common one."""
    rng = np.random.default_rng(1)
    learnwares = [from_rows(oracle.unit_rows(rng, 1, dimension)) for _ in range(20)]
    user, other = (from_rows(oracle.unit_rows(rng, 1, dimension)) for _ in range(2))
    alone = biased(kernel, [user], learnwares)
    atol = 8e-6 if kernel.name == "laplace" else 8e-7  # it takes roots of small squares
    assert_allclose(alone, ranked_by_hand(kernel, [user], learnwares), atol=atol)
    assert_allclose(biased(kernel, [user, other], learnwares)[:1], alone, atol=atol)
    twin = biased(kernel, [learnwares[3]], learnwares)
    assert_array_equal(np.flatnonzero(twin[0] == 0), [3])
