"""Benchmark of parameter vectors: making them beside cheaper vectors, ranking them beside a loop.

Example: python -m experiments.bench_pave --config=configs/bench_pave.py:smoke
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("bench_pave")

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.bench_slm import cores, torch_way
from experiments.common import say, write_json
from experiments.models import open_model
from experiments.vectors import Reference, batches_of, open_reference, row_gradients
from learnware_jax import figures
from learnware_jax.selection.pool import Pool, build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.slm.decoder import init_params
from learnware_jax.slm.finetune import Text
from learnware_jax.slm.weights import Model, read_config
from learnware_jax.specification import pave
from learnware_jax.specification.kernels import Linear
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.sketch import Sketch, make_sketch, sketch_of

# Ways to make vectors; all are compared with the first.
ALONE = "fits of the true loss, one after another"
# Ways to rank.
OURS = "ours"
PRODUCT = "NumPy: matrix by vector"
SUM = "XLA: sum of all numbers"
SKETCHED = "ours: sketches, then the best exactly"


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words."""
    model = "a random model" if config.model.sizes.to_dict() else config.model.name
    return {
        "vectors": f"of {config.vectors.tasks} tasks, {config.vectors.rows} rows each, by {model}",
        "ranking": f"{config.ranking.learnwares:,} vectors of {config.ranking.dimension:,} numbers",
        "next": "bench_slm --config=configs/bench_slm.py:smoke",
    }


