"""Benchmark of reduced-set compression: squared MMD to the full sample, and seconds.

Example: python -m experiments.bench_reduce --config=configs/bench_reduce.py:bar
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("bench_reduce")

import importlib.util
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.build import tasks_of
from experiments.common import embed_texts, named, open_encoder, say, space_of, write_json
from learnware_jax import figures
from learnware_jax.dock.tasks import load_task
from learnware_jax.dock.texts import sample
from learnware_jax.specification import kernels
from learnware_jax.specification.reduce import reduce

OURS = {
    "ours": {},
    "ours, noise start": {"start": "noise"},
    "random": {"method": "random"},
    "kmeans": {"method": "kmeans"},
    "herding": {"method": "herding"},
}
PEERS = ("goodpoints", "coreax", "learnware")


def real_embeddings(config: ConfigDict, count: int) -> np.ndarray:
    """`count` embedded texts of `config.tasks`, a sample fixed by their hashes."""
    texts = dict.fromkeys(text for t in tasks_of(config.tasks) for text in load_task(t.name))
    if len(texts) < count:
        raise ValueError(f"bench_reduce: the tasks have {len(texts)} texts; {count} are wanted.")
    encoder = open_encoder(config)
    return embed_texts(encoder, sample(list(texts), count), space_of(encoder, config), keep=True)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """In float64 NumPy, apart from the code under test."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)
    return np.maximum(squares - 2 * x @ y.T, 0)


