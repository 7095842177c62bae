"""A dock with one learnware that cheats: which rankings fall for it, and what finds it.

Example: python -m experiments.gamed --config=configs/gamed.py:quickstart
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("gamed")

import functools
import hashlib
import json
import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.common import bar, dock_line, embed_texts, named, reducer_options, say, write_json
from experiments.models import (
    dock_adapters,
    encode,
    labelled_of,
    open_model,
    prompt_of,
    template_of,
)
from experiments.ranking import OpenDock, open_dock
from experiments.vectors import (
    Reference,
    Sample,
    keep_vectors,
    make_vectors,
    open_reference,
    texts_of,
)
from experiments.vectors import space_of as vector_space
from learnware_jax import figures
from learnware_jax.dock.examples import cut
from learnware_jax.dock.labelled import LABELLED, Example, LabelledTask, load_examples
from learnware_jax.dock.tasks import TASKS, load_task
from learnware_jax.selection import baselines
from learnware_jax.selection.genuine import (
    among_others,
    herd_distinct,
    lowest_honest,
    rank_p_value,
    told,
)
from learnware_jax.selection.mixture import greedy_mixture
from learnware_jax.selection.pool import biased_self_terms, build_pool
from learnware_jax.selection.ranking import cross_deficits, distances
from learnware_jax.slm.decoder import Adapter, forward, logits
from learnware_jax.slm.weights import Model
from learnware_jax.specification import pave
from learnware_jax.specification.header import believed_rows
from learnware_jax.specification.kernels import Kernel, gram
from learnware_jax.specification.reduce import reduce
from learnware_jax.specification.rkme import RKME, from_rows

BASE, NOISE, BROAD = "base", "noise", "broad"
NOTES_RANKED = (
    "Per cent of users to whom the attacker comes first: of the dock's tasks / of its domains (and",
    "the accuracy, in points, that the former lose, if its model is the base model). none: the",
    "learnware of their own task first. Users have a copier of the learnware that is closest.",
)
NOTES_CHECKED = (
    "told: how well a model tells texts herded from the specification apart, 0 to 1. Per cent that",
    "is flagged. threshold: told is below all development learnwares', claims of the others alone.",
    "models: a model of the dock tells as much under that card. texts: the model tells as much of",
    "another's texts.",
)
NOTES_ALONE = (
    "Squared MMD to the closest mixture of the dock's others; per cent flagged, below all",
    "development learnwares'.",
)


class Published(NamedTuple):
    """What a learnware says of itself."""

    id: str
    spec: RKME
    n: int  # rows that it says are behind its specification
    card: str
    vector: np.ndarray  # (p,): a parameter vector


class User(NamedTuple):
    """Rows drawn from a task, embedded, and their parameter vector."""

    task: LabelledTask
    kind: str  # same: a learnware was trained for the task; near: for its domain
    texts: list[str]
    x: np.ndarray
    vector: np.ndarray


# ---- what attackers publish


def attacks_of(honest: Sequence[Published], kernel: Kernel, config: ConfigDict) -> dict:
    """Attackers by name; of copies one a victim, in the order of the dock.

    broad: the reduced set of all specifications together. hub: see `hub`. copy, and near copy with
    noise. scaled: a near copy with points and vector `scale` times as long. few rows: copies and
    hubs that say they stand for 2 rows. two points: as broad, of 2 points and said to be of 2 rows.
    """
    rng = np.random.default_rng(config.seed)
    key_broad, key_hub = jax.random.split(jax.random.key(config.seed))
    specs, m = [one.spec for one in honest], config.specification.points
    union = np.concatenate([np.asarray(s.z) for s in specs])
    weights = np.concatenate([np.asarray(s.beta) for s in specs]) / len(specs)
    options = {"weights": weights, **reducer_options(config.specification)}
    broad, pair = (reduce(key_broad, union, points, kernel, **options) for points in (m, 2))
    mean = np.mean([one.vector for one in honest], 0)
    words = " ".join(dict.fromkeys(" ".join(one.card for one in honest).split()))
    everyone = Published(
        "attacker", broad.spec, sum(one.n for one in honest), words, mean / np.linalg.norm(mean)
    )
    central = everyone._replace(spec=hub(key_hub, specs, kernel, m, config.hub))

    def near(one):
        z = noisy(rng, np.asarray(one.spec.z), config.noise)
        vector = noisy(rng, one.vector[None], config.noise)[0]
        card = f"{one.card} and more"
        return one._replace(id="attacker", spec=RKME(z, one.spec.beta), card=card, vector=vector)

    nears = [near(one) for one in honest]

    def longer(one):
        spec = one.spec._replace(z=config.scale * np.asarray(one.spec.z))
        return one._replace(spec=spec, vector=config.scale * one.vector)

    return {
        "broad": [everyone],
        "hub": [central],
        "copy": [one._replace(id="attacker") for one in honest],
        "near copy": nears,
        "scaled": [longer(one) for one in nears],
        "two points": [everyone._replace(spec=pair.spec, n=2)],
        "hub, few rows": [central._replace(n=2)],
        "near copy, few rows": [one._replace(n=2) for one in nears],
    }


def noisy(rng: np.random.Generator, rows: np.ndarray, noise: float) -> np.ndarray:
    """Unit rows moved by about `noise` in a random direction, and of unit norm again."""
    moved = rows + noise * rng.standard_normal(rows.shape) / np.sqrt(rows.shape[1])
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def hub(key, specs: Sequence[RKME], kernel: Kernel, m: int, settings: ConfigDict) -> RKME:
    """m points on the sphere that rank as high as possible for whoever resembles a learnware.

    Adam lowers the mean over `specs` of softplus((d - r) / t): d is the squared MMD to the
    attacker, r to the nearest other one, its strongest rival for users between the two, and t a
    quarter of the mean r.
    """
    z, beta = (jnp.asarray(np.stack(list(part)), jnp.float32) for part in zip(*specs, strict=True))

    def inner(a, u, b, v):
        return u @ gram(kernel, a, b) @ v

    cross = jax.vmap(lambda a, u: jax.vmap(lambda b, v: inner(a, u, b, v))(z, beta))(z, beta)
    own = jnp.diagonal(cross)
    apart = own[:, None] + own - 2 * cross
    rival = jnp.where(jnp.eye(len(specs), dtype=bool), jnp.inf, apart).min(1)

    def published(params):
        points, scores = params
        norms = jnp.linalg.norm(points, axis=1, keepdims=True)
        return points / norms, jax.nn.softmax(scores)

    def loss(params):
        points, weights = published(params)
        to_all = jax.vmap(lambda b, v: inner(points, weights, b, v))(z, beta)
        distance = inner(points, weights, points, weights) + own - 2 * to_all
        return jax.nn.softplus((distance - rival) / (rival.mean() / 4)).mean()

    update = optax.adam(settings.rate)
    start = z.reshape(-1, z.shape[2])[jax.random.choice(key, z.shape[0] * z.shape[1], (m,))]
    params = start, jnp.zeros(m)

    def step(carry, _):
        params, state = carry
        change, state = update.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, change), state), None

    (params, _), _ = jax.lax.scan(step, (params, update.init(params)), length=settings.steps)
    points, weights = map(np.asarray, published(params))
    weights = weights.astype(np.float64)
    return RKME(points, weights / weights.sum())


# ---- users, and what everybody publishes


@functools.cache
def examples_of(name: str, part: str, limit: int | None) -> list[Example]:
    """`load_examples`, which reads a whole source, once."""
    return load_examples(name, part, limit)


def users_of(dock: OpenDock, reference: Reference, config: ConfigDict) -> list[User]:
    """The users of every task, one a seed; of a task they have one vector. No learnware was trained
    on their rows."""
    users = []
    for kind in ("same", "near"):
        for task in labelled_of(config.users[kind]):
            examples = examples_of(task.name, "user", config.user_pool)
            texts = [example.text for example in examples]
            x = embed_texts(dock.encoder, texts, dock.space, keep=True)
            few = examples[: config.user_vector_rows]
            vector = vector_of(f"user-{task.name}", few, reference, config)
            for seed in config.seeds:
                rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
                rows = rng.permutation(len(x))[: config.user_rows]
                users.append(User(task, kind, [texts[i] for i in rows], x[rows], vector))
    return users


def honest_of(dock: OpenDock, reference: Reference, config: ConfigDict) -> list[Published]:
    """What the learnwares of the dock publish."""
    found = []
    for one in dock.learnwares:
        examples = examples_of(one.id, "train", config.vector_rows)
        vector = vector_of(f"learnware-{one.id}", examples, reference, config)
        card = f"{one.card['name']} {one.card['domain']} {one.card['description']}"
        found.append(Published(one.id, one.spec, one.header.about.get("n", 1), card, vector))
    return found


def vector_of(
    name: str, examples: Sequence[Example], reference: Reference, config: ConfigDict
) -> np.ndarray:
    """The parameter vector fitted to examples, (p,); kept by content."""
    fit = pave.Settings(**config.fit)
    pairs = [(example.text, example.answer) for example in examples]
    texts = texts_of(reference, pairs, "answers")
    rows = np.arange(len(texts))
    content = [vector_space(reference, "answers"), fit, texts, [rows.tolist()]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def make():
        say(f"{name}: gradients of {len(texts)} rows.")
        options = {"settings": fit, "together": config.reference.together, "row_width": 16}
        made = make_vectors(reference, texts, [Sample(rows, config.seed)], **options)
        # Only the fit is read here.
        return made._replace(fisher=made.fisher[:, :0])

    file = Path(config.workdir) / "vectors" / f"{name}.safetensors"
    return keep_vectors(file, digest, make).pave[0]


# ---- who comes first


def scores_of(
    users: Sequence[User], dock: Sequence[Published], kernel: Kernel, mixture: int
) -> dict[str, np.ndarray]:
    """Scores of every way to rank, (users, learnwares), higher is closer.

    mixture: the weight in a greedy mixture of at most so many. Equal to 6 digits is equal: float32
    rounding must not part a copy from its original.
    """
    specs = [one.spec for one in dock]

    def pool_of(n):
        ids = [str(i) for i in range(len(dock))]
        return build_pool(specs, kernel, ids=ids, n=n, residual=[0.0] * len(dock))

    pool = pool_of([one.n for one in dock])
    believed = pool_of([believed_rows(one.n, len(one.spec.beta)) for one in dock])
    rows, sizes = [from_rows(user.x) for user in users], [len(user.x) for user in users]
    given = np.stack([user.vector for user in users])
    vectors = np.stack([one.vector for one in dock])
    center = vectors.mean(0)
    found = {
        "mmd, unbiased": -distances(rows, pool, n=sizes),
        # As experiments.select and search rank a dock.
        "mmd, guarded": -distances(rows, believed, n=sizes),
        "mmd, biased": 2 * cross_deficits(rows, pool) - biased_self_terms(pool),
        "mixture": np.stack([_weights(one, pool, mixture) for one in rows]),
        "cosine": cosines(_means(rows), _means(specs)),
        "centred cosine": baselines.mean_cosine(rows, specs),
        "vector product": given @ vectors.T,
        "vector cosine": cosines(given, vectors),
        "centred vector cosine": cosines(given - center, vectors - center),
    }
    shown = baselines.Dock([one.card for one in dock], specs, None, None)
    asking = [baselines.User(user.texts, user.x, None, None) for user in users]
    for name in ("energy", "bm25"):
        score = baselines.BASELINES[name].score
        found[name] = np.stack([score(one, shown) for one in asking])
    return {name: values.round(6) for name, values in found.items()}


def _weights(spec: RKME, pool, size: int) -> np.ndarray:
    mixture = greedy_mixture(spec, pool, max_size=size)
    weights = np.zeros(len(pool.ids))
    weights[[int(i) for i in mixture.ids]] = mixture.weights
    return weights


def _means(specs: Sequence[RKME]) -> np.ndarray:
    return np.stack([np.asarray(spec.beta) @ np.asarray(spec.z) for spec in specs])


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosines of rows, (n, k)."""
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    return x @ y.T


