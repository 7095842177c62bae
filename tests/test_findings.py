"""The study's numbers: by hand on two users, a loop beside the bootstrap, and invariants."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.findings import (
    LABEL,
    Evidence,
    UserTask,
    estimate,
    findings,
    markdown,
    ordered,
    regret_at,
    static,
)
from learnware_jax.selection.regret import balanced_accuracy, regret

WANTED = ["no", "no", "yes", "yes"]
OPTIONS = {"best_family": "rkme", "draws": 200, "level": 0.95, "seed": 0}


def user(name, split="a", wanted=WANTED):
    return UserTask(name, split, "domain", name.split("-")[0], list(wanted))


def right(*models):
    """Rows of 0 and 1, a model each."""
    return np.array([[c == "1" for c in model] for model in models])


def two_users(**change):
    """Truth of s1, s2, t1: .75, .25, .5 and .5, .25, 1; the base model's: .5 and .25."""
    evidence = Evidence(
        users=[user("sentiment-x"), user("topic-y")],
        learnwares=[
            {
                "id": "s1",
                "task": "sentiment-x",
                "variant": "full",
                "domain": "x",
                "family": "sentiment",
            },
            {
                "id": "s2",
                "task": "sentiment-x",
                "variant": "corrupted",
                "domain": "x",
                "family": "sentiment",
            },
            {"id": "t1", "task": "topic-y", "variant": "full", "domain": "y", "family": "topic"},
        ],
        correct=[
            right("1010", "1110", "0010", "1010"),
            right("1000", "1010", "1000", "1111"),
        ],
        scores={
            # s1, or s2 and t1 alike; s1 in both seeds.
            "rkme": np.array([[[3.0, 1, 2], [1, 2, 2]], [[3, 1, 2], [3, 1, 2]]]),
            "mean_cosine": np.array([[[2.0, 1, 3]], [[2, 1, 3]]]),
        },
        answers={"few_shot": [right("1111", "1100"), right("1000", "0000")]},
        nearest={},
        threshold={},
        costs={"rkme": {"make_seconds": 2.5, "bytes": 99_328}},
    )
    return evidence._replace(**change)


def random_evidence(users=5, learnwares=4, rows=40, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"task-{i}" for i in range(users)]
    wanted = [("no", "yes", "yes", "maybe")[i % 4] for i in range(rows)]
    skill = rng.uniform(0.3, 0.9, (users, 1 + learnwares, 1))
    variants = ("full", "corrupted", "small", "full")
    return Evidence(
        users=[user(name, wanted=wanted) for name in names],
        learnwares=[
            {"id": f"l{m}", "task": names[m % users], "variant": variants[m % 4], "domain": "x"}
            | {"family": "task"}
            for m in range(learnwares)
        ],
        correct=list(rng.random((users, 1 + learnwares, rows)) < skill),
        scores={
            "rkme": skill[:, None, 1:, 0] + rng.normal(size=(users, 3, learnwares)) / 10,
            "mean_cosine": rng.normal(size=(users, 1, learnwares)),
        },
        answers={"few_shot": list(rng.random((users, 2, rows)) < 0.6)},
        nearest={},
        threshold={},
        costs={},
    )


def test_two_users_by_hand():
    found = findings(two_users(), **OPTIONS)
    assert (found["learnwares"], found["tasks"], found["best_family"]) == (3, 2, "rkme")
    a = found["splits"]["a"]
    scores = {
        "base": (0.5 + 0.25) / 2,
        "random": (0.5 + 7 / 12) / 2,
        "rkme": ((0.75 + 0.375) / 2 + 0.5) / 2,
        "mean_cosine": (0.5 + 1) / 2,
        "few_shot": ((1 + 0.5) / 2 + (0.25 + 0) / 2) / 2,
        "best_single": (0.5 + 1) / 2,  # t1
        "oracle_task": (0.5 + 1) / 2,  # both tasks have a mean of .5 for the first user
        "oracle": (0.75 + 1) / 2,
        "static": (0.75 + 7 / 12) / 2,  # s1; of the first user's scores none is away from home
    }
    assert set(a) == set(scores)
    chance, best = scores["random"], scores["oracle"]
    for name, score in scores.items():
        assert_allclose(a[name]["score"], score, rtol=1e-8)
        assert_allclose(a[name]["gap_closed"], (score - chance) / (best - chance), atol=1e-8)
        assert_allclose(a[name]["regret_at_1"], best - score, atol=1e-8)
    assert_allclose(found["comparisons"]["a"]["mean_cosine"]["difference"], -0.03125 - 0.625)


