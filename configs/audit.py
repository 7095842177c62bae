"""What do specifications give away, and what does privacy cost?

python -m experiments.audit --config=configs/audit.py:quickstart
    Attacks every kind of specification of 100, 1,000 and 10,000 texts, and ranks a dock of the same
    kind: over 1 h on 2 cores, half of it for texts and gradients; resumable row by row. The
    results that docs/privacy.md quotes are in experiments/results/audit.json.
python -m experiments.audit --config=configs/audit.py:smoke
    A few kinds, 30 texts, a tiny random model: under 40 s.

epsilon and delta are those of neighbours that differ in one text. Vectors (one_step, pave) are of
texts as prompts, with the adapter's rank lowered, and have at most `vectors.most` texts.
"""

from ml_collections import ConfigDict

from configs import build

SIZES = ("quickstart", "smoke")
SMOKE_TASKS = ("news-headlines", "recurrences", "piqa")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/audit.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir="runs/audit-smoke" if smoke else "runs/audit",
            # The task that is attacked, of `dock`: tasks, or roles for all of theirs.
            target="news-headlines",
            dock=SMOKE_TASKS if smoke else ("dock", "sitcom-dialogue"),
            # Texts of a task, but for those with enough for the most rows.
            dock_rows=200 if smoke else 1512,
            large=() if smoke else ("icd10-diseases", "icd10-injuries", "sitcom-dialogue"),
            # Tasks whose texts everybody has: landmarks, candidates and bounds come from them.
            public=("determinants",) if smoke else ("unseen",),
            public_rows=100 if smoke else 1000,
            # Rows of a specification -> how many are made of random halves of twice as many rows.
            shadows={"30": 16} if smoke else {"100": 128, "1000": 64, "10000": 24},
            # Rows that are attacked, and other rows of the task that everybody has, at most.
            targets=60 if smoke else 2000,
            others=100 if smoke else 512,
            points=(8,) if smoke else (16, 64),
            private_points=(8,) if smoke else (64,),
            reducers=("random", "gauss_newton from noise")
            if smoke
            else (
                *("random", "kmeans", "herding"),
                *("gauss_newton from rows", "gauss_newton from noise"),
            ),
            epsilons=(1.0, "inf") if smoke else (0.1, 0.3, 1.0, 3.0, 10.0, "inf"),
            delta=1e-6,
            # Users of every task, and their rows.
            users=dict(count=2 if smoke else 8, rows=16 if smoke else 64),
            # What private reduced sets are fitted in: `width` functions on landmarks.
            features=dict(
                landmarks=64 if smoke else 512, width=32 if smoke else 256, frequencies=512
            ),
            vectors=dict(
                tasks=SMOKE_TASKS
                if smoke
                else (
                    *("news-headlines", "business-headlines", "reuters-earnings"),
                    *("medmcqa-dental", "commonsenseqa", "piqa"),
                ),
                most=1000,
                users=dict(count=2 if smoke else 4, rows=16 if smoke else 32),
                public=20,
                sketch=256 if smoke else 2048,
                model=dict(
                    name="random-tiny" if smoke else "SmolLM2-135M-Instruct", dtype="bfloat16"
                ),
                reference=dict(
                    lora=dict(rank=4, alpha=8.0, targets=("query", "key", "value"), seed=0),
                    widths=(24,),
                    dtype="bfloat16",
                    together=8,
                ),
                fit=dict(
                    steps=10 if smoke else 50,
                    rate=1e-5,
                    decay=0.5,
                    warmup=0.03,
                    clip=1.0,
                    pull=1.0,
                ),
            ),
            specification=build.specification(smoke),
            seed=0,
        )
    )
