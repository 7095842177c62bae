"""The index of a dock: what a search reads of every learnware, in memory-mapped arrays.

    DOCK/index/index.json                   how many rows there are, of what, and as of when
    DOCK/index/landmarks.W.safetensors      the projection that all sketches share
    DOCK/index/codes.W.bin                  one row a learnware: its sketch
    DOCK/index/rows.W.bin                   its numbers, and whether it is alive
    DOCK/index/points.W.bin                 its specification, padded, and its id

It is made from the dock and can be deleted at any time. W is a word, another one for every index
that is built anew. Rows are written after those that index.json counts, and index.json is replaced
last, so a killed writer leaves the old index or the new one. A removed learnware leaves a dead row;
a replaced one a dead row and a new one. Writers take turns on DOCK/index/.lock. Readers take none:
an open index keeps its rows, whatever is written meanwhile, but for those that die.

`add` and `remove` change a dock and its index. What else changes the dock leaves the index behind:
`is_behind` says so, and `update` mends it. Ids and specifications are read from the index on
demand, cards from the dock (`store.card_of`).
"""

import hashlib
import math
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from learnware_jax.dock import store
from learnware_jax.dock.store import Learnware, Problem, StrPath
from learnware_jax.selection.pool import stack
from learnware_jax.specification.header import Header, dump_json, parse_json, size_and_residual
from learnware_jax.specification.kernels import Kernel, from_dict
from learnware_jax.specification.rkme import check_rows
from learnware_jax.specification.sketch import (
    CODES,
    Landmarks,
    choose_landmarks,
    project,
    quantise,
)
from learnware_jax.specification.tensors import read_stored

SCHEMA = 1
LOCK_SECONDS = 30.0
# Learnwares that landmarks are chosen from, and bytes of their points.
SAMPLE, SAMPLE_BYTES = 2048, 1 << 28
# Bytes of points that are read, projected and written together.
BATCH_BYTES = 1 << 26
# Numbers of all landmarks (2 GiB, where they are vectors), and of the points of one row (64 MiB).
MAX_LANDMARKS, MAX_POINTS = 1 << 29, 1 << 24
_CHANGED = "changed since it came into the index"
FILES = {
    "landmarks": "safetensors",
    "codes": "bin",
    "rows": "bin",
    "points": "bin",
}
_ROW = np.dtype(
    [
        *(("self_term", "<f8"), ("residual", "<f8"), ("n", "<i8"), ("hash", "S16")),
        *(("stamp", "<u8"), ("scale", "<f4"), ("error", "<f4"), ("rest", "<f4"), ("alive", "u1")),
    ],
    align=True,
)


class Index(NamedTuple):
    """An open index. Arrays are read-only and memory-mapped: none is read before it is used."""

    path: Path  # the dock
    header: Header  # the dock's
    kernel: Kernel
    landmarks: Landmarks
    codes: np.ndarray  # (M, s) int8, bfloat16 or float32: coordinates are scale * codes
    scale: Float[np.ndarray, " M"]  # float32
    error: Float[np.ndarray, " M"]  # float32: norm of what coding changed
    rest: Float[np.ndarray, " M"]  # float32: norm of what the projection leaves out
    self_term: Float[np.ndarray, " M"]  # float64: biased sum_ij beta_i beta_j deficit
    n: Int[np.ndarray, " M"]  # rows behind each specification
    residual: Float[np.ndarray, " M"]  # float64
    alive: Bool[np.ndarray, " M"]
    z: Float[np.ndarray, "M m d"]  # float32
    beta: Float[np.ndarray, "M m"]  # float64, padded with zeros
    ids: np.ndarray  # (M,) bytes; see `ids_of`
    hashes: np.ndarray  # (M,) bytes: the BLAKE2b of each id, 128 bits
    stamps: np.ndarray  # (M,) uint64; see `store.stamps`


class Updated(NamedTuple):
    """What `update` did."""

    added: int  # learnwares that came or were replaced
    removed: int  # rows that died: their learnwares are gone, replaced or unsound
    skipped: list[Problem]  # unsound learnwares
    built: bool  # whether all rows were made, not the new ones alone


class _State(NamedTuple):
    """The content of index.json, besides its schema."""

    header: Header
    files: str  # the word in the files' names
    landmarks: int
    sha256: str  # of the file of landmarks
    among: int | None  # learnwares in the dock when these were chosen; None: by the caller
    points: int
    dtype: str
    width: int
    rows: int
    mark: int | None  # the dock's, when the index had all of it; None: never