def first(scores: np.ndarray) -> np.ndarray:
    """Shares of the first place, (users, k): those of equal score share it."""
    best = scores == scores.max(-1, keepdims=True)
    return best / best.sum(-1, keepdims=True)


def in_top(scores: np.ndarray, k: int) -> np.ndarray:
    """Whether the last one is among the first k, (users,): half of its equals stand before it."""
    own = scores[:, -1:]
    before = (scores[:, :-1] > own).sum(1) + (scores[:, :-1] == own).sum(1) / 2
    return before < k


def attacked(users: Sequence[User], honest, attackers, victims, kernel, mixture) -> dict:
    """Scores by method, (users, honest and the attacker); of several attackers each user meets the
    one that copies their victim."""
    if len(attackers) == 1:
        return scores_of(users, [*honest, attackers[0]], kernel, mixture)
    found = {}
    for i in sorted(set(victims)):
        places = np.flatnonzero(victims == i)
        some = [users[j] for j in places]
        for name, values in scores_of(some, [*honest, attackers[i]], kernel, mixture).items():
            kept = found.setdefault(name, np.zeros((len(users), len(honest) + 1)))
            kept[places] = values
    return found


def fooled(users, honest, attacks, truth, kernel: Kernel, config: ConfigDict) -> list[dict]:
    """A row for every attack and method: means over users, and standard errors over tasks.

    first: share of users to whom the attacker is first; top3: among the first three; own: to whom
    the learnware of their own task is (of users who have one). lost: share of right answers that
    users lose against the dock without the attacker, whose model is the base model.
    """
    clean = scores_of(users, honest, kernel, config.mixture)
    victims = clean["mmd, unbiased"].argmax(1)
    ids = [one.id for one in honest]
    rows = []
    for attack, attackers in ({"none": []} | attacks).items():
        scores = (
            attacked(users, honest, attackers, victims, kernel, config.mixture)
            if attackers
            else clean
        )
        for method, values in scores.items():
            if not attackers:  # nobody stands in the last place
                values = np.concatenate([values, np.full((len(users), 1), -np.inf)], 1)
            shares = first(values)
            worth = truth_of(users, ids, truth)
            before = (first(clean[method]) * worth[:, :-1]).sum(1)
            for kind in dict.fromkeys(user.kind for user in users):
                of = np.array([user.kind == kind for user in users])
                measured = {
                    "first": shares[:, -1],
                    "top3": in_top(values, 3).astype(float),
                    "lost": before - (shares * worth).sum(1),
                }
                if kind == "same":
                    own = [
                        ids.index(user.task.name) if user.kind == "same" else 0 for user in users
                    ]
                    measured["own"] = shares[np.arange(len(users)), own]
                row = {"attack": attack, "method": method, "users": kind}
                for name, value in measured.items():
                    row[name], row[f"{name}_stderr"] = by_task(users, value, of)
                rows.append(row)
    return rows


