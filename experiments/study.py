"""The study: learnwares of several tasks, users of three kinds, and every way to select for them.

Example: python -m experiments.study --config=configs/study.py:cpu
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("study")

import functools
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file, save

from experiments import build, plan
from experiments.common import (
    check_kernel,
    dock_space,
    named,
    open_encoder,
    say,
    setting,
    space_of,
    write_json,
)
from experiments.contenders import Contended, contend, ranking_of, specified_rows
from experiments.findings import Evidence, UserTask, findings, markdown
from experiments.finetune import Lessons, fine_tune
from experiments.models import (
    dock_adapters,
    encode,
    labelled_of,
    open_model,
    prompt_of,
    score_questions,
    template_of,
    with_base,
)
from experiments.ranking import OpenDock, open_dock
from experiments.vectors import open_reference
from learnware_jax.dock import store
from learnware_jax.dock.labelled import Example, LabelledTask, load_examples
from learnware_jax.slm import lora
from learnware_jax.slm.decoder import Adapter
from learnware_jax.slm.evaluate import Question
from learnware_jax.slm.reuse import weighted_sum
from learnware_jax.slm.weights import Model

SPLITS = {"a": "docked", "b": "unseen", "c": "outside", "development": "development"}
BASE = "base"


class Made(NamedTuple):
    """A learnware of the study: how its training differs from that of others, and on what it is."""

    task: LabelledTask
    variant: str
    rows: list[Example]

    @property
    def id(self) -> str:
        return self.task.name if self.variant == "full" else f"{self.task.name}-{self.variant}"


class User(NamedTuple):
    """A task with rows of a user, and rows to test on, which nothing else sees."""

    task: LabelledTask
    split: str
    rows: list[Example]
    test: list[Example]


class OutOfTime(Exception):
    """The minutes that the configuration gives a run are over."""


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    if config.finetune.plan:
        following = f"study --config=configs/study.py:{config.size}"
        lines = {"plan": f"prints what memory a device needs for {config.model.name}"}
        return lines | {"next": following}
    check(config)
    wanted = [
        task.name if name == "full" else f"{task.name}-{name}"
        for task in labelled_of(config.docked)
        for name, variant in config.variants.items()
        if task.name in variant.tasks
    ]
    there = Path(config.dock, "dock.json").exists()
    made = set(store.list_ids(config.dock)) if there else set()
    missing = [id for id in wanted if id not in made]
    users = {split: len(labelled_of(config[section])) for split, section in SPLITS.items()}
    file = Path(config.workdir) / "study.json"
    following = f"report --config=configs/report.py {setting('study', file)}"
    return {
        "model": config.model.name,
        "dock": f"{config.dock}: {len(wanted) - len(missing)} of {len(wanted)} learnwares are there"
        + (f"; to be made: {named(missing)}" if missing else ""),
        "users": ", ".join(f"{count} of split {split}" for split, count in users.items()),
        "next": following,
    }


def run(config: ConfigDict) -> dict:
    """Do what is not done yet; returns what it writes to workdir/study.json.

    With `minutes`, a run stops at the next unit of work after so many, and returns {} without it.
    """
    if config.finetune.plan:
        return plan.run(config.finetune)
    check(config)
    made, users = learnwares_of(config), users_of(config)
    clock = _clock(config.minutes)
    try:
        build_dock(made, config, clock)
        return study(made, users, config, clock)
    except OutOfTime:
        say(f"{config.minutes} minutes are over; run the same command again to go on.")
        return {}


def _clock(minutes: float) -> Callable[[], None]:
    """A function that raises OutOfTime once the minutes are over; 0: never."""
    end = time.monotonic() + 60 * minutes

    def look():
        if minutes and time.monotonic() > end:
            raise OutOfTime

    return look


def check(config: ConfigDict) -> None:
    """ValueError for a configuration that could not be reported in the end."""
    check_kernel(config.specification.kernel)
    names = [name for section in SPLITS.values() for name in config[section]]
    tasks = labelled_of(names)
    problems = []
    every = [task.name for task in tasks]
    if repeated := sorted({name for name in every if every.count(name) > 1}):
        problems.append(f"tasks in two splits: {', '.join(repeated)}")
    seen = {source for task in labelled_of(config.docked) for source in _sources(task)}
    for task in labelled_of([*config.unseen, *config.outside]):
        if both := sorted(seen & _sources(task)):
            problems.append(f"{task.name} is of data that the dock has seen: {', '.join(both)}")
    for name, variant in config.variants.items():
        if strange := sorted(set(variant.tasks) - set(config.docked)):
            problems.append(f"variants.{name}.tasks are not in docked: {', '.join(strange)}")
    if exact := [task.name for task in tasks if task.metric == "exact"]:
        problems.append(f"tasks without choices: {', '.join(exact)}")
    if len(config.seeds) < 2 or min(config.user_rows, config.test_rows) < 4:
        problems.append(
            f"seeds={tuple(config.seeds)}, user_rows={config.user_rows}, test_rows="
            f"{config.test_rows}: want at least 2 seeds and 4 rows"
        )
    docked = {task.domain for task in labelled_of(config.docked)}
    if len(docked) < 2 or (len(config.docked) + 1) * config.false_acceptance < 1:
        problems.append(
            f"{len(config.docked)} tasks of {len(docked)} domains in docked set no threshold at "
            f"false_acceptance={config.false_acceptance}"
        )
    for task in labelled_of(config.unseen):
        if task.domain not in docked:
            problems.append(f"{task.name} is in unseen, and the dock has no domain {task.domain!r}")
    for task in labelled_of(config.outside):
        if task.domain in docked:
            problems.append(
                f"{task.name} is in outside, and {task.domain!r} is a domain of the dock"
            )
    if problems:
        raise ValueError("\n  ".join(["study: nothing was done:", *problems]))


def _sources(task: LabelledTask) -> set[str]:
    """The data sets of the hub that a task is of, without their splits."""
    return {name.split(":")[0] for name in task.material.split() if "/" in name}


# ---- tasks


@functools.cache
def _examples(name: str, part: str, limit: int | None, without: frozenset = frozenset()):
    """`load_examples`, which reads a whole source, once."""
    return load_examples(name, part, limit, without)


def learnwares_of(config: ConfigDict) -> list[Made]:
    """The learnwares that the configuration asks for, by task."""
    return [
        Made(task, name, _training_rows(task, variant, config))
        for task in labelled_of(config.docked)
        for name, variant in config.variants.items()
        if task.name in variant.tasks
    ]


def _training_rows(task: LabelledTask, variant: ConfigDict, config: ConfigDict) -> list[Example]:
    """What a learnware is trained on. A corrupted one has its answers shuffled over the texts."""
    rows = _examples(task.name, "train", config.finetune.examples)[: variant.examples]
    if variant.corrupted:
        order = np.random.default_rng(config.seed).permutation(len(rows))
        return [row._replace(answer=rows[i].answer) for row, i in zip(rows, order, strict=True)]
    return rows


def users_of(config: ConfigDict) -> list[User]:
    """The users of every split. No row of theirs has a text that a learnware was trained on."""
    trained = frozenset(
        row.text
        for name in config.docked
        for row in _examples(name, "train", config.finetune.examples)
    )
    users = []
    for split, section in SPLITS.items():
        for task in labelled_of(config[section]):
            # What nobody trains on is there to test on.
            part = "heldout+test" if split == "a" else "train+heldout+test"
            count = config.development_rows if split == "development" else config.test_rows
            rows = _examples(task.name, "user", config.user_pool, trained)
            test = _examples(task.name, part, count, trained)
            if len(test) < count or len(rows) < 4:
                raise ValueError(
                    f"study: {task.name} has {len(rows)} rows for its user and {len(test)} to test "
                    f"on; want 4 and {count}."
                )
            users.append(User(task, split, rows, test))
    return users


# ---- learnwares


def build_dock(made: Sequence[Made], config: ConfigDict, clock: Callable[[], None]) -> None:
    """Train what the dock lacks and add it, `finetune.together` learnwares at a time.

    ValueError for a learnware that the dock has, but not with the adapter of this configuration.
    """
    together = config.finetune.together
    for seed in dict.fromkeys(config.variants[one.variant].seed for one in made):
        alike = [one for one in made if config.variants[one.variant].seed == seed]
        for i in range(0, len(alike), together):
            clock()
            _build(alike[i : i + together], seed, config)


def _build(group: Sequence[Made], seed: int, config: ConfigDict) -> None:
    settings = config.finetune.copy_and_resolve_references()
    settings.seed = settings.lora.seed = seed
    lessons = [Lessons(one.id, one.task.instruction, one.rows) for one in group]
    exists = (Path(config.dock) / "dock.json").exists()
    present = store.list_ids(config.dock) if exists else []
    jobs, adapters = {}, {}
    # What is trained already is only looked at.
    for one, summary in zip(group, fine_tune(lessons, settings)["adapters"], strict=True):
        files = _adapter_files(summary)
        if one.id in present:
            if store.read_adapter(config.dock, one.id) != files:
                raise ValueError(
                    f"study: {config.dock} has {one.id} with another adapter than "
                    f"{settings.workdir}; name another --config.dock, or remove it: "
                    f"python -m experiments.dock --dock={config.dock} --remove={one.id}"
                )
            continue
        adapters[one.id] = files
        card = {
            "name": one.id,
            "domain": one.task.domain,
            "description": one.task.description,
            "instruction": one.task.instruction,
            "labels": list(one.rows[0].choices),
            "metric": one.task.metric,
            "model": summary["model"],
            "training": {k: summary[k] for k in ("examples", "steps", "batch", "rate", "loss")},
        }
        texts = [row.text for row in specified_rows(one, config)]
        jobs[one.id] = build.Job(card, lambda texts=texts: texts)
    if not jobs:
        return
    if exists:
        space, encoder = dock_space(config.dock, config.specification)
    else:
        encoder = open_encoder(config.specification)
        space = space_of(encoder, config.specification)
    build.specify(jobs, adapters, space, encoder, config)
    say(f"{config.dock} has {', '.join(jobs)}.")


def _adapter_files(summary: dict) -> dict[str, bytes]:
    folder = Path(summary["folder"])
    return {name: (folder / name).read_bytes() for name in store.ADAPTER_FILES}


# ---- answers


class Asked(NamedTuple):
    """Rows that models are asked, with the instruction of their task."""

    task: LabelledTask
    rows: list[Example]


def ask(
    model: Model, template, asked: Sequence[Asked], adapters: Adapter, settings: ConfigDict
) -> list[np.ndarray]:
    """Log-likelihoods (models, rows, choices) of every choice, for all tasks in one pass."""
    questions, shared = [], []
    for task, rows in asked:
        prompts = [prompt_of(model, template, task.instruction, row.text) for row in rows]
        # The instruction is the same in all of them, and computed once.
        shared += [_common(prompts)] * len(rows)
        choices = [encode(model, f" {choice}") for choice in rows[0].choices]
        questions += [Question(prompt, choices) for prompt in prompts]
    scores = score_questions(model, questions, adapters, settings, shared)
    parts = np.split(scores, np.cumsum([len(rows) for _, rows in asked])[:-1], axis=1)
    return [
        part[:, :, : len(rows[0].choices)].astype(np.float32)
        for part, (_, rows) in zip(parts, asked, strict=True)
    ]


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts have in common, leaving each one of its own."""
    low, high = min(prompts), max(prompts)
    differing = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return next(differing, min(map(len, prompts)) - 1)


