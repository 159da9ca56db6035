"""Plots of a grid of runs; needs matplotlib (the extra ``[plots]``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mimnet_fast.cdr.evaluation import Errors
from mimnet_fast.cdr.results import SELECTIONS


def draw(found: dict[str, Any], path: Path) -> None:
    """Both errors of every row, beta by beta, with the standard deviation over seeds."""
    betas = list(dict.fromkeys(row["beta"] for row in found["rows"]))
    names = len({row["name"] for row in found["rows"]})
    figure = Figure(
        figsize=(4 + 3 * len(betas), 2 * (1 + 0.25 * names)), layout="constrained", dpi=150
    )
    grid = figure.subplots(len(Errors._fields), len(betas), squeeze=False, sharey=True)
    for line, metric in zip(grid, Errors._fields, strict=True):
        for axes, beta in zip(line, betas, strict=True):
            rows = [row for row in found["rows"] if row["beta"] == beta]
            _errors(axes, rows, metric)
            axes.set(title=f"beta {beta}", xlabel=metric.upper())
    grid[0, 0].invert_yaxis()  # for all, as the axis is shared
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, format="png")


def _errors(axes: Axes, rows: list[dict[str, Any]], metric: str) -> None:
    for shift, selection in zip((-0.15, 0.15), SELECTIONS, strict=True):
        scores = [row[selection][metric] for row in rows]
        axes.errorbar(
            [score["mean"] for score in scores],
            [position + shift for position in range(len(rows))],
            xerr=[score["std"] or 0.0 for score in scores],
            fmt="o",
            markersize=4,
            capsize=2,
            label=selection,
        )
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.grid(axis="x", alpha=0.3)
