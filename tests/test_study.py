"""The study: who is trained on what, what is kept, and the smoke size from end to end."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from configs import build as build_config
from configs import study as study_config
from experiments import build, contenders, models, study
from experiments.contenders import beside, threshold_of
from experiments.models import open_model, score_examples, template_of
from experiments.ranking import open_dock
from experiments.study import SPLITS, learnwares_of, right, users_of
from learnware_jax.dock.examples import Example, LabelledTask
from learnware_jax.dock.labelled import LABELLED
from learnware_jax.selection.regret import balanced_accuracy
from learnware_jax.slm import lora
from learnware_jax.specification.kernels import Gaussian, gram


def config_of(size="smoke", **changes):
    config = study_config.get_config(size)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of the smoke size; a second one has nothing left to do."""
    home = tmp_path_factory.mktemp("study")
    config = config_of(workdir=str(home), dock=str(home / "dock"))
    config.finetune.workdir = str(home / "models")
    return config, home, study.run(config)


def test_smoke_reports_every_contender_in_every_split(smoke):
    _, home, output = smoke
    kept = json.loads((home / "study.json").read_text())
    assert kept == json.loads(json.dumps(output))
    assert (kept["learnwares"], kept["tasks"]) == (4, 5)
    wanted = {"base", "few_shot", "random", "static", "metadata", "mean_cosine", "rkme"}
    wanted |= {"mean_cosine_answers"}
    wanted |= {f"{f}_{t}" for f in ("pave", "one_step") for t in ("answers", "outputs", "prompts")}
    wanted |= {"joint_rkme_answers", "joint_rkme_outputs", "mixture", "per_row", "merge_top3"}
    wanted |= {"loss", "best_single", "oracle_task", "oracle"}
    assert {split: set(found) for split, found in kept["splits"].items()} == {
        split: wanted for split in "abc"
    }
    assert kept["best_family"] in study_config.get_config("smoke").specifications
    text = (home / "study.md").read_text()
    assert all(row["task"] in text for row in kept["rows"])


def test_scores_are_those_of_another_way_of_asking(smoke):
    """The base model, asked by `score_examples` one task at a time, without shared beginnings."""
    config, home, output = smoke
    model, kept = open_model(config.model), load_file(home / "said" / "base.safetensors")
    base = lora.stack([lora.init_adapter(jax.random.key(0), model.config, rank=1, alpha=1.0)])
    scoring = build_config.scoring(True)
    rows = {row["task"]: row for row in output["rows"]}
    for user in users_of(config)[2:4]:
        scored = score_examples(
            model,
            template_of(config.template),
            user.task.instruction,
            user.test,
            base,
            type(config)(scoring),
        )
        # Operands are bfloat16: a sum in another order differs in its third digit.
        assert_allclose(kept[f"test/{user.task.name}"], scored.scores[0], rtol=0.01)
        assert np.ptp(scored.scores[0]) > 1
        wanted = balanced_accuracy(scored.answers[0], [row.answer for row in user.test])
        assert rows[user.task.name]["base"] == pytest.approx(wanted.value)


def test_a_second_run_does_no_work_again_and_says_the_same(smoke, monkeypatch):
    config, home, output = smoke
    one = home / "said" / "recurrences.safetensors"
    before, rest = load_file(one), sorted(set((home / "said").iterdir()) - {one})
    times = [file.stat().st_mtime_ns for file in rest]
    one.unlink()  # as if the run had been killed before it was there
    monkeypatch.setattr(build, "specify", lambda *_: pytest.fail("docked again"))
    monkeypatch.setattr(contenders, "make_vectors", lambda *_, **__: pytest.fail("fitted again"))
    again = study.run(config)
    # But for the seconds that asking took, and what is told of the run.
    assert again.pop("made")["command"] == output["made"]["command"]
    for split in (*again["splits"].values(), again["development"]):
        split["loss"].pop("rank_seconds")
    wanted = json.loads(json.dumps(output))
    wanted.pop("made")
    for split in (*wanted["splits"].values(), wanted["development"]):
        split["loss"].pop("rank_seconds")
    assert again == wanted
    assert [file.stat().st_mtime_ns for file in rest] == times
    after = load_file(one)
    assert set(after) == set(before)
    assert all((after[key] == before[key]).all() for key in before)


