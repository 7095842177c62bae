"""Every family of specification, and every baseline, on the same users and the same truth.

Example: python -m experiments.families --config=configs/families.py:quickstart
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("families")

import functools
import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file, save
from scipy.special import softmax

from experiments import build, evaluate
from experiments.common import bar, embed_texts, named, reducer_options, say, write_json
from experiments.development import develop
from experiments.evaluate import Models
from experiments.models import (
    chosen,
    dock_adapters,
    encode,
    labelled_of,
    lesson,
    open_model,
    scorer,
    template_of,
)
from experiments.ranking import OpenDock, open_dock
from experiments.vectors import (
    ROW_SKETCH,
    TARGETS,
    Reference,
    Sample,
    Vectors,
    batches_of,
    by_tensor,
    keep_vectors,
    make_vectors,
    open_reference,
    row_gradients,
    space_of,
    texts_of,
)
from learnware_jax import figures
from learnware_jax.dock import store
from learnware_jax.dock.labelled import Example, LabelledTask, load_examples
from learnware_jax.dock.store import write_file
from learnware_jax.selection import baselines
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.selection.regret import balanced_accuracy, gap_closed, kendall
from learnware_jax.slm.decoder import forward, logits
from learnware_jax.slm.weights import Model
from learnware_jax.specification import pave
from learnware_jax.specification.header import SCHEMA, Header, check_same_space
from learnware_jax.specification.kernels import Gaussian, Linear, median_gamma, to_dict
from learnware_jax.specification.reduce import reduce_many
from learnware_jax.specification.rkme import RKME, from_rows
from learnware_jax.specification.sketch import make_sketch, sketch_of

# What a learnware's vector is fitted to -> what a user's is: they have no model of their own.
USERS = {"answers": "answers", "outputs": "answers", "prompts": "prompts"}
WIDTHS = (32, 48, 64, 96, 128, 160)  # tokens of prompts with answers
MODELS_RUN = [name for name, b in baselines.BASELINES.items() if "dock.run" in b.needs]
METRICS = ("top1", "regret_at_1", "kendall_tau")
SETTINGS = ("matching", "family")
# Of the similarities of vectors, the one that tables and figures show.
SHOWN = "centred"
LABELS = {"top1": "own first, %", "regret_at_1": "regret", "kendall_tau": "tau"}
PANELS = (
    ("matching", "top1", "share of users, own first"),
    ("family", "regret_at_1", "regret at 1, balanced accuracy"),
    ("family", "kendall_tau", "weighted Kendall tau"),
)
DRAWN = ("rkme", "mean_cosine", "pave", "one_step", "task2vec", "static", "loss")
NOTES = (
    "± is the standard error over users. matching: per cent of users whose own task's learnware",
    "comes first. family: the own learnware is left out; regret is the balanced accuracy lost",
    "against the best of the others, tau the weighted Kendall tau with their balanced accuracies.",
    "Seconds, and passes of language models over a row, are those of a user with 64 rows; bytes",
    "those of a learnware. Vectors are compared by centred cosine.",
)


class Setting(NamedTuple):
    """A dock and users with known truth. Tasks, users and learnwares have one order."""

    name: str
    tasks: list[LabelledTask]
    dock: OpenDock
    models: Models  # those of the learnwares, without a base
    truth: np.ndarray  # (users, learnwares): balanced accuracy on rows that nobody else sees
    leave_out_own: bool


class Scores(NamedTuple):
    """Scores of a family for every user, number of rows, seed and learnware; higher is closer."""

    family: str
    target: str  # what vectors are fitted to; "" where there are none
    similarity: str
    values: np.ndarray  # (users, rows, seeds, learnwares); NaN where a family has none


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    lines = {"model": config.model.name}
    if config.development:
        lines["tasks"] = named(config.development)
    else:
        for name, section in config.settings.items():
            tasks = [task.name for task in labelled_of(section.tasks)]
            lines[name] = f"{named(tasks)}, of {section.evaluate.dock}"
    following = "families --config=configs/families.py:development"
    if config.development:
        following = "families --config=configs/families.py:quickstart"
    return lines | {"next": following}


def run(config: ConfigDict) -> dict:
    """Rank, score, and write workdir/families.json; returns what it writes."""
    check(config)
    fit = pave.Settings(**config.fit)
    model = open_model(config.model)
    reference = open_reference(model, config.reference)
    if config.development:
        return develop(reference, fit, config)
    rows, agreement = [], {}
    for name in (name for name in SETTINGS if name in config.settings):
        setting = open_setting(name, config.settings[name], model, config)
        costs = costs_of(setting, reference, fit, config)
        agreement[name] = seeds_agree(setting, reference, fit, config)
        for scores in every_score(setting, reference, fit, config):
            rows += rows_of(setting, scores, costs, config)
    output = {"fit": config.fit.to_dict(), "agreement": agreement, "rows": rows}
    workdir = Path(config.workdir)
    write_json(workdir / "families.json", output)
    write_json(workdir / "config.json", config.to_dict())
    (workdir / "families.md").write_text("\n".join(["# Families", "", *table(rows)]) + "\n")
    figures.save(draw(list(shown_rows(rows).values()), config.settings), workdir / "families")
    print("\n".join(table(rows)))
    for name in ("families.json", "families.md", "families.png"):
        print(workdir / name)
    return output


def draw(rows: Sequence[dict], settings: Sequence[str]):
    """A figure of the families in DRAWN against the rows of a user, a panel a metric."""
    panels, labels = [], []
    for setting, metric, label in PANELS:
        if setting not in settings:
            continue
        points = {}
        for row in rows:
            if row["setting"] == setting and row["family"] in DRAWN:
                name = f"{row['family']}, {row['target']}" if row["target"] else row["family"]
                point = row["n"], row[metric], row["stderr"][metric]
                points.setdefault(name, []).append(point)
        curves = [
            figures.Curve(name, *zip(*sorted(some), strict=True)) for name, some in points.items()
        ]
        panels.append((setting, curves))
        labels.append(label)
    return figures.curves(panels, x_label="rows of a user", y_label=labels)


def check(config: ConfigDict) -> None:
    """ValueError for a configuration that could not be reported in the end."""
    wanted = {
        "seeds": (len(config.seeds) >= 2, "at least 2 seeds"),
        "rows": (bool(config.rows) and min(config.rows) >= 2, "numbers of at least 2"),
        "learnware_rows": (config.learnware_rows >= 4, "at least 4"),
        "settings": (set(config.settings) <= set(SETTINGS), f"some of {', '.join(SETTINGS)}"),
    }
    for name, (right, want) in wanted.items():
        if not right:
            raise ValueError(f"families: got {name}={config[name]}; want {want}.")


def open_setting(name: str, section: ConfigDict, model: Model, config: ConfigDict) -> Setting:
    """The dock of a setting, made if need be, and how well its learnwares do every user's task."""
    scored = section.evaluate.copy_and_resolve_references()
    scored.workdir = str(Path(config.workdir) / name)
    if section.build.labelled:
        build.run(section.build)
    evaluate.run(scored)
    tasks = labelled_of(section.tasks)
    dock = open_dock(scored.dock, config.specification, only=[task.name for task in tasks])
    missing = {task.name for task in tasks} - set(dock.pool.ids)
    if missing:
        raise ValueError(f"families: {dock.path} has no learnware for {', '.join(missing)}.")
    tasks = [next(t for t in tasks if t.name == id) for id in dock.pool.ids]
    truth = np.array(
        [[_truth(Path(scored.workdir), task, id) for id in dock.pool.ids] for task in tasks]
    )
    template = template_of(scored.template)
    models = Models(model, *dock_adapters(dock.path, dock.learnwares, model, template))
    if models.ids != list(dock.pool.ids):
        raise ValueError(f"families: not every learnware of {dock.path} can be used; see above.")
    return Setting(name, tasks, dock, models, truth, section.leave_out_own)