def truth_of(users: Sequence[User], ids, truth: dict) -> np.ndarray:
    """Accuracy of every learnware, and of the attacker's base model, (users, k + 1)."""
    return np.array([[truth[user.task.name][id] for id in [*ids, BASE]] for user in users])


def by_task(users: Sequence[User], values: np.ndarray, of: np.ndarray) -> tuple[float, float]:
    """Mean over tasks of the means over their users in `of`, and its standard error."""
    names = np.array([user.task.name for user in users])
    means = np.array([values[of & (names == name)].mean() for name in sorted(set(names[of]))])
    spread = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else 0.0
    return float(means.mean()), float(spread)


def read_truth(path: str, tasks: Sequence[LabelledTask], ids: Sequence[str]) -> dict:
    """Accuracies {task: {learnware or base: share of right answers}} out of the results of
    experiments.evaluate. ValueError for a task or a learnware that is not there."""
    rows = {row["task"]: row["accuracy"] | {BASE: row["base"]} for row in _json(path)["tasks"]}
    missing = {task.name for task in tasks} - set(rows)
    missing |= {id for id in ids if any(id not in row for row in rows.values())}
    if missing:
        raise ValueError(
            f"gamed: {path} has no accuracy for {', '.join(sorted(missing))}; name results of "
            "experiments.evaluate for this dock and these users."
        )
    return rows


