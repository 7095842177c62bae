"""Published scores of language models, replayed: tables as published, and what they left open.

Example: python -m experiments.replay --config=configs/replay.py:finance --config.scores=FILE
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("replay")

import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from scipy import stats

from experiments.common import setting, write_json
from learnware_jax import figures
from learnware_jax.selection import regret
from learnware_jax.selection.bootstrap import interval, resampled

RANDOM, LEARNWARE, BEST, ORACLE = STRATEGIES = ("Random", "Learnware", "Best-single", "Oracle")
WANTED = (
    "a CSV with a header and a row a user task: the task's name, then a number for every model; "
    "models named DATASET-NUMBER are learnwares, others are there for reference"
)
PICKS_WANTED = (
    "a CSV with a header and a row a user task: the task's name, then a data set or learnware, or "
    "else its similarities, a column a data set or learnware"
)
# Published scores have two decimals; the rest is the rounding of binary fractions.
HALF_A_DIGIT = 0.005 + 1e-9
DIGITS = 9  # scores that agree to so many decimals are equal: means of equal numbers may not be
NOTES = (
    "Random is the mean over data sets of the mean of a data set's learnwares; Learnware the pick;",
    "Best-single the data set of the highest average, Oracle that of the highest score on each",
    "task: both know the scores. Ranks: 1 is the highest score, equal ones share the best place.",
    "Intervals are percentiles over users drawn again; picks, best-single and static stay as they",
    "are.",
)


class Table(NamedTuple):
    """Scores of models, in per cent, an array of one number a task for every name."""

    tasks: list[str]
    references: dict[str, np.ndarray]
    learnwares: dict[str, np.ndarray]
    data_sets: dict[str, np.ndarray]  # means of the learnwares of a data set


class Pick(NamedTuple):
    """What is picked for a task: a learnware, or data sets that the score does not tell apart."""

    names: list[str]
    score: float


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    table = open_scores(config.scores)
    if config.picks:
        read_picks(config.picks, table)
    found = f"{len(table.tasks)} tasks, {len(table.learnwares)} learnwares"
    following = f"replay --config=configs/replay.py {setting('scores', config.scores)}"
    return {
        "scores": f"{config.scores}: {found}",
        "picks": config.picks or "the published ones",
        "next": f"{following} --config.picks=FILE",
    }


def run(config: ConfigDict) -> dict:
    """Replay config.scores and write workdir/results.json, report.md, tables.csv and figures."""
    check(config)
    table = open_scores(config.scores)
    if config.picks:
        picks = read_picks(config.picks, table)
    else:
        picks = recover_picks(table, config.published.to_dict())
    shared = shared_of(table, config.shared.to_dict())
    alone = [i for i, names in enumerate(shared) if not names]
    source = Path(config.scores)
    output = {
        # The name and the content, not where it lies.
        "scores": {"file": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "settings": {name: config[name] for name in ("draws", "level", "alpha", "seed")},
        **measure(table, picks, config),
        "picks": {task: pick.names for task, pick in zip(table.tasks, picks, strict=True)},
        "pick_is_shared": count_shared(picks, shared),
        # A mean over one user has no interval, a static ranker without another user no scores.
        "unshared": (
            measure(take(table, alone), [picks[i] for i in alone], config)
            if len(alone) > 1
            else None
        ),
        "tasks": task_rows(table, picks, shared),
    }
    workdir = Path(config.workdir)
    write_json(workdir / "results.json", output)
    rows = published_rows(output)
    with (workdir / "tables.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    (workdir / "report.md").write_text("\n".join(report(output, rows)) + "\n")
    draw(output, workdir)
    print("\n".join(summary(output, "all users", config.level)))
    if output["unshared"]:
        lines = summary(output["unshared"], "users that share no data set", config.level)
        print("\n".join(["", *lines]))
    for name in ("results.json", "report.md", "tables.csv", "ranks.png", "differences.png"):
        print(workdir / name)
    return output


def check(config: ConfigDict) -> None:
    """ValueError for settings that no interval could be made with, and for no file of scores."""
    if not config.scores:
        raise ValueError(f"replay: got no scores; name a file, --config.scores=FILE: {WANTED}.")
    if config.draws < 1:
        raise ValueError(f"replay: got draws={config.draws}; want at least 1.")
    for name in ("level", "alpha"):
        if not 0 < config[name] < 1:
            raise ValueError(f"replay: got {name}={config[name]}; want between 0 and 1.")


def open_scores(path: str) -> Table:
    """The scores of a CSV file; see configs/replay.py.

    FileNotFoundError, or ValueError that names the file, row and column: for what is no table, a
    name that is there twice, a cell that is no finite number, no learnware, or fewer than 2 tasks.
    """
    header, rows = _cells(path, WANTED)
    tasks = [row[0] for row in rows]
    values = _numbers(path, header, rows)
    names = [data_set_of(name) for name in header[1:]]
    references = {h: v for h, n, v in zip(header[1:], names, values.T, strict=True) if not n}
    learnwares = {h: v for h, n, v in zip(header[1:], names, values.T, strict=True) if n}
    if not learnwares:
        raise ValueError(f"{path}: no column is named DATASET-NUMBER, as learnwares are; {WANTED}.")
    if len(tasks) < 2:
        raise ValueError(f"{path}: got {len(tasks)} task; want at least 2 to take averages over.")
    for name in STRATEGIES:
        if name in references:
            raise ValueError(
                f"{path}: the column {name!r} has the name of a row of the results; rename it."
            )
    data_sets = {
        name: np.mean([v for h, v in learnwares.items() if data_set_of(h) == name], axis=0)
        for name in dict.fromkeys(data_set_of(h) for h in learnwares)
    }
    return Table(tasks, references, learnwares, data_sets)


def data_set_of(column: str) -> str:
    """The data set of a learnware named DATASET-NUMBER; "" for other names."""
    found = re.fullmatch(r"(.+)-\d+", column)
    return found[1] if found else ""


def _cells(path, wanted):
    """The header, and the other rows, as texts; checked to be a table with names of its own."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; want {wanted}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        header, *rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{path}: this is no CSV table ({error}); want {wanted}.") from None
    header, rows = [h.strip() for h in header], [[c.strip() for c in row] for row in rows]
    if len(header) < 2 or not rows:
        raise ValueError(
            f"{path}: got {len(header)} columns (by commas) and {len(rows)} rows after the header; "
            f"want {wanted}."
        )
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}: row {row[0]!r} has {len(row)} cells, the header {len(header)}; want as "
                "many."
            )
    for kind, names in (("column", header[1:]), ("row", [row[0] for row in rows])):
        twice = [name for i, name in enumerate(names) if not name or name in names[:i]]
        if twice:
            raise ValueError(
                f"{path}: the name {twice[0]!r} of a {kind} is empty or there twice; want one each."
            )
    return header, rows