def create(path: StrPath, landmarks: Landmarks, *, points: int, dtype: str = "int8") -> None:
    """Make an empty index for the dock at `path`, with these landmarks for its sketches.

    Arguments:
      points: the most points that a specification may have; others are padded to it.
      dtype: of the sketches' codes: "int8", "bfloat16" or "float32".

    FileExistsError if there is an index, ValueError for landmarks that do not fit together or are
    of another dimension than the dock, another dtype, or points < 1. Most docks want `update`.
    """
    with _writing(path, where="create", new=True) as state:
        if state is not None:
            raise FileExistsError(
                f"create: there is an index at {_folder(path)} already; use it, or delete it."
            )
        _commit(path, _new_files(path, landmarks, points, dtype, None, where="create"))


def append(
    path: StrPath,
    ids: Sequence[str],
    z: np.ndarray,
    beta: np.ndarray,
    *,
    n: Sequence[int] | np.ndarray,
    residual: Sequence[float] | np.ndarray,
) -> None:
    """Put rows for q learnwares at the end of the index, all or none of them, durably.

    Arguments are as for `selection.pool.build_pool`, but stacked: z (q, k, d), beta (q, k), n (q,)
    and residual (q,). Both of the first may be memory-mapped: they are read in parts. Nothing is
    looked up in the dock, so that pools made elsewhere can be searched; the index counts as behind
    until `update`.

    Raises ValueError for arrays that do not fit together or have more points than the index holds,
    bad weights or points, n < 1, a residual that is not finite, ids that are no ids, occur twice or
    are in the index; FileNotFoundError if there is no index.
    """
    with _writing(path, where="append") as state:
        _check_rows(state, ids, z, beta, n, residual)
        _, table, _ = _open_all(path, state, where="append")
        known = _find(table["hash"], table["alive"], ids) >= 0
        if known.any():
            raise ValueError(
                f"append: {known.sum()} of {len(ids)} ids are in the index already, the first is "
                f"{ids[known.argmax()]!r}; tombstone these rows first, or leave them out."
            )
        rows = _Rows(ids, z, beta, n, residual, np.zeros(len(ids), np.uint64))
        landmarks = _read_landmarks(path, state, where="append")
        state = _write_rows(path, state, landmarks, rows, where="append")
        _commit(path, state._replace(mark=None))


def tombstone(path: StrPath, ids: Sequence[str]) -> None:
    """Mark the rows of these learnwares as dead, durably; the dock keeps them.

    ValueError, before anything is marked, if the index has not all of them.
    """
    with _writing(path, where="tombstone") as state:
        table = _open(path, state, "rows", where="tombstone")
        rows = _find(table["hash"], table["alive"], ids)
        if (rows < 0).any():
            missing = ids[int((rows < 0).argmax())]
            raise ValueError(
                f"tombstone: {(rows < 0).sum()} of {len(ids)} ids are not in the index, the first "
                f"is {missing!r}; name learnwares that are."
            )
        _commit(path, state._replace(mark=None))
        _bury(path, state, rows)


def open_index(path: StrPath) -> Index:
    """The index of the dock at `path`. Costs the same for few rows and for many.

    FileNotFoundError if there is none, ValueError if it is damaged, of another version, or not of
    this dock's space: sizes are compared before anything is mapped. That its rows are those of the
    dock is not looked at (see `check`): whoever distrusts an index builds another.
    """
    while True:
        state = _read_state(path, where="open_index")
        try:
            landmarks = _read_landmarks(path, state, where="open_index")
            codes, table, points = _open_all(path, state, where="open_index")
            break
        except FileNotFoundError:
            # An index that was built anew meanwhile has other files.
            if _read_state(path, where="open_index").files == state.files:
                raise
    return Index(
        path=Path(path),
        header=state.header,
        kernel=_kernel(state.header),
        landmarks=landmarks,
        codes=codes,
        alive=table["alive"].view(bool),
        ids=points["id"],
        hashes=table["hash"],
        stamps=table["stamp"],
        **{name: table[name] for name in ("scale", "error", "rest", "self_term", "n", "residual")},
        **{name: points[name] for name in ("z", "beta")},
    )


def ids_of(index: Index, rows: Sequence[int] | Int[np.ndarray, " k"]) -> list[str]:
    """The ids of the learnwares in these rows, dead or alive. ValueError for what is no id."""
    ids = [bytes(index.ids[row]).decode(errors="replace") for row in rows]
    for id in ids:
        store.check_id(id, where=f"ids_of: the index of {index.path} is damaged")
    return ids


