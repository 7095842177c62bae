"""Figures, in one style; every function but `save` takes plain data and returns a Figure.

Matplotlib is imported where a figure is drawn; nothing of it that is global is changed. What is
told apart by colour is told apart by its marker, too: in greyscale, and by readers who see no
colours.
"""

import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import matplotlib.figure

# Okabe and Ito's colours, without their yellow that white paper swallows; neighbours differ in
# luminance.
COLORS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#D55E00", "#56B4E9", "#009E73", "#9A9A9A")
MARKERS = "osD^vP*X<>hd"
LINES = ("-", "--", ":")
QUIET = "0.45"  # dashed lines that stand for a number
SMALL = 9  # points
LETTER = 0.072  # inches: a letter of this size, on average
STYLE = {
    "font.size": SMALL,
    "axes.titlesize": 10,
    "axes.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.handlelength": 3.0,
    "legend.labelspacing": 0.7,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "savefig.dpi": 150,
    # Letters are paths, so that no font is needed; names in the file come from a hash, whose salt
    # would be a random one.
    "svg.fonttype": "path",
    "svg.hashsalt": "learnware_jax",
}


class Dot(NamedTuple):
    """A mark of a dot plot: its row, a value, the ends of its interval, what it is a mark of."""

    name: str
    value: float
    lower: float
    upper: float
    series: str = ""


class Curve(NamedTuple):
    """Points of a line; `error` is the half length of their bars, or empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()


def save(figure: "matplotlib.figure.Figure", path: str | Path) -> tuple[Path, Path]:
    """Write path.png and path.svg, and return their paths; the same figure is the same bytes.

    ValueError for a path that ends in .png or .svg already.
    """
    path = Path(path)
    if path.suffix in (".png", ".svg"):
        raise ValueError(
            f"save: got {path.name}; want a name without {path.suffix}: PNG and SVG are written."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    files = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.svg")
    for file in files:
        drawn = io.BytesIO()
        # The date in an SVG would be that of today.
        about = {"Date": None} if file.suffix == ".svg" else None
        with _style():
            figure.savefig(drawn, format=file.suffix[1:], metadata=about)
        file.write_bytes(drawn.getvalue())
    return files


# ---- what the figures share


def _style():
    from matplotlib import style

    return style.context(["default", STYLE])


def _styled(draw: Callable) -> Callable:
    """Draw in our style, whatever the caller's is."""

    @functools.wraps(draw)
    def styled(*args, **kwargs):
        with _style():
            return draw(*args, **kwargs)

    return styled


def _new(size: tuple[float, float], rows: int = 1, columns: int = 1, **options):
    """A figure and its axes (rows, columns), by the object interface: no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        # Ticks are made when the figure is drawn, which may be in somebody else's style.
        axis.tick_params(labelsize=SMALL)
        axis.xaxis.get_offset_text().set_fontsize(SMALL)
    return figure, axes


def _text(name: str, most: int = 36) -> str:
    """A name as text: never mathematics, and never so long that it leaves no room for data."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    if len(name) > most:
        name = f"{name[: most - 13]}…{name[-12:]}"
    return name.replace("$", r"\$")


def _wrap(text: str, inches: float) -> str:
    return "\n".join(textwrap.wrap(_text(text, 120), max(12, int(inches / LETTER))))


def _marks(names: Sequence[str]) -> dict[str, dict]:
    """A colour, a marker and a line style for each name, in the order given."""
    return {
        name: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)],
        }
        for i, name in enumerate(names)
    }


def _legend(figure, entries: Mapping[str, dict]) -> None:
    """A legend below all panels, in as many columns as there is room for."""
    from matplotlib.lines import Line2D

    texts = [_text(name, 48) for name in entries]
    wide = LETTER * max(map(len, texts), default=0) + 0.6
    figure.legend(
        [Line2D([], [], **of) for of in entries.values()],
        texts,
        loc="outside lower center",
        ncols=max(1, min(len(texts), int(figure.get_figwidth() / wide))),
    )


# ---- figures


