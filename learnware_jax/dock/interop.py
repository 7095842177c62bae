"""Learnwares of the PyPI package `learnware` (0.4.0.post1): its specifications and zips, both ways.

As its source says, a specification there is a JSON object with z, beta, gamma, num_points and type;
a learnware is a zip of learnware.yaml, that JSON, a Python class and its weights, often with a
semantic specification in JSON. `dist` is the biased squared MMD (V-statistic) with the kernel
exp(-gamma |x - y|^2) in float64: `distance` here, equal within 4e-15 in all that was measured. Its
quadratic program leaves every weight positive (the smallest of 150 sets was 9e-11) and their sum
within 3e-14 of one, so weights are taken as they are; its signed setting is refused.

z is in float64 and uses the digits. A `Specification` keeps them, and a dock does not: `import_zip`
rounds z to float32. That changed squared distances by up to 2e-10 for 100 points of 384 dimensions
on the unit sphere, and by up to 6e-9 for 10 points of 8 dimensions.

`selection.ranking.rank` sorts by the unbiased squared MMD, which lowers the distance to a learnware
made from n rows by at most 1 / (n - 1): closer calls may come out in another order than the
package's.

Nothing of a zip is executed or extracted: the model's code and weights stay in it.
"""

import io
import json
import posixpath
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from learnware_jax.dock import index, store
from learnware_jax.dock.store import ADAPTER_FILES, MAX_JSON_BYTES, Learnware, StrPath
from learnware_jax.specification import kernels
from learnware_jax.specification.header import (
    MAX_DEPTH,
    SCHEMA,
    Header,
    dump_json,
    from_json,
    parse_json,
)
from learnware_jax.specification.rkme import RKME, check_rkme, squared_mmd

TABLE, TEXT = "RKMETableSpecification", "RKMETextSpecification"
# The package's classes whose kernel is Gaussian, and the types that their files name.
TYPES = {TABLE: TABLE, TEXT: TEXT, "RKMEStatSpecification": TABLE}
YAML, SEMANTIC, ADAPTER = "learnware.yaml", "semantic_specification.json", "adapter"
OURS = "learnware_jax"  # in a semantic specification: the card and header of a dock here
TUPLE = "tag:yaml.org,2002:python/tuple"
SCENARIOS = {"finance": "Financial", "medicine": "Health"}  # of the package's, by our domains
MAX_SPEC_BYTES = 2**25  # 4,000 points of 384 dimensions
MAX_YAML_BYTES = 2**16
MAX_MEMBERS = 10_000
MAX_DIRECTORY_BYTES = 2**21  # of a zip, which zipfile reads at once
MAX_RATIO = 200  # numbers in JSON deflate to a half, long runs of one byte to a thousandth
MODEL = '''"""The place of a model that this package does not run."""

from learnware.model.base import BaseModel


class Model(BaseModel):
    def __init__(self, dimension, message):
        super().__init__(input_shape=(dimension,), output_shape=None)
        self.message = message

    def predict(self, X):
        raise NotImplementedError(self.message)
'''


class Specification(NamedTuple):
    """A statistical specification of the package, with every digit that its file has."""

    spec: RKME  # float64, weights on the simplex
    gamma: float
    n: int  # rows that it was made from
    type: str = TABLE
    language: tuple[str, ...] = ()  # codes that the package detected in texts


class Zipped(NamedTuple):
    """A learnware as a zip holds it."""

    card: dict[str, Any]
    specification: Specification
    header: Header  # for a dock here
    adapter: dict[str, bytes] | None  # by name, of a learnware that `write_zip` wrote


