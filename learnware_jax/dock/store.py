"""A dock on disk: one folder a learnware, one kind and space of specification for all of them.

    DOCK/dock.json                          a header: the kind and space that every one obeys
    DOCK/learnwares/ID/card.json            semantic specification: name, domain, description, ...
    DOCK/learnwares/ID/KIND.safetensors     statistical specification: z, beta and their header
    DOCK/learnwares/ID/adapter/             the model, where it has one: a LoRA adapter, as PEFT's

A learnware is written beside its place and renamed into it, so a killed writer leaves the old
learnware or the new one. Writers take turns on DOCK/.lock. Readers take no lock, so that a dock on
read-only media serves: what they return is one version of a learnware, never parts of two. Reading
executes nothing.

A specification of any kind is a mean embedding, `RKME(z, beta)`: an RKME of embedded texts
("rkme"), one row of z a random seed for parameter vectors ("pave"), a single row for a gradient or
a sketch. What the rows are and which kernel compares them stands in the space.
"""

import hashlib
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
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
    to_json,
)
from learnware_jax.specification.rkme import RKME, check_rkme

STORED = {"z": ("F32", np.dtype("<f4")), "beta": ("F64", np.dtype("<f8"))}
MAX_JSON_BYTES = 2**20
MAX_SPEC_BYTES = 2**26  # 4,000 points of 4,096 dimensions
MAX_ADAPTER_BYTES = 2**30  # rank 64 on every map of an 8B model in bfloat16: 0.3 GB
ADAPTER_FILES = {  # and how large they may be
    "adapter_config.json": MAX_JSON_BYTES,
    "adapter_model.safetensors": MAX_ADAPTER_BYTES,
}
LOCK_SECONDS = 30.0
# Names that no learnware can have, for folders on their way in, replaced, and on their way out.
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
) -> None:
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
    with _writing(path, where="add") as learnwares:
        home = learnwares / id
        taken = os.path.lexists(home)
        if taken and not replace:
            raise FileExistsError(
                f"add: {path} has a learnware {id!r} already; use another id, or replace=True."
            )
        new = learnwares / f"{NEW}{id}"
        new.mkdir()
        write_file(new / "card.json", card_bytes, where="add")
        write_file(new / _spec_name(header.kind), spec_bytes, where="add")
        if adapter is not None:
            (new / "adapter").mkdir()
            for name in ADAPTER_FILES:
                write_file(new / "adapter" / name, adapter[name], where="add")
        if taken:
            home.rename(learnwares / f"{OLD}{id}")
        new.rename(home)
        _sync(learnwares)


def remove(path: StrPath, id: str) -> None:
    """Take a learnware out of the dock and delete its files."""
    check_id(id, where="remove")
    _dock_header(path, where="remove")
    with _writing(path, where="remove") as learnwares:
        if not os.path.lexists(learnwares / id):
            raise _missing(path, id, where="remove")
        (learnwares / id).rename(learnwares / f"{GONE}{id}")
        _sync(learnwares)


def list_ids(path: StrPath) -> list[str]:
    """The ids in the dock, sorted, whether or not their files are sound (see `check`)."""
    _dock_header(path, where="list_ids")
    return _entries(path)


def read_learnware(path: StrPath, id: str) -> Learnware:
    """One learnware. FileNotFoundError if it is absent, ValueError or OSError if it is unsound."""
    return _read(path, id, _dock_header(path, where="read_learnware"), where="read_learnware")


def read_adapter(path: StrPath, id: str) -> dict[str, bytes]:
    """The files of a learnware's adapter by name, as `add` was given them.

    FileNotFoundError if the learnware is absent or has no adapter, ValueError if a file does not
    match its hash on the card.
    """

    def read(folder):
        _refuse_link(folder / "card.json", where="read_adapter")
        hashes = read_card(folder / "card.json", where="read_adapter").get("adapter")
        if hashes is None:
            raise FileNotFoundError(
                f"read_adapter: {id!r} of {path} has a specification and no adapter."
            )
        home = folder / "adapter"
        for link in (home, *(home / name for name in ADAPTER_FILES)):
            _refuse_link(link, where="read_adapter")
        files = read_peft(home, where="read_adapter")
        for name, data in files.items():
            if not isinstance(hashes, dict) or _sha256(data) != hashes.get(name):
                raise ValueError(
                    f"read_adapter: {home / name} does not match its hash on the card: it was "
                    "damaged or changed by hand; restore it or make it again."
                )
        return files

    _dock_header(path, where="read_adapter")
    return _read_whole(path, id, read, where="read_adapter")


