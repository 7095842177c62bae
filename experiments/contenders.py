"""Every way of the study to rank its dock for a user, on the same rows."""

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.common import embed_parts, embed_texts, reducer_options, say, write_json
from experiments.ranking import OpenDock
from experiments.vectors import (
    Reference,
    Sample,
    keep_vectors,
    make_vectors,
    row_gradients,
    space_of,
    texts_of,
)
from learnware_jax.dock.labelled import Example
from learnware_jax.selection import baselines
from learnware_jax.selection.decision import calibrate_threshold
from learnware_jax.selection.mixture import Mixture, greedy_mixture
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.specification import pave
from learnware_jax.specification.kernels import mean_embedding
from learnware_jax.specification.reduce import reduce_many
from learnware_jax.specification.rkme import RKME, from_rows

DIGITS = 8
# What a learnware's vector is fitted to -> what a user's is: they have no model of their own.
TARGETS = {"answers": "answers", "outputs": "answers", "prompts": "prompts"}


class Contended(NamedTuple):
    """Scores of every contender, and what is needed to use and to judge them.

    scores: (users, seeds, learnwares), higher is closer. nearest: (users, seeds), the distance to
    the closest learnware; threshold: that beyond which none fits. drawn: the places of a user's
    rows, by seed. mixture, of the first seed, and routed: for every test row the learnware of the
    mixture that has most mass there.
    """

    scores: dict[str, np.ndarray]
    nearest: dict[str, np.ndarray]
    threshold: dict[str, float]
    costs: dict[str, dict]
    drawn: dict[str, list[np.ndarray]]
    mixture: list[Mixture]
    routed: list[np.ndarray]


class Compared(NamedTuple):
    """Distances of a kind of specification: of users, and of learnwares among themselves."""

    users: np.ndarray  # (users, seeds, M)
    learnwares: np.ndarray  # (M, M)


def contend(
    dock: OpenDock,
    made,
    users,
    said,
    outputs: dict[str, list[str]],
    reference: Reference,
    config: ConfigDict,
    clock: Callable[[], None],
) -> Contended:
    """Specify every learnware and user in every way, and compare them."""
    drawn = {user.task.name: draw(user, config) for user in users}
    kinds, mixtures, routed = of_texts(dock, made, users, drawn, outputs, config)
    kinds |= of_vectors(made, users, drawn, outputs, reference, config, clock)
    costs = costs_of(dock, users, said, reference, config)
    # To the digits that distances have: learnwares of one specification are tied.
    scores = {name: -compared.users.round(DIGITS) for name, compared in kinds.items()}
    seeds = len(config.seeds)
    for name, values in (
        ("metadata", by_metadata(dock, users)),
        ("loss", by_loss(dock, users, said, config)),
    ):
        scores[name] = np.repeat(values[:, None], seeds, 1)
    # One learnware a task: copies would count a task more than once.
    first = {one.task.name: m for m, one in reversed(list(enumerate(made)))}.values()
    domains = np.array([made[m].task.domain for m in first])
    threshold = {
        name: threshold_of(
            compared.learnwares[np.ix_(list(first), list(first))], domains, config.false_acceptance
        )
        for name, compared in kinds.items()
    }
    nearest = {name: compared.users.min(2) for name, compared in kinds.items()}
    return Contended(scores, nearest, threshold, costs, drawn, mixtures, routed)


def ranking_of(contended: Contended, name: str, user: int) -> np.ndarray:
    """Scores of the learnwares (M,) for a user's first seed."""
    return contended.scores[name][user, 0]


def specified_rows(one, config: ConfigDict) -> list[Example]:
    """The rows that a learnware is specified by: the first that it was trained on."""
    return one.rows[: config.texts]


def draw(user, config: ConfigDict) -> list[np.ndarray]:
    """For every seed, the places of the rows that a user has."""
    return [
        np.random.default_rng([seed, zlib.crc32(user.task.name.encode())]).permutation(
            len(user.rows)
        )[: config.user_rows]
        for seed in config.seeds
    ]