def read_rkme(data: bytes, *, where: str = "read_rkme") -> Specification:
    """The specification in a JSON file of the package's `save`.

    ValueError for more than 32 MiB, what is not JSON or not finite, a type whose kernel is not
    Gaussian, z that is not (m, d), and everything that `check_rkme` refuses.
    """
    _check_size(len(data), MAX_SPEC_BYTES, where=where)
    fields = parse_json(data, where=where)
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: got a {type(fields).__name__}; want a JSON object.")
    absent = {"z", "beta", "gamma", "num_points", "type"} - set(fields)
    if absent:
        raise ValueError(
            f"{where}: it has no {', '.join(sorted(absent))}; save it again with the package."
        )
    if fields["type"] not in (TABLE, TEXT):
        raise ValueError(
            f"{where}: its type is {fields['type']!r:.100}; want {TABLE} or {TEXT}, whose kernel "
            "is Gaussian."
        )
    rows, beta, n = fields["z"], fields["beta"], fields["num_points"]
    if not (isinstance(rows, list) and rows and all(map(_is_numbers, rows))):
        raise ValueError(f"{where}: z is not a list of lists of numbers; want points (m, d).")
    if len(set(map(len, rows))) != 1:
        raise ValueError(
            f"{where}: the points in z have {min(map(len, rows))} to {max(map(len, rows))} "
            "numbers; want d in each."
        )
    if not _is_numbers(beta):
        raise ValueError(f"{where}: beta is not a list of numbers; want one a point.")
    if type(n) is not int or n < 1:
        raise ValueError(f"{where}: num_points is {n!r:.100}; want the number of rows, 1 or more.")
    language = fields.get("language", [])
    if not (isinstance(language, list) and all(isinstance(word, str) for word in language)):
        raise ValueError(f"{where}: language is {language!r:.100}; want a list of strings.")
    return Specification(
        check_rkme(RKME(np.array(rows, np.float64), np.array(beta, np.float64)), where=where),
        _gaussian(fields["gamma"], where=where).gamma,
        n,
        fields["type"],
        tuple(language),
    )


def write_rkme(specification: Specification) -> bytes:
    """The JSON that the package's `load` reads: equal arrays, and so equal distances.

    Errors as in `check_rkme`.
    """
    spec, gamma, n, type, language = specification
    check_rkme(spec, where="write_rkme")
    fields = {
        "z": np.asarray(spec.z, np.float64).tolist(),
        "beta": np.asarray(spec.beta, np.float64).tolist(),
        "gamma": _gaussian(gamma, where="write_rkme").gamma,
        "num_points": n,
        "type": type,
    }
    if type == TEXT:
        fields["language"] = list(language)
    return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()


def distance(p: Specification, q: Specification) -> float:
    """The package's `p.dist(q)`: the biased squared MMD, in float64, not rooted.

    ValueError unless gamma, type and dimension are equal; the package takes p's gamma.
    """
    described = [(s.gamma, s.type, np.shape(s.spec.z)[1]) for s in (p, q)]
    if described[0] != described[1]:
        raise ValueError(
            f"distance: gamma, type and dimension are {described[0]} and {described[1]}; a "
            "distance between them means nothing. Make both with the same settings."
        )
    # float32 points, as a dock has, would be compared in float32.
    exact = [RKME(*(np.asarray(array, np.float64) for array in s.spec)) for s in (p, q)]
    with jax.enable_x64(True):
        return float(squared_mmd(*exact, kernels.Gaussian(p.gamma)))


def read_zip(file: StrPath) -> Zipped:
    """The learnware in a zip of the package, or of `write_zip`; only what is needed is read.

    The card has name, domain (the package's scenarios) and description, and the package's semantic
    specification whole. A zip of `write_zip` gives the card and header that it was given, and its
    adapter. The package does not record what a specification lost by compression: the header says
    residual 0 and residual_known false, and intervals leave that part out.

    FileNotFoundError if there is no such file. ValueError for a zip that is damaged or encrypted,
    has paths that lead out of it, links, repeated names, too many members, or members that deflate
    more than 200 times; for yaml with aliases or with tags (but for tuples, which the package
    writes); and for what `read_rkme` refuses.
    """
    where = f"read_zip: {file}"
    with _open_zip(Path(file), where=where) as archive:
        members = _members(archive, where=where)

        def read(name: Any, limit: int) -> bytes:
            return _read_member(archive, members, name, limit, where=where)

        config = _parse_yaml(read(YAML, MAX_YAML_BYTES), where=f"{where}: {YAML}")
        class_name, spec_file = _find_spec(config, where=f"{where}: {YAML}")
        spec_where = f"{where}: {spec_file}"
        specification = read_rkme(read(spec_file, MAX_SPEC_BYTES), where=spec_where)
        if specification.type != TYPES[class_name]:
            raise ValueError(
                f"{spec_where}: its type is {specification.type}, and {YAML} calls it a "
                f"{class_name}; correct one."
            )
        named = config.get("semantic_specification")
        semantic_file = named.get("file_name") if isinstance(named, dict) else SEMANTIC
        semantic = {}
        # The package's own template leaves it out; markets ask for it apart from the zip.
        if named is not None or SEMANTIC in members:
            data = read(semantic_file, MAX_JSON_BYTES)
            semantic = parse_json(data, where=f"{where}: {semantic_file}")
            if not isinstance(semantic, dict):
                raise ValueError(f"{where}: {semantic_file} is not a JSON object; write one.")
        adapter = None
        if OURS in semantic:
            card, header = _own_record(semantic[OURS], specification, where=where)
            if "adapter" in card:
                limits = ADAPTER_FILES.items()
                adapter = {name: read(f"{ADAPTER}/{name}", limit) for name, limit in limits}
                card = {field: value for field, value in card.items() if field != "adapter"}
        else:
            card = _card(semantic, where=f"{where}: {semantic_file}")
            header = _header(specification)
    card_bytes = len(dump_json(card, where=where, indent=2))
    if card_bytes > MAX_JSON_BYTES // 2:
        raise ValueError(
            f"{where}: its card takes {card_bytes} bytes; shorten it to {MAX_JSON_BYTES // 2}."
        )
    return Zipped(card, specification, header, adapter)