def _json(path):
    return json.loads(Path(path).read_text())


# ---- is a model what its specification says?


class Claim(NamedTuple):
    """What an owner says that a model does, and texts herded from the specification."""

    id: str
    instruction: str
    labels: list[str]
    texts: list[str]


class Corpus(NamedTuple):
    """Public texts, cut as those of learnwares are, and embedded."""

    texts: list[str]
    materials: list[str]  # where each is from
    x: np.ndarray


def open_corpus(dock: OpenDock, config: ConfigDict) -> Corpus:
    """Texts of the catalogue that no learnware of the dock was trained on."""
    trained = {
        example.text for one in dock.learnwares for example in examples_of(one.id, "train", None)
    }
    found = {}
    for task in TASKS.values():
        if task.role in config.corpus.roles:
            for text in map(cut, load_task(task.name, config.corpus.texts)):
                if text not in trained:
                    found.setdefault(text, task.material)
    texts = list(found)
    x = embed_texts(dock.encoder, texts, dock.space, keep=True)
    return Corpus(texts, list(found.values()), x)


def claim_of(id, card, spec: RKME, corpus: Corpus, kernel, config, without: str = "") -> Claim:
    """A claim with texts of the corpus, none of the material `without`."""
    kept = np.array([i for i, name in enumerate(corpus.materials) if name != without])
    picks = kept[herd_distinct(spec, kernel, corpus.x[kept], config.herded)]
    texts = [corpus.texts[i][: config.characters] for i in picks]
    return Claim(id, card["instruction"], list(card.get("labels", ())), texts)


