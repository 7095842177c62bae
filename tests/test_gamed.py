"""Attackers of a dock, what they win, and who is flagged: by hand, and at the smoke size."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose

from configs import gamed as gamed_config
from experiments import gamed
from experiments.gamed import Published, User, attacked, first, hub, in_top, judge, noisy
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import from_rows

KERNEL = Gaussian(0.1)
TASKS = "abc"


def around(center, n, seed):
    """Unit rows about one direction of eight."""
    rng = np.random.default_rng(seed)
    rows = 2.0 * np.eye(8)[center] + rng.standard_normal((n, 8)) / 2
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def published(name, n=60):
    place = TASKS.index(name)
    card = f"{name} word{place}"
    return Published(name, from_rows(around(place, 60, place)), n, card, around(place, 1, 9)[0])


@pytest.fixture(scope="module")
def honest():
    return [published(name) for name in TASKS]


@pytest.fixture(scope="module")
def users():
    return [
        User(SimpleNamespace(name=name), "same", [f"word{i}"] * 20, around(i, 20, 10 + i), one)
        for i, name in enumerate(TASKS)
        for one in around(i, 1, 20 + i)
    ]


@pytest.fixture(scope="module")
def attacks(honest):
    config = gamed_config.get_config("smoke")
    config.specification.points = 20
    return gamed.attacks_of(honest, KERNEL, config)


def first_of(users, honest, attackers):
    """Share of the first place that the attacker has, by method and user."""
    scores = attacked(users, honest, attackers, np.arange(3), KERNEL, 2)
    return {method: first(values)[:, -1] for method, values in scores.items()}


def test_honest_learnwares_are_found_without_an_attacker(users, honest):
    for method, values in gamed.scores_of(users, honest, KERNEL, 2).items():
        if method != "bm25":  # of three cards every word is in one: it has no say
            assert values.argmax(1).tolist() == [0, 1, 2], method


def test_a_copy_shares_the_first_place(users, honest, attacks):
    won = first_of(users, honest, attacks["copy"])
    for method in ("mmd, unbiased", "mmd, biased", "energy", "cosine", "centred cosine"):
        assert won[method].tolist() == [0.5, 0.5, 0.5], method


def test_a_lie_about_rows_wins_the_unbiased_distance_alone(users, honest, attacks):
    assert attacks["hub, few rows"][0].n == 2
    won = first_of(users, honest, attacks["hub, few rows"])
    assert won["mmd, unbiased"].tolist() == [1, 1, 1]
    assert won["mmd, guarded"].tolist() == [0, 0, 0]
    for method in ("mmd, biased", "energy", "cosine", "mixture"):
        assert won[method].tolist() == [0, 0, 0], method
    # With its true number of rows the same specification wins nobody.
    assert first_of(users, honest, attacks["hub"])["mmd, unbiased"].tolist() == [0, 0, 0]


def test_unbiased_distance_of_the_lie_by_hand(users, honest):
    """With n = 2 an own term k of the points becomes 1 + 2 (k - 1)."""
    liar = honest[0]._replace(id="attacker", n=2)
    scores = gamed.scores_of(users[:1], [*honest, liar], KERNEL, 2)["mmd, unbiased"][0]
    own = oracle.inner(KERNEL, liar.spec, liar.spec)
    gained = (own - 1) * 60 / 59 - 2 * (own - 1)
    assert scores[3] - scores[0] == pytest.approx(gained, abs=3e-6)


def test_long_vectors_win_products_and_are_refused(users, honest, attacks):
    won = first_of(users, honest, attacks["scaled"])
    assert won["vector product"].tolist() == [1, 1, 1]
    assert won["mmd, biased"].tolist() == won["centred vector cosine"].tolist() == [0, 0, 0]
    assert gamed.refused(attacks) == ["scaled"]


def test_a_hub_is_second_for_everyone(honest):
    config = gamed_config.get_config("quickstart").hub
    specs = [one.spec for one in honest]
    found = hub(jax.random.key(0), specs, KERNEL, 20, config)
    assert_allclose(np.linalg.norm(found.z, axis=1), 1, atol=1e-5)
    for spec in specs:
        others = [oracle.squared_mmd(KERNEL, spec, other) for other in specs if other is not spec]
        assert oracle.squared_mmd(KERNEL, spec, found) < 0.6 * min(others)


def test_near_copies_are_moved_by_the_noise():
    rows = oracle.unit_rows(np.random.default_rng(0), 400, 200)
    moved = noisy(np.random.default_rng(1), rows, 0.2)
    assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-6)
    # cos = 1 / sqrt(1 + 0.04), up to what noise has along a row.
    assert (rows * moved).sum(1).mean() == pytest.approx(1.04**-0.5, abs=2e-3)


def test_places_by_hand():
    scores = np.array([[3.0, 1.0, 2.0, 2.0], [1.0, 1.0, 0.0, 1.0]])
    assert first(scores).tolist() == [[1, 0, 0, 0], [1 / 3, 1 / 3, 0, 1 / 3]]
    # The first row has one and a half before the last, the second one.
    assert in_top(scores, 2).tolist() == [True, True]
    assert in_top(scores, 1).tolist() == [False, False]


def test_what_users_lose_by_hand(users, honest, monkeypatch):
    """a is lost to the attacker, b is halved with it, c keeps its own."""
    clean = np.eye(3)
    gamed_ = np.array([[1.0, 0, 0, 2], [0, 1, 0, 1], [0, 0, 1, 0]])
    monkeypatch.setattr(gamed, "scores_of", lambda *_: {"mmd, unbiased": clean})
    monkeypatch.setattr(gamed, "attacked", lambda *_: {"mmd, unbiased": gamed_})
    truth = {name: {"a": 0.9, "b": 0.9, "c": 0.9, "base": 0.3} for name in TASKS}
    rows = gamed.fooled(users, honest, {"copy": [None]}, truth, KERNEL, _config())
    none, copied = rows
    assert (none["first"], none["own"], none["lost"]) == (0, 1, 0)
    assert copied["first"] == 0.5 and copied["own"] == 0.5
    assert copied["lost"] == pytest.approx((0.6 + 0.3) / 3)
    assert copied["first_stderr"] == pytest.approx(0.5 / 3**0.5)


def _config():
    return SimpleNamespace(mixture=2)


def told_of(ids):
    """Own models tell 0.8 of own texts and 0.2 of others', other models and the base 0.1."""
    found = {f"{a}|{b}|{b}": 0.8 if a == b else 0.1 for a in ids for b in ids}
    found |= {f"{a}|{a}|{b}": 0.2 for a in ids for b in ids if a != b}
    found |= {f"{a}|{a}|far": 0.5 for a in ids}
    for other in ("base", "noise"):
        found |= {f"{other}|{a}|{a}": 0.1 for a in [*ids, "broad"]}
    found |= {f"turned {a}|{a}|{a}": 0.1 for a in ids} | {f"{a}|broad|broad": 0.3 for a in ids}
    return found