def test_errors_picks_and_places_by_hand():
    a = findings(two_users(), **OPTIONS)["splits"]["a"]
    # Users .5625 and .5; seeds .625 and .4375.
    assert_allclose(a["rkme"]["stderr"], 0.03125)
    assert_allclose(a["rkme"]["stderr_seeds"], 0.09375)
    assert a["mean_cosine"]["stderr_seeds"] is None
    # One of four picks is shared with s2; only the first user's labels are those of s2.
    assert (a["rkme"]["corrupted"], a["rkme"]["corrupted_near"]) == (0.125, 0.25)
    assert_allclose([a["random"][f] for f in ("corrupted", "corrupted_near")], 1 / 3)
    assert a["few_shot"]["corrupted"] is a["base"]["corrupted"] is None
    # Exchanges weigh 3/2, 4/3 and 5/6: the first is wrong for the first user.
    assert_allclose(a["mean_cosine"]["kendall_tau"], (2 / 11 + 1) / 2)
    assert a["rkme"]["regret_at_3"] == 0
    for name in ("few_shot", "random", "oracle"):
        assert a[name]["kendall_tau"] is a[name]["regret_at_3"] is None
    assert a["rkme"]["make_seconds"] == 2.5 and a["rkme"]["rank_seconds"] is None


def test_wins_ties_and_losses_by_hand():
    a = findings(two_users(), **OPTIONS)["splits"]["a"]
    # Against the base model .0625 ± .133 and .25 ± .177; against t1 .0625 ± .133 and -.5 ± .25.
    assert a["rkme"]["base_win_tie_loss"] == [1, 1, 0]
    assert a["rkme"]["cosine_win_tie_loss"] == [0, 1, 1]
    assert a["base"]["base_win_tie_loss"] == [0, 2, 0]
    assert a["few_shot"]["base_win_tie_loss"] == [0, 1, 1]  # .25 ± .25 and -.125 ± .088
    without = two_users()
    del without.scores["mean_cosine"]
    assert findings(without, **OPTIONS)["splits"]["a"]["rkme"]["cosine_win_tie_loss"] is None


def test_the_estimate_is_that_of_the_library_in_any_order_of_rows():
    rng = np.random.default_rng(0)
    wanted, guesses = rng.choice(list("abc"), 50), rng.choice(list("abcd"), (3, 50))
    values, errors = estimate((guesses == wanted).astype(float), wanted.tolist())
    theirs = [balanced_accuracy(g.tolist(), wanted.tolist()) for g in guesses]
    assert_allclose(np.array([values, errors]).T, theirs, rtol=1e-12)


def test_regret_of_equal_scores_is_the_mean_over_their_orders():
    truth = np.array([0.2, 0.9, 0.5, 0.6])
    # One sure, .5; of the three tied one more: .9, .6 or, worse than the sure one, .2.
    assert_allclose(
        regret_at(np.array([1.0, 1, 2, 1]), truth, 2), 0.9 - (0.9 + 0.6 + 0.5) / 3, rtol=1e-12
    )
    # Two of four alike: .9 in 3 of 6 pairs, .6 in 2, .5 in 1.
    assert_allclose(regret_at(np.zeros(4), truth, 2), 0.9 - (2.7 + 1.2 + 0.5) / 6, rtol=1e-12)
    scores = np.random.default_rng(0).permutation(4).astype(float)
    for k in (1, 2, 3, 4):
        assert_allclose(regret_at(scores, truth, k), regret(scores, truth, k), atol=1e-12)


