"""The experiment on families: users drawn, rankings measured by hand, and the smoke size."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import families as families_config
from experiments import families
from experiments.families import (
    Costs,
    Scores,
    Setting,
    cost,
    metrics,
    rows_of,
    samples_of,
    static,
    table,
)
from learnware_jax.dock import store
from learnware_jax.dock.labelled import LABELLED
from learnware_jax.selection.baselines import BASELINES
from learnware_jax.specification.header import IncompatibleSpecifications

COSTS = Costs(
    embed=0.5,
    reduce=3.0,
    gradient={"answers": 2.0, "prompts": 4.0},
    fit=10.0,
    models=0.25,
    dimension=384,
    points=64,
    parameters=1000,
    sketches={"row": 512, "vector": 4096},
)


def setting(*, leave_out_own):
    """Three users, whose learnwares have their names."""
    tasks = [SimpleNamespace(name=name) for name in "abc"]
    dock = SimpleNamespace(pool=SimpleNamespace(ids=("a", "b", "c")))
    truth = np.array([[0.9, 0.5, 0.7], [0.4, 0.8, 0.6], [0.5, 0.6, 0.9]])
    return Setting("toy", tasks, dock, None, truth, leave_out_own)


def scores(*by_seed):
    """Scores (users, 1 number of rows, seeds, learnwares) from one table a seed."""
    values = np.stack([np.array(one, float) for one in by_seed], axis=1)[:, None]
    return Scores("rkme", "", "mmd", values)


@pytest.fixture
def config(monkeypatch):
    config = families_config.get_config("smoke")
    config.rows, config.seeds = (16,), (0, 1)
    rows = {"a": range(30), "b": range(20), "c": range(10)}
    monkeypatch.setattr(families, "pool_rows", lambda task, _: rows[task.name])
    return config


def test_a_family_is_measured_without_the_own_learnware(config):
    right = [[9, 1, 2], [1, 9, 2], [1, 2, 9]]  # the better of the two others has more
    wrong = [[9, 2, 1], [2, 9, 1], [2, 1, 9]]
    (row,) = rows_of(setting(leave_out_own=True), scores(right, wrong), COSTS, config)
    # a loses .7 - .5, b .6 - .4, c .6 - .5 in the second seed, and nothing in the first.
    assert row["regret_at_1"] == pytest.approx((0.2 + 0.2 + 0.1) / 6)
    assert row["top1"] == 0.5 and row["kendall_tau"] == pytest.approx(0)
    # Means of the seeds .0 and 1/6, of the users .1, .1, .05.
    assert row["stderr_seeds"]["regret_at_1"] == pytest.approx(1 / 12)
    assert row["stderr"]["regret_at_1"] == pytest.approx(0.05 / 3)
    assert row["stderr"]["top1"] == 0 and row["stderr_seeds"]["top1"] == 0.5
    assert (row["setting"], row["family"], row["n"], row["seeds"]) == ("toy", "rkme", 16, 2)
    assert row["rows"] == [16, 16, 10]
    np.testing.assert_allclose(row["by_user"]["regret_at_1"], [0.1, 0.1, 0.05])
    # Of the others the best has .7, .6, .6 and the mean .6, .5, .55.
    # So chance loses .1, .1, .05 too.
    assert row["gap_closed"] == pytest.approx(0, abs=1e-9)


def test_seeds_say_nothing_where_every_user_has_all_rows(config):
    config.rows = (30,)
    one = scores([[9, 1, 2]] * 3, [[9, 1, 2]] * 3)
    (row,) = rows_of(setting(leave_out_own=True), one, COSTS, config)
    assert row["stderr_seeds"] is None and row["rows"] == [30, 20, 10]


def test_ties_are_shared():
    truth = np.array([0.9, 0.5, 0.7])
    hit, lost, _ = metrics(np.array([1.0, 1.0, 0.0]), truth, own=0)
    assert hit == 0.5 and lost == pytest.approx(0.2)
    hit, lost, _ = metrics(np.array([0.0, 1.0, 1.0]), truth, own=None)
    assert hit == 0 and lost == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"a score is not a number"):
        metrics(np.array([np.nan, 1.0, 1.0]), truth, own=None)


def test_the_static_ranker_knows_neither_the_user_nor_any_learnware_at_home():
    truth = np.array([[0.9, 0.5, 0.7], [0.4, 0.8, 0.6], [0.5, 0.6, 0.9]])
    # For user a, learnware a was scored on b and c, b on c alone, and c on b alone.
    np.testing.assert_allclose(
        static(truth), [[0.45, 0.6, 0.6], [0.5, 0.55, 0.7], [0.4, 0.5, 0.65]]
    )


def test_a_learnware_that_is_left_out_changes_nothing():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 50)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    specs = [families.pave.mean_embedding_of(v[None]) for v in vectors]
    docked, users, shape = specs[:3], [[spec] for spec in specs[3:]], (3, 1, 1, -1)
    before = families._centred(setting(leave_out_own=True), users, docked, shape)
    after = families._centred(setting(leave_out_own=True), users, [specs[5], *docked[1:]], shape)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.isnan(before[0, 0, 0, 0]) and not np.allclose(before[1, 0, 0, 2], after[1, 0, 0, 2])


def test_matching_asks_for_the_own_learnware(config):
    first = [[9, 1, 2], [1, 9, 2], [9, 2, 1]]  # c is given a, and loses .9 - .5
    (row,) = rows_of(setting(leave_out_own=False), scores(first, first), COSTS, config)
    assert row["top1"] == pytest.approx(2 / 3)
    assert row["regret_at_1"] == pytest.approx(0.4 / 3)


def test_numbers_of_rows_without_scores_have_no_row(config):
    config.rows = (16, 32)
    some = scores([[9, 1, 2]] * 3, [[9, 1, 2]] * 3).values
    both = np.concatenate([some, np.full_like(some, np.nan)], axis=1)
    rows = rows_of(setting(leave_out_own=True), Scores("loss", "", "", both), COSTS, config)
    assert [row["n"] for row in rows] == [16]


@pytest.mark.parametrize(
    ("family", "target", "seconds", "size", "passes"),
    [
        ("rkme", "", 16 * 0.5, 64 * (4 * 384 + 8), 0),  # as many rows as points are not reduced
        ("mean_cosine", "", 16 * 0.5, 4 * 384, 0),
        ("pave", "answers", 16 * 2.0 + 10, 5 * 4008, 16),
        ("pave", "prompts", 16 * 4.0 + 10, 5 * 4008, 16),
        ("one_step", "outputs", 16 * 2.0, 4000, 16),  # a user has no outputs, only answers
        ("one_step_sketch", "prompts", 16 * 4.0, 4 * 4096, 16),
        ("gradients_rkme", "answers", 16 * 2.0, 64 * (4 * 512 + 8), 16),
        ("task2vec", "", 16 * 2.0, 4000, 16),
        ("loss", "", 16 * 7 * 0.25, 0, 16 * 7),
        ("energy", "", 16 * 0.5, 64 * (4 * 384 + 8), 0),
        ("bm25", "", 0.0, 0, 0),
    ],
)
def test_costs_by_hand(family, target, seconds, size, passes):
    found = cost(Scores(family, target, "", np.zeros(1)), COSTS, 16, 7, 5)
    assert found == {"seconds": seconds, "bytes": size, "forward_passes": passes}


def test_smaller_users_are_parts_of_larger_ones_with_their_seed():
    config = families_config.get_config("smoke")
    config.rows, config.seeds, config.model_rows = (2, 8, 64, 256), (0, 1), 128
    task = LABELLED["recurrences"]
    samples = samples_of(task, config)
    assert [sample.seed for sample in samples] == [0, 1] * 4
    assert [len(sample.places) for sample in samples] == [2, 2, 8, 8, 64, 64, 256, 256]
    for seed in (0, 1):
        nested = [set(sample.places) for sample in samples if sample.seed == seed]
        assert nested[0] < nested[1] < nested[2] < set(range(128))
    assert set(samples[4].places) != set(samples[5].places)
    # 253 rows are all there are.
    few = samples_of(LABELLED["arithmetic"], config)[-1]
    assert sorted(few.places) == list(range(253))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    config = families_config.get_config("smoke")
    config.workdir = str(tmp_path_factory.mktemp("families"))
    return config, families.run(config)


def test_smoke_writes_the_interface(smoke):
    config, output = smoke
    workdir = Path(config.workdir)
    assert json.loads((workdir / "families.json").read_text()) == output
    rows = output["rows"]
    found = {(row["family"], row["target"]) for row in rows}
    assert {("pave", t) for t in ("answers", "outputs", "prompts")} <= found
    assert {("one_step", t) for t in ("answers", "outputs", "prompts")} <= found
    assert {("rkme", ""), ("random", "")} | {(b, "") for b in BASELINES} <= found
    assert {row["n"] for row in rows} == {2, 8} and {row["seeds"] for row in rows} == {2}
    for row in rows:
        # Between two, whoever is first for half of the users has lost as often.
        assert row["top1"] in (0, 0.25, 0.5, 0.75, 1) and row["users"] == 2
    # Divide-and-conquer recurrences and word problems: nobody could take one for the other.
    sure = [row for row in rows if row["family"] in ("rkme", "mean_cosine") and row["n"] == 8]
    assert [row["top1"] for row in sure] == [1.0, 1.0]
    assert (workdir / "families.png").read_bytes().startswith(b"\x89PNG")
    assert "\n".join(table(rows)) in (workdir / "families.md").read_text()


def test_smoke_goes_on_from_what_it_made(smoke, monkeypatch):
    config, output = smoke

    def refuse(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(families, "make_vectors", refuse)
    monkeypatch.setattr(families, "run_models", refuse)
    monkeypatch.setattr(families, "scorer", refuse)
    assert families.run(config) == output


def test_vector_docks_refuse_another_space(smoke):
    config, _ = smoke
    path = Path(config.workdir) / "docks" / "matching-pave-answers"
    (first, second) = store.load(path)
    assert first.header.kind == "pave" and first.header.space["target"] == "answers"
    other = first.header._replace(space=first.header.space | {"target": "prompts"})
    with pytest.raises(IncompatibleSpecifications, match=r"target is .*prompts.* and .*answers"):
        store.add(path, first._replace(id="other", header=other))
    # Its vectors are those that were ranked: two seeds, of unit norm.
    norms = np.linalg.norm(second.spec.z, axis=1)
    assert norms == pytest.approx([1, 1], abs=1e-3)
    assert second.header.about["n"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": (0,)}, r"got seeds=\(0,\); want at least 2 seeds"),
        ({"rows": (1, 8)}, r"got rows=\(1, 8\); want numbers of at least 2"),
        ({"learnware_rows": 2}, r"got learnware_rows=2; want at least 4"),
    ],
)
def test_what_could_not_be_reported_is_refused_before_any_work(change, message, monkeypatch):
    config = families_config.get_config("smoke")
    config.update(change)
    monkeypatch.setattr(families, "open_model", None)
    with pytest.raises(ValueError, match=message):
        families.run(config)
