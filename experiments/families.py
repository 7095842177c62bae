"""Every family of specification, and every baseline, on the same users and the same truth.

Example: python -m experiments.families --config=configs/families.py:quickstart
"""

import functools
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save
from scipy.special import softmax

from experiments import build, evaluate
from experiments.common import bar, embed_texts, launch, reducer_options, say, write_json
from experiments.evaluate import open_models
from experiments.figures import plot_families
from experiments.models import (
    chosen,
    encode,
    labelled_of,
    lesson,
    open_model,
    scorer,
    template_of,
)
from experiments.ranking import OpenDock, open_dock
from experiments.vectors import (
    TARGETS,
    Reference,
    Sample,
    Vectors,
    batches_of,
    by_tensor,
    keep_vectors,
    make_vectors,
    open_reference,
    space_of,
    texts_of,
)
from learnware_jax.dock.labelled import Example, LabelledTask, load_examples
from learnware_jax.dock.store import write_file
from learnware_jax.selection import baselines
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.selection.regret import balanced_accuracy, kendall, regret
from learnware_jax.slm.decoder import forward, logits
from learnware_jax.specification import pave
from learnware_jax.specification.kernels import Gaussian, Linear, median_gamma
from learnware_jax.specification.reduce import reduce_many
from learnware_jax.specification.rkme import RKME, from_rows
from learnware_jax.specification.sketch import make_sketch, sketch_of

# What a learnware's vector is fitted to -> what a user's is: they have no model of their own.
USERS = {"answers": "answers", "outputs": "answers", "prompts": "prompts"}
WIDTHS = (32, 48, 64, 96, 128, 160)  # tokens of prompts with answers
METRICS = ("top1", "regret_at_1", "kendall_tau")


class Setting(NamedTuple):
    """A dock and users with known truth. Tasks, users and learnwares have one order."""

    name: str
    tasks: list[LabelledTask]
    dock: OpenDock
    truth: np.ndarray  # (users, learnwares): balanced accuracy on rows that nobody else sees
    leave_out_own: bool


class Scores(NamedTuple):
    """Scores of a family for every user, number of rows, seed and learnware; higher is closer."""

    family: str
    target: str  # what vectors are fitted to; "" where there are none
    similarity: str
    values: np.ndarray  # (users, rows, seeds, learnwares); NaN where a family has none


def run(config: ConfigDict) -> dict:
    """Rank, score, and write workdir/families.json; returns what it writes."""
    fit = pave.Settings(**config.fit)
    model = open_model(config.model)
    reference = open_reference(model, config.reference)
    if config.development:
        return develop(reference, fit, config)
    rows = []
    for name, section in config.settings.items():
        setting = open_setting(name, section, config)
        for scores in every_score(setting, reference, fit, config):
            rows += rows_of(setting, scores, config)
    output = {"seeds": len(config.seeds), "rows": rows}
    workdir = Path(config.workdir)
    write_json(workdir / "families.json", output)
    write_json(workdir / "config.json", config.to_dict())
    (workdir / "families.md").write_text("\n".join(["# Families", "", *table(rows)]) + "\n")
    plot_families(workdir / "families.png", rows)
    print("\n".join(table(rows)))
    for name in ("families.json", "families.md", "families.png"):
        print(workdir / name)
    return output


def open_setting(name: str, section: ConfigDict, config: ConfigDict) -> Setting:
    """The dock of a setting, made if need be, and how well its learnwares do every user's task."""
    if section.build.dock != "docks/quickstart":
        build.run(section.build)
    evaluate.run(section.evaluate)
    tasks = labelled_of(section.tasks)
    dock = open_dock(
        section.evaluate.dock, config.specification, only=[task.name for task in tasks]
    )
    tasks = [next(t for t in tasks if t.name == id) for id in dock.pool.ids]
    truth = np.array(
        [
            [_truth(Path(section.evaluate.workdir), task, id) for id in dock.pool.ids]
            for task in tasks
        ]
    )
    return Setting(name, tasks, dock, truth, section.leave_out_own)