@_styled
def rankings(
    users: Sequence[dict], threshold: float, *, shown: int = 8
) -> "matplotlib.figure.Figure":
    """The closest learnwares of users with intervals of the squared MMD, a panel a user.

    A user has `id`, `kind`, `decision`, `undominated` (ids that are not separated from the closest)
    and `ranking`, closest first, of dicts with `id`, `domain`, `distance`, `lower` and `upper`. A
    dashed line stands at a finite threshold, beyond which none fits.
    """
    counts = [len(user["ranking"][:shown]) for user in users]
    figure, axes = _new(
        (7.5, 0.25 * sum(counts) + 0.55 * len(users) + 1.2),
        len(users),
        sharex=True,
        height_ratios=[count + 0.5 for count in counts],
    )
    marks = _marks(sorted({e["domain"] for user in users for e in user["ranking"][:shown]}))
    for axis, user, count in zip(axes[:, 0], users, counts, strict=True):
        for row, entry in enumerate(user["ranking"][:shown]):
            mark = marks[entry["domain"]] | {"linestyle": "-"}
            filled = mark["color"] if entry["id"] in user["undominated"] else "white"
            axis.plot([entry["lower"], entry["upper"]], [row, row], color=mark["color"])
            axis.plot(entry["distance"], row, markerfacecolor=filled, markersize=6.5, **mark)
        if np.isfinite(threshold):
            axis.axvline(threshold, color=QUIET, linestyle="--", linewidth=1, zorder=0)
        names = [_text(entry["id"]) for entry in user["ranking"][:shown]]
        axis.set_yticks(range(count), names)
        axis.set_ylim(count - 0.5, -0.5)
        user_id, decision = _text(user["id"], 24), _text(user["decision"], 24)
        axis.set_title(f"{user_id} ({user['kind']}) → {decision}", loc="left")
    axes[-1, 0].set_xlabel("squared MMD")
    said = "Filled: not separated from the first."
    if np.isfinite(threshold):
        said += " Dashed: beyond it, none fits."
    figure.suptitle(said)
    _legend(figure, {name: of | {"linestyle": "-"} for name, of in marks.items()})
    return figure


@_styled
def dock_map(
    points: np.ndarray, ids: Sequence[str], domains: Sequence[str]
) -> "matplotlib.figure.Figure":
    """A dock in two dimensions: points (M, 2), one labelled mark a learnware, shaped by domain.

    A label that finds no free place is left out, and the figure says how many are.
    """
    figure, ((axis,),) = _new((8.0, 7.0))
    marks = {d: of | {"linestyle": ""} for d, of in _marks(sorted(set(domains))).items()}
    for domain, mark in marks.items():
        axis.plot(*points[[d == domain for d in domains]].T, **mark)
    axis.margins(0.12)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["bottom", "left"]].set_visible(False)
    axis.set_title("Near on the map: a small MMD", loc="left")
    _legend(figure, marks)
    left_out = _place_labels(figure, axis, points, [_text(name, 28) for name in ids])
    if left_out:
        axis.set_title(f"{left_out} names found no place", loc="right")
    return figure


