"""Benchmark of exact ranking: speed against the float32 matrix product, errors against float64.

Example: python -m experiments.bench_rank --config=configs/bench_rank.py:bar
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("bench_rank")

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.common import say, write_json
from learnware_jax import figures
from learnware_jax.selection.pool import build_pool
from learnware_jax.selection.ranking import distances
from learnware_jax.specification.kernels import Gaussian
from learnware_jax.specification.rkme import RKME
from learnware_jax.specification.simplex import solve_simplex


def specifications(rng: np.random.Generator, count: int, config: ConfigDict) -> list[RKME]:
    """Reduced sets of topics on the sphere: each around a direction of its own, Dirichlet weights.

    Median squared distance about 1.8 within and between, as for embedded sentences.
    """
    m, d = config.points, config.dimension
    specs = []
    for _ in range(count):
        z = rng.standard_normal((m, d), np.float32) + 0.3 * rng.standard_normal(d, np.float32)
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        specs.append(RKME(z, rng.dirichlet(np.full(m, 2.0))))
    return specs


def reference(user: RKME, specs: list[RKME], gamma: float) -> np.ndarray:
    """Unbiased squared MMD (n = points) in float64 NumPy, apart from the code under test."""

    def embed(p, q):
        p_z, q_z = p.z.astype(np.float64), q.z.astype(np.float64)
        squares = (p_z * p_z).sum(1)[:, None] + (q_z * q_z).sum(1)
        return p.beta @ np.exp(-gamma * np.maximum(squares - 2 * p_z @ q_z.T, 0)) @ q.beta

    def own(p):
        n = len(p.beta)
        return (n * embed(p, p) - 1) / (n - 1)

    user_own = own(user)
    return np.array([user_own + own(spec) - 2 * embed(user, spec) for spec in specs])


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words."""
    return {
        "pools": ", ".join(f"{count:,}" for count in config.pools)
        + f" specifications of {config.points} points",
        "mixture": f"of {config.mixture:,}",
        "next": "bench_scale --config=configs/bench_scale.py:smoke",
    }


def run(config: ConfigDict) -> dict:
    """Measure every pool and batch; rows are printed and written to workdir/results.json."""
    workdir, rng = Path(config.workdir), np.random.default_rng(config.seed)
    square = jnp.asarray(rng.standard_normal((2048, 2048), np.float32))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    users = specifications(rng, max(config.users), config)
    kernel = Gaussian(np.float32(config.gamma))
    output = {"rows": []}
    print("   pool users  ms/query  fraction of product rate  max error  top 10")
    for count in config.pools:
        say(f"Making a pool of {count}.")
        specs = specifications(rng, count, config)
        n = [config.points] * count
        pool = build_pool(
            specs, kernel, ids=[str(i) for i in range(count)], n=n, residual=[0.0] * count
        )
        for batch in config.users:
            chosen = users[:batch]
            seconds, rates, fractions = [], [], []
            distances(chosen, pool, n=n[:1] * batch)
            product(square).block_until_ready()
            for _ in range(config.repeats):
                begin = time.perf_counter()
                product(square).block_until_ready()
                rates.append(2 * 2048**3 / (time.perf_counter() - begin))
                begin = time.perf_counter()
                result = distances(chosen, pool, n=n[:1] * batch)
                seconds.append(time.perf_counter() - begin)
                work = 2 * count * batch * config.points**2 * config.dimension
                fractions.append(work / seconds[-1] / rates[-1])
            errors, same = [], []
            for user, got in zip(chosen[: config.checked_users], result, strict=False):
                want = reference(user, specs, float(kernel.gamma))
                errors.append(np.abs(got - want).max())
                same.append(np.array_equal(np.argsort(got)[:10], np.argsort(want)[:10]))
            row = {
                "pool": count,
                "users": batch,
                "ms_per_query": 1e3 * float(np.median(seconds)) / batch,
                # Best against best: what the machine can do when its neighbours are quiet.
                "product_rate_fraction": work / min(seconds) / max(rates),
                "fraction_runs": [float(f) for f in fractions],
                "product_gflops": max(rates) / 1e9,
                "max_error": float(max(errors)),
                "top10_same": bool(all(same)),
            }
            output["rows"].append(row)
            spread = f"({min(fractions):.2f} to {max(fractions):.2f} side by side)"
            print(
                f"{count:7} {batch:5} {row['ms_per_query']:9.2f}  "
                f"{row['product_rate_fraction']:.2f} {spread}  {row['max_error']:.1e}  "
                f"{'same' if row['top10_same'] else 'DIFFERENT'}",
                flush=True,
            )
            write_json(workdir / "results.json", output)
    output["mixture"] = _mixture(rng, config)
    write_json(workdir / "results.json", output)
    print(figures.save(draw(output["rows"]), workdir / "speed")[0])
    print(workdir / "results.json")
    return output


def draw(rows: list[dict]):
    """A figure of milliseconds a user against the number of learnwares."""
    curves = []
    for users in dict.fromkeys(row["users"] for row in rows):
        some = [row for row in rows if row["users"] == users]
        x, y = [row["pool"] for row in some], [row["ms_per_query"] for row in some]
        curves.append(figures.Curve(f"{users} at once" if users > 1 else "a user alone", x, y))
    return figures.scaling(
        {"milliseconds a user": curves}, x_label="learnwares in the pool", linear=True
    )


def _mixture(rng, config):
    """The mixture QP over many learnwares: one user made of three of them, and noise."""
    count = config.mixture
    topics = np.maximum(rng.standard_normal((count, 16)) @ rng.standard_normal((16, 600)), 0) / 30
    squares = (topics**2).sum(1)
    weights = np.zeros(count)
    weights[:3] = 0.5, 0.3, 0.2
    weights += 1e-3 * rng.dirichlet(np.ones(count))
    with jax.enable_x64(True):
        apart = jnp.asarray(squares[:, None] + squares - 2 * topics @ topics.T)
        gram = jnp.exp(-0.25 * (apart + apart.T))
        c = gram @ weights
    seconds = []
    for _ in range(1 + config.repeats):
        begin = time.perf_counter()
        solution = solve_simplex(gram, c)
        seconds.append(time.perf_counter() - begin)
    print(
        f"mixture of {count}: {np.median(seconds[1:]):.2f} s ({min(seconds[1:]):.2f} to "
        f"{max(seconds[1:]):.2f}), gap {float(solution.gap):.1e}, "
        f"{int((np.asarray(solution.beta) > 0).sum())} learnwares in it"
    )
    return {
        "variables": count,
        "seconds": float(np.median(seconds[1:])),
        "first_seconds": seconds[0],
        "gap": float(solution.gap),
        "iterations": int(solution.iterations),
    }
