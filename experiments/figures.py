"""Figures of docks and rankings; each function writes one file, its format by its ending."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
        figure.axes[0].plot([], [], color=color, linewidth=2, label=domain.replace("$", r"\$"))
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


class Dot(NamedTuple):
    """A row of a dot plot: a value and the ends of its interval."""

    name: str
    value: float
    lower: float
    upper: float


def plot_dots(
    file: Path,
    panels: Sequence[tuple[str, Sequence[Dot]]],
    *,
    label: str,
    zero: float | Sequence[float | None] | None = None,
) -> None:
    """Dots with intervals, a panel (title, dots) beside another, a row a name, as PNG or SVG.

    Rows are in the order of the first panel, then of names that only others have; a panel may lack
    some. `zero` is where a dashed line stands: in all panels, or for each its own or None.
    ValueError for another suffix.
    """
    names = list(dict.fromkeys(dot.name for _, dots in panels for dot in dots))
    lines = list(zero) if isinstance(zero, Sequence) else [zero] * len(panels)
    # Names take about 0.07 inches a letter.
    width = 0.07 * max(map(len, names), default=0) + 2.8 * len(panels)
    figure = _new(figsize=(max(width, 4.5), 0.24 * len(names) + 1.1))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, dots), line in zip(axes, panels, lines, strict=True):
        for row in range(len(names)):
            axis.axhline(row, color="0.93", linewidth=0.8, zorder=0)
        if line is not None:
            axis.axvline(line, color="0.5", linestyle="--", linewidth=1, zorder=1)
        for dot in dots:
            row = names.index(dot.name)
            axis.plot([dot.lower, dot.upper], [row, row], color=COLORS[0], linewidth=1.6)
            axis.plot(dot.value, row, "o", color=COLORS[0], markersize=4.5)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    _write(figure, file)


def groups(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Places (first, last) of ranks, lowest first, whose ends are less than `difference` apart.

    Groups of at least two, none of them part of another.
    """
    ends = [sum(rank < first + difference for rank in ranks) - 1 for first in ranks]
    return [(i, end) for i, end in enumerate(ends) if end > i and (i == 0 or end > ends[i - 1])]


def plot_critical_difference(
    file: Path, names: Sequence[str], ranks: Sequence[float], difference: float
) -> None:
    """Average ranks on a line, best left; bars join those less than `difference` apart.

    Demsar, JMLR 2006, figure 1. PNG or SVG; ValueError for another suffix.
    """
    order = np.argsort(ranks, kind="stable")
    sorted_ranks, count = np.asarray(ranks, float)[order], len(names)
    bars = groups(sorted_ranks, difference)
    left = (count + 1) // 2
    top, row, bar = 0.9, 0.62, 0.22
    bottom = bar * (len(bars) + 1) + row * left + 0.3
    figure = _new(figsize=(7.5, 0.34 * (top + bottom) + 0.4))
    axis = figure.subplots()
    low, high = 1, count
    axis.plot([low, high], [0, 0], color="0", linewidth=1)
    for tick in range(low, high + 1):
        axis.plot([tick, tick], [0, 0.12], color="0", linewidth=1)
        axis.text(tick, 0.18, str(tick), ha="center", va="bottom", fontsize=8)
    axis.plot([low, low + difference], [top, top], color="0", linewidth=1.5)
    axis.text(
        low + difference + 0.02 * (high - low),
        top,
        f"critical difference {difference:.2f}",
        va="center",
        fontsize=8,
    )
    for place, (first, last) in enumerate(bars):
        y = -bar * (place + 1)
        # A bar sticks out: one between equal ranks is seen, too.
        ends = sorted_ranks[[first, last]] + 0.01 * (high - low) * np.array([-1, 1])
        axis.plot(ends, [y, y], color=COLORS[0], linewidth=3.5, solid_capstyle="butt")
    margin = 0.05 * (high - low)
    for place, index in enumerate(order):
        # The better half is named left, the best on top; the others right, the worst on top.
        on_left = place < left
        depth = place if on_left else count - 1 - place
        y = -bar * (len(bars) + 1) - row * (depth + 0.5)
        x, end = sorted_ranks[place], low - margin if on_left else high + margin
        axis.plot([x, x, end], [0, y, y], color="0.35", linewidth=0.9, zorder=0)
        axis.text(
            end + (-0.3 if on_left else 0.3) * margin,
            y,
            f"{names[index]}  {x:.2f}" if on_left else f"{x:.2f}  {names[index]}",
            ha="right" if on_left else "left",
            va="center",
            fontsize=8,
        )
    axis.set_xlim(low - margin, high + margin)
    axis.set_ylim(-bottom, top + 0.4)
    axis.axis("off")
    _write(figure, file)