class Referee:
    """Squared MMD to a full sample in float64; its own term is summed once."""

    def __init__(self, x: np.ndarray, gamma: float):
        self.x, self.gamma = x.astype(np.float64), gamma
        self.own = self._mean(self.x, np.full(len(x), 1 / len(x)))

    def _mean(self, z, beta):
        return sum(
            float(np.exp(-self.gamma * squared_distances(z, block)).sum(1) @ beta)
            for block in np.array_split(self.x, max(1, len(self.x) // 2000))
        ) / len(self.x)

    def squared_mmd(self, z: np.ndarray, beta: np.ndarray) -> float:
        """|mean embedding of the sample - sum_j beta_j k(z_j, .)|^2."""
        z, beta = np.asarray(z, np.float64), np.asarray(beta, np.float64)
        own = beta @ np.exp(-self.gamma * squared_distances(z, z)) @ beta
        return self.own - 2 * self._mean(z, beta) + own


def compress(method: str, x: np.ndarray, m: int, gamma: float, seed: int):
    """(z, beta) of one method; peers with their own defaults but for m and gamma."""
    if method in OURS:
        kernel = kernels.Gaussian(gamma)
        spec = reduce(jax.random.key(seed), x, m, kernel, **OURS[method]).spec
        return spec.z, spec.beta
    return globals()[f"_{method}"](x, m, gamma, seed)


def _goodpoints(x, m, gamma, seed):
    from goodpoints.compress import compresspp_kt

    # Compress++ returns sqrt of its input's size: m points from the largest power of 4 that fits.
    size = 4 ** int(np.log(len(x)) / np.log(4))
    rows = np.random.default_rng(seed).permutation(len(x))[:size]
    x = np.ascontiguousarray(x[rows], np.float64)
    picks = compresspp_kt(
        x, kernel_type=b"gaussian", k_params=np.array([1 / gamma]), g=4, seed=seed
    )
    return x[picks], np.full(len(picks), 1 / len(picks))


def _coreax(x, m, gamma, seed):
    import jax.numpy as jnp
    from coreax import Data
    from coreax.kernels import SquaredExponentialKernel
    from coreax.solvers import KernelHerding

    kernel = SquaredExponentialKernel(length_scale=float(np.sqrt(1 / (2 * gamma))))
    coreset, _ = KernelHerding(coreset_size=m, kernel=kernel).reduce(Data(jnp.asarray(x)))
    points = np.asarray(coreset.points.data)
    return points, np.full(len(points), 1 / len(points))


def _learnware(x, m, gamma, seed):
    from learnware.specification import RKMETableSpecification

    spec = RKMETableSpecification(gamma=gamma, cuda_idx=-1)
    spec.generate_stat_spec_from_data(x.copy(), K=m)
    return np.asarray(spec.get_z()), np.asarray(spec.get_beta())


def _streamed(config: ConfigDict, workdir: Path) -> dict:
    """A million rows on disk: seconds, and the most memory that the process ever held."""
    n, base = config.streamed_rows, real_embeddings(config, 10_000)
    file = workdir / "rows.npy"
    workdir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    try:
        x = np.lib.format.open_memmap(file, "w+", np.float32, (n, base.shape[1]))
        for start in range(0, n, 20_000):
            block = base[rng.integers(len(base), size=min(20_000, n - start))]
            block = block + 0.02 * rng.standard_normal(block.shape, np.float32)
            x[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
        x.flush()
        del x
        x = np.load(file, mmap_mode="r")
        kernel = kernels.Gaussian(kernels.median_gamma(jax.random.key(config.seed), base))
        begin = time.perf_counter()
        fitted = reduce(jax.random.key(config.seed), x, config.points[0], kernel)
        seconds = time.perf_counter() - begin
    finally:
        file.unlink(missing_ok=True)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    say(f"{n} rows from disk: {seconds:.1f} s with compilation, peak {peak / 2**30:.2f} GiB.")
    return {
        "n": n,
        "m": config.points[0],
        "residual": fitted.residual,
        "seconds": seconds,
        "peak_bytes": peak,
    }


def check(config: ConfigDict) -> set[str]:
    """The methods that are not installed; ValueError for unknown ones."""
    tasks_of(config.tasks)
    unknown = set(config.methods) - set(OURS) - set(PEERS)
    if unknown:
        raise ValueError(
            f"bench_reduce: unknown methods {sorted(unknown)}; want {[*OURS, *PEERS]}."
        )
    return {m for m in config.methods if m in PEERS and importlib.util.find_spec(m) is None}


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    absent = check(config)
    measured = [method for method in config.methods if method not in absent]
    return {
        "methods": named(measured) + f"; not installed: {', '.join(sorted(absent))}" * bool(absent),
        "rows": ", ".join(f"{n:,}" for n in config.rows) or f"{config.streamed_rows:,} from disk",
        "next": "bench_stream --config=configs/bench_stream.py:smoke",
    }


def run(config: ConfigDict) -> dict:
    """Measure every cell; rows are printed as they come and written to workdir/results.json."""
    absent, workdir = check(config), Path(config.workdir)
    if absent:
        say(f"Not installed, so not measured: {', '.join(sorted(absent))}.")
    output = {"rows": []}
    print(
        f"{'method':18} {'n':>7} {'m':>4} {'bandwidth':>9} {'mmd2':>10} {'seconds':>8} {'first':>7}"
    )
    for n in config.rows:
        x = real_embeddings(config, n)
        for bandwidth in config.bandwidths:
            if bandwidth == "median":
                gamma = kernels.median_gamma(jax.random.key(config.seed), x)
            else:
                gamma = float(bandwidth)
            referee = Referee(x, gamma)
            for m in config.points:
                for method in config.methods:
                    if method in absent or (method == "coreax" and n > config.coreax_rows):
                        continue
                    seconds = []
                    try:
                        while len(seconds) <= config.repeats:
                            begin = time.perf_counter()
                            z, beta = compress(method, x, m, gamma, config.seed)
                            seconds.append(time.perf_counter() - begin)
                            if seconds[-1] > config.slow_seconds:
                                break
                    except Exception as error:
                        if method not in PEERS:
                            raise
                        say(f"{method} fails here, so it is not measured: {error}")
                        absent.add(method)
                        continue
                    row = {
                        "method": method,
                        "n": n,
                        "m": m,
                        "bandwidth": bandwidth if bandwidth == "median" else gamma,
                        "points": len(z),
                        "mmd2": referee.squared_mmd(z, beta),
                        "seconds": float(np.median(seconds[1:] or seconds)),
                        "first_seconds": seconds[0],
                        "runs": [*seconds[1:]],
                    }
                    output["rows"].append(row)
                    print(
                        f"{method:18} {n:7} {m:4} {bandwidth:>9} {row['mmd2']:10.3e} "
                        f"{row['seconds']:8.2f} {row['first_seconds']:7.2f}",
                        flush=True,
                    )
                    write_json(workdir / "results.json", output)
    if config.streamed_rows:
        output["streamed"] = _streamed(config, workdir)
    write_json(workdir / "results.json", output)
    _print_ratios(output["rows"])
    if output["rows"]:
        print(figures.save(draw(output["rows"], max(config.points)), workdir / "quality")[0])
    print(workdir / "results.json")
    return output


def draw(rows: list[dict], points: int):
    """A figure of what methods lose, and their seconds, against the rows of a sample."""
    some = [row for row in rows if (row["m"], row["bandwidth"]) == (points, rows[0]["bandwidth"])]
    methods = {row["method"]: [r for r in some if r["method"] == row["method"]] for row in some}

    def curves(field: str) -> list[figures.Curve]:
        return [
            figures.Curve(method, [row["n"] for row in of], [row[field] for row in of])
            for method, of in methods.items()
        ]

    panels = {f"squared MMD, {points} points": curves("mmd2"), "seconds": curves("seconds")}
    return figures.scaling(panels, x_label="rows of the sample", linear=False)


def _print_ratios(rows):
    """Ours as a fraction of each other method, cell by cell."""
    cells = {}
    for row in rows:
        cells.setdefault((row["n"], row["m"], row["bandwidth"]), {})[row["method"]] = row
    for (n, m, bandwidth), cell in cells.items():
        ours = cell.get("ours")
        others = [row for method, row in cell.items() if not method.startswith("ours")]
        if ours and others:
            ratios = ", ".join(f"{r['method']} {ours['mmd2'] / r['mmd2']:.3f}" for r in others)
            print(f"N={n}, m={m}, {bandwidth}: ours has this fraction of mmd2: {ratios}")
