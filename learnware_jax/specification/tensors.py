"""The header of a safetensors file, read before its arrays: what they are, and where they lie.

Format: 8 bytes that hold the length of the header (little-endian), the header in JSON, the arrays
without gaps. The safetensors library takes headers of up to 100 MB, which as Python's objects are
gigabytes, and keeps the last of two equal names.
"""

import math
from typing import NamedTuple, TypeGuard

from learnware_jax.specification.header import parse_json, printable

MAX_HEADER_BYTES = 2**22  # 30,000 arrays
MAX_AXES = 8
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


class Stored(NamedTuple):
    """An array in a file: bytes `begin` to `end` of the file, in C order."""

    dtype: str  # a name in ITEM_BYTES
    shape: tuple[int, ...]
    begin: int
    end: int


def header_bytes(head: bytes) -> int:
    """How many bytes, of a file that begins so, come before its arrays.

    ValueError if `head` has fewer than 8 bytes, or the header more than MAX_HEADER_BYTES.
    """
    if len(head) < 8:
        raise ValueError(f"it has {len(head)} bytes")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    return 8 + length


def read_stored(head: bytes, size: int) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata and the arrays of a file of `size` bytes that begins with `head`.

    ValueError, for what is no header of such a file: a cut one, one with names that stand twice or
    types that are not known, shapes whose sizes are not those of the bytes, bytes in no array or in
    two.
    """
    start = header_bytes(head)
    if len(head) < start:
        raise ValueError(f"a header of {start - 8} bytes, of which {len(head) - 8} are there")
    entries = parse_json(bytes(head[8:start]), where="its header")
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is no object of texts")
    stored = {name: _stored(name, entry, start) for name, entry in entries.items()}
    reached = start
    for name, array in sorted(stored.items(), key=lambda item: item[1][2:]):
        if array.begin != reached:
            raise ValueError(f"a gap or an overlap before {printable(name, 100)}")
        reached = array.end
    if reached != size:
        raise ValueError(f"its arrays end at byte {reached} of {size}")
    return metadata, stored


def _stored(name: str, entry: object, start: int) -> Stored:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (
        fields.keys() == {"dtype", "shape", "data_offsets"}
        and (isinstance(dtype, str) and dtype in ITEM_BYTES)
        and (_are_counts(shape) and len(shape) <= MAX_AXES)
        and (_are_counts(place) and len(place) == 2)
        and place[1] - place[0] == ITEM_BYTES[dtype] * math.prod(shape)
    ):
        said = printable(f"dtype {dtype!r:.50}, shape {shape!r:.100} and offsets {place!r:.100}")
        raise ValueError(f"{printable(name, 100)} has {said}, which no array has")
    return Stored(dtype, tuple(shape), start + place[0], start + place[1])


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
