"""Which learnwares of a large dock are closest to each of many users?

python -m experiments.search --config=configs/search.py:quickstart
    Indexes docks/quickstart and searches it for 4 users: 10 s on 2 cores.
python -m experiments.search --config=configs/search.py:smoke
    2 users: 10 s.

--config.dock names another dock of RKMEs; its index (DOCK/index) is built, or brought up to date,
first. --config.users are files of texts, files of specifications (KIND.safetensors, as
experiments.select and experiments.specify write them) and names of tasks, as many as you like.
--config.most limits how many learnwares are measured for a user; a ranking that it cuts short is
not certified.

On several hosts the same command is started on each, with a folder that all of them see:
--coordinator=HOST:PORT --num_processes=N --process_id=I; on TPU slices and under SLURM they are
found out. docs/scale.md has the lines. Each host reads its own rows of the index alone.
"""

from ml_collections import ConfigDict

from configs import build

SIZES = ("quickstart", "smoke")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/search.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    users = ("medicationqa", "determinants", "tort-law", "sport-forum")
    return ConfigDict(
        dict(
            workdir="runs/search" if not smoke else "runs/search-smoke",
            dock="docks/quickstart",
            # Public keys, lines "ssh-ed25519 AAAA... name": what others signed, or nobody, is left
            # out. Empty for all that is sound.
            trust="",
            users=users[:2] if smoke else users,
            # The text column of files, where it is not found, and how many texts are taken.
            column="",
            limit=24 if smoke else 2000,
            # How texts are compressed; what they are embedded with is the dock's.
            specification={
                name: value
                for name, value in build.specification(smoke).items()
                if name in ("encoder", "points", "reducer", "start", "steps")
            },
            top_k=5,
            # 0: as many as certified rankings take.
            most=0,
            seed=0,
        )
    )