def test_only_what_changed_is_asked_again(smoke, monkeypatch):
    """One row of one task less: every model is asked that task again, and nothing else."""
    config, _, _ = smoke
    made, users = learnwares_of(config), users_of(config)
    changed = [users[0]._replace(test=users[0].test[:-1]), *users[1:]]
    asked, ask = [], study.ask
    monkeypatch.setattr(
        study, "ask", lambda m, t, parts, *rest: asked.append(parts) or ask(m, t, parts, *rest)
    )
    model = open_model(config.model)
    dock = open_dock(config.dock, config.specification)
    made = [next(one for one in made if one.id == id) for id in dock.pool.ids]
    before = study.everything_said(dock, made, users, model, config, lambda: None)
    assert asked == []
    after = study.everything_said(dock, made, changed, model, config, lambda: None)
    assert [[len(part.rows) for part in parts] for parts in asked] == [[config.test_rows - 1]] * 5
    name = users[0].task.name
    for id in before:
        assert_allclose(after[id].test[name], before[id].test[name][:-1], rtol=0, atol=0.05)
        assert_array_equal(after[id].user[name], before[id].user[name])
    study.everything_said(dock, made, users, model, config, lambda: None)


def test_a_dock_of_another_training_is_refused(smoke):
    config, home, _ = smoke
    other = config.copy_and_resolve_references()
    other.finetune.workdir, other.finetune.steps = str(home / "others"), 1
    with pytest.raises(ValueError, match=r"has recurrences-corrupted with another adapter"):
        study.build_dock(learnwares_of(other), other, lambda: None)


def test_a_run_whose_minutes_are_over_stops_between_learnwares(tmp_path, monkeypatch, capsys):
    config = config_of(workdir=str(tmp_path), dock=str(tmp_path / "dock"), minutes=1.0)
    built, now = [], iter([0, 1, 59, 61])
    monkeypatch.setattr(study.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(study, "_build", lambda group, *_: built.append([m.id for m in group]))
    assert study.run(config) == {}
    assert len(built) == 2
    assert "run the same command again" in capsys.readouterr().err


def test_learnwares_differ_as_their_variant_says():
    made = {one.id: one for one in learnwares_of(config_of())}
    assert list(made) == [
        *("recurrences-corrupted", "recurrences", "binary-sizes", "loan-agreements"),
    ]
    whole, corrupted = made["recurrences"].rows, made["recurrences-corrupted"].rows
    assert [row.text for row in whole] == [row.text for row in corrupted]
    answers = [[row.answer for row in rows] for rows in (whole, corrupted)]
    assert sorted(answers[0]) == sorted(answers[1])
    # Of two labels in equal parts about half stay.
    kept = np.mean([a == b for a, b in zip(*answers, strict=True)])
    assert 0.4 < kept < 0.6
    few = config_of()
    few.variants["small"] = study_config.variant(("recurrences",), examples=3)
    small = next(one for one in learnwares_of(few) if one.variant == "small")
    assert (small.id, small.rows) == ("recurrences-small", whole[:3])


def task(name, domain, texts):
    rows = [Example(text, "yes" if i % 2 else "no", ("yes", "no")) for i, text in enumerate(texts)]
    return LabelledTask(name, "hub", domain, name, "", f"{name}?", "accuracy", lambda _: iter(rows))


def test_no_user_has_a_text_that_a_learnware_was_trained_on(monkeypatch):
    shared = [f"text {i} of two sources" for i in range(200)]
    own = [f"text {i} of one" for i in range(200)]
    for one in (task("first", "x", shared), task("second", "x", [*shared, *own])):
        monkeypatch.setitem(LABELLED, one.name, one)
    study._examples.cache_clear()
    config = config_of(docked=("first",), unseen=("second",), outside=(), development=())
    config.variants = dict(full=study_config.variant(("first",)))
    (made,), (a, b) = learnwares_of(config), users_of(config)
    trained = {row.text for row in made.rows}
    assert len(trained) > 80
    for user in (a, b):
        seen, tested = ({row.text for row in rows} for rows in (user.rows, user.test))
        assert not trained & (seen | tested) and not seen & tested
        assert len(user.test) == config.test_rows and len(user.rows) == config.user_pool
    # What nobody trains on is there to test on: 30% would be 120 texts.
    config.docked, config.test_rows = (), 300
    (alone,) = users_of(config)
    assert len(alone.test) == 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(unseen=("recurrences",)), "tasks in two splits: recurrences"),
        (dict(unseen=("film-reviews",)), "film-reviews is in unseen, and the dock has no domain"),
        (
            dict(outside=("asdiv-operations",), unseen=()),
            r"asdiv-operations is in outside, and .* domain of the dock",
        ),
        (dict(unseen=("arithmetic",)), "tasks without choices: arithmetic"),
        (dict(seeds=(0,)), "want at least 2 seeds"),
        (dict(false_acceptance=0.1), "3 tasks of 2 domains in docked set no threshold"),
        (
            dict(docked=("sentiment-companies", "arithmetic"), unseen=("sentiment-companies",)),
            "sentiment-companies is of data that the dock has seen: pyRis/SEntFiN",
        ),
        (dict(docked=("recurrences", "binary-sizes")), "not in docked: loan-agreements"),
        (dict(docked=("recurrences", "no-such-task")), "no-such-task"),
    ],
)
def test_a_configuration_that_cannot_be_reported_is_refused_before_any_work(
    tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(study, "build_dock", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        study.run(config_of(workdir=str(tmp_path), **changes))


def test_a_task_with_too_few_rows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"recurrences has 16 rows .* want 4 and 100000"):
        users_of(config_of(test_rows=100_000))


def test_the_committed_sizes_have_what_they_are_meant_to(monkeypatch):
    monkeypatch.setattr(study, "_examples", lambda *_: [])
    for size, least in (("cpu", 24), ("gpu", 100), ("paper", 100)):
        config = config_of(size)
        assert len(learnwares_of(config)) >= least
        study.check(config)
        named = [name for section in SPLITS.values() for name in config[section]]
        reported = [LABELLED[n] for n in named if n not in config.development]
        assert sum("/" in task.material for task in reported) >= 24
        domains = [task.domain for task in reported]
        few = {"finance": 8, "medicine": 6, "mathematics": 6}
        assert all(domains.count(domain) >= n for domain, n in few.items())
        assert len(domains) - sum(domains.count(d) for d in few) >= 4
        assert min(config.test_rows, config.variants.corrupted.examples) >= 200


def test_the_paper_size_is_planned_to_the_shape(capsys):
    config = config_of("paper")
    config.finetune.plan = True
    output = study.run(config)
    assert output["parameters"] == pytest.approx(7.62e9, rel=1e-3)
    assert "parameters" in capsys.readouterr().out


def test_common_beginnings_leave_every_prompt_a_token_of_its_own():
    assert study._common([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6]]) == 2
    assert study._common([[1, 2], [1, 2, 3]]) == 1
    assert study._common([[1, 2, 3]]) == 2
    assert study._common([[4], [1]]) == 0


