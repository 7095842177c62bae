"""A dock on disk: one folder a learnware, one kind and space of specification for all of them.

    DOCK/dock.json                          a header: the kind and space that every one obeys
    DOCK/learnwares/ID/card.json            semantic specification: name, domain, description, ...
    DOCK/learnwares/ID/KIND.safetensors     statistical specification: z, beta and their header
    DOCK/learnwares/ID/adapter/             the model, where it has one: a LoRA adapter, as PEFT's
    DOCK/.moving/                           what is on its way in or out

A learnware is written in DOCK/.moving and renamed into its place, so a killed writer leaves the old
learnware or the new one. Writers take turns on DOCK/.lock, and list no learnwares: what they cost
does not depend on how many there are. Readers take no lock, so that a dock on read-only media
serves: what they return is one version of a learnware, never parts of two. Reading executes
nothing.

A specification of any kind is a mean embedding, `RKME(z, beta)`: an RKME of embedded texts
("rkme"), one row of z a random seed for parameter vectors ("pave"), a single row for a gradient or
a sketch. What the rows are and which kernel compares them stands in the space.
"""

import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import safetensors
import safetensors.numpy

from learnware_jax.specification.header import (
    SCHEMA,
    Header,
    check_same_space,
    dump_json,
    from_json,
    parse_json,
    printable,
    to_json,
)
from learnware_jax.specification.rkme import RKME, check_rkme
from learnware_jax.specification.tensors import read_stored

STORED = {"z": ("F32", np.dtype("<f4")), "beta": ("F64", np.dtype("<f8"))}
MAX_JSON_BYTES = 2**20
MAX_SPEC_BYTES = 2**26  # 4,000 points of 4,096 dimensions
MAX_ADAPTER_BYTES = 2**30  # rank 64 on every map of an 8B model in bfloat16: 0.3 GB
ADAPTER_FILES = {  # and how large they may be
    "adapter_config.json": MAX_JSON_BYTES,
    "adapter_model.safetensors": MAX_ADAPTER_BYTES,
}
LOCK_SECONDS = 30.0
UNCHANGED = "what was there before is unchanged"
# Folders on their way in, replaced, and on their way out, in DOCK/.moving. Earlier versions left
# them among the learnwares; no id can be such a name.
NEW, OLD, GONE = ".new-", ".old-", ".gone-"

StrPath = str | os.PathLike[str]


class Learnware(NamedTuple):
    """One entry of a dock: its id, semantic specification, and statistical specification."""

    id: str
    card: dict[str, Any]
    spec: RKME
    header: Header


class Problem(NamedTuple):
    """A learnware that cannot be used, and why."""

    id: str
    reason: str


class Change(NamedTuple):
    """The marks of a dock (see `mark`) just before and just after a learnware came or went."""

    before: int
    after: int


def create_dock(path: StrPath, space: dict[str, Any], kind: str = "rkme") -> None:
    """Make an empty dock whose specifications are all of one `kind` in one `space` (see `Header`).

    `kind` is a plain word, as it names files. `space["dimension"]` is the length of a row of z.
    FileExistsError if a dock is there already.
    """
    text = to_json(Header(SCHEMA, kind, space, {}))
    _check_kind(kind, where="create_dock")
    _dimension(space, where="create_dock")
    root = Path(path)
    try:
        with explained(f"to {root}", "nothing was made", where="create_dock"):
            _learnwares(root).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"create_dock: a file is in the way of the folder {_learnwares(root)}; give another "
            "path."
        ) from error
    with _writing(root, where="create_dock"):
        if (root / "dock.json").exists():
            raise FileExistsError(
                f"create_dock: there is a dock at {root} already; use it, or give another path."
            )
        write_file(root / "dock.json", text.encode(), where="create_dock")


def read_header(path: StrPath) -> Header:
    """The dock's header: the kind and space of every specification in it, about nothing."""
    return _dock_header(path, where="read_header")


def read_space(path: StrPath) -> dict[str, Any]:
    """The space that every specification in the dock obeys."""
    return _dock_header(path, where="read_space").space