def _place_labels(figure, axis, points, names) -> int:
    """Write each name near its point where nothing is yet; returns how many found no place."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places are those of this layout
    renderer = figure.canvas.get_renderer()
    pixel = figure.dpi / 72  # pixels a point
    frame, at = axis.get_window_extent(renderer), axis.transData.transform(points)
    # What is taken, as boxes (low x, low y, high x, high y): marks, names, and points of lines.
    marks = np.concatenate([at - 4.5 * pixel, at + 4.5 * pixel], 1)
    taken, lines = marks, np.empty((0, 2))
    # Above and below first, then to the sides, then farther off with a line to the point.
    angles = np.pi * np.array([0.5, 1.5, 0, 1, 0.25, 0.75, 1.25, 1.75, 0.12, 0.38, 0.62, 0.88])
    near, *far = (6, 14, 24, 36, 50, 66, 84, 104)
    tries = [(r, np.array([np.cos(a), np.sin(a)])) for r in (near, *far) for a in angles]
    left_out = 0
    # Those in a crowd first: the others have room anyway.
    apart = np.linalg.norm(at[:, None] - at, axis=-1)
    for i in np.argsort(-(apart < 60 * pixel).sum(1), kind="stable"):
        center, point, name = at[i], points[i], names[i]
        place = {"textcoords": "offset points", "ha": "center", "va": "center"}
        label = axis.annotate(name, point, xytext=(0, 0), **place)
        box = label.get_window_extent(renderer)
        label.remove()
        half = np.array([box.width, box.height]) / 2 + pixel
        # A line starts inside its own mark, and inside marks that lie on that one.
        around = np.all((marks[:, :2] < center) & (marks[:, 2:] > center), 1)
        for radius, way in tries:
            shift = way * (radius * pixel + half * (np.abs(way) > 0.1))
            low, high = center + shift - half, center + shift + half
            line = center + shift * np.linspace(0, 1, 20)[:, None] if radius > near else lines[:0]
            others = np.concatenate([marks[~around], taken[len(marks) :]])
            if (
                np.all(low >= frame.min)
                and np.all(high <= frame.max)
                and not np.any(np.all((taken[:, :2] < high) & (taken[:, 2:] > low), 1))
                and not np.any(np.all((lines > low) & (lines < high), 1))
                and not np.any(
                    np.all((others[:, None, :2] < line) & (others[:, None, 2:] > line), -1)
                )
            ):
                break
        else:
            left_out += 1
            continue
        taken = np.concatenate([taken, [[*low, *high]]])
        lines = np.concatenate([lines, line])
        arrow = {"arrowstyle": "-", "color": QUIET, "linewidth": 0.6} if radius > near else None
        axis.annotate(name, point, xytext=shift / pixel, arrowprops=arrow, **place)
    return left_out


@_styled
def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    numbers: str | None = None,
) -> "matplotlib.figure.Figure":
    """A matrix (rows, columns) as colours, from 0 on; `numbers` is a format to write it in, too."""
    wide = LETTER * max(len(_text(name)) for name in rows)
    tall = LETTER * max(len(_text(name)) for name in columns)
    cell = (0.6, 0.34) if numbers else (0.22, 0.22)
    size = cell[0] * len(columns) + wide + 1.3, cell[1] * len(rows) + tall + 0.6
    figure, ((axis,),) = _new((max(size[0], 4.0), max(size[1], 2.5)))
    axis.set_title(_wrap(label, figure.get_figwidth() - wide), loc="left")
    image = axis.imshow(values, cmap="viridis", vmin=0, aspect="auto")
    axis.set_xticks(range(len(columns)), map(_text, columns), rotation=90)
    axis.set_yticks(range(len(rows)), map(_text, rows))
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    figure.colorbar(image, shrink=0.8)
    for (y, x), value in np.ndenumerate(values if numbers else np.empty((0, 0))):
        color = "black" if image.norm(value) > 0.6 else "white"
        axis.text(x, y, format(value, numbers), ha="center", va="center", color=color)
    return figure


@_styled
def dots(
    panels: Sequence[tuple[str, Sequence[Dot]]],
    *,
    label: str,
    zero: float | Sequence[float | None] | None = None,
) -> "matplotlib.figure.Figure":
    """Dots with intervals, a panel (title, dots) beside another, a row a name.

    Rows are in the order of the first panel, then of names that only others have; a panel may lack
    some. Dots of several series have a legend. `zero` is where a dashed line stands: in all panels,
    or for each its own or None.
    """
    names = list(dict.fromkeys(dot.name for _, dots in panels for dot in dots))
    series = list(dict.fromkeys(dot.series for _, dots in panels for dot in dots))
    # Marks at one value lie inside each other: the last series on top, filled and smallest.
    marks = {
        name: of
        | {"linestyle": "", "markersize": 5.5 + 2 * i}
        | ({"markerfacecolor": "none"} if i else {})
        for i, (name, of) in enumerate(_marks(series[::-1]).items())
    }
    lines = list(zero) if isinstance(zero, Sequence) else [zero] * len(panels)
    texts = [_text(name, 36 if len(panels) > 1 else 68) for name in names]
    wide = LETTER * max(map(len, texts), default=0)
    panel = max(2.0, (9 - wide) / len(panels))
    height = 0.25 * len(names) + 1.2 + 0.25 * (len(series) > 1)
    figure, axes = _new(
        (wide + panel * len(panels), height), 1, len(panels), sharex=True, sharey=True
    )
    # `_new` gives every figure an engine.
    figure.get_layout_engine().set(wspace=0.04)  # pyright: ignore[reportOptionalMemberAccess]
    for axis, (title, drawn), line in zip(axes[0], panels, lines, strict=True):
        for row in range(len(names)):
            axis.axhline(row, color="0.92", linewidth=0.8, zorder=0)
        if line is not None:
            axis.axvline(line, color=QUIET, linestyle="--", linewidth=1, zorder=1)
        for dot in sorted(drawn, key=lambda dot: series.index(dot.series)):
            row, mark = names.index(dot.name), marks[dot.series]
            axis.plot([dot.lower, dot.upper], [row, row], color=mark["color"])
            axis.plot(dot.value, row, **mark)
        axis.set_title(_wrap(title, panel))
        axis.set_xlabel(label)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), texts)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    if len(series) > 1:
        _legend(figure, marks)
    return figure


def groups(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Places (first, last) of ranks, lowest first, whose ends are less than `difference` apart.

    Groups of at least two, none of them part of another.
    """
    ends = [sum(rank < first + difference for rank in ranks) - 1 for first in ranks]
    return [(i, end) for i, end in enumerate(ends) if end > i and (i == 0 or end > ends[i - 1])]


