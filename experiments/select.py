"""A user's texts, or named tasks, to a ranking of a dock.

Example: python -m experiments.select --config=configs/select.py:quickstart
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("select")

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import build, evaluate, evaluation
from experiments.common import data_line, dock_line, header_of, named, say, setting, write_json
from experiments.models import labelled_of
from experiments.ranking import open_dock, rank_users, trusted_keys
from learnware_jax import figures
from learnware_jax.dock import store
from learnware_jax.dock.labelled import load_examples
from learnware_jax.dock.opening import domain_of, threshold_for
from learnware_jax.dock.tasks import load_task, read_texts
from learnware_jax.selection.decision import NONE_FITS


class User(NamedTuple):
    """Somebody with texts: "own" data, or a task of the catalogue in one of three roles."""

    id: str
    kind: str  # own, same (task), unseen (task of a known domain), outside (every domain)
    domain: str
    texts: list[str]


def user_texts(name: str, count: int) -> list[str]:
    """Texts of a labelled task, without answers, that nothing was trained on."""
    return [example.text for example in load_examples(name, "user", count)]


def own_texts(config: ConfigDict) -> list[str]:
    """The texts of user.data. ValueError for fewer than two."""
    texts = read_texts(config.user.data, column=config.user.column or None, limit=config.user.limit)
    if len(texts) < 2:
        raise ValueError(
            f"select: {config.user.data} holds {len(texts)} text; a ranking with intervals "
            "needs at least 2, and about two dozen to say much."
        )
    return texts


def tasks_of_users(config: ConfigDict) -> tuple[list, list, list, list, list]:
    """Tasks whose users are ranked: same (of texts, labelled), labelled, unseen, outside."""
    own, labelled = build.tasks_of(config.build.tasks), labelled_of(config.build.labelled)
    return (
        own if config.users.same else [],
        labelled if config.users.same else [],
        labelled_of(config.users.labelled),
        build.tasks_of(config.users.unseen),
        build.tasks_of(config.users.outside),
    )


def users_of(config: ConfigDict, ids: set[str]) -> list[User]:
    """The users that the configuration asks for; `ids` are the dock's learnwares."""
    if config.user.data:
        texts = own_texts(config)
        if len(texts) < 10:
            say(f"Only {len(texts)} texts: the ranking will be mostly noise.")
        return [User(Path(config.user.data).stem, "own", "", texts)]
    count = config.users.texts
    users = []
    same, same_labelled, labelled, unseen, outside = tasks_of_users(config)
    for task in same:
        if task.name in ids:
            texts = build.user_half(task, config.build, count)
            users.append(User(task.name, "same", task.domain, texts))
    for task in same_labelled:
        if task.name in ids:
            users.append(User(task.name, "same", task.domain, user_texts(task.name, count)))
    for task in labelled:
        users.append(User(task.name, "unseen", task.domain, user_texts(task.name, count)))
    for kind, tasks in (("unseen", unseen), ("outside", outside)):
        for task in tasks:
            users.append(User(task.name, kind, task.domain, load_task(task.name, count)))
    if not users:
        raise ValueError(
            "select: no user; set user.data, or users.same, labelled, unseen or outside."
        )
    return users


def check(config: ConfigDict) -> None:
    """ValueError or OSError for what can be seen to be wrong before any work."""
    if config.dock and not (Path(config.dock) / "dock.json").exists():
        raise FileNotFoundError(
            f"select: there is no dock at {config.dock}; make one with experiments.build, or leave "
            "--config.dock out for the quickstart's."
        )
    if config.top_k < 0 or not 0 < config.false_acceptance < 1 or not 0 < config.level < 1:
        raise ValueError(
            f"select: got top_k={config.top_k}, false_acceptance={config.false_acceptance}, "
            f"level={config.level}; want top_k >= 1 (or 0 for all) and rates between 0 and 1."
        )
    trusted_keys(config.trust)


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    own = config.user.data
    if own:
        users = data_line(own, lambda: f"{len(own_texts(config))} texts")
    else:
        users = named([task.name for tasks in tasks_of_users(config) for task in tasks])
    dock = {"dock": dock_line(config.dock)} if config.dock else build.preview(config.build)
    following = "select --config=configs/select.py:quickstart --config.user.data=FILE"
    if own:
        path = config.dock or config.build.dock
        following = f"evaluate --config=configs/evaluate.py:mine {setting('dock', path)}"
        following += " --config.data.source=ROWS_WITH_ANSWERS"
    return dock | {"users": users, "next": following}


