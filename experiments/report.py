"""One page out of a study, self-contained, and the same as Markdown.

Example: python -m experiments.report --config=configs/report.py --config.study=FILE
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("report")

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.findings import NOTES, SPLITS, Table, as_markdown, label, ordered, tables
from learnware_jax import figures
from learnware_jax.dock.store import write_file

TITLE = "Does selection by specification beat what a critical reader would try instead?"
WANTED = {  # of a study, by name
    **{"learnwares": int, "tasks": int, "best_family": str, "splits": dict, "comparisons": dict},
    **{"abstention": dict, "exceptions": list, "rows": list, "made": dict},
}
MADE = ("command", "commit", "hardware", "seeds", "settings", "seconds", "date")
BARS = {"a": 0.9, "b": 0.6}  # of the gap closed: what the study set out to show
RIVALS = ("mean_cosine", "static")
ASKED = (
    "A dock holds small language models, fine-tuned for one task each, with specifications of what "
    "they are for. A user has a few rows of a task and asks which learnware to take. Do "
    "specifications pick better than chance, than a ranking that never looks at the user, than the "
    "cosine of mean embeddings, and than no learnware at all? How far is the pick from the best "
    "one? And are users whom no learnware fits told so?",
    "Users are of three splits. " + " ".join(f"{s}: {SPLITS[s]}." for s in "abc"),
)
GLOSSARY = {
    "learnware": "a fine-tuned model with a specification of what it is for",
    "dock": "the collection of learnwares that is searched",
    "user": "a task that asks for a learnware: a few rows to ask with, and test rows to judge by",
    "specification": "what a task looks like, without its texts: what users and learnwares share",
    "RKME": "reduced kernel mean embedding: a few weighted points instead of all embedded texts",
    "PAVE": "parameter vector: how a reference model changes when it is fitted to the task",
    "one-step gradient": "the direction of the first step of that fit",
    "static ranker": "one order of learnwares, by their scores for other users",
    "oracle": "who knows the true scores, and picks the best learnware or task for each user",
    "best single": "the learnware of the highest mean score over a split's users, in hindsight",
    "gap closed": "(score - random) / (oracle - random): 0 is a random pick, 1 the oracle's",
    "regret@k": "score lost against the oracle by the best of the first k",
    "tau": "weighted Kendall tau of a ranking and the true one: 1 the same, -1 the reverse",
    "abstention": "to say that no learnware fits, where even the closest is beyond a threshold",
    "corrupted learnware": "one that was trained on answers shuffled over the texts",
}
PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #ccc; --quiet: #666; --page: #fff; --ink: #1a1a1a }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --quiet: #aaa; --page: #16181c; --ink: #e6e6e6 }
}
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
@media (max-width: 40rem) { td:first-child { white-space: normal; min-width: 9rem } }
h1 { font-size: 1.5rem; line-height: 1.25 }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
p { max-width: 46rem }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
p.title { font-size: .9rem; font-weight: 600; margin: 1.5rem 0 -.7rem }
th, td { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: nowrap }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page) }
td.long { white-space: normal; min-width: 14rem }
table.words td { white-space: normal; overflow-wrap: anywhere; min-width: 6rem }
tr.best { font-weight: 600 }
figure { margin: 1rem 0 }
figure svg { background: #fff; height: auto; min-width: 44rem; max-width: 60rem; width: 100% }
figcaption { color: var(--quiet); font-size: .82rem; overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
"""
)


class Figure(NamedTuple):
    """A file beside the report, without its suffix, and what it shows."""

    name: str
    caption: str


