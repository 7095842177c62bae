"""Texts or embedded rows, however many, to one specification, in pieces and with resumption.

Example: python -m experiments.specify --config=configs/specify.py:quickstart --config.data=FILE
"""

if __name__ == "__main__":
    from experiments.command import launch

    launch("specify")

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.common import (
    bar,
    check_kernel,
    check_publishing,
    data_line,
    dock_line,
    dock_space,
    header_of,
    is_private,
    kernel_of,
    open_encoder,
    own_points,
    reducer_options,
    say,
    space_of,
    warn_of_publishing,
    write_json,
)
from learnware_jax.dock import store, texts
from learnware_jax.dock.materials import cache_dir, fetch_dataset
from learnware_jax.dock.tasks import TASKS, load_task
from learnware_jax.slm.encoder import embed
from learnware_jax.specification import kernels
from learnware_jax.specification.header import dump_json, parse_json
from learnware_jax.specification.stream import Stream, finish, start, update

STATE = "stream.safetensors"
# Arrays of a stream, as they are kept in a file; the rest of it is a few numbers.
ARRAYS = ("seed", "anchors", "total", "sums", "rows", "priorities", "pending")
# Rows of an npy file out of which anchors and a median bandwidth are taken.
GLIMPSE = 2048


class Source(NamedTuple):
    """Where texts or rows come from, of which nothing is held."""

    identity: dict[str, Any]  # JSON; a run that was stopped must find it again
    total: int | None  # about how many items, where that is known
    items: Callable[[], Iterator[Any]]  # strings, or dicts with a text in one column
    rows: Path | None = None  # an npy file of embedded texts in place of items


def check(config: ConfigDict) -> None:
    """ValueError for settings that no specification could be made with."""
    if min(config.piece, config.anchors, config.specification.points) < 1:
        raise ValueError(
            f"specify: got piece={config.piece}, anchors={config.anchors} and points="
            f"{config.specification.points}; want at least 1 of each."
        )
    check_kernel(config.specification.kernel)
    check_publishing(config.specification)
    if is_private(config.specification):
        raise ValueError(
            "specify: got a number for specification.privacy.epsilon, and makes no private "
            "specifications; experiments.build does, also without an adapter."
        )
    if not config.data:
        raise ValueError("specify: nothing to specify; set --config.data to a file or a data set.")


def preview(config: ConfigDict) -> dict[str, str]:
    """What `run` will do, in words; the errors that it would begin with."""
    check(config)
    data = data_line(
        config.data, lambda: f"about {open_source(config.data, config.column).total:,} rows"
    )
    dock = dock_line(config.dock) if config.dock else "none: the kernel of the settings"
    spec = Path(config.workdir) / "rkme.safetensors"
    following = f"""search --config=configs/search.py:quickstart --config.users='("{spec}",)'"""
    return {"data": data, "dock": dock, "next": following}


def run(config: ConfigDict) -> dict:
    """Make the specification; returns what it writes to workdir/results.json."""
    begin, workdir = time.perf_counter(), Path(config.workdir)
    check(config)
    warn_of_publishing(config.specification)
    source = open_source(config.data, config.column)
    if config.dock:
        space, encoder = dock_space(config.dock, config.specification)
    else:
        encoder = open_encoder(config.specification)
        space = space_of(encoder, config.specification)
    settings = {
        "data": source.identity,
        "space": space,
        "kernel": config.specification.kernel.to_dict(),
        **{name: config[name] for name in ("column", "capacity", "anchors", "piece", "seed")},
    }
    settings = json.loads(json.dumps(settings))  # tuples are lists, as they will be in the file
    with store.locked(
        workdir / ".lock",
        where="specify",
        doing=f"is making a specification in {workdir}",
        otherwise="name another --config.workdir",
    ):
        return _run_locked(source, space, encoder, config, settings, begin)


