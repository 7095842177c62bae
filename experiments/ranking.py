"""What experiments share about ranking: a dock opened for it, and users ranked against it."""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.common import (
    dock_space,
    embed_parts,
    own_points,
    reducer_options,
)
from learnware_jax.dock import signature, store
from learnware_jax.selection.decision import (
    Selection,
    calibrate_threshold,
    held_out_distances,
    select,
)
from learnware_jax.selection.mixture import Mixture, greedy_mixture
from learnware_jax.selection.pool import Pool, build_pool
from learnware_jax.slm.encoder import Encoder
from learnware_jax.specification import kernels
from learnware_jax.specification.header import printable, size_and_residual
from learnware_jax.specification.reduce import Reduced, reduce_many

POOL_BYTES, GIANT = 2**30, 16


class OpenDock(NamedTuple):
    """A dock ready to rank: its sound learnwares as a pool, and what users are specified with."""

    path: str
    learnwares: list[store.Learnware]
    pool: Pool
    kernel: kernels.Kernel
    space: dict[str, Any]
    encoder: Encoder


class Ranked(NamedTuple):
    """One user's specification, and what a dock has for them."""

    rows: np.ndarray  # embedded texts
    reduced: Reduced
    selection: Selection
    mixture: Mixture
    seconds: float


def pool_of(learnwares: list[store.Learnware], kernel: kernels.Kernel) -> Pool:
    """The learnwares of a dock as a pool."""
    counted = [size_and_residual(learnware.header) for learnware in learnwares]
    return build_pool(
        [learnware.spec for learnware in learnwares],
        kernel,
        ids=[learnware.id for learnware in learnwares],
        n=[n for n, _ in counted],
        residual=[residual for _, residual in counted],
    )


def domain_of(learnware: store.Learnware) -> str:
    """The domain on a learnware's card, safe to show; its id where the card names none."""
    return printable(learnware.card.get("domain", ""), 60) or learnware.id


def threshold_for(pool: Pool, domains: list[str], rate: float) -> float:
    """The distance beyond which none fits, calibrated by leaving out each domain of the dock.

    Infinite where the dock has one domain, or too few learnwares to speak of such a rate.
    """
    if len(set(domains)) < 2 or (len(domains) + 1) * rate < 1:
        return np.inf
    return calibrate_threshold(held_out_distances(pool, domains), false_acceptance=rate)


def without_giants(learnwares: list[store.Learnware]) -> list[store.Learnware]:
    """The learnwares, less those, named in warnings, that would make the pool of all too large.

    In a pool each takes the memory of the one with most points: where that is more than POOL_BYTES,
    those with over GIANT times the median stay out.
    """
    points = np.array([len(learnware.spec.beta) for learnware in learnwares])
    row = 4 * learnwares[0].spec.z.shape[1]
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


def trusted_keys(file: str) -> dict[str, str] | None:
    """The public keys in a file of `--config.trust` and their names; None for no file."""
    return signature.read_keys(file) if file else None


def open_dock(
    path: str,
    settings: ConfigDict,
    *,
    only: Sequence[str] | None = None,
    trust: Mapping[str, str] | None = None,
) -> OpenDock:
    """The dock at `path`, or `only` these learnwares of it, and the encoder of `settings`.

    With `trust`, public keys as `signature.read_keys` gives them, it has what one of these has
    signed; the rest is named in warnings. ValueError if dock and encoder do not belong together, if
    the dock's specifications are not made of texts, or if no sound learnware is left.
    """
    space, encoder = dock_space(path, settings)
    found = store.load(path) if trust is None else signature.load(path, trust)
    learnwares = [learnware for learnware in found if only is None or learnware.id in only]
    if not learnwares:
        signed = "" if trust is None else f", signed by one of {len(trust)} keys"
        raise ValueError(
            f"{path}: the dock has no sound learnware{signed}; see experiments.dock --check."
        )
    learnwares = without_giants(learnwares)
    kernel = kernels.from_dict(space["kernel"])
    return OpenDock(path, learnwares, pool_of(learnwares, kernel), kernel, space, encoder)


def rank_users(
    dock: OpenDock,
    texts: Sequence[Sequence[str]],
    settings: ConfigDict,
    *,
    seed: int,
    threshold: float,
    top_k: int | None = None,
    level: float = 0.9,
    mixture: int = 5,
    own: bool = False,
) -> list[Ranked]:
    """Specify each user's texts and rank the dock for them.

    `own` texts are somebody's: they are kept nowhere, and get at most half as many points as texts.
    A mixture has at most `mixture` learnwares.
    """
    begin = time.perf_counter()
    rows = embed_parts(dock.encoder, texts, dock.space, keep=not own)
    points = own_points(settings, len(rows[0])) if own else settings.points
    fitted = reduce_many(
        jax.random.key(seed), rows, points, dock.kernel, **reducer_options(settings)
    )
    shared = (time.perf_counter() - begin) / len(texts)
    ranked = []
    for embedded, reduced in zip(rows, fitted, strict=True):
        begin = time.perf_counter()
        selection = select(
            reduced.spec,
            dock.pool,
            n=reduced.n,
            residual=reduced.residual,
            threshold=threshold,
            top_k=top_k,
            level=level,
        )
        found = greedy_mixture(reduced.spec, dock.pool, max_size=mixture)
        # Embedding and compression run for all users at once: an equal share, then its own.
        seconds = shared + time.perf_counter() - begin
        ranked.append(Ranked(embedded, reduced, selection, found, seconds))
    return ranked