def add(
    path: StrPath,
    learnware: Learnware,
    *,
    adapter: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> Change:
    """Put a learnware into the dock, durably: when this returns, it is on the disk.

    `adapter` holds the two files of PEFT by name; their hashes are put on the card, as "adapter".
    IncompatibleSpecifications if it is of another kind than the dock's or lives in another space,
    FileExistsError if the id is taken and `replace` is not set. After a failure the dock holds the
    old learnware or the new one, whole.
    """
    id, card, spec, header = learnware
    check_id(id, where="add")
    if not isinstance(card, dict):
        raise TypeError(f"add: the card of {id!r} is a {type(card).__name__}; want a dict.")
    _check_domain(card, where=f"add: the card of {id!r}")
    if adapter is not None:
        if set(adapter) != set(ADAPTER_FILES):
            raise ValueError(
                f"add: the adapter of {id!r} has the files {', '.join(sorted(adapter))}; want "
                f"{' and '.join(ADAPTER_FILES)}."
            )
        for name, limit in ADAPTER_FILES.items():
            if len(adapter[name]) > limit:
                raise ValueError(
                    f"add: {name} of {id!r} has {len(adapter[name])} bytes; want at most {limit}."
                )
        card = card | {"adapter": {name: _sha256(adapter[name]) for name in ADAPTER_FILES}}
    elif "adapter" in card:
        raise ValueError(
            f"add: the card of {id!r} speaks of an adapter, and none is given; give the files (see "
            "read_adapter), or take 'adapter' off the card."
        )
    card_bytes = dump_json(card, where=f"add: the card of {id!r}", indent=2).encode()
    if len(card_bytes) > MAX_JSON_BYTES:
        raise ValueError(
            f"add: the card of {id!r} takes {len(card_bytes)} bytes; shorten it to at most "
            f"{MAX_JSON_BYTES}."
        )
    check_same_space(
        header, _dock_header(path, where="add"), what=f"add: {id!r} and the dock {path}"
    )
    spec_bytes = _encode(spec, header, where=f"add: {id!r}")
    with _writing(path, where="add") as (learnwares, moving):
        home = learnwares / id
        taken = os.path.lexists(home)
        if taken and not replace:
            raise FileExistsError(
                f"add: {path} has a learnware {id!r} already; use another id, or replace=True."
            )
        new = moving / f"{NEW}{id}"
        new.mkdir()
        if adapter is not None:
            (new / "adapter").mkdir()
            for name in ADAPTER_FILES:
                _write_new(new / "adapter" / name, adapter[name], where="add")
            sync(new / "adapter")
        _write_new(new / "card.json", card_bytes, where="add")
        _write_new(new / spec_name(header.kind), spec_bytes, where="add")
        sync(new)
        before = await_mark(path, moving)
        if taken:
            home.rename(moving / f"{OLD}{id}")
        new.rename(home)
        _leave_mark(learnwares, before)
        sync(learnwares)
        return Change(before, mark(path))


def remove(path: StrPath, id: str) -> Change:
    """Take a learnware out of the dock and delete its files. FileNotFoundError if it is absent."""
    check_id(id, where="remove")
    _dock_header(path, where="remove")
    with _writing(path, where="remove") as (learnwares, moving):
        if not os.path.lexists(learnwares / id):
            raise _missing(path, id, where="remove")
        before = await_mark(path, moving)
        (learnwares / id).rename(moving / f"{GONE}{id}")
        _leave_mark(learnwares, before)
        sync(learnwares)
        return Change(before, mark(path))


def mark(path: StrPath) -> int:
    """A number that is greater after every `add` and `remove`, by whichever process.

    It is the time at which the names in DOCK/learnwares last changed (ns), or later where the clock
    was set back, so folders put there by other means are seen too, and a copy that keeps times
    keeps it.
    """
    return _learnwares(path).stat().st_mtime_ns


def stamps(path: StrPath, ids: Iterable[str]) -> np.ndarray:
    """A number for each of these learnwares, uint64, that tells whether its specification is still
    the file it was: hashed from inode, time of writing and size.

    A copy of the dock has other stamps. Zero for a learnware that is not in its place. Read before
    the specification, an old stamp may stand for a newer specification, never the other way round.
    """
    name = spec_name(_dock_header(path, where="stamps").kind)
    root = os.fspath(_learnwares(path))

    def one(id):
        try:
            status = os.lstat(f"{root}/{id}/{name}")
        except OSError:
            return 0
        what = f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"
        return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "little")

    return np.fromiter(map(one, ids), np.uint64)


