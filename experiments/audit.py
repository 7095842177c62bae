"""What specifications give away, and what privacy costs: attacks on every kind beside its ranking.

One task is attacked: specifications of random halves of its rows are made again and again, and each
is asked whose rows it holds. The same way of making them specifies a dock, which is ranked for
users.

Example: python -m experiments.audit --config=configs/audit.py:quickstart
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("audit")

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save

from experiments.build import tasks_of
from experiments.common import (
    bar,
    embed_texts,
    kernel_of,
    named,
    open_encoder,
    say,
    space_of,
    write_json,
)
from experiments.models import open_model
from experiments.vectors import Reference, batches_of, open_reference, texts_of
from learnware_jax import figures
from learnware_jax.dock.store import write_file
from learnware_jax.dock.tasks import load_task
from learnware_jax.selection.baselines import mean_cosine
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.specification import pave, privacy
from learnware_jax.specification.reduce import reduce_many
from learnware_jax.specification.rkme import RKME, from_rows
from learnware_jax.specification.sketch import (
    choose_landmarks,
    make_sketch,
    orthogonal_frequencies,
    project,
    random_features,
    sketch_of,
)

# How reduced sets are made, by the name that results give it.
REDUCERS = {
    "random": dict(method="random"),
    "kmeans": dict(method="kmeans"),
    "herding": dict(method="herding"),
    "gauss_newton from rows": dict(method="gauss_newton", start="rows"),
    "gauss_newton from noise": dict(method="gauss_newton", start="noise"),
}
RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0, 1e6)
# Specifications that points and texts are looked at of.
LOOKED_AT = 4
TOGETHER = 16  # samples that are compressed in one call
# Gradients of a mean loss are small for float16.
SCALE = 64.0
COLUMNS = (
    *("kind", "reducer", "n", "m", "epsilon", "quality", "auc", "tpr_at_1pct", "stranger_auc"),
    *("stranger_tpr_at_1pct", "member_rate", "copies", "overlap"),
)


class Source(NamedTuple):
    """Texts of a task, and a row of numbers for each."""

    texts: list[str]
    rows: np.ndarray


class Material(NamedTuple):
    """Everything that one set of kinds is audited on."""

    target: Source  # shuffled; attacked are its first rows
    dock: dict[str, Source]  # shuffled, the target's beside the others'
    users: dict[str, np.ndarray]  # (users, rows, d) of each task of the dock
    public: Source  # texts of other tasks that everybody has


class Kind(NamedTuple):
    """A way to specify samples, and what is done with the result."""

    kind: str
    reducer: str
    m: int | None
    epsilon: float
    make: Callable[[int, Iterable[np.ndarray]], list[RKME]]  # of a seed and samples
    view: Callable[[Sequence[RKME]], np.ndarray]  # (S, D), what they say of the mean of rows
    row_view: Callable[[np.ndarray], np.ndarray]  # (N, D), the same of single rows
    rank: Callable[[np.ndarray, Sequence[RKME], Sequence[int]], np.ndarray]  # scores of users


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    dock = [task.name for task in tasks_of(config.dock)]
    attacked = tasks_of([config.target])[0].name
    following = "select --config=configs/select.py:quickstart --config.user.data=FILE"
    return {
        "attacks": f"specifications of {attacked}, of {', '.join(config.shadows)} texts",
        "dock": named(dock),
        "next": following,
    }


def run(config: ConfigDict) -> dict:
    """Attack and rank every kind; returns what it writes to workdir/audit.json."""
    check(config)
    workdir = Path(config.workdir)
    records = workdir / "rows"
    rows = []
    for n, kind, material in every_kind(config):
        file = records / f"{_digest(config, n, kind)}.json"
        if not file.exists():
            say(f"{kind.kind} {kind.reducer} n={n} m={kind.m} epsilon={kind.epsilon}")
            write_json(file, audit(kind, n, material, config))
        rows.append(json.loads(file.read_text()))
    output = {"target": config.target, "delta": config.delta, "rows": rows}
    write_json(workdir / "audit.json", output)
    write_json(workdir / "config.json", config.to_dict())
    (workdir / "audit.md").write_text("\n".join(["# Audit", "", *table(rows)]) + "\n")
    figures.save(figures.privacy_utility(rows), workdir / "audit")
    print("\n".join(table(rows)))
    for name in ("audit.json", "audit.md", "audit.png"):
        print(workdir / name)
    return output


def check(config: ConfigDict) -> None:
    """ValueError for a configuration that could not be carried out."""
    for n, shadows in config.shadows.items():
        if shadows < 8 or int(n) < 2:
            raise ValueError(
                f"audit: got {shadows} specifications of {n} rows; want at least 8 of 2."
            )
    for epsilon in epsilons_of(config):
        privacy.gaussian_noise(epsilon, config.delta)


def epsilons_of(config: ConfigDict) -> list[float]:
    """The values of epsilon; "inf" is no noise."""
    return [float(epsilon) for epsilon in config.epsilons]


def _digest(config, n, kind):
    content = [config.to_dict(), n, *kind[:4]]
    del content[0]["workdir"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# ---- attacks, and ranking


def audit(kind: Kind, n: int, material: Material, config: ConfigDict) -> dict[str, Any]:
    """One row of the table."""
    begin = time.perf_counter()
    pool = material.target.rows[: 2 * n]
    rng = np.random.default_rng([config.seed, n])
    shadows = config.shadows[str(n)]
    order = np.stack([rng.permutation(2 * n) for _ in range(shadows)])
    member = order < n
    specs = kind.make(config.seed, (pool[m] for m in member))
    targets = slice(min(2 * n, config.targets))
    others = kind.row_view(material.target.rows[2 * n :][: config.others])
    views, row_views = kind.view(specs), kind.row_view(pool)
    near = {}
    if has_points(kind):
        near["nearest point"] = np.stack(
            [-privacy.nearest_rows(pool[targets], spec.z)[1] for spec in specs]
        )
    found = {
        attacker: strongest(
            {
                f"tracing, ridge {ridge:g}": privacy.tracing_scores(
                    views, row_views[targets], known, ridge=ridge
                )
                for ridge in RIDGES
            }
            | near,
            member[:, targets],
            config.seed,
        )
        for attacker, known in (("", row_views), ("stranger_", others))
    }
    quality, error, users = ranking_quality(kind, n, material, config)
    row = {
        "kind": kind.kind,
        "reducer": kind.reducer,
        "n": n,
        "m": kind.m,
        "epsilon": _written(kind.epsilon),
        "quality": quality,
        "quality_stderr": error,
        "users": users,
        "shadows": shadows,
    }
    for attacker, strengths in found.items():
        for measure, (name, value) in strengths.items():
            row |= _with_ends(f"{attacker}{measure}", value)
            row[f"{attacker}{measure}_attack"] = name
    if is_private(kind):
        bounds = privacy.leakage_bound(kind.epsilon, config.delta)
        row |= {"auc_bound": bounds[0], "tpr_bound": bounds[1]}
    row |= look_at(kind, specs, views, member, material, n, config)
    row["seconds"] = time.perf_counter() - begin
    return row


def strongest(attacks, member, seed) -> dict[str, tuple[str, tuple[float, float, float]]]:
    """For each measure the name of the attack that does best by it on one half of the
    specifications, and what it finds in the other half."""
    half, key = len(member) // 2, jax.random.key(seed)
    scores = {name: privacy.calibrated(some, member) for name, some in attacks.items()}
    found = {}
    for measure, shown in (("auc", "auc"), ("tpr", "tpr_at_1pct")):

        def strength(name, part, draws, measure=measure):
            some = privacy.leakage(key, scores[name][part], member[part], draws=draws)
            return getattr(some, measure)

        name = max(scores, key=lambda name: strength(name, slice(half), 1)[0])
        found[shown] = name, strength(name, slice(half, None), 1000)
    return found


def _with_ends(name, value):
    return dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))


def _written(epsilon):
    return "inf" if math.isinf(epsilon) else epsilon


def has_points(kind: Kind) -> bool:
    """Whether a specification has points among the rows' own."""
    return kind.kind == "rkme"


