"""Select a learnware for every task, use it, and compare: base, random, selected, best.

Example: python -m experiments.evaluate --config=configs/evaluate.py:quickstart
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("evaluate")

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.common import data_line, dock_line, embed_texts, named, say, setting, write_json
from experiments.finetune import read_source
from experiments.models import (
    chosen,
    dock_adapters,
    labelled_of,
    open_model,
    score_examples,
    scorer,
    template_of,
    with_base,
)
from experiments.ranking import OpenDock, Ranked, open_dock, rank_users
from learnware_jax import figures
from learnware_jax.dock import store
from learnware_jax.dock.labelled import Example, load_examples
from learnware_jax.dock.opening import domain_of, threshold_for
from learnware_jax.selection.decision import NONE_FITS
from learnware_jax.selection.regret import gap_closed
from learnware_jax.slm import reuse
from learnware_jax.slm.decoder import Adapter
from learnware_jax.slm.evaluate import accuracy, macro_f1
from learnware_jax.slm.weights import Model
from learnware_jax.specification.kernels import mean_embedding

BASE = "base"
NOTHING = "evaluate: nothing to do; set tasks, or data.source."
COLUMNS = ("base", "random", "selected", "oracle", "merged", "routed", "averaged")


class Job(NamedTuple):
    """Somebody's task: texts to select by, and rows with answers to score on."""

    id: str
    kind: str  # labelled: a task of the catalogue; own: somebody's file
    domain: str
    instruction: str
    texts: list[str]
    rows: list[Example]


class Models(NamedTuple):
    """A language model and the adapters of a dock's learnwares, the base model in front."""

    model: Model
    ids: list[str]
    adapters: Adapter


