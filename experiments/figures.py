"""Figures of docks and rankings; each function writes one file, its format by its ending."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Okabe and Ito's colours, told apart by colour-blind readers too, then darker repeats.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D00", "#000000"),
    *("#7F7F7F", "#5B3A8C", "#A03030", "#306030"),
)


def domain_colors(domains: Sequence[str]) -> dict[str, str]:
    """One colour a domain, in alphabetical order."""
    return {d: COLORS[i % len(COLORS)] for i, d in enumerate(sorted(set(domains)))}


def _new(**options):
    # The object interface of matplotlib: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_rankings(path: Path, users: Sequence[dict], threshold: float, *, shown: int = 8) -> None:
    """The closest learnwares of each user with intervals, closest on top; see results.json."""
    figure = _new(figsize=(max(4.2 * len(users), 6.5), 0.32 * shown + 2))
    colors = domain_colors([e["domain"] for user in users for e in user["ranking"][:shown]])
    for axis, user in zip(np.atleast_1d(figure.subplots(1, len(users))), users, strict=True):
        entries = user["ranking"][:shown]
        for row, entry in enumerate(entries):
            color = colors[entry["domain"]]
            axis.plot([entry["lower"], entry["upper"]], [row, row], color=color, linewidth=2)
            filled = color if entry["id"] in user["undominated"] else "white"
            axis.plot(entry["distance"], row, "o", color=color, markerfacecolor=filled)
        if np.isfinite(threshold):
            axis.axvline(threshold, color="0.5", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(entries)), [entry["id"] for entry in entries], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{user['id']}\n({user['kind']}) → {user['decision']}", fontsize=9)
        axis.set_xlabel("squared MMD", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for domain, color in colors.items():
        figure.axes[0].plot([], [], color=color, linewidth=2, label=domain)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(
        "Closest learnwares. Filled: not separated from the first. Dashed: beyond it, none fits.",
        fontsize=9,
    )
    _save(figure, path)


def plot_accuracies(path: Path, rows: Sequence[dict]) -> None:
    """Base, random, selected and best accuracy of every task, a line each; see results.json."""
    figure = _new(figsize=(7.5, 0.34 * len(rows) + 1.6))
    axis = figure.subplots()
    marks = {
        "base": ("o", COLORS[8], "base model"),
        "random": ("|", COLORS[4], "mean of all learnwares"),
        "oracle": ("D", COLORS[2], "best learnware on these rows"),
        "selected": ("o", COLORS[0], "selected learnware ± standard error"),
    }
    for y, row in enumerate(rows):
        axis.plot([row["base"], row["selected"]], [y, y], color="0.85", linewidth=1.5, zorder=0)
        for name, (mark, color, _) in marks.items():
            filled = "white" if name == "oracle" else color
            size = 9 if name == "oracle" else 7
            axis.plot(row[name], y, mark, color=color, markerfacecolor=filled, markersize=size)
        axis.errorbar(row["selected"], y, xerr=row["stderr"], color=COLORS[0], linewidth=1)
    for name, (mark, color, label) in marks.items():
        filled = "white" if name == "oracle" else color
        axis.plot([], [], mark, color=color, markerfacecolor=filled, label=label)
    axis.set_yticks(range(len(rows)), [row["task"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("share of answers that are right", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, path)


def plot_map(path: Path, points: np.ndarray, ids: Sequence[str], domains: Sequence[str]) -> None:
    """A dock in two dimensions, one labelled dot a learnware, coloured by domain."""
    figure = _new(figsize=(12, 8.5))
    axis = figure.subplots()
    colors = domain_colors(domains)
    for domain, color in colors.items():
        chosen = [d == domain for d in domains]
        axis.plot(*points[chosen].T, "o", color=color, label=domain, markersize=6)
    span = np.ptp(points, axis=0)
    for (x, y), name, domain in zip(points, ids, domains, strict=True):
        axis.annotate(
            name,
            (x, y + 0.008 * span[1]),
            fontsize=7,
            color=colors[domain],
            ha="center",
            va="bottom",
        )
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_heat_map(path: Path, distance: np.ndarray, ids: Sequence[str]) -> None:
    """A matrix of squared MMDs between learnwares, in the order given."""
    size = 0.2 * len(ids) + 2.5
    figure = _new(figsize=(size + 1, size))
    axis = figure.subplots()
    image = axis.imshow(distance, cmap="viridis", vmin=0)
    axis.set_xticks(range(len(ids)), ids, rotation=90, fontsize=7)
    axis.set_yticks(range(len(ids)), ids, fontsize=7)
    figure.colorbar(image, label="squared MMD", shrink=0.8)
    _save(figure, path)


def plot_families(
    path: Path, rows: Sequence[dict], metrics: Sequence[tuple[str, str, str]], shown: Sequence[str]
) -> None:
    """A metric of `shown` families against the rows of a user, a panel each; see families.json.

    `metrics` are (setting, metric, title); rows of a family without targets have one line, those of
    vectors one for each target. Bars: standard errors over users.
    """
    figure = _new(figsize=(4.6 * len(metrics), 4.4))
    lines = list(dict.fromkeys((r["family"], r["target"]) for r in rows if r["family"] in shown))
    styles = {"": "-", "answers": "-", "outputs": "--", "prompts": ":"}
    colors = dict(zip(shown, COLORS, strict=False))
    for axis, (setting, metric, title) in zip(
        np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True
    ):
        for place, (family, target) in enumerate(lines):
            points = sorted(
                (r["n"], r[metric], r["stderr"][metric])
                for r in rows
                if (r["setting"], r["family"], r["target"]) == (setting, family, target)
            )
            if not points:
                continue
            n, value, error = map(np.array, zip(*points, strict=True))
            # Apart by a little: bars would hide each other.
            axis.errorbar(
                n * 1.02 ** (place - len(lines) / 2),
                value,
                error,
                color=colors[family],
                linestyle=styles[target],
                marker="o",
                markersize=3,
                linewidth=1.2,
                elinewidth=0.6,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({r["n"] for r in rows}), sorted({r["n"] for r in rows}), fontsize=8)
        axis.set_xlabel("rows of a user", fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for family, target in lines:
        figure.axes[0].plot(
            [],
            [],
            color=colors[family],
            linestyle=styles[target],
            label=f"{family}, {target}" if target else family,
        )
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    _save(figure, path)