def _truth(workdir: Path, task: LabelledTask, id: str) -> float:
    record = json.loads((workdir / "records" / f"{task.name}.json").read_text())
    if task.metric == "exact":  # numbers are no classes
        return record["row"]["accuracy"][id]
    items = record["items"]
    given = [item["learnwares"][id] for item in items]
    return balanced_accuracy(given, [item["wanted"] for item in items]).value


@functools.cache
def examples_of(name: str, part: str, limit: int) -> list[Example]:
    """`load_examples`, which reads a whole source, once."""
    return load_examples(name, part, limit)


def pool_rows(task: LabelledTask, config: ConfigDict) -> list[Example]:
    """The rows that samples of a user are drawn from: as many as the largest has."""
    return examples_of(task.name, "user", max(config.rows))


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


def ranked_for(setting: Setting, user: int) -> list[int]:
    """The places of the learnwares that a user's ranking is of."""
    return [i for i in range(len(setting.tasks)) if not (setting.leave_out_own and i == user)]


def every_score(setting: Setting, reference: Reference, fit: pave.Settings, config: ConfigDict):
    """Scores of all families and baselines."""
    shape = (len(setting.tasks), len(config.rows), len(config.seeds), -1)
    yield from text_scores(setting, shape, config)
    yield from vector_scores(setting, reference, fit, shape, config)
    yield from baseline_scores(setting, reference, fit, shape, config)


