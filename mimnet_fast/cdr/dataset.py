"""The prepared dataset: two domains with their shared users, as a folder and as tensors.

The folder holds `dataset.json` (counts, checksums, options), the mapping tables
`{source,target}_{users,items}.parquet` (row number = index, ids as written) and
`{source,target}_ratings.parquet` (indices, in the order of the raw file), and, where metadata was
given, `source_metadata.parquet` (item, kind of metadata, value). The O users of both
domains are the first O rows of both user tables, sorted by id (as numbers when all of these ids are
64-bit integers), so that index u < O means the same person everywhere.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.progress import Progress
from torch import Tensor

import mimnet_fast
from mimnet_fast.cdr.atomic import atomic_folder, sha256
from mimnet_fast.cdr.cleaning import Cleaned, Duplicates, clean
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.metadata import KINDS, ItemGroups, read_metadata
from mimnet_fast.cdr.readers import Format, OnError, RatingTable, read_ratings

FORMAT = "mimnet_fast.dataset"
FORMAT_VERSION = 1
DOMAINS = ("source", "target")
_METADATA = "source_metadata.parquet"


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
    source_groups: tuple[ItemGroups, ...] = ()
    """Categories and brands of the source items, as far as the dataset has them."""

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
            if not path.is_file() or sha256(path) != checksum:
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
            source_groups=_load_groups(folder / _METADATA) if _METADATA in info["tables"] else (),
            **counts,
        )


def prepare(
    source: Path,
    target: Path,
    out: Path,
    *,
    source_metadata: Path | None = None,
    format: Format = "auto",
    on_error: OnError = "raise",
    duplicates: Duplicates = "last",
    min_user_ratings: int = 1,
    min_item_ratings: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turn two rating files into a dataset folder, which appears complete or not at all.

    `dataset.json` counts what each step removed. With ``on_error="skip"`` the malformed rows are
    listed in `skipped.csv`.

    Args:
        source: Ratings of the domain whose users are known.
        target: Ratings of the domain to predict; user ids are shared with ``source``, item ids not.
        out: A new folder.
        source_metadata: Categories and brands of the source items (see `read_metadata`).
        format: Of both files of ratings (see `read_ratings`).
        on_error: ``"raise"`` or ``"skip"`` malformed rows.
        duplicates: See `clean`, like the minima, which hold within each domain.
        min_user_ratings: Fewest ratings of a user.
        min_item_ratings: Fewest ratings of an item.
        progress: Gets a task for each file.

    Returns:
        What `dataset.json` says.

    Raises:
        UserError: unusable files or options, no user in both of them, metadata of no item in them,
            or ``out`` exists.
    """
    cleaning: dict[str, Any] = {
        "duplicates": duplicates,
        "min_user_ratings": min_user_ratings,
        "min_item_ratings": min_item_ratings,
    }
    with atomic_folder(out) as folder:
        skipped, info, left = {}, {}, {}
        for domain, path in (("source", source), ("target", target)):
            table = read_ratings(path, format=format, on_error=on_error, progress=progress)
            cleaned = clean(table, **cleaning)
            skipped[domain], left[domain] = table.skipped, cleaned.ratings
            info[domain] = _summary(table, cleaned)
        users = {domain: _names(ratings["user_id"]) for domain, ratings in left.items()}
        shared = users["source"].is_in(users["target"].implode())
        overlap = _sort_ids(users["source"].filter(shared))
        if overlap.is_empty():
            raise UserError(
                f"no user_id of {source} (such as {users['source'][0]!r}) occurs in {target} "
                f"(such as {users['target'][0]!r}): both files must name the same people alike"
            )
        for domain, ratings in left.items():
            only_here = users[domain].filter(~users[domain].is_in(overlap.implode()))
            user_ids = pl.concat([overlap, _sort_ids(only_here)])
            info[domain] |= _write_domain(folder, domain, ratings, user_ids)
        if source_metadata is not None:
            info["source"]["metadata"] = _write_metadata(folder, source_metadata, progress)
        _write_skipped(folder / "skipped.csv", skipped)
        summary = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "mimnet_fast": mimnet_fast.__version__,
            "options": {"format": format, "on_error": on_error, **cleaning},
            "overlap_users": overlap.len(),
            **info,
            "tables": {path.name: sha256(path) for path in sorted(folder.glob("*.parquet"))},
        }
        (folder / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _summary(table: RatingTable, cleaned: Cleaned) -> dict[str, Any]:
    ratings = cleaned.ratings
    return {
        "file": table.path.name,
        "sha256": sha256(table.path),
        "kind": table.format,
        "unused_columns": list(table.unused_columns),
        "rows": table.ratings.height + table.skipped.height,
        "removed": cleaned.removed,
        "ratings": ratings.height,
        "mean_rating": ratings["rating"].mean(),
        "timestamps": "timestamp" in ratings.columns,
    }


def _write_domain(
    folder: Path, domain: str, ratings: pl.DataFrame, user_ids: pl.Series
) -> dict[str, int]:
    """Write the three tables of one domain; the counts of users and items."""
    ids = {"user": user_ids, "item": _sort_ids(_names(ratings["item_id"]))}
    columns = []
    for kind, names in ids.items():
        names.to_frame(f"{kind}_id").write_parquet(folder / f"{domain}_{kind}s.parquet")
        codes = ratings[f"{kind}_id"].to_physical().to_numpy()
        index = np.empty(codes.max() + 1, np.int64)
        index[names.cast(pl.Categorical).to_physical().to_numpy()] = np.arange(names.len())
        columns.append(pl.Series(kind, index[codes]))
    values = ratings.drop("line", "user_id", "item_id")
    pl.DataFrame([*values, *columns]).rechunk().write_parquet(folder / f"{domain}_ratings.parquet")
    return {f"{kind}s": names.len() for kind, names in ids.items()}


def _write_metadata(folder: Path, path: Path, progress: Progress | None) -> dict[str, Any]:
    """Write the metadata of the items that have ratings; what was found."""
    items = pl.read_parquet(folder / "source_items.parquet").with_row_index("item")
    table = read_metadata(path, progress)
    known = table.join(items, on="item_id").select(pl.col("item").cast(pl.Int64), "kind", "value")
    if known.is_empty():
        raise UserError(
            f"{path}: none of its items (such as {table['item_id'][0]!r}) has ratings among those "
            f"of the source (such as {items['item_id'][0]!r}): both must name the same items alike"
        )
    known.sort("item", "kind", "value").write_parquet(folder / _METADATA)
    values = {kind: known.filter(kind=kind)["value"].n_unique() for kind in KINDS}
    return {
        "file": path.name,
        "sha256": sha256(path),
        "items": known["item"].n_unique(),
        "items_without_ratings": table["item_id"].n_unique() - known["item"].n_unique(),
        "values": values,
    }


def _write_skipped(path: Path, skipped: dict[str, pl.DataFrame]) -> None:
    rows = pl.concat(
        rows.select(pl.lit(domain).alias("domain"), pl.all()) for domain, rows in skipped.items()
    )
    if not rows.is_empty():
        rows.write_csv(path)


def _load_groups(path: Path) -> tuple[ItemGroups, ...]:
    table = pl.read_parquet(path, glob=False)
    found = []
    for kind in KINDS:
        rows = table.filter(kind=kind)
        if not rows.is_empty():
            groups = rows["value"].rank("dense").cast(pl.Int64) - 1
            found.append(ItemGroups(kind, rows["item"].to_torch(), groups.to_torch()))
    return tuple(found)


def _names(ids: pl.Series) -> pl.Series:
    return ids.unique(maintain_order=True).cast(pl.String)


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