def test_the_static_ranker_knows_neither_the_user_nor_a_learnware_at_home():
    truth = np.array([[0.9, 0.5, 0.7], [0.4, 0.8, 0.6], [0.5, 0.6, 0.9], [0.0, 1.0, 0.0]])
    others = np.array([True, True, True, False])  # the fourth is of another split
    # Away from home and centred: (., -.1, .1), (-.1, ., .1), (-.05, .05, .).
    expected = [[-0.075, 0.05, 0.1], [-0.05, -0.025, 0.1], [-0.1, -0.1, 0.1]]
    expected.append([-0.075, -0.025, 0.1])
    home = np.concatenate([np.eye(3), np.zeros((1, 3))]).astype(bool)
    assert_allclose(static(truth, home, others), expected, atol=1e-9)
    # What is easy for all, or how good one is at home, changes nothing.
    easier = truth + np.array([[0.1], [0.2], [0.3], [5.0]]) + 3 * home
    assert_allclose(static(easier, home, others), expected, atol=1e-9)


@pytest.mark.parametrize("alike", [False, True])
def test_intervals_are_those_of_a_loop(alike):
    evidence = random_evidence(users=4, rows=12 if alike else 24)
    if alike:  # few rows, too: most of the spread is that of rows, not of users
        skill = np.array([0.5, 0.9, 0.7, 0.3, 0.4])[:, None]
        evidence.correct[:] = np.random.default_rng(3).random((4, 5, 12)) < skill
        evidence.scores["rkme"][:] = np.array([[4, 3, 0, 0], [4, 3, 0, 0], [3, 4, 0, 0]])
        evidence.scores["mean_cosine"][:] = np.array([0, 0, 1, 0])
    found = findings(evidence, **OPTIONS | {"draws": 4000, "level": 0.9})
    rng, wanted = np.random.default_rng(1), np.array(evidence.users[0].wanted)
    truth = np.array(
        [
            [np.mean([c[wanted == w].mean() for w in set(wanted)]) for c in correct[1:]]
            for correct in evidence.correct
        ]
    )
    drawn = []
    for _ in range(1500):
        sums = np.zeros(4)
        for u in rng.integers(4, size=4):
            rows = [
                rng.choice(np.flatnonzero(wanted == w), (wanted == w).sum()) for w in set(wanted)
            ]
            again = np.mean([evidence.correct[u][1:, r].mean(1) for r in rows], axis=0)
            picks = evidence.scores["rkme"][u].argmax(1)
            cosine = evidence.scores["mean_cosine"][u, 0].argmax()
            sums += [again[picks].mean(), again[cosine], again.mean(), again[truth[u].argmax()]]
        drawn.append([sums[0] - sums[2], sums[0] - sums[1]] / (sums[3] - sums[2]))
    expected = np.quantile(drawn, [0.05, 0.95], axis=0).T
    ours = [found["splits"]["a"]["rkme"], found["comparisons"]["a"]["mean_cosine"]]
    ours = np.array([[one["lower"], one["upper"]] for one in ours])
    width = expected[:, 1] - expected[:, 0]
    assert_allclose(ours[:, 1] - ours[:, 0], width, rtol=0.12)
    assert (np.abs(ours - expected) < 0.12 * width[:, None]).all()


def test_the_oracle_closes_the_gap_and_chance_does_not():
    evidence = random_evidence()
    truth = np.array([estimate(c, evidence.users[0].wanted)[0][1:] for c in evidence.correct])
    evidence.scores["knows"] = truth[:, None]
    evidence.scores["again"] = evidence.scores["rkme"]
    evidence.scores["blind"] = np.zeros((5, 3, 4))
    found = findings(evidence, **OPTIONS)
    ends = ("gap_closed", "lower", "upper")
    a = found["splits"]["a"]
    for name, value in (("oracle", 1), ("knows", 1), ("random", 0), ("blind", 0)):
        assert_allclose([a[name][end] for end in ends], value, atol=1e-9)
    assert_allclose([a["knows"]["kendall_tau"], a["knows"]["regret_at_3"]], [1, 0], atol=1e-9)
    assert found["comparisons"]["a"]["again"] == {"difference": 0, "lower": 0, "upper": 0}
    assert "rkme" not in found["comparisons"]["a"]
    assert a["rkme"]["lower"] < a["rkme"]["gap_closed"] < a["rkme"]["upper"]