# ---- families of embedded texts


def text_scores(setting: Setting, shape, config: ConfigDict):
    """RKMEs of embedded texts, by distance. Users compress what has more rows than points."""
    dock, options = setting.dock, reducer_options(config.specification)
    points = config.specification.points
    samples = [
        x[sample.places]
        for task, x in zip(setting.tasks, _embedded(setting, config), strict=True)
        for sample in samples_of(task, config)
    ]
    specs = [from_rows(x) for x in samples]
    for size in sorted({len(x) for x in samples if len(x) > points}):
        places = [i for i, x in enumerate(samples) if len(x) == size]
        some = [samples[i] for i in places]
        fitted = reduce_many(jax.random.key(config.seed), some, points, dock.kernel, **options)
        for i, one in zip(places, fitted, strict=True):
            specs[i] = one.spec
    values = -distances(specs, dock.pool, n=[len(x) for x in samples])
    yield Scores("rkme", "", "mmd", values.reshape(shape))


def _embedded(setting: Setting, config: ConfigDict) -> list[np.ndarray]:
    dock = setting.dock
    return [
        embed_texts(dock.encoder, [e.text for e in pool_rows(task, config)], dock.space, keep=True)
        for task in setting.tasks
    ]


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
        space = space_of(reference, target)
        spaces = {"pave": space | {"fit": fit._asdict()}, "one_step": space}
        for family, space in spaces.items():
            # Every seed's order of rows gives a learnware one vector; a gradient has no order.
            own = [v.pave if family == "pave" else v.one_step[:1] for v in docked]
            theirs = [getattr(v, family) for v in users]
            specs = [pave.mean_embedding_of(v) for v in own]
            specs = through_dock(setting, family, target, space, specs, config)
            yield from _similarities(family, target, reference, specs, theirs, setting, shape)
            yield _sketched(family, target, space, specs, theirs, setting, shape, config)
        yield _row_gradients(target, spaces["one_step"], docked, users, setting, shape, config)


def seeds_agree(setting, reference, fit, config) -> dict[str, float]:
    """Mean cosine of a learnware's parameter vectors over pairs of seeds, by target."""
    return {
        target: float(
            np.mean(
                [
                    pave.agreement(docked_vectors(setting, t, reference, target, fit, config).pave)
                    for t in setting.tasks
                ]
            )
        )
        for target in TARGETS
    }