def write_zip(
    file: StrPath, learnware: Learnware, *, adapter: Mapping[str, bytes] | None = None
) -> None:
    """Write a zip that the package loads and ranks. A file of that name is replaced whole or not.

    `adapter` holds PEFT's two files by name, as `store.read_adapter` gives them. The package's
    class for the model says in a NotImplementedError what the model is: it does not run here.
    The type is that of the dock's space where the learnware came from the package, and a table's
    otherwise: a text's would claim the package's own encoder.

    ValueError for a specification that is no RKME with a Gaussian kernel.
    """
    id, card, spec, header = learnware
    kernel = header.space.get("kernel")
    if header.kind != "rkme" or not isinstance(kernel, dict) or kernel.get("name") != "gaussian":
        raise ValueError(
            f"write_zip: {id!r} is of kind {header.kind!r} with the kernel {kernel!r}; the package "
            "knows an rkme with a gaussian kernel. Make one of its texts."
        )
    if ("adapter" in card) != (adapter is not None):
        raise ValueError(
            f"write_zip: the card of {id!r} and the files given disagree on an adapter; give the "
            "files of read_adapter where the card has an entry."
        )
    type = str(header.space.get("encoder")).removeprefix("learnware:")
    specification = Specification(
        spec,
        kernel["gamma"],
        header.about.get("n", 1),
        type if type in (TABLE, TEXT) else TABLE,
        tuple(header.about.get("language", ())),
    )
    semantic = _semantic(id, card) | {OURS: {"card": card, "header": header._asdict()}}
    config = {
        "id": id,
        "model": {
            "class_name": "Model",
            "module_path": "__init__.py",
            "kwargs": {"dimension": np.shape(spec.z)[1], "message": _message(card)},
        },
        "semantic_specification": {"file_name": SEMANTIC},
        "stat_specifications": [
            {
                "module_path": "learnware.specification",
                "class_name": specification.type,
                "file_name": "rkme.json",
                "kwargs": {},
            }
        ],
    }
    members = {
        "__init__.py": MODEL.encode(),
        "requirements.txt": b"",
        "rkme.json": write_rkme(specification),
        SEMANTIC: dump_json(semantic, where=f"write_zip: the card of {id!r}", indent=2).encode(),
    }
    if adapter is not None:
        config["model"]["weights_file_path"] = ADAPTER
        members |= {f"{ADAPTER}/{name}": adapter[name] for name in ADAPTER_FILES}
    members[YAML] = yaml.safe_dump(config).encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            # The date of an entry would make equal learnwares differ as files.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    store.write_file(Path(file), stream.getvalue(), where="write_zip")


def import_zip(dock: StrPath, file: StrPath, id: str) -> None:
    """Put the learnware of a zip into a dock, which is made, with its space, if there is none.

    z is rounded to float32. Errors as in `read_zip` and `store.add`; after one of them the dock is
    as it was, or is not there.
    """
    card, specification, header, adapter = read_zip(file)
    z, beta = specification.spec
    learnware = Learnware(id, card, RKME(z.astype(np.float32), beta), header)
    if not (Path(dock) / "dock.json").exists():
        # What a dock refuses is found out in another place, so that no empty dock is left.
        with tempfile.TemporaryDirectory() as trial:
            store.create_dock(trial, header.space, header.kind)
            store.add(trial, learnware)
        store.create_dock(dock, header.space, header.kind)
    index.add(dock, learnware, adapter=adapter)