def list_ids(path: StrPath) -> list[str]:
    """The ids in the dock, sorted, whether or not their files are sound (see `check`)."""
    _dock_header(path, where="list_ids")
    return _entries(path)


def read_learnware(path: StrPath, id: str) -> Learnware:
    """One learnware. FileNotFoundError if it is absent, ValueError or OSError if it is unsound."""
    return _read(path, id, _dock_header(path, where="read_learnware"), where="read_learnware")


def card_of(path: StrPath, id: str) -> dict[str, Any]:
    """The semantic specification of one learnware. Errors are those of `read_learnware`."""

    def read(folder):
        return read_card(folder / "card.json", links=False, where="card_of")

    _dock_header(path, where="card_of")
    return read_whole(path, id, read, where="card_of")


def read_adapter(path: StrPath, id: str) -> dict[str, bytes]:
    """The files of a learnware's adapter by name, as `add` was given them.

    FileNotFoundError if the learnware is absent or has no adapter, ValueError if a file does not
    match its hash on the card.
    """

    def read(folder):
        card = read_card(folder / "card.json", links=False, where="read_adapter")
        hashes = card.get("adapter")
        if hashes is None:
            raise FileNotFoundError(
                f"read_adapter: {id!r} of {path} has a specification and no adapter."
            )
        home = folder / "adapter"
        refuse_link(home, where="read_adapter")
        files = read_peft(home, links=False, where="read_adapter")
        for name, data in files.items():
            if not isinstance(hashes, dict) or _sha256(data) != hashes.get(name):
                raise ValueError(
                    f"read_adapter: {home / name} does not match its hash on the card: it was "
                    "damaged or changed by hand; restore it or make it again."
                )
        return files

    _dock_header(path, where="read_adapter")
    return read_whole(path, id, read, where="read_adapter")


def read_peft(folder: StrPath, *, links: bool = True, where: str = "read_peft") -> dict[str, bytes]:
    """The two files of an adapter by name, as PEFT leaves them in a folder and `add` takes them.

    FileNotFoundError if one is absent, ValueError if one is too large, no plain file or, without
    `links`, a symbolic link.
    """
    return {
        name: read_bytes(Path(folder) / name, limit, links=links, where=where)
        for name, limit in ADAPTER_FILES.items()
    }


def read_card(file: StrPath, *, links: bool = True, where: str = "read_card") -> dict[str, Any]:
    """The semantic specification in a JSON file.

    FileNotFoundError if it is absent, ValueError if it is no JSON object of at most MAX_JSON_BYTES,
    names a domain that is no string or, without `links`, is a symbolic link.
    """
    data = read_bytes(Path(file), MAX_JSON_BYTES, links=links, where=where)
    return parse_card(data, where=f"{where}: {file}")


def parse_card(data: bytes, *, where: str) -> dict[str, Any]:
    """The semantic specification in the bytes of a file; ValueError as in `read_card`."""
    card = parse_json(data, where=where)
    if not isinstance(card, dict):
        raise ValueError(f"{where} holds a {type(card).__name__}; want a JSON object.")
    _check_domain(card, where=where)
    return card


def load(path: StrPath) -> list[Learnware]:
    """Every sound learnware of the dock, sorted by id. The others are named in warnings."""
    learnwares = []
    for found in read_each(path, where="load"):
        if isinstance(found, Problem):
            warnings.warn(f"load: skipped {found.id!r} of {path}: {found.reason}", stacklevel=2)
        else:
            learnwares.append(found)
    return learnwares


def read_each(
    path: StrPath, ids: Iterable[str] | None = None, *, where: str = "read_each"
) -> Iterator[Learnware | Problem]:
    """These learnwares (default: all, sorted by id), each read when it is asked for; a problem in
    place of one that is absent or unsound."""
    dock = _dock_header(path, where=where)
    for id in _entries(path) if ids is None else ids:
        try:
            yield _read(path, id, dock, where=where)
        except (OSError, ValueError) as error:
            yield Problem(id, str(error))


