"""A dock opened for ranking: its sound learnwares as a pool, and when it says that none fits."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from learnware_jax.dock.store import Learnware, StrPath, load, read_space
from learnware_jax.selection.decision import calibrate_threshold, held_out_distances
from learnware_jax.selection.pool import Pool, build_pool
from learnware_jax.specification.header import printable, size_and_residual
from learnware_jax.specification.kernels import Kernel, from_dict

POOL_BYTES, GIANT = 2**30, 16


class Dock(NamedTuple):
    """A dock ready to rank."""

    learnwares: list[Learnware]
    pool: Pool
    kernel: Kernel
    space: dict[str, Any]  # what a user's specification must be made with
    domains: dict[str, str]  # of every learnware, by id
    threshold: float  # squared MMD beyond which none fits; infinite where it cannot be told


def open_dock(path: StrPath, *, false_acceptance: float = 0.1) -> Dock:
    """The dock at `path`, its unsound learnwares left out and named in warnings.

    Of users whose domain the dock has not, about the share `false_acceptance`, in (0, 1), is to be
    given a learnware all the same: that sets the threshold (see `threshold_for`). ValueError for
    another rate, or if no sound learnware is left; other errors as in `store.read_space`.

    >>> from learnware_jax import open_dock
    >>> dock = open_dock("docks/quickstart")
    >>> len(dock.learnwares), dock.domains["arithmetic"], dock.space["encoder"]
    (14, 'mathematics', 'all-MiniLM-L6-v2')
    """
    if not 0 < false_acceptance < 1:
        raise ValueError(
            f"open_dock: got false_acceptance={false_acceptance}; want a rate between 0 and 1."
        )
    space = read_space(path)
    learnwares = load(path)
    if not learnwares:
        raise ValueError(
            f"open_dock: {path} has no sound learnware; see experiments.dock --check, or add some."
        )
    learnwares = without_giants(learnwares)
    kernel = from_dict(space["kernel"])
    pool = pool_of(learnwares, kernel)
    domains = {learnware.id: domain_of(learnware) for learnware in learnwares}
    threshold = threshold_for(pool, list(domains.values()), false_acceptance)
    return Dock(learnwares, pool, kernel, space, domains, threshold)


def pool_of(learnwares: Sequence[Learnware], kernel: Kernel) -> Pool:
    """The learnwares of a dock as a pool."""
    counted = [size_and_residual(learnware.header) for learnware in learnwares]
    return build_pool(
        [learnware.spec for learnware in learnwares],
        kernel,
        ids=[learnware.id for learnware in learnwares],
        n=[n for n, _ in counted],
        residual=[residual for _, residual in counted],
    )


def domain_of(learnware: Learnware) -> str:
    """The domain on a learnware's card, safe to show; its id where the card names none."""
    return printable(learnware.card.get("domain", ""), 60) or learnware.id


def threshold_for(pool: Pool, domains: Sequence[str], rate: float) -> float:
    """The distance beyond which none fits, calibrated by leaving out each domain of the dock.

    Infinite where the dock has one domain, or too few learnwares to speak of such a rate.
    """
    if len(set(domains)) < 2 or (len(domains) + 1) * rate < 1:
        return np.inf
    return calibrate_threshold(held_out_distances(pool, domains), false_acceptance=rate)


def without_giants(learnwares: list[Learnware]) -> list[Learnware]:
    """The learnwares, less those, named in warnings, that would make the pool of all too large.

    In a pool each takes the memory of the one with most points: where that is more than POOL_BYTES,
    those with over GIANT times the median stay out.
    """
    points = np.array([len(learnware.spec.beta) for learnware in learnwares])
    row = 4 * np.shape(learnwares[0].spec.z)[1]
    if len(points) * int(points.max()) * row <= POOL_BYTES:
        return learnwares
    most = GIANT * np.median(points)
    for learnware, count in zip(learnwares, points, strict=True):
        if count > most:
            warnings.warn(
                f"left out {learnware.id!r}: it has {count} points, and half of the dock has at "
                f"most {most / GIANT:g}; all would take its memory.",
                stacklevel=2,
            )
    return [one for one, count in zip(learnwares, points, strict=True) if count <= most]
