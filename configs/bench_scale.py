"""Search in pools of up to a million specifications: what it costs and what it finds.

python -m experiments.bench_scale --config=configs/bench_scale.py
    10^4, 10^5 and 10^6 learnwares of 10 points, 10^4 of 100 points beside exact ranking, and 10^4
    parameter vectors: about 25 min on 2 cores, 20 GB of disk below workdir, 3 GiB of memory.
python -m experiments.bench_scale --config=configs/bench_scale.py:million
    10^6 learnwares alone: 10 min.
python -m experiments.bench_scale --config=configs/bench_scale.py:smoke
    500 learnwares: 20 s.

Pools are made of real tasks: reduced sets of mixtures of one to three tasks of the catalogue, drawn
again and moved: as a whole up to 0.3 of the way to another's mean, every point by a tenth of the
difference of two texts, weights by Gamma(8) variables. Users are mixtures of one or two tasks, of
the rows that no learnware was made from.
"""

from ml_collections import ConfigDict

SIZES = ("full", "million", "smoke")


def get_config(size="full"):
    if size not in SIZES:
        raise ValueError(
            f"configs/bench_scale.py: got size {size!r}; want one of {', '.join(SIZES)}."
        )
    smoke = size == "smoke"
    sizes = {"full": (10_000, 100_000, 1_000_000), "million": (1_000_000,), "smoke": (200, 500)}
    # rows: texts behind each specification.
    pools = dict(ladder=dict(sizes=sizes[size], points=10, bases=2048, rows=200))
    if size == "full":
        pools["wide"] = dict(sizes=(10_000,), points=100, bases=512, rows=200)
    if smoke:
        pools = dict(ladder=dict(sizes=sizes[size], points=4, bases=48, rows=32))
    return ConfigDict(
        dict(
            workdir=f"runs/bench_scale-{size}",
            tasks=("molecules", "icd10-injuries", "fiqa") if smoke else ("dock",),
            texts=600 if smoke else 50_000,
            encoder="all-MiniLM-L6-v2",
            max_tokens=128,
            dtype="float32",
            gamma=0.1,
            steps=5 if smoke else 20,
            pools=pools,
            users=4 if smoke else 32,
            user_points=8 if smoke else 64,
            landmarks=64 if smoke else 512,
            width=32 if smoke else 256,
            # Other first stages beside landmarks in int8.
            others=(
                (("means", "float32"), ("random features 32", "float32"))
                if smoke
                else (
                    ("landmarks", "bfloat16"),
                    ("landmarks", "float32"),
                    ("means", "int8"),
                    ("means", "float32"),
                    ("random features 256", "int8"),
                    ("random features 1024", "int8"),
                )
            ),
            top_k=10,
            # How many are measured where sketches bound nothing.
            shortlist=100,
            batches=(1, 2) if smoke else (1, 2, 4, 8, 16, 32),
            # Users whose ranking is compared with distances to all.
            checked=2 if smoke else 8,
            # Exact ranking beside search, for pools of 100 points and up to so many learnwares.
            exact_learnwares=500 if smoke else 10_000,
            exact_batches=(1, 2) if smoke else (1, 8, 32),
            repeats=3 if smoke else 9,
            # Learnwares added to pools of `adding` learnwares; 0: none.
            adding=200 if smoke else 100_000 if size == "full" else 0,
            added=3 if smoke else 20,
            vectors=dict(
                learnwares={"full": 10_000, "million": 0, "smoke": 200}[size],
                dimension=500 if smoke else 442_368,
                tasks=10 if smoke else 200,
                width=64 if smoke else 4096,
                dtype="int8",
            ),
            # Set by the benchmark for its own parts.
            measure=0,
            points=0,
            seed=0,
        )
    )