def check(path: StrPath) -> list[Problem]:
    """The learnwares that `load` skips, or whose adapters are damaged, and why; sorted by id."""
    problems = []
    for found in read_each(path, where="check"):
        if isinstance(found, Learnware) and "adapter" in found.card:
            try:
                read_adapter(path, found.id)
            except (OSError, ValueError) as error:
                found = Problem(found.id, str(error))
        if isinstance(found, Problem):
            problems.append(found)
    return problems


def write_spec(file: StrPath, spec: RKME, header: Header) -> None:
    """Write one specification of any kind: z as float32, beta as float64, header and checksum.

    Casts that lose digits are refused. A file of that name is replaced whole or not at all.
    """
    write_file(Path(file), _encode(spec, header, where="write_spec"), where="write_spec")


def read_spec(file: StrPath) -> tuple[RKME, Header]:
    """The specification that `write_spec` wrote, bit for bit, as NumPy arrays.

    Sizes and shapes are compared with the header before arrays are read, contents with the
    checksum after. ValueError says what does not fit.
    """
    return _decode(Path(file), links=True, where="read_spec")


def _read(path: StrPath, id: str, dock: Header, *, where: str) -> Learnware:
    def read(folder):
        card = read_card(folder / "card.json", links=False, where=where)
        return card, *_decode(folder / spec_name(dock.kind), links=False, where=where)

    card, spec, header = read_whole(path, id, read, where=where)
    check_same_space(header, dock, what=f"{where}: {id!r} and the dock {path}")
    return Learnware(id, card, spec, header)


def read_whole(path: StrPath, id: str, read: Callable[[Path], Any], *, where: str) -> Any:
    """What `read` returns for the folder of a learnware, all of it from one version.

    Errors are those of `read_learnware`, and what `read` raises.
    """
    check_id(id, where=where)
    while True:
        folder, held = _open_folder(path, id, where=where)
        problem = found = None
        try:
            found = read(folder)
        except (OSError, ValueError) as error:
            problem = error
        finally:
            swapped = not _is_at(held, folder)
            os.close(held)
        # A writer may have put another folder there between two files: read them again.
        if not swapped:
            if problem is not None:
                raise problem
            return found


def _open_folder(path: StrPath, id: str, *, where: str) -> tuple[Path, int]:
    """The folder of a learnware, and a descriptor that keeps its inode from being used again."""
    home = _learnwares(path) / id
    aside = [folder / f"{OLD}{id}" for folder in (_moving(path), _learnwares(path))]
    # Home comes again last: a replacement may arrive between the first looks.
    for folder in (home, *aside, home):
        try:
            return folder, os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(
                f"{where}: {folder} is not a folder that can be read ({error.strerror}); a dock "
                "holds no links. Copy the learnware there, or remove it."
            ) from error
    raise _missing(path, id, where=where)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except FileNotFoundError:
        return False


def _missing(path: StrPath, id: str, *, where: str) -> FileNotFoundError:
    known = printable(", ".join(_entries(path)[:10]), 1100) or "none"
    return FileNotFoundError(f"{where}: {path} has no learnware {id!r}; its first ids: {known}.")


def _entries(path: StrPath) -> list[str]:
    learnwares = _learnwares(path)
    before, names = mark(path), set(os.listdir(learnwares))
    with suppress(FileNotFoundError):
        names.update(name for name in os.listdir(_moving(path)) if name.startswith(OLD))
    if mark(path) != before:
        # A replacement may have arrived between the two looks, and what it replaced be gone.
        names.update(os.listdir(learnwares))
    names.update([name.removeprefix(OLD) for name in names if name.startswith(OLD)])
    return sorted(name for name in names if not name.startswith("."))


def _moving(path: StrPath) -> Path:
    return Path(path) / ".moving"


def _learnwares(path: StrPath) -> Path:
    return Path(path) / "learnwares"


def _dock_header(path: StrPath, *, where: str) -> Header:
    root = Path(path)
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{where}: {root} is a file; give the path of a dock's folder.")
    file = root / "dock.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{where}: no dock at {root} (it has no dock.json); make one with create_dock."
        )
    for inside in (file, _learnwares(path), _moving(path), root / ".lock"):
        refuse_link(inside, where=where)
    if not _learnwares(path).is_dir():
        raise NotADirectoryError(f"{where}: {_learnwares(path)} is not a folder; restore it.")
    header = from_json(read_bytes(file, MAX_JSON_BYTES, where=where), where=f"{where}: {file}")
    _check_kind(header.kind, where=f"{where}: {file}")
    _dimension(header.space, where=f"{where}: {file}")
    return header


