"""From what every model gets right to the numbers of the study: scores, gaps, intervals, picks.

`findings` computes, `tables` and `markdown` show. No model is run here.
"""

from collections.abc import Hashable, Iterable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np

from learnware_jax.selection.bootstrap import balanced_draws, interval, resampled
from learnware_jax.selection.regret import gap_closed, kendall

# Contenders that are known, in the order of every table; others stand before the last three.
LABEL = {
    "base": "base model",
    "few_shot": "base fine-tuned on the user's rows",
    "random": "random learnware",
    "static": "static ranker",
    "metadata": "BM25 of cards, by a description",
    "mean_cosine": "cosine of mean embeddings",
    "mean_cosine_answers": "cosine of means, with answers",
    "rkme": "RKME of texts",
    "joint_rkme_answers": "RKME of texts with answers",
    "joint_rkme_outputs": "RKME of texts with outputs",
    "pave_answers": "PAVE, answers",
    "pave_outputs": "PAVE, outputs",
    "pave_prompts": "PAVE, prompts",
    "one_step_answers": "one-step gradient, answers",
    "one_step_outputs": "one-step gradient, outputs",
    "one_step_prompts": "one-step gradient, prompts",
    "mixture": "mixture",
    "per_row": "choice for each row",
    "merge_top3": "merge of the first 3",
    "loss": "loss on the user's rows",
    "best_single": "best single, in hindsight",
    "oracle_task": "oracle by task",
    "oracle": "oracle by learnware",
}
HINDSIGHT = ("best_single", "oracle_task", "oracle")
HERE = ("base", "random", "static", *HINDSIGHT)  # computed here, of the others' evidence
COSTS = ("make_seconds", "rank_seconds", "bytes", "forward_passes")
SPLITS = {
    "a": "tasks of the dock, other rows",
    "b": "data sets that no learnware saw",
    "c": "domains that no learnware saw",
    "development": "tasks on which choices were made",
}
DIGITS = 9  # scores that agree to so many decimals are equal: means of equal numbers may not be
NOTES = (
    "Score: balanced accuracy, the mean over labels of the share of their rows answered rightly;",
    "mean over users ± standard error over users, seeds averaged. Gap closed: (score - random) /",
    "(oracle - random) of these means. [ ]: nested paired bootstrap, users drawn again and rows",
    "within labels; choices, the oracle's too, stay those of all rows. Regret: score lost against",
    "the best learnware, of the first and of the best among the first 3. Tau: weighted Kendall,",
    "with the true scores. W/T/L: users on which a contender beats, ties or loses against the base",
    "model; a tie is within one standard error of the paired difference. Corrupted: share of picks",
    "that were trained on shuffled answers. Seconds: to make what a user ranks by, and to rank.",
    "Passes: of language models over a row, to make and to rank. Bytes: what a learnware",
    "publishes. What has answers or outputs in its name, the loss and few rows read the user's",
    "answers; others read texts alone, the metadata a description of the task and its labels, on",
    "split a the card's own. Learnwares of equal specifications share a pick.",
    "Static: learnware of the highest mean over the other users of split a, of scores centred for",
    "each user, none counted at home. Best single and the oracles know the scores, and are chosen",
    "on the rows that they are scored on: they are a little flattered.",
)


class UserTask(NamedTuple):
    """A user of the study: a task, and what is right on its test rows."""

    name: str
    split: str  # a key of SPLITS
    domain: str
    family: str  # tasks of one family have the same labels
    # Right answers of the rows. Free answers, which seldom occur twice, share one label: labels of
    # one row have no standard error.
    wanted: list[str]


class Evidence(NamedTuple):
    """What every contender does for every user."""

    users: list[UserTask]
    learnwares: list[dict]  # id, task, domain, family, variant: full, seed, small or corrupted
    correct: list[np.ndarray]  # a user: bool (1 + M, rows); the base model, then the learnwares
    scores: dict[str, np.ndarray]  # (users, seeds, M), higher is closer, by contender that ranks
    answers: dict[str, list[np.ndarray]]  # a user: bool (seeds, rows), by one that answers itself
    nearest: dict[str, np.ndarray]  # (users, seeds): distance to the closest learnware
    threshold: dict[str, float]  # distance beyond which none fits
    costs: dict[str, dict]  # COSTS by contender


