"""The geometry of a dock: who lies close to whom.

python -m experiments.geometry --config=configs/geometry.py:quickstart   20 s once the dock is made
python -m experiments.geometry --config=configs/geometry.py:smoke        10 s

--config.dock=DOCK shows any other dock.
"""

from ml_collections import ConfigDict

from configs import build

SIZES = ("quickstart", "smoke")


def get_config(size="quickstart"):
    if size not in SIZES:
        raise ValueError(f"configs/geometry.py: got size {size!r}; want one of {', '.join(SIZES)}.")
    return ConfigDict(
        dict(
            workdir=f"runs/geometry-{size}",
            # A dock that exists; empty for the dock of `build`, made or completed first.
            dock="",
            build=build.get_config(size),
            # "mds": metric multidimensional scaling of the MMD; "kernel_pca": the two directions of
            # largest variance of the embeddings, exact in what they show and blind to the rest.
            map="mds",
            seed=0,
        )
    )