def _dimension(space: dict[str, Any], *, where: str) -> int:
    dimension = space.get("dimension")
    if type(dimension) is not int or dimension < 1:
        raise ValueError(
            f"{where}: dimension is {dimension!r:.100}; want the length of a row of z, 1 or more."
        )
    return dimension


def _check_kind(kind: Any, *, where: str) -> None:
    """ValueError unless `kind` is plain: it names a file, and comes from strangers."""
    if not isinstance(kind, str) or not re.fullmatch("[a-z0-9_]{1,50}", kind):
        raise ValueError(
            f"{where}: kind is {kind!r:.100}; want at most 50 lower-case letters, digits and '_'."
        )


def spec_name(kind: str) -> str:
    """The name of a specification's file."""
    return f"{kind}.safetensors"


def check_id(id: str, *, where: str) -> None:
    """ValueError unless `id` is plain: it names a folder, and comes from strangers."""
    plain = isinstance(id, str) and re.fullmatch("[a-z0-9_-][a-z0-9_.-]{0,99}", id)
    if not plain or ".." in id or id == "none":  # a selection says "none" when nothing fits
        raise ValueError(
            f"{where}: {id!r:.120} is not an id; use at most 100 lower-case letters, digits, '-', "
            "'_' and '.', not starting with '.', without '..'; not 'none'."
        )


def _check_domain(card: dict[str, Any], *, where: str) -> None:
    if not isinstance(card.get("domain", ""), str):
        raise ValueError(f"{where}: its domain is {card['domain']!r:.100}; want a string.")


def refuse_link(path: Path, *, where: str) -> None:
    """ValueError if `path` is a symbolic link: it may lead anywhere."""
    if path.is_symlink():
        raise ValueError(
            f"{where}: {path} is a symbolic link; a dock holds none. Put a copy in its place."
        )


def read_bytes(file: Path, limit: int, *, links: bool = False, where: str) -> bytes:
    """A plain file of at most `limit` bytes; a symbolic link to one with `links` alone.

    FileNotFoundError or ValueError if it is none. What is checked is what is read: the file is
    opened once.
    """
    if not links:
        refuse_link(file, where=where)
    # A named pipe would block the reader for ever.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(file, flags)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: there is no {file}; restore it.") from error
    except OSError as error:
        raise ValueError(f"{where}: {file} cannot be read ({error.strerror}).") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{where}: {file} is not a plain file.")
        if status.st_size > limit:
            raise ValueError(f"{where}: {file} has {status.st_size} bytes; want at most {limit}.")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            data = stream.read(status.st_size + 1)
    finally:
        os.close(descriptor)
    if len(data) != status.st_size:
        raise ValueError(f"{where}: {file} changed while it was read; read it again.")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(arrays: dict[str, np.ndarray], header: Header) -> str:
    # The header fixes both shapes, so equal bytes are equal arrays.
    parts = [to_json(header).encode(), arrays["z"].tobytes(), arrays["beta"].tobytes()]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def _check_header(header: Header, shapes: dict[str, list[int]], *, where: str) -> None:
    _check_kind(header.kind, where=where)
    points = header.about.get("points")
    wanted = {"z": [points, _dimension(header.space, where=where)], "beta": [points]}
    if type(points) is not int or shapes != wanted:
        raise ValueError(
            f"{where}: the header says points = {points!r} and dimension = "
            f"{header.space['dimension']}, but the arrays are z {tuple(shapes['z'])} and beta "
            f"{tuple(shapes['beta'])}; want z (points, dimension) and beta (points,)."
        )
    n, residual = header.about.get("n"), header.about.get("residual")
    if "privacy" in header.about:
        _check_privacy(header.about["privacy"], n, residual, where=where)
        return
    if type(n) is not int or n < 1 or type(residual) not in (int, float):
        raise ValueError(
            f"{where}: the header says n = {n!r} and residual = {residual!r}; want the number of "
            "independent samples that the embedding averages over (texts for an RKME, random seeds "
            "for a parameter vector; an integer, at least 1) and the squared MMD to all of them."
        )