def _truth(workdir: Path, task: LabelledTask, id: str) -> float:
    record = json.loads((workdir / "records" / f"{task.name}.json").read_text())
    if task.metric == "exact":  # numbers are no classes
        return record["row"]["accuracy"][id]
    items = record["items"]
    given = [item["learnwares"][id] for item in items]
    return balanced_accuracy(given, [item["wanted"] for item in items]).value


def pool_rows(task: LabelledTask, config: ConfigDict) -> list[Example]:
    """The rows that samples of a user are drawn from: as many as the largest has."""
    return load_examples(task.name, "user", max(config.rows))


def samples_of(task: LabelledTask, config: ConfigDict) -> list[Sample]:
    """The users of a task: some rows for every number of rows and seed, smaller in larger ones.

    Up to `config.model_rows` they are drawn from so many first rows, which models are run on. A
    task that has not so many rows gives all that it has.
    """
    count = len(pool_rows(task, config))

    def draw(n, seed):
        within = min(count, config.model_rows) if n <= config.model_rows else count
        key = [seed, zlib.crc32(task.name.encode())]
        return Sample(np.random.default_rng(key).permutation(within)[:n], seed)

    return [draw(n, seed) for n in config.rows for seed in config.seeds]


def every_score(setting: Setting, reference: Reference, fit: pave.Settings, config: ConfigDict):
    """Scores of all families and baselines."""
    shape = (len(setting.tasks), len(config.rows), len(config.seeds), -1)
    yield from text_scores(setting, shape, config)
    yield from vector_scores(setting, reference, fit, shape, config)
    yield from baseline_scores(setting, reference, fit, shape, config)


# ---- families of embedded texts