class Said(NamedTuple):
    """What one model answers: log-likelihoods (rows, choices) by task, and seconds a row."""

    test: dict[str, np.ndarray]
    user: dict[str, np.ndarray]
    own: np.ndarray | None  # of a learnware: on the texts of its specification
    seconds: float


def everything_said(
    dock: OpenDock, made: Sequence[Made], users: Sequence[User], model, config, clock
) -> dict[str, Said]:
    """What the base model and every learnware say of all users' rows; kept once they have said it.

    A file a learnware: a run that is stopped loses at most the learnware (or the
    `scoring.together` learnwares) in progress. What was asked before is not asked again.
    """
    template = template_of(config.template)
    ids, adapters = dock_adapters(dock.path, dock.learnwares, model, template)
    ids, adapters = [BASE, *ids], with_base(adapters)
    cards = {learnware.id: learnware.card for learnware in dock.learnwares}
    asked = {f"test/{user.task.name}": Asked(user.task, user.test) for user in users}
    for user in users:
        asked[f"user/{user.task.name}"] = Asked(user.task, user.rows[: config.graded_rows])
    own = {one.id: {"own": Asked(one.task, specified_rows(one, config))} for one in made}
    own[BASE] = {}
    files = {id: Path(config.workdir) / "said" / f"{id}.safetensors" for id in ids}
    wanted = {
        id: {key: _digest(cards.get(id), part, config) for key, part in (asked | own[id]).items()}
        for id in ids
    }
    missing = {}
    for id in ids:
        kept = _kept_digests(files[id])
        missing[id] = {key for key, digest in wanted[id].items() if kept.get(key) != digest}
    todo, together = [id for id in ids if missing[id]], config.scoring.together
    for i in range(0, len(todo), together):
        clock()
        group = todo[i : i + together]
        stack = _take(adapters, [ids.index(id) for id in group])
        keys = [key for key in asked if any(key in missing[id] for id in group)]
        arrays = [_kept_arrays(files[id], missing[id]) for id in group]
        begin, rows = time.perf_counter(), 0
        if keys:
            scores = ask(model, template, [asked[key] for key in keys], stack, config.scoring)
            rows = len(group) * sum(len(asked[key].rows) for key in keys)
            for k, said in enumerate(arrays):
                said |= {key: part[k] for key, part in zip(keys, scores, strict=True)}
        for k, id in enumerate(group):
            if "own" in missing[id]:
                alone, part = _take(stack, [k]), own[id]["own"]
                ((arrays[k]["own"],),) = ask(model, template, [part], alone, config.scoring)
                rows += len(part.rows)
        seconds = (time.perf_counter() - begin) / rows
        for id, said in zip(group, arrays, strict=True):
            about = {"digests": json.dumps(wanted[id]), "seconds": str(seconds)}
            files[id].parent.mkdir(parents=True, exist_ok=True)
            kept = {key: said[key] for key in wanted[id]}
            store.write_file(files[id], save(kept, about), where="study")
        say(f"{len(ids) - len(todo) + i + len(group)} of {len(ids)} models: {', '.join(group)}.")
    return {id: _read_said(files[id], users) for id in ids}