def _check_privacy(said: Any, n: Any, residual: Any, *, where: str) -> None:
    fields = said if isinstance(said, dict) else {}
    ranges = {"dimension": 2**24, "noise": 1e9, "epsilon": 1e9, "delta": 1.0}

    def inside(name, most):
        value = fields.get(name)
        return type(value) in (int, float) and 0 < value <= most

    right = all(inside(name, most) for name, most in ranges.items())
    right &= type(fields.get("dimension")) is int and isinstance(fields.get("mechanism"), str)
    if not right or n is not None or residual is not None:
        raise ValueError(
            f"{where}: the header says privacy = {said!r}, n = {n!r} and residual = {residual!r}; "
            "want the mechanism and its dimension, noise, epsilon and delta, all above 0, and "
            "neither n nor residual, which would tell of the rows."
        )


def _encode(spec: RKME, header: Header, *, where: str) -> bytes:
    check_rkme(spec, where=where)
    arrays = {}
    for name, array in (("z", np.asarray(spec.z)), ("beta", np.asarray(spec.beta))):
        dtype = STORED[name][1]
        if not np.can_cast(array.dtype, dtype, "safe"):
            raise TypeError(
                f"{where}: {name} is {array.dtype} and is stored as {dtype.name}; round it "
                f"yourself with {name}.astype({dtype.name!r}) before anything is computed from it."
            )
        arrays[name] = np.ascontiguousarray(array, dtype)
    _check_header(header, {name: list(a.shape) for name, a in arrays.items()}, where=where)
    record = header._asdict() | {"sha256": _digest(arrays, header)}
    # One metadata entry: safetensors writes several in random order, and equal specifications
    # would differ as files.
    data = safetensors.numpy.save(arrays, {"header": dump_json(record, where=where)})
    if len(data) > MAX_SPEC_BYTES:
        raise ValueError(
            f"{where}: the specification takes {len(data)} bytes; want at most {MAX_SPEC_BYTES}. "
            "Reduce it to fewer points."
        )
    return data


def _decode(file: Path, *, links: bool, where: str) -> tuple[RKME, Header]:
    data = read_bytes(file, MAX_SPEC_BYTES, links=links, where=where)
    return parse_spec(data, where=f"{where}: {file}")


def parse_spec(data: bytes, *, where: str) -> tuple[RKME, Header]:
    """The specification in the bytes of a file; ValueError as in `read_spec`."""
    try:
        metadata, stored = read_stored(data, len(data))
    except ValueError as error:
        raise ValueError(
            f"{where} is not a whole safetensors file ({error}); restore it or make it again."
        ) from error
    record = parse_json(metadata.get("header", "{}"), where=where)
    digest = record.pop("sha256", None) if isinstance(record, dict) else None
    header = from_json(dump_json(record, where=where), where=where)
    if stored.keys() != STORED.keys():
        held = printable(", ".join(sorted(stored)))
        raise ValueError(f"{where} holds the arrays {held}; want beta, z.")
    for name, (code, dtype) in STORED.items():
        if stored[name].dtype != code:
            raise ValueError(
                f"{where}: {name} is stored as {stored[name].dtype}; want {code} ({dtype.name})."
            )
    _check_header(header, {name: list(s.shape) for name, s in stored.items()}, where=where)
    arrays = {
        name: np.frombuffer(data[s.begin : s.end], STORED[name][1]).reshape(s.shape)
        for name, s in stored.items()
    }
    if digest != _digest(arrays, header):
        raise ValueError(
            f"{where} does not match its checksum: it was damaged or changed by hand; restore it "
            "or make it again."
        )
    return check_rkme(RKME(arrays["z"], arrays["beta"]), where=where), header