def read_peft(folder: StrPath, *, where: str = "read_peft") -> dict[str, bytes]:
    """The two files of an adapter by name, as PEFT leaves them in a folder and `add` takes them.

    FileNotFoundError if one is absent, ValueError if one is too large or no plain file.
    """
    return {
        name: _read_bytes(Path(folder) / name, limit, where=where)
        for name, limit in ADAPTER_FILES.items()
    }


def read_card(file: StrPath, *, where: str = "read_card") -> dict[str, Any]:
    """The semantic specification in a JSON file.

    FileNotFoundError if it is absent, ValueError if it is no JSON object of at most MAX_JSON_BYTES
    or names a domain that is no string.
    """
    file = Path(file)
    card = parse_json(_read_bytes(file, MAX_JSON_BYTES, where=where), where=f"{where}: {file}")
    if not isinstance(card, dict):
        raise ValueError(f"{where}: {file} holds a {type(card).__name__}; want a JSON object.")
    _check_domain(card, where=f"{where}: {file}")
    return card


def load(path: StrPath) -> list[Learnware]:
    """Every sound learnware of the dock, sorted by id. The others are named in warnings."""
    learnwares = []
    for found in _read_all(path, where="load"):
        if isinstance(found, Problem):
            warnings.warn(f"load: skipped {found.id!r} of {path}: {found.reason}", stacklevel=2)
        else:
            learnwares.append(found)
    return learnwares


def check(path: StrPath) -> list[Problem]:
    """The learnwares that `load` skips, or whose adapters are damaged, and why; sorted by id."""
    problems = []
    for found in _read_all(path, where="check"):
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
    return _decode(Path(file), where="read_spec")


def _read_all(path: StrPath, *, where: str) -> Iterator[Learnware | Problem]:
    dock = _dock_header(path, where=where)
    for id in _entries(path):
        try:
            yield _read(path, id, dock, where=where)
        except (OSError, ValueError) as error:
            yield Problem(id, str(error))


def _read(path: StrPath, id: str, dock: Header, *, where: str) -> Learnware:
    def read(folder):
        card_file, spec_file = folder / "card.json", folder / _spec_name(dock.kind)
        for link in (card_file, spec_file):
            _refuse_link(link, where=where)
        return read_card(card_file, where=where), *_decode(spec_file, where=where)

    card, spec, header = _read_whole(path, id, read, where=where)
    check_same_space(header, dock, what=f"{where}: {id!r} and the dock {path}")
    return Learnware(id, card, spec, header)


def _read_whole(path: StrPath, id: str, read: Callable[[Path], Any], *, where: str) -> Any:
    """What `read` returns for the folder of a learnware, all of it from one version."""
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
    home, aside = _learnwares(path) / id, _learnwares(path) / f"{OLD}{id}"
    # Home comes again last: a replacement may arrive between the first two looks.
    for folder in (home, aside, home):
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
    known = ", ".join(_entries(path)[:10]) or "none"
    return FileNotFoundError(f"{where}: {path} has no learnware {id!r}; its first ids: {known}.")


def _entries(path: StrPath) -> list[str]:
    names = os.listdir(_learnwares(path))
    aside = {name.removeprefix(OLD) for name in names if name.startswith(OLD)}
    return sorted(aside.union(name for name in names if not name.startswith(".")))


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
    for inside in (file, _learnwares(path)):
        _refuse_link(inside, where=where)
    if not _learnwares(path).is_dir():
        raise NotADirectoryError(f"{where}: {_learnwares(path)} is not a folder; restore it.")
    header = from_json(_read_bytes(file, MAX_JSON_BYTES, where=where), where=f"{where}: {file}")
    _check_kind(header.kind, where=f"{where}: {file}")
    _dimension(header.space, where=f"{where}: {file}")
    return header


def _dimension(space: dict[str, Any], *, where: str) -> int:
    dimension = space.get("dimension")
    if type(dimension) is not int or dimension < 1:
        raise ValueError(
            f"{where}: dimension is {dimension!r}; want the length of a row of z, 1 or more."
        )
    return dimension


def _check_kind(kind: Any, *, where: str) -> None:
    """ValueError unless `kind` is plain: it names a file, and comes from strangers."""
    if not isinstance(kind, str) or not re.fullmatch("[a-z0-9_]{1,50}", kind):
        raise ValueError(
            f"{where}: kind is {kind!r}; want at most 50 lower-case letters, digits and '_'."
        )


def _spec_name(kind: str) -> str:
    return f"{kind}.safetensors"


