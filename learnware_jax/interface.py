"""What people use besides the packages: a model asked in words, rankings and results as frames."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from learnware_jax.dock.store import StrPath, card_of, read_adapter
from learnware_jax.selection.decision import Selection
from learnware_jax.slm import lora
from learnware_jax.slm.decoder import Adapter
from learnware_jax.slm.evaluate import Question, answers, choice_scores
from learnware_jax.slm.weights import Model
from learnware_jax.specification.header import parse_json, printable

if TYPE_CHECKING:
    from pandas import DataFrame


def load_adapter(path: StrPath, id: str, model: Model) -> Adapter:
    """The adapter of learnware `id` of the dock at `path`, for `model`.

    ValueError if the card says that it was made for other weights, or if it does not fit the model;
    other errors as in `store.read_adapter`.

    >>> from learnware_jax import fetch, load_adapter, load_model
    >>> model = load_model(fetch("SmolLM2-135M-Instruct"))
    >>> adapter = load_adapter("docks/quickstart", "arithmetic", model)
    >>> adapter.a["query"].shape  # layers, inputs, rank
    (30, 576, 4)
    """
    made_for = card_of(path, id).get("model")
    made_for = made_for if isinstance(made_for, dict) else {}
    if made_for.get("weights_sha256") != model.weights_sha256:
        raise ValueError(
            f"load_adapter: {id!r} of {path} was made for {printable(str(made_for.get('name')))}, "
            f"weights {printable(str(made_for.get('weights_sha256')))}; at hand is {model.name}, "
            f"weights {model.weights_sha256}. Load the model that its card names."
        )
    return lora.from_peft(read_adapter(path, id), model.config)


def ask(
    model: Model,
    prompts: Sequence[str],
    *,
    adapter: Adapter | None = None,
    choices: Sequence[str] = (),
    steps: int = 16,
) -> list[str]:
    """The answer of a model, with or without an adapter, to every prompt.

    With `choices`, the one that is likeliest behind the prompt and a blank; otherwise what greedy
    decoding writes, at most `steps` tokens. A special token spelt out in a prompt is one.
    ValueError for no prompt, an empty one, or one beyond the model's positions.

    >>> from learnware_jax import ask, fetch, load_adapter, load_model
    >>> model = load_model(fetch("SmolLM2-135M-Instruct"))
    >>> adapter = load_adapter("docks/quickstart", "arithmetic", model)
    >>> ask(model, ["Calculate.\\n17 + 25\\nAnswer:"], adapter=adapter, steps=4)
    [' 42']
    """

    def encode(text):
        return model.tokenizer.encode(text, add_special_tokens=False).ids

    start = [] if model.start is None else [model.start]
    tokens = [start + encode(prompt) for prompt in prompts]
    if adapter is None:  # one that changes nothing
        adapter = lora.init_adapter(
            jax.random.key(0), model.config, rank=1, alpha=1.0, targets=("query",)
        )
    adapters = lora.stack([adapter])
    if choices:
        options = [encode(f" {choice}") for choice in choices]
        questions = [Question(prompt, options) for prompt in tokens]
        scores = choice_scores(model.params, model.config, questions, adapters=adapters)[0]
        return [choices[int(i)] for i in np.argmax(scores, axis=1)]
    (found,) = answers(
        model.params, model.config, tokens, adapters=adapters, steps=steps, end=model.end
    )
    return [model.tokenizer.decode(ids) for ids in found]


def frame(selection: Selection, domains: Mapping[str, str] | None = None) -> "DataFrame":
    """A ranking as a data frame: a row a learnware, closest first, indexed by its rank from 1.

    Columns: id, domain (of `domains`, by id; left out without them), distance (unbiased squared
    MMD), lower and upper (ends of its interval), undominated (whether it may be the closest).

    >>> import numpy as np
    >>> from learnware_jax import RKME, build_pool, frame, select
    >>> from learnware_jax.specification.kernels import Gaussian
    >>> low, high = (RKME(np.array([[x], [x + 1]]), np.array([0.5, 0.5])) for x in (0.0, 9.0))
    >>> kernel, ids = Gaussian(0.1), ["low", "high"]
    >>> pool = build_pool([low, high], kernel, ids=ids, n=[40, 40], residual=[0.0, 0.0])
    >>> found = select(high, pool, n=40, residual=0.0, threshold=0.1)
    >>> table = frame(found, {"low": "cold", "high": "warm"})
    >>> table[["id", "domain", "undominated"]].values.tolist()
    [['high', 'warm', True], ['low', 'cold', False]]
    """
    import pandas

    columns = {
        "id": selection.ids,
        "distance": selection.distance,
        "lower": selection.lower,
        "upper": selection.upper,
        "undominated": [name in selection.undominated for name in selection.ids],
    }
    table = pandas.DataFrame(columns, pandas.RangeIndex(1, len(selection.ids) + 1, name="rank"))
    if domains is not None:
        table.insert(1, "domain", [domains[name] for name in selection.ids])
    return table


def read_results(path: StrPath) -> "dict[str, DataFrame]":
    """The results.json of an experiment (the file, or the folder it lies in) as data frames.

    Every list of records is a frame, a row a record, named by its path in the file: "users",
    "users.ranking". What a record holds by name has a column each, "summary.accuracy"; a list of
    records in records has a column named as theirs, which says in which row of their frame each
    belongs. Everything else is the one row of the frame "results". ValueError if the file is no
    JSON object.

    >>> from learnware_jax import read_results
    >>> results = read_results("experiments/results/evaluate_quickstart.json")
    >>> sorted(results)
    ['results', 'tasks']
    >>> task = results["tasks"].loc[0]
    >>> task["task"], int(task["n"]), float(task["accuracy.reuters-companies"])
    ('reuters-companies', 64, 1.0)
    """
    import pandas

    file = Path(path)
    file = file / "results.json" if file.is_dir() else file
    content = parse_json(file.read_bytes(), where=f"read_results: {file}")
    if not isinstance(content, dict):
        raise ValueError(
            f"read_results: {file} holds a {type(content).__name__}; want the results of an "
            "experiment, a JSON object."
        )
    tables: dict[str, list[dict]] = {"results": []}

    def add(record, table, within):
        row = dict(within)
        place = {table: len(tables[table])} if table != "results" else {}
        tables[table].append(row)
        for name, value in _flat(record):
            if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
                inner = f"{table}.{name}" if table != "results" else name
                tables.setdefault(inner, [])
                for each in value:
                    add(each, inner, place)
            else:
                row[name] = value

    add(content, "results", {})
    return {name: pandas.DataFrame(rows) for name, rows in tables.items()}


def _flat(record: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a record and of the records in it, each under its path."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