def jobs_of(config: ConfigDict) -> list[Job]:
    """The tasks that the configuration names. Of those of the catalogue no row was trained on."""
    jobs = [labelled_job(task, config) for task in labelled_of(config.tasks)]
    own = config.data
    if own.source:
        examples = _own_rows(config)
        cut = min(config.texts, len(examples) // 2)
        texts = [example.text for example in examples[:cut]]
        rows = examples[cut:][: config.scoring.rows]
        jobs.append(Job(Path(own.source).stem, "own", "", own.instruction, texts, rows))
    if not jobs:
        raise ValueError(NOTHING)
    return jobs


def _own_rows(config: ConfigDict) -> list[Example]:
    examples = read_source(config.data, config.texts + config.scoring.rows)
    if len(examples) < 4:
        raise ValueError(
            f"evaluate: {config.data.source} has {len(examples)} rows; want at least 4."
        )
    return examples


def labelled_job(task, config: ConfigDict) -> Job:
    """A labelled task with the user's texts and the test rows."""
    texts = [example.text for example in load_examples(task.name, "user", config.texts)]
    rows = load_examples(task.name, "test", config.scoring.rows)
    return Job(task.name, "labelled", task.domain, task.instruction, texts, rows)


def open_models(path: str, learnwares, settings: ConfigDict) -> Models:
    """The model of `settings`, with the adapters of those learnwares that are for it."""
    model = open_model(settings.model)
    ids, adapters = dock_adapters(path, learnwares, model, template_of(settings.template))
    return Models(model, ids, with_base(adapters))


def check(config: ConfigDict) -> None:
    """ValueError for settings that nothing can be evaluated with."""
    if config.scoring.rows < 2 or config.texts < 2:
        raise ValueError(
            f"evaluate: got scoring.rows={config.scoring.rows}, texts={config.texts}; want at "
            "least 2 of both."
        )
    template_of(config.template)


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    lines = {"dock": dock_line(config.dock), "model": config.model.name}
    if tasks := [task.name for task in labelled_of(config.tasks)]:
        lines["tasks"] = f"{named(tasks)}; {config.scoring.rows} rows of each, or as many as it has"
    if config.data.source:
        lines["data"] = data_line(config.data.source, lambda: f"{len(_own_rows(config))} rows")
    if not tasks and not config.data.source:
        raise ValueError(NOTHING)
    following = "evaluate --config=configs/evaluate.py:mine --config.data.source=FILE"
    if config.data.source:
        dock = setting("dock", config.dock)
        following = f"geometry --config=configs/geometry.py:quickstart {dock}"
    return lines | {"next": following}


def run(config: ConfigDict) -> dict:
    """Evaluate; returns what it writes to workdir/results.json."""
    check(config)
    template = template_of(config.template)
    jobs = jobs_of(config)
    models = open_models(config.dock, store.load(config.dock), config)
    dock = open_dock(config.dock, config.specification, only=models.ids)
    domains = [domain_of(learnware) for learnware in dock.learnwares]
    ranked = rank_users(
        dock,
        [job.texts for job in jobs],
        config.specification,
        seed=config.seed,
        threshold=threshold_for(dock.pool, domains, config.false_acceptance),
        mixture=config.mixture,
        own=bool(config.data.source),
    )
    workdir, rows = Path(config.workdir), []
    for i, (job, one) in enumerate(zip(jobs, ranked, strict=True), 1):
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", job.id)
        file = (
            workdir / "records" / (f"{name}.json" if job.kind == "labelled" else f"own-{name}.json")
        )
        digest = _digest(dock, job, config)
        record = json.loads(file.read_text()) if file.exists() else {}
        if record.get("digest") != digest:
            record = {"digest": digest, **evaluate_job(dock, models, job, one, template, config)}
            write_json(file, record)
        rows.append(record["row"])
        say(f"{i} of {len(jobs)}: {_line(record['row'])}")
    output = {"dock": config.dock, "learnwares": len(dock.learnwares), "tasks": rows}
    output["summary"] = summarise(rows)
    write_json(workdir / "results.json", output)
    settings_used = config.to_dict()
    if config.data.source:  # where somebody keeps a file is nobody's business
        settings_used["data"] = {}
    write_json(workdir / "config.json", settings_used)
    figures.save(accuracies(rows), workdir / "accuracy")
    (workdir / "report.md").write_text("\n".join(["# Evaluation", "", *table(rows)]) + "\n")
    show(rows)
    for name in ("accuracy.png", "report.md", "results.json", "records"):
        print(workdir / name)
    return output


def accuracies(rows: Sequence[dict]):
    """A figure of the base model, a random, the best and the selected learnware, task by task."""
    series = {
        "oracle": "best learnware on these rows",
        "base": "base model",
        "random": "mean of all learnwares",
        "selected": "selected learnware ± standard error",
    }
    marks = []
    for row in rows:
        for name, label in series.items():
            error = row["stderr"] if name == "selected" else 0.0
            value = row[name]
            marks.append(figures.Dot(row["task"], value, value - error, value + error, label))
    return figures.dots([("", marks)], label="share of answers that are right")


def evaluate_job(
    dock: OpenDock, models: Models, job: Job, ranked: Ranked, template, config: ConfigDict
) -> dict:
    """One task by every learnware and every way of reuse: {"row": summary, "items": [...]}."""
    model, ids, adapters = models
    scored = score_examples(model, template, job.instruction, job.rows, adapters, config.scoring)
    ways = _reuse(dock, models, job, ranked, template, config, scored)
    first = ranked.selection.ids[0]
    row = summary_row(job, scored.correct, ids, first)
    row |= {way: float(np.mean(right)) for way, (_, right) in ways.items()}
    decision = ranked.selection.decision
    same = "same" if job.id in ids else "unseen"
    row |= {
        "kind": same if job.kind == "labelled" else job.kind,
        "decision": decision,
        "decided": row["base"] if decision == NONE_FITS else row["selected"],
        "distance": float(ranked.selection.distance[0]),
        "mixture": {
            name: float(w)
            for name, w in zip(ranked.mixture.ids, ranked.mixture.weights, strict=True)
        },
        "accuracy": dict(zip(ids, map(float, scored.correct[1:].mean(1)), strict=True)),
    }
    wanted = [example.answer for example in job.rows]
    if job.rows[0].choices:
        given = {"base": scored.answers[0], "selected": scored.answers[1 + ids.index(first)]}
        row["macro_f1"] = {
            name: macro_f1(answers, wanted)._asdict() for name, answers in given.items()
        }
    items = [
        {
            "wanted": example.answer,
            "base": scored.answers[0][i],
            "learnwares": {name: scored.answers[1 + k][i] for k, name in enumerate(ids)},
            "ways": {way: answers[i] for way, (answers, _) in ways.items()},
        }
        for i, example in enumerate(job.rows)
    ]
    return {"row": row, "items": items}


def _reuse(dock, models, job, ranked, template, config, scored):
    """Answers, and whether they are right, of the ways to use a mixture of learnwares."""
    model, ids, adapters = models
    mixed = np.array([ids.index(name) for name in ranked.mixture.ids])
    weights = np.array(ranked.mixture.weights, float)
    stack = jax.tree.map(lambda leaf: leaf[mixed + 1], adapters)
    texts = [example.text for example in job.rows]
    x = embed_texts(dock.encoder, texts, dock.space, keep=not config.data.source)
    specs = [dock.learnwares[i].spec for i in mixed]
    witness = np.stack([np.asarray(mean_embedding(dock.kernel, x, s.z, s.beta)) for s in specs])
    found = {}
    if scored.scores is None:  # free answers have no scores to average
        merged = jax.tree.map(lambda leaf: leaf[None], reuse.weighted_sum(stack, weights))
        alone = score_examples(model, template, job.instruction, job.rows, merged, config.scoring)
        found["merged"] = alone.answers[0], alone.correct[0]
        best = mixed[np.argmax(witness, 0)] + 1
        routed = [scored.answers[k][i] for i, k in enumerate(best)]
        found["routed"] = routed, scored.correct[best, np.arange(len(best))]
        return found
    known = scored.scores[mixed + 1]  # what the mixture's adapters say by themselves
    fresh = scorer(model, template, job.instruction, job.rows, config.scoring)
    for way, score in (
        ("merged", fresh),
        ("routed", lambda _: known),
        ("averaged", lambda _: known),
    ):
        picks = chosen(job.rows, reuse.WAYS[way](score, stack, weights, witness))
        right = [pick == example.answer for pick, example in zip(picks, job.rows, strict=True)]
        found[way] = picks, np.array(right)
    return found


def summary_row(job: Job, correct: np.ndarray, ids: Sequence[str], first: str) -> dict:
    """Accuracies of one task, from correctness (base and learnwares, rows).

    `random` is the mean over all learnwares, `oracle` the best of them on these very rows, so
    somewhat flattered; `stderr` is that of `selected`, `gain_stderr` of the paired difference to
    the base model.
    """
    base, learnwares = correct[0], correct[1:]
    chosen_ = learnwares[ids.index(first)]
    best = int(np.argmax(learnwares.mean(1)))
    columns = {
        "base": base,
        "random": learnwares.mean(0),
        "selected": chosen_,
        "oracle": learnwares[best],
    }
    estimates = {name: accuracy(values) for name, values in columns.items()}
    gain = accuracy(np.subtract(chosen_, base, dtype=float))
    row = {"task": job.id, "domain": job.domain, "n": len(job.rows)}
    row |= {name: estimate.value for name, estimate in estimates.items()}
    row |= {"stderr": estimates["selected"].stderr, "selected_id": first, "oracle_id": ids[best]}
    return row | {"gain": gain.value, "gain_stderr": gain.stderr}


def summarise(rows: Sequence[dict]) -> dict:
    """Means over groups of tasks; gap_closed: (selected - random) / (oracle - random) of these.

    A way of reuse is left out of a group in which a task has no choices.
    """
    groups = {
        "all": rows,
        "same": [row for row in rows if row["kind"] == "same"],
        "unseen": [row for row in rows if row["kind"] == "unseen"],
        "choices": [row for row in rows if "averaged" in row],
    }
    summary = {}
    for name, group in groups.items():
        if not group:
            continue
        shared = [column for column in COLUMNS if all(column in row for row in group)]
        means = {column: float(np.mean([row[column] for row in group])) for column in shared}
        gap = gap_closed(means["selected"], means["random"], means["oracle"])
        summary[name] = means | {
            "gap_closed": None if np.isnan(gap) else gap,
            "tasks": len(group),
            "selected_beats_base": sum(row["selected"] > row["base"] for row in group),
        }
    return summary


def use(dock: OpenDock, rankings: dict[str, Sequence[str]], settings: ConfigDict) -> list[dict]:
    """Rows of `summary_row` for labelled tasks, given what was ranked for each, closest first.

    The first learnware that can be used is the selected one.
    """
    models = open_models(dock.path, dock.learnwares, settings)
    template = template_of(settings.template)
    rows = []
    for task in labelled_of(rankings):
        job = labelled_job(task, settings)
        scored = score_examples(
            models.model, template, job.instruction, job.rows, models.adapters, settings.scoring
        )
        first = next(name for name in rankings[task.name] if name in models.ids)
        rows.append(summary_row(job, scored.correct, models.ids, first))
        say(_line(rows[-1]))
    return rows


def table(rows: Sequence[dict]) -> list[str]:
    """Lines of a Markdown table, and what it says."""
    extra = [way for way in ("merged", "routed", "averaged") if any(way in row for row in rows)]
    decided = ["decision"] if all("decision" in row for row in rows) else []
    head = ["task", "n", "base", "random", "selected", "best", "gain", *extra]
    head += ["selected learnware", *decided]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["task"], str(row["n"]), f"{row['base']:.2f}", f"{row['random']:.2f}"]
        cells += [f"{row['selected']:.2f} ± {row['stderr']:.2f}", f"{row['oracle']:.2f}"]
        cells += [f"{row['gain']:+.2f} ± {row['gain_stderr']:.2f}"]
        cells += [f"{row[way]:.2f}" if way in row else "" for way in extra]
        cells += [row["selected_id"]]
        cells += ["none fits" if row[d] == NONE_FITS else "use it" for d in decided]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *NOTES, *map(_why, (row for row in rows if row["selected"] <= row["base"]))]
    return lines