def told_by(model: Model, template, adapter: Adapter, claim: Claim, texts, config) -> float:
    """`genuine.told` of the texts by the base model with an adapter, prompted as the claim says."""
    prompts = [prompt_of(model, template, claim.instruction, text) for text in texts]
    labels = list(dict.fromkeys(encode(model, f" {label}")[0] for label in claim.labels))
    return told(next_tokens(model, prompts, adapter, config.scoring), labels)


def next_tokens(model: Model, prompts, adapter: Adapter, settings: ConfigDict) -> np.ndarray:
    """Probabilities of every token after each prompt, (n, vocabulary)."""
    found = np.zeros((len(prompts), model.config.vocabulary), np.float32)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    for i in range(0, len(prompts), settings.batch):
        places = order[i : i + settings.batch]
        width = -(-max(len(prompts[j]) for j in places) // 16) * 16  # few shapes to compile
        ids = np.zeros((settings.batch, width), np.int32)
        lengths = np.ones(settings.batch, np.int32)
        for row, j in enumerate(places):
            ids[row, : len(prompts[j])], lengths[row] = prompts[j], len(prompts[j])
        p = _next(model.params, ids, lengths, adapter, config=model.config, dtype=settings.dtype)
        found[places] = np.asarray(p)[: len(places)]
    return found


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _next(params, ids, lengths, adapter, *, config, dtype):
    hidden, _ = forward(params, ids, config=config, adapter=adapter, dtype=dtype)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], 1)[:, 0]
    return jax.nn.softmax(logits(params, last, config=config, dtype=dtype))


def useless(adapters: Adapter, ids: Sequence[str], seed: int) -> dict[str, Adapter]:
    """Adapters by name that no task is done with: none, noise of the sizes of a learnware's, and
    for every learnware its own with the layers of B in the opposite order."""
    one = jax.tree.map(lambda leaf: leaf[0], adapters)
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(one.a)))

    def noise(leaf):
        scale = jnp.std(leaf, axis=(1, 2), keepdims=True)
        return scale * jax.random.normal(next(keys), leaf.shape)

    found = {
        BASE: jax.tree.map(jnp.zeros_like, one),
        NOISE: one._replace(
            a={name: noise(leaf) for name, leaf in one.a.items()},
            b={name: noise(leaf) for name, leaf in one.b.items()},
        ),
    }
    for k, id in enumerate(ids):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], adapters)
        found[f"turned {id}"] = own._replace(b={n: leaf[::-1] for n, leaf in own.b.items()})
    return found