def threshold_of(distance: np.ndarray, domains: np.ndarray, rate: float) -> float:
    """The distance beyond which none fits: every learnware plays a user of a domain left out."""
    others = np.where(domains[:, None] != domains, distance, np.inf).min(1)
    return calibrate_threshold(others, false_acceptance=rate)


# ---- specifications of embedded texts


def of_texts(dock: OpenDock, made, users, drawn, outputs, config):
    """RKMEs of texts, their plain means, and RKMEs of texts with answers; also mixtures."""
    parts = embed_parts(
        dock.encoder,
        [[row.text for row in rows] for user in users for rows in (user.rows, user.test)],
        dock.space,
        keep=True,
    )
    rows, tests = parts[::2], parts[1::2]
    mine = [
        [from_rows(x[places]) for places in drawn[user.task.name]]
        for user, x in zip(users, rows, strict=True)
    ]
    docked = [learnware.spec for learnware in dock.learnwares]
    kinds = {
        "mean_cosine": cosines(mine, docked),
        "rkme": mmds(mine, docked, dock.kernel, dock.pool.n[: len(docked)].tolist()),
    }
    texts = {
        one.id: embed_texts(dock.encoder, [row.text for row in given], dock.space, keep=True)
        for one, given in ((one, specified_rows(one, config)) for one in made)
    }
    words = sorted(
        {choice for user in users for choice in user.rows[0].choices}
        | {choice for one in made for choice in specified_rows(one, config)[0].choices}
    )
    word = dict(zip(words, embed_texts(dock.encoder, words, dock.space, keep=True), strict=True))
    asked = [
        beside(x, [row.answer for row in user.rows], word, config)
        for user, x in zip(users, rows, strict=True)
    ]
    joint = [
        [from_rows(x[places]) for places in drawn[user.task.name]]
        for user, x in zip(users, asked, strict=True)
    ]
    for target in ("answers", "outputs"):
        given = {
            one.id: [row.answer for row in specified_rows(one, config)]
            if target == "answers"
            else outputs[one.id]
            for one in made
        }
        together = [beside(texts[one.id], given[one.id], word, config) for one in made]
        reduced = reduce_many(
            jax.random.key(config.seed),
            together,
            config.specification.points,
            dock.kernel,
            **reducer_options(config.specification),
        )
        specs, counts = [r.spec for r in reduced], [r.n for r in reduced]
        kinds[f"joint_rkme_{target}"] = mmds(joint, specs, dock.kernel, counts)
        if target == "answers":
            kinds["mean_cosine_answers"] = cosines(joint, specs)
    mixtures, routed = [], []
    rng = np.random.default_rng(config.seed)
    for each, x in zip(mine, tests, strict=True):
        # In an order of chance: of learnwares of one specification the first would be taken.
        order = rng.permutation(len(docked))
        pool = build_pool(
            [docked[i] for i in order],
            dock.kernel,
            ids=[dock.pool.ids[i] for i in order],
            n=dock.pool.n[order].tolist(),
            residual=dock.pool.residual[order].tolist(),
        )
        mixture = greedy_mixture(each[0], pool, max_size=config.mixture)
        places = np.array([dock.pool.ids.index(id) for id in mixture.ids])
        specs = [dock.learnwares[i].spec for i in places]
        witness = [np.asarray(mean_embedding(dock.kernel, x, s.z, s.beta)) for s in specs]
        mixtures.append(mixture)
        routed.append(places[np.argmax(witness, axis=0)])
    return kinds, mixtures, routed


def beside(x: np.ndarray, answers: Sequence[str], word: dict, config: ConfigDict) -> np.ndarray:
    """Embedded texts with their answers' embeddings beside them, (n, 2d).

    A Gaussian kernel of these is the product of one of texts and one of answers: the mean embedding
    is that of their joint law.
    """
    return np.concatenate([x, config.answer_weight * np.stack([word[a] for a in answers])], 1)