def test_the_order_of_learnwares_changes_nothing():
    evidence = random_evidence()
    evidence.scores["tied"] = np.ones((5, 1, 4)) * (np.arange(4) > 1)
    order = [3, 0, 2, 1]
    moved = evidence._replace(
        learnwares=[evidence.learnwares[i] for i in order],
        correct=[c[[0, *(1 + i for i in order)]] for c in evidence.correct],
        scores={name: s[:, :, order] for name, s in evidence.scores.items()},
    )

    def flat(content):
        if isinstance(content, dict):
            return [leaf for key in content for leaf in (key, *flat(content[key]))]
        if isinstance(content, list):
            return [leaf for part in content for leaf in flat(part)]
        return [round(content, 8) if isinstance(content, float) else content]

    assert flat(findings(evidence, **OPTIONS)) == flat(findings(moved, **OPTIONS))


def test_the_oracle_by_task_takes_the_highest_mean_of_a_task():
    # Of the first task .75 and .25, of the second .75.
    first = right("1010", "1110", "0010", "1101")
    a = findings(two_users(correct=[first] * 2), **OPTIONS)["splits"]["a"]
    assert a["oracle_task"]["score"] == 0.75


def test_nothing_to_choose_is_no_gap():
    one = right("1010", "1110", "1110", "1110")
    found = findings(two_users(correct=[one, one]), **OPTIONS)
    assert [found["splits"]["a"]["rkme"][k] for k in ("gap_closed", "lower", "upper")] == [None] * 3
    assert found["splits"]["a"]["rkme"]["kendall_tau"] is None
    assert found["comparisons"]["a"]["base"]["difference"] is None


def five_users():
    """The two of split a, one of b, two of c; the distances of two seeds."""
    evidence = two_users()
    again = evidence._replace(
        users=[
            *evidence.users,
            user("sentiment-z", "b"),
            user("law-v", "c"),
            user("law-w", "c"),
            user("art-d", "development"),
        ],
        correct=[*evidence.correct, *[evidence.correct[0]] * 4],
        scores={
            n: np.concatenate([s, s[:1], s[:1], s[:1], s[:1]]) for n, s in evidence.scores.items()
        },
        answers={n: [*a, *[a[0]] * 4] for n, a in evidence.answers.items()},
        nearest={"rkme": np.array([[1, 1], [1, 3], [3, 3], [3, 2], [3, 3], [0, 0]], float)},
        threshold={"rkme": 2.0},
    )
    return again


def test_abstention_by_hand():
    found = findings(five_users(), **OPTIONS)["abstention"]["rkme"]
    assert (found["threshold"], found["false_acceptance"]) == (2, 0.25)
    assert (found["served_a"], found["served_b"]) == (0.75, 0)
    # Served are .75, .375 and .5, of .5, .5 and 7/12 and .75, .75 and 1.
    assert_allclose(found["gap_closed_a"], (1.625 - 19 / 12) / (2.5 - 19 / 12), rtol=1e-6)
    assert found["gap_closed_b"] is None
    # The refused seed of the second user gets the base model's .25, the user of b its .5.
    assert_allclose([found["score_a"], found["score_b"]], [(0.75 + 0.375 + 0.5 + 0.25) / 4, 0.5])