class Measured(NamedTuple):
    """Contenders' scores: 0 to 1, balanced accuracies. C contenders, in the order of `names`."""

    names: list[str]
    truth: np.ndarray  # (users, M), of the learnwares
    rankings: dict[str, np.ndarray]  # (users, seeds, M), of those that rank
    by_seed: dict[str, np.ndarray]  # (users, seeds)
    picks: np.ndarray  # (users, C, M): how often each learnware is picked; 0 where none is
    rows: list[np.ndarray]  # a user: (C, rows), how often a row is answered rightly
    scores: np.ndarray  # (users, C)
    errors: np.ndarray  # (users, C): standard errors over the rows
    again: np.ndarray  # (users, draws, C): scores on rows drawn again, the same for all


def findings(evidence: Evidence, *, best_family: str, draws: int, level: float, seed: int) -> dict:
    """The study's numbers, ready for JSON: None where one is undefined. NOTES defines the metrics.

    `learnwares` and `tasks` (users of splits a, b and c) are counts; `splits` and `development`
    hold the metrics by contender, `comparisons` the gap closed by `best_family` less that of every
    contender, `abstention` what thresholds refuse, `exceptions` users of split a that the base
    model serves as well, `rows` every user. Splits without users are left out.

    Learnwares of equal score share their place; `random` is the mean of all. `corrupted` is None
    for contenders without a pick; `corrupted_near` is that of users for whom the dock has a
    corrupted learnware of their own label family.

    Intervals, at `level`, are from `draws` draws of users and, for each drawn user, of rows within
    labels. Picks stay those of all rows: the best on rows drawn again would be flattered once more.
    The rows' noise is in the differences between users, too: intervals err to the wide side.
    ValueError for evidence that does not fit together, or a `best_family` that ranks nothing.
    """
    check(evidence, best_family)
    rng = np.random.default_rng(seed)
    measured = measure(evidence, draws, rng)
    places = {s: [i for i, u in enumerate(evidence.users) if u.split == s] for s in SPLITS}
    tables, comparisons = {}, {}
    for split, users in places.items():
        if users:
            tables[split], comparisons[split] = _split(
                evidence, measured, users, best_family, level, rng
            )
    development = {"development": tables.pop("development")} if "development" in tables else {}
    comparisons.pop("development", None)
    return {
        "learnwares": len(evidence.learnwares),
        "tasks": sum(len(places[split]) for split in "abc"),
        "best_family": best_family,
        "splits": tables,
        **development,
        "comparisons": comparisons,
        "abstention": {
            name: _abstention(evidence, measured, places, name)
            for name in ordered(evidence.nearest)
        },
        "exceptions": [
            row for u in places["a"] if (row := _exception(evidence, measured, u, best_family))
        ],
        "rows": [_row(evidence, measured, u) for u in range(len(evidence.users))],
    }