def mmds(users, docked: Sequence[RKME], kernel, n: Sequence[int]) -> Compared:
    """Unbiased squared MMD."""
    pool = build_pool(
        docked, kernel, ids=[str(i) for i in range(len(docked))], n=n, residual=[0.0] * len(docked)
    )
    flat = [spec for each in users for spec in each]
    found = distances(flat, pool, n=[len(spec.beta) for spec in flat])
    return Compared(found.reshape(len(users), -1, len(docked)), distances(docked, pool, n=list(n)))


def cosines(users, docked: Sequence[RKME]) -> Compared:
    """Less the cosine of means, centred by the dock's."""
    flat = [spec for each in users for spec in each]
    found = -baselines.mean_cosine(flat, docked)
    return Compared(
        found.reshape(len(users), -1, len(docked)), -baselines.mean_cosine(docked, docked)
    )


# ---- specifications by a reference model


def of_vectors(made, users, drawn, outputs, reference: Reference, config: ConfigDict, clock):
    """Parameter vectors and one-step gradients, by centred cosine."""
    kinds, fit = {}, pave.Settings(**config.fit)
    own = {
        target: [
            _vectors(
                f"user-{user.task.name}-{target}",
                [(row.text, row.answer) for row in user.rows],
                target,
                [Sample(p, s) for p, s in zip(drawn[user.task.name], config.seeds, strict=True)],
                reference,
                fit,
                config,
                clock,
            )
            for user in users
        ]
        for target in ("answers", "prompts")
    }
    for target, of_user in TARGETS.items():
        docked = []
        for one in made:
            rows = specified_rows(one, config)[: config.vector_rows]
            answers = (
                outputs[one.id][: config.vector_rows]
                if target == "outputs"
                else [row.answer for row in rows]
            )
            pairs = [(row.text, answer) for row, answer in zip(rows, answers, strict=True)]
            sample = [Sample(np.arange(len(pairs)), config.seed)]
            name = f"learnware-{one.id}-{target}"
            docked.append(_vectors(name, pairs, target, sample, reference, fit, config, clock))
        for i, family in enumerate(("pave", "one_step")):
            kinds[f"{family}_{target}"] = cosines(
                [[pave.mean_embedding_of(row[None]) for row in v[i]] for v in own[of_user]],
                [pave.mean_embedding_of(v[i]) for v in docked],
            )
    return kinds