@contextmanager
def locked(
    lock_file: StrPath,
    *,
    where: str,
    doing: str,
    otherwise: str = "end it, and try again",
    seconds: float = 0.0,
) -> Iterator[None]:
    """Hold a lock against other processes; that of a process which is dead does not hold.

    TimeoutError, which says what the other one is `doing`, after so many seconds.
    """
    lock = filelock.FileLock(lock_file, timeout=seconds)
    try:
        with explained(f"to {Path(lock_file).parent}", "nothing was changed", where=where):
            Path(lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except filelock.Timeout as error:
        raise TimeoutError(
            f"{where}: another process {doing}; wait for it, or {otherwise}. On Linux "
            f"`fuser {lock_file}` names it."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(path: StrPath, *, where: str) -> Iterator[tuple[Path, Path]]:
    """The folders of learnwares and of what is on its way, while no other process writes; what was
    left half done is settled."""
    doing = f"has been writing to {path} for {LOCK_SECONDS:g} s"
    whole = "every learnware is the old one or the new one, whole"
    with (
        locked(Path(path) / ".lock", where=where, doing=doing, seconds=LOCK_SECONDS),
        explained(f"to {path}", whole, where=where),
    ):
        _settle(path)
        try:
            yield _learnwares(path), _moving(path)
        finally:
            # Readers do not mind what fails to go; the next writer tries again and reports it.
            with suppress(OSError):
                _settle(path)


def _settle(path: StrPath) -> None:
    """Put back a learnware whose replacement did not arrive, and delete what else was left."""
    learnwares, moving = _learnwares(path), _moving(path)
    if not moving.exists():
        # The first writer since an earlier version, which moved folders among the learnwares.
        _settle_in(learnwares, learnwares)
        sync(learnwares)
        moving.mkdir()
    _settle_in(moving, learnwares)
    sweep(Path(path) / "dock.json")


def _settle_in(folder: Path, learnwares: Path) -> None:
    for name in os.listdir(folder):
        entry, home = folder / name, learnwares / name.removeprefix(OLD)
        if name.startswith(OLD) and not os.path.lexists(home):
            entry.rename(home)
            sync(learnwares)
        elif name.startswith((NEW, OLD, GONE)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def await_mark(path: StrPath, beside: Path) -> int:
    """The mark of the dock, once the clock of the disk has left it: the next change makes another.

    Disks count time in steps of up to some milliseconds. `beside` is a folder on the same disk.
    """
    before = mark(path)
    os.utime(beside)
    while beside.stat().st_mtime_ns == before:
        time.sleep(0.001)
        os.utime(beside)
    return before


def _leave_mark(learnwares: Path, before: int) -> None:
    """Make the mark after a change greater than `before`: a clock that was set back would come by
    old ones again."""
    step = 1
    with suppress(PermissionError):  # only the owner of a folder may set its times
        while learnwares.stat().st_mtime_ns <= before:
            # Disks may count time in steps of up to 2 s.
            os.utime(learnwares, ns=(before + step, before + step))
            step *= 10


def write_file(file: Path, data: bytes, *, where: str) -> None:
    """Write under a temporary name, flush to the disk, rename."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with explained(f"{len(data)} bytes", UNCHANGED, file, where=where):
            _flush(temporary, data)
            temporary.replace(file)
    except BaseException:
        with suppress(OSError):  # the first error says more
            temporary.unlink()
        raise
    with explained(f"{len(data)} bytes for good", "they may be lost", file, where=where):
        sync(file.parent)


def sweep(file: Path) -> None:
    """Delete what killed calls of `write_file` have left beside this file. For whoever has locked
    it: the temporary file of another writer would go too."""
    for stray in file.parent.glob(f".{glob.escape(file.name)}.*"):
        stray.unlink()


def _write_new(file: Path, data: bytes, *, where: str) -> None:
    """Write to a folder that nobody reads yet; its names are not made durable."""
    with explained(f"{len(data)} bytes", UNCHANGED, file, where=where):
        _flush(file, data)


def _flush(file: Path, data: bytes) -> None:
    with open(file, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def explained(what: str, state: str, file: StrPath | None = None, *, where: str) -> Iterator[None]:
    """Let an error of the system say what could not be written, the `state` that this leaves, and
    what to do; `file` stands for the one that the system names. Explained errors stay as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error.__cause__, OSError):
            raise
        raise OSError(
            error.errno,
            f"{where}: could not write {what} ({error.strerror}); {state}. Free space, get leave "
            "to write there, or choose another place",
            error.filename if file is None else os.fspath(file),
        ) from error


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