def is_private(kind: Kind) -> bool:
    """Whether a specification of this kind states an epsilon, be it an infinite one."""
    return kind.kind != "rkme" or kind.reducer == "private"


def look_at(kind, specs, views, member, material, n, config):
    """What specifications show without statistics: points that are rows, near rows, and texts.

    member_rate: the share of points whose nearest row of the pool is a member; 0.5 is no trace.
    nearest_member, nearest_other: the median distance of a point to its nearest row among members,
    and among as many others. overlap: of public texts chosen to look like the specification, the
    share of words in common with the likest member, less that with the likest row that is none.
    """
    pool, texts = material.target.rows[: 2 * n], material.target.texts[: 2 * n]
    # Other texts of the attacked task are the best that a public corpus can have.
    others = slice(2 * n, 2 * n + config.others)
    corpus_texts = [*material.target.texts[others], *material.public.texts]
    corpus_rows = np.concatenate([material.target.rows[others], material.public.rows])
    corpus = kind.row_view(corpus_rows)
    words = [_words(text) for text in texts]
    found = {"overlap": []}
    for spec, view, m in list(zip(specs, views, member, strict=True))[:LOOKED_AT]:
        if has_points(kind):
            place, _ = privacy.nearest_rows(spec.z, pool)
            near = [np.median(privacy.nearest_rows(spec.z, pool[side])[1]) for side in (m, ~m)]
            copied = len(privacy.copies(spec.z, pool[m])) / len(spec.z)
            names = ("member_rate", "nearest_member", "nearest_other", "copies")
            for name, value in zip(names, (m[place].mean(), *near, copied), strict=True):
                found.setdefault(name, []).append(value)
            written, _ = privacy.nearest_rows(spec.z, corpus_rows)
        else:
            # What all of them say is of the task, the rest of this one's rows.
            written, _ = privacy.fit_weights(view - views.mean(0), corpus - corpus.mean(0), 16)
        shares = [
            _likest(chosen, words, m) - _likest(chosen, words, ~m)
            for chosen in (_words(corpus_texts[i]) for i in np.unique(written))
        ]
        found["overlap"].append(np.mean(shares))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return means | {f"{name}_stderr": _stderr(values) for name, values in found.items()}


