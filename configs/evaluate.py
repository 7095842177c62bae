r"""Does the selected model do a task better than the base model?

python -m experiments.evaluate --config=configs/evaluate.py:quickstart
    19 tasks, 14 of which a learnware was trained for, by all 14 learnwares: 11 min on 2 cores.
python -m experiments.evaluate --config=configs/evaluate.py:mine --config.data.source=FILE \
    --config.data.text=question --config.data.answer=answer --config.data.labels='("no","yes")'
    Your own rows, 60 of them in 2 min on 2 cores: at most 64, without answers, select; at most 64
    others are scored. The answers to these are kept in WORKDIR/records, the texts nowhere.
python -m experiments.evaluate --config=configs/evaluate.py:smoke
    2 tasks, 6 rows each: 1 min.

A task that was finished is not computed again; per-item answers lie in WORKDIR/records.
"""

from ml_collections import ConfigDict

from configs import build, finetune

SIZES = ("quickstart", "mine", "smoke")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/evaluate.py: got {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    tasks = {"quickstart": ("dock", "unseen"), "smoke": ("recurrences", "arithmetic-questions")}
    return ConfigDict(
        dict(
            workdir=f"runs/evaluate-{size}",
            dock="docks/quickstart",
            **models(rows=6 if smoke else 64, texts=16 if smoke else 64),
            # Names in learnware_jax.dock.labelled.LABELLED, or roles.
            tasks=tasks.get(size, ()),
            # Your rows: a file or a data set; see configs/finetune.py.
            data=finetune.source(),
            specification={
                name: value
                for name, value in build.specification(smoke).items()
                if name in ("encoder", "points", "reducer", "start", "steps")
            },
            false_acceptance=0.1,
            # Learnwares that are merged, routed to or averaged, at most.
            mixture=3,
            seed=0,
        )
    )


def models(rows, texts):
    return dict(
        model=dict(name="SmolLM2-135M-Instruct", dtype="bfloat16"),
        template="plain",
        # A user's texts, for selection; rows that are scored are others.
        texts=texts,
        scoring=build.scoring(False) | dict(rows=rows),
    )