def through_dock(setting, kind, target, space, specs: Sequence[RKME], config) -> list[RKME]:
    """The specifications of learnwares as a dock of their kind keeps them, made or completed."""
    path = Path(config.workdir) / "docks" / f"{setting.name}-{kind}-{target}"
    if not (path / "dock.json").exists():
        store.create_dock(path, space, kind)
    kept = []
    for learnware, spec in zip(setting.dock.learnwares, specs, strict=True):
        about = {"n": len(spec.beta), "points": len(spec.beta), "residual": 0.0}
        card = {k: v for k, v in learnware.card.items() if k != "adapter"}
        one = store.Learnware(learnware.id, card, spec, Header(SCHEMA, kind, space, about))
        held = learnware.id in store.list_ids(path)
        if held:
            old = store.read_learnware(path, learnware.id)
            check_same_space(old.header, one.header, what=f"{path} and the configuration")
        if not held or not np.array_equal(old.spec.z, spec.z):
            store.add(path, one, replace=held)
        kept.append(store.read_learnware(path, learnware.id).spec)
    return kept


def docked_vectors(setting, task, reference, target, fit, config) -> Vectors:
    """The vectors of a learnware: of its training rows, one sample a seed."""
    examples = examples_of(task.name, "train", config.learnware_rows)
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
    digest = _digest(setting, task, examples, section)
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("digest") != digest:
        model, ids, adapters = setting.models
        i = ids.index(task.name)
        adapter = jax.tree.map(lambda leaf: leaf[i : i + 1], adapters)
        template = template_of(section.template)
        score = scorer(model, template, task.instruction, examples, section.scoring)
        kept = {"digest": digest, "answers": chosen(examples, score(adapter)[0])}
        write_json(file, kept)
    return kept["answers"]