def check(evidence: Evidence, best_family: str) -> None:
    """ValueError for evidence that does not fit together, naming what, and what is wanted."""
    users, m = evidence.users, len(evidence.learnwares)
    if not users or not m:
        raise ValueError(f"findings: got {len(users)} users and {m} learnwares; want some of each.")
    for user, correct in zip(users, evidence.correct, strict=True):
        if user.split not in SPLITS:
            raise ValueError(
                f"findings: user {user.name} is of split {user.split!r}; want one of "
                f"{', '.join(SPLITS)}."
            )
        if correct.shape != (1 + m, len(user.wanted)):
            raise ValueError(
                f"findings: user {user.name} has answers of shape {correct.shape}; want "
                f"{(1 + m, len(user.wanted))}: the base model and every learnware, on every row."
            )
    for name, values in evidence.scores.items():
        if values.ndim != 3 or (len(values), values.shape[2]) != (len(users), m):
            raise ValueError(
                f"findings: scores of {name} have shape {values.shape}; want ({len(users)}, seeds, "
                f"{m})."
            )
        if not np.isfinite(values).all():
            raise ValueError(f"findings: a score of {name} is not finite.")
    for name, own in evidence.answers.items():
        want = [(len(own[0]), len(user.wanted)) for user in users]
        if [answers.shape for answers in own] != want:
            raise ValueError(
                f"findings: answers of {name} have shapes {[a.shape for a in own]}; want {want}."
            )
    for name in [*evidence.scores, *evidence.answers]:
        if name in HERE or (name in evidence.scores and name in evidence.answers):
            raise ValueError(f"findings: the name {name!r} is taken; want another.")
    for name, distances in evidence.nearest.items():
        want = evidence.scores[name].shape[:2] if name in evidence.scores else None
        if distances.shape != want or name not in evidence.threshold:
            raise ValueError(
                f"findings: distances of {name} have shape {distances.shape}; want {want}, as its "
                "scores, and a threshold."
            )
    if best_family not in evidence.scores:
        raise ValueError(
            f"findings: got best_family={best_family!r}; want one of {', '.join(evidence.scores)}."
        )


def ordered(names: Iterable[str]) -> list[str]:
    """Contenders in the order of LABEL; unknown ones before those of hindsight."""
    known = list(LABEL)
    middle = known.index(HINDSIGHT[0]) - 0.5
    return sorted(names, key=lambda n: known.index(n) if n in LABEL else middle)


# ---- what contenders score