def test_right_answers_by_hand():
    rows = [Example("x", "b", ("a", "b")), Example("y", "a", ("a", "b"))]
    scores = np.array([[[-1.0, -2.0], [-1.0, -2.0]], [[-2.0, -1.0], [-1.0, -3.0]]])
    assert_array_equal(right(rows, scores), [[False, True], [True, True]])


def test_the_threshold_is_an_order_statistic_over_other_domains():
    # Nearest of another domain: 0.3, 0.4, 0.3, 0.4; of 4, the floor(5 * 0.4) = 2nd smallest.
    distance = np.array(
        [[0, 0.1, 0.3, 0.5], [0.1, 0, 0.4, 0.6], [0.3, 0.4, 0, 0.1], [0.5, 0.4, 0.1, 0]]
    )
    domains = np.array(["x", "x", "y", "y"])
    assert threshold_of(distance, domains, 0.4) == 0.3
    assert threshold_of(distance, domains, 0.6) == 0.4


def test_a_kernel_of_texts_with_answers_is_a_product_of_kernels():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 4)).astype(np.float32), Gaussian(0.3)
    word = {a: rng.normal(size=4).astype(np.float32) for a in ("yes", "no")}
    answers = ["yes", "no", "yes"]
    rows = beside(x, answers, word, SimpleNamespace(answer_weight=0.5))
    y = 0.5 * np.stack([word[a] for a in answers])
    product = np.asarray(gram(kernel, x, x)) * np.asarray(gram(kernel, y, y))
    assert_allclose(np.asarray(gram(kernel, rows, rows)), product, rtol=1e-5)


def test_the_random_model_is_the_same_each_time_and_reads_bytes():
    first, second = (models.open_model(SimpleNamespace(name="random-tiny")) for _ in range(2))
    assert_array_equal(first.params["embed"], second.params["embed"])
    assert len(models.encode(first, "ab é")) == 5
    assert first.tokenizer.decode(models.encode(first, "ab é")) == "ab é"