def test_users_are_counted_in_their_splits():
    found = findings(five_users(), **OPTIONS)
    assert (found["tasks"], list(found["splits"])) == (5, ["a", "b", "c"])
    assert found["development"]["oracle"]["score"] == 0.75
    assert list(found["comparisons"]) == ["a", "b", "c"]
    # In hindsight t1 has .75 over split a; over all users s1 has the most.
    assert found["splits"]["a"]["best_single"]["score"] == 0.75
    # One user has no spread; none of c shares labels with s2.
    assert found["splits"]["b"]["rkme"]["stderr"] is None
    assert found["splits"]["c"]["rkme"]["corrupted_near"] is None
    assert found["splits"]["c"]["rkme"]["corrupted"] == 0.25
    # The static ranker never sees split b: for its user both users of a are others.
    # s1 and s2 were away with topic-y, ±.125, and t1 with sentiment-x, 0: s1.
    rows = {row["task"]: row for row in found["rows"]}
    assert rows["sentiment-z"]["contenders"]["static"]["pick"] == "s1"
    assert rows["topic-y"]["contenders"]["static"]["pick"] == "s1"  # of three alike
    assert rows["topic-y"]["contenders"]["random"]["pick"] is None
    assert (rows["topic-y"]["oracle_id"], rows["topic-y"]["n"]) == ("t1", 4)
    assert_allclose(rows["topic-y"]["contenders"]["base"]["stderr"], np.sqrt(0.125) / 2)


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        # Rows of base, s1, s2 and t1; the user gets s1.
        (("1010", "1010", "0000", "1010"), "no learnware helps, its own neither"),
        # t1 gains .25 ± .40.
        (("1010", "1010", "0000", "0111"), "no learnware helps, its own neither"),
        (("1000", "1000", "0000", "1111"), "picked s1 where t1 would have done better, by 0.750"),
        # s1 gains .25 ± .40, t1 .5 ± .25; they are .25 ± .40 apart.
        (("0001", "1010", "0000", "0111"), "a gain, but within one standard error"),
        # s1 gains 0 ± .35, t1 .25 ± .18.
        (("0011", "1010", "0000", "0111"), "no gain; these rows do not tell the pick from t1"),
    ],
)
def test_exceptions_have_a_reason(models, reason):
    evidence = two_users()
    evidence.scores["rkme"][0] = [3, 1, 2]
    evidence.correct[0] = right(*models)
    (exception,) = findings(evidence, **OPTIONS)["exceptions"]
    assert (exception["task"], exception["pick"]) == ("sentiment-x", "s1")
    assert exception["reason"].startswith(reason)


def test_an_exception_of_some_seeds_by_hand():
    (exception,) = findings(two_users(), **OPTIONS)["exceptions"]
    # .75 and, in the other seed, the mean of .25 and .5.
    assert (exception["base"], exception["selected"], exception["difference"]) == (
        *(0.5, 0.5625, 0.0625),
    )
    assert_allclose(exception["stderr"], np.sqrt(0.375**2 / 2) / 2, rtol=1e-6)
    assert (exception["pick"], exception["oracle_id"], exception["oracle"]) == ("s1", "s1", 0.75)
    assert exception["reason"] == "picked s1, the best learnware, but not for every seed or alone"


def test_contenders_are_shown_in_one_order():
    names = ["oracle", "best_single", "later", "rkme", "base", "else", "random"]
    assert ordered(names) == ["base", "random", "rkme", "later", "else", "best_single", "oracle"]


def test_markdown_says_the_numbers():
    evidence = five_users()
    evidence.scores["odd|name"] = evidence.scores["rkme"]
    text = "\n".join(markdown(findings(evidence, **OPTIONS)))
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {LABEL['rkme']} | 0.531")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "0.531 ± 0.031" and cells[2].startswith("-0.03 [")
    assert cells[3:5] == ["0.344", "0.000"] and cells[6:] == [
        "1/1/0",
        "12%",
        "2.5",
        "",
        "",
        "99,328",
    ]
    assert "odd\\|name" in text and "odd|name" not in text
    assert "nan" not in text.lower().split() and "None |" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": []}, r"got 0 users and 3 learnwares"),
        (
            {"users": [user("x", "z"), user("y")]},
            r"user x is of split 'z'; want one of a, b, c, dev",
        ),
        (
            {"correct": [right("1111")] * 2},
            r"user sentiment-x has answers of shape \(1, 4\); want \(4, 4",
        ),
        (
            {"scores": {"rkme": np.zeros((2, 3))}},
            r"scores of rkme have shape \(2, 3\); want \(2, see",
        ),
        ({"scores": {"rkme": np.full((2, 1, 3), np.nan)}}, r"a score of rkme is not finite"),
        ({"scores": {"oracle": np.zeros((2, 1, 3))}}, r"the name 'oracle' is taken"),
        (
            {"answers": {"few_shot": [right("1111"), right("11")]}},
            r"answers of few_shot have shapes",
        ),
        (
            {"nearest": {"rkme": np.zeros((2, 1))}},
            r"distances of rkme have shape \(2, 1\); want \(2, ",
        ),
        ({"nearest": {"other": np.zeros((2, 1))}}, r"distances of other have shape"),
        ({"scores": {}}, r"got best_family='rkme'"),
    ],
)
def test_evidence_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=rf"^findings: {message}"):
        findings(two_users(**change), **OPTIONS)