def run(config: ConfigDict) -> dict:
    """Rank the dock for each user; returns what it writes to workdir/results.json."""
    check(config)
    workdir, path = Path(config.workdir), config.dock or config.build.dock
    trust = trusted_keys(config.trust)
    own = bool(config.user.data)
    if own:
        users = users_of(config, set())  # bad input is found before any work
    if not config.dock:
        build.run(config.build)
    dock = open_dock(path, config.specification, trust=trust)
    if not own:
        users = users_of(config, set(dock.pool.ids))
    domains = {learnware.id: domain_of(learnware) for learnware in dock.learnwares}
    threshold = threshold_for(dock.pool, list(domains.values()), config.false_acceptance)
    ranked = rank_users(
        dock,
        [user.texts for user in users],
        config.specification,
        seed=config.seed,
        threshold=threshold,
        top_k=config.top_k or None,
        level=config.level,
        own=own,
    )
    results = []
    for user, (_, reduced, selection, mixture, seconds) in zip(users, ranked, strict=True):
        results.append(
            {
                "id": user.id,
                "kind": user.kind,
                "domain": user.domain,
                "n": reduced.n,
                "ranking": [
                    {
                        "id": name,
                        "domain": domains[name],
                        "distance": float(distance),
                        "lower": float(lower),
                        "upper": float(upper),
                    }
                    for name, distance, lower, upper in zip(
                        selection.ids,
                        selection.distance,
                        selection.lower,
                        selection.upper,
                        strict=True,
                    )
                ],
                "undominated": list(selection.undominated),
                "decision": selection.decision,
                "mixture": [
                    {"id": name, "weight": float(weight)}
                    for name, weight in zip(mixture.ids, mixture.weights, strict=True)
                ],
                "seconds": seconds,
            }
        )
    output = {
        "dock": path,
        "learnwares": len(dock.learnwares),
        "threshold": threshold if np.isfinite(threshold) else None,
        "false_acceptance": config.false_acceptance,
        "level": config.level,
        "users": results,
    }
    if config.evaluation.seeds:
        output["summary"] = evaluation.summarise(config, dock.encoder)
    used = {
        user["id"]: [entry["id"] for entry in user["ranking"]]
        for user in results
        if user["id"] in config.use.users and not own
    }
    if used:
        say(
            f"Using the selected models for {', '.join(used)}, on rows that nothing was trained on."
        )
        output["use"] = evaluate.use(dock, used, config.use)
    if own:
        file = workdir / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', users[0].id)}.rkme.safetensors"
        workdir.mkdir(parents=True, exist_ok=True)
        reduced = ranked[0].reduced
        header = header_of(dock.space, config.specification, config.seed, reduced)
        store.write_spec(file, reduced.spec, header)
    write_json(workdir / "results.json", output)
    settings_used = config.to_dict()
    if own:  # where somebody keeps a file is nobody's business
        settings_used["user"] = {}
    write_json(workdir / "config.json", settings_used)
    firsts = list({user["kind"]: user for user in reversed(results)}.values())[::-1]
    # Several panels are one figure: fewer rows each.
    drawn = figures.rankings(firsts, threshold, shown=8 if len(firsts) == 1 else 5)
    figures.save(drawn, workdir / "ranking")
    report = _report(output)
    (workdir / "report.md").write_text(report, encoding="utf-8")
    _show(output)
    if "use" in output:
        evaluate.show(output["use"])
    print(f"\nfigure  {workdir / 'ranking.png'}\nreport  {workdir / 'report.md'}")
    print(f"data    {workdir / 'results.json'}")
    return output


def _advice(user: dict) -> str:
    if user["decision"] == NONE_FITS:
        return "none fits, use the base model"
    others = [name for name in user["undominated"] if name != user["decision"]]
    alike = f"; not separated from it: {', '.join(others)}" if others else ""
    return f"use {user['decision']}{alike}"


