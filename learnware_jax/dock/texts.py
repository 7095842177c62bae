"""Texts of a file: JSON lines, JSON, CSV, TSV, Parquet, or plain text with one text a line."""

import hashlib
import io
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from learnware_jax.specification.header import printable

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
# A Parquet file of a few KB may stand for any number of rows.
MAX_TABLE_BYTES, ROW_BYTES = 2**30, 200
# The input of a task under the names that published data sets give it, likeliest first.
TEXT_COLUMNS = (
    *("text", "sentence", "question", "query", "problem", "content", "prompt", "input"),
    *("document", "passage", "news", "title", "headline"),
)


def read_file(path: str | Path, *, column: str | None = None) -> list[str]:
    """Non-blank texts of a file in file order, runs of white space made one blank.

    The ending chooses the format; an unknown one is read as plain text. In a file with columns,
    `column` names the text (`a+b`: columns a and b, joined by a blank); by default it is the
    first column named in TEXT_COLUMNS, else the one whose strings are longest. A list of strings
    is taken as tokens and joined by blanks. ValueError or
    FileNotFoundError says what is wrong with a file that holds no texts.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"read_file: {path} is a folder; name one file in it.")
    if not path.exists():
        raise FileNotFoundError(f"read_file: there is no file {path}.")
    suffix = path.suffix.lower()
    rows = _parquet_rows(path) if suffix == ".parquet" else _rows(path, suffix)
    if rows and isinstance(rows[0], dict):
        texts = join_columns(path, rows, column)
    elif column is not None:
        raise ValueError(
            f"read_file: {path} has no columns, {column!r} was asked for; leave the column out."
        )
    else:
        texts = rows
    texts = [clean for text in texts if (clean := _clean(path, text))]
    if not texts:
        raise ValueError(f"read_file: {path} holds no text: every line or cell is blank.")
    return texts


def read_pairs(path: str | Path, *, text: str, answer: str) -> list[tuple[str, str]]:
    """Texts and answers out of two columns of a file, in file order, as `read_file` cleans texts.

    Answers may be numbers; `+` joins columns as in `read_file`. Rows where one of the two is blank
    are refused, as they would be learned.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_pairs: there is no file {path}.")
    suffix = path.suffix.lower()
    rows = _parquet_rows(path) if suffix == ".parquet" else _rows(path, suffix)
    if not rows or not isinstance(rows[0], dict):
        raise ValueError(
            f"read_pairs: {path} has no columns; want a table or JSON objects with {text!r} and "
            f"{answer!r}."
        )
    # An answer is often a number, or a truth value.
    plain = [
        row | {answer: json.dumps(row[answer])}
        if isinstance(row.get(answer), bool | int | float)
        else row
        for row in rows
    ]
    columns = [
        [_clean(path, cell) for cell in join_columns(path, plain, name)] for name in (text, answer)
    ]
    for i, pair in enumerate(zip(*columns, strict=True), 1):
        if not all(pair):
            raise ValueError(f"read_pairs: row {i} of {path} has a blank text or answer; drop it.")
    return list(zip(*columns, strict=True))


def sample(texts: Sequence[str], limit: int | None) -> list[str]:
    """At most `limit` of the texts, chosen by their hash, in their order.

    The choice depends neither on the order nor on a seed, and a smaller sample lies in a larger.
    """
    if limit is None or len(texts) <= limit:
        return list(texts)
    if limit < 1:
        raise ValueError(f"sample: limit is {limit}, wanted at least 1.")
    kept = sorted(range(len(texts)), key=lambda i: (digest("sample", texts[i]), i))[:limit]
    return [texts[i] for i in sorted(kept)]


def digest(key: str, text: str) -> bytes:
    """32 bytes that look random, fixed by the key and the text on every machine."""
    return hashlib.sha256(f"{key}\0{text}".encode()).digest()


def _clean(path: Path, text: str) -> str:
    """Runs of white space made one blank. ValueError for what no encoding can write."""
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"read_file: {path} holds \\u{ord(half[0]):x}, half of a character; write the other "
            "half, or take it out."
        )
    return " ".join(text.split())