def row_of(index: Index, id: str) -> int:
    """The row of a learnware. ValueError if it has none that is alive."""
    row = int(_find(index.hashes, index.alive, [id])[0])
    if row < 0:
        raise ValueError(
            f"row_of: the index of {index.path} has no learnware {id!r}; see is_behind and update."
        )
    return row


def is_behind(path: StrPath) -> bool:
    """Whether the dock may have changed since its index had all of it: then `update` it.

    It costs the same for any dock. A specification written over in its place is not seen, but
    `update` sees it. Errors are those of `open_index`.
    """
    return _read_state(path, where="is_behind").mark != store.mark(path)


def add(
    path: StrPath,
    learnware: Learnware,
    *,
    adapter: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> None:
    """`store.add`, and a row in the dock's index where it has one.

    Killed in between, or where a specification has more points than the index holds (a warning says
    so), it leaves the learnware in the dock and the index behind.
    """
    if not _json_file(path).exists():
        store.add(path, learnware, adapter=adapter, replace=replace)
        return
    with _writing(path, where="add") as state:
        # Before all else: where the index is damaged nothing is added.
        landmarks = _read_landmarks(path, state, where="add")
        _, table, _ = _open_all(path, state, where="add")
        change = store.add(path, learnware, adapter=adapter, replace=replace)
        stamp = store.stamps(path, [learnware.id])
        if store.mark(path) != change.after:
            stamp[:] = 0  # it may be that of another writer's learnware
        rows = _find(table["hash"], table["alive"], [learnware.id])
        _bury(path, state, rows[rows >= 0])
        if len(learnware.spec.beta) > state.points:
            warnings.warn(
                f"add: {learnware.id!r} is in the dock and not in its index: it has "
                f"{len(learnware.spec.beta)} points, and the index of {path} holds up to "
                f"{state.points}. Update the index.",
                stacklevel=2,
            )
            return
        rows = _rows_of([learnware], stamp, state.points)
        state = _write_rows(path, state, landmarks, rows, where="add")
        _commit(path, _followed(state, change))


def remove(path: StrPath, id: str) -> None:
    """`store.remove`, and the end of the row in the dock's index where it has one.

    Killed in between it leaves the learnware out of the dock and the index behind.
    """
    if not _json_file(path).exists():
        store.remove(path, id)
        return
    with _writing(path, where="remove") as state:
        table = _open(path, state, "rows", where="remove")
        change = store.remove(path, id)
        rows = _find(table["hash"], table["alive"], [id])
        _bury(path, state, rows[rows >= 0])
        _commit(path, _followed(state, change))


def update(
    path: StrPath,
    key: PRNGKeyArray,
    *,
    dtype: str = "int8",
    progress: Callable[[int], None] = lambda done: None,
) -> Updated:
    """Bring the index of a dock up to date with it, or build it.

    What is new is appended, what is gone dies, what was replaced does both. All rows are made anew,
    and readers keep the old ones until the new are complete, if a specification has more points
    than the index holds, if more than half of the rows are dead, or if the dock is four times as
    large as when landmarks were chosen from few. A build that was killed goes on.

    Arguments:
      key: for the choice of landmarks.
      dtype: of the codes of a new index, as for `create`; an index that is there keeps its own.
      progress: called with the number of learnwares, of those in the dock, that are done.

    Unsound learnwares are skipped, and named in warnings. Raises ValueError for a dock without
    sound learnwares, or whose landmarks would be one point; otherwise as `open_index`.
    """
    with _writing(path, where="update", new=True) as state:
        # Before the ids: what changes from here on leaves the index behind.
        mark = store.await_mark(path, _folder(path))
        ids = fresh = store.list_ids(path)
        begun = None if state is None else state.files
        points, doomed = 1, np.zeros(0, np.int64)
        if state is None:
            state = _choose(path, key, ids, points, dtype)
            _commit(path, state)
            old = state
        else:
            old, points = state, state.points
            fresh, doomed = _compare(path, state, ids)
            few = old.among is not None and old.among < SAMPLE
            dead = old.rows - (len(ids) - len(fresh))
            if 2 * dead > old.rows or (few and len(ids) >= 4 * old.among):
                # Where no landmarks can be chosen now, the old ones serve on.
                with suppress(ValueError):
                    state, fresh = _choose(path, key, ids, points, old.dtype), ids
            if state.files == old.files:
                # Otherwise readers keep the old rows until all of the new are there.
                if old.mark == mark and len(fresh) + len(doomed):
                    # What was written over in its place left no other mark on the dock.
                    state = state._replace(mark=None)
                    _commit(path, state)
                _bury(path, old, doomed)
        while True:
            state, skipped, points = _append_dock(
                path, state, fresh, len(ids), state.files == old.files, progress
            )
            if points <= state.points:
                break
            state, fresh = _choose(path, key, ids, points, old.dtype), ids
        _commit(path, state._replace(mark=mark))
    for problem in skipped:
        warnings.warn(f"update: skipped {problem.id!r} of {path}: {problem.reason}", stacklevel=2)
    added = len(fresh) - len(skipped)
    return Updated(added, len(doomed), skipped, state.files != begun)


def check(path: StrPath) -> list[Problem]:
    """Where the index differs from the dock, sorted by id; everything is read and sketched again.

    Learnwares without a row, rows without a sound learnware, and rows of another content. Errors
    are those of `open_index`.
    """
    index = open_index(path)
    problems, seen = [], np.zeros(len(index.ids), bool)
    size = _together(*index.z.shape[1:])
    for some, stamps in _read_batches(path, store.list_ids(path), size, where="check"):
        rows = _find(index.hashes, index.alive, [found.id for found in some])
        seen[rows[rows >= 0]] = True
        compared = []
        for i, found in enumerate(some):
            if isinstance(found, Problem):
                if rows[i] >= 0:
                    problems.append(Problem(found.id, "unsound, but in the index"))
            elif rows[i] < 0:
                problems.append(Problem(found.id, "not in the index"))
            elif len(found.spec.beta) > index.z.shape[1]:
                problems.append(Problem(found.id, _CHANGED))
            else:
                compared.append(i)
        if compared:
            learnwares = [some[i] for i in compared]
            problems += _differing(index, learnwares, rows[compared], stamps[compared])
    for id in ids_of(index, np.flatnonzero(index.alive & ~seen)):
        problems.append(Problem(id, "in the index, but not in the dock"))
    return sorted(problems)


def _differing(
    index: Index, learnwares: Sequence[Learnware], rows: np.ndarray, stamps: np.ndarray
) -> list[Problem]:
    """The learnwares whose rows have other numbers than they should."""
    _, z, beta, n, residual, _ = _rows_of(learnwares, stamps, index.z.shape[1])
    made = project(index.landmarks, index.kernel, z, beta)
    coded = index.codes[rows].astype(np.float64) * index.scale[rows][:, None]
    # Another machine rounds otherwise.
    near = {"rtol": 1e-5, "atol": 1e-6}
    same = {
        "z": (index.z[rows] == z).all((1, 2)),
        "beta": (index.beta[rows] == beta).all(1),
        "n": index.n[rows] == n,
        "residual": index.residual[rows] == residual,
        "self_term": np.isclose(index.self_term[rows], made.self_term, **near),
        "rest": np.isclose(index.rest[rows], made.rest, **near),
        "codes": np.isclose(
            np.linalg.norm(coded - made.coordinates, axis=1), index.error[rows], **near
        ),
    }
    problems = []
    for i, learnware in enumerate(learnwares):
        names = ", ".join(name for name, equal in same.items() if not equal[i])
        if names and stamps[i] != index.stamps[rows[i]]:
            problems.append(Problem(learnware.id, _CHANGED))
        elif names:
            reason = f"its row is damaged ({names}); {_remedy(index.path)}"
            problems.append(Problem(learnware.id, reason))
    return problems


class _Rows(NamedTuple):
    """Learnwares on their way into an index."""

    ids: Sequence[str]
    z: Float[np.ndarray, "q k d"]
    beta: Float[np.ndarray, "q k"]
    n: Sequence[int] | np.ndarray
    residual: Sequence[float] | np.ndarray
    stamps: np.ndarray


def _rows_of(learnwares: Sequence[Learnware], stamps: np.ndarray, points: int) -> _Rows:
    z, beta = stack([learnware.spec for learnware in learnwares], points)
    counted = [size_and_residual(learnware.header) for learnware in learnwares]
    return _Rows(
        [learnware.id for learnware in learnwares],
        z,
        beta,
        np.array([n for n, _ in counted], np.int64),
        np.array([residual for _, residual in counted], np.float64),
        stamps,
    )


def _compare(path: StrPath, state: _State, ids: list[str]) -> tuple[list[str], np.ndarray]:
    """Of these ids of the dock, sorted, those that the index has not as they are now; and the rows
    that are alive and should not be."""
    _, table, _ = _open_all(path, state, where="update")
    rows = _find(table["hash"], table["alive"], ids)
    stamps = store.stamps(path, ids)
    same = (rows >= 0) & (stamps != 0)
    same[same] = stamps[same] == table["stamp"][rows[same]]
    doomed = table["alive"].astype(bool)
    doomed[rows[same]] = False
    return [ids[i] for i in np.flatnonzero(~same)], np.flatnonzero(doomed)


def _choose(path: StrPath, key: PRNGKeyArray, ids: list[str], points: int, dtype: str) -> _State:
    """New files for an index without rows, whose landmarks are chosen from a sample of the dock."""
    draw, choice = jax.random.split(key)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(draw)).tolist())
    sample, total = [], 0
    drawn = (ids[i] for i in rng.permutation(len(ids))[:SAMPLE])
    for found in store.read_each(path, drawn, where="update"):
        if isinstance(found, Learnware) and total < SAMPLE_BYTES:
            sample.append(found.spec)
            total += found.spec.z.nbytes
    if not sample:
        raise ValueError(
            f"update: {path} has no sound learnware to choose landmarks from; add some first."
        )
    z, beta = stack(sample)
    landmarks = choose_landmarks(choice, z, beta, _kernel(store.read_header(path)))
    points = max(points, z.shape[1])
    return _new_files(path, landmarks, points, dtype, len(ids), where="update")