def _words(text):
    return frozenset(text.lower().split())


def _likest(words, texts, among):
    """The greatest share of words in common (Jaccard) with one of the texts."""
    return max(len(words & texts[i]) / len(words | texts[i]) for i in np.flatnonzero(among))


def _stderr(values):
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def ranking_quality(kind, n, material, config) -> tuple[float, float, int]:
    """The share of users for whom the learnware of their own task comes first, with its standard
    error over tasks, and how many users there are.

    Learnwares have n rows, or what their task has; users are those of tasks with n.
    """
    names = list(material.dock)
    samples = [material.dock[name].rows[:n] for name in names]
    specs = kind.make(config.seed + 1, samples)
    full = [i for i, rows in enumerate(samples) if len(rows) == n and names[i] in material.users]
    shares = []
    for i in full:
        scores = kind.rank(material.users[names[i]], specs, [len(rows) for rows in samples])
        shares.append((scores.argmax(1) == i).mean())
    users = sum(len(material.users[names[i]]) for i in full)
    return float(np.mean(shares)), _stderr(shares), users


def table(rows: Sequence[dict]) -> list[str]:
    """Lines of a Markdown table."""

    def cell(row, name):
        value = row.get(name)
        if value is None or value == "":
            return "-"
        if isinstance(value, float) and name != "epsilon":
            error = f" ± {row[f'{name}_stderr']:.2f}" if f"{name}_stderr" in row else ""
            if f"{name}_low" in row:
                error = f" ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"
            return f"{value:.3f}{error}"
        return str(value)

    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return lines + [f"| {' | '.join(cell(row, name) for name in COLUMNS)} |" for row in rows]


