"""What preparing costs: `python -m bench.prepare` makes ratings and prepares them in a new process.

Users and items are drawn with the skew of real data, ids look like Amazon's. Each row of the table
is a format, with duplicates and the 5-core; its memory is the peak of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

SHARE = {"source": 0.7, "target": 0.3}
USERS, ITEMS = 800_000, 300_000
NAMES = {"amazon": "{}.json", "csv": "{}.csv", "recbole": "{}.inter"}
_STEP = 1_000_000
_TEXT = "It is what it says. " * 25
_MEASURED = """
import json, sys, time
from pathlib import Path
from mimnet_fast.cdr.dataset import prepare
source, target, out = map(Path, sys.argv[1:])
summary = prepare(source, target, out, min_user_ratings=5, min_item_ratings=5)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
summary["peak_mb"] = int(status["VmHWM"].split()[0]) / 1024
summary["cpu_seconds"] = time.process_time()
print(json.dumps(summary))
"""


def ratings(rng: np.random.Generator, count: int, items: str) -> pl.DataFrame:
    """A part of the ratings of one domain."""
    users = (USERS * rng.random(count) ** 3).astype(np.int64)
    chosen = (ITEMS * rng.random(count) ** 3).astype(np.int64)
    return pl.DataFrame(
        {
            "user_id": users,
            "item_id": chosen,
            "rating": rng.integers(1, 6, count).astype(np.float64),
            "timestamp": rng.integers(1_000_000_000, 1_400_000_000, count),
        }
    ).with_columns(
        pl.format("A{}", (pl.col("user_id") * 7919).cast(pl.String).str.zfill(13)).alias("user_id"),
        pl.format(f"{items}{{}}", pl.col("item_id").cast(pl.String).str.zfill(9)).alias("item_id"),
    )


def write(folder: Path, format: str, count: int) -> list[Path]:
    """Files of both domains, a million rows at a time."""
    rng = np.random.default_rng(0)
    paths = []
    for domain, share in SHARE.items():
        path = folder / NAMES[format].format(domain)
        left = round(count * share)
        with path.open("wb") as file:
            while left:
                part = ratings(rng, min(left, _STEP), domain[0].upper())
                header = left == round(count * share)
                if format == "amazon":
                    names = ("reviewerID", "asin", "overall", "unixReviewTime")
                    part.columns = list(names)
                    part.with_columns(pl.lit(_TEXT).alias("reviewText")).write_ndjson(file)
                elif format == "csv":
                    part.write_csv(file, include_header=header)
                else:
                    types = ("token", "token", "float", "float")
                    part.columns = [f"{n}:{t}" for n, t in zip(part.columns, types, strict=True)]
                    part.write_csv(file, include_header=header, separator="\t")
                left -= part.height
        paths.append(path)
    return paths


def measure(format: str, count: int) -> dict[str, float]:
    """Seconds and megabytes of one `prepare`, of files in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write(folder, format, count)
        size = sum(path.stat().st_size for path in paths)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, *map(str, paths), str(folder / "out")],
            check=True,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
    summary = json.loads(done.stdout)
    left = sum(summary[domain]["ratings"] for domain in SHARE)
    return {
        "gigabytes": size / 1e9,
        "seconds": seconds,
        "cpu_seconds": summary["cpu_seconds"],
        "peak_mb": summary["peak_mb"],
        "left": left,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each format."""
    parser = argparse.ArgumentParser(prog="python -m bench.prepare", description=__doc__)
    parser.add_argument("--ratings", type=int, default=10_000_000, help="default: 10 million")
    parser.add_argument("--format", nargs="*", choices=NAMES, default=list(NAMES))
    options = parser.parse_args(arguments)
    print(f"{options.ratings:,} ratings, {len(os.sched_getaffinity(0))} cores\n")
    print("| format | file, GB | ratings left | seconds | CPU seconds | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for format in options.format:
        found = measure(format, options.ratings)
        print(
            f"| {format} | {found['gigabytes']:.1f} | {found['left']:,.0f} | "
            f"{found['seconds']:.0f} | {found['cpu_seconds']:.0f} | {found['peak_mb']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
