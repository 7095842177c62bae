"""What experiments share about ranking: a dock opened for it, and users ranked against it."""

import time
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
from learnware_jax.dock.opening import pool_of, without_giants
from learnware_jax.selection.decision import Selection, select
from learnware_jax.selection.mixture import Mixture, greedy_mixture
from learnware_jax.selection.pool import Pool
from learnware_jax.slm.encoder import Encoder
from learnware_jax.specification import kernels
from learnware_jax.specification.reduce import Reduced, reduce_many


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