def ask(dock: OpenDock, model: Model, broad: RKME, template, config: ConfigDict) -> dict:
    """`told` of models, claims and texts: {"MODEL|CLAIM|TEXTS": share}; kept, and gone on with.

    Under every claim its own model, the `others` behind it in the dock and useless ones; the own
    one also on the texts of these others and ("far") on texts that are of other materials than its.
    Under a broad claim every model.
    """
    ids, adapters = dock_adapters(dock.path, dock.learnwares, model, template)
    models = {id: jax.tree.map(lambda leaf, k=k: leaf[k], adapters) for k, id in enumerate(ids)}
    models |= useless(adapters, ids, config.seed)
    corpus = open_corpus(dock, config)
    claims, far = {}, {}
    for one in dock.learnwares:
        material = LABELLED[one.id].material
        claims[one.id] = claim_of(one.id, one.card, one.spec, corpus, dock.kernel, config)
        far[one.id] = claim_of(one.id, one.card, one.spec, corpus, dock.kernel, config, material)
    claims[BROAD] = claim_of(BROAD, config.broad_card, broad, corpus, dock.kernel, config)
    jobs = []
    for id, claim in claims.items():
        if id in ids:
            rivals = after(id, ids, config.others)
            jobs += [(name, id, id, claim.texts) for name in (id, *rivals, f"turned {id}")]
            jobs += [(id, id, other, claims[other].texts) for other in rivals]
            jobs += [(id, id, "far", far[id].texts)]
        else:
            jobs += [(name, id, id, claim.texts) for name in ids]
        jobs += [(name, id, id, claim.texts) for name in (BASE, NOISE)]
    file = Path(config.workdir) / "told.json"
    content = [claims, far, [one.card for one in dock.learnwares], config.scoring.to_dict()]
    of = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    kept = _json(file) if file.exists() else {}
    found = kept["told"] if kept.get("of") == of else {}
    with bar("models asked", len(jobs)) as advance:
        asked = {}
        for name, id, of_texts, texts in jobs:
            key = f"{name}|{id}|{of_texts}"
            if key not in found:
                found[key] = told_by(model, template, models[name], claims[id], texts, config)
                write_json(file, {"of": of, "told": found})
            asked[key] = found[key]
            advance(1)
    return asked


def after(id: str, ids: Sequence[str], count: int) -> list[str]:
    """The `count` ids behind one, and on from the first; not itself."""
    place = ids.index(id)
    return [*ids[place + 1 :], *ids[:place]][:count]