def check_id(id: str, *, where: str) -> None:
    """ValueError unless `id` is plain: it names a folder, and comes from strangers."""
    plain = isinstance(id, str) and re.fullmatch("[a-z0-9_-][a-z0-9_.-]{0,99}", id)
    if not plain or ".." in id or id == "none":  # a selection says "none" when nothing fits
        raise ValueError(
            f"{where}: {id!r} is not an id; use at most 100 lower-case letters, digits, '-', '_' "
            "and '.', not starting with '.', without '..'; not 'none'."
        )


def _check_domain(card: dict[str, Any], *, where: str) -> None:
    if not isinstance(card.get("domain", ""), str):
        raise ValueError(f"{where}: its domain is {card['domain']!r}; want a string.")


def _refuse_link(path: Path, *, where: str) -> None:
    if path.is_symlink():
        raise ValueError(
            f"{where}: {path} is a symbolic link; a dock holds none. Put a copy in its place."
        )


def _check_file(file: Path, limit: int, *, where: str) -> None:
    try:
        status = file.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: there is no {file}; restore it.") from error
    # A named pipe would block the reader for ever.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{where}: {file} is not a plain file.")
    if status.st_size > limit:
        raise ValueError(f"{where}: {file} has {status.st_size} bytes; want at most {limit}.")


def _read_bytes(file: Path, limit: int, *, where: str) -> bytes:
    _check_file(file, limit, where=where)
    return file.read_bytes()


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
    if type(n) is not int or n < 1 or type(residual) not in (int, float):
        raise ValueError(
            f"{where}: the header says n = {n!r} and residual = {residual!r}; want the number of "
            "independent samples that the embedding averages over (texts for an RKME, random seeds "
            "for a parameter vector; an integer, at least 1) and the squared MMD to all of them."
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


def _decode(file: Path, *, where: str) -> tuple[RKME, Header]:
    _check_file(file, MAX_SPEC_BYTES, where=where)
    where = f"{where}: {file}"
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            record = parse_json((opened.metadata() or {}).get("header", "{}"), where=where)
            digest = record.pop("sha256", None) if isinstance(record, dict) else None
            header = from_json(dump_json(record, where=where), where=where)
            if set(opened.keys()) != STORED.keys():
                raise ValueError(
                    f"{where} holds the arrays {', '.join(sorted(opened.keys()))}; want beta, z."
                )
            slices = {name: opened.get_slice(name) for name in STORED}
            for name, (code, dtype) in STORED.items():
                if slices[name].get_dtype() != code:
                    raise ValueError(
                        f"{where}: {name} is stored as {slices[name].get_dtype()}; want {code} "
                        f"({dtype.name})."
                    )
            _check_header(header, {n: s.get_shape() for n, s in slices.items()}, where=where)
            arrays = {name: opened.get_tensor(name) for name in STORED}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{where} is not a whole safetensors file ({error}); restore it or make it again."
        ) from error
    if digest != _digest(arrays, header):
        raise ValueError(
            f"{where} does not match its checksum: it was damaged or changed by hand; restore it "
            "or make it again."
        )
    return check_rkme(RKME(arrays["z"], arrays["beta"]), where=where), header


@contextmanager
def _writing(path: StrPath, *, where: str) -> Iterator[Path]:
    """The learnwares folder, while no other process writes; what was left half done is settled."""
    try:
        with filelock.FileLock(Path(path) / ".lock", timeout=LOCK_SECONDS):
            _settle(_learnwares(path))
            try:
                yield _learnwares(path)
            finally:
                # Readers do not mind what fails to go; the next writer tries again and reports it.
                with suppress(OSError):
                    _settle(_learnwares(path))
    except filelock.Timeout as error:
        raise TimeoutError(
            f"{where}: another process has been writing to {path} for {LOCK_SECONDS:g} s; wait for "
            "it, or end it, and try again."
        ) from error


def _settle(learnwares: Path) -> None:
    """Put back a learnware whose replacement did not arrive, and delete what else was left."""
    for name in os.listdir(learnwares):
        entry = learnwares / name
        if name.startswith(OLD) and not os.path.lexists(learnwares / name.removeprefix(OLD)):
            entry.rename(learnwares / name.removeprefix(OLD))
            _sync(learnwares)
        elif name.startswith((NEW, OLD, GONE)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    for stray in learnwares.parent.glob(".dock.json.*"):
        stray.unlink()


def write_file(file: Path, data: bytes, *, where: str) -> None:
    """Write under a temporary name, flush to the disk, rename."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{where}: could not write {len(data)} bytes ({error.strerror}); what was there before "
            "is unchanged. Free space or choose another place",
            str(file),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync(file.parent)


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
