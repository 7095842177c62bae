"""Benchmark of search in large pools: build, bytes, milliseconds a query, recall, what is measured.

Example: python -m experiments.bench_scale --config=configs/bench_scale.py:million
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("bench_scale")

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.build import tasks_of
from experiments.common import bar, embed_texts, open_encoder, space_of, write_json
from learnware_jax import figures
from learnware_jax.dock import index, store
from learnware_jax.dock.tasks import load_task
from learnware_jax.dock.texts import sample
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import rank
from learnware_jax.selection.search import (
    Sketches,
    Specifications,
    place,
    pool_mesh,
    put_row,
    search,
    shortlist,
)
from learnware_jax.specification.header import SCHEMA, Header
from learnware_jax.specification.kernels import Gaussian, Linear, squared_distances, to_dict
from learnware_jax.specification.reduce import reduce_many
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.sketch import (
    Coded,
    choose_landmarks,
    make_sketch,
    orthogonal_frequencies,
    project,
    quantise,
    random_features,
    sketch_of,
)

# Learnwares that are made, projected and written at a time.
_PIECE = 4096


class Material(NamedTuple):
    """Reduced sets of real tasks, and what they are perturbed by."""

    z: np.ndarray  # (B, m, d)
    beta: np.ndarray  # (B, m)
    rows: np.ndarray  # embedded texts; differences of two of them are noise


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    _check_space(config)
    sizes = sorted({size for pool in config.pools.values() for size in pool.sizes})
    return {
        "pools": ", ".join(f"{size:,}" for size in sizes) + " learnwares",
        "vectors": f"{config.vectors.learnwares:,}",
        "users": str(config.users),
        "next": "search --config=configs/search.py:quickstart",
    }


def run(config: ConfigDict) -> dict:
    """Measure every pool; writes workdir/results.json and figures. Returns the results."""
    workdir = Path(config.workdir)
    if config.measure:  # in a process of its own, for its memory
        output = measure(config, config.measure)
        write_json(workdir / f"measured-{config.measure}.json", output)
        return output
    _check_space(config)
    workdir.mkdir(parents=True, exist_ok=True)
    output = {"rows": [], "pools": []}
    for given in config.pools.values():
        home = workdir / f"pool-{max(given.sizes)}"
        shutil.rmtree(home, ignore_errors=True)
        try:
            material, users = make_material(config, given)
            built = build(config, given, material, users, home)
            del material
            for size in given.sizes:
                measured = _measured_apart(config, given, home, size)
                output["pools"].append(
                    {"learnwares": size, "points": given.points} | built[size] | measured["main"]
                )
                measured["rows"][0]["build_seconds"] = built[size]["build_seconds"]
                for row in measured["rows"]:
                    output["rows"].append(row)
                    _print_row(row)
                write_json(workdir / "results.json", output)
        finally:
            shutil.rmtree(home, ignore_errors=True)
    if config.vectors.learnwares:
        output["rows"].append(vectors(config, workdir))
        _print_row(output["rows"][-1])
    write_json(workdir / "results.json", output)
    points = config.pools.ladder.points
    ladder = [pool for pool in output["pools"] if pool["points"] == points]
    if len(ladder) > 1:
        print(figures.save(draw(ladder), workdir / "scale")[0])
    _print_goals(output)
    print(workdir / "results.json")
    return output


def _check_space(config: ConfigDict) -> None:
    """OSError if the disk has no room for the largest pool."""
    needed = max(
        *(
            max(p.sizes) * (p.points * (4 * 384 + 8) + config.width + 200)
            for p in config.pools.values()
        ),
        4 * config.vectors.learnwares * config.vectors.dimension,
    )
    home = Path(config.workdir).absolute()
    while not home.exists():
        home = home.parent
    free = shutil.disk_usage(home).free
    if free < 1.1 * needed:
        raise OSError(
            f"bench_scale: {config.workdir} has {free / 1e9:.0f} GB free; the largest pool takes "
            f"{needed / 1e9:.0f} GB. Set workdir to a larger disk, or pools to smaller ones."
        )


def real_tasks(config: ConfigDict) -> list[np.ndarray]:
    """Embedded texts of `config.tasks`, a sample fixed by their hashes, task by task."""
    owner = {}
    for i, task in enumerate(tasks_of(config.tasks)):
        for text in load_task(task.name):
            owner.setdefault(text, i)
    encoder = open_encoder(config)
    texts = sample(list(owner), config.texts)
    x = embed_texts(encoder, texts, space_of(encoder, config), keep=True)
    of = np.array([owner[text] for text in texts])
    return [x[of == i] for i in range(of.max() + 1)]


def make_material(config: ConfigDict, given: ConfigDict) -> tuple[Material, list[RKME]]:
    """Reduced sets of mixtures of one to three tasks, and users from the other halves' mixtures."""
    rng = np.random.default_rng(config.seed)
    halves = [np.array_split(rng.permutation(x), 2) for x in real_tasks(config)]

    def mixtures(half: int, count: int, most: int) -> list[np.ndarray]:
        samples = []
        for _ in range(count):
            tasks = rng.choice(len(halves), rng.integers(1, most + 1), replace=False)
            shares = rng.multinomial(given.rows, rng.dirichlet(np.ones(len(tasks))))
            parts = [
                halves[t][half][rng.integers(len(halves[t][half]), size=s)]
                for t, s in zip(tasks, shares, strict=True)
            ]
            samples.append(np.concatenate(parts))
        return samples

    def reduced(samples: list[np.ndarray], points: int) -> list[RKME]:
        found = []
        with bar("compressing", len(samples)) as advance:
            for i in range(0, len(samples), 128):
                some = samples[i : i + 128]
                key = jax.random.fold_in(jax.random.key(config.seed), i)
                options = {"start": "noise", "steps": config.steps}
                fitted = reduce_many(key, some, points, Gaussian(config.gamma), **options)
                found += [each.spec for each in fitted]
                advance(len(some))
        return found

    bases = reduced(mixtures(0, given.bases, 3), given.points)
    users = reduced(mixtures(1, config.users, 2), config.user_points)
    rows = np.concatenate([half for half, _ in halves])
    material = Material(np.stack([b.z for b in bases]), np.stack([b.beta for b in bases]), rows)
    return material, users


