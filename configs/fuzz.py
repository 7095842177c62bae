"""Do readers of files from strangers read them or say what is wrong, whatever is in them?

python -m experiments.fuzz --config=configs/fuzz.py
    5,000 mutated files for each of 24 readers, 120,000 together: 7 min on 2 cores.
python -m experiments.fuzz --config=configs/fuzz.py --config.engine=atheris
    20 s for each of them, guided by coverage. Wants atheris (pip install atheris).
python -m experiments.fuzz --config=configs/fuzz.py:smoke
    100 of two of them: 10 s.

Readers run in other processes, with a GiB of memory and `timeout` seconds for each input; that one
returns, or raises an error of its own in a printable line, is all that is allowed. A file made or
changed outside of a reader's folder, a program that is run, a pickle that is loaded and a call to
the network are failures. What failed is kept in WORKDIR/failures with the reason; `tests/corpus`
has those of the past.
"""

from ml_collections import ConfigDict

SIZES = ("full", "smoke")


def get_config(size="full"):
    if size not in SIZES:
        raise ValueError(f"configs/fuzz.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    smoke = size == "smoke"
    return ConfigDict(
        dict(
            workdir="runs/fuzz-smoke" if smoke else "runs/fuzz",
            engine="mutations",
            # () for all.
            readers=("spec", "zip") if smoke else (),
            inputs=100 if smoke else 5000,
            # Of atheris, a reader.
            seconds=20,
            timeout=10,
            seed=0,
        )
    )