def text_scores(setting: Setting, shape, config: ConfigDict):
    """RKMEs of embedded texts, by distance; users are compressed as users are."""
    dock, embedded = setting.dock, _embedded(setting, config)
    reduced = []
    for n, _ in enumerate(config.rows):
        wanted = [
            x[sample.places]
            for task, x in zip(setting.tasks, embedded, strict=True)
            for sample in _at(samples_of(task, config), n, config)
        ]
        by_size = {}
        for i, x in enumerate(wanted):
            by_size.setdefault(len(x), []).append(i)
        found = [None] * len(wanted)
        for size, places in by_size.items():
            points = min(config.specification.points, max(1, size // 2))
            fitted = reduce_many(
                jax.random.key(config.seed),
                [wanted[i] for i in places],
                points,
                dock.kernel,
                **reducer_options(config.specification),
            )
            for i, one in zip(places, fitted, strict=True):
                found[i] = one
        reduced.append(found)
    seeds = len(config.seeds)
    ordered = [
        reduced[n][u * seeds + s]
        for u in range(len(setting.tasks))
        for n in range(len(config.rows))
        for s in range(seeds)
    ]
    values = -distances([r.spec for r in ordered], dock.pool, n=[r.n for r in ordered])
    yield Scores("rkme", "", "mmd", values.reshape(shape))


def _embedded(setting: Setting, config: ConfigDict) -> list[np.ndarray]:
    dock = setting.dock
    return [
        embed_texts(dock.encoder, [e.text for e in pool_rows(task, config)], dock.space, keep=True)
        for task in setting.tasks
    ]


def _at(samples: Sequence[Sample], n: int, config: ConfigDict) -> Sequence[Sample]:
    seeds = len(config.seeds)
    return samples[n * seeds : (n + 1) * seeds]


# ---- families of vectors


def vector_scores(
    setting: Setting, reference: Reference, fit: pave.Settings, shape, config: ConfigDict
):
    """Parameter vectors, one-step gradients, their sketches, and RKMEs of rows' gradients."""
    for target in TARGETS:
        docked = [docked_vectors(setting, t, reference, target, fit, config) for t in setting.tasks]
        users = [
            user_vectors(task, reference, USERS[target], fit, config) for task in setting.tasks
        ]
        for family in ("pave", "one_step"):
            # Every seed's order of rows gives a learnware one vector; a gradient has no order.
            own = [v.pave if family == "pave" else v.one_step[:1] for v in docked]
            theirs = [getattr(v, family) for v in users]
            yield from _similarities(family, target, reference, own, theirs, setting, shape)
            yield _sketched(family, target, own, theirs, setting, shape, config)
        yield _row_gradients(target, docked, users, setting, shape, config)


def docked_vectors(setting, task, reference, target, fit, config) -> Vectors:
    """The vectors of a learnware: of its training rows, one sample a seed."""
    examples = load_examples(task.name, "train", config.learnware_rows)
    answers = [example.answer for example in examples]
    if target == "outputs":
        answers = outputs_of(setting, task, examples, config)
    samples = [Sample(np.arange(len(examples)), seed) for seed in config.seeds]
    pairs = [(example.text, answer) for example, answer in zip(examples, answers, strict=True)]
    return _vectors(task, "learnware", reference, target, pairs, samples, fit, config)


def user_vectors(task, reference, target, fit, config) -> Vectors:
    """The vectors of a task's users, one each of `samples_of`."""
    pairs = [(example.text, example.answer) for example in pool_rows(task, config)]
    samples = samples_of(task, config)
    return _vectors(task, "user", reference, target, pairs, samples, fit, config)


def _vectors(task, side, reference, target, pairs, samples, fit, config):
    texts = texts_of(reference, pairs, target)
    options = {"together": config.reference.together, "row_width": config.sketches.row}
    drawn = [[sample.places.tolist(), sample.seed] for sample in samples]
    content = [space_of(reference, target), fit, texts, drawn, options]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file = Path(config.workdir) / "vectors" / f"{task.name}-{side}-{target}.safetensors"

    def make():
        made = make_vectors(reference, texts, samples, settings=fit, **options)
        seconds = ", ".join(f"{s:.0f}" for s in made.seconds)
        say(f"{file.stem}: {len(texts)} rows, {len(samples)} vectors; seconds {seconds}")
        return made

    return keep_vectors(file, digest, make)


def outputs_of(setting, task, examples, config) -> list[str]:
    """What a learnware itself answers to its training rows; numbers stay as they are."""
    if not examples[0].choices:
        return [example.answer for example in examples]
    section = config.settings[setting.name].evaluate
    file = Path(config.workdir) / "outputs" / f"{setting.name}-{task.name}.json"
    if not file.exists():
        models = open_models(setting.dock.path, setting.dock.learnwares, section)
        i = models.ids.index(task.name)
        adapter = jax.tree.map(lambda leaf: leaf[i + 1 : i + 2], models.adapters)
        template = template_of(section.template)
        score = scorer(models.model, template, task.instruction, examples, section.scoring)
        write_json(file, chosen(examples, score(adapter)[0]))
    return json.loads(file.read_text())


def _ranked(own: Sequence[RKME], theirs: Sequence[RKME], kernel, setting, *, n, n_theirs):
    pool = build_pool(own, kernel, ids=setting.dock.pool.ids, n=n, residual=[0.0] * len(own))
    return -distances(theirs, pool, n=n_theirs)


def _similarities(family, target, reference, own, theirs, setting, shape):
    """Cosine by the ranking engine, and centred by the dock's mean; of wholes and by tensor."""
    for prefix, change in (("", lambda v: v), ("tensor_", lambda v: by_tensor(reference, v))):
        specs = [pave.mean_embedding_of(change(v)) for v in own]
        plain, centred = [], []
        for v in theirs:
            users = [pave.mean_embedding_of(row[None]) for row in change(v)]
            options = {"n": [len(s.beta) for s in specs], "n_theirs": [1] * len(users)}
            plain.append(_ranked(specs, users, Linear(), setting, **options))
            centred.append(baselines.mean_cosine(users, specs))
        yield Scores(family, target, f"{prefix}cosine", np.stack(plain).reshape(shape))
        yield Scores(family, target, f"{prefix}centred", np.stack(centred).reshape(shape))


def _sketched(family, target, own, theirs, setting, shape, config):
    width = config.sketches.vector
    sketch = make_sketch(jax.random.key(config.seed), own[0].shape[1], width)

    def short(vectors):
        found = np.asarray(sketch_of(sketch, vectors, width=width))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    specs = [pave.mean_embedding_of(short(v)) for v in own]
    users = [pave.mean_embedding_of(row[None]) for v in theirs for row in short(v)]
    values = baselines.mean_cosine(users, specs)
    return Scores(f"{family}_sketch", target, "centred", values.reshape(shape))


def _row_gradients(target, docked, users, setting, shape, config):
    """RKMEs of the distribution of rows' gradients, sketched."""
    rows = [v.rows for v in docked]
    gamma = median_gamma(jax.random.key(config.seed), np.concatenate(rows))
    kernel = Gaussian(gamma)
    options = reducer_options(config.specification)
    points = min(config.specification.points, len(rows[0]) // 2)
    reduced = reduce_many(jax.random.key(config.seed), rows, points, kernel, **options)
    theirs = [
        from_rows(v.rows[sample.places])
        for task, v in zip(setting.tasks, users, strict=True)
        for sample in samples_of(task, config)
    ]
    values = _ranked(
        [r.spec for r in reduced],
        theirs,
        kernel,
        setting,
        n=[r.n for r in reduced],
        n_theirs=[len(user.beta) for user in theirs],
    )
    return Scores("gradients_rkme", target, "mmd", values.reshape(shape))


# ---- baselines


def baseline_scores(setting, reference, fit, shape, config):
    """Those of selection.baselines, chance, and the learnware that is best on other tasks."""
    users, m = len(setting.tasks), len(setting.dock.pool.ids)
    embedded = _embedded(setting, config)
    informed = [user_vectors(task, reference, "answers", fit, config) for task in setting.tasks]
    docked = [docked_vectors(setting, t, reference, "answers", fit, config) for t in setting.tasks]
    said = [outputs_on(setting, task, config) for task in setting.tasks]
    cards = [learnware.card for learnware in setting.dock.learnwares]
    texts = [f"{card['name']} {card['domain']} {card['description']}" for card in cards]
    specs = [learnware.spec for learnware in setting.dock.learnwares]
    dock = baselines.Dock(texts, specs, np.stack([v.fisher[0] for v in docked]), None)
    found = {
        name: np.full((users, len(config.rows) * len(config.seeds), m), np.nan)
        for name in baselines.BASELINES
    }
    with bar("baselines", users * shape[1] * shape[2]) as advance:
        for u, task in enumerate(setting.tasks):
            examples = pool_rows(task, config)
            for i, sample in enumerate(samples_of(task, config)):
                rows = [examples[j] for j in sample.places]
                user = baselines.User(
                    [e.text for e in rows],
                    embedded[u][sample.places],
                    [e.answer for e in rows],
                    informed[u].fisher[i],
                )
                run_all = None
                if sample.places.max() < len(said[u].likelihood[0]):
                    kept = _some(said[u], sample.places)
                    run_all = lambda _, kept=kept: kept  # noqa: E731
                for name, baseline in baselines.BASELINES.items():
                    if run_all is not None or "dock.run" not in baseline.needs:
                        found[name][u, i] = baseline.score(user, dock._replace(run=run_all))
                advance(1)
    for name, values in found.items():
        yield Scores(name, "", "", values.reshape(shape))
    others = [setting.truth[[v for v in range(users) if v != u]].mean(0) for u in range(users)]
    static = np.broadcast_to(np.array(others)[:, None, None], (*shape[:3], m))
    yield Scores("static", "", "", static)


def outputs_on(setting: Setting, task: LabelledTask, config: ConfigDict) -> baselines.Outputs:
    """What every model of a setting says of the first rows of a task's users; kept once made.

    One pass over prompt and answer for each model and row. A model's own labels are told apart by
    their first tokens; a model that writes numbers counts as one of one label.
    """
    section = config.settings[setting.name].evaluate
    examples = pool_rows(task, config)[: config.model_rows]
    cards = [learnware.card for learnware in setting.dock.learnwares]
    labels = [card["labels"] or ["1"] for card in cards]
    file = Path(config.workdir) / "models" / f"{setting.name}-{task.name}.safetensors"
    if not file.exists():
        model, _, adapters = open_models(setting.dock.path, setting.dock.learnwares, section)
        firsts = jnp.array([encode(model, f" {label}")[0] for own in labels for label in own])
        template = template_of(section.template)
        # Without the token that ends an answer.
        texts = [
            text._replace(ids=text.ids[:-1])
            for text in (lesson(model, template, task.instruction, e) for e in examples)
        ]
        found = {}
        with bar(f"{len(cards)} models on {task.name}", len(texts)) as advance:
            for places, batch in batches_of(texts, WIDTHS, section.scoring.batch_tokens // 64):
                said = _run_models(
                    model.params,
                    jax.tree.map(lambda leaf: leaf[1:], adapters),
                    batch,
                    firsts,
                    config=model.config,
                    dtype=section.scoring.dtype,
                )
                for name, array in said.items():
                    array = np.asarray(array)[:, : len(places)]
                    whole = found.setdefault(
                        name, np.zeros((len(cards), len(texts), *array.shape[2:]), np.float32)
                    )
                    whole[:, places] = array
                advance(len(places))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, save(found), where="families")
    kept = load_file(file)
    cuts = np.cumsum([len(own) for own in labels])[:-1]
    split = np.split(kept["firsts"], cuts, axis=2)
    own = [softmax(scores[i], axis=-1) for i, scores in enumerate(split)]
    return baselines.Outputs(kept["likelihood"], own, kept["features"])


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _run_models(params, adapters, batch, firsts, *, config, dtype):
    def one(adapter):
        hidden, _ = forward(params, batch.ids, config=config, adapter=adapter, dtype=dtype)
        hidden = jnp.take_along_axis(hidden, batch.at[..., None], axis=1)
        scores = jax.nn.log_softmax(logits(params, hidden, config=config, dtype=dtype))
        chosen = jnp.take_along_axis(scores, batch.target[..., None], -1)[..., 0]
        return {
            "likelihood": (chosen * batch.weight).sum(-1),
            "firsts": scores[:, 0, firsts],
            "features": hidden[:, 0],
        }

    return jax.lax.map(one, adapters)


def _some(said: baselines.Outputs, places: np.ndarray) -> baselines.Outputs:
    return baselines.Outputs(
        said.likelihood[:, places],
        [own[places] for own in said.own],
        said.features[:, places],
    )


# ---- how good they are


def rows_of(setting: Setting, scores: Scores, config: ConfigDict) -> list[dict]:
    """A row for every number of rows: means over users and seeds, and two standard errors.

    stderr: over users (of their means over seeds), what another choice of tasks would change.
    stderr_seeds: over seeds, what other rows of the same tasks would.
    """
    users, seeds, m = len(setting.tasks), len(config.seeds), len(setting.dock.pool.ids)
    rows = []
    for n, count in enumerate(config.rows):
        if np.isnan(scores.values[:, n]).any():
            continue
        measured = np.zeros((len(METRICS), users, seeds))
        for u in range(users):
            kept = [i for i in range(m) if not (setting.leave_out_own and i == u)]
            truth = setting.truth[u, kept]
            for s in range(seeds):
                own = scores.values[u, n, s, kept]
                lost = regret(own, truth)
                # Matching asks for one's own task, a family for the best of the others.
                hit = lost == 0 if setting.leave_out_own else np.argmax(own) == u
                measured[:, u, s] = hit, lost, kendall(own, truth)
        row = {
            "setting": setting.name,
            "family": scores.family,
            "target": scores.target,
            "similarity": scores.similarity,
            "n": count,
            "users": users,
            "seeds": seeds,
        }
        row |= dict(zip(METRICS, map(float, measured.mean((1, 2))), strict=True))
        for name, axis in (("stderr", 2), ("stderr_seeds", 1)):
            means = measured.mean(axis)
            errors = means.std(1, ddof=1) / np.sqrt(means.shape[1])
            row[name] = dict(zip(METRICS, map(float, errors), strict=True))
        rows.append(row)
    return rows


if __name__ == "__main__":
    launch(run)
