"""Rating files to checked tables, in blocks of lines, without a loop over rows.

A text file is read as lines first, so that every complaint names the line it is about; only lines
that are well-formed go through the CSV parser. A block is some ten megabytes and leaves numbers
behind (ids as categories), so the memory follows the count of ratings, not the size of the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal, cast

import polars as pl
from rich.progress import Progress

from mimnet_fast.cdr.errors import UserError

OnError = Literal["raise", "skip"]
Format = Literal["auto", "amazon", "csv", "recbole"]

_REQUIRED = ("user_id", "item_id", "rating")
_OPTIONAL = ("timestamp",)
_COLUMNS = _REQUIRED + _OPTIONAL
_RECBOLE_TYPES = dict(zip(_COLUMNS, ("token", "token", "float", "float"), strict=True))
_JSON_FIELDS = dict(zip(_COLUMNS, ("reviewerID", "asin", "overall", "unixReviewTime"), strict=True))
_ASIN_LENGTH = 10
SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
JSON_SUFFIXES = (".json", ".jsonl")
_SUFFIXES = (*SEPARATORS, *JSON_SUFFIXES)

_BLOCK_BYTES = 16 << 20
_BLOCK_ROWS = 1 << 20
_QUOTED = '"(?:[^"]|"")*"'
_JSON_TYPE = pl.Struct(dict.fromkeys(_JSON_FIELDS.values(), pl.String))
_NOTHING_MALFORMED = pl.DataFrame(
    schema={"line": pl.UInt32, "reason": pl.String, "text": pl.String}
)


@dataclass(frozen=True)
class RatingTable:
    """The ratings of one file."""

    path: Path
    format: str
    """What the file turned out to be, in words."""
    ratings: pl.DataFrame
    """Columns line, user_id, item_id (categories, named as written), rating and, where given,
    timestamp (float); in the order of the file.

    Lines count from 1, the first of the file; in a Parquet file it is the row that counts from 1.
    """
    skipped: pl.DataFrame
    """Malformed rows that were left out: line, reason, text."""
    unused_columns: tuple[str, ...]
    """Further columns of a RecBole file."""

    @property
    def unit(self) -> str:
        """What ``line`` counts: `line` or `row`."""
        return _unit(self.path)


def read_ratings(
    path: Path,
    *,
    format: Format = "auto",
    on_error: OnError = "raise",
    progress: Progress | None = None,
) -> RatingTable:
    """Read one file of ratings.

    ============ ===================================================================================
    ``format``   file
    ============ ===================================================================================
    ``csv``      CSV, TSV or Parquet with the header ``user_id,item_id,rating[,timestamp]``, columns
                 in any order
    ``amazon``   Amazon reviews as JSON lines (``reviewerID``, ``asin``, ``overall``,
                 ``unixReviewTime``), or Amazon ratings as CSV without a header: user, item, rating,
                 timestamp, or item first, as in the release of 2018. Item ids have ten characters
    ``recbole``  atomic file of RecBole: tabs, header ``user_id:token``, ``item_id:token``,
                 ``rating:float`` and optionally ``timestamp:float``; more columns are not used
    ``auto``     the one of the three that suffix and first line tell
    ============ ===================================================================================

    Text files are UTF-8, plain or ``.gz``. Rows that repeat a user and an item all stay.

    Args:
        path: The file.
        format: See above.
        on_error: ``"raise"`` stops at a malformed row, ``"skip"`` leaves it out and lists it.
        progress: Gets a task that counts the bytes that were read.

    Raises:
        UserError: naming file, line and reason; also for a file without a single rating.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if suffix(path) == ".parquet":
            return _collect(path, *_parquet(path, format), on_error)
        with opened(path, progress or Progress(disable=True)) as file:
            return _collect(path, *_text(path, format, file), on_error)
    except (OSError, EOFError, zlib.error, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def suffix(path: Path) -> str:
    """What tells the kind of a file: the ending of its name, without that of gzip."""
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def _unit(path: Path) -> str:
    return "row" if suffix(path) == ".parquet" else "line"


@contextmanager
def opened(path: Path, progress: Progress) -> Iterator[BinaryIO]:
    """The text of a file; the bar counts bytes on disk."""
    with progress.open(path, "rb", description=f"reading {path.name}") as raw:
        file = cast(BinaryIO, io.BufferedReader(raw, 1 << 20))
        zipped = path.name.lower().endswith(".gz")
        yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file


@dataclass(frozen=True)
class _Layout:
    """Where the columns of a file are."""

    format: str
    columns: tuple[str, ...]
    """All columns in the order of the file; the known ones under their names here."""
    written: dict[str, str]
    """Known columns as the file names them."""

    @property
    def known(self) -> list[str]:
        return [name for name in _COLUMNS if name in self.columns]


@dataclass(frozen=True)
class _Block:
    """Part of a file."""

    rows: pl.DataFrame
    """Columns line and text, then the known ones as well."""
    malformed: pl.DataFrame
    """Columns line, reason, text."""


def _collect(
    path: Path, layout: _Layout, blocks: Iterator[_Block], on_error: OnError
) -> RatingTable:
    ratings, skipped = [], []
    for block in blocks:
        block = _checked(block, layout)
        if not block.malformed.is_empty() and on_error == "raise":
            line, reason, _ = block.malformed.sort("line").row(0)
            raise UserError(
                f"{path}, {_unit(path)} {line}: {reason}: correct the file or leave malformed rows "
                "out with --on-error skip"
            )
        ratings.append(block.rows)
        skipped.append(block.malformed)
    malformed = pl.concat(skipped or [_NOTHING_MALFORMED]).sort("line")
    if not any(block.height for block in ratings):
        why = (
            "" if malformed.is_empty() else f" ({_unit(path)} {{}}: {{}})".format(*malformed.row(0))
        )
        raise UserError(f"{path}: no ratings, need at least one well-formed row{why}")
    unused = tuple(name for name in layout.columns if name not in _COLUMNS)
    return RatingTable(path, layout.format, pl.concat(ratings), malformed, unused)


def _checked(block: _Block, layout: _Layout) -> _Block:
    """Numbers parsed and ids as categories; rows with a missing or wrong value are malformed."""
    rows = block.rows
    right, reasons = [], []
    for name in layout.known:
        written, text = layout.written[name], pl.col(name).cast(pl.String)
        filled = text.str.strip_chars().str.len_bytes().fill_null(0) > 0
        reasons.append(pl.when(~filled).then(pl.lit(f"{written} is missing")))
        right.append(filled)
        if not name.endswith("_id"):
            value = _number(rows, name)
            right.append(value.is_finite().fill_null(False))
            reasons += [
                pl.when(value.is_null()).then(pl.format(f"{written} '{{}}' is not a number", text)),
                pl.when(~value.is_finite()).then(
                    pl.format(f"{written} '{{}}' is not finite", text)
                ),
            ]
    is_right = rows.select(pl.all_horizontal(right)).to_series()
    wrong = rows.filter(~is_right).select("line", pl.coalesce(reasons).alias("reason"), "text")
    return _Block(
        rows.filter(is_right).select(
            pl.col("line").cast(pl.UInt32),
            pl.col("user_id", "item_id").cast(pl.String).cast(pl.Categorical),
            *(_number(rows, name).alias(name) for name in layout.known[2:]),
        ),
        pl.concat([block.malformed, wrong]),
    )


def _number(rows: pl.DataFrame, name: str) -> pl.Expr:
    text = rows.schema[name] == pl.String
    column = pl.col(name).str.strip_chars() if text else pl.col(name)
    return column.cast(pl.Float64, strict=False)


# Text


def _text(path: Path, format: Format, file: BinaryIO) -> tuple[_Layout, Iterator[_Block]]:
    block = _next(file).removeprefix("\ufeff".encode())
    if not block:
        raise UserError(f"{path}: the file is empty")
    if format == "auto":
        format = _detect(path, block)
    if format == "amazon" and (suffix(path) in JSON_SUFFIXES or block.startswith(b"{")):
        layout = _Layout("Amazon reviews", _COLUMNS, _JSON_FIELDS)
        return layout, (_parsed_json(lines) for lines in _lines(file, block, first=1))
    separator = "\t" if format == "recbole" else SEPARATORS.get(suffix(path), ",")
    first = 1
    if format == "amazon":
        layout = _amazon_ratings(block, separator)
    else:
        header, _, block = block.partition(b"\n")
        first = 2
        names = _fields(header, separator)
        layout = _recbole(path, names) if format == "recbole" else _table(path, names)
    lines = _lines(file, block, first)
    return layout, (_parsed_fields(rows, layout, separator) for rows in lines)


def _next(file: BinaryIO) -> bytes:
    return file.read(_BLOCK_BYTES) + file.readline()


def _detect(path: Path, block: bytes) -> Format:
    kind = suffix(path)
    if kind in JSON_SUFFIXES:
        return "amazon"
    if kind == ".inter":
        return "recbole"
    if kind not in SEPARATORS:
        raise UserError(
            f"{path}: unknown kind of file: name it .parquet or "
            f"{', '.join(_SUFFIXES)} (also .gz), or tell with --format"
        )
    fields = _fields(block.partition(b"\n")[0], SEPARATORS[kind])
    is_rating = len(fields) == len(_COLUMNS) and all(map(_is_number, fields[2:]))
    return "amazon" if is_rating else "csv"


def _fields(line: bytes, separator: str) -> list[str]:
    text = line.decode(errors="replace").rstrip("\r")
    return next(csv.reader([text], delimiter=separator), [])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _table(path: Path, names: list[str]) -> _Layout:
    got = ", ".join(names) or "nothing"
    need = f"need {', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}, got {got}"
    where = f"{path}, line 1"
    if missing := [name for name in _REQUIRED if name not in names]:
        raise UserError(f"{where}: missing column {', '.join(missing)}; {need}")
    if unknown := [name for name in names if name not in _COLUMNS]:
        raise UserError(f"{where}: unknown column {', '.join(map(repr, unknown))}; {need}")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: a column is named twice; {need}")
    return _Layout("table", tuple(names), {name: name for name in names})


def _recbole(path: Path, names: list[str]) -> _Layout:
    types = {name: kind for name, _, kind in (name.rpartition(":") for name in names)}
    for name, need in _RECBOLE_TYPES.items():
        if types.get(name, need if name in _OPTIONAL else "") != need:
            raise UserError(
                f"{path}, line 1: need the column {name}:{need} between tabs, got "
                f"{', '.join(names) or 'nothing'}"
            )
    if len(types) < len(names):
        raise UserError(f"{path}, line 1: a column is named twice: got {', '.join(names)}")
    return _Layout("RecBole atomic file", tuple(types), {name: name for name in types})


def _amazon_ratings(block: bytes, separator: str) -> _Layout:
    """The column that holds ten characters in every row is the item; else it is the second."""
    fields = (_fields(line, separator) for line in block.splitlines()[:1000])
    heads = [row[:2] for row in fields if len(row) == len(_COLUMNS)]
    first, second = (all(len(row[k]) == _ASIN_LENGTH for row in heads) for k in (0, 1))
    if first and not second:
        columns = ("item_id", "user_id", *_COLUMNS[2:])
        return _Layout("Amazon ratings, items first", columns, {name: name for name in columns})
    return _Layout("Amazon ratings, users first", _COLUMNS, {name: name for name in _COLUMNS})


def _lines(file: BinaryIO, block: bytes, first: int) -> Iterator[_Block]:
    """Numbered lines of the block that was read already and of the rest of the file."""
    for part in chain([block], iter(partial(_next, file), b"")):
        try:
            rows = pl.read_lines(
                io.BytesIO(part), name="text", row_index_name="line", row_index_offset=first
            )
            malformed = _NOTHING_MALFORMED
        except pl.exceptions.ComputeError:
            rows, malformed = _without_undecodable(part, first)
        yield _Block(rows, malformed)
        first += part.count(b"\n")


def _without_undecodable(block: bytes, first: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    texts: list[list[tuple[int, str]]] = [[], []]
    for line, raw in enumerate(block.removesuffix(b"\n").split(b"\n"), first):
        try:
            texts[0].append((line, raw.decode().removesuffix("\r")))
        except UnicodeDecodeError:
            texts[1].append((line, raw.decode(errors="backslashreplace")))
    schema = {"line": pl.UInt32, "text": pl.String}
    rows, bad = (pl.DataFrame(part, schema, orient="row") for part in texts)
    return rows, bad.select("line", pl.lit("not UTF-8 text").alias("reason"), "text")


def _parsed_fields(block: _Block, layout: _Layout, separator: str) -> _Block:
    field, text = rf'(?:{_QUOTED}|[^"{separator}]*)', pl.col("text")
    need = len(layout.columns)
    is_good = block.rows["text"].str.contains(rf"^{field}(?:{separator}{field}){{{need - 1}}}$")
    width = text.str.replace_all(_QUOTED, "").str.count_matches(separator, literal=True) + 1
    malformed = block.rows.filter(~is_good).select(
        "line",
        pl.when(text == "")
        .then(pl.lit("the line is empty"))
        .when(width != need)
        .then(pl.format("{} columns, need {}", width, need))
        .otherwise(pl.lit('a quotation mark (") inside a field or without its pair'))
        .alias("reason"),
        "text",
    )
    good = block.rows.filter(is_good)
    fields = pl.read_csv(
        io.BytesIO(good["text"].str.join("\n").item().encode()),
        has_header=False,
        separator=separator,
        schema=dict.fromkeys(layout.columns, pl.String),
        raise_if_empty=False,
    )
    return _Block(good.hstack(fields.select(layout.known)), pl.concat([block.malformed, malformed]))


def _parsed_json(block: _Block) -> _Block:
    parts = list(_decoded(block.rows))
    return _Block(
        pl.concat([part.rows for part in parts]),
        pl.concat([block.malformed, *(part.malformed for part in parts)]),
    )


def _decoded(rows: pl.DataFrame) -> Iterator[_Block]:
    """Halve the lines until those are alone that cannot be parsed: the parser names none."""
    with suppress(pl.exceptions.ComputeError):
        objects = rows["text"].str.json_decode(dtype=_JSON_TYPE)
        if len(objects) == rows.height:
            fields = objects.struct.unnest().rename({b: a for a, b in _JSON_FIELDS.items()})
            yield _Block(rows.hstack(fields), _NOTHING_MALFORMED)
            return
    if rows.height == 1:
        ((line, text),) = rows.rows()
        yield _Block(
            rows.clear().with_columns(pl.lit("").alias(name) for name in _COLUMNS),
            pl.DataFrame([(line, _reason(text), text)], _NOTHING_MALFORMED.schema, orient="row"),
        )
        return
    half = rows.height // 2
    yield from _decoded(rows[:half])
    yield from _decoded(rows[half:])


def _reason(text: str) -> str:
    """Why a line is no review."""
    if not text.strip():
        return "the line is empty"
    try:
        review = json.loads(text)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    if not isinstance(review, dict):
        return "need a JSON object"
    return f"need text or numbers in {', '.join(_JSON_FIELDS.values())}"


# Parquet


def _parquet(path: Path, format: Format) -> tuple[_Layout, Iterator[_Block]]:
    if format not in ("auto", "csv"):
        raise UserError(f"{path}: --format {format} is a text format, and this is a Parquet file")
    schema = pl.read_parquet_schema(path)
    layout = _table(path, list(schema))
    for column, dtype in schema.items():
        is_id = column.endswith("_id")
        if not (dtype == pl.String or dtype.is_integer() or (dtype.is_numeric() and not is_id)):
            need = "text or integers" if is_id else "numbers"
            raise UserError(f"{path}: column {column} is of type {dtype}, need {need}")
    rows = pl.read_parquet(path, glob=False, row_index_name="line", row_index_offset=1)
    written = pl.concat_str(
        pl.col(layout.columns).cast(pl.String).fill_null(""), separator=","
    ).alias("text")
    return layout, (
        _Block(part.with_columns(written), _NOTHING_MALFORMED)
        for part in rows.iter_slices(_BLOCK_ROWS)
    )