def _table(output: dict) -> tuple[list[str], list[list[str]]]:
    """One user: the ranking. Several: a line each."""

    def numbers(entry):
        # Adding 0.0 turns a rounded -0.0 into 0.0.
        shown = [f"{round(entry[f], 4) + 0.0:.4f}" for f in ("distance", "lower", "upper")]
        return shown[0], f"{shown[1]} to {shown[2]}"

    users = output["users"]
    measured = ["squared MMD", f"{output['level']:.0%} interval"]
    if len(users) == 1:
        head = ["rank", "learnware", "domain", *measured, "separated"]
        rows = [
            [
                *(str(i + 1), entry["id"], entry["domain"], *numbers(entry)),
                "" if entry["id"] in users[0]["undominated"] else "yes",
            ]
            for i, entry in enumerate(users[0]["ranking"])
        ]
        return head, rows
    head = ["user", "kind", "closest learnware", "domain", *measured, "alike", "decision"]
    rows = []
    for user in users:
        first = user["ranking"][0]
        alike = len(set(user["undominated"]) - {first["id"]})
        decision = "none fits" if user["decision"] == NONE_FITS else "use it"
        rows.append(
            [
                *(user["id"], user["kind"], first["id"], first["domain"], *numbers(first)),
                *(str(alike) if alike else "", decision),
            ]
        )
    return head, rows


def _closing(output: dict) -> list[str]:
    lines = []
    if output["threshold"] is not None:
        lines.append(
            f"None fits beyond a squared MMD of {output['threshold']:.4f}: set on the dock's own "
            f"domains, left out one at a time, so that {output['false_acceptance']:.0%} of such "
            "users, whom no learnware fits, would be given one."
        )
    else:
        lines.append("The dock is too small, or of one domain: it cannot tell when none fits.")
    if len(output["users"]) == 1:
        user = output["users"][0]
        parts = ", ".join(f"{part['weight']:.2f} {part['id']}" for part in user["mixture"])
        lines += [f"{user['id']} ({user['n']} texts): {_advice(user)}.", f"As a mixture: {parts}."]
        return lines
    for kind in ("same", "unseen", "outside"):
        group = [user for user in output["users"] if user["kind"] == kind]
        firsts = [user["ranking"][0] for user in group]
        refused = sum(user["decision"] == NONE_FITS for user in group)
        pairs = list(zip(group, firsts, strict=True))
        found = {
            "same": f"the learnware of their own task comes first for "
            f"{sum(user['id'] == first['id'] for user, first in pairs)}",
            "unseen": f"a learnware of their domain comes first for "
            f"{sum(user['domain'] == first['domain'] for user, first in pairs)}",
            "outside": "their domain is not in the dock",
        }[kind]
        if group:
            lines.append(
                f"{kind} ({len(group)} users): {found}; {refused} are told that none fits."
            )
    return lines


def _report(output: dict) -> str:
    head, rows = _table(output)
    lines = ["# Ranking", "", f"{output['learnwares']} learnwares of {output['dock']}.", ""]
    # What a stranger calls a domain is neither a cell's end nor a page's element.
    rows = [[cell.replace("|", r"\|").replace("<", "&lt;") for cell in row] for row in rows]
    lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    lines += ["", *(f"- {line}" for line in _closing(output)), "", "![](ranking.png)", ""]
    if "use" in output:
        lines += evaluate.table(output["use"])
    if "summary" in output:
        lines += evaluation.table(output["summary"])
    return "\n".join(lines)


def _show(output: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head, rows = _table(output)
    table = Table(box=None, header_style="bold")
    for name in head:
        table.add_column(name, no_wrap=True)
    for cells in rows:
        table.add_row(*map(Text, cells))  # ids are not markup
    # Columns are kept whole, in pipes and narrow terminals too.
    console = Console(width=max(Console().width, 130), markup=False, highlight=False)
    console.print(table)
    for line in _closing(output):
        console.print(line, soft_wrap=True)
    if "summary" in output:
        print("\n".join(evaluation.table(output["summary"])))
