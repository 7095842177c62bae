"""The geometry of a dock: a map and a heat map of the distances between its learnwares.

Example: python -m experiments.geometry --config=configs/geometry.py:quickstart
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("geometry")

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments import build
from experiments.common import dock_line, write_json
from learnware_jax import figures
from learnware_jax.dock import store
from learnware_jax.dock.opening import domain_of, pool_of
from learnware_jax.selection.pool import biased_self_terms, members
from learnware_jax.selection.ranking import cross_deficits
from learnware_jax.specification import kernels

MAPS = ("mds", "kernel_pca")


def kernel_pca(squared: np.ndarray) -> np.ndarray:
    """Coordinates (M, 2) of classical scaling: kernel PCA of embeddings at squared distances."""
    count = len(squared)
    center = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-center @ squared @ center / 2)
    return vectors[:, :-3:-1] * np.sqrt(np.maximum(values[:-3:-1], 0))


def metric_mds(squared: np.ndarray, seed: int) -> np.ndarray:
    """Coordinates (M, 2) whose distances follow the MMD (stress minimised from kernel PCA)."""
    from sklearn.manifold import MDS

    mds = MDS(2, metric="precomputed", n_init=1, init="classical_mds", random_state=seed)
    return mds.fit_transform(np.sqrt(squared))


def leaf_order(squared: np.ndarray) -> np.ndarray:
    """An order in which close learnwares are neighbours: leaves of average linkage."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    mmd = squareform(np.sqrt(squared), checks=False)
    return leaves_list(linkage(mmd, "average", optimal_ordering=True))


def check(config: ConfigDict) -> None:
    """ValueError for a map that there is none of."""
    if config.map not in MAPS:
        raise ValueError(f"geometry: got map={config.map!r}; want one of {', '.join(MAPS)}.")


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    dock = {"dock": dock_line(config.dock)} if config.dock else build.preview(config.build)
    following = "geometry --config=configs/geometry.py:quickstart --config.dock=DOCK"
    return dock | {"next": following}


def run(config: ConfigDict) -> dict:
    """Draw the dock; returns what it writes to workdir/results.json."""
    check(config)
    if not config.dock:
        build.run(config.build)
    path = config.dock or config.build.dock
    learnwares = store.load(path)
    if len(learnwares) < 3:
        raise ValueError(
            f"geometry: {path} has {len(learnwares)} sound learnwares; a map needs at least 3."
        )
    pool = pool_of(learnwares, kernels.from_dict(store.read_space(path)["kernel"]))
    # Between the specifications themselves: biased, so that a learnware is at 0 from itself.
    own = biased_self_terms(pool)
    squared = own[:, None] + own - 2 * cross_deficits(members(pool), pool)
    squared = np.maximum((squared + squared.T) / 2, 0)
    np.fill_diagonal(squared, 0)
    points = kernel_pca(squared) if config.map == "kernel_pca" else metric_mds(squared, config.seed)
    domains = [domain_of(learnware) for learnware in learnwares]
    order = leaf_order(squared)
    workdir = Path(config.workdir)
    figures.save(figures.dock_map(points, pool.ids, domains), workdir / "map")
    names = [pool.ids[i] for i in order]
    drawn = figures.heat_map(squared[np.ix_(order, order)], names, names, label="squared MMD")
    figures.save(drawn, workdir / "heat_map")
    drawn = np.linalg.norm(points[:, None] - points[None], axis=-1)
    pairs = np.triu_indices(len(points), 1)
    agreement = float(np.corrcoef(drawn[pairs], np.sqrt(squared)[pairs])[0, 1])
    output = {
        "dock": path,
        "ids": list(pool.ids),
        "domains": domains,
        "squared_mmd": squared.tolist(),
        "points": points.tolist(),
        "map": config.map,
        "correlation": agreement,
    }
    write_json(workdir / "results.json", output)
    print(f"Distances on the map and MMDs correlate at {agreement:.2f}.")
    for file in ("map.png", "heat_map.png", "results.json"):
        print(workdir / file)
    return output
