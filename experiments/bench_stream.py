"""Benchmark of streamed and merged specifications: squared MMD to all rows, seconds, memory.

Example: python -m experiments.bench_stream --config=configs/bench_stream.py
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("bench_stream")

import itertools
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from functools import reduce as fold
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.bench_reduce import real_embeddings, squared_distances
from experiments.build import tasks_of
from experiments.common import named, write_json
from learnware_jax import figures
from learnware_jax.specification import kernels
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.reduce import Reduced, reduce
from learnware_jax.specification.stream import (
    Stream,
    finish,
    merge,
    merge_reduced,
    sample_of,
    start,
    update,
)

NOISE = 0.02
BLOCK = 4096


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    tasks_of(config.tasks)
    return {
        "rows": ", ".join(f"{n:,}" for n in config.rows),
        "ways": named([*ways_of(config.to_dict())]),
        "next": "specify --config=configs/specify.py:quickstart --config.data=FILE",
    }


def run(config: ConfigDict) -> dict:
    """Measure every cell; rows are printed as they come and written to workdir/results.json."""
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    file, settings = workdir / "rows.npy", config.to_dict()
    output: dict[str, Any] = {"rows": []}
    print(
        f"{'way':32} {'n':>8} {'gamma':>6} {'mmd2':>9} {'of one-shot':>22} {'estimate':>8} "
        f"{'seconds':>7} {'GiB':>5}"
    )
    try:
        for n in config.rows:
            median = _apart(_write_rows, file, n, config.copy_and_resolve_references())
            for bandwidth in config.bandwidths:
                gamma = median if bandwidth == "median" else float(bandwidth)
                ways = ways_of(settings)
                found = {
                    way: _apart(_measure, way, str(file), gamma, settings, _seeds(way, n, config))
                    for way in ways
                }
                specs = [spec for cell in found.values() for spec in cell["specs"]]
                values, error = _apart(_referee, str(file), gamma, specs, settings)
                values = iter(values)
                for way, cell in found.items():
                    cell["mmd2"] = [next(values) for _ in cell.pop("specs")]
                    row = {"way": way, "n": n, "bandwidth": bandwidth, "gamma": gamma}
                    row |= summary(cell, found["one-shot"]["mmd2"], n)
                    row["own_term_error"] = error
                    output["rows"].append(row)
                    _print(row)
                write_json(workdir / "results.json", output)
    finally:
        file.unlink(missing_ok=True)
    if len(config.rows) > 1:
        print(figures.save(draw(output["rows"], config.bandwidths[0]), workdir / "scale")[0])
    print(workdir / "results.json")
    return output


def draw(rows: list[dict], bandwidth: str):
    """A figure of seconds and memory against the number of rows."""
    shown = [
        row
        for row in rows
        if row["bandwidth"] == bandwidth
        and (row["way"] in ("one-shot", "streamed") or row["way"].startswith("merged streams"))
    ]

    def curves(field: str) -> list[figures.Curve]:
        ways = dict.fromkeys(row["way"] for row in shown)
        cells = {way: [row for row in shown if row["way"] == way] for way in ways}
        return [
            figures.Curve(way, [row["n"] for row in cell], [row[field] for row in cell])
            for way, cell in cells.items()
        ]

    panels = {"seconds": curves("seconds_median"), "peak memory, bytes": curves("peak_bytes")}
    return figures.scaling(panels, x_label="rows of the sample", linear=True)


def _seeds(way: str, n: int, config: ConfigDict) -> list[int]:
    slow = n >= config.slow_rows or not way.endswith(f" {config.points} points")
    alone = way.startswith("merged specifications") and slow
    return list(config.seeds[:1] if alone else config.seeds)


def summary(cell: dict[str, Any], one_shot: list[float], n: int) -> dict[str, Any]:
    """A cell of the table out of its runs, one a seed; the first run compiles."""
    runs = cell["seconds"][1:] or cell["seconds"]
    # Against the mean: what one-shot compression makes of another random start differs as well.
    ratios = [value / float(np.mean(one_shot)) for value in cell["mmd2"]]
    return {
        **cell,
        "ratio": float(np.mean(ratios)),
        "ratios": ratios,
        "estimate": float(np.mean(cell["residual"]) / np.mean(cell["mmd2"])),
        "seconds_median": float(np.median(runs)),
        "rows_per_second": n / float(np.median(runs)),
    }


def _print(row):
    low, high = min(row["ratios"]), max(row["ratios"])
    ratio = f"{row['ratio']:.3f} ({low:.3f}, {high:.3f})"
    print(
        f"{row['way']:32} {row['n']:8} {row['gamma']:6.3f} {np.mean(row['mmd2']):9.3e} {ratio:>22} "
        f"{row['estimate']:8.3f} {row['seconds_median']:7.1f} {row['peak_bytes'] / 2**30:5.2f}",
        flush=True,
    )


def _apart(function: Callable, *arguments) -> Any:
    """What the function returns, called in a new process: memory is then that of its work alone."""
    compiled = jax.config.jax_compilation_cache_dir
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, _keep_compiled, [compiled]) as pool:
        return pool.apply(function, arguments)


def _keep_compiled(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _write_rows(file: Path, n: int, config: ConfigDict) -> float:
    """n rows on disk, in the order of their tasks, and the median gamma of the texts behind them.

    Sorted rows are what is hard about streams: the first piece shows little of what follows, and
    every part is of other tasks.
    """
    base = real_embeddings(config, config.texts)
    rng = np.random.default_rng(config.seed)
    drawn = np.sort(rng.integers(len(base), size=n))
    x = np.lib.format.open_memmap(file, "w+", np.float32, (n, base.shape[1]))
    for begin in range(0, n, 20_000):
        block = base[drawn[begin : begin + 20_000]]
        block = block + NOISE * rng.standard_normal(block.shape, np.float32)
        x[begin : begin + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    x.flush()
    return kernels.median_gamma(jax.random.key(config.seed), base)


def ways_of(settings: dict[str, Any]) -> dict[str, Callable[..., Reduced]]:
    """The contenders by name: functions of a key, the file, its part bounds and a kernel."""
    m, parts = settings["points"], settings["parts"]

    def bounds(n):
        edges = np.linspace(0, n, parts + 1).astype(int)
        return list(itertools.pairwise(edges))

    def one_shot(key, file, kernel):
        return reduce(key, np.load(file, mmap_mode="r"), m, kernel)

    def stream_of(key, file, kernel, begin, end) -> Stream:
        first = _rows(file, 0, settings["piece"])
        chosen = np.random.default_rng(settings["seed"]).choice(
            len(first), settings["anchors"], replace=False
        )
        stream = start(key, first[chosen], kernel, capacity=settings["capacity"])
        for place in range(begin, end, settings["piece"]):
            stream = update(stream, _rows(file, place, min(place + settings["piece"], end)))
        return stream

    def streamed(key, file, kernel):
        return finish(key, stream_of(key, file, kernel, 0, _count(file)), m)

    def equal_weights(key, file, kernel):
        return reduce(key, sample_of(stream_of(key, file, kernel, 0, _count(file))).z, m, kernel)

    def merged(key, file, kernel):
        streams = [
            stream_of(jax.random.fold_in(key, i), file, kernel, *part)
            for i, part in enumerate(bounds(_count(file)))
        ]
        return finish(key, fold(merge, streams), m)

    def specifications(multiple):
        def way(key, file, kernel):
            made = [
                reduce(
                    jax.random.fold_in(key, i),
                    np.load(file, mmap_mode="r")[begin:end],
                    multiple * m,
                    kernel,
                )
                for i, (begin, end) in enumerate(bounds(_count(file)))
            ]
            return merge_reduced(
                key,
                [r.spec for r in made],
                m,
                kernel,
                n=[r.n for r in made],
                residual=[r.residual for r in made],
            )

        return way

    return {
        "one-shot": one_shot,
        "streamed": streamed,
        "streamed, equal weights": equal_weights,
        f"merged streams, {parts} parts": merged,
    } | {
        f"merged specifications, {multiple * m} points": specifications(multiple)
        for multiple in settings["multiples"]
    }


def _count(file: str) -> int:
    return len(np.load(file, mmap_mode="r"))


def _rows(file: str, begin: int, end: int) -> np.ndarray:
    # Mapped anew for every piece: what has been read does not stay in memory.
    return np.array(np.load(file, mmap_mode="r")[begin:end])


def _measure(way, file, gamma, settings, seeds) -> dict[str, Any]:
    """Specifications of one way, a seed each: seconds, what they say of themselves, and memory."""
    call, seconds, made = ways_of(settings)[way], [], []
    for seed in seeds:
        begin = time.perf_counter()
        made.append(call(jax.random.key(seed), file, Gaussian(gamma)))
        seconds.append(time.perf_counter() - begin)
    return {
        "specs": [(np.asarray(r.spec.z), np.asarray(r.spec.beta)) for r in made],
        "residual": [r.residual for r in made],
        "seconds": seconds,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """The most memory that this process ever held, mapped files included."""
    try:
        # Not getrusage, which counts from before the process was this program.
        [line] = [s for s in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in s]
        return 1024 * int(line.split()[1])
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _referee(file, gamma, specs, settings) -> tuple[list[float], float]:
    """Squared MMD of every specification to all rows, and the standard error they share.

    Cross terms are sums over all rows. The own term of all rows, which is the same for all, is
    split by the projection P on the span of k(a, .) at some rows a: |P mu|^2 is exact, and what is
    left, small, is a U-statistic over pairs of some other rows (and exact for pairs of a row with
    itself, but for sampling).
    """
    x = np.load(file, mmap_mode="r")
    n, rng = len(x), np.random.default_rng(settings["seed"] + 1)
    size = settings["referee"]
    chosen = rng.choice(n, min(n, size["rows"] + size["places"]), replace=False)
    places, rows = np.split(x[chosen].astype(np.float64), [size["places"]])
    z = np.concatenate([places, *[z for z, _ in specs]])
    c = mean_values(x, z, gamma)
    own, error = own_term(places, c[: len(places)], rows, n, gamma)
    values, at = [], len(places)
    for z, beta in specs:
        k = np.exp(-gamma * squared_distances(z.astype(np.float64), z.astype(np.float64)))
        values.append(float(own - 2 * beta @ c[at : at + len(z)] + beta @ k @ beta))
        at += len(z)
    return values, error


def mean_values(x: np.ndarray, z: np.ndarray, gamma: float) -> np.ndarray:
    """mean_x exp(-gamma |z - x|^2) for every row of z, summed in float64."""
    # Products in float32: rounding is 1e-7 for a pair, and hardly anything for the mean of many.
    center = z.mean(0).astype(np.float32)
    z = z.astype(np.float32) - center
    z_squares, total = (z * z).sum(1), np.zeros(len(z))
    for begin in range(0, len(x), BLOCK):
        block = np.asarray(x[begin : begin + BLOCK]) - center
        t = block @ z.T
        t *= -2
        t += z_squares
        t += (block * block).sum(1)[:, None]
        np.maximum(t, 0, out=t)
        t *= -np.float32(gamma)
        total += np.exp(t, out=t).sum(0, dtype=np.float64)
    return total / len(x)


def own_term(
    places: np.ndarray, c: np.ndarray, rows: np.ndarray, n: int, gamma: float
) -> tuple[float, float]:
    """An estimate of |mu|^2 for n rows and its standard error. Places and `rows` are different ones
    of them, and `c` is mu at the places.
    """
    level, vectors = np.linalg.eigh(np.exp(-gamma * squared_distances(places, places)))
    kept = level > 1e-6 * level[-1]
    project = vectors[:, kept] / np.sqrt(level[kept])
    features = np.exp(-gamma * squared_distances(rows, places)) @ project
    left = np.exp(-gamma * squared_distances(rows, rows)) - features @ features.T
    count = len(rows)
    same = np.trace(left) / count
    np.fill_diagonal(left, 0)
    pairs = left.sum() / (count * (count - 1))
    # Hoeffding's two terms: of single rows and of pairs.
    single, pair = left.sum(1).var() / (count - 1) ** 2, left.var()
    error = np.sqrt(4 * single / count + 2 * pair / count**2)
    inside = ((project.T @ c) ** 2).sum()
    # Of the rows at the places nothing is left.
    others = n - len(places)
    outside = others / n * ((others - 1) / n * pairs + same / n)
    return float(inside + outside), float(error)
