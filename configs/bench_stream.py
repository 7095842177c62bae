"""Specifications of rows that arrive in pieces or in parts, beside one-shot compression.

python -m experiments.bench_stream --config=configs/bench_stream.py         23 min of CPU time on 2
    cores, after 50,000 texts were embedded once, as for experiments.bench_reduce
python -m experiments.bench_stream --config=configs/bench_stream.py:smoke   20 s, and as long again
    where nothing is compiled yet

Rows are texts of the catalogue, embedded, drawn again and again with a little noise; 1,000,000 of
them take 1.5 GB in the workdir, which are removed. They are sorted by task: the first piece shows
little of what follows, and every part is of other tasks. Every way is a process of its own, so that
its peak of memory is its own.

Squared MMD to all rows, divided by that of one-shot compression (1,000,000 rows, 100 points, gamma
0.1 and the median): streamed 0.95 and 0.99, streams of 8 parts merged 0.95 and 0.99, finished
specifications of 8 parts merged 0.98 and 1.01, a uniform sample without calibration 1.06 and 1.01.
"""

from ml_collections import ConfigDict

SIZES = ("full", "smoke")


def get_config(size="full"):
    if size not in SIZES:
        raise ValueError(f"configs/bench_stream.py: got {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir=f"runs/bench_stream-{size}",
            tasks=("fiqa",) if smoke else ("dock",),
            # Different texts; there are `rows` of them with noise.
            texts=300 if smoke else 50_000,
            rows=(4_000,) if smoke else (100_000, 1_000_000),
            # "median" or a gamma.
            bandwidths=("0.1",) if smoke else ("0.1", "median"),
            points=10 if smoke else 100,
            # Rows in the sample of a stream.
            capacity=1_600 if smoke else 32_768,
            anchors=16 if smoke else 256,
            piece=1_000 if smoke else 20_000,
            parts=2 if smoke else 8,
            # Finished specifications that are merged have so many times as many points.
            multiples=(1,) if smoke else (1, 2),
            seeds=(0, 1) if smoke else (0, 1, 2),
            # One seed for merging finished specifications that have more points than the result,
            # or of so many rows.
            slow_rows=1_000_000,
            # Rows and places from which the own term of all rows is estimated.
            referee=dict(rows=1_000 if smoke else 12_000, places=200 if smoke else 2_048),
            encoder="all-MiniLM-L6-v2",
            max_tokens=32,
            dtype="float32",
            seed=0,
        )
    )