def _vectors(name, pairs, target, samples, reference, fit, config, clock):
    """Parameter vectors and one-step gradients of samples of rows, (samples, p) each; kept."""
    texts = texts_of(reference, pairs, target)
    options = {"together": config.reference.together, "row_width": config.row_sketch}
    drawn = [[sample.places.tolist(), sample.seed] for sample in samples]
    content = json.dumps([space_of(reference, target), fit, texts, drawn, options], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()

    def make():
        clock()
        made = make_vectors(reference, texts, samples, settings=fit, **options)
        say(f"{name}: {len(texts)} rows, {len(samples)} vectors, {made.seconds.sum():.0f} s.")
        # The rest is four times as large, and not read here.
        return made._replace(fisher=made.fisher[:, :0], rows=made.rows[:, :0])

    # By what is in it: learnwares of the same rows and answers share one.
    file = Path(config.workdir) / "vectors" / f"{digest[:24]}.safetensors"
    kept = keep_vectors(file, digest, make)
    return kept.pave, kept.one_step


# ---- without specifications of data


def by_metadata(dock: OpenDock, users) -> np.ndarray:
    """BM25 of a description of the user's task, its labels too, among the cards; (users, M)."""
    cards = [learnware.card for learnware in dock.learnwares]
    texts = [f"{c['domain']} {c['description']} {c['instruction']}" for c in cards]
    shown = baselines.Dock(texts, [learnware.spec for learnware in dock.learnwares], None, None)
    values = []
    for user in users:
        query = f"{user.task.domain} {user.task.description} {user.task.instruction}"
        one = baselines.User(
            [query], np.zeros((1, dock.space["dimension"]), np.float32), None, None
        )
        values.append(baselines.BASELINES["bm25"].score(one, shown))
    return np.stack(values)


def by_loss(dock: OpenDock, users, said, config: ConfigDict) -> np.ndarray:
    """Mean log-likelihood of the right answers of a user's first `graded_rows` rows; (users, M)."""
    values = np.zeros((len(users), len(dock.pool.ids)))
    for u, user in enumerate(users):
        rows = user.rows[: config.graded_rows]
        places = [row.choices.index(row.answer) for row in rows]
        for m, id in enumerate(dock.pool.ids):
            values[u, m] = said[id].user[user.task.name][np.arange(len(rows)), places].mean()
    return values


# ---- what they cost


def costs_of(dock: OpenDock, users, said, reference, config: ConfigDict) -> dict[str, dict]:
    """Seconds, bytes and passes of a language model for one user; measured once and kept.

    make_seconds: to specify a user with `user_rows` rows; rank_seconds: to rank the dock. bytes:
    what a learnware publishes. Programs are compiled before.
    """
    n, m = config.user_rows, len(dock.pool.ids)
    d, points = dock.space["dimension"], config.specification.points
    p = space_of(reference, "answers")["dimension"]
    measured = _measured(dock, users, reference, config)
    per_row = np.mean([each.seconds for each in said.values()])
    none = {"make_seconds": 0.0, "rank_seconds": 0.0, "bytes": 0, "forward_passes": 0}
    costs = {
        "metadata": none,
        "loss": none
        | {
            "rank_seconds": float(per_row * config.graded_rows * m),
            "forward_passes": config.graded_rows * m,
        },
        "mean_cosine": none
        | {
            "make_seconds": measured["embed"],
            "rank_seconds": measured["cosine"],
            "bytes": 4 * d,
        },
    }
    costs["mean_cosine_answers"] = costs["mean_cosine"] | {"bytes": 8 * d}
    for name, size in (("rkme", d), ("joint_rkme_answers", 2 * d), ("joint_rkme_outputs", 2 * d)):
        costs[name] = none | {
            "make_seconds": measured["embed"],
            "rank_seconds": measured["mmd"],
            "bytes": points * (4 * size + 4),
        }
    for target, of_user in TARGETS.items():
        for family, fit in (("pave", measured["fit"]), ("one_step", 0.0)):
            costs[f"{family}_{target}"] = {
                "make_seconds": measured[of_user] + fit,
                "rank_seconds": measured["vectors"],
                "bytes": 4 * p,
                "forward_passes": n,
            }
    return costs


def _measured(dock: OpenDock, users, reference, config: ConfigDict) -> dict[str, float]:
    file = Path(config.workdir) / "costs.json"
    parts = (config.model, config.reference, config.fit, config.specification)
    of = json.loads(
        json.dumps([len(dock.pool.ids), config.user_rows, *(part.to_dict() for part in parts)])
    )
    if file.exists() and (kept := json.loads(file.read_text()))["of"] == of:
        return kept["seconds"]
    rows = users[0].rows[: config.user_rows]
    texts = [row.text for row in rows]

    def seconds(work):
        work()
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    found = {"embed": seconds(lambda: embed_texts(dock.encoder, texts, dock.space, keep=False))}
    spec = from_rows(embed_texts(dock.encoder, texts, dock.space, keep=False))
    docked = [learnware.spec for learnware in dock.learnwares]
    found["mmd"] = seconds(lambda: distances([spec], dock.pool, n=[len(texts)]))
    found["cosine"] = seconds(lambda: baselines.mean_cosine([spec], docked))
    for target in ("answers", "prompts"):
        asked = texts_of(reference, [(row.text, row.answer) for row in rows], target)
        found[target] = seconds(
            lambda asked=asked: row_gradients(reference, asked, together=config.reference.together)
        )
    options = {"together": config.reference.together, "row_width": config.row_sketch}
    one = [Sample(np.arange(2), 0)]
    fits = [
        make_vectors(reference, asked[:2], one, settings=pave.Settings(**config.fit), **options)
        for _ in range(2)
    ]
    found["fit"] = float(fits[1].seconds[1])
    vector = pave.mean_embedding_of(fits[1].pave)
    found["vectors"] = seconds(
        lambda: baselines.mean_cosine([vector], [vector] * len(dock.pool.ids))
    )
    write_json(file, {"of": of, "seconds": found})
    return found