def _rows(path: Path, suffix: str) -> list[dict] | list[str]:
    content = _decode(path)
    if suffix in (".csv", ".tsv"):
        return _table_rows(path, content, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json":
        return _records(path, [(1, content)]) if content.strip() else []
    if suffix == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        return _records(path, [(i, line) for i, line in lines if line.strip()])
    return content.splitlines()


def _records(path: Path, documents: list[tuple[int, str]]) -> list[dict] | list[str]:
    """Rows out of JSON documents, each given with its line: all objects, or all strings."""
    rows = []
    for line, document in documents:
        try:
            row = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"read_file: {path} line {line} is no valid JSON: {error}.") from None
        rows.extend(row if isinstance(row, list) and len(documents) == 1 else [row])
    kinds = {type(row) for row in rows}
    if not (kinds <= {dict} or kinds <= {str}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"read_file: {path} holds JSON rows of type {names}; wanted objects or strings."
        )
    return rows


def _table_rows(path: Path, content: str, separator: str) -> list[dict]:
    import pandas

    try:
        # Cells are texts: "NA" and "null" are words here, and numbers stay as they are written.
        table = pandas.read_csv(
            io.StringIO(content), sep=separator, dtype=str, keep_default_na=False
        )
    except pandas.errors.EmptyDataError:
        return []
    except (pandas.errors.ParserError, ValueError, OverflowError) as error:
        reason = printable(str(error))
        raise ValueError(f"read_file: {path} is no valid table: {reason}.") from None
    return table.to_dict("records")


def _parquet_rows(path: Path) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    rows, size = [], 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            size += batch.nbytes + ROW_BYTES * batch.num_rows
            if size > MAX_TABLE_BYTES:
                break
            rows += batch.to_pylist()
    # Damage is told as any of these, and texts that are no UTF-8 are found last.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = printable(str(error))
        raise ValueError(f"read_file: {path} is no valid Parquet file: {reason}.") from None
    if size > MAX_TABLE_BYTES:
        raise ValueError(
            f"read_file: {path} takes more than {MAX_TABLE_BYTES} bytes when it is read; cut it."
        )
    return rows


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data:
        raise ValueError(
            f"read_file: {path} is a binary file; wanted text in UTF-8 ({', '.join(SUFFIXES)})."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"read_file: {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{error.start} (line {line}); convert it, e.g. `iconv -f latin1 -t utf-8`."
        ) from None


def join_columns(path: Path, rows: list[dict], column: str | None) -> list[str]:
    """The texts of a table's rows: a column, several joined ("a+b"), or the one found by itself.

    ValueError for a column that is absent or holds no texts; `path` is for messages.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if column is None:
        names = [text_column(path, rows, columns)]
        logger.info("read_file: %s: the texts are column %r", path, names[0])
    else:
        names = [column] if column in columns else column.split("+")
    for name in names:
        if name not in columns:
            raise ValueError(f"read_file: {path} has no column {name!r}; it has {_list(columns)}.")
        for i, row in enumerate(rows):
            if _cell(row, name) is None:
                raise ValueError(
                    f"read_file: column {name!r} of {path} holds a {type(row[name]).__name__} in "
                    f"row {i + 1}, wanted texts; the columns are {_list(columns)}."
                )
    return [" ".join(_cell(row, name) for name in names) for row in rows]


def _cell(row: dict, name: str) -> str | None:
    """The text of a cell, empty if the cell is; None if it holds something else."""
    cell = row.get(name)
    if isinstance(cell, list) and all(isinstance(token, str) for token in cell):
        return " ".join(cell)
    return "" if cell is None else cell if isinstance(cell, str) else None


def text_column(path: Path, rows: list[dict], columns: list[str]) -> str:
    """The column named as texts are, or that of most text. ValueError if none holds texts alone."""
    lengths = {}
    for name in columns:
        cells = [_cell(row, name) for row in rows]
        if None not in cells:
            lengths[name] = sum(map(len, cells))
    if not lengths:
        raise ValueError(
            f"read_file: {path} has no column of texts; it has {_list(columns)}. "
            f"Write the texts to a file with one text a line."
        )
    for wanted in TEXT_COLUMNS:
        for name in lengths:
            if name.lower() == wanted:
                return name
    return max(lengths, key=lengths.get)


def _list(columns: list) -> str:
    return printable(", ".join(str(name) for name in columns))