# ---- the kinds


def every_kind(config: ConfigDict) -> Iterator[tuple[int, Kind, Material]]:
    """Every row of the table that is to be: its number of rows, its kind, what it is made of."""
    sizes = [int(n) for n in config.shadows]
    encoder = open_encoder(config.specification)
    space = space_of(encoder, config.specification)
    embedded = partial(embed_texts, encoder, space=space, keep=True)
    material, public = text_material(config, embedded)
    kernel = kernel_of(config.specification.kernel, config.seed, public)
    kinds = list(text_kinds(public, kernel, config))
    for n in sizes:
        yield from ((n, kind, material) for kind in kinds)
    if config.vectors.tasks:
        yield from vector_kinds(config, [n for n in sizes if n <= config.vectors.most])


def material_of(texts, public: Source, rows_of, config, sizes, shape) -> Material:
    """Tasks in an order that the seed fixes: their last rows are for users, `shape` (users, rows),
    and the others for learnwares."""
    count = math.prod(shape)
    sources, users, dock = {}, {}, {}
    with bar("texts", len(texts)) as advance:
        for name, some in texts.items():
            rows, order = rows_of(some), np.random.default_rng(config.seed).permutation(len(some))
            sources[name] = source = Source([some[i] for i in order], rows[order])
            # A small task is a learnware and nobody's.
            kept = max(len(some) - count, 0)
            if kept >= min(sizes):
                users[name] = source.rows[kept:].reshape(*shape, -1)
            else:
                kept = len(some)
            dock[name] = Source(source.texts[:kept], source.rows[:kept])
            advance(1)
    return Material(sources[config.target], dock, users, public)


def public_texts(config: ConfigDict, limit: int, rows_of) -> Source:
    """The texts that everybody has, at most `limit` of each task."""
    texts = [load_task(task.name, limit) for task in tasks_of(config.public)]
    return Source(list(itertools.chain(*texts)), np.concatenate([rows_of(some) for some in texts]))


def text_material(config: ConfigDict, embedded) -> tuple[Material, np.ndarray]:
    """The material of embedded texts, and public rows."""
    shape = (config.users.count, config.users.rows)
    sizes = [int(n) for n in config.shadows]
    public = public_texts(config, config.public_rows, embedded)
    most = {name: max(sizes) + math.prod(shape) for name in config.large}
    most[config.target] = 2 * max(sizes) + math.prod(shape)
    texts = {
        task.name: load_task(task.name, most.get(task.name, config.dock_rows))
        for task in tasks_of(config.dock)
    }
    return material_of(texts, public, embedded, config, sizes, shape), public.rows


