"""Programs killed (SIGKILL) while they work.

python -m experiments.faults --config=configs/faults.py
    200 kills: 20 min on 2 busy cores.
python -m experiments.faults --config=configs/faults.py:smoke
    10 kills: 40 s.

Five programs at small sizes: a build of three learnwares, fine-tuning of two adapters with
checkpoints, a dock and its index that change, a download, a specification in pieces. Half of the
kills come at a moment of the run drawn at random, half before a chosen call that changes files
(rename, replace, fsync, unlink, mkdir, rmdir, utime, opening to write). A killed program has
imported everything before it starts, so that kills fall into its work: results.json says whether
before its first call of these, in one, between two, or after the last.

After every kill what it left is read: nothing that was committed may be lost, and every learnware,
row, checkpoint and member of a material is the old or the new one, bit by bit. Then the program is
run again: it must end with the bits of a run that nobody killed (times excepted; an index with the
same rows, its landmarks may be others). results.json has counts by program and by phase, and every
kill; a stopped run goes on with the next.
"""

from ml_collections import ConfigDict

SIZES = ("full", "smoke")


def get_config(size="full"):
    if size not in SIZES:
        raise ValueError(f"configs/faults.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    # At random moments, and before chosen calls.
    kills = {"build": (25, 25), "finetune": (25, 25), "index": (25, 25), "download": (10, 15)}
    kills |= {"specify": (10, 15)}
    return ConfigDict(
        dict(
            workdir=f"runs/faults-{size}",
            kills=dict.fromkeys(kills, (1, 1)) if smoke else kills,
            seed=0,
        )
    )