def run(config: ConfigDict) -> dict:
    """Measure everything; tables are printed as they come and written to workdir/results.json."""
    file, device = Path(config.workdir) / "results.json", jax.devices()[0]
    output = {
        "model": "random" if config.model.sizes.to_dict() else config.model.name,
        "device": device.device_kind,
        "platform": device.platform,
        "cores": cores(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    for name, part in (("vectors", make_vectors), ("ranking", rank_vectors)):
        output[name] = part(config) | {"load": os.getloadavg()[0]}
        write_json(file, output)
    for name, field in (("vectors", "vectors_a_minute"), ("ranking", "ms_a_user")):
        print(figures.save(draw(output[name]["ways"], field), file.with_name(name))[0])
    print(file)
    return output


def draw(ways: list[dict], field: str):
    """A figure of all ways: the median, the least and the greatest of rounds."""
    marks = [
        figures.Dot(way["way"], *(way[field][end] for end in ("median", "low", "high")))
        for way in ways
    ]
    label = {"vectors_a_minute": "vectors a minute", "ms_a_user": "milliseconds a user"}[field]
    return figures.dots([("", marks)], label=label)


def in_turn(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of every way in every round: a round calls each once, in an order that turns."""
    say(f"Measured in turn: {', '.join(ways)}.")
    names, seconds = list(ways), {name: [] for name in ways}
    for call in ways.values():
        call()
    for turn in range(repeats):
        cut = turn % len(names)
        for name in names[cut:] + names[:cut]:
            begin = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begin)
    return {name: np.array(taken) for name, taken in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Of all rounds: the median, the least and the greatest."""
    return {
        "median": float(np.median(values)),
        "low": float(np.min(values)),
        "high": float(np.max(values)),
    }


def _shown(values: dict[str, float]) -> str:
    def number(value):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return f"{number(values['median'])} ({number(values['low'])} to {number(values['high'])})"


# ---- how many a minute are made


class Task(NamedTuple):
    """Rows of a task in two forms, and the order in which a fit sees them."""

    texts: list[Text]
    rows: Any  # a Batch, leaves (n, ...)
    order: np.ndarray  # (steps, batch)


def opened(config: ConfigDict) -> Reference:
    """The reference model that is named, or one of the sizes given with random parameters."""
    sizes = config.model.sizes.to_dict()
    if not sizes:
        return open_reference(open_model(config.model), config.reference)
    model = read_config(sizes)
    params = init_params(jax.random.key(config.seed), model, scale=0.3)
    return open_reference(Model(params, model, None, "random", "", "", None, 0), config.reference)


def make_tasks(reference: Reference, config: ConfigDict) -> list[Task]:
    """Tasks of random rows, all of the greatest width: what they say costs nothing."""
    rng, width = np.random.default_rng(config.seed), config.reference.widths[-1]
    tasks = []
    for i in range(config.vectors.tasks):
        ids = rng.integers(0, reference.model.config.vocabulary, (config.vectors.rows, width))
        texts = [Text(row.tolist(), width - config.vectors.answer) for row in ids]
        ((_, rows),) = batches_of(texts, config.reference.widths, len(texts))
        order = pave.draw_rows(jax.random.key(i), len(texts), _settings(config))
        tasks.append(Task(texts, jax.device_put(rows), np.asarray(order)))
    return tasks


def _settings(config):
    return pave.Settings(**config.fit.to_dict())


def make_vectors(config: ConfigDict) -> dict:
    """Vectors a minute, of fits of the true loss and of what is to be had for less.

    A few steps of a fit are measured, and counted up to a whole one. The fits in one program are
    as many at a time as there are tasks. The gradients of a task's rows are computed once, and
    fits to them then go without the model, for any number of vectors of the same rows.
    """
    reference, given = opened(config), config.vectors
    tasks, whole = make_tasks(reference, config), _settings(config)
    part = whole._replace(steps=given.steps)
    loss, start, first = reference.loss, reference.adapter.b, tasks[0]
    stacked = jax.device_put(jax.tree.map(lambda *rows: np.stack(rows), *(t.rows for t in tasks)))
    orders = np.stack([task.order[: given.steps] for task in tasks])
    together = config.reference.together
    linear = _linear(gradients_of(reference, first.texts, together), len(start))
    short = whole._replace(steps=given.short)
    fits = {
        "alone": lambda: [
            pave.fit(loss, start, task.rows, order, settings=part)
            for task, order in zip(tasks, orders, strict=True)
        ],
        "together": lambda: pave.fit_many(
            loss, start, stacked, orders, settings=part, together=len(tasks)
        ),
        "gradients": lambda: gradients_of(reference, first.texts, together),
        "linear": lambda: linear(first.order, whole),
        "linear, short": lambda: linear(first.order[: given.short], short),
        "one step": lambda: pave.one_step(loss, start, first.rows, together=together),
    }
    ways = {name: functools.partial(_finished, call) for name, call in fits.items()}
    seconds = in_turn(ways, given.repeats)
    steps, n = len(tasks) * given.steps, given.rows
    passed = seconds["gradients"]
    each = {
        ALONE: seconds["alone"] / steps * whole.steps,
        f"fits of the true loss, {len(tasks)} in one program": seconds["together"]
        / steps
        * whole.steps,
        f"gradients of {n} rows, then {whole.steps} steps to them": passed + seconds["linear"],
        f"gradients of {n} rows, then {short.steps} steps to them": passed
        + seconds["linear, short"],
        f"another {whole.steps} steps to the same gradients": seconds["linear"],
        f"one-step gradient of {n} rows": seconds["one step"],
    }
    rows = [
        {
            "way": way,
            "seconds_a_vector": spread(taken),
            "vectors_a_minute": spread(60 / taken),
            "times_as_fast": spread(each[ALONE] / taken),
        }
        for way, taken in each.items()
    ]
    output = {
        "numbers": sum(leaf.size for leaf in jax.tree.leaves(start)),
        "tasks": len(tasks),
        "rows": n,
        "tokens": config.reference.widths[-1],
        "batch": whole.batch,
        "steps_measured": given.steps,
        "steps_a_vector": whole.steps,
        "steps_a_minute": spread(60 * steps / seconds["alone"]),
        "seconds": {name: taken.tolist() for name, taken in seconds.items()},
        "ways": rows,
        "checks": _checks(fits, linear(first.order[: given.steps], part)),
    }
    print(
        f"\n{output['numbers']:,} numbers a vector, {n} rows of {output['tokens']} tokens; "
        f"{given.steps} steps of {whole.batch} rows a task measured, "
        f"{_shown(output['steps_a_minute'])} a minute one after another. "
        f"{given.repeats} rounds: median (range).\n"
    )
    print("| way | vectors a minute | times as fast |\n|---|---|---|")
    for row in rows:
        made, ratio = _shown(row["vectors_a_minute"]), _shown(row["times_as_fast"])
        print(f"| {row['way']} | {made} | {ratio} |")
    for name, value in output["checks"].items():
        print(f"{name}: {value:.6f}")
    return output


def _finished(call):
    return jax.block_until_ready(call())


def gradients_of(reference: Reference, texts: Sequence[Text], together: int):
    """The gradients at the start of every row, B's leaves in one array, and the weights.

    As `experiments.vectors.make_vectors` prepares them for its fits.
    """
    gradients, weights = row_gradients(reference, texts, together=together)
    return jax.block_until_ready(_joined(gradients)), weights


def _joined(leaves):
    return jnp.concatenate([leaves[name] for name in sorted(leaves)], axis=-1)


def _linear(given, leaves):
    """Fits to gradients of the start: a function of the order and the settings.

    The pull is a mean over tensors, of which the joined array has less by the number of `leaves`.
    """
    gradients, weights = given
    loss, start = pave.linear_loss(gradients, weights), jnp.zeros(gradients.shape[1:], jnp.float32)
    places = jnp.arange(len(gradients))

    def fit(order, settings):
        settings = settings._replace(pull=settings.pull / leaves)
        return pave.fit(loss, start, places, order, settings=settings)

    return fit


def _checks(fits, linear):
    """Cosines that tell whether two ways made the same vector of the first task."""
    alone, many = fits["alone"]()[0].change, fits["together"]().change

    def cosine(a, b):
        return float(pave.flatten(a) @ pave.flatten(b))

    return {
        "cosine of a fit alone and together": cosine(alone, jax.tree.map(lambda x: x[0], many)),
        "cosine of a fit of the true loss and one to the gradients": cosine(
            _joined(alone), linear.change
        ),
    }


# ---- how fast they are ranked


class Vectors(NamedTuple):
    """Unit vectors (float32) of learnwares and users, group after group."""

    learnwares: np.ndarray  # (M, d)
    users: np.ndarray  # (Q, d)


def synthetic(config: ConfigDict) -> Vectors:
    """Random unit vectors, each with a share of its group's direction.

    Shares of learnwares differ from nearly none to most; a user has half. User i is in group i.
    """
    given, rng = config.ranking, np.random.default_rng(config.seed)
    d = given.dimension
    directions = rng.standard_normal((given.groups, d), np.float32)

    def fill(count, shares):
        x = np.empty((count, d), np.float32)
        for i, share in enumerate(shares):
            rng.standard_normal(out=x[i], dtype=np.float32)
            x[i] *= np.sqrt(1 - share)
            x[i] += np.float32(np.sqrt(share)) * directions[i % given.groups]
            x[i] /= np.linalg.norm(x[i])
        return x

    learnwares = fill(given.learnwares, rng.uniform(0.02, 0.7, given.learnwares))
    return Vectors(learnwares, fill(given.users, np.full(given.users, 0.5)))


def pool_of(vectors: np.ndarray) -> Pool:
    """A pool of one vector a learnware, for the linear kernel."""
    count = len(vectors)
    specs = [pave.mean_embedding_of(vector[None]) for vector in vectors]
    ids = [str(i) for i in range(count)]
    return build_pool(specs, Linear(), ids=ids, n=[1] * count, residual=[0.0] * count)


def _users(vectors: np.ndarray) -> list[RKME]:
    return [pave.mean_embedding_of(vector[None]) for vector in vectors]


def peer_loop(learnwares: np.ndarray, user: np.ndarray) -> tuple[str, Callable[[], list[int]], int]:
    """The ranking of learnware 0.4.0.post1 (market/llm/searcher.py), its name and torch's threads.

    A loop of `cosine_similarity` over the learnwares, each a float, then a sort. Without torch, the
    three inner products of every pair in NumPy.
    """

    def ranked(similarities):
        finite = [i for i, s in enumerate(similarities) if np.isfinite(s)]
        return list(reversed(sorted(finite, key=lambda i: similarities[i])))

    if importlib.util.find_spec("torch") is None:

        def cosine(a, b):
            return float(a @ b) / float(np.sqrt(a @ a) * np.sqrt(b @ b))

        return (
            "loop of cosines, NumPy",
            lambda: ranked([cosine(vector, user) for vector in learnwares]),
            0,
        )

    import torch
    from torch.nn.functional import cosine_similarity

    held, mine = [torch.from_numpy(vector) for vector in learnwares], torch.from_numpy(user)

    def loop():
        return ranked([float(cosine_similarity(v, mine.to(v.device), dim=0)) for v in held])

    way = torch_way("loop of cosines, torch", loop)
    return way.name, way.call, way.threads


def exact(learnwares: np.ndarray, user: np.ndarray) -> np.ndarray:
    """|u - z|^2 for every learnware, in float64 NumPy, apart from the code under test."""
    user = user.astype(np.float64)
    return np.array([((user - vector) ** 2).sum() for vector in learnwares])


class Sketches(NamedTuple):
    """Sketches of a pool's vectors, brought to unit norm, and how to make a user's."""

    sketch: Sketch
    pool: Pool
    width: int

    def of(self, vector: np.ndarray) -> np.ndarray:
        """The unit sketch of a vector."""
        return np.asarray(_unit_sketch(self.sketch, vector, width=self.width))


@functools.partial(jax.jit, static_argnames="width")
def _unit_sketch(sketch, vector, *, width):
    short = sketch_of(sketch, vector, width=width)
    return short / jnp.linalg.norm(short)


def make_sketches(learnwares: np.ndarray, config: ConfigDict) -> Sketches:
    """A pool of the learnwares' sketches; nobody needs the long vectors for a first choice."""
    width = config.sketch.width
    sketch = make_sketch(jax.random.key(config.seed), learnwares.shape[1], width)
    short = [np.asarray(_unit_sketch(sketch, vector, width=width)) for vector in learnwares]
    return Sketches(sketch, pool_of(np.stack(short)), width)


def candidates(sketches: Sketches, users: np.ndarray) -> np.ndarray:
    """Learnwares by their sketches' distance from each user's (Q, M), closest first."""
    short = _users(np.stack([sketches.of(user) for user in users]))
    return np.argsort(distances(short, sketches.pool, n=[1] * len(short)), axis=1, kind="stable")


def best_of(learnwares: np.ndarray, chosen: np.ndarray, user: np.ndarray) -> np.ndarray:
    """The chosen learnwares by their exact inner products with a user, greatest first."""
    products = np.array([learnwares[i] @ user for i in chosen])
    return chosen[np.argsort(-products, kind="stable")]


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """The share of `wanted` (Q, k) that is among `found` (Q, any), mean over users, 0 to 1."""
    pairs = zip(found.tolist(), wanted.tolist(), strict=True)
    return float(np.mean([len({*some} & {*best}) / len(best) for some, best in pairs]))


def rank_vectors(config: ConfigDict) -> dict:
    """Milliseconds a user: exact ranking, the loop, the memory's rate, and ranking by sketches."""
    given, top = config.ranking, config.top
    say(f"Making {given.learnwares} vectors of {given.dimension} numbers.")
    learnwares, them = synthetic(config)
    begin = time.perf_counter()
    pool = pool_of(learnwares)
    built = time.perf_counter()
    sketches = make_sketches(learnwares, config)
    sketched = time.perf_counter()
    users, one = _users(them), them[0]
    peer, loop, threads = peer_loop(learnwares, one)
    summed = jax.jit(jnp.sum)

    def by_sketches():
        chosen = candidates(sketches, them[:1])[0, : config.sketch.candidates]
        return best_of(learnwares, chosen, one)

    seconds = in_turn(
        {
            OURS: lambda: distances(users[:1], pool, n=[1]),
            peer: loop,
            PRODUCT: lambda: learnwares @ one,
            SUM: lambda: summed(pool.z).block_until_ready(),
            SKETCHED: by_sketches,
        },
        given.repeats,
    )
    batch = in_turn(
        {
            OURS: lambda: distances(users, pool, n=[1] * len(users)),
            "NumPy: matrix by matrix": lambda: learnwares @ them.T,
        },
        given.batch_repeats,
    )
    # The memory gives at least what the faster of the two reads a second.
    memory = np.minimum(seconds[PRODUCT], seconds[SUM])
    numbers = {SUM: pool.z.size}
    ways = [
        {
            "way": way,
            "ms_a_user": spread(1e3 * taken),
            "gigabytes_a_second": spread(4 * numbers.get(way, learnwares.size) / taken / 1e9)
            if way != SKETCHED
            else None,
            "ours_times_as_fast": spread(taken / seconds[OURS]),
        }
        for way, taken in seconds.items()
    ]
    batches = [
        {
            "way": f"{way}, {len(users)} users",
            "ms_a_user": spread(1e3 * taken / len(users)),
            "ours_times_as_fast": spread(taken / batch[OURS]),
        }
        for way, taken in batch.items()
    ]
    found = distances(users, pool, n=[1] * len(users))
    order = np.argsort(found, axis=1, kind="stable")
    by_sketch = candidates(sketches, them)
    first = by_sketch[:, : config.sketch.candidates]
    errors, same = [], []
    for i in range(given.checked_users):
        wanted = exact(learnwares, them[i])
        best = np.argsort(wanted, kind="stable")[:top]
        # Alone and in a batch users take different programs.
        for got in (found[i], distances(users[i : i + 1], pool, n=[1])[0]):
            errors.append(np.abs(got - wanted).max())
            same.append(np.array_equal(np.argsort(got, kind="stable")[:top], best))
    ranked = np.stack([best_of(learnwares, *pair) for pair in zip(first, them, strict=True)])
    output = {
        "learnwares": given.learnwares,
        "dimension": given.dimension,
        "build_seconds": built - begin,
        "seconds": {name: taken.tolist() for name, taken in seconds.items()},
        "batch_seconds": {name: taken.tolist() for name, taken in batch.items()},
        "torch_threads": threads,
        "ways": [*ways, *batches],
        "loop_over_ours": spread(seconds[peer] / seconds[OURS]),
        "ours_over_memory": spread(seconds[OURS] / memory),
        "max_error": float(max(errors)),
        "top_same_as_float64": all(same),
        "top_same_as_loop": loop()[:top] == order[0, :top].tolist(),
        "sketch": {
            "width": sketches.width,
            "candidates": first.shape[1],
            "build_seconds": sketched - built,
            "bytes": 4 * sketches.width,
            "bytes_exact": 4 * given.dimension,
            "recall_alone": recall(by_sketch[:, :top], order[:, :top]),
            "recall": recall(ranked[:, :top], order[:, :top]),
        },
    }
    _print_ranking(output, given, top)
    return output


def _print_ranking(output, given, top):
    size, sketch = 4e-9 * given.learnwares * given.dimension, output["sketch"]
    print(
        f"\n{given.learnwares:,} learnwares, {given.dimension:,} float32 numbers each "
        f"({size:.3g} GB), one user at a time or {given.users} in a call. {given.repeats} and "
        f"{given.batch_repeats} rounds: median (range).\n"
    )
    print("| way | ms a user | GB/s | ours is so many times as fast |\n|---|---|---|---|")
    for row in output["ways"]:
        rate = row.get("gigabytes_a_second")
        cells = _shown(row["ms_a_user"]), _shown(rate) if rate else ""
        print(f"| {row['way']} | {' | '.join(cells)} | {_shown(row['ours_times_as_fast'])} |")
    print(
        f"\nours: {_shown(output['loop_over_ours'])} times as fast as the loop (goal 20), "
        f"{_shown(output['ours_over_memory'])} times the time of the memory (goal 2); pool built "
        f"in {output['build_seconds']:.1f} s; greatest error {output['max_error']:.1e}; top {top} "
        f"{'same' if output['top_same_as_float64'] else 'DIFFERENT'} as float64's, "
        f"{'same' if output['top_same_as_loop'] else 'DIFFERENT'} as the loop's"
    )
    print(
        f"sketches: {sketch['bytes']:,} bytes a learnware in place of {sketch['bytes_exact']:,}, "
        f"made in {sketch['build_seconds']:.1f} s; recall@{top} {sketch['recall_alone']:.3f} "
        f"alone, {sketch['recall']:.3f} with the best {sketch['candidates']} ranked exactly",
        flush=True,
    )
