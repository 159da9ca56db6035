"""The prepared dataset: two domains with their shared users, as a folder and as tensors.

The folder holds `dataset.json` (counts, checksums, options), the mapping tables
`{source,target}_{users,items}.parquet` (row number = index, ids as written) and
`{source,target}_ratings.parquet` (indices, in the order of the raw file). The O users of both
domains are the first O rows of both user tables, sorted by id (as numbers when all of these ids are
64-bit integers), so that index u < O means the same person everywhere.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

import mimnet_fast
from mimnet_fast.cdr.atomic import atomic_folder
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.readers import OnError, RatingTable, read_ratings

FORMAT = "mimnet_fast.dataset"
FORMAT_VERSION = 1
DOMAINS = ("source", "target")


@dataclass(frozen=True)
class Ratings:
    """Ratings of one domain, one row each, in the order of the raw file."""

    users: Tensor
    """Index of the user, int64 ``[n]``."""
    items: Tensor
    """Index of the item, int64 ``[n]``."""
    values: Tensor
    """float32 ``[n]``."""
    timestamps: Tensor | None = None
    """float64 ``[n]``, where the raw file had them."""

    def __len__(self) -> int:
        return len(self.values)

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Users, items and values."""
        return self.users, self.items, self.values

    def where(self, keep: Tensor) -> Ratings:
        """The rows at which the bool tensor ``keep`` is true."""
        timestamps = None if self.timestamps is None else self.timestamps[keep]
        return Ratings(self.users[keep], self.items[keep], self.values[keep], timestamps)


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset in memory."""

    source: Ratings
    target: Ratings
    num_source_users: int
    num_source_items: int
    num_target_users: int
    num_target_items: int
    num_overlap: int
    """Users of both domains: indices 0 to num_overlap - 1 in both."""
    fingerprint: str
    """Checksum of all tables: two datasets with the same one are the same."""
    info: dict[str, Any]
    """What `dataset.json` says."""

    @staticmethod
    def load(folder: Path) -> Dataset:
        """Read a folder made by `prepare`, checking it against its checksums.

        Raises:
            UserError: the folder holds no dataset, one of another format version, or a damaged one.
        """
        try:
            info = json.loads((folder / "dataset.json").read_text())
        except FileNotFoundError:
            raise UserError(
                f"{folder} is no prepared dataset (it has no dataset.json): "
                "make one with mimnet-fast prepare"
            ) from None
        except ValueError as error:
            raise UserError(f"{folder / 'dataset.json'}: not JSON: {error}") from error
        if (info.get("format"), info.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise UserError(
                f"{folder}: got format {info.get('format')} version {info.get('format_version')}, "
                f"need {FORMAT} version {FORMAT_VERSION}: prepare the dataset again"
            )
        for name, checksum in info["tables"].items():
            path = folder / name
            if not path.is_file() or _sha256(path) != checksum:
                raise UserError(f"{path} is missing or damaged: prepare the dataset again")
        checksums = "".join(checksum for _, checksum in sorted(info["tables"].items()))
        counts = {
            f"num_{domain}_{kind}": info[domain][kind]
            for domain in DOMAINS
            for kind in ("users", "items")
        }
        return Dataset(
            source=_load_ratings(folder / "source_ratings.parquet"),
            target=_load_ratings(folder / "target_ratings.parquet"),
            num_overlap=info["overlap_users"],
            fingerprint=hashlib.sha256(checksums.encode()).hexdigest(),
            info=info,
            **counts,
        )


def prepare(
    source: Path, target: Path, out: Path, *, on_error: OnError = "raise"
) -> dict[str, Any]:
    """Turn two rating files into a dataset folder, which appears complete or not at all.

    With ``on_error="skip"`` the malformed rows are counted in `dataset.json` and listed in
    `skipped.csv`.

    Args:
        source: Ratings of the domain whose users are known (see `read_ratings`).
        target: Ratings of the domain to predict; user ids are shared with ``source``, item ids not.
        out: A new folder.
        on_error: ``"raise"`` or ``"skip"`` malformed rows.

    Returns:
        What `dataset.json` says.

    Raises:
        UserError: unusable files, no user in both of them, or ``out`` exists.
    """
    with atomic_folder(out) as folder:
        tables = {
            "source": read_ratings(source, on_error=on_error),
            "target": read_ratings(target, on_error=on_error),
        }
        users = {domain: table.ratings["user_id"].unique() for domain, table in tables.items()}
        shared = users["source"].is_in(users["target"].implode())
        overlap = _sort_ids(users["source"].filter(shared))
        if overlap.is_empty():
            raise UserError(
                f"no user_id of {source} (such as {users['source'][0]!r}) occurs in {target} "
                f"(such as {users['target'][0]!r}): both files must name the same people alike"
            )
        info: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "mimnet_fast": mimnet_fast.__version__,
            "options": {"on_error": on_error},
            "overlap_users": overlap.len(),
        }
        for domain, path in (("source", source), ("target", target)):
            only_here = users[domain].filter(~users[domain].is_in(overlap.implode()))
            user_ids = pl.concat([overlap, _sort_ids(only_here)])
            info[domain] = _write_domain(folder, domain, path, tables[domain], user_ids)
        _write_skipped(folder / "skipped.csv", tables)
        info["tables"] = {path.name: _sha256(path) for path in sorted(folder.glob("*.parquet"))}
        (folder / "dataset.json").write_text(json.dumps(info, indent=2) + "\n")
    return info


def _write_domain(
    folder: Path, domain: str, path: Path, table: RatingTable, user_ids: pl.Series
) -> dict[str, Any]:
    """Write the three tables of one domain; the domain's entry in `dataset.json`."""
    ids = {"user": user_ids, "item": _sort_ids(table.ratings["item_id"].unique())}
    ratings = table.ratings
    for kind, column in ids.items():
        mapping = pl.DataFrame({f"{kind}_id": column}).with_row_index(kind)
        mapping = mapping.cast({kind: pl.Int64})
        ratings = ratings.join(mapping, on=f"{kind}_id", how="left", maintain_order="left")
        mapping.select(f"{kind}_id").write_parquet(folder / f"{domain}_{kind}s.parquet")
    ratings.drop("user_id", "item_id").write_parquet(folder / f"{domain}_ratings.parquet")
    return {
        "file": path.name,
        "sha256": _sha256(path),
        "users": ids["user"].len(),
        "items": ids["item"].len(),
        "ratings": ratings.height,
        "mean_rating": ratings["rating"].mean(),
        "timestamps": "timestamp" in ratings.columns,
        "duplicate_rows": table.duplicates,
        "skipped_rows": table.skipped.height,
    }


def _write_skipped(path: Path, tables: dict[str, RatingTable]) -> None:
    skipped = pl.concat(
        table.skipped.select(pl.lit(domain).alias("domain"), pl.all())
        for domain, table in tables.items()
    )
    if not skipped.is_empty():
        skipped.write_csv(path)


def _sort_ids(ids: pl.Series) -> pl.Series:
    numbers = ids.cast(pl.Int64, strict=False)
    if numbers.null_count():
        return ids.sort()
    return ids.to_frame("id").with_columns(number=numbers).sort("number", "id")["id"]


def _load_ratings(path: Path) -> Ratings:
    table = pl.read_parquet(path, glob=False)
    timestamps = table["timestamp"].to_torch() if "timestamp" in table.columns else None
    return Ratings(
        users=table["user"].to_torch(),
        items=table["item"].to_torch(),
        values=table["rating"].to_torch().to(torch.float32),
        timestamps=timestamps,
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