def _numbers(path, header, rows):
    values = np.empty((len(rows), len(header) - 1))
    for i, (task, *cells) in enumerate(rows):
        for j, cell in enumerate(cells):
            try:
                values[i, j] = float(cell)
            except ValueError:
                values[i, j] = np.nan
            if not np.isfinite(values[i, j]):
                raise ValueError(
                    f"{path}: row {task!r}, column {header[j + 1]!r}: got {cell!r}; want a finite "
                    "number."
                )
    return values


def _score(table, place, name):
    """What a pick is worth: a data set the mean of its learnwares, a learnware its own score."""
    return float((table.data_sets.get(name, table.learnwares.get(name)))[place])


def read_picks(path: str, table: Table) -> list[Pick]:
    """A pick a task, in the table's order; rows of other tasks are not looked at.

    FileNotFoundError, or ValueError that names the file, and the task that is missing there or the
    data set that is unknown here.
    """
    header, rows = _cells(path, PICKS_WANTED)
    known = table.data_sets | table.learnwares
    if len(header) == 2:
        names = {row[0]: row[1] for row in rows}
    else:
        highest = _numbers(path, header, rows).argmax(1)
        names = {row[0]: header[1 + j] for row, j in zip(rows, highest, strict=True)}
    for name in header[1:] if len(header) > 2 else [names[t] for t in table.tasks if t in names]:
        if name not in known:
            raise ValueError(
                f"{path}: {name!r} is no data set or learnware of the scores; want "
                f"{', '.join(table.data_sets)}, or a learnware of these; {PICKS_WANTED}."
            )
    missing = [task for task in table.tasks if task not in names]
    if missing:
        raise ValueError(f"{path}: no pick for {', '.join(missing)}; add a row for each.")
    return [Pick([names[t]], _score(table, i, names[t])) for i, t in enumerate(table.tasks)]


