"""Rating files to checked tables, without a loop over rows.

A CSV or TSV file is read as lines first, so that every complaint names the line it is about; only
lines that are well-formed go through the CSV parser.
"""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from mimnet_fast.cdr.errors import UserError

OnError = Literal["raise", "skip"]

_REQUIRED = ("user_id", "item_id", "rating")
_OPTIONAL = ("timestamp",)
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".csv.gz": ",", ".tsv.gz": "\t"}


@dataclass(frozen=True)
class RatingTable:
    """The ratings of one file."""

    ratings: pl.DataFrame
    """Columns user_id, item_id (text, as written), rating and, where given, timestamp (float)."""
    skipped: pl.DataFrame
    """Malformed rows that were left out: line, reason, text.

    Lines count from 1, the header's; in a Parquet file it is the row that counts from 1.
    """
    duplicates: int
    """Ratings that a later rating of the same user and item replaced."""


def read_ratings(path: Path, *, on_error: OnError = "raise") -> RatingTable:
    """Read one file of ratings with the header ``user_id,item_id,rating[,timestamp]``.

    Columns may come in any order. Of several ratings of one item by one user the last one counts.

    Args:
        path: ``.csv`` or ``.tsv`` (UTF-8, plain or ``.gz``) or ``.parquet``.
        on_error: ``"raise"`` stops at a malformed row, ``"skip"`` leaves it out and lists it.

    Raises:
        UserError: naming file, line and reason; also for a file without a single rating.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    name = path.name.lower()
    unit = "row" if name.endswith(".parquet") else "line"
    try:
        if unit == "row":
            rows = _parquet_rows(path)
        elif separator := next((s for end, s in _SEPARATORS.items() if name.endswith(end)), None):
            rows = _text_rows(path, separator)
        else:
            raise UserError(
                f"{path}: unknown kind of file, need .parquet, {', '.join(sorted(_SEPARATORS))}"
            )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error

    rows = _with_values(rows)
    malformed = rows.filter(pl.col("reason").is_not_null()).select("line", "reason", "text")
    if not malformed.is_empty() and on_error == "raise":
        number, reason, _ = malformed.row(0)
        raise UserError(
            f"{path}, {unit} {number}: {reason} ({malformed.height} of {rows.height} rows are "
            "malformed): correct the file or leave such rows out with --on-error skip"
        )
    valid = rows.filter(pl.col("reason").is_null()).drop("line", "reason", "text")
    if valid.is_empty():
        raise UserError(f"{path}: no ratings, need at least one row below the header")
    ratings = valid.unique(["user_id", "item_id"], keep="last", maintain_order=True)
    return RatingTable(ratings, malformed, valid.height - ratings.height)


def _text_rows(path: Path, separator: str) -> pl.DataFrame:
    """Columns line, text, reason and the file's own columns as text; null where malformed."""
    try:
        lines = pl.read_lines(
            path, name="text", row_index_name="line", row_index_offset=1, glob=False
        )
    except pl.exceptions.ComputeError as error:
        raise UserError(f"{path}, line {_first_undecodable_line(path)}: not UTF-8 text") from error
    if lines.is_empty():
        raise UserError(f"{path}: the file is empty, need a header {','.join(_REQUIRED)}")
    header = lines["text"][0].removeprefix("\ufeff")
    columns = next(csv.reader([header], delimiter=separator), [])
    _check_columns(path, columns)

    field = rf'(?:"(?:[^"]|"")*"|[^"{separator}]*)'
    well_formed = rf"^{field}(?:{separator}{field}){{{len(columns) - 1}}}$"
    text = pl.col("text")
    width = text.str.replace_all(r'"(?:[^"]|"")*"', "").str.count_matches(separator) + 1
    rows = lines[1:].with_columns(
        reason=pl.when(text.str.contains(well_formed))
        .then(None)
        .when(text == "")
        .then(pl.lit("the line is empty"))
        .when(width != len(columns))
        .then(pl.format("{} columns, need {}", width, len(columns)))
        .otherwise(pl.lit('a quotation mark (") inside a field or without its pair'))
    )
    good = rows.filter(pl.col("reason").is_null())
    well_formed_text = f"{separator.join(columns)}\n{good['text'].str.join(chr(10)).item()}"
    fields = pl.read_csv(
        io.BytesIO(well_formed_text.encode()), separator=separator, infer_schema=False
    )
    return rows.join(
        fields.with_columns(line=good["line"]), on="line", how="left", maintain_order="left"
    )


def _parquet_rows(path: Path) -> pl.DataFrame:
    """Like `_text_rows`, with row numbers from 1 as lines and numbers left as they are."""
    rows = pl.read_parquet(path, glob=False)
    _check_columns(path, rows.columns)
    for column, dtype in rows.schema.items():
        is_id = column.endswith("_id")
        if not (dtype == pl.String or dtype.is_integer() or (dtype.is_numeric() and not is_id)):
            need = "text or integers" if is_id else "numbers"
            raise UserError(f"{path}: column {column} is of type {dtype}, need {need}")
    return rows.select(
        pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).alias("line"),
        pl.concat_str(pl.all().cast(pl.String).fill_null(""), separator=",").alias("text"),
        pl.lit(None, pl.String).alias("reason"),
        pl.col("user_id", "item_id").cast(pl.String),
        pl.exclude("user_id", "item_id"),
    )


def _check_columns(path: Path, columns: list[str]) -> None:
    got = ", ".join(columns) or "nothing"
    need = f"need {', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}, got {got}"
    if missing := [name for name in _REQUIRED if name not in columns]:
        raise UserError(f"{path}, line 1: missing column {', '.join(missing)}; {need}")
    if unknown := [name for name in columns if name not in _REQUIRED + _OPTIONAL]:
        raise UserError(f"{path}, line 1: unknown column {', '.join(map(repr, unknown))}; {need}")
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}, line 1: a column is named twice; {need}")


def _with_values(rows: pl.DataFrame) -> pl.DataFrame:
    """Numbers parsed; the first reason against each row, null for a good one."""
    numeric = [name for name in ("rating", "timestamp") if name in rows.columns]
    reasons = [pl.col("reason")]
    for name in ("user_id", "item_id"):
        blank = pl.col(name).is_null() | (pl.col(name).str.strip_chars() == "")
        reasons.append(pl.when(blank).then(pl.lit(f"{name} is missing")))
    for name in numeric:
        written, value = pl.col(name).cast(pl.String).fill_null(""), _number(rows, name)
        reasons += [
            pl.when(value.is_null()).then(pl.format(f"{name} '{{}}' is not a number", written)),
            pl.when(~value.is_finite()).then(pl.format(f"{name} '{{}}' is not finite", written)),
        ]
    return rows.with_columns(
        pl.coalesce(reasons).alias("reason"),
        *(_number(rows, name).alias(name) for name in numeric),
    )


def _number(rows: pl.DataFrame, name: str) -> pl.Expr:
    text = rows.schema[name] == pl.String
    column = pl.col(name).str.strip_chars() if text else pl.col(name)
    return column.cast(pl.Float64, strict=False)


def _first_undecodable_line(path: Path) -> int:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        data = gzip.decompress(data)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data.count(b"\n", 0, error.start) + 1
    raise AssertionError(f"{path} is UTF-8 text after all")