def export_zip(dock: StrPath, id: str, file: StrPath) -> None:
    """Write a learnware of a dock, with its adapter, as a zip. Errors as in `write_zip`."""
    learnware = store.read_learnware(dock, id)
    adapter = store.read_adapter(dock, id) if "adapter" in learnware.card else None
    write_zip(file, learnware, adapter=adapter)


def _is_numbers(row: Any) -> bool:
    # bool is a subclass of int, and NumPy would read the string "1" as a number.
    return isinstance(row, list) and all(type(number) in (int, float) for number in row)


def _gaussian(gamma: Any, *, where: str) -> kernels.Kernel:
    try:
        return kernels.from_dict({"name": "gaussian", "gamma": gamma})
    except ValueError as error:
        raise ValueError(f"{where}: {str(error)[:200]}") from error


def _check_size(size: int, limit: int, *, where: str) -> None:
    if size > limit:
        raise ValueError(f"{where} has {size} bytes; want at most {limit}.")


def _header(specification: Specification) -> Header:
    spec, gamma, n, type, language = specification
    points, dimension = np.shape(spec.z)
    space = {
        "encoder": f"learnware:{type}",
        "dimension": dimension,
        "kernel": kernels.to_dict(kernels.Gaussian(gamma)),
    }
    about = {"points": points, "n": n, "residual": 0.0, "residual_known": False}
    return Header(SCHEMA, "rkme", space, about | ({"language": list(language)} if language else {}))


def _own_record(
    record: Any, specification: Specification, *, where: str
) -> tuple[dict[str, Any], Header]:
    """Card and header as `write_zip` was given them, where they fit the specification."""
    where = f"{where}: {OURS}"
    if not isinstance(record, dict) or not isinstance(record.get("card"), dict):
        raise ValueError(f"{where}: got no card and header; export it again.")
    header = from_json(dump_json(record.get("header"), where=where), where=where)
    plain = _header(specification)
    facts = [
        {"kind": h.kind}
        | {part: h.space.get(part) for part in ("dimension", "kernel")}
        # A private specification says no n; the package's files want one.
        | {"points": h.about.get("points"), "n": h.about.get("n", 1)}
        for h in (header, plain)
    ]
    if facts[0] != facts[1]:
        raise ValueError(
            f"{where}: the header says {facts[0]!r:.200}, and the specification {facts[1]}; export "
            "it again."
        )
    return record["card"], header


def _card(semantic: dict[str, Any], *, where: str) -> dict[str, Any]:
    """A card for a dock here from the package's semantic specification."""
    values = {}
    for field in ("Name", "Description", "Scenario"):
        entry = semantic.get(field, {"Values": [] if field == "Scenario" else ""})
        value = entry.get("Values") if isinstance(entry, dict) else None
        words = value if field == "Scenario" else [value]
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise ValueError(
                f"{where}: {field} is {entry!r:.100}; want Values that are "
                f"{'a list of strings' if field == 'Scenario' else 'a string'}."
            )
        values[field] = ", ".join(words)
    card = {
        "name": values["Name"],
        "domain": values["Scenario"],
        "description": values["Description"],
    }
    return card | ({"semantic_specification": semantic} if semantic else {})


def _semantic(id: str, card: dict[str, Any]) -> dict[str, Any]:
    """The package's semantic specification, such that its checker passes it."""
    has_model = "adapter" in card
    name = str(card.get("name") or id)
    fields = {
        "Data": ("Class", ["Text"]),
        "Task": ("Class", ["Text Generation" if has_model else "Others"]),
        "Model": ("Optional", ["Others"]),  # "PEFT Model" wants the base model in the same market
        "Library": ("Class", ["PyTorch" if has_model else "Others"]),
        "Scenario": ("Tag", [SCENARIOS.get(card.get("domain"), "Others")]),
        "License": ("Class", ["Others"]),
        "Name": ("String", name),
        "Description": ("String", str(card.get("description") or name)),
    }
    semantic = {field: {"Type": kind, "Values": value} for field, (kind, value) in fields.items()}
    given = card.get("semantic_specification", {})
    return semantic | {field: given[field] for field in ("Scenario", "License") if field in given}


def _message(card: dict[str, Any]) -> str:
    if "adapter" not in card:
        return "This learnware came without a model: it has a specification alone."
    model = card.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    return (
        f"This learnware's model is a LoRA adapter for {name or 'a model without a name'}, in the "
        f"folder {ADAPTER} beside this file: load it with peft.PeftModel.from_pretrained."
    )