def recover_picks(table: Table, published: Mapping[str, float]) -> list[Pick]:
    """Picks from their published scores: the data sets whose mean rounds to the score, to 0.01.

    Where there are several, all are named, and the score is that of the closest. ValueError for a
    task without a published score, or a score that is no data set's.
    """
    missing = [task for task in table.tasks if task not in published]
    if missing:
        raise ValueError(
            f"replay: there is no published score of a pick for {', '.join(missing)}; give picks, "
            "--config.picks=FILE, or the configuration of these tasks."
        )
    picks = []
    for place, task in enumerate(table.tasks):
        away = {name: abs(mean[place] - published[task]) for name, mean in table.data_sets.items()}
        order = sorted(away, key=away.get)
        names = [name for name in order if away[name] <= HALF_A_DIGIT]
        if not names:
            close = ", ".join(f"{name} {table.data_sets[name][place]:.2f}" for name in order[:3])
            raise ValueError(
                f"replay: {task}: the pick is published with {published[task]:.2f}, which is no "
                f"data set's mean in these scores; the nearest are {close}. Give the scores that "
                "the published table was made of, or picks, --config.picks=FILE."
            )
        picks.append(Pick(names, _score(table, place, names[0])))
    return picks


def shared_of(table: Table, shared: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """For each task, data sets of learnwares that share data with it; ValueError if unknown."""
    for task in table.tasks:
        for name in shared.get(task, ()):
            if name not in table.data_sets:
                raise ValueError(
                    f"replay: shared.{task} names {name!r}; want some of "
                    f"{', '.join(table.data_sets)}."
                )
    return [list(shared.get(task, ())) for task in table.tasks]


def count_shared(picks: Sequence[Pick], shared: Sequence[Sequence[str]]) -> dict[str, int]:
    """Users that share a data set; whose pick is one of those, for certain or possibly."""
    hits = [
        [(data_set_of(name) or name) in own or name in own for name in pick.names]
        for pick, own in zip(picks, shared, strict=True)
        if own
    ]
    return {"users": len(hits), "certain": sum(map(all, hits)), "possible": sum(map(any, hits))}


def take(table: Table, places: Sequence[int]) -> Table:
    """The table of some tasks."""
    rows = list(places)
    return Table(
        [table.tasks[i] for i in rows],
        *({name: v[rows] for name, v in part.items()} for part in table[1:]),
    )


def best_of(scores: Mapping[str, np.ndarray]) -> str:
    """The name of the highest mean; of equal ones, the first."""
    return max(scores, key=lambda name: round(float(scores[name].mean()), DIGITS))


def contenders(table: Table, picks: Sequence[Pick]) -> dict[str, np.ndarray]:
    """Scores of every row of the published comparison on each task."""
    means = np.array(list(table.data_sets.values()))
    return table.references | {
        RANDOM: means.mean(0),
        LEARNWARE: np.array([pick.score for pick in picks]),
        BEST: table.data_sets[best_of(table.data_sets)],
        ORACLE: means.max(0),
    }


def ranks(
    scores: Float[np.ndarray, "tasks methods"], ties: str
) -> Float[np.ndarray, "tasks methods"]:
    """Places of the methods on each task, from 1, the highest score.

    Equal scores share their best place with ties="min", its mean with ties="average".
    """
    return stats.rankdata(-np.round(scores, DIGITS), method=ties, axis=1).astype(float)


def critical_difference(methods: int, tasks: int, alpha: float) -> float:
    """How far apart average ranks must be to be told apart by Nemenyi's test, in ranks.

    q sqrt(k (k + 1) / (6 N)) for k methods on N tasks, with q the quantile of the studentised range
    over sqrt(2); for all pairs at once, at level alpha. Demsar, JMLR 2006, section 3.2.2.
    """
    q = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * tasks)))


def win_tie_loss(own: np.ndarray, other: np.ndarray) -> list[int]:
    """Tasks on which `own` is higher than, equal to, and lower than `other`."""
    difference = np.round(own - other, DIGITS)
    return [int(count.sum()) for count in (difference > 0, difference == 0, difference < 0)]


