"""Experiments with language models: fine-tuned, docked, selected, used; and the dock that ships."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import build as build_config
from configs import evaluate as evaluate_config
from configs import finetune as finetune_config
from configs import select as select_config
from experiments import build, evaluate, finetune, models, select
from learnware_jax.dock import store
from learnware_jax.dock.labelled import Example, load_examples
from learnware_jax.dock.texts import read_pairs
from learnware_jax.slm import lora
from learnware_jax.slm.evaluate import accuracy, same_answer

SHIPPED = Path(__file__).parent.parent / "docks" / "quickstart"
TASKS = ("recurrences", "arithmetic")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A dock of two learnwares, tuned for four steps, and the folder they were tuned in."""
    folder = tmp_path_factory.mktemp("models")
    config = build_config.get_config("smoke")
    config.tasks, config.labelled = (), TASKS
    config.dock, config.finetune.workdir = str(folder / "dock"), str(folder / "finetune")
    assert build.run(config)["added"] == list(TASKS)
    return folder


@pytest.fixture(scope="module")
def evaluated(built):
    config = evaluate_config.get_config("smoke")
    config.dock, config.workdir = str(built / "dock"), str(built / "evaluate")
    return config, evaluate.run(config)


def test_fine_tuning_writes_adapters_metrics_and_summaries(built):
    for task in TASKS:
        home = built / "finetune" / task
        rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        summary = json.loads((home / "summary.json").read_text())
        assert summary["loss"] == rows[-1]["loss"][task]
        assert summary["tokens"] == sum(row["tokens"] for row in rows)
        assert list((home / "tensorboard").glob("events*"))
        assert json.loads((home / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_a_learnware_carries_its_adapter_and_a_card_that_says_how_it_does(built):
    for task in TASKS:
        learnware = store.read_learnware(built / "dock", task)
        files = store.read_adapter(built / "dock", task)
        folder = built / "finetune" / task / "adapter"
        assert files == {file.name: file.read_bytes() for file in folder.iterdir()}
        card = learnware.card
        assert card["model"]["name"] == "SmolLM2-135M-Instruct"
        assert card["evaluation"]["rows"] == 8 and 0 <= card["evaluation"]["accuracy"] <= 1
        assert card["training"]["steps"] == 4 and card["training"]["examples"] == 16
        assert learnware.header.about["n"] == 32
    assert card["labels"] == [] and card["metric"] == "exact"


def test_fine_tuning_that_was_stopped_goes_on_to_the_same_bytes(built, tmp_path):
    config = finetune_config.get_config("smoke")
    config.tasks, config.workdir = TASKS[:1], str(tmp_path)

    with pytest.MonkeyPatch.context() as patch:
        call = finetune._Log.__call__

        def stop_after_three(log, done, *rest):
            call(log, done, *rest)
            if done == 3:
                raise KeyboardInterrupt

        patch.setattr(finetune._Log, "__call__", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config)
    assert [p.name for p in (tmp_path / TASKS[0] / "checkpoints").iterdir()] == ["2"]
    finetune.run(config)
    home, once = tmp_path / TASKS[0], built / "finetune" / TASKS[0]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (home / "adapter" / name).read_bytes() == (once / "adapter" / name).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (home, once)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_evaluation_writes_the_interface(evaluated):
    config, output = evaluated
    assert json.loads((Path(config.workdir) / "results.json").read_text()) == output
    assert [row["task"] for row in output["tasks"]] == ["recurrences", "arithmetic-questions"]
    wanted = {"task", "domain", "n", "base", "random", "selected", "oracle", "stderr"}
    for row in output["tasks"]:
        assert wanted | {"selected_id"} <= row.keys()
        assert row["n"] == 6 and row["selected_id"] in TASKS
        assert row["oracle"] == max(row["accuracy"].values()) >= row["selected"]
        assert row["random"] == pytest.approx(np.mean(list(row["accuracy"].values())))
        assert row["selected"] == row["accuracy"][row["selected_id"]]
        assert row["gain"] == pytest.approx(row["selected"] - row["base"])
    assert [row["kind"] for row in output["tasks"]] == ["same", "unseen"]
    assert output["tasks"][0]["selected_id"] == "recurrences"
    assert output["summary"]["all"]["tasks"] == 2 and output["summary"]["choices"]["tasks"] == 1
    assert "averaged" not in output["summary"]["all"]
    assert (Path(config.workdir) / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_the_table_by_hand():
    job = evaluate.Job("t", "labelled", "d", "", [], [Example("x", "a", ("a", "b"))] * 4)
    correct = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]], bool)
    row = evaluate.summary_row(job, correct, ["first", "second"], "first")
    assert (row["base"], row["random"], row["selected"], row["oracle"]) == (0.25, 0.625, 0.5, 0.75)
    assert (row["selected_id"], row["oracle_id"]) == ("first", "second")
    # Differences -1, 1, 1, 0: mean 1/4, variance (25 + 9 + 9 + 1) / 16 / 3.
    assert row["gain"] == 0.25
    assert row["gain_stderr"] == pytest.approx((44 / 48) ** 0.5 / 2)
    assert row["stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)


def test_a_summary_by_hand_and_why_a_selection_loses():
    shared = {"n": 4, "stderr": 0.1, "gain_stderr": 0.1, "oracle_id": "b"}
    rows = [
        {"task": "a", "kind": "same", "selected_id": "a", "decision": "a", "averaged": 0.7}
        | {"base": 0.5, "random": 0.4, "selected": 0.8, "oracle": 0.8, "gain": 0.3},
        {"task": "c", "kind": "unseen", "selected_id": "a", "decision": "none"}
        | {"base": 0.5, "random": 0.2, "selected": 0.4, "oracle": 0.6, "gain": -0.1},
    ]
    rows = [shared | row for row in rows]
    summary = evaluate.summarise(rows)
    assert summary["all"]["gap_closed"] == pytest.approx((0.6 - 0.3) / (0.7 - 0.3))
    assert summary["all"]["selected_beats_base"] == 1 and summary["same"]["tasks"] == 1
    assert summary["choices"]["averaged"] == 0.7 and "averaged" not in summary["all"]
    lines = evaluate.table(rows)
    assert lines[-1] == (
        "c: a does not beat the base model: no learnware was made for this task, and b would have "
        "done better; the dock did say that none fits."
    )


def test_records_hold_every_item_and_give_the_table(evaluated):
    config, output = evaluated
    for row in output["tasks"]:
        file = Path(config.workdir) / "records" / f"{row['task']}.json"
        record = json.loads(file.read_text())
        assert record["row"] == row and len(record["items"]) == 6
        rows = load_examples(row["task"], "test", 6)
        assert [item["wanted"] for item in record["items"]] == [e.answer for e in rows]
        shares = {"base": row["base"], **row["accuracy"]}
        shares |= {way: row[way] for way in ("merged", "routed", "averaged") if way in row}
        for name, share in shares.items():
            given = [
                ({**i["ways"], **i["learnwares"], "base": i["base"]})[name] for i in record["items"]
            ]
            right = [
                same_answer(a, i["wanted"]) for a, i in zip(given, record["items"], strict=True)
            ]
            assert np.mean(right) == share


def test_a_finished_task_is_not_computed_again_unless_something_changed(evaluated, monkeypatch):
    config, output = evaluated

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(evaluate, "evaluate_job", fail)
    assert evaluate.run(config) == output
    changed = config.copy_and_resolve_references()
    changed.scoring.by = "bytes"
    with pytest.raises(AssertionError, match="computed again"):
        evaluate.run(changed)


def test_own_rows_are_halved_into_texts_to_select_by_and_rows_to_score(built, tmp_path):
    rows = [
        {"q": f"T(n) = {i}T(n/2) + O(n^3)", "a": ("rest", "recursion")[i % 2]} for i in range(8)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = evaluate_config.get_config("smoke")
    config.tasks, config.dock, config.workdir = (), str(built / "dock"), str(tmp_path / "work")
    config.data = finetune_config.source(str(tmp_path / "mine.jsonl"), "q", "a")
    (job,) = evaluate.jobs_of(config)
    assert len(job.texts) == 4 and len(job.rows) == 4
    assert not set(job.texts) & {example.text for example in job.rows}
    assert job.kind == "own"
    config.data.labels = ("recursion", "rest")
    assert {example.choices for example in evaluate.jobs_of(config)[0].rows} == {
        ("recursion", "rest")
    }


def test_words_in_a_column_become_choices(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx one,0\ny two,1\n")
    source = finetune_config.source(str(tmp_path / "a.csv"), "text", "label", ("no", "yes"))
    assert sorted(finetune.read_source(source, 10)) == [
        Example("x one", "no", ("no", "yes")),
        Example("y two", "yes", ("no", "yes")),
    ]


def test_the_demo_uses_the_selected_model(built, tmp_path):
    config = select_config.get_config("smoke")
    config.dock, config.workdir = str(built / "dock"), str(tmp_path)
    config.build.tasks, config.build.labelled = (), TASKS
    config.users.unseen, config.users.outside = (), ()
    config.use.users, config.use.scoring.rows = ("recurrences",), 4
    output = select.run(config)
    (row,) = output["use"]
    assert row["task"] == "recurrences" and row["selected_id"] == "recurrences" and row["n"] == 4
    assert f"| {row['base']:.2f} | {row['random']:.2f} |" in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def model():
    return models.open_model(evaluate_config.get_config("smoke").model)


def usable(path, model, template="plain"):
    learnwares = store.load(path)
    return models.dock_adapters(str(path), learnwares, model, models.template_of(template))


def strip(path, id):
    """Take a learnware's adapter away."""
    learnware = store.read_learnware(path, id)
    del learnware.card["adapter"]
    store.add(path, learnware, replace=True)


def test_learnwares_that_cannot_be_used_are_named_and_the_others_serve(
    built, tmp_path, model, capsys
):
    path = tmp_path / "dock"
    shutil.copytree(built / "dock", path)
    ids, adapters = usable(path, model)
    assert ids == sorted(TASKS) and adapters.scale.shape == (2,)
    learnware = store.read_learnware(path, "arithmetic")
    adapter = store.read_adapter(path, "arithmetic")
    learnware.card["model"]["weights_sha256"] = "0" * 64
    store.add(path, learnware, adapter=adapter, replace=True)
    ids, _ = usable(path, model)
    assert ids == ["recurrences"]
    assert "arithmetic is not used: it is for SmolLM2-135M-Instruct" in capsys.readouterr().err
    learnware = store.read_learnware(built / "dock", "arithmetic")
    store.add(path, learnware, adapter=adapter, replace=True)
    assert usable(path, model)[0] == sorted(TASKS)
    strip(path, "arithmetic")
    assert usable(path, model)[0] == ["recurrences"]
    assert "has a specification and no adapter" in capsys.readouterr().err
    strip(path, "recurrences")
    with pytest.raises(ValueError, match="no learnware has an adapter for SmolLM2-135M-Instruct"):
        usable(path, model)
    with pytest.raises(ValueError, match="with template 'chatml'"):
        usable(built / "dock", model, "chatml")


def test_a_card_that_does_not_say_which_model_is_refused(built, tmp_path, model, capsys):
    path = tmp_path / "dock"
    shutil.copytree(built / "dock", path)
    learnware = store.read_learnware(path, "arithmetic")
    learnware.card["model"] = "a good one"
    files = store.read_adapter(path, "arithmetic")
    store.add(path, learnware, adapter=files, replace=True)
    assert usable(path, model)[0] == ["recurrences"]
    assert "its card says model: 'a good one'" in capsys.readouterr().err


def test_an_own_adapter_joins_a_dock_and_can_be_used(built, tmp_path, model):
    path = tmp_path / "dock"
    shutil.copytree(built / "dock", path)
    own = build_config.get_config("own")
    own.dock, own.learnware.id = str(path), "my-model"
    own.learnware.data = str(tmp_path / "train.txt")
    Path(own.learnware.data).write_text("\n".join(f"T(n) = {i}T(n/3) + O(n)" for i in range(9)))
    own.specification = build_config.specification(smoke=True)
    own.learnware.adapter = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"my-model: adapter: .*there is no .*adapter_config.json"):
        build.run(own)
    folder = tmp_path / "adapter"
    shutil.copytree(built / "finetune" / "arithmetic" / "adapter", folder)
    own.learnware.adapter = str(folder)
    note = folder / "adapter_config.json"
    whole = note.read_text()
    note.write_text(whole.replace('"plain"', '"chatml"'))
    with pytest.raises(ValueError, match=r"says that it is for template 'chatml' \(at hand 'pl"):
        build.run(own)
    assert store.list_ids(path) == sorted(TASKS)
    note.write_text(whole)
    assert build.run(own)["added"] == ["my-model"]
    ids, adapters = usable(path, model)
    assert ids == ["arithmetic", "my-model", "recurrences"]
    np.testing.assert_array_equal(adapters.a["query"][0], adapters.a["query"][1])
    own.learnware.id, own.learnware.data = "", ""
    with pytest.raises(ValueError, match=r"and both for learnware\.adapter"):
        build.run(own)


QUESTIONS = [f"Is drug number {i} safe for a patient with asthma?" for i in range(24)]


@pytest.fixture
def submitted(built, tmp_path):
    """The configuration of a build of two adapters with their texts; one has a card."""
    home = tmp_path / "adapters"
    for name, task in (("halving", "recurrences"), ("asthma", "arithmetic")):
        shutil.copytree(built / "finetune" / task / "adapter", home / name)
    (home / "halving" / "texts.txt").write_text(
        "\n".join(f"T(n) = {i}T(n/3) + O(n)" for i in range(9))
    )
    (home / "asthma" / "texts.csv").write_text(
        "id,question\n" + "\n".join(f"1,{q}" for q in QUESTIONS)
    )
    card = {"name": "Asthma", "domain": "medicine", "language": "en", "licence": "MIT"}
    (home / "asthma" / "card.json").write_text(json.dumps(card))
    (home / "notes.txt").touch()
    (home / ".cache").mkdir()
    config = build_config.get_config("own")
    config.dock, config.adapters = str(tmp_path / "dock"), str(home)
    config.specification = build_config.specification(smoke=True)
    return config


def test_a_folder_of_adapters_becomes_a_dock(submitted, built, model, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.common.cache_dir", lambda: tmp_path / "cache")
    assert build.run(submitted)["added"] == ["asthma", "halving"]
    path = Path(submitted.dock)
    assert store.check(path) == []
    asthma, halving = store.load(path)
    assert asthma.header.about["n"] == 24 and len(asthma.spec.beta) == 12
    assert halving.header.about["n"] == 9 and len(halving.spec.beta) == 4
    described = models.describe(model, models.template_of("plain"))
    adapter = asthma.card.pop("adapter")
    assert set(adapter) == set(store.ADAPTER_FILES)
    assert asthma.card == {
        **{"name": "Asthma", "domain": "medicine", "language": "en", "licence": "MIT"},
        "model": described,
    }
    assert halving.card["name"] == "halving"
    ids, adapters = usable(path, model)
    assert ids == ["asthma", "halving"] and adapters.scale.shape == (2,)
    for id, task in (("asthma", "arithmetic"), ("halving", "recurrences")):
        assert store.read_adapter(path, id) == store.read_adapter(built / "dock", task)
    for file in path.rglob("*"):
        assert file.is_dir() or b"drug number" not in file.read_bytes()
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_adapters_that_was_stopped_goes_on(submitted, capsys):
    home, path = Path(submitted.adapters), Path(submitted.dock)
    build.run(submitted)
    kept = store.read_learnware(path, "halving")
    store.remove(path, "asthma")
    assert build.run(submitted)["added"] == ["asthma"]
    assert "same adapters, and keeps them: halving." in capsys.readouterr().err
    assert store.read_learnware(path, "halving").header == kept.header
    # Under an id that is taken, another adapter is no continuation.
    shutil.copy(home / "asthma" / "adapter_model.safetensors", home / "halving")
    before = store.read_adapter(path, "halving")
    with pytest.raises(ValueError, match=r"halving: .* has another learnware of that id already"):
        build.run(submitted)
    assert store.read_adapter(path, "halving") == before


def swap(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def put_nan(file: Path) -> None:
    arrays = safetensors.numpy.load_file(file)
    next(iter(arrays.values()))[0, 0] = np.nan
    safetensors.numpy.save_file(arrays, file)


FAULTS = {
    "numbers": (
        lambda f: put_nan(f / "adapter_model.safetensors"),
        "adapter: from_peft: .* holds numbers that are not finite",
    ),
    "weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99),
        "adapter: from_peft: adapter_model.safetensors is no whole safetensors file",
    ),
    "shapes": (
        lambda f: swap(f / "adapter_config.json", '"r": 4', '"r": 5'),
        "adapter: from_peft: the adapter does not fit the model: ",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        r"adapter: build: there is no .*adapter_model\.safetensors",
    ),
    "another model": (
        lambda f: swap(f / "adapter_config.json", '"weights_sha256": "', '"weights_sha256": "0'),
        "adapter: it says that it is for weights_sha256 '0",
    ),
    "no texts": (
        lambda f: (f / "texts.txt").unlink(),
        r"texts: got none; want one of texts\.jsonl",
    ),
    "two files": (
        lambda f: (f / "texts.csv").touch(),
        r"texts: got texts\.csv and texts\.txt; want one of",
    ),
    "blank": (lambda f: (f / "texts.txt").write_text(" \n\n"), "texts: .* holds no text: every"),
    "one text": (lambda f: (f / "texts.txt").write_text("a b"), "texts: .* holds 1 distinct"),
    "card": (lambda f: (f / "card.json").write_text("[]"), "card: .* holds a list; want a JSON ob"),
    "domain": (
        lambda f: (f / "card.json").write_text('{"domain": 3}'),
        "card: .* its domain is 3; want a string",
    ),
    "reserved": (
        lambda f: (f / "card.json").write_text('{"evaluation": {"accuracy": 1}, "model": "x"}'),
        "card: got evaluation, model, found out by this program; take it off",
    ),
    "id": (lambda f: f.rename(f.parent / "Halving"), "Halving: id: .*'Halving' is not an id"),
}


def test_everything_that_is_wrong_with_adapters_is_told_at_once(submitted, tmp_path):
    home = Path(submitted.adapters)
    for name in FAULTS:
        shutil.copytree(home / "halving", home / f"bad-{name.replace(' ', '-')}")
    for name, (spoil, _) in FAULTS.items():
        spoil(home / f"bad-{name.replace(' ', '-')}")
    # One learnware with three faults has three lines.
    (home / "halving" / "adapter_config.json").write_text("{}")
    (home / "halving" / "texts.txt").unlink()
    (home / "halving" / "card.json").write_text("no json")
    with pytest.raises(ValueError, match=r"nothing was done, and .* is as it was") as caught:
        build.run(submitted)
    _, *lines = str(caught.value).split("\n")
    assert len(lines) == len(FAULTS) + 3
    for name, (_, message) in FAULTS.items():
        assert any(re.search(message, line) for line in lines), name
    assert sum(line.startswith("  halving: ") for line in lines) == 3
    assert not any(line.startswith("  asthma: ") for line in lines)
    assert not Path(submitted.dock).exists()


def test_a_folder_without_adapters_and_a_name_twice(submitted, tmp_path):
    submitted.labelled = ("recurrences",)
    submitted.finetune.workdir = str(tmp_path / "finetune")
    (Path(submitted.adapters) / "halving").rename(Path(submitted.adapters) / "recurrences")
    with pytest.raises(ValueError, match="recurrences: id: a task that this build makes"):
        build.run(submitted)
    assert not (tmp_path / "finetune").exists()
    submitted.adapters = str(Path(submitted.adapters) / "asthma")
    with pytest.raises(FileNotFoundError, match=r"there is no folder in .*asthma; want one for ea"):
        build.run(submitted)
    submitted.learnware.id, submitted.learnware.data = "a", "b.txt"
    with pytest.raises(ValueError, match="adapters only without them"):
        build.run(submitted)


def test_finished_adapters_of_other_settings_are_refused_and_kept(built):
    config = finetune_config.get_config("smoke")
    config.workdir = str(built / "finetune")
    config.rate = 1e-3
    file = built / "finetune" / TASKS[0] / "adapter" / "adapter_model.safetensors"
    before = file.read_bytes()
    with pytest.raises(ValueError, match="made from other data or with other settings"):
        finetune.run(config)
    assert file.read_bytes() == before


def test_a_second_process_in_one_folder_is_told(tmp_path):
    config = finetune_config.get_config("smoke")
    config.tasks, config.workdir = TASKS[:1], str(tmp_path)
    (tmp_path / TASKS[0]).mkdir()
    with (
        filelock.FileLock(tmp_path / TASKS[0] / ".lock"),
        pytest.raises(TimeoutError, match="another process is training in"),
    ):
        finetune.run(config)


def test_metrics_that_were_cut_by_a_kill_are_read_up_to_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert finetune._read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_rows_sorted_by_label_are_mixed_and_ambiguous_texts_left_out(tmp_path):
    lines = [{"t": f"text {i}", "a": int(i >= 20)} for i in range(40)]
    lines += [{"t": "both", "a": 0}, {"t": "both", "a": 1}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    source = finetune_config.source(str(file), "t", "a", ("no", "yes"))
    examples = finetune.read_source(source, 100)
    assert len(examples) == 40
    for part in (examples[:20], examples[20:]):
        assert 4 <= sum(example.answer == "yes" for example in part) <= 16
    file.write_text('{"t": "x", "a": -1}\n')
    with pytest.raises(ValueError, match="the answers -1, which are neither labels nor their pl"):
        finetune.read_source(source, 100)


def test_a_free_answer_is_the_first_line():
    assert models.first_line("\n 42 \n\n17 + 4") == "42"
    assert models.first_line("\n \n") == ""


def test_length_normalisation_divides_by_bytes(model):
    config = evaluate_config.get_config("smoke")
    rows = [Example("Paris is in", "France", ("France", "the United Kingdom"))]
    base = lora.stack([lora.init_adapter(jax.random.key(0), model.config, rank=1, alpha=1.0)])

    def scores(by):
        config.scoring.by = by
        template = models.template_of("plain")
        return models.scorer(model, template, "Continue.", rows, config.scoring)(base)[0, 0]

    np.testing.assert_allclose(scores("bytes"), scores("sum") / [6, 18])
    with pytest.raises(ValueError, match="got by='tokens'"):
        scores("tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("arithmetics",)}, "is no task .*did you mean arithmetic"),
        ({"tasks": ()}, "nothing to do; set tasks, or data.mine.source"),
        ({"template": "chat-ml"}, "got 'chat-ml' .did you mean chatml"),
        ({"sharding": "both"}, "got sharding='both'"),
        ({"train": "a"}, "got train='a'; want 'b' or 'ab'"),
        ({"model.name": "nobody"}, "there is no file or folder nobody"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, change, message):
    config = finetune_config.get_config("smoke")
    config.workdir = str(tmp_path / "work")
    config.update_from_flattened_dict(change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune.run(config)
    assert not (tmp_path / "work").exists()


def test_pairs_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": " two\\n words", "n": 3}\n{"q": "b", "n": true}\n')
    pairs = read_pairs(tmp_path / "a.jsonl", text="q", answer="n")
    assert pairs == [("two words", "3"), ("b", "true")]
    (tmp_path / "b.jsonl").write_text('{"q": "a", "n": 3}\n{"q": "", "n": 4}\n')
    with pytest.raises(ValueError, match=r"row 2 of .*b.jsonl has a blank text or answer"):
        read_pairs(tmp_path / "b.jsonl", text="q", answer="n")
    with pytest.raises(ValueError, match="has no column 'm'"):
        read_pairs(tmp_path / "b.jsonl", text="q", answer="m")
    (tmp_path / "c.txt").write_text("only texts\n")
    with pytest.raises(ValueError, match="has no columns"):
        read_pairs(tmp_path / "c.txt", text="q", answer="n")


# The dock that comes with the repository


def test_the_shipped_dock_is_sound_and_small():
    assert store.check(SHIPPED) == []
    learnwares = store.load(SHIPPED)
    domains = Counter(learnware.card["domain"] for learnware in learnwares)
    assert len(learnwares) >= 12
    assert all(domains[name] >= 4 for name in ("finance", "medicine", "mathematics"))
    weights = sum(file.stat().st_size for file in SHIPPED.rglob("adapter_model.safetensors"))
    assert weights <= 8e6


def test_a_shipped_model_does_its_task_and_the_base_model_does_not(model):
    config = evaluate_config.get_config("smoke")
    learnware = store.read_learnware(SHIPPED, "icd10-injuries")
    adapter = lora.from_peft(store.read_adapter(SHIPPED, learnware.id), model.config)
    rows = load_examples(learnware.id, "test", 24)
    scored = models.score_examples(
        model,
        models.template_of("plain"),
        learnware.card["instruction"],
        rows,
        models.with_base(lora.stack([adapter])),
        config.scoring,
    )
    base, tuned = (accuracy(correct).value for correct in scored.correct)
    assert base < 0.5 < 0.75 < tuned
