"""The header of a specification: what it was made with, and whether two may be compared."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

SCHEMA = 1
MAX_DEPTH = 50  # deeper JSON is refused, so that no file exhausts the interpreter's stack
MAX_PARTS = 2**20  # lists, objects and members of a JSON text: some 100 bytes of memory each
MAX_INTEGER = 2**63 - 1
FEWEST_ROWS = 32  # of an RKME whose number of rows is believed
_ABSENT = object()


class Header(NamedTuple):
    """What must be known about a specification besides its arrays. All values are JSON.

    `space` holds everything that changes distances (encoder and its hash, kernel and bandwidth,
    dimension); specifications are comparable only where it is equal. `about` holds what does not
    (number of texts, residual, seed, command).
    """

    schema: int
    kind: str
    space: dict[str, Any]
    about: dict[str, Any]


class IncompatibleSpecifications(ValueError):
    """Two specifications live in different spaces: a distance between them means nothing."""


def to_json(header: Header) -> str:
    """The canonical text of a header: sorted keys, ASCII, shortest floats that read back equal.

    ValueError or TypeError for a field of another type and for values that are not finite JSON.
    """
    _check_fields(header._asdict(), where="to_json")
    return dump_json(header._asdict(), where="to_json")


def from_json(text: str | bytes, *, where: str = "from_json") -> Header:
    """The header that `to_json` wrote. ValueError if the text is not one, or of another schema."""
    fields = parse_json(text, where=where)
    _check_fields(fields, where=where)
    return Header(**fields)


def check_same_space(a: Header, b: Header, *, what: str) -> None:
    """Raise IncompatibleSpecifications unless a and b have one kind and equal spaces.

    `what` opens the message: where, and which two are compared. The message names every field
    that differs, with both values.
    """
    kinds = ("kind", a.kind, b.kind)
    differing = [kinds] if a.kind != b.kind else list(_differences(a.space, b.space))
    if differing:
        fields = "; ".join(f"{path} is {_show(x)} and {_show(y)}" for path, x, y in differing)
        raise IncompatibleSpecifications(
            f"{what}: not comparable, {fields}. Remake one specification from its texts with the "
            "other's settings."
        )


def believed_rows(n: int, points: int) -> int:
    """The rows that an RKME is believed to stand for: n, or 1 if that is less than FEWEST_ROWS, or
    than it has points.

    Unbiased distances depend on n: of an RKME that says it has 2 rows they double the own term,
    which draws every user to it. Of one that counts as made of one row the own term stays as it is,
    and the interval is the widest.
    """
    return n if n >= max(FEWEST_ROWS, points) else 1


def size_and_residual(header: Header) -> tuple[int, float]:
    """n (see `believed_rows`) and residual of a learnware's specification, as ranking counts them.

    A private specification (`about["privacy"]`, see `privacy.statement`) says neither. It counts as
    made of one row; its residual is at least the squared length that its noise has on average.
    """
    about = header.about
    if "privacy" in about:
        return 1, about["privacy"]["dimension"] * about["privacy"]["noise"] ** 2
    if header.kind != "rkme":
        return about["n"], about["residual"]
    return believed_rows(about["n"], about["points"]), about["residual"]


def dump_json(value: Any, *, where: str, indent: int | None = None) -> str:
    """`value` as JSON with sorted keys. Refuses what would not read back equal."""
    _check_json(value, where=where)
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=indent)


def parse_json(text: str | bytes, *, where: str) -> Any:
    """The value of a JSON text, in UTF-8 where it is bytes.

    ValueError if it is none, names a key twice in one object, is nested deeper than MAX_DEPTH, has
    more than MAX_PARTS lists, objects and members, or holds a number that is not finite or an
    integer beyond +-MAX_INTEGER.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        # Before the parser: lists and objects take 30 times the memory of their text.
        if (parts := sum(map(text.count, "[{:"))) > MAX_PARTS:
            raise ValueError(f"{parts} lists, objects and members; at most {MAX_PARTS} are read")
        value = json.loads(text, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON text ({error}); write it again.") from error
    _check_json(value, where=where)
    return value


def printable(text: str, most: int = 200) -> str:
    """At most so many characters of a stranger's text, in one line that is safe to show.

    Control characters, with them the escapes that a terminal obeys, line ends, marks that turn the
    direction of writing, and halves of surrogate pairs are escaped as Python does.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most])
    return f"{shown}..." if len(text) > most else shown


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; readers that keep the first of two equal keys would see another one."""
    members = dict(pairs)
    if len(members) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key '{printable(twice, 50)}' stands twice in one object")
    return members


def _check_fields(fields: Any, *, where: str) -> None:
    if not isinstance(fields, dict) or "schema" not in fields:
        raise ValueError(f"{where}: not a specification header: it has no field 'schema'.")
    if type(fields["schema"]) is not int or fields["schema"] != SCHEMA:
        raise ValueError(
            f"{where}: got schema {fields['schema']!r:.100}; this version of learnware_jax reads "
            f"schema {SCHEMA}. Use the version that wrote it, or make the specification again."
        )
    if fields.keys() != set(Header._fields):
        raise ValueError(
            f"{where}: got the fields {printable(', '.join(sorted(fields)))}; want exactly "
            f"{', '.join(sorted(Header._fields))}."
        )
    for name, wanted in (("kind", str), ("space", dict), ("about", dict)):
        if not isinstance(fields[name], wanted):
            raise ValueError(
                f"{where}: {name} is a {type(fields[name]).__name__}; want a {wanted.__name__}."
            )


def _check_json(value: Any, *, where: str, path: str = "", depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels; flatten it.")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: {path or 'it'} has the key {key!r}; JSON wants strings.")
            shown = printable(key, 50)
            deeper = f"{path}.{shown}" if path else shown
            _check_json(item, where=where, path=deeper, depth=depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, where=where, path=f"{path}[{index}]", depth=depth + 1)
    elif isinstance(value, float):
        # json.loads reads 1e999 as infinity, so the parser's own refusals are not enough.
        if not math.isfinite(value):
            raise ValueError(f"{where}: {path or 'it'} is {value}; want a finite number.")
    elif isinstance(value, int):
        # Arrays do not hold more, nor do most other readers of JSON.
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise ValueError(
                f"{where}: {path or 'it'} is an integer of {value.bit_length()} bits; want at most "
                "63, or a float."
            )
    elif value is not None and not isinstance(value, str):
        raise TypeError(
            f"{where}: {path or 'it'} is a {type(value).__name__}; want JSON: a dict, list, str, "
            "int, float, bool or None."
        )


def _differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            shown = printable(key, 50)
            deeper = f"{path}.{shown}" if path else shown
            yield from _differences(a.get(key, _ABSENT), b.get(key, _ABSENT), deeper)
    elif a != b:
        yield path, a, b


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else printable(json.dumps(value))