def judge(found: dict, ids: Sequence[str], rate: float) -> dict:
    """Who is flagged by which test: {"threshold", "development", "rows": [{"who", "claims", ...}]}.

    Development learnwares, every other one, set the threshold of `told`; threshold_flagged is of
    claims of the others. not_first_of_models: another model of the dock tells the claim's texts
    apart as well under its card; not_first_of_texts: the model tells others' texts apart as well as
    those of its specification. Shares; None where it is not known. A model without relation to its
    claim passes with a probability of one in as many models, or texts, as are compared.
    """
    development = ids[::2]

    def said(name, id, texts):
        return found[f"{name}|{id}|{texts}"]

    own = {id: said(id, id, id) for id in ids}
    threshold = lowest_honest([own[id] for id in development], rate)

    def known(name, id, texts):
        return f"{name}|{id}|{texts}" in found

    def later(value, rivals):
        """Whether it is not the first of these, which a stranger would be once in so many times."""
        return rank_p_value(value, rivals) > 1 / (1 + len(rivals))

    def of_models(name, id):
        rivals = [other for other in ids if other != name and known(other, id, id)]
        return later(said(name, id, id), [said(other, id, id) for other in rivals])

    def of_texts(id, texts):
        rivals = [other for other in ids if other != texts and known(id, id, other)]
        return later(said(id, id, texts), [said(id, id, other) for other in rivals])

    def row(who, claims, values, models=(), texts=()):
        """`claims` names, for every value, the claim that it is of."""
        kept = [v for v, id in zip(values, claims, strict=True) if id not in development]
        return {
            "who": who,
            "told": [float(v) for v in values],
            "threshold_flagged": float(np.mean(np.array(kept) < threshold)),
            "threshold_count": len(kept),
            "not_first_of_models": float(np.mean(models)) if models else None,
            "not_first_of_texts": float(np.mean(texts)) if texts else None,
        }

    def copies(who, models):
        """Rows of copied specifications and cards, with models(claim) in place of the right one."""
        pairs = [(name, id) for id in ids for name in models(id)]
        return row(
            who,
            [id for _, id in pairs],
            [said(name, id, id) for name, id in pairs],
            [of_models(name, id) for name, id in pairs],
        )

    foreign = [(id, texts) for id in ids for texts in ids if texts != id and known(id, id, texts)]
    everybody = [*ids, BASE, NOISE]
    rows = [
        row(
            "honest",
            ids,
            list(own.values()),
            [of_models(id, id) for id in ids],
            [of_texts(id, id) for id in ids],
        ),
        row("honest, corpus without its material", ids, [said(id, id, "far") for id in ids]),
        copies("copy, base model", lambda id: [BASE]),
        copies("copy, adapter of noise", lambda id: [NOISE]),
        copies("copy, layers turned", lambda id: [f"turned {id}"]),
        copies(
            "copy, another's adapter",
            lambda id: [name for name in ids if name != id and known(name, id, id)],
        ),
        row(
            "own card, another's specification",
            [texts for _, texts in foreign],
            [said(id, id, texts) for id, texts in foreign],
            texts=[of_texts(id, texts) for id, texts in foreign],
        ),
        row(
            "broad",
            [BROAD] * len(everybody),
            [said(name, BROAD, BROAD) for name in everybody],
            [of_models(name, BROAD) for name in everybody],
        ),
    ]
    return {"threshold": threshold, "development": list(development), "rows": rows}


def without_models(honest, attacks, kernel: Kernel, rate: float) -> dict:
    """What specifications alone show: the squared MMD to the closest mixture of the honest ones.

    The threshold is set on development learnwares, as in `judge`; flagged is a share of the other
    learnwares, and of all attackers. fewer_rows: the share that says it stands for fewer rows than
    it has points.
    """

    def apart(shown):
        pool = build_pool(
            [one.spec for one in shown],
            kernel,
            ids=[str(i) for i in range(len(shown))],
            n=[one.n for one in shown],
            residual=[0.0] * len(shown),
        )
        return [mixture.squared_mmd for mixture in among_others(pool)]

    own = apart(honest)
    threshold = lowest_honest(own[::2], rate)
    groups = {"honest": (honest[1::2], own[1::2])} | {
        name: (attackers, [apart([*honest, one])[-1] for one in attackers])
        for name, attackers in attacks.items()
    }
    rows = [
        {
            "who": name,
            "squared_mmd": [float(v) for v in values],
            "flagged": float(np.mean(np.array(values) < threshold)),
            "fewer_rows": float(np.mean([one.n < len(one.spec.beta) for one in shown])),
        }
        for name, (shown, values) in groups.items()
    ]
    return {"threshold": threshold, "honest": own, "rows": rows}


# ---- the whole of it


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    template_of(config.template)
    if not Path(config.truth).exists():
        raise FileNotFoundError(
            f"gamed: there is no file {config.truth}; name results of experiments.evaluate for "
            f"{config.dock}."
        )
    tasks = [task.name for kind in ("same", "near") for task in labelled_of(config.users[kind])]
    return {
        "dock": dock_line(config.dock),
        "model": config.model.name,
        "users": named(tasks),
        "next": f"dock {shlex.quote(f'--dock={config.dock}')} --check",
    }


