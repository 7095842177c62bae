"""Figures: nothing hides a text, nothing is told by colour alone, and they are the same again."""

import json
import re
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import colors, style
from matplotlib.text import Text
from numpy.testing import assert_allclose, assert_array_equal

from experiments import (
    bench_pave,
    bench_rank,
    bench_reduce,
    bench_scale,
    bench_slm,
    bench_stream,
    coverage,
    evaluate,
    families,
    gamed,
)
from learnware_jax import figures
from learnware_jax.figures import Curve, Dot, groups

RESULTS = Path(__file__).parents[1] / "experiments" / "results"

RNG = np.random.default_rng(0)
IDS = [f"learnware-of-a-long-name-{i}" if i % 3 else f"$task_{i}" for i in range(40)]
DOMAINS = ["finance", "$\\frac$", "news", "a domain of a name that is longer than all others"] * 10
POINTS = RNG.normal(size=(40, 2))
POINTS[:4] = POINTS[0]


def user(count, decision="none"):
    ranking = [
        {"id": IDS[i], "domain": DOMAINS[i], "distance": 0.01 * i - 0.01}
        | {"lower": 0.01 * i - 0.02, "upper": 0.01 * i}
        for i in range(count)
    ]
    about = {"id": "a-user-of-$a$-very-long-name-that-goes-on", "kind": "outside"}
    return about | {"decision": decision, "undominated": IDS[:2], "ranking": ranking}


def audited(kind, n, epsilon, auc, quality):
    row = {"kind": kind, "reducer": "", "n": n, "m": None, "epsilon": epsilon}
    return row | {"auc": auc, "stranger_auc": auc - 0.01, "quality": quality}