class Section(NamedTuple):
    """A part of the report: what stands in the page and in Markdown alike."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    _sections(open_study(config.study), config.study)
    following = "study --config=configs/study.py:smoke"
    return {"study": config.study, "next": following}


def _sections(study: dict, path: str) -> list[Section]:
    try:
        return sections(study)
    except KeyError as error:
        raise ValueError(
            f"{path}: {error} is missing; want a study.json of experiments.study."
        ) from error


def run(config: ConfigDict) -> dict:
    """Write workdir/report.html, report.md and figures; returns the study that was read."""
    study = open_study(config.study)
    parts = _sections(study, config.study)
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    draw(study, workdir)
    for name, text in (("html", page(study, parts, workdir)), ("md", as_text(parts))):
        write_file(workdir / f"report.{name}", text.encode(), where="report")
    print("\n".join(headline(study)))
    for name in ("report.html", "report.md"):
        print(workdir / name)
    return study


def open_study(path: str) -> dict:
    """The study of a file; FileNotFoundError, or ValueError that names what is wrong or missing."""
    file = Path(path)
    remedy = "want a study.json of experiments.study"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {remedy}, --config.study=FILE.")
    try:
        study = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this is no JSON ({error}); {remedy}.") from None
    if not isinstance(study, dict):
        raise ValueError(f"{path}: this is a {type(study).__name__}; {remedy}.")
    wrong = [name for name, kind in WANTED.items() if not isinstance(study.get(name), kind)]
    if "made" not in wrong:
        wrong += [f"made.{name}" for name in MADE if name not in study["made"]]
    if "splits" not in wrong and not study["splits"]:
        wrong.append("a split")
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)} missing or of another kind; {remedy}.")
    return study


# ---- what is said


def sections(study: dict) -> list[Section]:
    """The report, part by part. KeyError for what the study lacks."""
    shown, made = tables(study), study["made"]
    origin = (
        f"Numbers of: {made['command']}; commit {made['commit']}; seeds {_text(made['seeds'])}; "
        f"{made['hardware']}."
    )
    return [
        Section("What was asked", ASKED),
        Section("What was found", _paragraphs(headline(study))),
        Section("Contenders", [" ".join(NOTES)], tables=shown["main"]),
        Section(
            "Figures",
            figures=[
                Figure(
                    "gap",
                    "Share of the gap between a random pick (dashed, 0) and the oracle's (1) that "
                    f"contenders close, with intervals, by split. {origin}",
                ),
                Figure(
                    "scores",
                    "Balanced accuracy, means over users ± standard errors over users, by split. "
                    f"{origin}",
                ),
            ],
        ),
        Section("Task by task", tables=shown["tasks"]),
        Section(
            "Comparisons",
            [
                "Above zero the specification is better. Where the interval holds zero, the two "
                "are tied. The draws are the same for both."
            ],
            tables=shown["comparisons"],
        ),
        Section("Abstention", tables=shown["abstention"]),
        Section("Corrupted learnwares", tables=shown["corrupted"]),
        Section("Exceptions", tables=shown["exceptions"]),
        Section(
            "Costs",
            ["What every contender costs stands in its row of the first tables."],
            tables=[
                Table(
                    "What the study took, seconds",
                    ["stage", "seconds"],
                    [[name, f"{taken:,.0f}"] for name, taken in made["seconds"].items()],
                )
            ],
        ),
        Section("How this was made", tables=[_made(study)]),
        Section(
            "Glossary",
            tables=[Table("Terms", ["term", "meaning"], [[*pair] for pair in GLOSSARY.items()])],
        ),
    ]


def _made(study: dict) -> Table:
    made = study["made"]
    rows = [[name, _text(made[name])] for name in MADE if name not in ("settings", "seconds")]
    rows += [[f"setting: {name}", _text(value)] for name, value in made["settings"].items()]
    figures = "experiments.report, from the study's file alone: the same file, the same figures"
    return Table("The study", ["what", "value"], [*rows, ["figures and tables", figures]])


def _text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def headline(study: dict) -> list[str]:
    """The numbers that the study was made for, in sentences; what fell short is said, too."""
    best = study["best_family"]
    chosen = ", chosen on other tasks" if "development" in study else ""
    lines = [
        f"The dock has {study['learnwares']} learnwares, and {study['tasks']} tasks ask for one. "
        f"The specification that is judged here is {label(best)}{chosen}."
    ]
    for name, split in study["splits"].items():
        of = split[best]
        line = (
            f"On split {name} ({SPLITS[name]}) its picks score {of['score']:.3f}, the base model "
        )
        line += f"{split['base']['score']:.3f}, the oracle's {split['oracle']['score']:.3f}; "
        lines.append(line + _gap_line(name, of))
        for rival in RIVALS:
            if rival != best and rival in study["comparisons"].get(name, {}):
                lines.append(_against(rival, study["comparisons"][name][rival]))
    asked = sum(row["split"] == "a" for row in study["rows"])
    if asked:
        lines.append(
            f"It beats the base model by more than one standard error on "
            f"{asked - len(study['exceptions'])} of {asked} tasks of split a."
        )
    if best in study["abstention"]:
        lines.append(_abstention_line(study["abstention"][best]))
    shares = {
        name: split[best]["corrupted"]
        for name, split in study["splits"].items()
        if split[best]["corrupted"] is not None
    }
    if shares:
        said = ", ".join(f"{100 * share:.0f}% on {name}" for name, share in shares.items())
        lines.append(f"Of its picks, these are corrupted learnwares: {said}.")
    return lines


def _paragraphs(lines: Sequence[str]) -> list[str]:
    """Sentences of one split together, and those after them."""
    starts = ("On split", "It beats the base model")
    begun = [0, *(i for i, line in enumerate(lines) if i and line.startswith(starts))]
    ends = [*begun[1:], len(lines)]
    return [" ".join(lines[i:j]) for i, j in zip(begun, ends, strict=True)]


def _gap_line(name: str, of: dict) -> str:
    if of["gap_closed"] is None:
        return "there is no gap to close: no learnware is better than a random one."
    line = f"it closes {of['gap_closed']:.2f} of the gap {_interval(of)}"
    if name not in BARS:
        return f"{line}."
    if of["gap_closed"] < BARS[name]:
        return f"{line} and misses the {BARS[name]} that was asked for."
    below = ", though the interval reaches below it" if of["lower"] < BARS[name] else ""
    return f"{line}, at least the {BARS[name]} that was asked for{below}."


def _interval(of: dict, sign: str = "") -> str:
    return "" if of["lower"] is None else f"[{of['lower']:{sign}z.2f}, {of['upper']:{sign}z.2f}]"


def _against(rival: str, of: dict) -> str:
    """Better, worse, or a tie where the interval holds zero."""
    if of["difference"] is None:
        return f"It cannot be compared with the {label(rival)} there."
    number = f"{of['difference']:+z.2f} {_interval(of, '+')}"
    if of["lower"] > 0:
        return f"It is better than the {label(rival)}, by {number}."
    if of["upper"] < 0:
        return f"It is worse than the {label(rival)}, by {number}."
    return f"Against the {label(rival)} it is a tie: {number} holds zero."


def _abstention_line(of: dict) -> str:
    said = {"false_acceptance": "c", "served_a": "a", "served_b": "b"}
    parts = [f"{100 * of[n]:.0f}% of split {s}" for n, s in said.items() if of[n] is not None]
    return f"Its threshold for abstention serves {', '.join(parts)}; of c, none should be."


# ---- how it is shown


def draw(study: dict, workdir: Path) -> None:
    """gap and scores as PNG and SVG, in workdir."""
    gaps, scores = [], []
    for name, split in study["splits"].items():
        title = f"split {name}: {SPLITS[name]}"
        # Random is 0 and the oracle 1, without an interval.
        shown = [n for n in ordered(split) if n not in ("random", "oracle")]
        shown = [n for n in shown if split[n]["gap_closed"] is not None]
        ends = ("gap_closed", "lower", "upper")
        gaps.append(
            (title, [figures.Dot(label(n), *(split[n][end] for end in ends)) for n in shown])
        )
        scores.append((title, [_score(label(n), split[n]) for n in ordered(split)]))
    figures.save(figures.dots(gaps, label="gap closed", zero=0.0), workdir / "gap")
    figures.save(figures.dots(scores, label="balanced accuracy"), workdir / "scores")


def _score(name: str, of: dict) -> figures.Dot:
    error = of["stderr"] or 0.0  # None where there is one user
    return figures.Dot(name, of["score"], of["score"] - error, of["score"] + error)


def page(study: dict, parts: Sequence[Section], workdir: Path) -> str:
    """The whole page; figures are read from workdir and stand in it."""
    best = label(study["best_family"])
    return PAGE.substitute(
        title=escape(TITLE),
        body="\n".join(_as_html(part, best, workdir) for part in parts),
    )


def _as_html(part: Section, best: str, workdir: Path) -> str:
    lines = [f"<h2>{escape(part.title)}</h2>"]
    lines += [f"<p>{escape(text)}</p>" for text in part.text]
    for figure in part.figures:
        caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
        svg = f'<div class="scroll">{inline_svg(workdir / f"{figure.name}.svg")}</div>'
        lines.append(f"<figure>{svg}{caption}</figure>")
    lines += [_html_table(table, best) for table in part.tables]
    return "\n".join(["<section>", *lines, "</section>"])


def _html_table(table: Table, best: str) -> str:
    if not table.rows:
        return f"<p><b>{escape(table.title)}</b>: none.</p>"
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = []
    for row in table.rows:
        # Sentences wrap, numbers do not.
        cells = [(" class='long'" if len(cell) > 40 else "", escape(cell)) for cell in row]
        mark = " class='best'" if row[0] == best else ""
        rows.append(f"<tr{mark}>{''.join(f'<td{long}>{cell}</td>' for long, cell in cells)}</tr>")
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>"
    # The title stays where it is while the table scrolls.
    title, words = escape(table.title), ' class="words"' if len(table.head) == 2 else ""
    table = f'<table{words} aria-label="{title}">\n{body}</table>'
    return f'<p class="title">{title}</p>\n<div class="scroll">{table}</div>'


def inline_svg(file: Path) -> str:
    """An SVG file as part of a page: without its prologue, with names of its own."""
    text = file.read_text(encoding="utf-8")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Two figures of a page share no names.
    svg = re.sub(r'\bid="', f'id="{file.stem}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{file.stem}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(file.stem)}"', 1)


def as_text(parts: Sequence[Section]) -> str:
    """The report as Markdown; figures are named, and lie beside it."""
    lines = [f"# {TITLE}", ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        for text in part.text:
            lines += [text, ""]
        for figure in part.figures:
            lines += [f"![{figure.name}]({figure.name}.svg)", "", figure.caption, ""]
        lines += [line for table in part.tables for line in as_markdown(table)]
    return "\n".join(lines)