def _append_dock(
    path: StrPath,
    state: _State,
    ids: list[str],
    total: int,
    commit: bool,
    progress: Callable[[int], None],
) -> tuple[_State, list[Problem], int]:
    """The state with rows for the sound ones of these learnwares that have no more points than it
    holds; the unsound ones; and the most points of one."""
    landmarks = _read_landmarks(path, state, where="update")
    size = _together(state.points, state.header.space["dimension"])
    skipped, points, done = [], 0, total - len(ids)
    progress(done)
    for some, stamps in _read_batches(path, ids, size, where="update"):
        skipped += [found for found in some if isinstance(found, Problem)]
        sound = [i for i, found in enumerate(some) if isinstance(found, Learnware)]
        points = max([points, *(len(some[i].spec.beta) for i in sound)])
        fitting = [i for i in sound if len(some[i].spec.beta) <= state.points]
        if fitting:
            rows = _rows_of([some[i] for i in fitting], stamps[fitting], state.points)
            state = _write_rows(path, state, landmarks, rows, where="update")
            if commit:
                _commit(path, state)
        progress(done := done + len(some))
    return state, skipped, points


def _read_batches(
    path: StrPath, ids: list[str], size: int, *, where: str
) -> Iterator[tuple[list[Learnware | Problem], np.ndarray]]:
    """These learnwares, `size` at a time, and their stamps, which are not younger."""
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        stamps = store.stamps(path, some)
        yield list(store.read_each(path, some, where=where)), stamps


