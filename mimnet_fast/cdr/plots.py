"""Plots of a grid of runs; needs matplotlib (the extra ``[plots]``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(found: dict[str, Any], path: Path) -> None:
    """All metrics with their standard deviation over seeds: of every row, or over what is swept."""
    figure = _curves(found) if found["swept"] else _points(found)
    figure.savefig(path, format="png")


def _points(found: dict[str, Any]) -> Figure:
    """A line for each row, a column for each beta."""
    betas = list(dict.fromkeys(row["beta"] for row in found["rows"]))
    names = len({row["name"] for row in found["rows"]})
    metrics = found["metrics"]
    size = 4 + 3 * len(betas), len(metrics) * (1 + 0.25 * names)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    grid = figure.subplots(len(metrics), len(betas), squeeze=False, sharey=True)
    for line, metric in zip(grid, metrics, strict=True):
        for axes, beta in zip(line, betas, strict=True):
            rows = [row for row in found["rows"] if row["beta"] == beta]
            _scores(axes, rows, found["selections"], metric)
            axes.set(title="" if beta is None else f"beta {beta}", xlabel=metric.upper())
    grid[0, 0].invert_yaxis()  # for all, as the axis is shared
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _curves(found: dict[str, Any]) -> Figure:
    """A column for each swept setting, the other settings being the reference's."""
    swept, metrics = found["swept"], found["metrics"]
    size = 1 + 4 * len(swept), 3.5 * len(metrics)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    grid = figure.subplots(len(metrics), len(swept), squeeze=False, sharey="row")
    models = [row for row in found["rows"] if not row["trivial"]]
    centre = next(row["settings"] for row in models if row["name"] == found["reference"])
    for line, metric in zip(grid, metrics, strict=True):
        for axes, name in zip(line, swept, strict=True):
            others = {key: value for key, value in centre.items() if key != name}
            on_curve = [row for row in models if others.items() <= row["settings"].items()]
            for beta in dict.fromkeys(row["beta"] for row in on_curve):
                rows = sorted(
                    (row for row in on_curve if row["beta"] == beta),
                    key=lambda row: row["settings"][name],
                )
                for selection in found["selections"]:
                    scores = [row[selection][metric] for row in rows]
                    axes.errorbar(
                        [row["settings"][name] for row in rows],
                        [score["mean"] for score in scores],
                        yerr=[score["std"] or 0.0 for score in scores],
                        fmt="o-",
                        markersize=4,
                        capsize=2,
                        label=selection if beta is None else f"{selection}, beta {beta}",
                    )
            axes.set(xlabel=name, ylabel=metric.upper())
            axes.grid(alpha=0.3)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _scores(axes: Axes, rows: list[dict[str, Any]], selections: Iterable[str], metric: str) -> None:
    for shift, selection in zip((-0.15, 0.15), selections, strict=True):
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
