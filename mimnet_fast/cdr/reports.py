"""What a grid of runs found: `TABLE.json`, `TABLE.csv`, `TABLE.md`, `TABLE.png` and the screen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table

from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.results import listed, markdown_table, parts, screen_table
from mimnet_fast.cdr.significance import LEVEL

PLOTS = find_spec("matplotlib") is not None
"""Whether there is something to draw with."""

_COSTS = ("seeds", "seconds", "peak MB")


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write all files of a table; the plot where matplotlib is installed."""
    stem = folder / found["table"]
    with atomic_file(stem.with_suffix(".json")) as path:
        path.write_text(json.dumps(found, indent=2) + "\n")
    with atomic_file(stem.with_suffix(".csv")) as path:
        _long(found).write_csv(path)
    with atomic_file(stem.with_suffix(".md")) as path:
        path.write_text(_markdown(found))
    if PLOTS:
        from mimnet_fast.cdr import plots

        with atomic_file(stem.with_suffix(".png")) as path:
            plots.draw(found, path)


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """The scores for the terminal."""
    for heading, columns, rows in _tables(found):
        yield screen_table(columns, rows, title=f"{found['title']}, {heading}", caption="")


def _tables(
    found: dict[str, Any], cost: bool = False
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Heading, columns and rows of each table, with what training took or without."""
    for beta in dict.fromkeys(row["beta"] for row in found["rows"]):
        for part, scores in parts(found):
            heading = [part] if beta is None else [f"beta {beta}", *filter(None, [part])]
            rows = [
                [
                    row["title"],
                    *(_score(row[selection][metric]) for selection, metric in scores.values()),
                    *(_costs(row) if cost else ()),
                ]
                for row in found["rows"]
                if row["beta"] == beta
            ]
            yield ", ".join(heading), ["model", *scores, *(_COSTS if cost else ())], rows


def _costs(row: dict[str, Any]) -> list[str]:
    seconds, peak = row["seconds"], row["peak_rss_bytes"]
    return [
        str(len(row["seeds"])),
        "" if seconds is None else f"{seconds:.1f}",
        "" if peak is None else f"{peak / 2**20:.0f}",
    ]


def _score(score: dict[str, Any]) -> str:
    spread = "" if score["std"] is None else f" ± {score['std']:.4f}"
    significant = score["p_adjusted"] is not None and score["p_adjusted"] < LEVEL
    return f"{score['mean']:.4f}{spread}{'*' if significant else ''}"


def legend(found: dict[str, Any]) -> list[str]:
    """What the scores in a table mean."""
    lines = ["mean ± standard deviation over seeds"]
    reference = [row["title"] for row in found["rows"] if row["name"] == found["reference"]]
    if reference:
        lines.append(
            f"*: differs from {reference[0]} (p < {LEVEL}; paired t-test over the users "
            "measured, adjusted for all comparisons of the column with Benjamini-Yekutieli)"
        )
    return lines


def _markdown(found: dict[str, Any]) -> str:
    data = found["dataset"]
    lines = [
        f"# {found['table']}: {data['source']} -> {data['target']}, {found['title']}",
        "",
        f"{found['finished_cells']} of {found['cells']} cells finished; seeds "
        f"{', '.join(map(str, found['seeds']))}.",
        "",
    ]
    for heading, columns, rows in _tables(found, cost=True):
        lines += [f"## {heading}", "", *markdown_table(columns, rows), ""]
    base = [cost["seconds"] for cost in found["base_models"] if "seconds" in cost]
    lines += [f"- {line}" for line in legend(found)]
    lines += [f"- {name}: {meaning}" for name, meaning in found["selections"].items()]
    lines.append(
        "- seconds: wall time of the second stage of one seed, both phases; peak MB: largest "
        "resident memory of the process meanwhile, libraries included"
    )
    if base:
        lines.append(f"- base models: {sum(base) / len(base):.1f} seconds per split")
    lines += [
        f"- settings: {listed({**found['task'], **found['config']})}",
        f"- dataset {data['fingerprint'][:16]}",
        f"- {listed(found['versions'])}; {found['machine']}",
        "",
    ]
    return "\n".join(lines)


def _long(found: dict[str, Any]) -> pl.DataFrame:
    """One line for each beta, model, selection and metric."""
    return pl.DataFrame(
        [
            {
                **{name: row[name] for name in ("beta", "name", "title")},
                "selection": selection,
                "metric": metric,
                "seeds": len(row["seeds"]),
                **{
                    name: row[selection][metric][name]
                    for name in ("mean", "std", "p", "p_adjusted")
                },
                "seconds": row["seconds"],
                "peak_rss_bytes": row["peak_rss_bytes"],
                **row["settings"],
            }
            for row in found["rows"]
            for selection in found["selections"]
            for metric in found["metrics"]
        ],
        infer_schema_length=None,
    )