def static(data_sets: Mapping[str, np.ndarray]) -> list[str]:
    """For each task the data set of the highest mean over the other tasks: no specification."""
    means = np.array(list(data_sets.values()))
    others = (means.sum(1, keepdims=True) - means).round(DIGITS)
    return [list(data_sets)[place] for place in others.argmax(0)]


def measure(table: Table, picks: Sequence[Pick], config: ConfigDict) -> dict:
    """All that is said about a set of users, best-single and static being chosen on these alone."""
    scores = contenders(table, picks)
    stacked = np.array(list(scores.values()))
    places = resampled(np.random.default_rng(config.seed), len(table.tasks), config.draws)
    by_model = np.max(list(table.learnwares.values()), axis=0)
    model = best_of(table.learnwares)
    fixed = np.array([table.data_sets[name][i] for i, name in enumerate(static(table.data_sets))])

    def estimate(values):
        return {
            "value": float(values.mean()),
            "stderr": float(values.std(ddof=1) / np.sqrt(len(values))),
            **interval(values[places].mean(1), config.level)._asdict(),
        }

    def gap(oracle):
        triple = np.array([scores[LEARNWARE], scores[RANDOM], oracle])
        value = regret.gap_closed(*triple.mean(1).round(DIGITS).tolist())
        if np.isnan(value):
            return None
        selected, chance, best = triple[:, places].mean(2).round(DIGITS)
        width = np.where(best > chance, best - chance, np.nan)
        return {"value": value, **interval((selected - chance) / width, config.level)._asdict()}

    return {
        "users": table.tasks,
        "averages": {
            name.lower().replace("-", "_"): float(scores[name].mean()) for name in STRATEGIES
        },
        "references": {name: float(v.mean()) for name, v in table.references.items()},
        "ranks": dict(zip(scores, ranks(stacked.T, "min").mean(0).tolist(), strict=True)),
        "average_ranks": dict(
            zip(scores, ranks(stacked.T, "average").mean(0).tolist(), strict=True)
        ),
        "critical_difference": critical_difference(len(scores), len(table.tasks), config.alpha),
        "win_tie_loss": {
            own.lower(): {
                other: win_tie_loss(scores[own], scores[other]) for other in scores if other != own
            }
            for own in (LEARNWARE, ORACLE)
        },
        "differences": {
            name: estimate(v - scores[RANDOM]) for name, v in scores.items() if name != RANDOM
        },
        "best_single": best_of(table.data_sets),
        "oracle_by_model": {
            "average": float(by_model.mean()),
            "best_single": {"model": model, "average": float(table.learnwares[model].mean())},
        },
        "gap_closed": gap(scores[ORACLE]),
        "gap_closed_by_model": gap(by_model),
        "static": {
            "average": float(fixed.mean()),
            "difference": estimate(scores[LEARNWARE] - fixed),
        },
    }


def task_rows(table: Table, picks: Sequence[Pick], shared: Sequence[Sequence[str]]) -> list[dict]:
    """What is known about each task: scores, the pick and its place, the best, the static one."""
    scores, fixed = contenders(table, picks), static(table.data_sets)
    rows = []
    for i, (task, pick) in enumerate(zip(table.tasks, picks, strict=True)):
        own = {name: float(v[i]) for name, v in table.data_sets.items()}
        model = max(table.learnwares, key=lambda name: table.learnwares[name][i])
        rows.append(
            {
                "task": task,
                "scores": {name: float(v[i]) for name, v in scores.items()},
                "picks": pick.names,
                "place": 1 + sum(round(v - pick.score, DIGITS) > 0 for v in own.values()),
                "data_sets": len(own),
                "shared": shared[i],
                "best": max(own, key=own.get),
                "best_model": {"model": model, "score": float(table.learnwares[model][i])},
                "static": {"data_set": fixed[i], "score": own[fixed[i]]},
            }
        )
    return rows


def published_rows(output: dict) -> list[list[str]]:
    """The table as it was published: a row a task, then averages, ranks, wins, ties and losses."""
    names = list(output["ranks"])
    averages = output["references"] | {
        name: output["averages"][name.lower().replace("-", "_")] for name in STRATEGIES
    }
    rows = [["User", *names]]
    rows += [[r["task"], *(two(r["scores"][n]) for n in names)] for r in output["tasks"]]
    rows.append(["Avg.", *(two(averages[n]) for n in names)])
    rows.append(["Avg. rank", *(two(output["ranks"][n]) for n in names)])
    for own in (LEARNWARE, ORACLE):
        counts = output["win_tie_loss"][own.lower()]
        cells = ["/".join(map(str, counts[n])) if n in counts else "" for n in names]
        rows.append([f"{own} (win/tie/loss)", *cells])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first row is the header."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