AUDIT = [
    audited(kind, n, epsilon, 0.5 + 0.04 * i + 0.01 * k, quality)
    for k, kind in enumerate(["mean", "sketch", "a kind of a rather long name"])
    for n in (100, 10_000)
    for i, (epsilon, quality) in enumerate([("0.1", 0.2), (1.0, 1.0), ("inf", 1.0)])
]
SEVERAL = [Curve(f"a curve of number {i}", [2, 4, 256], [0.1 * i, 0.5, 1.0]) for i in range(12)]
# What is drawn, and what its axes, title or legend must say.
CASES = {
    "rankings": (
        lambda: figures.rankings([user(8, IDS[1]), user(1), user(3)], 0.03),
        ["squared MMD", "finance", r"\$task_0"],
    ),
    "rankings, no threshold": (lambda: figures.rankings([user(1)], np.inf), ["squared MMD"]),
    "dock_map": (
        lambda: figures.dock_map(POINTS, IDS, DOMAINS),
        ["Near on the map: a small MMD", "news"],
    ),
    "dock_map, 1": (lambda: figures.dock_map(np.zeros((1, 2)), ["a"], ["b"]), ["a", "b"]),
    "heat_map": (
        lambda: figures.heat_map(np.abs(RNG.normal(size=(40, 40))), IDS, IDS, label="squared MMD"),
        ["squared MMD"],
    ),
    "heat_map, 1": (
        lambda: figures.heat_map(np.zeros((1, 1)), IDS[:1], IDS[:1], label="squared MMD"),
        ["squared MMD"],
    ),
    "heat_map, numbers": (
        lambda: figures.heat_map(
            np.array([[0.0, 7.0, 100.0]]), IDS[:1], IDS[:3], label="users, %", numbers=".0f"
        ),
        ["users, %", "0", "7", "100"],
    ),
    "dots": (
        lambda: figures.dots(
            [
                ("the first panel of a long title", [Dot(i, 1.0, -2.0, 3.0) for i in IDS]),
                ("$second$", [Dot("x", 2.0, 1.0, 2.5)]),
                ("third", []),
            ],
            label="gap closed",
            zero=0.0,
        ),
        ["gap closed", r"\$second\$", "x"],
    ),
    "dots, series": (
        lambda: figures.dots(
            [("", [Dot("x", 1.0, 0.5, 1.5, s) for s in ("one", "other")])], label="share"
        ),
        ["share", "one", "other"],
    ),
    "critical_difference": (
        lambda: figures.critical_difference(
            IDS[:9], [1.0, 2.0, 2.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0], 2.5
        ),
        ["critical difference 2.50", "9"],
    ),
    "critical_difference, 1": (lambda: figures.critical_difference(["a"], [1.0], 1.0), ["a  1.00"]),
    "curves": (
        lambda: figures.curves(
            [("one", SEVERAL), ("other", SEVERAL[:1])],
            x_label="rows of the user",
            y_label="coverage",
            line=0.9,
        ),
        ["rows of the user", "coverage", "one", "other", "a curve of number 11", "256"],
    ),
    "curves, labels": (
        lambda: figures.curves(
            [("same", [Curve("a", [3], [1.0], [0.1])]), ("same", [])],
            x_label="rows",
            y_label=["share", "tau"],
        ),
        ["rows", "share", "tau"],
    ),
    "scaling": (
        lambda: figures.scaling(
            {
                "seconds": [Curve("a", [1000, 1024, 10**6], [0.002, 0.1, 2.0])],
                "bytes": [Curve("b", [1000, 10**6], [2e6, 3e9])],
            },
            x_label="learnwares",
            linear=True,
        ),
        ["seconds", "bytes", "learnwares", "a", "b", "linear", "1,000", "1,000,000", "1 G"],
    ),
    "privacy_utility": (
        lambda: figures.privacy_utility(AUDIT),
        ["AUC of the best attack", "share of users, own task first", "sketch", "epsilon ∞"],
    ),
    "privacy_utility, 1": (lambda: figures.privacy_utility(AUDIT[:1]), ["AUC of the best attack"]),
    "strips": (
        lambda: figures.strips([(IDS[1], [0.1, 0.1]), (IDS[0], [])], label="share", line=0.5),
        ["share", r"\$task_0"],
    ),
}


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# What experiments draw of the results that are in the repository.
COMMITTED = {
    "audit": (lambda found: figures.privacy_utility(found["rows"]), ["rkme private", "epsilon ∞"]),
    "bench_pave": (
        lambda found: bench_pave.draw(found["vectors"]["ways"], "vectors_a_minute"),
        ["vectors a minute", "one-step gradient of 64 rows"],
    ),
    "bench_rank": (lambda found: bench_rank.draw(found["rows"]), ["milliseconds a user", "10,000"]),
    "bench_reduce": (
        lambda found: bench_reduce.draw(found["rows"], 100),
        ["squared MMD, 100 points", "seconds", "ours", "goodpoints", "0.01"],
    ),
    "bench_scale": (
        lambda found: bench_scale.draw([p for p in found["pools"] if p["points"] == 10]),
        ["seconds", "bytes", "1,000,000", "index on disk"],
    ),
    "bench_slm": (
        lambda found: bench_slm.draw(found["ratios"]),
        ["times as fast", "LoRA step, 8 x 64: ours float32 to PEFT float32"],
    ),
    "bench_stream": (
        lambda found: bench_stream.draw(found["rows"], found["rows"][0]["bandwidth"]),
        ["peak memory, bytes", "one-shot"],
    ),
    "coverage": (
        lambda found: figures.curves(
            coverage.panels(found["intervals"]), x_label="rows", y_label="coverage", line=0.9
        ),
        ["coverage", "rows", "real tasks, whole"],
    ),
    "evaluate_quickstart": (
        lambda found: evaluate.accuracies(found["tasks"]),
        ["share of answers that are right", "base model", "film-reviews"],
    ),
    "families": (
        lambda found: families.draw(
            [*families.shown_rows(found["rows"]).values()], ("matching", "family")
        ),
        ["rows of a user", "weighted Kendall tau", "pave, prompts"],
    ),
    "gamed": (
        lambda found: gamed.shares(found["rankings"]),
        ["users to whom the attacker comes first, %", "mmd, guarded"],
    ),
}
CASES |= {
    name: (lambda draw=draw, name=name: draw(results(name)), wanted)
    for name, (draw, wanted) in COMMITTED.items()
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A figure, the texts that are really drawn, as artists, and what must be among them."""
    make, wanted = CASES[request.param]
    figure, seen = make(), []
    draw = Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda self, *rest: (seen.append(self), draw(self, *rest)))
        figure.canvas.draw()
    return figure, [text for text in seen if text.get_visible() and text.get_text()], wanted


def test_texts_hide_nothing_and_are_whole(case):
    figure, texts, _ = case
    boxes = [Text.get_window_extent(text) for text in texts]  # without the line to a point
    for text, box in zip(texts, boxes, strict=True):
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in combinations(zip(texts, boxes, strict=True), 2):
        # Boxes of letters have room above and below.
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)


def test_texts_say_what_is_drawn_and_are_no_mathematics(case):
    _, texts, wanted = case
    said = [text.get_text() for text in texts]
    assert set(wanted) <= set(said)
    assert not [text for text in said if re.search(r"(?<!\\)\$", text)]


def test_a_figure_is_legible_at_half_the_width_of_a_page(case):
    figure, texts, _ = case
    assert min(text.get_fontsize() for text in texts) >= 9
    # Only a matrix of many columns is wider: its letters are as wide as its columns.
    assert figure.get_figwidth() <= 9.01 or len(figure.axes[0].get_xticks()) == 40


def luminance(color):
    r, g, b = colors.to_rgb(color)
    return 0.299 * r + 0.587 * g + 0.114 * b


def test_nothing_is_told_by_colour_alone():
    marks = list(figures._marks([str(i) for i in range(12)]).values())
    assert len({mark["marker"] for mark in marks}) == 12
    for one, other in pairwise(marks):
        assert abs(luminance(one["color"]) - luminance(other["color"])) > 0.1
        assert one["linestyle"] != other["linestyle"]
    # One colour again has another line.
    looks = {
        (mark["color"], mark["linestyle"])
        for mark in figures._marks([str(i) for i in range(24)]).values()
    }
    assert len(looks) == 24


@pytest.mark.parametrize("kind", ["rankings", "dock_map", "curves", "privacy_utility"])
def test_a_legend_has_a_marker_for_each_name(kind):
    (legend,) = CASES[kind][0]().legends
    names = [text.get_text() for text in legend.get_texts()]
    marks = [(line.get_marker(), line.get_markersize()) for line in legend.get_lines()]
    assert len(set(marks)) == len(set(names)) == len(names)


def test_the_same_figure_is_the_same_bytes_in_any_style(tmp_path):
    def drawn():
        return figures.curves([("one", SEVERAL)], x_label="rows", y_label="share")

    before = dict(matplotlib.rcParams)
    first = figures.save(drawn(), tmp_path / "a.b")
    assert first == (tmp_path / "a.b.png", tmp_path / "a.b.svg")
    assert dict(matplotlib.rcParams) == before
    with style.context("dark_background"):
        second = figures.save(drawn(), tmp_path / "folder" / "c")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first[0].read_bytes().startswith(b"\x89PNG")
    text = first[1].read_text()
    assert "<svg" in text and "<text" not in text and "dc:date" not in text


def test_a_name_with_a_suffix_is_refused(tmp_path):
    figure = CASES["strips"][0]()
    with pytest.raises(ValueError, match=r"save: got a\.png; want a name without \.png"):
        figures.save(figure, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def marks_of(axis, marker="o"):
    return [tuple(np.ravel(line.get_data())) for line in axis.lines if line.get_marker() == marker]


def dashed(axis):
    return [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]


def test_rankings_fill_what_is_not_separated():
    entry = {"domain": "d", "lower": -0.2, "upper": 0.4}
    ranking = [
        entry | {"id": name, "distance": x} for name, x in zip("abc", (-0.1, 0.1, 0.3), strict=True)
    ]
    one = {"id": "u", "kind": "own", "decision": "a", "undominated": ["a", "b"], "ranking": ranking}
    (axis,) = figures.rankings([one], 0.25, shown=2).axes
    assert marks_of(axis) == [(-0.1, 0), (0.1, 1)] and dashed(axis) == [0.25]
    filled = [line.get_markerfacecolor() for line in axis.lines if line.get_marker() == "o"]
    assert filled == [figures.COLORS[0]] * 2
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the closest on top
    axis, other = figures.rankings([one, one | {"undominated": ["a"]}], np.inf).axes
    assert not dashed(axis) and axis.get_xlim() == other.get_xlim()
    filled = [line.get_markerfacecolor() for line in other.lines if line.get_marker() == "o"]
    assert filled == [figures.COLORS[0], "white", "white"]


def test_a_map_names_every_learnware_or_says_how_many_it_does_not():
    few = figures.dock_map(POINTS[:12], IDS[:12], DOMAINS[:12])
    assert len(few.axes[0].texts) == 12 and few.axes[0].get_title("right") == ""
    # Three hundred names have no room.
    points, ids = RNG.normal(size=(300, 2)), [f"learnware-{i}" for i in range(300)]
    axis = figures.dock_map(points, ids, ["d"] * 300).axes[0]
    left_out = int(axis.get_title("right").split()[0])
    assert len(axis.texts) + left_out == 300 and left_out > 100
    assert_allclose(np.transpose(axis.lines[0].get_data()), points)
    assert all(tuple(text.xy) == tuple(points[ids.index(text.get_text())]) for text in axis.texts)


def test_a_heat_map_shows_the_matrix_from_zero():
    values = np.array([[0.5, 1.0, 2.0], [1.5, 0.5, 0.25]])
    axis = figures.heat_map(values, ["a", "b"], ["x", "y", "z"], label="m", numbers=".1f").axes[0]
    (image,) = axis.images
    assert_array_equal(image.get_array(), values)
    assert image.get_clim() == (0, 2)
    assert [text.get_text() for text in axis.texts] == ["0.5", "1.0", "2.0", "1.5", "0.5", "0.2"]
    # Dark letters on light cells, light ones on dark.
    light, dark = "white", "black"
    shades = [text.get_color() for text in axis.texts]
    assert shades == [light, light, dark, dark, light, light]


def test_dots_stand_in_the_row_of_their_name():
    panels = [
        ("left", [Dot("x", 1.0, 0.5, 2.0), Dot("y", 3.0, 2.0, 4.0)]),
        ("right", [Dot("z", 7.0, 6.0, 9.0), Dot("x", 5.0, 4.0, 6.0)]),
    ]
    figure = figures.dots(panels, label="score", zero=[None, 6.5])
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["x", "y", "z"]
    assert (left.get_title(), right.get_title(), right.get_xlabel()) == ("left", "right", "score")
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first row on top
    assert left.get_xlim() == right.get_xlim()
    assert [marks_of(left), marks_of(right)] == [[(1, 0), (3, 1)], [(7, 2), (5, 0)]]
    intervals = [line.get_xdata() for line in right.lines if line.get_linewidth() == 1.6]
    assert [list(ends) for ends in intervals if len(ends) == 2] == [[6, 9], [4, 6]]
    assert (dashed(left), dashed(right)) == ([], [6.5])
    assert not figure.legends


def test_dots_of_several_series_at_one_value_are_all_seen():
    dots = [Dot("x", 1.0, 1.0, 1.0, series) for series in ("last", "first", "middle")]
    (axis,) = figures.dots([("", [*dots[1:], dots[0]])], label="share").axes
    lines = [line for line in axis.lines if line.get_marker() != "None"]
    sizes = [line.get_markersize() for line in lines]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert [line.get_markerfacecolor() == "none" for line in lines] == [True, True, False]


def test_critical_difference_names_every_rank_once():
    names, ranks = ["worst", "best", "middle"], [3.0, 1.0, 1.5]
    (axis,) = figures.critical_difference(names, ranks, 0.7).axes
    texts = [text.get_text() for text in axis.texts]
    assert {"best  1.00", "middle  1.50", "3.00  worst", "critical difference 0.70"} <= set(texts)
    assert len(texts) == 3 + 3 + 1  # ticks, names, the difference
    thick = [line.get_xdata() for line in axis.lines if line.get_linewidth() == 3.5]
    assert_allclose(thick, [[1, 1.5]], atol=0.03)


def test_bars_join_what_is_not_told_apart():
    assert groups([1.0, 2.0, 2.5, 4.0], 1.2) == [(0, 1), (1, 2)]
    assert groups([1.0, 2.0, 2.5, 4.0], 1.6) == [(0, 2), (2, 3)]
    assert groups([1.0, 2.0, 2.5, 4.0], 9.0) == [(0, 3)]
    assert groups([1.0, 2.0, 3.0], 1.0) == []
    assert groups([1.0, 2.5, 2.5], 0.5) == [(1, 2)]


def test_curves_of_one_name_look_the_same_and_stand_apart():
    a, b = Curve("a", [2, 8], [0.1, 0.2], [0.05, 0.1]), Curve("b", [2, 8], [0.3, 0.4])
    drawn = figures.curves(
        [("one", [a, b]), ("other", [b])], x_label="rows", y_label="share", line=0.9
    )
    one, other = drawn.axes
    (_, first, second), (_, again) = (
        [line for line in axis.lines if line.get_label() != "_nolegend_"] for axis in (one, other)
    )
    # Moved by the same factor to both sides: their geometric mean is x.
    assert_allclose(np.sqrt(first.get_xdata() * second.get_xdata()), [2, 8])
    assert 1.01 < second.get_xdata()[0] / first.get_xdata()[0] < 1.2
    assert_allclose(first.get_ydata(), [0.1, 0.2])
    assert (again.get_color(), again.get_marker()) == (second.get_color(), second.get_marker())
    assert_array_equal(again.get_xdata(), second.get_xdata())
    bars = one.collections[0].get_segments()
    assert_allclose([bar[:, 1] for bar in bars], [[0.05, 0.15], [0.1, 0.3]])
    assert [axis.lines[0].get_ydata()[0] for axis in (one, other)] == [0.9, 0.9]


def test_the_line_to_compare_scaling_with_has_slope_one():
    panels = {"seconds": [Curve("a", [1, 10, 1000], [1, 9, 120]), Curve("b", [10], [5])]}
    (axis,) = figures.scaling(panels, x_label="rows", linear=True).axes
    *_, line = axis.lines
    assert_allclose(line.get_data(), [[1, 1000], [0.12, 120]])
    assert axis.get_xscale() == axis.get_yscale() == "log"
    (axis,) = figures.scaling(panels, x_label="rows", linear=False).axes
    assert len(axis.lines) == 2
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "10", "1,000"]


def test_privacy_and_utility_stand_where_they_were_measured():
    rows = [
        *(audited("mean", 100, e, auc, q) for e, auc, q in [("inf", 0.9, 1.0), ("1", 0.6, 0.4)]),
        audited("sketch", 100, "inf", 0.7, 1.0),
        audited("mean", 10, "inf", 1.0, 0.5),
        # Of reduced sets, those with the most points.
        audited("rkme", 10, "inf", 0.8, 0.5) | {"m": 16},
        audited("rkme", 10, "inf", 0.95, 0.75) | {"m": 64},
    ]
    axes = figures.privacy_utility(rows).axes
    assert [axis.get_title()[:8] for axis in axes] == ["10 rows,"] * 2 + ["100 rows"] * 2

    def points(axis):
        return [tuple(p) for dots in axis.collections for p in np.asarray(dots.get_offsets())]

    # In the order of epsilon; drawn at most 0.03 up or down.
    assert_allclose(points(axes[2]), [(0.6, 0.4), (0.9, 1.0), (0.7, 1.0)], atol=0.03)
    assert_allclose(points(axes[3]), [(0.59, 0.4), (0.89, 1.0), (0.69, 1.0)], atol=0.03)
    assert_allclose(points(axes[0]), [(1.0, 0.5), (0.95, 0.75)], atol=0.03)
    small, large = axes[2].collections[0].get_sizes()
    assert small < large
    (legend,) = axes[0].figure.legends
    lines = {
        text.get_text(): line.get_linestyle()
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert lines["mean"] == "-" and lines["sketch"] == lines["rkme"] == "None"


def test_strips_keep_every_value_in_its_row():
    (axis,) = figures.strips([("a", [0.2] * 5), ("b", [0.9])], label="share", line=0.5).axes
    (x, y), (other_x, other_y) = (line.get_data() for line in axis.lines[:2])
    assert_array_equal(x, [0.2] * 5)
    assert len(set(y)) == 5 and np.abs(y).max() <= 0.25
    assert list(other_x) == [0.9] and abs(other_y[0] - 1) <= 0.25
    assert dashed(axis) == [0.5]