class _Bounded(io.BufferedReader):
    """A file of which no careless reader takes more than MAX_DIRECTORY_BYTES at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size)


@contextmanager
def _open_zip(file: Path, *, where: str) -> Iterator[zipfile.ZipFile]:
    # A named pipe would block the reader for ever.
    if not file.is_file():
        raise FileNotFoundError(f"{where}: there is no such file; give the path of a zip.")
    stream = _Bounded(io.FileIO(file))
    try:
        with stream, zipfile.ZipFile(stream) as archive:
            yield archive
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        UnicodeDecodeError,
        OSError,  # a seek to where a lie points
    ) as error:
        raise ValueError(
            f"{where}: damaged, or not a zip ({error}); fetch or write it again."
        ) from error


def _check_path(name: Any, *, where: str) -> str:
    """The normalised name of a member. ValueError unless it stays inside on every system."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: got {name!r:.100}; want the name of a file in the zip.")
    leads_out = re.search(r"^/|^[A-Za-z]:|\\|(^|/)\.\.(/|$)", name)
    if leads_out or len(name) > 500 or not name.isprintable():
        raise ValueError(
            f"{where}: the path {name!r:.100} leads out of the zip, or is long or not printable; "
            "want a relative path with '/', without '..', of at most 500 characters."
        )
    return posixpath.normpath(name)


def _members(archive: zipfile.ZipFile, *, where: str) -> dict[str, zipfile.ZipInfo]:
    """The files of a zip by normalised path. ValueError for a zip that sets a trap."""
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS:
        raise ValueError(f"{where}: it has {len(entries)} members; want at most {MAX_MEMBERS}.")
    members = {}
    for entry in entries:
        # filename has lost what follows a NUL.
        path = _check_path(entry.orig_filename, where=where)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(
                f"{where}: {path!r} is a link or a device; put a copy of the file there."
            )
        if entry.flag_bits & 1:
            raise ValueError(f"{where}: {path!r} is encrypted; write the zip without a password.")
        # Others take as much memory as a file says they need.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{where}: {path!r} is compressed by method {entry.compress_type}; store or "
                "deflate it."
            )
        if entry.file_size > max(MAX_RATIO * entry.compress_size, 2**20):
            raise ValueError(
                f"{where}: {path!r} has {entry.file_size} bytes in {entry.compress_size}; want a "
                f"ratio of at most {MAX_RATIO}."
            )
        if path in members:
            raise ValueError(f"{where}: it has two members {path!r}; remove one.")
        members[path] = entry
    return members


def _read_member(
    archive: zipfile.ZipFile,
    members: dict[str, zipfile.ZipInfo],
    name: Any,
    limit: int,
    *,
    where: str,
) -> bytes:
    path = _check_path(name, where=where)
    if path not in members or members[path].is_dir():
        raise ValueError(f"{where}: it has no file {path!r} in it; write the zip again with it.")
    _check_size(members[path].file_size, limit, where=f"{where}: {path}")
    # zipfile stops at the size that was declared, and compares the checksum there.
    with archive.open(members[path]) as stream:
        return b"".join(iter(lambda: stream.read(2**20), b""))


class _Loader(yaml.SafeLoader):
    """Plain values alone. The package writes its shapes as Python tuples, here read as lists."""


_Loader.add_constructor(TUPLE, _Loader.construct_sequence)


def _parse_yaml(data: bytes, *, where: str) -> dict[str, Any]:
    try:
        text, depth = data.decode(), 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            # PyYAML takes time that grows with the square of the depth.
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"an alias in line {event.start_mark.line + 1}")
            if getattr(event, "tag", None) not in (None, TUPLE):
                raise ValueError(f"the tag {event.tag!r:.100} in line {event.start_mark.line + 1}")
        config = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: not plain YAML ({reason}); write it out.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where}: got a {type(config).__name__}; want a mapping.")
    return config


def _find_spec(config: dict[str, Any], *, where: str) -> tuple[str, Any]:
    """Class and file of the one specification with a Gaussian kernel."""
    entries = config.get("stat_specifications")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{where}: stat_specifications is not a list of mappings; write one.")
    found = [
        entry
        for entry in entries
        if entry.get("module_path") == "learnware.specification"
        and entry.get("class_name") in list(TYPES)
    ]
    if len(found) != 1:
        classes = [entry.get("class_name") for entry in entries]
        raise ValueError(
            f"{where}: its specifications are {classes!r:.200}; want one of {', '.join(TYPES)}, "
            "of the module learnware.specification."
        )
    return found[0]["class_name"], found[0].get("file_name")