def test_judgement_by_hand():
    ids = ["a", "b", "c", "d"]
    found = told_of(ids) | {"c|c|c": 0.6, "b|b|b": 0.5, "d|d|a": 0.9}
    judged = judge(found, ids, 1 / 3)
    # Of a and c, the development learnwares, the lower.
    assert judged["threshold"] == 0.6 and judged["development"] == ["a", "c"]
    rows = {row["who"]: row for row in judged["rows"]}
    own = rows["honest"]
    assert own["told"] == [0.8, 0.5, 0.6, 0.8]
    # b is below; d tells as much of a's texts as of its own.
    assert (own["threshold_flagged"], own["threshold_count"]) == (0.5, 2)
    assert (own["not_first_of_models"], own["not_first_of_texts"]) == (0, 0.25)
    for who in ("copy, base model", "copy, another's adapter", "copy, layers turned"):
        assert rows[who]["threshold_flagged"] == rows[who]["not_first_of_models"] == 1
    assert rows["copy, base model"]["threshold_count"] == 2
    assert rows["copy, another's adapter"]["threshold_count"] == 6
    # d on the texts of a passes: it tells most there. Claims of b and d count for the threshold.
    foreign = rows["own card, another's specification"]
    assert foreign["not_first_of_texts"] == pytest.approx(11 / 12)
    assert foreign["threshold_flagged"] == 1 and foreign["threshold_count"] == 6
    # The four adapters tell equally much, so none is the first.
    assert rows["broad"]["not_first_of_models"] == 1 and rows["broad"]["threshold_flagged"] == 1


def test_the_next_ids_go_round():
    assert gamed.after("c", ["a", "b", "c", "d"], 2) == ["d", "a"]
    assert gamed.after("a", ["a", "b"], 5) == ["b"]


def test_accuracies_that_are_missing_are_named(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"tasks": [{"task": "a", "base": 0.2, "accuracy": {"a": 0.9}}]}))
    task = SimpleNamespace(name="a")
    assert gamed.read_truth(file, [task], ["a"]) == {"a": {"a": 0.9, "base": 0.2}}
    with pytest.raises(ValueError, match=r"has no accuracy for b, z; name results"):
        gamed.read_truth(file, [task, SimpleNamespace(name="b")], ["a", "z"])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    config = gamed_config.get_config("smoke")
    config.workdir = str(tmp_path_factory.mktemp("gamed"))
    return config, gamed.run(config)


def test_smoke_tells_a_model_from_none(smoke):
    config, output = smoke
    workdir = Path(config.workdir)
    assert json.loads((workdir / "results.json").read_text()) == output
    told = output["told"]
    for id in config.learnwares:
        assert {f"{name}|{id}|{id}" for name in (id, "base", "noise")} < told.keys()
    # A model that answers by the card, and one that does not know the words of it.
    assert told["recurrences|recurrences|recurrences"] > told["base|recurrences|recurrences"]
    rows = {(r["attack"], r["method"], r["users"]): r for r in output["rankings"]}
    assert rows["hub, few rows", "mmd, unbiased", "same"]["first"] == 1
    assert rows["hub, few rows", "mmd, biased", "same"]["first"] == 0
    assert rows["none", "mmd, unbiased", "same"]["own"] == 1
    assert rows["copy", "mmd, biased", "near"]["first"] == 0.5
    alone = {row["who"]: row for row in output["without_models"]["rows"]}
    assert alone["near copy, few rows"]["fewer_rows"] == 1 and alone["copy"]["fewer_rows"] == 0
    assert max(map(abs, alone["copy"]["squared_mmd"])) < 1e-6
    for name in ("gamed", "told"):
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (workdir / f"{name}.svg").read_bytes()
    assert "\n".join(gamed.table(output)) in (workdir / "report.md").read_text()


def test_smoke_goes_on_from_what_it_asked(smoke, monkeypatch):
    config, output = smoke
    monkeypatch.setattr(gamed, "told_by", None)
    monkeypatch.setattr(gamed, "make_vectors", None)
    assert gamed.run(config) == output
