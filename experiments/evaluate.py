"""Select a learnware for every task, use it, and compare: base, random, selected, best.

Example: python -m experiments.evaluate --config=configs/evaluate.py:quickstart
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.common import embed_texts, launch, say, write_json
from experiments.figures import plot_accuracies
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
from experiments.ranking import OpenDock, Ranked, domain_of, open_dock, rank_users, threshold_for
from learnware_jax.dock.labelled import Example, load_examples
from learnware_jax.selection.decision import NONE_FITS
from learnware_jax.slm import reuse
from learnware_jax.slm.decoder import Adapter
from learnware_jax.slm.evaluate import accuracy, macro_f1
from learnware_jax.slm.weights import Model
from learnware_jax.specification.kernels import mean_embedding

BASE = "base"
COLUMNS = ("base", "random", "selected", "oracle", "merged", "routed", "averaged")


class Job(NamedTuple):
    """Somebody's task: texts to select by, and rows with answers to score on."""

    id: str
    domain: str
    instruction: str
    texts: list[str]
    rows: list[Example]


class Models(NamedTuple):
    """A language model and the adapters of a dock's learnwares, the base model in front."""

    model: Model
    ids: tuple[str, ...]
    adapters: Adapter


def jobs_of(config: ConfigDict) -> list[Job]:
    """The tasks that the configuration names; no row of them was trained on."""
    jobs = [labelled_job(task, config) for task in labelled_of(config.tasks)]
    own = config.data
    if own.source:
        examples = read_source(own, config.texts + config.scoring.rows)
        if len(examples) < 4:
            raise ValueError(f"evaluate: {own.source} has {len(examples)} rows; want at least 4.")
        cut = min(config.texts, len(examples) // 2)
        texts = [example.text for example in examples[:cut]]
        name = Path(own.source).stem
        jobs.append(Job(name, "", own.instruction, texts, examples[cut:][: config.scoring.rows]))
    if not jobs:
        raise ValueError("evaluate: nothing to do; set tasks, or data.source.")
    return jobs


def labelled_job(task, config: ConfigDict) -> Job:
    """A labelled task with the user's texts and the test rows."""
    texts = [example.text for example in load_examples(task.name, "user", config.texts)]
    rows = load_examples(task.name, "test", config.scoring.rows)
    return Job(task.name, task.domain, task.instruction, texts, rows)


def open_models(dock: OpenDock, settings: ConfigDict) -> Models:
    """The model of `settings` with the adapters of the dock. ValueError if they do not fit."""
    model, template = open_model(settings.model), template_of(settings.template)
    adapters = dock_adapters(dock.path, dock.learnwares, model, template)
    return Models(model, dock.pool.ids, with_base(adapters))


def run(config: ConfigDict) -> dict:
    """Evaluate; returns what it writes to workdir/results.json."""
    if not (Path(config.dock) / "dock.json").exists():
        raise FileNotFoundError(
            f"evaluate: there is no dock at {config.dock}; correct --config.dock."
        )
    if config.scoring.by not in ("sum", "bytes") or config.scoring.rows < 2 or config.texts < 2:
        raise ValueError(
            f"evaluate: got scoring.by={config.scoring.by!r}, scoring.rows={config.scoring.rows}, "
            f"texts={config.texts}; want sum or bytes, and at least 2 of both."
        )
    template = template_of(config.template)
    jobs = jobs_of(config)
    dock = open_dock(config.dock, config.specification)
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
    workdir, models = Path(config.workdir), None
    digest = _digest(dock, config)
    rows = []
    for i, (job, one) in enumerate(zip(jobs, ranked, strict=True), 1):
        file = workdir / "records" / f"{job.id}.json"
        record = json.loads(file.read_text()) if file.exists() else {}
        if record.get("digest") != digest:
            models = models or open_models(dock, config)
            record = {"digest": digest, **evaluate_job(dock, models, job, one, template, config)}
            write_json(file, record)
        rows.append(record["row"])
        say(f"{i} of {len(jobs)}: {_line(record['row'])}")
    output = {"dock": config.dock, "learnwares": len(dock.learnwares), "tasks": rows}
    output["summary"] = summarise(rows)
    write_json(workdir / "results.json", output)
    write_json(workdir / "config.json", config.to_dict())
    plot_accuracies(workdir / "accuracy.png", rows)
    (workdir / "report.md").write_text("\n".join(["# Evaluation", "", *table(rows)]) + "\n")
    show(rows)
    for name in ("accuracy.png", "report.md", "results.json", "records"):
        print(workdir / name)
    return output


def evaluate_job(
    dock: OpenDock, models: Models, job: Job, ranked: Ranked, template, config: ConfigDict
) -> dict:
    """One task by every learnware and every way of reuse: {"row": summary, "items": [...]}."""
    model, ids, adapters = models
    score = lambda stack: score_examples(  # noqa: E731
        model, template, job.instruction, job.rows, stack, config.scoring
    )
    scored = score(adapters)
    answers = dict(zip((BASE, *ids), scored.answers, strict=True))
    correct = dict(zip((BASE, *ids), scored.correct, strict=True))
    first = ranked.selection.ids[0]
    mixed = [ids.index(name) for name in ranked.mixture.ids]
    for way, found in _reuse(dock, models, job, ranked, template, config, scored, mixed).items():
        answers[way], correct[way] = found
    row = summary_row(job, correct, ids, first)
    decision = ranked.selection.decision
    row |= {
        "decision": decision,
        "kind": "same" if job.id in ids else "unseen",
        "distance": float(ranked.selection.distance[0]),
        "mixture": {
            name: float(w)
            for name, w in zip(ranked.mixture.ids, ranked.mixture.weights, strict=True)
        },
        "decided": row["base"] if decision == NONE_FITS else row["selected"],
        "accuracy": {name: float(np.mean(correct[name])) for name in ids},
    }
    if job.rows[0].choices:
        wanted = [example.answer for example in job.rows]
        scores = {
            "base": macro_f1(answers[BASE], wanted),
            "selected": macro_f1(answers[first], wanted),
        }
        row["macro_f1"] = {name: score._asdict() for name, score in scores.items()}
    items = [
        {
            "text_sha256": hashlib.sha256(example.text.encode()).hexdigest(),
            "wanted": example.answer,
            "answers": {name: given[i] for name, given in answers.items()},
            "right": [name for name in answers if correct[name][i]],
        }
        for i, example in enumerate(job.rows)
    ]
    return {"row": row, "items": items}


def _reuse(dock, models, job, ranked, template, config, scored, mixed):
    """Answers and correctness of the ways to use a mixture of learnwares."""
    model, _, adapters = models
    weights = np.array(ranked.mixture.weights, float)
    stack = jax.tree.map(lambda leaf: leaf[np.array(mixed) + 1], adapters)
    texts = [example.text for example in job.rows]
    x = embed_texts(dock.encoder, texts, dock.space, keep=not config.data.source)
    specs = [dock.learnwares[i].spec for i in mixed]
    witness = np.stack([np.asarray(mean_embedding(dock.kernel, x, s.z, s.beta)) for s in specs])
    found = {}
    if scored.scores is None:  # free answers: there are no scores to choose by
        merged = jax.tree.map(lambda leaf: leaf[None], reuse.weighted_sum(stack, weights))
        own = score_examples(model, template, job.instruction, job.rows, merged, config.scoring)
        found["merged"] = own.answers[0], own.correct[0]
        best = np.array(mixed)[np.argmax(witness, 0)] + 1
        routed = [scored.answers[k][i] for i, k in enumerate(best)]
        found["routed"] = routed, scored.correct[best, np.arange(len(best))]
        return found
    known = scored.scores[np.array(mixed) + 1]
    fresh = scorer(model, template, job.instruction, job.rows, config.scoring)
    # What the mixture's adapters say by themselves has been computed.
    for name, score in (
        ("merged", fresh),
        ("routed", lambda _: known),
        ("averaged", lambda _: known),
    ):
        picks = chosen(
            job.rows, reuse.WAYS[name](score, stack, weights, witness), by=config.scoring.by
        )
        right = [pick == example.answer for pick, example in zip(picks, job.rows, strict=True)]
        found[name] = picks, np.array(right)
    return found


def summary_row(job: Job, correct: dict, ids: Sequence[str], first: str) -> dict:
    """Accuracies of one task. `random` is the mean over all learnwares, `oracle` the best of them
    on these very rows, so somewhat flattered; `stderr` is that of `selected`.
    """
    best = max(ids, key=lambda name: np.mean(correct[name]))
    mean = np.mean([correct[name] for name in ids], axis=0)
    columns = {
        "base": correct[BASE],
        "random": mean,
        "selected": correct[first],
        "oracle": correct[best],
    }
    estimates = {name: accuracy(values) for name, values in columns.items()}
    gain = accuracy(np.subtract(correct[first], correct[BASE], dtype=float))
    row = {"task": job.id, "domain": job.domain, "n": len(job.rows)}
    row |= {name: estimate.value for name, estimate in estimates.items()}
    row |= {"stderr": estimates["selected"].stderr, "selected_id": first, "oracle_id": best}
    row |= {"gain": gain.value, "gain_stderr": gain.stderr}
    for way in ("merged", "routed", "averaged"):
        if way in correct:
            row[way] = float(np.mean(correct[way]))
    return row


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
        room = means["oracle"] - means["random"]
        summary[name] = means | {
            "gap_closed": (means["selected"] - means["random"]) / room if room else None,
            "tasks": len(group),
            "selected_beats_base": sum(row["selected"] > row["base"] for row in group),
        }
    return summary


def use(dock: OpenDock, names: Sequence[str], first: dict[str, str], settings: ConfigDict) -> list:
    """Rows of `summary_row` for labelled tasks, given the learnware that was selected for each."""
    models = open_models(dock, settings)
    template = template_of(settings.template)
    rows = []
    for task in labelled_of(names):
        job = labelled_job(task, settings)
        scored = score_examples(
            models.model, template, job.instruction, job.rows, models.adapters, settings.scoring
        )
        correct = dict(zip((BASE, *models.ids), scored.correct, strict=True))
        rows.append(summary_row(job, correct, models.ids, first[task.name]))
        say(_line(rows[-1]))
    return rows


def table(rows: Sequence[dict]) -> list[str]:
    """Lines of a Markdown table."""
    extra = [way for way in ("merged", "routed", "averaged") if any(way in row for row in rows)]
    head = ["task", "n", "base", "random", "selected", "best", *extra, "selected learnware"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["task"], str(row["n"]), f"{row['base']:.2f}", f"{row['random']:.2f}"]
        cells += [f"{row['selected']:.2f} ± {row['stderr']:.2f}", f"{row['oracle']:.2f}"]
        cells += [f"{row[way]:.2f}" if way in row else "" for way in extra]
        lines.append(f"| {' | '.join([*cells, row['selected_id']])} |")
    lines += [
        "",
        "Share of answers that are right, on rows that nothing was trained on. random: the",
    ]
    lines += ["mean over all learnwares; best: the best one on these very rows, with its luck."]
    return lines


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


def _digest(dock: OpenDock, config: ConfigDict) -> str:
    """A hash of what results depend on: the learnwares, and the settings but for the tasks."""
    settings = config.to_dict()
    for name in ("tasks", "workdir", "dock"):
        settings.pop(name)
    cards = [
        [learnware.id, learnware.card, learnware.header._asdict()] for learnware in dock.learnwares
    ]
    return hashlib.sha256(json.dumps([settings, cards], sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    launch(run)