def _together(points: int, dimension: int) -> int:
    """Learnwares that are read, projected and written at once."""
    return max(1, min(1024, BATCH_BYTES // (4 * points * dimension)))


def _followed(state: _State, change: store.Change) -> _State:
    """The state after a change of the dock that the index has followed."""
    # Where it was behind, or another writer came first, it stays behind.
    return state._replace(mark=change.after) if state.mark == change.before else state


# Rows


def _hashes(ids: Sequence[str]) -> np.ndarray:
    digests = (hashlib.blake2b(os.fsencode(id), digest_size=16).digest() for id in ids)
    return np.frombuffer(b"".join(digests), "S16")


def _find(hashes: np.ndarray, alive: np.ndarray, ids: Sequence[str]) -> Int[np.ndarray, " q"]:
    """The row of each of these ids that is alive, -1 where there is none."""
    own, inverse = np.unique(_hashes(ids), return_inverse=True)
    rows = np.full(len(own), -1)
    # A table of 20 bits of each hash leaves few rows to compare.
    near = np.zeros(1 << 20, bool)
    near[_bits(own)] = True
    for start in range(0, len(hashes), 1 << 20):
        part = np.ascontiguousarray(hashes[start : start + (1 << 20)])
        found = np.flatnonzero(near[_bits(part)])
        place = np.searchsorted(own, part[found]).clip(max=len(own) - 1)
        good = (own[place] == part[found]) & (alive[found + start] != 0)
        rows[place[good]] = found[good] + start
    return rows[inverse]


def _bits(hashes: np.ndarray) -> np.ndarray:
    return hashes.view("<u8")[::2] & np.uint64((1 << 20) - 1)


def _check_rows(state: _State, ids, z, beta, n, residual) -> None:
    """Raise for what `append` refuses; in slices, as z may be memory-mapped."""
    dimension = state.header.space["dimension"]
    count = len(ids)
    shapes = [np.shape(a) for a in (z, beta, n, residual)]
    points = shapes[1][1] if len(shapes[1]) == 2 else 0
    wanted = [(count, points, dimension), (count, points), (count,), (count,)]
    if not count or shapes != wanted or not 1 <= points <= state.points:
        raise ValueError(
            f"append: got {count} ids, z {shapes[0]}, beta {shapes[1]}, n {shapes[2]} and residual "
            f"{shapes[3]}; want z (q, k, {dimension}), beta (q, k), n (q,) and residual (q,) for q "
            f"ids, at least one, and k from 1 to {state.points}, which is what the index holds."
        )
    for name, array, dtype in (("z", z, np.float32), ("beta", beta, np.float64)):
        if not np.can_cast(array.dtype, dtype, "safe"):
            raise TypeError(
                f"append: {name} is {array.dtype} and is stored as {np.dtype(dtype).name}; round "
                "it yourself before anything is computed from it."
            )
    if np.asarray(n).dtype.kind not in "iu":
        raise TypeError(f"append: n is {np.asarray(n).dtype}; want integers.")
    for id in ids:
        store.check_id(id, where="append")
    if len(set(ids)) < count:
        raise ValueError(f"append: {count - len(set(ids))} of {count} ids repeat another one.")
    for start in range(0, count, size := _together(points, dimension)):
        check_rows(
            z[start : start + size].reshape(-1, dimension),
            where=f"append: learnwares {start} and after, {points} points each",
        )
    weights = np.asarray(beta, np.float64)
    good = (weights >= 0).all(1) & (np.abs(weights.sum(1) - 1) <= 1e-5)
    good &= (np.asarray(n) >= 1) & np.isfinite(np.asarray(residual, np.float64))
    if not good.all():
        raise ValueError(
            f"append: {(~good).sum()} of {count} learnwares have weights that are negative or do "
            "not sum to one, n below 1, or a residual that is not finite; the first is "
            f"{ids[good.argmin()]!r}."
        )


def _write_rows(
    path: StrPath, state: _State, landmarks: Landmarks, rows: _Rows, *, where: str
) -> _State:
    """Write rows after those that the state counts, durably; the state that counts them too.

    The files have been opened before: what is shorter than it should be would be filled with zeros.
    """
    kernel, count = _kernel(state.header), len(rows.ids)
    table = np.zeros(count, _ROW)
    table["n"], table["residual"], table["stamp"] = rows.n, rows.residual, rows.stamps
    table["hash"], table["alive"] = _hashes(rows.ids), 1
    with (
        _writable(path, state, "codes", where=where) as codes,
        _writable(path, state, "rows", where=where) as numbers,
        _writable(path, state, "points", where=where) as points,
    ):
        codes.seek(state.rows * _row(state, "codes").itemsize)
        points.seek(state.rows * _row(state, "points").itemsize)
        for start in range(0, count, size := _together(*np.shape(rows.z)[1:])):
            some = slice(start, start + size)
            z, beta = np.asarray(rows.z[some], np.float32), np.asarray(rows.beta[some], np.float64)
            record = np.zeros(len(z), _row(state, "points"))
            record["id"] = [id.encode() for id in rows.ids[some]]
            record["beta"][:, : beta.shape[1]] = beta
            record["z"][:, : z.shape[1]] = z
            record["z"][:, z.shape[1] :] = z[:, :1]  # as `stack` does
            projected = project(landmarks, kernel, record["z"], record["beta"])
            coded = quantise(projected.coordinates, state.dtype)
            table["self_term"][some], table["rest"][some] = projected.self_term, projected.rest
            table["scale"][some], table["error"][some] = coded.scale, coded.error
            codes.write(coded.code.tobytes())
            points.write(record.tobytes())
        numbers.seek(state.rows * _ROW.itemsize)
        numbers.write(table.tobytes())
    return state._replace(rows=state.rows + count)


def _bury(path: StrPath, state: _State, rows: np.ndarray) -> None:
    """Mark rows as dead, durably, in their place."""
    if len(rows):
        with _writable(path, state, "rows", where="tombstone") as table:
            for row in rows.tolist():
                at = _ROW.fields["alive"][1]  # pyright: ignore[reportOptionalSubscript]
                table.seek(row * _ROW.itemsize + at)
                table.write(b"\0")


# Files


def _folder(path: StrPath) -> Path:
    return Path(path) / "index"


def _json_file(path: StrPath) -> Path:
    return _folder(path) / "index.json"


def _file(path: StrPath, state: _State, name: str) -> Path:
    return _folder(path) / f"{name}.{state.files}.{FILES[name]}"


def _remedy(path: StrPath) -> str:
    return f"delete {_folder(path)} and build it again with `update`: nothing of it is lost"


def _kernel(header: Header) -> Kernel:
    return from_dict(header.space.get("kernel"))


def _row(state: _State, name: str) -> np.dtype:
    """One row of a file."""
    if name == "rows":
        return _ROW
    if name == "codes":
        return np.dtype((CODES[state.dtype], (state.width,)))
    m, d = state.points, state.header.space["dimension"]
    return np.dtype([("beta", "<f8", (m,)), ("z", "<f4", (m, d)), ("id", "S100")], align=True)


@contextmanager
def _writing(path: StrPath, *, where: str, new: bool = False) -> Iterator[Any]:
    """The state of the index, while no other process writes to it; what a killed one left is
    deleted. Without an index: FileNotFoundError, or None where a `new` one may come."""

    def read():
        return None if new and not _json_file(path).exists() else _read_state(path, where=where)

    store.read_header(path)
    store.refuse_link(_folder(path), where=where)
    read()
    doing = f"has been writing to the index of {path} for {LOCK_SECONDS:g} s"
    with (
        store.locked(_folder(path) / ".lock", where=where, doing=doing, seconds=LOCK_SECONDS),
        store.explained(f"to the index of {path}", "`update` mends it", where=where),
    ):
        state = read()
        _clean(path, state)
        try:
            yield state
        finally:
            # What fails to go does no harm; the next writer tries again.
            with suppress(OSError):
                _clean(path, read())


def _clean(path: StrPath, state: _State | None) -> None:
    """Delete what a killed writer, or an older index, has left."""
    keep = () if state is None else {_file(path, state, name).name for name in FILES}
    for file in _folder(path).iterdir():
        ours = re.fullmatch(
            rf"\.?({'|'.join(FILES)})\.[0-9a-f]{{8}}\..+|\.index\.json\..+", file.name
        )
        if ours and file.name not in keep:
            file.unlink()


def _read_state(path: StrPath, *, where: str) -> _State:
    header, file = store.read_header(path), _json_file(path)
    for inside in (_folder(path), file, _folder(path) / ".lock"):
        store.refuse_link(inside, where=where)
    if not file.exists():
        raise FileNotFoundError(f"{where}: {path} has no index; build one with `update`.")
    text = store.read_bytes(file, store.MAX_JSON_BYTES, where=where)
    try:
        fields = parse_json(text, where=f"{where}: {file}")
    except ValueError as error:
        raise ValueError(f"{where}: {file} is damaged; {_remedy(path)}.") from error
    schema = fields.pop("schema", None) if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{where}: {file} has schema {schema!r}, and this version of learnware_jax reads "
            f"{SCHEMA}; use the version that wrote it, or {_remedy(path)}."
        )
    if not _fields_fit(fields, header.space["dimension"]):
        raise ValueError(f"{where}: {file} is damaged; {_remedy(path)}.")
    state = _State(**fields | {"header": header})
    if fields["header"] != {"kind": header.kind, "space": header.space}:
        raise ValueError(
            f"{where}: the index of {path} was made for specifications of another kind or space "
            f"than dock.json names; {_remedy(path)}."
        )
    return state


def _fields_fit(fields: dict[str, Any], dimension: int) -> bool:
    def is_count(name, least):
        return type(fields[name]) is int and fields[name] >= least

    return (
        fields.keys() == set(_State._fields)
        and all(is_count(name, 1) for name in ("landmarks", "points", "width"))
        # Landmarks are read whole; a row of points is the size of a specification's file.
        and fields["landmarks"] * (fields["width"] + dimension) <= MAX_LANDMARKS
        and fields["points"] * (dimension + 2) <= MAX_POINTS
        and is_count("rows", 0)
        and all(fields[name] is None or is_count(name, 0) for name in ("among", "mark"))
        and all(isinstance(fields[name], str) for name in ("files", "sha256", "dtype"))
        and re.fullmatch("[0-9a-f]{8}", fields["files"]) is not None
        and fields["dtype"] in CODES
    )


def _commit(path: StrPath, state: _State) -> None:
    header = {"kind": state.header.kind, "space": state.header.space}
    fields = state._asdict() | {"schema": SCHEMA, "header": header}
    text = dump_json(fields, where="index", indent=1)
    store.write_file(_json_file(path), text.encode(), where="index")


def _new_files(
    path: StrPath,
    landmarks: Landmarks,
    points: int,
    dtype: str,
    among: int | None,
    *,
    where: str,
) -> _State:
    header = store.read_header(path)
    arrays = {
        "points": np.ascontiguousarray(landmarks.points, "<f4"),
        "basis": np.ascontiguousarray(landmarks.basis, "<f8"),
        "values": np.ascontiguousarray(landmarks.values, "<f8"),
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    count, width = (*shapes["basis"], 0, 0)[:2]
    wanted = _shapes(count, width, header)
    if shapes != wanted or not count * width:
        raise ValueError(
            f"{where}: got landmarks of shapes {shapes}; want {wanted} for some J and s."
        )
    if dtype not in CODES or points < 1:
        raise ValueError(
            f"{where}: got dtype={dtype!r} and points={points}; want one of {', '.join(CODES)} and "
            "at least one point."
        )
    data = safetensors.numpy.save(arrays)
    state = _State(
        header=header,
        files=secrets.token_hex(4),
        landmarks=count,
        sha256=hashlib.sha256(data).hexdigest(),
        among=among,
        points=points,
        dtype=dtype,
        width=width,
        rows=0,
        mark=None,
    )
    store.write_file(_file(path, state, "landmarks"), data, where=where)
    for name in ("codes", "rows", "points"):
        _file(path, state, name).touch()
    return state


def _shapes(count: int, width: int, header: Header) -> dict[str, tuple[int, ...]]:
    return {
        "points": (count, header.space["dimension"]),
        "basis": (count, width),
        "values": (count,),
    }


def _read_landmarks(path: StrPath, state: _State, *, where: str) -> Landmarks:
    file = _file(path, state, "landmarks")
    shapes = _shapes(state.landmarks, state.width, state.header)
    largest = 8 * sum(map(math.prod, shapes.values())) + 4096
    data = store.read_bytes(file, largest, where=where)
    if hashlib.sha256(data).hexdigest() != state.sha256:
        raise ValueError(f"{where}: {file} does not match its checksum; {_remedy(path)}.")
    try:
        _, stored = read_stored(data, len(data))
    except ValueError as error:
        raise ValueError(f"{where}: {file} is damaged ({error}); {_remedy(path)}.") from error
    types = {"points": "F32", "basis": "F64", "values": "F64"}
    found = {name: (array.dtype, array.shape) for name, array in stored.items()}
    arrays = (
        safetensors.numpy.load(data) if found == {n: (types[n], shapes[n]) for n in types} else {}
    )
    if not arrays or not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(
            f"{where}: {file} holds other arrays than {shapes}, all finite; {_remedy(path)}."
        )
    return Landmarks(**arrays)


def _open_all(path: StrPath, state: _State, *, where: str) -> list[np.ndarray]:
    """The codes, numbers and points of all rows, memory-mapped."""
    return [_open(path, state, name, where=where) for name in ("codes", "rows", "points")]


def _open(path: StrPath, state: _State, name: str, *, where: str) -> np.ndarray:
    """The rows of a file that the state counts, memory-mapped."""
    file, row = _file(path, state, name), _row(state, name)
    # A named pipe would block the reader for ever.
    descriptor = _descriptor(file, os.O_RDONLY | os.O_NONBLOCK, where=where)
    status = os.fstat(descriptor)
    # A folder cannot be opened as a file.
    if stat.S_ISDIR(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{where}: {file} is a folder; {_remedy(path)}.")
    with open(descriptor, "rb") as stream:
        size = status.st_size
        if size < state.rows * row.itemsize:
            raise ValueError(
                f"{where}: {file} has {size} bytes; want a plain file of at least "
                f"{state.rows * row.itemsize} for {state.rows} rows; {_remedy(path)}."
            )
        if not state.rows:  # no bytes cannot be mapped
            return np.zeros(0, row)
        return np.memmap(stream, row, "r", shape=(state.rows,))


@contextmanager
def _writable(path: StrPath, state: _State, name: str, *, where: str) -> Iterator[Any]:
    """A file to write to in its place; at the end it is flushed to the disk."""
    file = _file(path, state, name)
    with (
        store.explained("to the index", "it is as it was", file, where=where),
        open(_descriptor(file, os.O_RDWR, where=where), "r+b") as stream,
    ):
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _descriptor(file: Path, flags: int, *, where: str) -> int:
    store.refuse_link(file, where=where)
    try:
        return os.open(file, flags | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: there is no {file}; {_remedy(file.parents[1])}."
        ) from error