def _write(figure, path: Path):
    """Save as PNG or SVG; the same figure is the same bytes."""
    from matplotlib import rc_context

    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"figure: got {path.name}; want a name that ends in .png or .svg.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names in an SVG come from a hash with a random salt, and its date is that of today; letters
    # are drawn as paths, so that no font is needed.
    with rc_context({"svg.hashsalt": "learnware_jax", "svg.fonttype": "path"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


class Curve(NamedTuple):
    """Points of one line of `plot_scaling`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def plot_scaling(path: Path, x_label: str, panels: dict[str, Sequence[Curve]]) -> None:
    """Log-log curves, a panel for each label of y, and a grey line of slope one to compare with."""
    figure = _new(figsize=(4.6 * len(panels), 3.6))
    markers = "osD^vPX"
    for axis, (y_label, curves) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        for i, curve in enumerate(curves):
            axis.plot(
                curve.x,
                curve.y,
                marker=markers[i % len(markers)],
                color=COLORS[i],
                label=curve.name,
            )
        x = np.array([min(min(c.x) for c in curves), max(max(c.x) for c in curves)], float)
        top = max(max(c.y) for c in curves)
        axis.plot(x, top * x / x[1], color="0.75", zorder=0, label="linear")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    _write(figure, path)


def plot_audit(path: Path, rows: Sequence[dict]) -> None:
    """Share of users served rightly against the AUC of the best attack, a column of panels for
    every number of rows and a line for every attacker; see audit.json.

    What has an epsilon is a line over it, the rest is single marks. Of reduced sets, those with the
    most points are shown.
    """
    sizes = sorted({row["n"] for row in rows})
    most = max((row["m"] for row in rows if row["m"]), default=None)
    rows = [row for row in rows if row["m"] in (None, most)]
    attackers = {"auc": "attacker knows all candidates", "stranger_auc": "attacker knows one text"}
    names = list(dict.fromkeys(_audited(row) for row in rows))
    styles = {
        name: (COLORS[i % len(COLORS)], "osD^vP*Xhd<>"[i % 12]) for i, name in enumerate(names)
    }
    figure = _new(figsize=(3.8 * len(sizes) + 0.5, 6.6))
    panels = figure.subplots(2, len(sizes), sharex=True, sharey=True, squeeze=False)
    for column, n in enumerate(sizes):
        for axis, (value, title) in zip(panels[:, column], attackers.items(), strict=True):
            for name, (color, mark) in styles.items():
                some = [row for row in rows if row["n"] == n and _audited(row) == name]
                some.sort(key=lambda row: float(row["epsilon"]))
                x, y = [row[value] for row in some], [row["quality"] for row in some]
                axis.plot(x, y, f"{mark}-", color=color, markersize=5, linewidth=1, alpha=0.8)
                for row in some if len(some) > 1 else ():
                    label = "∞" if row["epsilon"] == "inf" else f"{row['epsilon']:g}"
                    axis.annotate(
                        label,
                        (row[value], row["quality"]),
                        xytext=(3, -8),
                        textcoords="offset points",
                        fontsize=6,
                        color=color,
                    )
            axis.axvline(0.5, color="0.6", linestyle="--", linewidth=1)
            axis.set_title(f"{n:,} rows, {title}", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in panels[-1]:
        axis.set_xlabel("AUC of the best attack", fontsize=8)
    for axis in panels[:, 0]:
        axis.set_ylabel("share of users, own task first", fontsize=8)
    for name, (color, mark) in styles.items():
        panels[0, 0].plot([], [], f"{mark}-", color=color, markersize=5, label=name)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        "Upper left is better. Numbers: epsilon. Dashed: the attack learns nothing.", fontsize=9
    )
    _save(figure, path)


def _audited(row: dict) -> str:
    return f"{row['kind']} {row['reducer']}".strip()


def plot_gamed(path: Path, output: dict) -> None:
    """Who is given an attacker, and how well models tell claimed texts apart; see gamed.py."""
    figure = _new(figsize=(12, 4.6))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    rows = [r for r in output["rankings"] if r["users"] == "same" and r["attack"] != "none"]
    attacks, methods = (list(dict.fromkeys(r[key] for r in rows)) for key in ("attack", "method"))
    share = {(r["method"], r["attack"]): r["first"] for r in rows}
    values = np.array([[share[m, a] for a in attacks] for m in methods])
    left.imshow(values, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        color = "white" if value > 0.7 else "black"
        left.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    left.set_xticks(range(len(attacks)), attacks, rotation=30, ha="right", fontsize=8)
    left.set_yticks(range(len(methods)), methods, fontsize=8)
    left.set_title("users to whom the attacker comes first, %", fontsize=9)
    check = output["check"]
    for y, row in enumerate(check["rows"]):
        # Spread by a fixed pattern: dots of one value would hide each other.
        shift = 0.3 * ((0.618 * np.arange(len(row["told"]))) % 1 - 0.5)
        color = COLORS[0 if row["who"].startswith("honest") else 1]
        right.plot(row["told"], y + shift, "o", color=color, markersize=3.5, alpha=0.6)
    right.axvline(check["threshold"], color="0.5", linestyle="--", linewidth=1)
    right.set_yticks(range(len(check["rows"])), [row["who"] for row in check["rows"]], fontsize=8)
    right.invert_yaxis()
    right.set_xlim(-0.02, 1.02)
    right.set_xlabel(
        "how well the model tells herded texts apart; dashed: flagged below", fontsize=8
    )
    right.tick_params(axis="x", labelsize=8)
    right.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_coverage(path: Path, panels: dict[str, Sequence[Curve]], nominal: float) -> None:
    """Coverage against rows on a log axis, a panel a title, and a dashed line at the nominal one.

    A curve has the same colour and marker in all panels. PNG or SVG; ValueError for another suffix.
    """
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    rows = sorted({x for curves in panels.values() for curve in curves for x in curve.x})
    figure = _new(figsize=(4 * len(panels), 4.6))
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        axis.axhline(nominal, color="0.3", linestyle="--", linewidth=1, zorder=1)
        for curve in curves:
            place = names.index(curve.name)
            axis.plot(
                curve.x,
                curve.y,
                marker="osD^vPX"[place % 7],
                color=COLORS[place % len(COLORS)],
                markersize=4.5,
                linewidth=1.2,
                label=curve.name,
            )
        axis.set_xscale("log")
        axis.set_xticks(rows, [f"{n:,}" for n in rows])
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("rows of the user", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("coverage", fontsize=8)
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False
    )
    _write(figure, path)