@_styled
def critical_difference(
    names: Sequence[str], ranks: Sequence[float], difference: float
) -> "matplotlib.figure.Figure":
    """Average ranks on a line, best left; bars join those less than `difference` apart.

    Demsar, JMLR 2006, figure 1.
    """
    order = np.argsort(ranks, kind="stable")
    sorted_ranks, count = np.asarray(ranks, float)[order], len(names)
    bars = groups(sorted_ranks.tolist(), difference)
    left = (count + 1) // 2
    top, row, bar = 0.9, 0.62, 0.22
    bottom = bar * (len(bars) + 1) + row * left + 0.3
    figure, ((axis,),) = _new((7.5, 0.38 * (top + bottom) + 0.4))
    low, high = 1, max(count, 2)
    axis.plot([low, high], [0, 0], color="0", linewidth=1)
    for tick in range(low, high + 1):
        axis.plot([tick, tick], [0, 0.12], color="0", linewidth=1)
        axis.text(tick, 0.18, str(tick), ha="center", va="bottom")
    axis.plot([low, low + difference], [top, top], color="0", linewidth=1.5)
    axis.text(
        low + difference + 0.02 * (high - low),
        top,
        f"critical difference {difference:.2f}",
        va="center",
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
        name = _text(names[index])
        axis.text(
            end + (-0.3 if on_left else 0.3) * margin,
            y,
            f"{name}  {x:.2f}" if on_left else f"{x:.2f}  {name}",
            ha="right" if on_left else "left",
            va="center",
        )
    axis.set_xlim(low - margin, high + margin)
    axis.set_ylim(-bottom, top + 0.4)
    axis.axis("off")
    return figure


@_styled
def curves(
    panels: Sequence[tuple[str, Sequence[Curve]]],
    *,
    x_label: str,
    y_label: str | Sequence[str],
    line: float | None = None,
) -> "matplotlib.figure.Figure":
    """Curves over a logarithmic axis, a panel (title, curves) below another.

    Panels share their axis y if it has one label; else there is one a panel. A dashed line stands
    at `line`. A curve of the same name looks the same in all panels.
    """
    marks = _marks(list(dict.fromkeys(c.name for _, drawn in panels for c in drawn)))
    shared = isinstance(y_label, str)
    figure, axes = _new(
        (8.0, 2.5 * len(panels) + 0.26 * len(marks) / 3 + 0.6),
        len(panels),
        sharex=True,
        sharey=shared,
    )
    labels = [y_label] * len(panels) if shared else y_label
    for axis, (title, drawn), label in zip(axes[:, 0], panels, labels, strict=True):
        if line is not None:
            axis.axhline(line, color=QUIET, linestyle="--", linewidth=1, zorder=1)
        for curve in drawn:
            # Apart by a little: bars and marks would hide each other.
            place = list(marks).index(curve.name) - (len(marks) - 1) / 2
            x = np.asarray(curve.x) * 1.04**place
            mark = marks[curve.name]
            axis.plot(x, curve.y, **mark)
            if len(curve.error):
                bar = {"ecolor": mark["color"], "elinewidth": 0.8}
                axis.errorbar(x, curve.y, curve.error, fmt="none", **bar)
        axis.set_title(_text(title, 80), loc="left")
        axis.set_ylabel(label)
        axis.grid()
    _log_ticks(axes[-1, 0], [x for _, drawn in panels for curve in drawn for x in curve.x])
    axes[-1, 0].set_xlabel(x_label)
    _legend(figure, marks)
    return figure


def _log_ticks(axis, x: Sequence) -> None:
    """A logarithmic axis with a tick at each x, left out where it would touch the one before."""
    ticks, least = [], (max(x) / min(x)) ** 0.1
    for value in sorted(set(x)):
        if not ticks or value > least * ticks[-1]:
            ticks.append(value)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{value:,}" for value in ticks])
    axis.minorticks_off()


@_styled
def scaling(
    panels: Mapping[str, Sequence[Curve]], *, x_label: str, linear: bool
) -> "matplotlib.figure.Figure":
    """Log-log curves, a panel a label of y; `linear` adds a grey line of slope one to each."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator

    large = EngFormatter(sep=" ")
    marks = _marks(list(dict.fromkeys(c.name for drawn in panels.values() for c in drawn)))
    figure, axes = _new((4.0 * len(panels), 4.2), 1, len(panels))
    for axis, (y_label, drawn) in zip(axes[0], panels.items(), strict=True):
        for curve in drawn:
            axis.plot(curve.x, curve.y, **marks[curve.name])
        x, y = ([value for curve in drawn for value in curve[i]] for i in (1, 2))
        if linear:
            ends = np.array([min(x), max(x)], float)
            axis.plot(ends, max(y) * ends / ends[1], color="0.75", zorder=0)
        _log_ticks(axis, x)
        axis.set_yscale("log")
        subs = (1,) if max(y) / min(y) > 100 else (1, 2, 5)
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        # 20 M and 3 G, but no m, which is short for too much.
        axis.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: large(v) if v >= 10_000 else f"{v:g}")
        )
        axis.yaxis.set_minor_locator(LogLocator(subs=()))
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid()
    _legend(figure, marks | ({"linear": {"color": "0.75"}} if linear else {}))
    return figure


@_styled
def privacy_utility(rows: Sequence[dict]) -> "matplotlib.figure.Figure":
    """Share of users served rightly against the AUC of the best attack: what privacy costs.

    A row of panels for every number of rows, a column for every attacker. Rows have `kind`,
    `reducer`, `n`, `m` (points, or None), `epsilon` ("inf" where there is no noise), `quality`,
    `auc` and `stranger_auc`. What has an epsilon is a line over it, larger marks for larger ones.
    Of reduced sets, those with the most points are shown.
    """
    most = max((row["m"] for row in rows if row["m"]), default=None)
    rows = [row for row in rows if row["m"] in (None, most)]
    parts = {n: [row for row in rows if row["n"] == n] for n in sorted({row["n"] for row in rows})}
    attackers = {"auc": "attacker knows all candidates", "stranger_auc": "attacker knows one text"}
    marks = _marks(list(dict.fromkeys(_audited(row) for row in rows)))
    epsilons = sorted({float(row["epsilon"]) for row in rows})
    areas = dict(zip(epsilons, np.linspace(8.5, 3, len(epsilons))[::-1] ** 2, strict=True))
    # Many are at 1, where no user is lost: kinds are drawn one above the other.
    apart = {name: 0.06 * (0.5 - (i + 0.5) / len(marks)) for i, name in enumerate(marks)}
    lowest = [min(row["quality"] for row in part) - 0.08 for part in parts.values()]
    # One scale in all panels: those of a small range are low.
    heights = [max(1.08 - low, 0.2) for low in lowest]
    figure, panels = _new(
        (8.0, 2.3 * sum(heights) + 0.5 * len(parts) + 2),
        len(parts),
        2,
        sharex=True,
        sharey="row",
        height_ratios=heights,
    )
    for axes, (n, part), height in zip(panels, parts.items(), heights, strict=True):
        for axis, (value, title) in zip(axes, attackers.items(), strict=True):
            for name, mark in marks.items():
                some = [row for row in part if _audited(row) == name]
                some.sort(key=lambda row: float(row["epsilon"]))
                x = [row[value] for row in some]
                y = [row["quality"] + apart[name] for row in some]
                axis.plot(x, y, color=mark["color"], linestyle=mark["linestyle"], linewidth=1)
                size = [areas[float(row["epsilon"])] for row in some]
                axis.scatter(
                    x, y, size, mark["color"], marker=mark["marker"], zorder=2, linewidth=0
                )
            axis.axvline(0.5, color=QUIET, linestyle="--", linewidth=1, zorder=0)
            axis.set_title(f"{n:,} rows, {title}")
            # Most of what matters is close to 0.5.
            axis.set_xscale("function", functions=(_from_half, _to_half))
            axis.set_xlim(min(0.49, *(row[value] for row in rows)) - 0.005, 1.02)
            axis.set_xticks([0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1])
            axis.set_ylim(1.08 - height, 1.08)
            axis.set_yticks([tick for tick in (0, 0.25, 0.5, 0.75, 1) if tick > 1.08 - height])
    for axis in panels[-1]:
        axis.set_xlabel("AUC of the best attack")
    figure.supylabel("share of users, own task first", fontsize=SMALL)
    counts = {name: [sum(_audited(r) == name for r in p) for p in parts.values()] for name in marks}
    alone = [name for name, count in counts.items() if max(count) == 1]
    dot = {"color": QUIET, "marker": "o", "linestyle": ""}
    sizes = {e: dot | {"markersize": areas[e] ** 0.5} for e in epsilons}
    entries = {f"epsilon {e:g}".replace("inf", "∞"): of for e, of in sizes.items()}
    for name, of in marks.items():
        entries[name] = of | ({"linestyle": ""} if name in alone else {})
    _legend(figure, entries)
    figure.suptitle(
        "Upper left is better. Dashed: the attack learns nothing. Kinds are drawn a little apart."
    )
    return figure


def _from_half(auc):
    return np.sign(auc - 0.5) * np.abs(auc - 0.5) ** 0.7


def _to_half(value):
    return 0.5 + np.sign(value) * np.abs(value) ** (1 / 0.7)


def _audited(row: dict) -> str:
    return f"{row['kind']} {row['reducer']}".strip()


@_styled
def strips(
    groups: Sequence[tuple[str, Sequence[float]]], *, label: str, line: float
) -> "matplotlib.figure.Figure":
    """All values of each group as dots in a row of its own, and a dashed line."""
    figure, ((axis,),) = _new((7.5, 0.34 * len(groups) + 0.9))
    for row, (_, values) in enumerate(groups):
        # Spread by a fixed pattern: dots of one value would hide each other.
        shift = 0.5 * ((0.618 * np.arange(len(values))) % 1 - 0.5)
        axis.plot(values, row + shift, "o", color=COLORS[0], markersize=4, alpha=0.6)
    axis.axvline(line, color=QUIET, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(groups)), [_text(name) for name, _ in groups])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel(label)
    return figure