def _run_locked(source, space, encoder, config, settings, begin) -> dict:
    workdir = Path(config.workdir)
    # What a killed writer has left may hold embedded rows.
    for name in (STATE, "rkme.safetensors", "results.json"):
        store.sweep(workdir / name)
    state, position = load_state(workdir / STATE, settings)
    if position:
        say(f"{workdir / STATE}: going on after {position} rows.")
    stream = _read(source, state, position, space, encoder, config, settings)
    kept = np.concatenate([stream.rows, stream.pending])
    if (kept == kept[0]).all():
        raise ValueError(
            f"specify: {config.data} holds {stream.n} text(s) and no two that differ; a "
            "specification would give it away."
        )
    space = space | {"kernel": kernels.to_dict(stream.kernel)}
    points = own_points(config.specification, stream.n)
    key = jax.random.split(jax.random.key(config.seed))[1]
    reduced = finish(key, stream, points, **reducer_options(config.specification))
    file = workdir / "rkme.safetensors"
    header = header_of(space, config.specification, config.seed, reduced)
    store.write_spec(file, reduced.spec, header)
    output = {
        "specification": str(file),
        "n": reduced.n,
        "points": len(reduced.spec.beta),
        "residual": reduced.residual,
        "gap": reduced.gap,
        "seconds": time.perf_counter() - begin,
    }
    write_json(workdir / "results.json", output)
    (workdir / STATE).unlink(missing_ok=True)
    print(
        f"{file}: {output['points']} points for {output['n']} rows, squared MMD "
        f"{output['residual']:.2e}, {output['seconds']:.0f} s."
    )
    return output


def _read(source, stream, position, space, encoder, config, settings) -> Stream:
    """The stream of all rows, from `position` on where some have been read."""
    if source.rows is not None:
        dimension = np.load(source.rows, mmap_mode="r").shape[1]
        if dimension != space["dimension"]:
            raise ValueError(
                f"specify: {source.rows} has rows of dimension {dimension}, the encoder "
                f"{space['dimension']}; name the encoder that made them."
            )
    saved = time.monotonic()
    mesh = None
    if jax.local_device_count() > 1:
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
    with bar("rows", source.total) as advance:
        advance(position)
        for count, x in _pieces(source, position, space, encoder, mesh, config):
            if stream is None and len(x):
                stream = _begin(source, x, space, config)
            if len(x):
                stream = update(stream, x)
            position += count
            advance(count)
            if stream is not None and time.monotonic() - saved >= config.save_seconds:
                save_state(Path(config.workdir) / STATE, stream, position, settings)
                saved = time.monotonic()
    if stream is None:
        raise ValueError(f"specify: {config.data} holds no text: every line or cell is blank.")
    return stream


def _pieces(source, position, space, encoder, mesh, config) -> Iterator[tuple[int, np.ndarray]]:
    """How many items every piece has, and their embedded rows: fewer where texts are blank."""
    if source.rows is not None:
        for begin in range(position, source.total, config.piece):
            # Mapped anew for every piece: what has been read does not stay in memory.
            x = np.array(np.load(source.rows, mmap_mode="r")[begin : begin + config.piece])
            yield len(x), x
        return
    options = {"max_tokens": space["max_tokens"], "dtype": space["dtype"]}
    items, column, seen, name = source.items(), config.column or None, 0, Path(config.data)
    while piece := list(itertools.islice(items, config.piece)):
        seen += len(piece)
        try:
            if isinstance(piece[0], dict) and column is None:
                column = texts.text_column(name, piece, list(piece[0]))
                say(f"{config.data}: the texts are column {column!r}.")
            if seen <= position:  # worked off before the run was stopped
                continue
            if isinstance(piece[0], dict):
                piece = texts.join_columns(name, piece, column)
            strings = [clean for text in piece if (clean := " ".join(text.split()))]
            x = np.zeros((0, space["dimension"]), np.float32)
            if strings:
                x = embed(encoder, strings, **options, progress=False, mesh=mesh)
        except ValueError as error:
            raise ValueError(
                f"specify: in rows {seen - len(piece) + 1} to {seen} of {config.data}, counted "
                f"there from 1: {error}"
            ) from None
        yield len(piece), x


