"""Parameter vectors: how many a minute are made, and how fast a thousand of them are ranked.

python -m experiments.bench_pave --config=configs/bench_pave.py          5 min on 2 cores, 7 GB
python -m experiments.bench_pave --config=configs/bench_pave.py:smoke    10 s, a tiny random model

The loop of cosines that the learnware package ranks by is timed with torch where that can be
imported, and with NumPy otherwise. First calls, which compile, are left out.
"""

from ml_collections import ConfigDict

from configs import bench_slm, families


def get_config(size="full"):
    if size not in ("full", "smoke"):
        raise ValueError(f"configs/bench_pave.py: got {size!r}; want full or smoke.")
    smoke = size == "smoke"
    # 24 tokens, 400 steps of 2 rows.
    studied = families.get_config("development")
    if smoke:
        studied.reference.lora.rank, studied.reference.dtype = 2, "float32"
    return ConfigDict(
        dict(
            workdir=f"runs/bench_pave-{size}",
            # A material, file, folder or OWNER/NAME; or sizes of a random one, if there are any.
            model=studied.model.to_dict() | dict(sizes=bench_slm.TINY if smoke else {}),
            reference=studied.reference.to_dict(),
            fit=studied.fit.to_dict(),
            vectors=dict(
                tasks=3 if smoke else 8,  # fitted one after another, and in one program
                rows=8 if smoke else 64,  # of a task
                answer=4,  # tokens that are learned, at the end of a row
                steps=2 if smoke else 5,  # measured; a vector has fit.steps
                short=2 if smoke else 100,  # steps of a cheaper fit to the gradients of the start
                repeats=2 if smoke else 3,
            ),
            ranking=dict(
                learnwares=80 if smoke else 1_000,
                # Of Qwen2.5-0.5B with the adapter of the published system.
                dimension=5_000 if smoke else 442_368,
                groups=4 if smoke else 20,
                users=4 if smoke else 64,  # in one call, besides the first of them alone
                checked_users=2,  # compared with float64
                repeats=3 if smoke else 9,
                batch_repeats=2 if smoke else 3,
            ),
            sketch=dict(width=64 if smoke else 4_096, candidates=20 if smoke else 100),
            top=10,
            seed=0,
        )
    )