def _digest(setting, task, examples, section) -> str:
    """A hash of what models say: the models, the rows, and how they are prompted."""
    cards = [[each.id, each.card] for each in setting.dock.learnwares]
    content = [cards, task.instruction, examples, section.template, section.scoring.to_dict()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _pool(setting, specs: Sequence[RKME], kernel, n: Sequence[int]):
    return build_pool(specs, kernel, ids=setting.dock.pool.ids, n=n, residual=[0.0] * len(specs))


def _similarities(family, target, reference, own, theirs, setting, shape):
    """Cosine by the ranking engine, and centred by the dock's mean; of wholes and by tensor.

    Of several seeds of a learnware the mean is compared.
    """
    for prefix, change in (("", lambda v: v), ("tensor_", lambda v: by_tensor(reference, v))):
        specs = [_mean(change(np.asarray(spec.z))) for spec in own]
        pool = _pool(setting, specs, Linear(), [1] * len(specs))
        users = [[pave.mean_embedding_of(row[None]) for row in change(v)] for v in theirs]
        plain = [-distances(each, pool, n=[1] * len(each)) for each in users]
        yield Scores(family, target, f"{prefix}cosine", np.stack(plain).reshape(shape))
        yield Scores(family, target, f"{prefix}centred", _centred(setting, users, specs, shape))


def _mean(vectors: np.ndarray) -> RKME:
    mean = vectors.mean(0)
    return pave.mean_embedding_of((mean / np.linalg.norm(mean))[None])


def _centred(setting, users, specs, shape):
    """`mean_cosine`, centred by the learnwares that a user's ranking is of."""
    values = np.full((len(users), len(users[0]), len(specs)), np.nan)
    for u, each in enumerate(users):
        kept = ranked_for(setting, u)
        values[u][:, kept] = baselines.mean_cosine(each, [specs[i] for i in kept])
    return values.reshape(shape)


def _sketched(family, target, space, own, theirs, setting, shape, config):
    width, seed = config.sketches.vector, config.seed
    sketch = make_sketch(jax.random.key(seed), np.shape(own[0].z)[1], width)

    def short(vectors):
        found = np.asarray(sketch_of(sketch, vectors, width=width))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    space = space | {"sketch": {"seed": seed, "width": width}, "dimension": width}
    specs = [_mean(short(np.asarray(spec.z))) for spec in own]
    specs = through_dock(setting, f"{family}_sketch", target, space, specs, config)
    users = [[pave.mean_embedding_of(row[None]) for row in short(v)] for v in theirs]
    return Scores(f"{family}_sketch", target, "centred", _centred(setting, users, specs, shape))


def _row_gradients(target, space, docked, users, setting, shape, config):
    """RKMEs of the distribution of rows' gradients, sketched. The bandwidth is the dock's."""
    rows = [v.rows for v in docked]
    kernel = Gaussian(median_gamma(jax.random.key(config.seed), np.concatenate(rows)))
    options = reducer_options(config.specification)
    points = min(config.specification.points, len(rows[0]) // 2)
    reduced = reduce_many(jax.random.key(config.seed), rows, points, kernel, **options)
    space = space | {
        "sketch": {"seed": ROW_SKETCH, "width": config.sketches.row},
        "dimension": config.sketches.row,
        "kernel": to_dict(kernel),
    }
    specs = [r.spec for r in reduced]
    specs = through_dock(setting, "gradients_rkme", target, space, specs, config)
    theirs = [
        from_rows(v.rows[sample.places])
        for task, v in zip(setting.tasks, users, strict=True)
        for sample in samples_of(task, config)
    ]
    pool = _pool(setting, specs, kernel, [r.n for r in reduced])
    values = -distances(theirs, pool, n=[len(user.beta) for user in theirs])
    return Scores("gradients_rkme", target, "mmd", values.reshape(shape))


# ---- baselines


def baseline_scores(setting, reference, fit, shape, config):
    """Those of selection.baselines, of chance, and of the learnware that is best elsewhere."""
    users, m = len(setting.tasks), len(setting.dock.pool.ids)
    embedded = _embedded(setting, config)
    informed = [user_vectors(task, reference, "answers", fit, config) for task in setting.tasks]
    docked = [docked_vectors(setting, t, reference, "answers", fit, config) for t in setting.tasks]
    said = [outputs_on(setting, task, config) for task in setting.tasks]
    cards = [learnware.card for learnware in setting.dock.learnwares]
    texts = [f"{card['name']} {card['domain']} {card['description']}" for card in cards]
    fisher = np.stack([v.fisher[0] for v in docked])
    found = {
        name: np.full((users, len(config.rows) * len(config.seeds), m), np.nan)
        for name in baselines.BASELINES
    }
    with bar("baselines", users * shape[1] * shape[2]) as advance:
        for u, task in enumerate(setting.tasks):
            kept, examples = ranked_for(setting, u), pool_rows(task, config)
            specs = [setting.dock.learnwares[i].spec for i in kept]
            dock = baselines.Dock([texts[i] for i in kept], specs, fisher[kept], None)
            for i, sample in enumerate(samples_of(task, config)):
                rows = [examples[j] for j in sample.places]
                user = baselines.User(
                    [e.text for e in rows],
                    embedded[u][sample.places],
                    [e.answer for e in rows],
                    informed[u].fisher[i],
                )
                if config.rows[i // len(config.seeds)] <= config.model_rows:
                    some = _some(said[u], kept, sample.places)
                    dock = dock._replace(run=lambda _, some=some: some)
                else:
                    dock = dock._replace(run=None)
                for name, baseline in baselines.BASELINES.items():
                    if dock.run is not None or name not in MODELS_RUN:
                        found[name][u, i, kept] = baseline.score(user, dock)
                advance(1)
    for name, values in found.items():
        yield Scores(name, "", "", values.reshape(shape))
    if users > 2:
        values = np.broadcast_to(static(setting.truth)[:, None, None], (*shape[:3], m))
        yield Scores("static", "", "", values)
    rng = np.random.default_rng(config.seed)
    yield Scores("random", "", "", rng.random((*shape[:3], m)))


def static(truth: np.ndarray) -> np.ndarray:
    """What a ranker knows that has seen the other users' truth: (users, learnwares).

    Means over the other users, without that of a learnware on its own task: no rival of the user's
    own learnware may gain by having been scored at home. Of two users nothing is known.
    """
    away = np.where(np.eye(len(truth), dtype=bool), np.nan, truth)
    return np.stack([np.nanmean(np.delete(away, u, 0), 0) for u in range(len(truth))])


def outputs_on(setting: Setting, task: LabelledTask, config: ConfigDict) -> baselines.Outputs:
    """What every model of a setting says of the first rows of a task's users; kept once made.

    A model's own labels are told apart by their first tokens; a model that writes numbers counts as
    one of one label.
    """
    section = config.settings[setting.name].evaluate
    examples = pool_rows(task, config)[: config.model_rows]
    file = Path(config.workdir) / "models" / f"{setting.name}-{task.name}.safetensors"
    digest = _digest(setting, task, examples, section)
    if not file.exists() or _metadata(file).get("digest") != digest:
        found = run_models(setting, task, examples, config)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, save(found, {"digest": digest}), where="families")
    kept = load_file(file)
    cuts = np.cumsum([len(own) for own in _labels(setting)])[:-1]
    split = np.split(kept["firsts"], cuts, axis=2)
    own = [softmax(scores[i], axis=-1) for i, scores in enumerate(split)]
    return baselines.Outputs(kept["likelihood"], own, kept["features"])


def _labels(setting: Setting) -> list[list[str]]:
    return [learnware.card["labels"] or ["1"] for learnware in setting.dock.learnwares]


def run_models(setting, task, examples, config: ConfigDict) -> dict[str, np.ndarray]:
    """One pass of the setting's models over prompts and answers; arrays (models, rows, ...).

    `likelihood` of the answer, `firsts`: log-probabilities of the first tokens of all learnwares'
    labels, and `features`, the last hidden state at the end of the prompt.
    """
    section, (model, _, adapters) = config.settings[setting.name].evaluate, setting.models
    firsts = [encode(model, f" {label}")[0] for own in _labels(setting) for label in own]
    template = template_of(section.template)
    # Without the token that ends an answer.
    texts = [
        text._replace(ids=text.ids[:-1])
        for text in (lesson(model, template, task.instruction, e) for e in examples)
    ]
    found, count = {}, len(adapters.scale)
    with bar(f"{count} models on {task.name}", len(texts)) as advance:
        for places, batch in batches_of(texts, WIDTHS, section.scoring.batch_tokens // 64):
            said = _run_models(
                model.params,
                adapters,
                batch,
                jnp.array(firsts),
                config=model.config,
                dtype=section.scoring.dtype,
            )
            for name, array in said.items():
                array = np.asarray(array)[:, : len(places)]
                shape = (count, len(texts), *array.shape[2:])
                found.setdefault(name, np.zeros(shape, np.float32))[:, places] = array
            advance(len(places))
    return found


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "numpy") as opened:
        return opened.metadata() or {}


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


def _some(said: baselines.Outputs, learnwares, places) -> baselines.Outputs:
    return baselines.Outputs(
        said.likelihood[np.ix_(learnwares, places)],
        [said.own[i][places] for i in learnwares],
        said.features[np.ix_(learnwares, places)],
    )


# ---- what they cost


class Costs(NamedTuple):
    """Seconds measured on rows of one task, programs compiled before; and sizes."""

    embed: float  # a row
    reduce: float  # 64 rows to a reduced set
    gradient: dict[str, float]  # a row, by target
    fit: float  # one parameter vector, given gradients
    models: float  # a row through one model of the dock
    dimension: int
    points: int
    parameters: int
    sketches: dict[str, int]


def costs_of(setting, reference, fit, config: ConfigDict, *, count: int = 64) -> Costs:
    """Measured once for the same settings, and kept in workdir."""
    file = Path(config.workdir) / "costs.json"
    parts = (config.model, config.reference, config.fit, config.specification, config.sketches)
    of = json.loads(json.dumps([jax.devices()[0].device_kind, *(p.to_dict() for p in parts)]))
    if file.exists() and (kept := json.loads(file.read_text()))["of"] == of:
        return Costs(**kept["costs"])
    task, dock = setting.tasks[0], setting.dock
    examples = pool_rows(task, config)[:count]
    texts, n = [example.text for example in examples], len(examples)

    def seconds(work):
        work()
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    x = embed_texts(dock.encoder, texts, dock.space, keep=False)
    points = min(config.specification.points, n // 2)
    key, options = jax.random.key(0), reducer_options(config.specification)
    gradients = {}
    for target in ("answers", "prompts"):
        rows = texts_of(reference, [(e.text, e.answer) for e in examples], target)
        gradients[target] = seconds(
            lambda rows=rows: row_gradients(reference, rows, together=config.reference.together)
        )
    made = [
        make_vectors(
            reference,
            rows[:2],
            [Sample(np.arange(2), 0)] * 2,
            settings=fit,
            together=config.reference.together,
            row_width=config.sketches.row,
        ).seconds[1]
        for _ in range(2)
    ]
    alone = jax.tree.map(lambda leaf: leaf[:1], setting.models.adapters)
    one = setting._replace(models=setting.models._replace(adapters=alone))
    costs = Costs(
        embed=seconds(lambda: embed_texts(dock.encoder, texts, dock.space, keep=False)) / n,
        reduce=seconds(lambda: reduce_many(key, [x], points, dock.kernel, **options)),
        gradient={target: taken / n for target, taken in gradients.items()},
        fit=made[1] / 2,
        models=seconds(lambda: run_models(one, task, examples, config)) / n,
        dimension=x.shape[1],
        points=config.specification.points,
        parameters=space_of(reference, "answers")["dimension"],
        sketches=config.sketches.to_dict(),
    )
    write_json(file, {"of": of, "costs": costs._asdict()})
    return costs


def cost(scores: Scores, costs: Costs, n: int, learnwares: int, seeds: int) -> dict:
    """The `seconds`, `bytes` and `forward_passes` of a family for a user with n rows."""
    family, d, p = scores.family, costs.dimension, costs.parameters
    gradient = n * costs.gradient[USERS.get(scores.target, "answers")]
    reduced = costs.points * (4 * d + 8)
    seconds, size = {
        "rkme": (n * costs.embed + costs.reduce * (n > costs.points), reduced),
        "mean_cosine": (n * costs.embed, 4 * d),
        "centroid": (n * costs.embed, 4 * d),
        "pave": (gradient + costs.fit, seeds * (4 * p + 8)),
        "pave_sketch": (gradient + costs.fit, 4 * costs.sketches["vector"]),
        "one_step": (gradient, 4 * p),
        "one_step_sketch": (gradient, 4 * costs.sketches["vector"]),
        "gradients_rkme": (gradient, costs.points * (4 * costs.sketches["row"] + 8)),
        "task2vec": (gradient, 4 * p),
        **dict.fromkeys(("bm25", "static", "random"), (0.0, 0)),
        **dict.fromkeys(MODELS_RUN, (n * learnwares * costs.models, 0)),
    }.get(family, (n * costs.embed, reduced))
    if family in baselines.BASELINES:
        passes = baselines.BASELINES[family].forward_passes(learnwares, n)
    else:
        passes = n if scores.target else 0
    return {"seconds": seconds, "bytes": size, "forward_passes": passes}


# ---- how good they are


def rows_of(setting: Setting, scores: Scores, costs: Costs, config: ConfigDict) -> list[dict]:
    """A row for every number of rows: means over users and seeds, and two standard errors.

    stderr: over users (of their means over seeds), what another choice of tasks would change.
    stderr_seeds: over seeds, what other rows of the same tasks would; None where every user has all
    rows there are. by_user: means over seeds. gap_closed: of the means, between chance and the
    best. seconds: to make what a user ranks by. bytes: of what a learnware publishes for it.
    forward_passes: of language models over a row, to rank. Learnwares of equal score share a place.
    """
    rows, m = [], len(setting.dock.pool.ids)
    for n, count in enumerate(config.rows):
        if np.isnan(scores.values[:, n]).all():
            continue
        measured, bounds = [], []
        for u in range(len(setting.tasks)):
            kept = ranked_for(setting, u)
            truth = setting.truth[u, kept]
            bounds.append((truth.mean(), truth.max()))
            own = kept.index(u) if not setting.leave_out_own else None
            measured.append([metrics(seed[kept], truth, own) for seed in scores.values[u, n]])
        measured = np.moveaxis(np.array(measured), 2, 0)  # (metrics, users, seeds)
        row = {
            "setting": setting.name,
            "family": scores.family,
            "target": scores.target,
            "similarity": scores.similarity,
            "n": count,
            "rows": [min(count, available) for available in _available(setting, config)],
            "users": measured.shape[1],
            "seeds": measured.shape[2],
            **cost(scores, costs, count, m, len(config.seeds)),
        }
        row |= dict(zip(METRICS, map(float, measured.mean((1, 2))), strict=True))
        chance, best = np.mean(bounds, 0)
        row["gap_closed"] = gap_closed(best - row["regret_at_1"], chance, best)
        by_user = measured.mean(2).round(4).tolist()
        row["by_user"] = dict(zip(METRICS, by_user, strict=True))
        row["stderr"] = _errors(measured.mean(2))
        everything = all(count >= available for available in _available(setting, config))
        row["stderr_seeds"] = None if everything else _errors(measured.mean(1))
        rows.append(row)
    return rows


def metrics(scores: np.ndarray, truth: np.ndarray, own: int | None) -> tuple[float, float, float]:
    """top1, regret_at_1 and kendall_tau of one ranking; learnwares of the best score share it.

    top1 is the hit of place `own`, or without one that of the truly best. ValueError where a score
    is not a number.
    """
    first = scores == scores.max()
    if not first.any():
        raise ValueError("families: a score is not a number.")
    hit = first[own] / first.sum() if own is not None else (truth[first] == truth.max()).mean()
    return float(hit), float(truth.max() - truth[first].mean()), kendall(scores, truth)


def _errors(means: np.ndarray) -> dict[str, float]:
    errors = means.std(1, ddof=1) / np.sqrt(means.shape[1])
    return dict(zip(METRICS, map(float, errors), strict=True))


def _available(setting: Setting, config: ConfigDict) -> list[int]:
    return [len(pool_rows(task, config)) for task in setting.tasks]


def shown_rows(rows: Sequence[dict]) -> dict[tuple, dict]:
    """Rows by (setting, family, target, n), those of vectors with the similarity `SHOWN`."""
    return {
        (row["setting"], row["family"], row["target"], row["n"]): row
        for row in rows
        if row["similarity"] in ("", "mmd", SHOWN)
    }


def table(rows: Sequence[dict]) -> list[str]:
    """Markdown: a line a family, the harder setting last."""
    shown = shown_rows(rows)
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        counts = sorted({key[3] for key in shown if key[0] == setting})
        metrics = {"matching": ["top1"], "family": ["regret_at_1", "kendall_tau"]}[setting]
        head = ["family", *(f"{LABELS[m]}, n = {n}" for m in metrics for n in counts)]
        head += ["seconds", "bytes", "passes"]
        lines += [f"**{setting}**", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for family, target in dict.fromkeys(key[1:3] for key in shown if key[0] == setting):
            cells = [f"{family}, {target}" if target else family]
            for metric in metrics:
                for n in counts:
                    row = shown.get((setting, family, target, n))
                    cells.append(_cell(row, metric) if row else "")
            row = next(
                shown[setting, family, target, n]
                for n in (64, *counts)
                if (setting, family, target, n) in shown
            )
            cells += [f"{row['seconds']:.2g}", f"{row['bytes']:,}", f"{row['forward_passes']:,}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return [*lines, *NOTES]


def _cell(row: dict, metric: str) -> str:
    scale, digits = (100, 0) if metric == "top1" else (1, 3 if metric == "regret_at_1" else 2)
    return f"{scale * row[metric]:.{digits}f} ± {scale * row['stderr'][metric]:.{digits}f}"