def _begin(source, x, space, config) -> Stream:
    """A stream of no rows; `x` is the first piece."""
    rng = np.random.default_rng(config.seed)

    def some(rows, count):
        return rows[np.sort(rng.choice(len(rows), min(count, len(rows)), replace=False))]

    if source.rows is not None:
        x = some(np.load(source.rows, mmap_mode="r"), GLIMPSE)
    if "kernel" in space:
        kernel = kernels.from_dict(space["kernel"])
    else:
        kernel = kernel_of(config.specification.kernel, config.seed, x)
    key = jax.random.split(jax.random.key(config.seed))[0]
    return start(key, some(x, config.anchors), kernel, capacity=config.capacity)


def open_source(data: str, column: str) -> Source:
    """The texts or rows named `data`: a file, a task of the catalogue, or a data set.

    ValueError or FileNotFoundError says what is wrong, as far as that can be seen without reading.
    """
    if data in TASKS and not column:
        task = load_task(data)
        return Source({"task": data}, len(task), lambda: iter(task))
    path = Path(data).expanduser()
    # What looks like a path is never sent to the hub: a misspelt one may be confidential.
    if path.exists() or path.is_absolute() or re.fullmatch(r"\.[A-Za-z]+", path.suffix):
        return _file_source(path, column)
    if "/" not in data:
        raise ValueError(
            f"specify: {data!r} is no file and no task of learnware_jax.dock.tasks.TASKS with that "
            "column; want one, or a data set as OWNER/NAME[/CONFIG][:SPLIT]."
        )
    name, _, split = data.partition(":")
    roots = [os.environ.get("LEARNWARE_MIRROR"), cache_dir() / "datasets"]
    if any(root and any((Path(root) / name).glob("*.jsonl")) for root in roots):
        files = fetch_dataset(data)
        return Source(
            {"data set": data, "files": [_identity(file) for file in files]},
            sum(_lines_of(file) for file in files),
            lambda: itertools.chain.from_iterable(_items(file) for file in files),
        )
    return Source({"data set": data}, None, lambda: _hub_items(name, split))


def _file_source(path: Path, column: str) -> Source:
    if path.is_dir():
        raise ValueError(f"specify: {path} is a folder; name one file in it.")
    if not path.exists():
        raise FileNotFoundError(f"specify: there is no file {path}.")
    suffix, identity = path.suffix.lower(), _identity(path)
    if suffix == ".npy":
        try:
            x = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"specify: {path} is no npy file that can be mapped ({error}).") from (
                None
            )
        if x.ndim != 2 or x.dtype.kind != "f" or column:
            raise ValueError(
                f"specify: {path} holds {x.dtype} of shape {x.shape}, and column={column!r}; want "
                "embedded texts, floating-point rows (n, d), and no column."
            )
        return Source(identity, len(x), lambda: iter(()), rows=path)
    if suffix == ".json":
        strings = texts.read_file(path, column=column or None)
        return Source(identity, len(strings), lambda: iter(strings))
    if suffix == ".parquet":
        import pyarrow.parquet

        return Source(identity, pyarrow.parquet.read_metadata(path).num_rows, lambda: _items(path))
    return Source(identity, _lines_of(path), lambda: _items(path))


def _identity(path: Path) -> dict[str, Any]:
    """What tells a file from another without reading all of it."""
    status = path.stat()
    return {"file": path.name, "bytes": status.st_size, "modified": status.st_mtime_ns}


def _lines_of(path: Path) -> int:
    """Lines of a file of text, read once in pieces. ValueError for a binary file."""
    count = 0
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            if b"\0" in piece:
                raise ValueError(
                    f"specify: {path} is a binary file; want text in UTF-8, or "
                    "jsonl, csv, tsv, parquet, json, npy by its ending."
                )
            count += piece.count(b"\n")
    return count


