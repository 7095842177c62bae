"""The public names: few, explained by examples that run, and free until they are used."""

import ast
import doctest
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import learnware_jax as lw
from experiments.models import open_model
from learnware_jax import frame, read_results
from learnware_jax.dock import store
from learnware_jax.selection.decision import Selection
from learnware_jax.selection.pool import members
from learnware_jax.selection.ranking import distances
from learnware_jax.slm import decoder
from learnware_jax.slm.lora import init_adapter

ROOT = Path(__file__).parents[1]


# Opened once for all examples.
OPENED = {name: functools.cache(getattr(lw, name)) for name in ("load_model", "load_encoder")}


@pytest.mark.parametrize("name", lw.__all__)
def test_the_example_of_every_public_name_runs(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    thing = getattr(lw, name)
    for opened, function in OPENED.items():
        monkeypatch.setitem(vars(lw), opened, function)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = [found for found in finder.find(thing, name, globs={}) if found.examples]
    assert name in example.docstring.split(">>>", 1)[1]
    done = doctest.DocTestRunner().run(example)
    assert done.failed == 0, capsys.readouterr().out


def test_type_checkers_and_people_are_told_the_same_names():
    tree = ast.parse(Path(lw.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {(alias.name, node.module) for node in checked.body for alias in node.names}
    homes = {(n, f"learnware_jax.{module}") for n, module in lw._HOME.items()}
    assert told == homes
    assert lw.__all__ == sorted(lw._HOME) == sorted(set(lw.__all__))
    assert len(lw.__all__) <= 15
    assert set(lw.__all__) <= set(dir(lw))
    assert (ROOT / "learnware_jax" / "py.typed").read_text() == ""


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'learnware_jax' has no attribute 'ranking_of'"):
        lw.ranking_of  # noqa: B018


def test_importing_the_package_imports_nothing_of_it_and_nobody_elses():
    code = """
import sys
before = set(sys.modules)
import learnware_jax
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    new = {
        name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert new == {"learnware_jax"}


def test_an_open_dock_refuses_users_beyond_its_closest_domains(tmp_path):
    dock = lw.open_dock(ROOT / "docks" / "quickstart")
    apart = distances(members(dock.pool), dock.pool, n=dock.pool.n[:14].tolist())
    foreign = [
        apart[i, j]
        for i, a in enumerate(dock.pool.ids)
        for j, b in enumerate(dock.pool.ids)
        if dock.domains[a] != dock.domains[b]
    ]
    # One in ten of 14 and a further one: the first of the 14 alone.
    assert dock.threshold == min(foreign)
    assert lw.open_dock(ROOT / "docks" / "quickstart", false_acceptance=0.05).threshold == np.inf
    store.create_dock(tmp_path / "dock", dock.space)
    with pytest.raises(ValueError, match="dock has no sound learnware; see"):
        lw.open_dock(tmp_path / "dock")
    for rate in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=f"got false_acceptance={rate}; want a rate between"):
            lw.open_dock(ROOT / "docks" / "quickstart", false_acceptance=rate)


@functools.cache
def tiny():
    """A model that answers at random, and an adapter that changes its answers."""
    model = open_model(ConfigDict({"name": "random-tiny"}))
    adapter = init_adapter(jax.random.key(0), model.config, rank=2, alpha=2.0, targets=("value",))
    noise = jax.random.normal(jax.random.key(1), adapter.b["value"].shape)
    return model, adapter._replace(b={"value": 3 * noise})


def encode(text):
    return tiny()[0].tokenizer.encode(text).ids


@jax.jit
def log_probabilities(ids, adapter):
    model = tiny()[0]
    hidden, _ = decoder.forward(model.params, ids[None], config=model.config, adapter=adapter)
    return jax.nn.log_softmax(decoder.logits(model.params, hidden, config=model.config)[0])


def scores_after(ids, adapter):
    """Log-probabilities of the token behind every one of `ids`, the whole text at once."""
    return np.asarray(log_probabilities(jnp.array(ids), adapter), np.float64)


@pytest.mark.parametrize("adapted", [False, True])
def test_asking_gives_the_likeliest_choice_and_greedy_text(adapted):
    model, adapter = tiny()
    adapter = adapter if adapted else None
    prompts, choices = [f"{letter}?" for letter in "abcdefgh"], ("yes", "not", "may")

    def likelihood(prompt, choice):
        behind = encode(f" {choice}")
        scores = scores_after([*encode(prompt), *behind], adapter)[len(encode(prompt)) - 1 :]
        return sum(row[token] for row, token in zip(scores[:-1], behind, strict=True))

    wanted = [max(choices, key=lambda choice: likelihood(prompt, choice)) for prompt in prompts]
    assert lw.ask(model, prompts, choices=choices, adapter=adapter) == wanted
    assert len(set(wanted)) > 1

    ids = encode("Who")
    for _ in range(3):
        ids.append(int(scores_after(ids, adapter)[-1].argmax()))
    assert model.end not in ids
    assert lw.ask(model, ["Who"], adapter=adapter, steps=3) == [model.tokenizer.decode(ids[3:])]


def test_an_adapter_is_only_for_its_own_model():
    model = tiny()[0]
    with pytest.raises(ValueError, match=r"'arithmetic' of .* was made for SmolLM2-135M-Instruct"):
        lw.load_adapter(ROOT / "docks" / "quickstart", "arithmetic", model)


def test_a_ranking_as_a_frame():
    found = Selection(
        ids=("b", "a", "c"),
        distance=np.array([-0.1, 0.2, 0.4]),
        lower=np.array([-0.3, 0.1, 0.2]),
        upper=np.array([0.1, 0.3, 0.6]),
        undominated=("b", "c"),
        decision="b",
    )
    table = frame(found, {"a": "law", "b": "medicine", "c": "law"})
    assert table.reset_index().to_dict("list") == {
        "rank": [1, 2, 3],
        "id": ["b", "a", "c"],
        "domain": ["medicine", "law", "law"],
        "distance": [-0.1, 0.2, 0.4],
        "lower": [-0.3, 0.1, 0.2],
        "upper": [0.1, 0.3, 0.6],
        "undominated": [True, False, True],
    }
    assert list(frame(found)) == ["id", "distance", "lower", "upper", "undominated"]


def test_results_as_frames(tmp_path):
    content = {
        "dock": "d",
        "summary": {"mean": 0.5, "rows": [{"n": 8, "score": {"value": 1.0}}]},
        "empty": [],
        "curve": [1, 2],
        "users": [
            {"id": "u", "ranking": [{"id": "a", "distance": 0.1}]},
            {"id": "v", "ranking": [{"id": "b", "distance": 0.2}, {"id": "a", "distance": 0.3}]},
        ],
    }
    (tmp_path / "results.json").write_text(json.dumps(content))
    found = read_results(tmp_path)
    assert {name: table.to_dict("list") for name, table in found.items()} == {
        "results": {"dock": ["d"], "summary.mean": [0.5], "empty": [[]], "curve": [[1, 2]]},
        "summary.rows": {"n": [8], "score.value": [1.0]},
        "users": {"id": ["u", "v"]},
        "users.ranking": {
            "users": [0, 1, 1],
            "id": ["a", "b", "a"],
            "distance": [0.1, 0.2, 0.3],
        },
    }
    # A user's rows are found by the place of the user.
    joined = found["users.ranking"].merge(
        found["users"], left_on="users", right_index=True, suffixes=("", "_user")
    )
    assert joined["id_user"].tolist() == ["u", "v", "v"]
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"list\.json holds a list; want the results"):
        read_results(tmp_path / "list.json")