def text_kinds(public: np.ndarray, kernel, config: ConfigDict) -> Iterator[Kind]:
    """RKMEs by every reducer, means and random features, private ones for every epsilon."""
    settings = config.features
    key = jax.random.key(config.seed)
    # What attackers see a reduced set in.
    landmarks = choose_landmarks(
        key,
        public[:, None].astype(np.float32),
        np.ones((len(public), 1)),
        kernel,
        count=settings.landmarks,
        width=settings.landmarks,
    )

    def projected(specs):
        m = max(len(spec.beta) for spec in specs)
        z = np.stack([np.pad(s.z, ((0, m - len(s.z)), (0, 0)), "edge") for s in specs])
        beta = np.stack([np.pad(s.beta, (0, m - len(s.beta))) for s in specs])
        return project(landmarks, kernel, z.astype(np.float32), beta).coordinates

    def nearest(users, specs, n, *, private=False):
        # A private specification does not say how many rows it has.
        pool = build_pool(
            specs,
            kernel,
            ids=[str(i) for i in range(len(specs))],
            n=[1] * len(specs) if private else n,
            residual=[0.0] * len(specs),
        )
        return -distances([from_rows(x) for x in users], pool, n=[len(x) for x in users])

    def reduced(options, m, seed, samples):
        specs = []
        samples = iter(samples)
        while some := list(itertools.islice(samples, TOGETHER)):
            key = jax.random.fold_in(jax.random.key(seed), len(specs))
            specs += [one.spec for one in reduce_many(key, some, m, kernel, **options)]
        return specs

    shown = dict(view=projected, row_view=partial(privacy.landmark_features, landmarks, kernel))
    for m in config.points:
        for name in config.reducers:
            options = dict(REDUCERS[name])
            if options["method"] == "gauss_newton":
                options["steps"] = config.specification.steps
            yield Kind(
                "rkme", name, m, math.inf, partial(reduced, options, m), rank=nearest, **shown
            )

    known = privacy.make_public(key, public, kernel, count=settings.landmarks, width=settings.width)

    def private(m, epsilon, seed, samples):
        keys = (jax.random.fold_in(jax.random.key(seed), i) for i in itertools.count())
        options = dict(epsilon=epsilon, delta=config.delta)
        return [
            privacy.private_rkme(key, x, known, m, **options)[0]
            for key, x in zip(keys, samples, strict=False)
        ]

    center = public.mean(0)
    frequencies = orthogonal_frequencies(key, kernel, public.shape[1], settings.frequencies)

    def features(rows):
        pieces = [
            np.asarray(random_features(frequencies, piece[:, None], np.ones((len(piece), 1))))
            for piece in np.array_split(np.asarray(rows, np.float32), -(-len(rows) // 4096))
        ]
        return np.concatenate(pieces) - origin

    origin = 0.0
    origin = features(public).mean(0)

    def centred(rows):
        return rows - center

    for epsilon in epsilons_of(config):
        for m in config.private_points:
            rank = partial(nearest, private=True)
            yield Kind(
                "rkme", "private", m, epsilon, partial(private, m, epsilon), rank=rank, **shown
            )
        for kind, of in (("mean", centred), ("sketch", features)):
            yield vector_kind(kind, "", epsilon, of, _longest(of(public)), config)


def _longest(rows):
    return float(np.linalg.norm(rows, axis=1).max())


def vector_kind(kind: str, reducer: str, epsilon: float, of, bound: float, config) -> Kind:
    """A mean of features of rows, noised, and compared by centred cosine."""

    def make(seed, samples):
        specs = []
        for i, x in enumerate(samples):
            key = jax.random.fold_in(jax.random.key(seed), i)
            release = privacy.release_mean(
                key, of(x), bound=bound, epsilon=epsilon, delta=config.delta
            )
            specs.append(RKME(release.mean[None], np.ones(1)))
        return specs

    def rank(users, specs, n):
        return mean_cosine([from_rows(of(x)) for x in users], specs)

    return Kind(kind, reducer, None, epsilon, make, single_rows, of, rank)


def single_rows(specs: Sequence[RKME]) -> np.ndarray:
    """The vectors that specifications of one row are."""
    return np.concatenate([np.asarray(spec.z) for spec in specs])


# ---- gradients and parameter vectors


def gradients_of(reference: Reference, config: ConfigDict, texts: Sequence[str]) -> np.ndarray:
    """Minus the gradient of every text's mean loss at the start, times SCALE, (n, p) float16.

    Kept in workdir, as they are the longest work.
    """
    section = config.vectors
    content = [section.model.to_dict(), section.reference.to_dict(), list(texts)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(config.workdir) / "gradients" / f"{digest}.safetensors"
    if file.exists():
        return load_file(file)["x"]
    rows = texts_of(reference, [(text, "") for text in texts], "prompts")
    together, b = section.reference.together, reference.adapter.b
    size = sum(leaf.size for leaf in jax.tree.leaves(b))
    found = np.zeros((len(rows), size), np.float16)
    with bar(f"gradients of {len(rows)} texts", len(rows)) as advance:
        for places, batch in batches_of(rows, section.reference.widths, together):
            gradient, weight = pave.row_gradients(
                reference.loss, b, batch, together=together, keep=_flat
            )
            scaled = -np.asarray(gradient) / np.asarray(weight)[:, None] * SCALE
            found[places] = scaled[: len(places)]
            advance(len(places))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, save({"x": found}), where="audit")
    return found


def _flat(gradient):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])