NOTES = (
    "Share of answers that are right ± standard error over rows. gain: selected less base, row by",
    "row. random: the mean over all learnwares; best: the best one on these very rows, with its",
    "luck. merged, routed, averaged: a mixture of learnwares in place of one. Of tasks of the",
    "catalogue no row was trained on.",
)


def _why(row: dict) -> str:
    """Why the selected learnware does not beat the base model."""
    if row["selected_id"] == row["task"]:
        why = "its own learnware does not help on these rows"
    elif row["oracle"] <= row["base"]:
        why = "no learnware of the dock does"
    else:
        why = f"no learnware was made for this task, and {row['oracle_id']} would have done better"
    refused = row.get("decision") == NONE_FITS
    return f"{row['task']}: {row['selected_id']} does not beat the base model: {why}" + (
        "; the dock did say that none fits." if refused else "."
    )


def show(rows: Sequence[dict]) -> None:
    """The table, for people."""
    print()
    print("\n".join(table(rows)))


def _line(row: dict) -> str:
    return (
        f"{row['task']}: base {row['base']:.0%}, random {row['random']:.0%}, selected "
        f"({row['selected_id']}) {row['selected']:.0%}, "
        f"best ({row['oracle_id']}) {row['oracle']:.0%}"
    )


def _digest(dock: OpenDock, job: Job, config: ConfigDict) -> str:
    """A hash of what a task's results depend on: the learnwares, the rows, and the settings."""
    settings = config.to_dict()
    for name in ("tasks", "data", "workdir", "dock"):
        settings.pop(name)
    cards = [[each.id, each.card, each.header._asdict()] for each in dock.learnwares]
    content = json.dumps([settings, cards, job], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