def _digest(card: dict | None, asked: Asked, config: ConfigDict) -> str:
    """A hash of what a model is asked, and of the model. How much is asked at once is not in it."""
    how = [config.model.to_dict(), config.template, config.scoring.dtype]
    content = json.dumps([card, how, asked.task.instruction, asked.rows], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _kept_digests(file: Path) -> dict[str, str]:
    """The digests of what a file keeps, by key."""
    if not file.exists():
        return {}
    with safe_open(file, "numpy") as opened:
        return json.loads((opened.metadata() or {}).get("digests", "{}"))


def _kept_arrays(file: Path, missing: set[str]) -> dict[str, np.ndarray]:
    """What a file keeps, without what is missing in it."""
    kept = load_file(file) if file.exists() else {}
    return {key: array for key, array in kept.items() if key not in missing}


def _read_said(file: Path, users: Sequence[User]) -> Said:
    with safe_open(file, "numpy") as opened:
        test = {u.task.name: opened.get_tensor(f"test/{u.task.name}") for u in users}
        user = {u.task.name: opened.get_tensor(f"user/{u.task.name}") for u in users}
        own = opened.get_tensor("own") if "own" in opened.keys() else None  # noqa: SIM118
        return Said(test, user, own, float(opened.metadata()["seconds"]))


def right(rows: Sequence[Example], scores: np.ndarray) -> np.ndarray:
    """Whether the choice of the greatest score is the answer, (..., rows)."""
    wanted = [row.choices.index(row.answer) for row in rows]
    return scores.argmax(-1) == np.array(wanted)


# ---- the study


def study(made, users, config: ConfigDict, clock) -> dict:
    """Ask, specify, rank, use, and report."""
    begin = time.perf_counter()
    model = open_model(config.model)
    dock = open_dock(config.dock, config.specification, only=[one.id for one in made])
    if lost := {one.id for one in made} - set(dock.pool.ids):
        raise ValueError(f"study: {config.dock} has no sound {', '.join(sorted(lost))}; see above.")
    made = [next(one for one in made if one.id == id) for id in dock.pool.ids]
    said = everything_said(dock, made, users, model, config, clock)
    correct = [
        np.stack([right(user.test, each.test[user.task.name]) for each in said.values()])
        for user in users
    ]
    reference = open_reference(model, config.reference)
    outputs = {
        one.id: [one.rows[0].choices[i] for i in said[one.id].own.argmax(-1)] for one in made
    }
    contended = contend(dock, made, users, said, outputs, reference, config, clock)
    about = [
        UserTask(
            user.task.name,
            user.split,
            user.task.domain,
            _family(user.rows),
            [row.answer for row in user.test],
        )
        for user in users
    ]
    learnwares = [
        {
            "id": one.id,
            "task": one.task.name,
            "variant": one.variant,
            "domain": one.task.domain,
            "family": _family(one.rows),
        }
        for one in made
    ]
    evidence = Evidence(
        about,
        learnwares,
        correct,
        contended.scores,
        {},
        contended.nearest,
        contended.threshold,
        contended.costs,
    )
    options = {"draws": config.draws, "level": config.level, "seed": config.seed}
    best = choose(evidence, config, options)
    answers, costs = used(dock, made, users, contended, best, model, correct, config, clock)
    evidence = evidence._replace(answers=answers, costs=contended.costs | costs)
    output = findings(evidence, best_family=best, **options)
    rows = sum(len(user.test) + len(user.rows[: config.graded_rows]) for user in users)
    seconds = {
        "asking all models": round(sum(each.seconds for each in said.values()) * rows),
        "this run": round(time.perf_counter() - begin),
    }
    output["made"] = _made(config, seconds)
    output["docked"] = learnwares
    workdir = Path(config.workdir)
    write_json(workdir / "study.json", output)
    write_json(workdir / "config.json", config.to_dict())
    (workdir / "study.md").write_text("\n".join(["# The study", "", *markdown(output)]) + "\n")
    print("\n".join(markdown(output)))
    for name in ("study.json", "study.md"):
        print(workdir / name)
    return output


def _family(rows: Sequence[Example]) -> str:
    return ", ".join(sorted(rows[0].choices))


def choose(evidence: Evidence, config: ConfigDict, options: dict) -> str:
    """The specification that does best on the development tasks; of equals the first."""
    if not config.development:
        return config.specifications[0]
    found = findings(evidence, best_family=config.specifications[0], **options)["development"]
    best = max(config.specifications, key=lambda name: found[name]["score"])
    scores = ", ".join(f"{name} {found[name]['score']:.3f}" for name in config.specifications)
    say(f"On the development tasks: {scores}; chosen: {best}.")
    return best


def used(
    dock: OpenDock, made, users, contended: Contended, best: str, model, correct, config, clock
):
    """What more than one learnware, or none, answers on the test rows: right or wrong, and costs.

    few_shot: the base model tuned on the user's rows. mixture: learnwares merged by the weights of
    the mixture of RKMEs that is closest to the user; merge_top3: the three that `best` ranks first,
    in equal parts; per_row: for every row the learnware of that mixture with most mass there.
    """
    workdir, template = Path(config.workdir), template_of(config.template)
    settings = config.finetune.copy_and_resolve_references()
    settings.workdir, settings.steps = str(workdir / "few_shot"), config.few_shot_steps
    drawn = {user.task.name: contended.drawn[user.task.name][0] for user in users}
    lessons = [
        Lessons(
            user.task.name, user.task.instruction, [user.rows[i] for i in drawn[user.task.name]]
        )
        for user in users
    ]
    summaries, together = [], max(8, settings.together)
    for i in range(0, len(lessons), together):
        clock()
        summaries += fine_tune(lessons[i : i + together], settings)["adapters"]
    _, adapters = dock_adapters(dock.path, dock.learnwares, model, template)
    rng = np.random.default_rng(config.seed)
    answers = {name: [] for name in ("few_shot", "mixture", "merge_top3", "per_row")}
    seconds = []
    for u, (user, summary) in enumerate(zip(users, summaries, strict=True)):
        clock()
        mixture, routed = contended.mixture[u], contended.routed[u]
        scores = ranking_of(contended, best, u)
        top = np.lexsort((rng.random(len(scores)), -scores))[:3]  # ties by chance
        few = lora.from_peft(_adapter_files(summary), model.config)
        places = [dock.pool.ids.index(id) for id in mixture.ids]
        merged = [
            few,
            weighted_sum(_take(adapters, places), mixture.weights),
            weighted_sum(_take(adapters, top), np.full(len(top), 1 / len(top))),
        ]
        found = _used(user, merged, model, template, config)
        seconds.append(summary["seconds"] / summary["together"])
        hits = right(user.test, found)
        for name, hit in zip(("few_shot", "mixture", "merge_top3"), hits, strict=True):
            answers[name].append(hit[None])
        answers["per_row"].append(correct[u][1 + routed, np.arange(len(routed))][None])
    costs = dict.fromkeys(("mixture", "per_row"), contended.costs["rkme"])
    costs["merge_top3"] = contended.costs[best]
    few_cost = {"make_seconds": float(np.mean(seconds)), "rank_seconds": 0.0, "bytes": 0}
    costs["few_shot"] = few_cost | {"forward_passes": 3 * settings.steps * settings.batch}
    return answers, costs


def _take(adapters: Adapter, places: Sequence[int]) -> Adapter:
    return jax.tree.map(lambda leaf: leaf[np.array(places)], adapters)


def _used(user: User, adapters: Sequence[Adapter], model, template, config) -> np.ndarray:
    """Log-likelihoods (adapters, rows, choices) on a user's test rows; kept in a file a user."""
    rank = max(a.shape[-1] for each in adapters for a in each.a.values())
    like = lora.init_adapter(
        jax.random.key(0), model.config, rank=rank, alpha=1.0, targets=sorted(adapters[0].a)
    )
    stack = lora.stack([lora.pad(each, like) for each in adapters])
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(stack):
        weights.update(np.asarray(leaf).tobytes())
    asked = Asked(user.task, user.test)
    digest = _digest({"adapters": weights.hexdigest()}, asked, config)
    file = Path(config.workdir) / "used" / f"{user.task.name}.safetensors"
    if _kept_digests(file).get("scores") != digest:
        (scores,) = ask(model, template, [asked], stack, config.scoring)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"digests": json.dumps({"scores": digest})}
        store.write_file(file, save({"scores": scores}, about), where="study")
    return load_file(file)["scores"]


def _made(config: ConfigDict, seconds: dict[str, int]) -> dict:
    """How the figures were made. Only configurations' names: overrides may hold paths."""

    def git(*words):
        found = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "command": f"python -m experiments.study --config=configs/study.py:{config.size}",
        "commit": commit + changed,
        "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "seeds": {
            "users": list(config.seeds),
            "models": sorted({variant.seed for variant in config.variants.values()}),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": seconds,
        "settings": {
            "model": config.model.name,
            "test_rows": config.test_rows,
            "user_rows": config.user_rows,
            "graded_rows": config.graded_rows,
            "steps": config.finetune.steps,
        },
    }