def estimate(values: np.ndarray, wanted: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Means over labels of means over their rows, and their standard errors: values (k, n).

    Of what is right, the balanced accuracies and errors of `regret.balanced_accuracy`; of the
    difference between two contenders, its paired error. It is what `balanced_draws` tends to.
    """
    labels = np.array([list(dict.fromkeys(wanted)).index(w) for w in wanted])
    own = [values[:, labels == label] for label in range(labels.max() + 1)]
    error = np.sqrt(sum(part.var(1) / part.shape[1] for part in own)) / len(own)
    return np.mean([part.mean(1) for part in own], axis=0), error


def shares(scores: np.ndarray) -> np.ndarray:
    """How the pick is shared among those of the highest score, along the last axis."""
    first = scores == scores.max(-1, keepdims=True)
    return first / first.sum(-1, keepdims=True)


def static(truth: np.ndarray, home: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Scores (users, M) of a ranker that has seen other users' truth (users, M), and no text.

    Means over the `others` (users,) but the user, of truths centred for each of them: an easy task
    counts no more than a hard one. A learnware at `home` (users, M), on the task that it was
    trained for, is left out, before centring too: no rival of the user's own may gain, or others
    lose, by it. A learnware that was nowhere else counts as average, 0.
    """
    away = np.where(home | ~others[:, None], np.nan, truth)
    count = (~np.isnan(away)).sum(1, keepdims=True)
    centred = away - np.nansum(away, 1, keepdims=True) / np.maximum(count, 1)
    seen = ~np.isnan(centred)
    centred = np.where(seen, centred, 0.0)
    # Sums over all users less the user's own.
    total, number = centred.sum(0) - centred, seen.sum(0) - seen
    return (total / np.maximum(number, 1)).round(DIGITS)


def regret_at(scores: np.ndarray, truth: np.ndarray, k: int) -> float:
    """`regret.regret`, the mean over all orders of learnwares of equal score."""
    bound = np.sort(scores)[-k]
    sure, tied = truth[scores > bound], np.sort(truth[scores == bound])[::-1]
    wanted = k - len(sure)
    # Of `wanted` of the tied, each is the best where all others come after it.
    after = range(len(tied) - 1, -1, -1)
    chance = [comb(rest, wanted - 1) / comb(len(tied), wanted) for rest in after]
    return float(truth.max() - chance @ np.maximum(tied, sure.max(initial=-np.inf)))


def measure(evidence: Evidence, draws: int, rng: np.random.Generator) -> Measured:
    """Every contender for every user, those of hindsight and `static` included."""
    users, m = evidence.users, len(evidence.learnwares)
    scored = [estimate(c, u.wanted)[0] for c, u in zip(evidence.correct, users, strict=True)]
    # Equal but for rounding is equal: such learnwares share the oracle's pick.
    truth = np.array(scored)[:, 1:].round(DIGITS)
    tasks = np.array([learnware["task"] for learnware in evidence.learnwares])
    splits = np.array([user.split for user in users])
    home = tasks == np.array([user.name for user in users])[:, None]
    of_task = np.array([[truth[u, tasks == t].mean() for t in tasks] for u in range(len(users))])
    single = np.array([truth[splits == split].mean(0) for split in splits])
    rankings = evidence.scores | {"static": static(truth, home, splits == "a")[:, None]}
    known = {"best_single": single, "oracle_task": of_task, "oracle": truth}
    ranked = rankings | {name: values.round(DIGITS)[:, None] for name, values in known.items()}
    ranked["random"] = np.zeros((len(users), 1, m))
    shared = {name: shares(values) for name, values in ranked.items()}

    names = ordered(["base", *evidence.answers, *ranked])
    none = np.zeros((len(users), m))
    picks = np.stack([shared[n].mean(1) if n in shared else none for n in names], axis=1)
    by_seed = {n: np.einsum("usm,um->us", s, truth) for n, s in shared.items()}
    by_seed["base"] = np.array([own[0] for own in scored])[:, None]
    for name, own in evidence.answers.items():
        by_seed[name] = np.array(
            [estimate(a, u.wanted)[0] for a, u in zip(own, users, strict=True)]
        )
    rows, again = [], []
    for u, (user, correct) in enumerate(zip(users, evidence.correct, strict=True)):
        own = {name: answers[u] for name, answers in evidence.answers.items()}
        columns = np.concatenate([correct, *own.values()])
        weights = np.zeros((len(names), len(columns)))
        weights[:, 1 : 1 + m] = picks[u]
        weights[names.index("base"), 0] = 1
        start = 1 + m
        for name, answers in own.items():
            weights[names.index(name), start : start + len(answers)] = 1 / len(answers)
            start += len(answers)
        rows.append(weights @ columns)
        again.append(balanced_draws(rng, columns, user.wanted, draws) @ weights.T)
    estimates = [estimate(row, user.wanted) for row, user in zip(rows, users, strict=True)]
    scores, errors = np.moveaxis(np.array(estimates), 1, 0)
    return Measured(names, truth, rankings, by_seed, picks, rows, scores, errors, np.array(again))


# ---- what is said about them


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _ends(values: np.ndarray, level: float) -> dict[str, float | None]:
    if np.isnan(values).all():
        return {"lower": None, "upper": None}
    return interval(values, level)._asdict()


def _closed(measured: Measured, scores: np.ndarray) -> np.ndarray:
    """Gaps closed (..., C) of mean scores (..., C); NaN where the oracle is no better."""
    random, oracle = (scores[..., [measured.names.index(n)]] for n in ("random", "oracle"))
    gap = (oracle - random).round(DIGITS)
    return (scores - random) / np.where(gap > 0, gap, np.nan)


def _drawn(again: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means (draws, C) over users drawn again, each with rows drawn for it alone."""
    users, draws, _ = again.shape
    places = resampled(rng, users, draws)
    # A user that is drawn twice has other rows the second time: those of another draw.
    rows = (np.arange(draws)[:, None] + np.arange(users)) % draws
    return again[places, rows].mean(1)


def _split(evidence, measured, users, best_family, level, rng) -> tuple[dict, dict]:
    """Metrics by contender, and the comparison with `best_family`, over some users."""
    names, m = measured.names, len(evidence.learnwares)
    scores = measured.scores[users]
    closed = _closed(measured, scores.mean(0))
    drawn = _closed(measured, _drawn(measured.again[users], rng))
    corrupted = np.array([learnware["variant"] == "corrupted" for learnware in evidence.learnwares])
    families = {
        learnware["family"]
        for learnware, bad in zip(evidence.learnwares, corrupted, strict=True)
        if bad
    }
    near = [u for u in users if evidence.users[u].family in families]
    oracle, best = names.index("oracle"), names.index(best_family)
    table, comparisons = {}, {}
    for c, name in enumerate(names):
        seeds = measured.by_seed[name][users].mean(0)
        ranked = measured.rankings.get(name, np.empty((len(evidence.users), 0, m)))
        pairs = [(s, measured.truth[u]) for u in users for s in ranked[u]]
        taus = np.array([kendall(s.astype(np.float64), truth) for s, truth in pairs])
        taus = taus[~np.isnan(taus)]
        picks = measured.picks[:, c]
        table[name] = {
            "score": float(scores[:, c].mean()),
            "stderr": _error(scores[:, c]),
            "stderr_seeds": _error(seeds),
            "gap_closed": _number(closed[c]),
            **_ends(drawn[:, c], level),
            "regret_at_1": float((scores[:, oracle] - scores[:, c]).mean()),
            "regret_at_3": (
                float(np.mean([regret_at(*pair, min(3, m)) for pair in pairs])) if pairs else None
            ),
            "kendall_tau": float(taus.mean()) if len(taus) else None,
            "corrupted": float((picks[users] @ corrupted).mean()) if picks.any() else None,
            "corrupted_near": (
                float((picks[near] @ corrupted).mean()) if near and picks.any() else None
            ),
            "base_win_tie_loss": _win_tie_loss(evidence, measured, users, name, "base"),
            "cosine_win_tie_loss": _win_tie_loss(evidence, measured, users, name, "mean_cosine"),
            **{cost: evidence.costs.get(name, {}).get(cost) for cost in COSTS},
        }
        if name != best_family:
            comparisons[name] = {
                "difference": _number(closed[best] - closed[c]),
                **_ends(drawn[:, best] - drawn[:, c], level),
            }
    return table, comparisons


def _paired(evidence, measured, user, own, other) -> tuple[float, float]:
    """The difference between two contenders for a user, and its standard error over rows."""
    rows = measured.rows[user]
    difference = rows[[measured.names.index(own)]] - rows[[measured.names.index(other)]]
    (value,), (error,) = estimate(difference, evidence.users[user].wanted)
    return round(float(value), DIGITS), round(float(error), DIGITS)


def _win_tie_loss(evidence, measured, users, own, other) -> list[int] | None:
    if other not in measured.names:
        return None
    pairs = [_paired(evidence, measured, user, own, other) for user in users]
    wins, losses = (sum(sign * value > error for value, error in pairs) for sign in (1, -1))
    return [wins, len(pairs) - wins - losses, losses]


def _abstention(evidence, measured, places, name) -> dict:
    """What the threshold serves; seeds count like users."""
    served = evidence.nearest[name] <= evidence.threshold[name]
    base, random, oracle = (
        measured.by_seed[n] * np.ones(served.shape) for n in ("base", "random", "oracle")
    )
    own = measured.by_seed[name]
    output = {
        "threshold": _number(evidence.threshold[name]),
        "false_acceptance": float(served[places["c"]].mean()) if places["c"] else None,
    }
    for split in "abc":
        users, fits = places[split], served[places[split]]
        triple = [values[users][fits].mean() for values in (own, random, oracle) if fits.any()]
        output |= {
            f"served_{split}": float(fits.mean()) if users else None,
            f"gap_closed_{split}": (
                _number(gap_closed(*np.round(triple, DIGITS).tolist())) if triple else None
            ),
            f"score_{split}": (
                float(np.where(fits, own[users], base[users]).mean()) if users else None
            ),
        }
    return output


def _pick(evidence, measured, user, name) -> str | None:
    """The learnware that is picked most often; of several, the first by id."""
    picks = measured.picks[user, measured.names.index(name)].round(DIGITS)
    if name == "random" or not picks.any():
        return None
    most = np.flatnonzero(picks == picks.max())
    return min(evidence.learnwares[i]["id"] for i in most)


def _exception(evidence, measured, user, best_family) -> dict | None:
    """A user whom `best_family` does not serve better than the base model, and why; else None."""
    difference, error = _paired(evidence, measured, user, best_family, "base")
    if difference > error:
        return None
    pick = _pick(evidence, measured, user, best_family)
    best = _pick(evidence, measured, user, "oracle")
    possible, noise = _paired(evidence, measured, user, "oracle", "base")
    lost, doubt = _paired(evidence, measured, user, "oracle", best_family)
    if possible <= noise:
        reason = (
            "no learnware helps, its own neither: the best is within one standard error of the "
            "base model"
        )
    elif lost > doubt and pick == best:
        reason = f"picked {best}, the best learnware, but not for every seed or alone"
    elif lost > doubt:
        reason = f"picked {pick} where {best} would have done better, by {lost:.3f} ± {doubt:.3f}"
    elif difference > 0:
        reason = "a gain, but within one standard error: too few rows to tell"
    else:
        reason = f"no gain; these rows do not tell the pick from {best}, the best learnware"
    return {
        "task": evidence.users[user].name,
        **{
            name: float(measured.scores[user, measured.names.index(contender)])
            for name, contender in (("base", "base"), ("selected", best_family))
        },
        "difference": difference,
        "stderr": error,
        "pick": pick,
        "oracle_id": best,
        "oracle": float(measured.scores[user, measured.names.index("oracle")]),
        "reason": reason,
    }


def _row(evidence, measured, user) -> dict:
    task = evidence.users[user]
    scores = dict(zip(measured.names, measured.scores[user].tolist(), strict=True))
    return {
        "task": task.name,
        "split": task.split,
        "domain": task.domain,
        "family": task.family,
        "n": len(task.wanted),
        "labels": len(set(task.wanted)),
        **{name: scores[name] for name in ("base", "random", "oracle")},
        "oracle_id": _pick(evidence, measured, user, "oracle"),
        "contenders": {
            name: {
                "score": scores[name],
                "stderr": float(measured.errors[user, c]),
                "pick": _pick(evidence, measured, user, name),
            }
            for c, name in enumerate(measured.names)
        },
    }


# ---- how it is shown


class Table(NamedTuple):
    """A table of texts; the first cell of a row names it."""

    title: str
    head: list[str]
    rows: list[list[str]]


def label(name: str) -> str:
    """What a contender is called in tables and figures."""
    return LABEL.get(name, name)


def _show(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:z.{digits}f}"


def _ranged(value: float | None, ends: dict, sign: str = "") -> str:
    if value is None or ends["lower"] is None:
        return _show(value)
    return f"{value:{sign}z.2f} [{ends['lower']:{sign}z.2f}, {ends['upper']:{sign}z.2f}]"


def _with_error(value: float, error: float | None) -> str:
    return _show(value) if error is None else f"{value:.3f} ± {error:.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def main_table(name: str, contenders: dict[str, dict]) -> Table:
    """The metrics of one split."""
    head = ["contender", "score", "gap closed", "regret@1", "regret@3", "tau", "W/T/L", "corrupted"]
    head += ["s to make", "s to rank", "passes", "bytes"]
    rows = []
    for contender in ordered(contenders):
        of = contenders[contender]
        rows.append(
            [
                label(contender),
                _with_error(of["score"], of["stderr"]),
                _ranged(of["gap_closed"], of),
                _show(of["regret_at_1"]),
                _show(of["regret_at_3"]),
                _show(of["kendall_tau"], 2),
                "/".join(map(str, of["base_win_tie_loss"])),
                _share(of["corrupted"]),
                *(
                    "" if of[cost] is None else f"{of[cost]:.2g}"
                    for cost in ("make_seconds", "rank_seconds")
                ),
                *("" if of[c] is None else f"{of[c]:,.0f}" for c in ("forward_passes", "bytes")),
            ]
        )
    title = f"split {name}: {SPLITS[name]}" if len(name) == 1 else SPLITS[name]
    return Table(title[0].upper() + title[1:], head, rows)


def tables(findings: dict) -> dict[str, list[Table]]:
    """Every table, by subject: main, comparisons, abstention, corrupted, exceptions, tasks."""
    splits = findings["splits"]
    names = ordered(dict.fromkeys(name for split in splits.values() for name in split))
    compared = findings["comparisons"].values()
    best = findings["best_family"]
    fields = [(f, s) for s in "abc" for f in ("served", "gap_closed", "score")]
    main = [main_table(name, split) for name, split in splits.items()]
    if "development" in findings:
        main.append(main_table("development", findings["development"]))
    return {
        "main": main,
        "comparisons": [
            Table(
                f"Gap closed by {label(best)}, less that of",
                ["contender", *(f"split {split}" for split in findings["comparisons"])],
                [
                    [label(name), *(_ranged(c[name]["difference"], c[name], "+") for c in compared)]
                    for name in names
                    if name != best
                ],
            )
        ],
        "abstention": [
            Table(
                "Abstention: users beyond the threshold are refused, and served by the base model",
                [
                    *("contender", "threshold", "false acceptance"),
                    *(f"{f.replace('_', ' ')}, {s}" for f, s in fields),
                ],
                [
                    [
                        label(name),
                        "" if of["threshold"] is None else f"{of['threshold']:.4g}",
                        _share(of["false_acceptance"]),
                        *((_share if f == "served" else _show)(of[f"{f}_{s}"]) for f, s in fields),
                    ]
                    for name, of in findings["abstention"].items()
                ],
            )
        ],
        "corrupted": [
            Table(
                "Share of picks that are corrupted learnwares; near: of users for whom the dock "
                "has a corrupted learnware of their label family",
                ["contender", *(f"{split}{near}" for split in splits for near in ("", ", near"))],
                [
                    [
                        label(name),
                        *(
                            _share(split[name][f"corrupted{near}"])
                            for split in splits.values()
                            for near in ("", "_near")
                        ),
                    ]
                    for name in names
                    if any(split[name]["corrupted"] is not None for split in splits.values())
                ],
            )
        ],
        "exceptions": [
            Table(
                f"Users of split a whom {label(best)} does not serve better than the base model by "
                "more than one standard error",
                [
                    *("task", "base", "selected", "difference", "picked", "best", "its score"),
                    "reason",
                ],
                [
                    [
                        of["task"],
                        _show(of["base"]),
                        _show(of["selected"]),
                        f"{of['difference']:+.3f} ± {of['stderr']:.3f}",
                        of["pick"],
                        of["oracle_id"],
                        _show(of["oracle"]),
                        of["reason"],
                    ]
                    for of in findings["exceptions"]
                ],
            )
        ],
        "tasks": [_tasks(findings, names)],
    }


def _tasks(findings: dict, names: Sequence[str]) -> Table:
    best = findings["best_family"]
    return Table(
        "Scores ± standard errors over the rows of a task",
        [
            *("task", "split", "rows", "labels"),
            *map(label, names),
            *(f"{label(best)}: pick", "best learnware"),
        ],
        [
            [
                *(row["task"], row["split"], str(row["n"]), str(row["labels"])),
                *(
                    _with_error(row["contenders"][n]["score"], row["contenders"][n]["stderr"])
                    for n in names
                ),
                *(row["contenders"][best]["pick"], row["oracle_id"]),
            ]
            for row in findings["rows"]
        ],
    )


def markdown(findings: dict) -> list[str]:
    """Lines of Markdown: every table, then what the columns are."""
    lines = [line for group in tables(findings).values() for t in group for line in as_markdown(t)]
    return [*lines, *NOTES]


def as_markdown(table: Table) -> list[str]:
    """A table with its title, and an empty line after it."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    head, *rows = [f"| {' | '.join(row)} |" for row in cells]
    body = [head, f"|{'---|' * len(table.head)}", *rows] if rows else ["None."]
    return [f"**{table.title}**", "", *body, ""]
