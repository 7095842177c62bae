"""Ranking a pool: milliseconds a query beside the float32 matrix product, and errors.

python -m experiments.bench_rank --config=configs/bench_rank.py          100 to 10,000: 4 min
python -m experiments.bench_rank --config=configs/bench_rank.py:bar      M = 10,000: 3 min, 9 GB
python -m experiments.bench_rank --config=configs/bench_rank.py:smoke    10 s
"""

from ml_collections import ConfigDict

SIZES = {"full": (100, 1_000, 10_000), "bar": (10_000,), "smoke": (50,)}


def get_config(size="full"):
    if size not in SIZES:
        raise ValueError(f"configs/bench_rank.py: got {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir=f"runs/bench_rank-{size}",
            pools=SIZES[size],
            points=10 if smoke else 100,
            dimension=32 if smoke else 384,
            # Users in one call, each with as many points as a learnware.
            users=(1, 2) if smoke else (1, 64),
            # Errors of a batch are looked up for so many of its users: float64 takes its time.
            checked_users=2,
            gamma=0.55,
            # Variables of the mixture problem; its Gram matrix takes 0.8 GB at 10,000.
            mixture=300 if smoke else 10_000,
            repeats=3 if smoke else 7,
            seed=0,
        )
    )