def run(config: ConfigDict) -> dict:
    """Gather, rank, ask; returns what it writes to workdir/results.json."""
    workdir = Path(config.workdir)
    template, model = template_of(config.template), open_model(config.model)
    dock = open_dock(config.dock, config.specification, only=config.learnwares or None)
    ids = list(dock.pool.ids)
    tasks = [task for kind in ("same", "near") for task in labelled_of(config.users[kind])]
    truth = read_truth(config.truth, tasks, ids)
    reference = open_reference(model, config.reference)
    honest = honest_of(dock, reference, config)
    users = users_of(dock, reference, config)
    attacks = attacks_of(honest, dock.kernel, config)
    rankings = fooled(users, honest, attacks, truth, dock.kernel, config)
    say("Rankings are done; models are asked.")
    found = ask(dock, model, attacks[BROAD][0].spec, template, config)
    output = {
        "learnwares": ids,
        "rankings": rankings,
        "check": judge(found, ids, config.false_alarms),
        "without_models": without_models(honest, attacks, dock.kernel, config.false_alarms),
        "refused": refused(attacks),
        "told": found,
    }
    write_json(workdir / "results.json", output)
    write_json(workdir / "config.json", config.to_dict())
    lines = table(output)
    (workdir / "report.md").write_text("\n".join(["# A gamed dock", "", *lines]) + "\n")
    figures.save(shares(rankings), workdir / "gamed")
    told = figures.strips(
        [(row["who"], row["told"]) for row in output["check"]["rows"]],
        label="how well the model tells herded texts apart; dashed: flagged below",
        line=output["check"]["threshold"],
    )
    figures.save(told, workdir / "told")
    print("\n".join(lines))
    for name in ("results.json", "report.md", "gamed.png", "told.png"):
        print(workdir / name)
    return output


def shares(rankings: Sequence[dict]):
    """A figure of the users to whom an attacker comes first, by method and attack."""
    rows = [r for r in rankings if r["users"] == "same" and r["attack"] != "none"]
    attacks, methods = (list(dict.fromkeys(r[key] for r in rows)) for key in ("attack", "method"))
    first = {(r["method"], r["attack"]): 100 * r["first"] for r in rows}
    return figures.heat_map(
        np.array([[first[method, attack] for attack in attacks] for method in methods]),
        methods,
        attacks,
        label="users to whom the attacker comes first, %",
        numbers=".0f",
    )


def refused(attacks: dict) -> list[str]:
    """Attacks whose vectors are no specification for `pave.mean_embedding_of`."""
    names = []
    for name, attackers in attacks.items():
        try:
            for one in attackers:
                pave.mean_embedding_of(one.vector[None])
        except ValueError:
            names.append(name)
    return names


def table(output: dict) -> list[str]:
    """Markdown: shares of users who are given the attacker, then who is flagged."""
    rows = {(r["attack"], r["method"], r["users"]): r for r in output["rankings"]}
    attacks, methods = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))

    def percent(value):
        return "" if value is None else f"{100 * value:.0f}"

    def cell(attack, method):
        same, near = (rows[attack, method, kind] for kind in ("same", "near"))
        if attack == "none":
            return percent(same["own"])
        return f"{percent(same['first'])} / {percent(near['first'])} ({percent(same['lost'])})"

    lines = [f"| method | {' | '.join(attacks)} |", "|" + "---|" * (len(attacks) + 1)]
    lines += [f"| {m} | {' | '.join(cell(a, m) for a in attacks)} |" for m in methods]
    lines += ["", *NOTES_RANKED, ""]
    lines += ["| who | told, median | threshold | models | texts |", "|---|---|---|---|---|"]
    for row in output["check"]["rows"]:
        cells = [row["who"], f"{np.median(row['told']):.2f}"]
        cells += [f"{percent(row['threshold_flagged'])} of {row['threshold_count']}"]
        cells += [percent(row[f"not_first_of_{name}"]) for name in ("models", "texts")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *NOTES_CHECKED, ""]
    lines += [
        "| who | squared MMD, median | flagged | fewer rows than points |",
        "|---|---|---|---|",
    ]
    for row in output["without_models"]["rows"]:
        cells = [row["who"], f"{np.median(row['squared_mmd']):.4f}", percent(row["flagged"])]
        lines.append(f"| {' | '.join([*cells, percent(row['fewer_rows'])])} |")
    return [*lines, "", *NOTES_ALONE]