def two(value: float) -> str:
    """Two decimals; half a digit to the even one, as the published tables are rounded."""
    return f"{np.round(value, 2):.2f}"


def within(found: dict | None) -> str:
    """A number and its interval."""
    if found is None:
        return "none: the oracle is no better than random"
    return f"{two(found['value'])} ({two(found['lower'])} to {two(found['upper'])})"


def summary(part: dict, title: str, level: float) -> list[str]:
    """The results of a set of users, as Markdown."""
    model, fixed = part["oracle_by_model"], part["static"]
    averages = part["references"] | dict(zip(STRATEGIES, part["averages"].values(), strict=True))
    rows = [
        [
            "contender",
            "average",
            "rank",
            f"less random ({100 * level:g}% interval)",
            "learnware's wins/ties/losses",
        ]
    ]
    for name, average in averages.items():
        counts = part["win_tie_loss"]["learnware"].get(name)
        rows.append(
            [
                name,
                two(average),
                two(part["ranks"][name]),
                within(part["differences"].get(name)) if name != RANDOM else "",
                "/".join(map(str, counts)) if counts else "",
            ]
        )
    difference = fixed["difference"]
    return [
        f"**{title}**: {len(part['users'])}",
        "",
        *markdown(rows),
        f"- Best-single: {part['best_single']}. By model instead of data set: best-single "
        f"{model['best_single']['model']} {two(model['best_single']['average'])}, oracle "
        f"{two(model['average'])}.",
        f"- Oracle gap closed: {within(part['gap_closed'])}; by model "
        f"{within(part['gap_closed_by_model'])}.",
        f"- Static, the best data set of the other tasks: {two(fixed['average'])}. Learnware less "
        f"static: {within(difference)}, standard error {two(difference['stderr'])}.",
        f"- Average ranks (ties at their mean) less than {two(part['critical_difference'])} apart "
        "are not told apart.",
    ]


def report(output: dict, rows: Sequence[Sequence[str]]) -> list[str]:
    """report.md, a list of lines."""
    counts, level = output["pick_is_shared"], output["settings"]["level"]
    picks = [["task", "pick", "place", "shares data with", "best data set", "best model", "static"]]
    for row in output["tasks"]:
        picks.append(
            [
                row["task"],
                " or ".join(row["picks"]),
                f"{row['place']} of {row['data_sets']}",
                ", ".join(row["shared"]),
                f"{row['best']} {two(row['scores'][ORACLE])}",
                f"{row['best_model']['model']} {two(row['best_model']['score'])}",
                f"{row['static']['data_set']} {two(row['static']['score'])}",
            ]
        )
    alone = output["unshared"]
    return [
        "# Replay",
        "",
        *markdown(rows),
        *NOTES,
        "",
        *summary(output, "All users", level),
        "",
        *(
            summary(alone, "Users that share no data set with a learnware", level)
            if alone
            else ["Fewer than two users share no data set with a learnware."]
        ),
        "",
        f"{counts['users']} users share a data set with learnwares. The pick is one of these for "
        f"{counts['certain']} of them, possibly for {counts['possible']}: several data sets may "
        "have the score of a pick.",
        "",
        *markdown(picks),
    ]


def draw(output: dict, workdir: Path) -> None:
    """ranks and differences as PNG and SVG, in the workdir."""
    names = list(output["average_ranks"])
    ranks = figures.critical_difference(
        names,
        [output["average_ranks"][name] for name in names],
        output["critical_difference"],
    )
    figures.save(ranks, workdir / "ranks")
    parts = {"all users": output, "sharing no data set": output["unshared"]}
    panels = [
        (
            f"{title} ({len(part['users'])})",
            [
                figures.Dot(name, found["value"], found["lower"], found["upper"])
                for name, found in part["differences"].items()
            ],
        )
        for title, part in parts.items()
        if part
    ]
    differences = figures.dots(panels, label="score less random, per cent", zero=0.0)
    figures.save(differences, workdir / "differences")
