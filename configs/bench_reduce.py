"""Reduced sets on real embeddings: how close to the full sample, in how many seconds.

python -m experiments.bench_reduce --config=configs/bench_reduce.py          15 min on 2 cores
python -m experiments.bench_reduce --config=configs/bench_reduce.py:bar      N=10,000, m=100: 2 min
python -m experiments.bench_reduce --config=configs/bench_reduce.py:million  N=1,000,000 from disk:
    30 s, writes 1.5 GB to the workdir and removes it; reports the peak of memory
python -m experiments.bench_reduce --config=configs/bench_reduce.py:smoke    20 s

Peers are measured where they can be imported: goodpoints, coreax, learnware.
"""

from ml_collections import ConfigDict

SIZES = {"full": (1_000, 10_000, 50_000), "bar": (10_000,), "million": (), "smoke": (300,)}


def get_config(size="full"):
    if size not in SIZES:
        raise ValueError(f"configs/bench_reduce.py: got {size!r}; want one of {', '.join(SIZES)}.")
    return ConfigDict(
        dict(
            workdir=f"runs/bench_reduce-{size}",
            tasks=("fiqa",) if size == "smoke" else ("dock",),
            rows=SIZES[size],
            points={"full": (10, 100), "smoke": (10,)}.get(size, (100,)),
            # "median" or a gamma.
            bandwidths=("median", "0.1") if size == "full" else ("median",),
            methods=("ours", "ours, noise start", "random", "kmeans", "herding")
            + (() if size == "smoke" else ("goodpoints", "coreax", "learnware")),
            # Its memory grows with the square of the rows: 10 GB for one copy of 50,000.
            coreax_rows=10_000,
            # The median of so many runs after a first one that compiles.
            repeats=1 if size == "smoke" else 3,
            # Methods slower than this are run once.
            slow_seconds=10.0,
            streamed_rows=1_000_000 if size == "million" else 0,
            encoder="all-MiniLM-L6-v2",
            max_tokens=32,
            dtype="float32",
            seed=0,
        )
    )