def _items(path: Path) -> Iterator[Any]:
    """The rows of a file one after another: dicts of columns, or strings."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
        return
    try:
        if suffix in (".csv", ".tsv"):
            yield from _table_rows(path, "\t" if suffix == ".tsv" else ",")
            return
        with open(path, encoding="utf-8-sig") as file:
            yield from _json_lines(path, file) if suffix == ".jsonl" else file
    except UnicodeDecodeError as error:
        raise ValueError(
            f"specify: {path} is not UTF-8 ({error}); convert it, e.g. `iconv -f latin1 -t utf-8`."
        ) from None


def _table_rows(path: Path, separator: str) -> Iterator[dict]:
    import pandas

    # Cells are texts: "NA" and "null" are words here, and numbers stay as they are written.
    options = {"sep": separator, "dtype": str, "keep_default_na": False, "chunksize": 1024}
    try:
        with pandas.read_csv(path, **options) as tables:
            for table in tables:
                yield from table.to_dict("records")
    except pandas.errors.EmptyDataError:
        return
    except pandas.errors.ParserError as error:
        raise ValueError(f"specify: {path} is no valid table: {error}.") from None


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[Any]:
    kind = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"specify: {path} line {number} is no valid JSON: {error}.") from None
        kind = kind or type(row)
        if kind not in (dict, str) or type(row) is not kind:
            raise ValueError(
                f"specify: {path} line {number} is a {type(row).__name__}; want all objects, or "
                "all strings."
            )
        yield row


def _hub_items(name: str, split: str) -> Iterator[dict]:
    """The rows of a data set of the hub, all splits by name unless one is given."""
    import datasets

    owner, dataset, *configuration = name.split("/")
    try:
        found = datasets.load_dataset(
            f"{owner}/{dataset}", *configuration, split=split or None, streaming=True
        )
        for rows in [found] if split else [found[part] for part in sorted(found)]:
            yield from rows
    except Exception as error:  # the hub's client raises dozens of unrelated types
        raise OSError(
            f"specify: data set {name!r} is neither in LEARNWARE_MIRROR nor in the cache, and the "
            "hub could not deliver it, or not to its end; the same command goes on where it "
            f"stopped. The hub's client said: {type(error).__name__}: {error}"
        ) from error


def save_state(file: Path, stream: Stream, position: int, settings: dict[str, Any]) -> None:
    """Write what a stopped run goes on from, whole or not at all. It holds embedded rows."""
    arrays = {name: np.ascontiguousarray(getattr(stream, name)) for name in ARRAYS}
    record = {
        "settings": settings,
        "position": position,
        "n": stream.n,
        "capacity": stream.capacity,
        "kernel": kernels.to_dict(stream.kernel),
    }
    record["sha256"] = _digest(arrays, record)
    data = safetensors.numpy.save(arrays, {"record": dump_json(record, where="save_state")})
    store.write_file(file, data, where="save_state")


def load_state(file: Path, settings: dict[str, Any]) -> tuple[Stream | None, int]:
    """The stream of a stopped run and how many items it has read; (None, 0) if there is none.

    ValueError if the file is damaged, or of a run with other data or settings: they are named.
    """
    if not file.exists():
        return None, 0
    remedy = f"Delete {file} to start again, or give this run another workdir."
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            record = parse_json((opened.metadata() or {})["record"], where="load_state")
            digest = record.pop("sha256")
            arrays = {name: opened.get_tensor(name) for name in ARRAYS}
        sound = digest == _digest(arrays, record)
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"load_state: {file} is damaged. {remedy}")
    differing = [
        f"{name} is {record['settings'].get(name)!r} there and {value!r} here"
        for name, value in settings.items()
        if record["settings"].get(name) != value
    ]
    if differing:
        raise ValueError(
            f"load_state: {file} is of a run that was stopped, with other settings: "
            f"{'; '.join(differing)}. {remedy}"
        )
    kernel = kernels.from_dict(record["kernel"])
    numbers = {name: record[name] for name in ("n", "capacity")}
    return Stream(kernel=kernel, **numbers, **arrays), record["position"]


def _digest(arrays: dict[str, np.ndarray], record: dict[str, Any]) -> str:
    digest = hashlib.sha256(dump_json(record, where="save_state").encode())
    for name in ARRAYS:
        digest.update(f"{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
