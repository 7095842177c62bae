"""Which learnware fits a task?

python -m experiments.select --config=configs/select.py:quickstart [--config.user.data=FILE]
    Ranks docks/quickstart, 14 fine-tuned models, for 26 users: other rows of the tasks that the
    models were trained on, tasks that no learnware was made from, and tasks of domains that the
    dock has not; then uses the selected models for three of them: 80 s on 2 cores. Or ranks it for
    the texts of FILE alone: 10 s.
python -m experiments.select --config=configs/select.py:catalogue
    Makes runs/catalogue/dock on the first run (36 specifications, no models; 1-3 min on 2 cores),
    then ranks it for 56 users.
python -m experiments.select --config=configs/select.py:evaluation
    The same, and a summary over 5 seeds and 8 to 512 rows a user: 10-20 min on 2 cores the first
    time. Its table is in docs/selection.md.
python -m experiments.select --config=configs/select.py:smoke
    6 learnwares, 9 users: 20 s.

FILE is jsonl, json, csv, tsv, parquet or plain text (one text a line); --config.user.column names
its text column where that is not found. A task name or OWNER/NAME of a data set works as well.
No text of FILE and no embedding of one is written anywhere; its specification is, to the folder
--config.workdir, with at most half as many points as texts.
"""

from ml_collections import ConfigDict

from configs import build, evaluate

SIZES = ("quickstart", "catalogue", "evaluation", "smoke")
USED = ("reuters-commodities", "medmcqa-clinics", "asdiv-operations")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/select.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke, quickstart = size == "smoke", size == "quickstart"
    dock = size if smoke or quickstart else "catalogue"
    return ConfigDict(
        dict(
            workdir=f"runs/{size}",
            # A dock that exists; empty for the dock of `build`, made or completed first.
            dock="",
            build=build.get_config(dock),
            # Public keys, lines "ssh-ed25519 AAAA... name": what others signed, or nobody, is left
            # out. Empty for all that is sound.
            trust="",
            user=dict(data="", column="", limit=2000),
            # Users for want of user.data. "same": rows of the dock's tasks that it has not;
            # "labelled": tasks with answers that have no learnware.
            users=dict(
                same=True,
                labelled=("unseen",) if quickstart else (),
                unseen={"smoke": ("medicationqa", "determinants"), "quickstart": ()}.get(
                    size, ("unseen",)
                ),
                outside=("molecules",) if smoke else ("outside",),
                texts=24 if smoke else 64,
            ),
            # Labelled users for whom the dock's models are used and compared.
            use=dict(users=USED if quickstart else (), **evaluate.models(rows=32, texts=64)),
            # How users are compressed; what they are embedded with is the dock's.
            specification={
                name: value
                for name, value in build.specification(smoke).items()
                if name in ("encoder", "points", "reducer", "start", "steps")
            },
            # Of users that no learnware fits, at most this share is to be given one.
            false_acceptance=0.2 if smoke else 0.1,
            level=0.9,
            # Learnwares that a ranking shows; 0 for all.
            top_k=0,
            evaluation=dict(
                # () for none.
                seeds=(0, 1, 2, 3, 4) if size == "evaluation" else (),
                rows=(8, 32, 128, 512),
            ),
            seed=0,
        )
    )