def vector_kinds(config: ConfigDict, sizes: Sequence[int]) -> Iterator[tuple[int, Kind, Material]]:
    """One-step gradients in a sketch, and parameter vectors."""
    section = config.vectors
    model = open_model(section.model)
    gradients = partial(gradients_of, open_reference(model, section.reference), config)
    shape = (section.users.count, section.users.rows)
    texts = {
        name: load_task(name, (2 if name == config.target else 1) * max(sizes) + math.prod(shape))
        for name in section.tasks
    }
    public = public_texts(config, section.public, gradients)
    whole = public.rows
    size, width = whole.shape[1], section.sketch
    sketch = make_sketch(jax.random.key(config.seed), size, width)

    def short(rows):
        pieces = np.array_split(np.asarray(rows), -(-len(rows) // 256))
        return np.concatenate([np.asarray(sketch_of(sketch, p, width=width)) for p in pieces])

    # Half of the public rows are clipped.
    bounds = [
        np.median(np.linalg.norm(x.astype(np.float64), axis=1)) for x in (short(whole), whole)
    ]
    sketched = material_of(
        texts,
        Source(public.texts, short(whole)),
        lambda some: short(gradients(some)),
        config,
        sizes,
        shape,
    )
    for n in sizes:
        for epsilon in epsilons_of(config):
            same = np.asarray
            yield n, vector_kind("one_step", "", epsilon, same, float(bounds[0]), config), sketched
    material = material_of(texts, public, gradients, config, sizes, shape)
    fit = pave.Settings(**section.fit, batch=1)
    fit = fit._replace(pull=fit.pull / len(section.reference.lora.targets))
    for n in sizes:
        for epsilon in epsilons_of(config):
            layers = model.config.layers
            yield n, pave_kind(epsilon, short, float(bounds[1]), fit, layers, config), material


def pave_kind(epsilon, short, bound, fit, layers, config) -> Kind:
    """Parameter vectors by DP-SGD, for the loss made linear at the start.

    The gradients of such a loss are the same in every step, and so is their clipped mean: a step of
    all rows adds noise to it and no more, so the mean stands for the rows.
    """

    def one(key, x, epsilon):
        n, p = x.shape
        noise = privacy.fit_noise(epsilon, config.delta, n=n, batch=n, steps=fit.steps)
        mean = sum(
            privacy.clip(piece, bound).sum(0) for piece in np.array_split(x, -(-n // 256))
        ) / (n * SCALE)
        start = jnp.zeros((layers, 1, p // layers), jnp.float32)
        loss = pave.linear_loss(
            -jnp.asarray(mean, jnp.float32).reshape(1, *start.shape), np.ones(1)
        )
        change = privacy.private_fit(
            key, loss, start, jnp.zeros(1, int), settings=fit, bound=bound / SCALE, noise=noise / n
        ).change
        return pave.mean_embedding_of(np.asarray(pave.flatten(change))[None])

    def make(seed, samples):
        keys = (jax.random.fold_in(jax.random.key(seed), i) for i in itertools.count())
        return [one(key, x, epsilon) for key, x in zip(keys, samples, strict=False)]

    def rank(users, specs, n):
        return mean_cosine([one(jax.random.key(0), x, math.inf) for x in users], specs)

    def view(specs):
        return short(single_rows(specs))

    return Kind("pave", "dp_sgd", None, epsilon, make, view, short, rank)