def perturbed(
    rng: np.random.Generator, material: Material, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` specifications near those of the material: (count, m, d) and (count, m).

    A base is drawn and moved as a whole up to 0.3 of the way from its mean to that of another; each
    point is moved by a tenth of the difference of two texts and put back on the sphere; weights are
    multiplied by Gamma(8) variables.
    """
    z, beta, rows = material
    a, b = rng.integers(len(z), size=(2, count))
    means = np.einsum("bm,bmd->bd", beta, z).astype(np.float32)
    shift = rng.uniform(0, 0.3, (count, 1)).astype(np.float32) * (means[b] - means[a])
    plus, minus = rng.integers(len(rows), size=(2, count, z.shape[1]))
    moved = z[a] + shift[:, None] + np.float32(0.1) * (rows[plus] - rows[minus])
    moved /= np.linalg.norm(moved, axis=2, keepdims=True)
    weights = beta[a] * rng.gamma(8, size=(count, z.shape[1]))
    return moved, weights / weights.sum(1, keepdims=True)


def pieces(count: int) -> Iterator[slice]:
    """Consecutive slices of `count` rows."""
    for begin in range(0, count, _PIECE):
        yield slice(begin, min(begin + _PIECE, count))


def build(
    config: ConfigDict, given: ConfigDict, material: Material, users: list[RKME], home: Path
) -> dict[int, dict]:
    """The index of the largest pool in home/dock, users beside it; seconds at each size."""
    kernel, rng = Gaussian(config.gamma), np.random.default_rng(config.seed + 1)
    dimension = material.z.shape[2]
    space = {"dimension": dimension, "kernel": to_dict(kernel)}
    store.create_dock(home / "dock", space)
    for i, user in enumerate(users):
        about = {"n": given.rows, "points": len(user.beta), "residual": 0.0}
        file = home / f"user-{i}.rkme.safetensors"
        store.write_spec(file, user, Header(SCHEMA, "rkme", space, about))
    begin = time.perf_counter()
    some = perturbed(rng, material, 2048)
    landmarks = choose_landmarks(
        jax.random.key(config.seed),
        *some,
        kernel,
        count=config.landmarks,
        width=config.width,
    )
    index.create(home / "dock", landmarks, points=given.points, dtype="int8")
    seconds, done = time.perf_counter() - begin, {}
    with bar("building the index", max(given.sizes)) as advance:
        for size in sorted(given.sizes):
            for part in pieces(size):
                part = slice(max(part.start, max(done, default=0)), part.stop)
                if part.start >= part.stop:
                    continue
                z, beta = perturbed(rng, material, part.stop - part.start)
                count = len(z)
                ids = [f"l{i}" for i in range(part.start, part.stop)]
                n, residual = np.full(count, given.rows), np.zeros(count)
                begin = time.perf_counter()
                index.append(home / "dock", ids, z, beta, n=n, residual=residual)
                seconds += time.perf_counter() - begin
                advance(count)
            done[size] = {"build_seconds": seconds}
    return done


def _measured_apart(config: ConfigDict, given: ConfigDict, home: Path, size: int) -> dict:
    """`measure` in a process of its own, so that its memory is its own."""
    program = sys.modules["__main__"].__spec__
    if program is None or not program.name.endswith("bench_scale"):  # from a test
        part = ConfigDict(config.to_dict())
        part.workdir, part.points = str(home), given.points
        return measure(part, size)
    arguments = [a for a in sys.argv[1:] if not a.startswith("--config.workdir")]
    more = [
        f"--config.workdir={home}",
        f"--config.measure={size}",
        f"--config.points={given.points}",
    ]
    code = (
        "import sys; from experiments import bench_scale, command, common; "
        "common.keep_compiled(); common.log_plainly(); "
        "bench_scale.run(command.read('bench_scale', sys.argv[1:])[0])"
    )
    subprocess.run([sys.executable, "-c", code, *arguments, *more], check=True)
    return json.loads((home / f"measured-{size}.json").read_text())


def measure(config: ConfigDict, size: int) -> dict:
    """Everything about the first `size` learnwares of the index in workdir/dock."""
    home, kernel = Path(config.workdir), Gaussian(config.gamma)
    begin = time.perf_counter()
    opened = index.open_index(home / "dock")
    open_seconds = time.perf_counter() - begin
    users, n = [], []
    for i in range(config.users):
        spec, header = store.read_spec(home / f"user-{i}.rkme.safetensors")
        users.append(spec)
        n.append(header.about["n"])
    z, beta = opened.z[:size], opened.beta[:size]
    biased, rows = np.array(opened.self_term[:size]), np.array(opened.n[:size])
    unbiased = biased * rows / (rows - 1)
    specs, shift = Specifications(kernel, z, beta, unbiased), unbiased - biased
    main = (opened.codes, opened.scale, opened.error, opened.rest)
    begin = time.perf_counter()
    sketches = place(pool_mesh(), *(a[:size] for a in main), shift)
    jax.block_until_ready(sketches)
    place_seconds = time.perf_counter() - begin

    def of_users(some: list[RKME]):
        p = project(opened.landmarks, kernel, *(np.stack(a) for a in zip(*some, strict=True)))
        return p.coordinates, p.rest

    found, numbers = _timed(config, users, n, of_users, sketches, specs)
    memory = _memory()
    files = (home / "dock/index").glob("*.bin")
    row_bytes = sum(f.stat().st_size for f in files) // len(opened.codes)
    main_numbers = {
        "open_seconds": open_seconds,
        "place_seconds": place_seconds,
        "index_bytes": size * row_bytes,
        "memory": memory,
        "throughput": _throughput(config, users, n, of_users, sketches, specs),
        "check": _check_all(config, users, n, specs, found),
    }
    common = {"learnwares": size, "points": z.shape[1], "dimension": z.shape[2]}
    rows = [
        common
        | {
            "pool": f"{size} x {z.shape[1]}",
            "sketch": f"landmarks {len(opened.landmarks.points)}, width {opened.codes.shape[1]}",
            "dtype": "int8",
            "build_seconds": 0.0,
            "bytes": _bytes(sketches, size),
        }
        | numbers
        | _recall(users, of_users, sketches, found.index)
    ]
    for name, dtype in config.others:
        begin = time.perf_counter()
        with bar(f"{name}, {dtype}", size) as advance:
            coded, rest, of_others = _others(config, name, dtype, opened, specs, advance)
        made = time.perf_counter() - begin
        sketches = place(pool_mesh(), *coded, rest, shift)
        found_here, numbers = _timed(config, users, n, of_others, sketches, specs)
        rows.append(
            common
            | {
                "pool": f"{size} x {z.shape[1]}",
                "sketch": name,
                "dtype": dtype,
                "build_seconds": made,
                "bytes": _bytes(sketches, size),
            }
            | numbers
            | _recall(users, of_others, sketches, found.index)
            | {"recall_after": _overlap(found_here.index, found.index)}
        )
    if config.points and size <= config.exact_learnwares:
        main_numbers["exact"] = _exact(config, users, n, opened, specs, of_users, shift, main, size)
    if size == config.adding:
        main_numbers["adding"] = _adding(config, home, opened, specs, shift, main, size)
    return {"main": main_numbers, "rows": rows}


def _others(config, name, dtype, opened, specs, advance):
    """(codes, rest or None, how a user is sketched) of another first stage."""
    kernel, z, beta, _ = specs
    key = jax.random.key(config.seed)
    if name == "landmarks":

        def of(z, beta):
            return project(opened.landmarks, kernel, z, beta)[:2]
    elif name == "means":
        # The deficit of a near-linear kernel is about -slope t: on the scale of its distances.
        scale = np.sqrt(2 * config.gamma)

        def of(z, beta):
            return scale * np.einsum("qm,qmd->qd", beta, z), None
    else:
        width = int(name.removeprefix("random features "))
        frequencies = orthogonal_frequencies(key, kernel, z.shape[2], width // 2)

        def of(z, beta):
            return np.asarray(random_features(frequencies, z, beta.astype(np.float32))), None

    # Less a mean, as landmarks are: codes of few bits are for what differs.
    center = 0 if name == "landmarks" else of(z[:512], np.asarray(beta[:512]))[0].mean(0)
    coded, rest = [], []
    for part in pieces(len(z)):
        for some in _parts(part, 512):
            c, r = of(z[some], np.asarray(beta[some]))
            coded.append(quantise(c - center, dtype))
            rest.append(r)
        advance(part.stop - part.start)

    def of_users(some):
        c, r = of(*(np.stack(a) for a in zip(*some, strict=True)))
        return c - center, r

    whole = None if rest[0] is None else np.concatenate(rest)
    return Coded(*map(np.concatenate, zip(*coded, strict=True))), whole, of_users


def _parts(part: slice, size: int) -> Iterator[slice]:
    for begin in range(part.start, part.stop, size):
        yield slice(begin, min(begin + size, part.stop))


def _timed(
    config: ConfigDict,
    users: list[RKME],
    n: list[int],
    of_users: Callable[[list[RKME]], tuple],
    sketches: Sketches,
    specs: Specifications,
) -> tuple[Any, dict]:
    """What is found for all users, and times of one user after another, compiled and warm."""
    most = config.shortlist if sketches.rest is None else None

    def query(i):
        begin = time.perf_counter()
        stage = of_users(users[i : i + 1])
        sketched = time.perf_counter()
        found = search(
            *(users[i : i + 1], *stage, sketches, specs),
            n=n[i : i + 1],
            top_k=config.top_k,
            most=most,
        )
        done = time.perf_counter()
        jax.block_until_ready(shortlist(sketches, *stage, count=config.top_k))
        seconds = done - begin, sketched - begin, time.perf_counter() - done
        return found, [1000 * s for s in seconds]

    for i in range(len(users)):
        query(i)
    found, times = zip(*(query(i) for i in range(len(users))), strict=True)
    found = type(found[0])(*map(np.concatenate, zip(*found, strict=True)))
    total, sketching, stage = np.array(times).T
    size = len(specs.z)
    return found, {
        "ms_per_query": float(np.median(total)),
        "ms_range": [float(total.min()), float(total.max())],
        "ms_sketch_of_user": float(np.median(sketching)),
        "ms_first_stage": float(np.median(stage)),
        # What bounds have ruled out; a short list rules nothing out.
        "pruned": 0.0 if most else float(1 - found.measured.mean() / size),
        "measured": [
            int(found.measured.min()),
            float(found.measured.mean()),
            int(found.measured.max()),
        ],
        "certified": bool(found.certified.all()),
    }


def _overlap(some: np.ndarray, wanted: np.ndarray) -> float:
    """The mean share of each row of `wanted` that the same row of `some` has."""
    pairs = zip(some, wanted, strict=True)
    return float(np.mean([np.isin(want, found).mean() for found, want in pairs]))


def _recall(users, of_users, sketches, true) -> dict:
    """Shares of the true first that are among the 10 and the 100 closest sketches."""
    count = min(100, len(sketches.code))
    ranked = np.concatenate(
        [
            np.asarray(shortlist(sketches, *of_users(users[i : i + 1]), count=count)[1])
            for i in range(len(users))
        ]
    )
    return {f"recall_at_{k}": _overlap(ranked[:, :k], true) for k in (10, 100)}


def _bytes(sketches: Sketches, size: int) -> int:
    """Bytes of the first stage of `size` learnwares."""
    return size * sum(a.nbytes // len(a) for a in jax.tree.leaves(sketches))


def _memory() -> dict:
    """Bytes that this process holds, and the most it held with files that it had mapped."""
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    fields = dict(line.split(":", 1) for line in lines)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    held = int(fields["RssAnon"].split()[0]) * 1024 if "RssAnon" in fields else peak
    return {"held": held, "peak_with_mapped_files": peak}


def _throughput(config, users, n, of_users, sketches, specs) -> list[dict]:
    """Milliseconds a user, all of them in batches, warm."""
    rows = []
    for batch in config.batches:
        for _ in range(2):  # the first compiles
            begin = time.perf_counter()
            for i in range(0, len(users), batch):
                some, k = users[i : i + batch], n[i : i + batch]
                search(some, *of_users(some), sketches, specs, n=k, top_k=config.top_k)
            seconds = time.perf_counter() - begin
        rows.append({"users": batch, "ms_a_user": 1000 * seconds / len(users)})
    return rows


@jax.jit
def _all_distances(kernel, users, weights, z, beta):
    """sum_ij w_i b_j deficit of users (q, K, d) and learnwares (c, m, d), float32: (q, c)."""
    rows = users.reshape(-1, users.shape[2])
    t = squared_distances(rows, z.reshape(-1, z.shape[2]))
    values = kernel.deficit(t).reshape(*weights.shape, *beta.shape)
    values = jnp.einsum("qkcm,qk->qcm", values, weights)
    return jnp.einsum("qcm,cm->qc", values, beta)


def _check_all(config, users, n, specs, found) -> dict:
    """The rankings of some users against distances to all learnwares, by another program."""
    some = users[: config.checked]
    z, weights = (np.stack(a) for a in zip(*some, strict=True))
    weights = weights.astype(np.float32)
    cross = []
    for part in pieces(len(specs.z)):
        for piece in _parts(part, 512):
            beta = np.asarray(specs.beta[piece], np.float32)
            made = _all_distances(specs.kernel, z, weights, specs.z[piece], beta)
            cross.append(np.asarray(made, np.float64))
    cross = np.concatenate(cross, 1)
    own = [_own(user, specs.kernel) * k / (k - 1) for user, k in zip(some, n, strict=False)]
    distance = np.array(own)[:, None] + specs.self_term - 2 * cross
    order = np.argsort(distance, axis=1)[:, : config.top_k]
    there = np.take_along_axis(distance, found.index[: len(some)], 1)
    return {
        "users": len(some),
        "same_first": _overlap(found.index[: len(some)], order),
        "greatest_difference": float(np.abs(there - found.distance[: len(some)]).max()),
    }


def _own(user: RKME, kernel: Gaussian) -> float:
    z = np.asarray(user.z, np.float64)
    t = ((z[:, None] - z[None]) ** 2).sum(2)
    return float(user.beta @ np.expm1(-kernel.gamma * t) @ user.beta)


def _exact(config, users, n, opened, specs, of_users, shift, main, size) -> dict:
    """Search beside the exact ranking of all and a loop over learnwares, in turn."""
    kernel, z, beta, _ = specs
    pool = build_pool(
        [RKME(*pair) for pair in zip(z, beta, strict=True)],
        kernel,
        ids=index.ids_of(opened, range(size)),
        n=opened.n[:size].tolist(),
        residual=[0.0] * size,
    )
    sketches = place(pool_mesh(), *(a[:size] for a in main), shift)
    rows = []
    for batch in config.exact_batches:
        some, k = users[:batch], n[:batch]
        ways = {
            "exact": lambda some=some, k=k: rank(some, pool, n=k, top_k=config.top_k).index,
            "search": lambda some=some, k=k: (
                search(some, *of_users(some), sketches, specs, n=k, top_k=config.top_k).index
            ),
        }
        seconds = {name: [] for name in ways}
        same = np.array_equal(*(way() for way in ways.values()))  # and compiles
        for _ in range(config.repeats):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - begin)
        ratios = np.sort(np.array(seconds["exact"]) / np.array(seconds["search"]))
        rows.append(
            {
                "users": batch,
                "exact_ms": 1000 * float(np.median(seconds["exact"])) / batch,
                "search_ms": 1000 * float(np.median(seconds["search"])) / batch,
                "ratio": [float(ratios[i]) for i in (0, len(ratios) // 2, -1)],
                "same_first": bool(same),
            }
        )
    user = np.asarray(users[0].z, np.float64)
    begin, looped = time.perf_counter(), min(size, 200)
    for i in range(looped):  # what one writes first: float64 NumPy, a learnware at a time
        points = np.asarray(z[i], np.float64)
        t = (user**2).sum(1)[:, None] + (points**2).sum(1) - 2 * user @ points.T
        users[0].beta @ np.expm1(-kernel.gamma * t) @ beta[i]
    loop = 1000 * (time.perf_counter() - begin) / looped * size
    return {"side_by_side": rows, "loop_ms_extrapolated": loop}


def _adding(config, home, opened, specs, shift, main, size) -> dict:
    """Milliseconds to add a learnware to a dock of `size` folders, its index, and the devices."""
    dock, kernel = home / "dock", specs.kernel
    header = Header(
        SCHEMA,
        "rkme",
        store.read_space(dock),
        {"n": 100, "points": specs.z.shape[1], "residual": 0.0},
    )
    user = RKME(np.array(specs.z[0]), np.array(specs.beta[0]))
    store.add(dock, store.Learnware("first", {}, user, header))
    files = {f.name: f.read_bytes() for f in (dock / "learnwares/first").iterdir()}
    with bar("making folders", size) as advance:
        for i in range(size):
            folder = dock / f"learnwares/f{i}"
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            advance(1)
    sketches = place(pool_mesh(), *(a[:size] for a in main), shift)
    spent = {"add_ms": [], "device_ms": []}
    events: list[str] = []

    def heard(name: str, *_: Any, **__: Any) -> None:
        events.append(name)

    for i in range(config.added + 1):
        if i == 1:  # the first compiles
            jax.monitoring.register_event_duration_secs_listener(heard)
        begin = time.perf_counter()
        index.add(dock, store.Learnware(f"new{i}", {"domain": "x"}, user, header))
        added = time.perf_counter()
        p = project(opened.landmarks, kernel, user.z[None], user.beta[None])
        row = Sketches(
            *quantise(p.coordinates, "int8"),
            p.rest.astype(np.float32),
            (p.self_term / 99).astype(np.float32),
        )
        sketches = jax.block_until_ready(put_row(sketches, np.int32(size + i), row))
        spent["add_ms"].append(1000 * (added - begin))
        spent["device_ms"].append(1000 * (time.perf_counter() - added))
    jax.monitoring.clear_event_listeners()
    return {
        "folders": size,
        "compilations": len([name for name in events if "backend_compile" in name]),
        **{name: [min(v[1:]), float(np.median(v[1:])), max(v[1:])] for name, v in spent.items()},
    }


def vectors(config: ConfigDict, workdir: Path) -> dict:
    """Parameter vectors in a file, found by count sketches and measured from the file."""
    given, rng = config.vectors, np.random.default_rng(config.seed)
    count, p = given.learnwares, given.dimension
    tasks = rng.standard_normal((given.tasks, p), np.float32)
    tasks /= np.linalg.norm(tasks, axis=1, keepdims=True)
    noise = rng.standard_normal(2 * p).astype(np.float32) / np.sqrt(p)

    def like(i: int, spread: float) -> np.ndarray:
        # Noise is a window of one long noise: quick, and different for each.
        begin = rng.integers(p)
        vector = tasks[i % given.tasks] + spread * noise[begin : begin + p]
        return vector / np.linalg.norm(vector)

    file = workdir / "vectors.npy"
    try:
        z = np.lib.format.open_memmap(file, "w+", np.float32, (count, 1, p))
        for i in range(count):
            z[i, 0] = like(i, rng.uniform(0.5, 2))
        z.flush()
        z = np.load(file, mmap_mode="r")
        sketch = make_sketch(jax.random.key(config.seed), p, given.width)
        begin = time.perf_counter()
        with bar("count sketches", count) as advance:
            short = []
            for part in _parts(slice(0, count), 16):
                made = sketch_of(sketch, z[part, 0], width=given.width)
                short.append(np.asarray(made))
                advance(part.stop - part.start)
        coded = quantise(np.concatenate(short), given.dtype)
        seconds = time.perf_counter() - begin
        zero = np.zeros(count)
        sketches = place(pool_mesh(), *coded, None, zero)
        specs = Specifications(Linear(), z, np.ones((count, 1)), zero)
        users = [RKME(like(i, 1.0)[None], np.ones(1)) for i in range(config.users)]

        def of_users(some):
            x = np.concatenate([user.z for user in some])
            return np.asarray(sketch_of(sketch, x, width=given.width)), None

        n = [1] * len(users)
        _, numbers = _timed(config, users, n, of_users, sketches, specs)
        them = np.concatenate([user.z for user in users]).astype(np.float64)
        products = np.concatenate([them @ z[part, 0].T for part in _parts(slice(0, count), 64)], 1)
        true = np.argsort(-products, axis=1)[:, : config.top_k]
        return {
            "pool": f"{count} parameter vectors",
            "learnwares": count,
            "points": 1,
            "dimension": p,
            "sketch": f"count sketch, width {given.width}",
            "dtype": given.dtype,
            "build_seconds": seconds,
            "bytes": _bytes(sketches, count),
            **numbers,
            **_recall(users, of_users, sketches, true),
        }
    finally:
        file.unlink(missing_ok=True)


def _print_row(row: dict) -> None:
    low, high = row["ms_range"]
    print(
        f"{row['pool']:22} {row['sketch']:30} {row['dtype']:9} {row['build_seconds']:7.1f} s "
        f"{row['bytes'] / 2**20:7.0f} MiB {row['ms_per_query']:7.1f} ms ({low:.1f} to {high:.1f}) "
        f"recall@10 {row['recall_at_10']:.3f} @100 {row['recall_at_100']:.3f} "
        f"pruned {100 * row['pruned']:.2f}% {'certified' if row['certified'] else ''}",
        flush=True,
    )


def draw(pools: list[dict]):
    """A figure of seconds and bytes against the number of learnwares."""
    sizes = [pool["learnwares"] for pool in pools]

    def curve(name: str, of: Callable[[dict], float]) -> figures.Curve:
        return figures.Curve(name, sizes, [of(pool) for pool in pools])

    return figures.scaling(
        {
            "seconds": [
                curve("build the index", lambda pool: pool["build_seconds"]),
                curve("place on the device", lambda pool: pool["place_seconds"]),
                curve("a user, alone", lambda pool: pool["throughput"][0]["ms_a_user"] / 1000),
                curve(
                    "a user, among many", lambda pool: pool["throughput"][-1]["ms_a_user"] / 1000
                ),
            ],
            "bytes": [
                curve("index on disk", lambda pool: pool["index_bytes"]),
                curve("held in memory", lambda pool: pool["memory"]["held"]),
            ],
        },
        x_label="learnwares in the pool",
        linear=True,
    )


def _print_goals(output: dict) -> None:
    for pool in output["pools"]:
        check = pool["check"]
        print(
            f"{pool['learnwares']} x {pool['points']}: opened in {1000 * pool['open_seconds']:.0f} "
            f"ms, on the device in {pool['place_seconds']:.2f} s, holds "
            f"{pool['memory']['held'] / 2**30:.2f} GiB; {check['users']} users against all "
            f"distances: {check['same_first']:.3f} of the first, "
            f"{check['greatest_difference']:.1e} off."
        )
        for row in pool.get("exact", {}).get("side_by_side", []):
            low, middle, high = row["ratio"]
            print(
                f"  {row['users']} users at once: search {row['search_ms']:.1f} ms a user, exact "
                f"{row['exact_ms']:.1f}: {middle:.0f} times ({low:.0f} to {high:.0f}); a loop in "
                f"NumPy, extrapolated, {pool['exact']['loop_ms_extrapolated']:.0f}."
            )
        if "adding" in pool:
            adding = pool["adding"]
            print(
                f"  adding to {adding['folders']} folders: {adding['add_ms'][1]:.0f} ms (to "
                f"{adding['add_ms'][2]:.0f}) with its index, {adding['device_ms'][1]:.1f} on the "
                f"device; {adding['compilations']} compilations."
            )
