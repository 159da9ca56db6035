"""Item metadata: which items share a category or a brand."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
from rich.progress import Progress
from torch import Tensor

from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.readers import JSON_SUFFIXES, SEPARATORS, opened, suffix

KINDS = ("category", "brand")
_SCHEMA = {"item_id": pl.String, "kind": pl.String, "value": pl.String}


@dataclass(frozen=True)
class ItemGroups:
    """One kind of metadata: membership of items in groups, one row each."""

    kind: str
    """One of `KINDS`."""
    items: Tensor
    """Index of the item, int64 ``[n]``."""
    groups: Tensor
    """Index of the category or brand, from 0, int64 ``[n]``."""


def read_metadata(path: Path, progress: Progress | None = None) -> pl.DataFrame:
    """Categories and brands of items.

    Either a table (CSV, TSV or Parquet) with the header ``item_id`` and ``category``, ``brand`` or
    both, where an item of several categories has several rows; or the metadata of Amazon's reviews,
    an object in each line: ``asin``, ``brand``, and ``categories`` (2014: paths of names) or
    ``category`` (2018: one path). Every name on a path counts. The objects of 2014 are literals of
    Python and no JSON; both are read. Text is UTF-8, plain or ``.gz``.

    Returns:
        Columns item_id, kind (``"category"`` or ``"brand"``) and value, all text, no row twice.

    Raises:
        UserError: naming the file, the line and what is wrong; also for a file without any.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = suffix(path)
    try:
        if kind == ".parquet":
            found = _melted(path, pl.read_parquet(path, glob=False))
        elif kind in JSON_SUFFIXES:
            with opened(path, progress or Progress(disable=True)) as file:
                found = pl.DataFrame(list(_rows(path, file)), _SCHEMA, orient="row")
        elif kind in SEPARATORS:
            with opened(path, progress or Progress(disable=True)) as file:
                table = pl.read_csv(file.read(), separator=SEPARATORS[kind], infer_schema=False)
            found = _melted(path, table)
        else:
            names = ", ".join((".parquet", *SEPARATORS, *JSON_SUFFIXES))
            raise UserError(f"{path}: unknown kind of file: name it one of {names} (also .gz)")
    except (OSError, EOFError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if found.is_empty():
        raise UserError(f"{path}: no category and no brand of any item")
    return found.unique(maintain_order=True)


def _melted(path: Path, table: pl.DataFrame) -> pl.DataFrame:
    kinds = [kind for kind in KINDS if kind in table.columns]
    if "item_id" not in table.columns or not kinds:
        raise UserError(
            f"{path}, line 1: need the column item_id and category, brand or both, got "
            f"{', '.join(table.columns) or 'nothing'}"
        )
    text = table.select(pl.col("item_id", *kinds).cast(pl.String).str.strip_chars())
    long = text.unpivot(kinds, index="item_id", variable_name="kind")
    filled = pl.all_horizontal(pl.col("item_id", "value").str.len_bytes().fill_null(0) > 0)
    return long.filter(filled).select(pl.col(_SCHEMA))


def _rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        found = _object(line, where)
        item = found.get("asin")
        if not isinstance(item, str) or not item:
            raise UserError(f"{where}: asin is missing")
        names: list[tuple[str, Any]] = [("brand", found.get("brand"))]
        paths = found.get("categories") or [found.get("category") or []]
        names += [("category", name) for path_names in paths for name in path_names]
        for kind, name in names:
            if isinstance(name, str) and name.strip():
                yield item, kind, name.strip()


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        try:
            found = ast.literal_eval(line.decode().strip())
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{where}: neither JSON nor a literal of Python: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: need an object, got {type(found).__name__}")
    return found
