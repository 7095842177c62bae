"""The replay of published scores: a table worked out by hand, and the published numbers."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from numpy.testing import assert_allclose

from configs import replay as replay_config
from experiments import replay

REPOSITORY = Path(__file__).parent.parent
# Data sets: a 70 30 60 50, b 40 60 60 44, c 10 30 90 26; so random is 40 40 70 40.
TABLE = """task,base,a-1,a-2,b-1,c-1
t1,50,60,80,40,10
t2,50,20,40,60,30
t3,60,50,70,60,90
t4,40,40,60,44,26
"""
PUBLISHED = {"t1": 70.0, "t2": 60.0, "t3": 60.0, "t4": 26.0}
# Learnware a (70), b (60), a or b (60), c (26); best-single a; oracle 70 60 90 50.
RANDOM, LEARNWARE = np.array([40, 40, 70, 40.0]), np.array([70, 60, 60, 26.0])
ORACLE = np.array([70, 60, 90, 50.0])


@pytest.fixture
def config(tmp_path):
    config = replay_config.get_config("finance")
    config.scores, config.workdir = str(tmp_path / "scores.csv"), str(tmp_path / "work")
    config.published = ConfigDict(PUBLISHED)
    config.shared = ConfigDict({"t1": ("a",), "t3": ("b",)})
    Path(config.scores).write_text(TABLE)
    return config


@pytest.fixture
def output(config):
    return replay.run(config)


def test_averages_by_hand(output):
    assert output["averages"] == {
        "random": 47.5,
        "learnware": 54.0,
        "best_single": 52.5,
        "oracle": 67.5,
    }
    assert output["references"] == {"base": 50.0} and output["best_single"] == "a"
    assert output["oracle_by_model"] == {
        "average": 72.5,
        "best_single": {"model": "a-2", "average": 62.5},
    }


def test_ranks_by_hand_ties_share_the_best_place_or_its_mean(output):
    names = ["base", "Random", "Learnware", "Best-single", "Oracle"]
    assert output["ranks"] == dict(zip(names, [3.25, 3.5, 2.5, 2.5, 1.0], strict=True))
    assert output["average_ranks"] == dict(
        zip(names, [3.625, 3.625, 3.125, 3.125, 1.5], strict=True)
    )


def test_equal_means_of_other_variants_are_equal():
    # (0.1 + 0.2) / 2 is not 0.15 in binary fractions.
    scores = np.array([[np.mean([0.1, 0.2]), 0.15, 0.1]])
    assert scores[0, 0] != scores[0, 1]
    assert replay.ranks(scores, "min").tolist() == [[1, 1, 3]]
    assert replay.win_tie_loss(scores[0, :1], scores[0, 1:2]) == [0, 1, 0]
    # Equal over the other tasks: the first, though 40.1 + 0.1 + 0.2 - 40.1 is more in binary.
    data_sets = {"b": np.array([40.1, 0.15, 0.15]), "a": np.array([40.1, 0.1, 0.2])}
    assert replay.static(data_sets)[0] == "b"
    assert replay.best_of(data_sets) == "b"


def test_wins_ties_and_losses_by_hand(output):
    assert output["win_tie_loss"] == {
        "learnware": {
            "base": [2, 1, 1],
            "Random": [2, 0, 2],
            "Best-single": [1, 2, 1],
            "Oracle": [0, 2, 2],
        },
        "oracle": {
            "base": [4, 0, 0],
            "Random": [4, 0, 0],
            "Learnware": [2, 2, 0],
            "Best-single": [2, 2, 0],
        },
    }


def test_gap_closed_with_the_interval_of_every_draw_there_is(config):
    config.draws = 40_000
    output = replay.run(config)
    assert_allclose(output["gap_closed"]["value"], 6.5 / 20, rtol=1e-12)
    assert_allclose(output["gap_closed_by_model"]["value"], 6.5 / 25, rtol=1e-12)
    places = np.array(list(itertools.product(range(4), repeat=4)))
    selected, random, oracle = (x[places].mean(1) for x in (LEARNWARE, RANDOM, ORACLE))
    # Weighed by how often draws occur: products have each ordered draw once.
    exact = np.quantile((selected - random) / (oracle - random), [0.025, 0.975])
    found = output["gap_closed"]
    assert_allclose([found["lower"], found["upper"]], exact, atol=0.03)
    exact = np.quantile(selected - random, [0.025, 0.975])
    found = output["differences"]["Learnware"]
    assert_allclose(found["value"], 6.5)
    assert_allclose([found["lower"], found["upper"]], exact, atol=0.3)


def test_static_ranker_by_hand(output):
    # From the other tasks: b for t1, then a; for t4 a and b have 160 each, and a is first.
    rows = [(row["static"]["data_set"], row["static"]["score"]) for row in output["tasks"]]
    assert rows == [("b", 40), ("a", 30), ("a", 60), ("a", 50)]
    assert output["static"]["average"] == 45
    # 30, 30, 0 and -24 more: mean 9, squares about it 2052.
    difference = output["static"]["difference"]
    assert difference["value"] == 9
    assert_allclose(difference["stderr"], np.sqrt(2052 / 3 / 4), rtol=1e-12)
    assert difference["lower"] < 0 < difference["upper"]


def test_users_that_share_no_data_set_are_measured_alone(output):
    alone = output["unshared"]
    assert alone["users"] == ["t2", "t4"] and output["users"] == ["t1", "t2", "t3", "t4"]
    assert alone["averages"] == {
        "random": 40.0,
        "learnware": 43.0,
        "best_single": 52.0,
        "oracle": 55.0,
    }
    assert alone["best_single"] == "b" and alone["static"]["average"] == 37
    # Two users: draws are one of them twice, a quarter of the time each, or both.
    found = alone["gap_closed"]
    assert_allclose([found[k] for k in ("value", "lower", "upper")], [0.2, -1.4, 1], rtol=1e-12)
    found = alone["static"]["difference"]
    expected = {"value": 6, "stderr": 24, "lower": -18, "upper": 30}
    assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-12)
    assert output["pick_is_shared"] == {"users": 2, "certain": 1, "possible": 2}


def test_no_statement_on_a_single_user(config):
    config.shared = ConfigDict({task: ("a",) for task in ("t1", "t2", "t3")})
    assert replay.run(config)["unshared"] is None
    report = (Path(config.workdir) / "report.md").read_text()
    assert "Fewer than two users share no data set" in report


def test_no_gap_is_closed_where_the_oracle_is_no_better_than_random(config):
    Path(config.scores).write_text("task,a-1,b-1\nt1,70,70\nt2,60,60\n")
    config.shared = ConfigDict()
    output = replay.run(config)
    assert output["gap_closed"] is None and output["averages"]["oracle"] == 65
    assert "no better than random" in (Path(config.workdir) / "report.md").read_text()


def test_no_gap_is_closed_between_means_that_differ_by_rounding(config):
    # The mean of three times 0.7 is less than 0.7.
    Path(config.scores).write_text("task,a-1,b-1,c-1\nt1,0.7,0.7,0.7\nt2,0.7,0.7,0.7\n")
    config.published, config.shared = ConfigDict({"t1": 0.7, "t2": 0.7}), ConfigDict()
    assert replay.run(config)["gap_closed"] is None


def test_picks_are_recovered_from_their_scores(output):
    assert output["picks"] == {"t1": ["a"], "t2": ["b"], "t3": ["a", "b"], "t4": ["c"]}
    assert [row["place"] for row in output["tasks"]] == [1, 1, 2, 3]
    assert [row["best_model"]["model"] for row in output["tasks"]] == ["a-2", "b-1", "c-1", "a-2"]


def test_a_mean_between_two_digits_is_recovered_from_both(config):
    Path(config.scores).write_text("task,a-1,a-2,b-1\nt1,58.07,58.08,58.09\nt2,1,1,2\n")
    table = replay.open_scores(config.scores)
    for published, names in ((58.08, ["a"]), (58.07, ["a"]), (58.09, ["b"])):
        picks = replay.recover_picks(table, {"t1": published, "t2": 1.0})
        assert picks[0].names == names
    assert_allclose(replay.recover_picks(table, {"t1": 58.08, "t2": 1.0})[0].score, 58.075)


def test_of_several_means_the_closest_scores(config):
    Path(config.scores).write_text("task,a-1,b-1\nt1,85.415,85.42\nt2,1,2\n")
    picks = replay.recover_picks(replay.open_scores(config.scores), {"t1": 85.42, "t2": 1.0})
    assert picks[0] == (["b", "a"], 85.42)


def test_picks_of_a_file_are_data_sets_or_learnwares(config, tmp_path):
    file = tmp_path / "picks.csv"
    file.write_text("task,pick\nt4,c\nt1,a-2\nt2,a\nt3,c-1\nelsewhere,whatever\n")
    config.picks = str(file)
    output = replay.run(config)
    assert [row["scores"]["Learnware"] for row in output["tasks"]] == [80, 30, 90, 26]
    # a-2 is a model of data set a, which t1 shares; c-1 is none of b.
    assert output["pick_is_shared"] == {"users": 2, "certain": 1, "possible": 1}


def test_the_highest_similarity_is_the_pick(config, tmp_path):
    file = tmp_path / "picks.csv"
    file.write_text("task,b,a,c-1\nt1,-1,-2,-3\nt2,0.1,0.3,0.2\nt3,1,2,3\nt4,1,0,0\n")
    config.picks = str(file)
    output = replay.run(config)
    assert list(output["picks"].values()) == [["b"], ["a"], ["c-1"], ["b"]]
    assert [row["scores"]["Learnware"] for row in output["tasks"]] == [40, 30, 90, 44]


def test_files_say_what_was_computed_and_nothing_of_where(config, output, tmp_path):
    workdir = Path(config.workdir)
    assert json.loads((workdir / "results.json").read_text()) == output
    rows = {row[0]: row[1:] for row in csv.reader((workdir / "tables.csv").open())}
    assert rows["User"] == ["base", "Random", "Learnware", "Best-single", "Oracle"]
    assert rows["t4"] == ["40.00", "40.00", "26.00", "50.00", "50.00"]
    assert rows["Avg."] == ["50.00", "47.50", "54.00", "52.50", "67.50"]
    assert rows["Avg. rank"] == ["3.25", "3.50", "2.50", "2.50", "1.00"]
    assert rows["Learnware (win/tie/loss)"] == ["2/1/1", "2/0/2", "", "1/2/1", "0/2/2"]
    report = (workdir / "report.md").read_text()
    assert "| t3 | a or b | 2 of 3 | b | c 90.00 | c-1 90.00 | a 60.00 |" in report
    assert "| Avg. | 50.00 | 47.50 | 54.00 | 52.50 | 67.50 |" in report
    for name in ("ranks", "differences"):
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (workdir / f"{name}.svg").read_bytes()
    for file in workdir.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task,a-1\nt1,1\nt2,x\n", "row 't2', column 'a-1': got 'x'; want a finite number"),
        ("task,a-1\nt1,1\nt2,nan\n", "row 't2', column 'a-1': got 'nan'"),
        ("task,base\nt1,1\nt2,2\n", "no column is named DATASET-NUMBER"),
        ("task,a-1,b-1\nt1,1\nt2,2,3\n", "row 't1' has 2 cells, the header 3"),
        ("task,a-1,a-1\nt1,1,1\nt2,2,3\n", "the name 'a-1' of a column is empty or there twice"),
        ("task,a-1\nt1,1\nt1,2\n", "the name 't1' of a row is empty or there twice"),
        ("task,a-1,Random\nt1,1,1\nt2,2,2\n", "the column 'Random' has the name of a row"),
        ("task,a-1\nt1,1\n", "got 1 task; want at least 2"),
        ("just some words\nand more\n", r"got 1 columns \(by commas\)"),
        ("task,a-1\n", "0 rows after the header"),
        ("", "this is no CSV table"),
        ('task,a-1\nt1,"1"x\n', "this is no CSV table"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(config, text, message):
    Path(config.scores).write_text(text)
    with pytest.raises(ValueError, match=rf"scores.csv: .*{message}"):
        replay.run(config)
    assert not Path(config.workdir).exists()


def test_a_file_of_bytes_is_refused(config):
    Path(config.scores).write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(ValueError, match="this is no CSV table"):
        replay.run(config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": ""}, ValueError, "got no scores; name a file, --config.scores=FILE: a CSV"),
        ({"scores": "absent.csv"}, FileNotFoundError, "absent.csv: there is no such file; want a"),
        ({"picks": "absent.csv"}, FileNotFoundError, "absent.csv: there is no such file"),
        ({"published": {"t1": 70.0}}, ValueError, "no published score of a pick for t2, t3, t4;"),
        (
            {"published": PUBLISHED | {"t4": 45.0}},
            ValueError,
            "t4: the pick is published with 45.00, .* nearest are b 44.00, a 50.00, c 26.00",
        ),
        ({"shared": {"t2": ("d",)}}, ValueError, "shared.t2 names 'd'; want some of a, b, c"),
        ({"draws": 0}, ValueError, "draws=0"),
        ({"level": 1.0}, ValueError, "level=1.0"),
        ({"alpha": 0.0}, ValueError, "alpha=0.0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(config, change, error, message):
    for name, value in change.items():
        config[name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(error, match=message):
        replay.run(config)
    assert not Path(config.workdir).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task,pick\nt1,a\nt2,d\nt3,a\nt4,a\n", "'d' is no data set or learnware .* want a, b, c"),
        ("task,pick\nt1,a\nt2,base\nt3,a\nt4,a\n", "'base' is no data set or learnware"),
        ("task,pick\nt1,a\nt4,a\n", "no pick for t2, t3; add a row for each"),
        ("task,a,d\nt1,1,2\nt2,1,2\nt3,1,2\nt4,1,2\n", "'d' is no data set or learnware"),
        ("task,a,b\nt1,1,2\nt2,1,\nt3,1,2\nt4,1,2\n", "row 't2', column 'b': got ''"),
    ],
)
def test_picks_that_cannot_be_read_are_refused(config, tmp_path, text, message):
    file = tmp_path / "picks.csv"
    file.write_text(text)
    config.picks = str(file)
    with pytest.raises(ValueError, match=rf"picks.csv: .*{message}"):
        replay.run(config)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="got size 'law'; want one of finance, medical, math"):
        replay_config.get_config("law")


def test_command_line_explains_what_is_missing():
    command = [sys.executable, "-m", "experiments.replay", "--config=configs/replay.py:math"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: replay: got no scores; name a file, --config.scores=FILE")


# As published; the rows of the tables of arXiv 2505.13425 below the scores.
TABLES = {
    "finance": {
        "averages": (56.25, 66.60, 59.69, 67.79),
        "ranks": (5.94, 7.35, 7.82, 5.94, 4.71, 5.24, 6.47, 2.88, 5.47, 1.65),
        "learnware": "13/0/4 15/0/2 16/0/1 14/0/3 12/0/5 11/0/6 16/0/1 12/1/4 0/11/6",
        "oracle": "17/0/0 17/0/0 17/0/0 15/0/2 13/0/4 12/0/5 17/0/0 6/11/0 14/3/0",
    },
    "medical": {
        "averages": (74.09, 75.13, 74.83, 75.77),
        "ranks": (4.44, 2.67, 4.89, 2.56, 3.56, 1.67),
        "learnware": "6/3/0 3/0/6 9/0/0 6/1/2 0/3/6",
        "oracle": "9/0/0 3/0/6 9/0/0 6/3/0 6/3/0",
    },
    "math": {
        "averages": (51.10, 52.62, 52.08, 54.89),
        "ranks": (4.31, 2.56, 4.56, 3.19, 4.00, 1.56),
        "learnware": "10/1/5 5/2/9 11/0/5 10/0/6 0/6/10",
        "oracle": "15/1/0 7/0/9 16/0/0 10/6/0 14/2/0",
    },
}


def published(size, tmp_path):
    config = replay_config.get_config(size)
    config.scores, config.workdir = f"../shared/paper/{size}.csv", str(tmp_path)
    if not (REPOSITORY / config.scores).exists():
        pytest.skip(f"needs the published scores, {config.scores} beside the repository")
    config.scores = str(REPOSITORY / config.scores)
    return replay.run(config)


@pytest.mark.parametrize("size", TABLES)
def test_published_tables_are_reproduced(size, tmp_path):
    output, expected = published(size, tmp_path), TABLES[size]
    assert_allclose(list(output["averages"].values()), expected["averages"], atol=0.00501)
    assert_allclose(list(output["ranks"].values()), expected["ranks"], atol=0.00501)
    for own, counts in output["win_tie_loss"].items():
        assert ["/".join(map(str, c)) for c in counts.values()] == expected[own].split()
    for row in output["tasks"]:
        assert_allclose(
            row["scores"]["Learnware"], replay_config.PUBLISHED[size][row["task"]], atol=0.00501
        )


def test_what_was_not_published_about_finance(tmp_path):
    output = published("finance", tmp_path)
    assert_allclose(output["oracle_by_model"]["average"], 71.15, atol=0.005)
    assert output["pick_is_shared"] == {"users": 10, "certain": 10, "possible": 10}
    alone = output["unshared"]
    assert len(alone["users"]) == 7 and alone["best_single"] == "fpb"
    assert_allclose(list(alone["averages"].values()), [57.96, 63.71, 63.70, 65.62], atol=0.005)
    assert_allclose(alone["references"]["Llama3.1-70B-Instruct"], 65.28, atol=0.005)
    assert_allclose(alone["gap_closed"]["value"], 0.75, atol=0.005)


@pytest.mark.parametrize(
    ("size", "difference", "error", "gap"),
    [("medical", 0.94, 0.37, 0.62), ("math", 1.85, 0.88, 0.40)],
)
def test_selection_beats_the_static_ranker(size, difference, error, gap, tmp_path):
    output = published(size, tmp_path)
    found = output["static"]["difference"]
    assert_allclose([found["value"], found["stderr"]], [difference, error], atol=0.0051)
    assert 0 < found["lower"] < difference < found["upper"]
    assert_allclose(output["gap_closed"]["value"], gap, atol=0.005)
    places = {row["task"]: (row["place"], row["data_sets"]) for row in output["tasks"]}
    if size == "math":
        assert places["cmmlu_high_school_mathematics"] == (8, 9)


def test_critical_difference_of_demsar():
    # Section 3.2.2 there: four classifiers on 14 data sets, and table 5a: q for 10 classifiers.
    assert_allclose(replay.critical_difference(4, 14, 0.05), 1.25, atol=0.005)
    assert_allclose(replay.critical_difference(10, 1, 0.05), 3.164 * np.sqrt(110 / 6), atol=0.003)
    assert_allclose(replay.critical_difference(4, 14, 0.10), 1.12, atol=0.005)
