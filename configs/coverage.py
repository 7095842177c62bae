"""Whether intervals cover, sets of the best hold the best, and thresholds keep their rates.

python -m experiments.coverage --config=configs/coverage.py         6 min of CPU time, after 36,000
    texts were embedded once
python -m experiments.coverage --config=configs/coverage.py:smoke   20 s of CPU time

Three promises, measured. (1) Distance intervals: for laws whose squared MMD has a closed form, and
for real tasks, all rows of which are then the law that users and learnwares are drawn from. (2) The
set of learnwares that may be the closest: how often the truly closest is left out, and how large
the set is, beside one-sided tests without any adjustment. (3) Thresholds beyond which none fits:
set on half of the domains, used on the other half.
"""

from ml_collections import ConfigDict

from configs.build import specification

SIZES = ("full", "smoke")
LAWS = ("normal, d = 2", "mixture, d = 8", "normal, d = 384", "sphere, d = 384")
REAL = (
    *("news-headlines", "business-headlines", "natural-questions", "boolq", "commonsenseqa"),
    *("icd10-diseases", "icd10-injuries", "healthsearchqa", "medmcqa-surgery"),
    *("medmcqa-preclinical", "quartz", "job-titles"),
)


def get_config(size="full"):
    if size not in SIZES:
        raise ValueError(f"configs/coverage.py: got {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir=f"runs/coverage-{size}",
            level=0.9,
            # How users and learnwares are embedded and compressed.
            specification=specification(smoke),
            simulated=dict(
                # Names in experiments.coverage.families; samples of some are compressed as well.
                laws=("sphere, d = 384",) if smoke else LAWS,
                reduced_laws=("mixture, d = 8", "sphere, d = 384"),
                # (rows of the user, replicates), ...
                whole=((16, 12), (64, 6))
                if smoke
                else tuple((n, 1000) for n in (16, 64, 256, 1000)),
                reduced=((16, 4),) if smoke else tuple((n, 40) for n in (16, 64, 256)),
                learnware_rows=(16, 64) if smoke else (16, 200),
            ),
            best=dict(
                learnwares=6 if smoke else 20,
                rows=(16,) if smoke else (16, 64, 256),
                # In turn over the dock.
                learnware_rows=(50, 200),
                replicates=8 if smoke else 150,
            ),
            real=dict(
                tasks=("fiqa", "medmcqa-dental", "asdiv") if smoke else REAL,
                # At most so many rows of a task are its law.
                texts=120 if smoke else 2000,
                rows=(16,) if smoke else (16, 64, 256),
                learnware_rows=(20, 32) if smoke else (64, 200),
                docks=1 if smoke else 2,
            ),
            abstention=dict(
                tasks=("fiqa", "medmcqa-dental", "asdiv", "piqa", "molecules")
                if smoke
                else ("dock", "unseen", "outside_development", "outside"),
                # Of a task's texts so many are a user's, the others a learnware's.
                texts=48 if smoke else 200,
                rows=16 if smoke else 64,
                rates=(0.2, 0.5) if smoke else (0.05, 0.1, 0.2),
                splits=10 if smoke else 1000,
            ),
            seed=0,
        )
    )
