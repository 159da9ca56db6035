"""Plots of result files; needs matplotlib (the extra ``[plots]``)."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .baselines import OURS
from .report import BASELINES, best_of_baselines, is_ours, median, title, write

_MARKERS = {"forward": "o", "forward+backward": "s"}
# The same bytes from the same result: ids from a fixed salt, no date, text as text.
_STYLE: Any = {"svg.hashsalt": OURS, "svg.fonttype": "none", "font.size": 8}


class Point(NamedTuple):
    """What the plots show of one of our contenders in one direction of one contest."""

    op: str
    case: str
    direction: str
    contender: str
    against_best: float
    """The time of the best baseline over ours; NaN where no baseline was timed."""
    of_floor: float
    """Percent."""
    intensity: float
    """Floating-point operations for each byte of inputs and results."""
    gflop_per_s: float
    best_gflop_per_s: float
    """Of the best baseline: operations of our algorithm, not of its own."""


def points(result: dict[str, Any]) -> list[Point]:
    """All that was timed, in the order of the result."""
    found = []
    for row in result["results"]:
        contenders = row.get("contenders", {})
        best_ms = best_of_baselines(row) if contenders else None
        for name, contender in contenders.items():
            if not is_ours(name) or "median_ms" not in contender:
                continue
            ours_ms = contender["median_ms"]
            point = Point(
                row["op"],
                row["case"],
                row["direction"],
                name,
                best_ms / ours_ms if best_ms else float("nan"),
                100 * row["floor_ms"] / ours_ms,
                row["flops"] / row["bytes"],
                1e-6 * row["flops"] / ours_ms,
                1e-6 * row["flops"] / best_ms if best_ms else float("nan"),
            )
            found.append(point)
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Ours against the best baseline and against the floor, above the roofline."""
    found = points(result)
    labels = list(dict.fromkeys(f"{point.op} {point.case}" for point in found))
    with matplotlib.rc_context(_STYLE):
        height = 1 + 0.2 * len(labels)
        figure = Figure(figsize=(10, height + 5), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(height, 5)).flat
        against_best, of_floor = above.subplots(1, 2, sharey=True)
        _dots(against_best, found, labels, "against_best")
        _dots(of_floor, found, labels, "of_floor")
        _rows(against_best, labels)
        _times_as_fast(against_best, "times as fast as the best baseline")
        of_floor.set(xlabel="% of the floor")
        of_floor.axvline(100, color="black", linewidth=1)
        of_floor.grid(alpha=0.3)
        above.legend(*of_floor.get_legend_handles_labels(), loc="outside upper right", ncols=4)
        roofline = below.subplots()
        _roofline(roofline, found, result["machine"])
        legend = roofline.get_legend_handles_labels()
        below.legend(*legend, loc="outside lower center", ncols=3, fontsize=7)
        _save(figure, path)


def whole_model(results: list[dict[str, Any]], path: Path) -> None:
    """How many times as fast as each baseline the whole model is, on every machine."""
    ratios = {}
    for result in results:
        for row in result["results"]:
            for name, contender in row.get("contenders", {}).items():
                if row["op"] == "mimnet_forward" and is_ours(name) and "median_ms" in contender:
                    label = f"{title(result)}{name.removeprefix(OURS)}: {row['case']} "
                    ratios[label + row["direction"]] = {
                        baseline: ms / contender["median_ms"]
                        for baseline in BASELINES
                        if (ms := median(row, baseline)) is not None
                    }
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 1 + 0.25 * len(ratios)), layout="constrained")
        axes = figure.subplots()
        for baseline in BASELINES:
            shown = [(label, of[baseline]) for label, of in ratios.items() if baseline in of]
            labels, values = zip(*shown, strict=True) if shown else ((), ())
            axes.plot(values, [[*ratios].index(label) for label in labels], "o", label=baseline)
        _rows(axes, list(ratios))
        _times_as_fast(axes, "whole model: times as fast as the baseline")
        figure.legend(loc="outside upper right", ncols=len(BASELINES))
        _save(figure, path)


def _dots(axes: Axes, found: list[Point], labels: list[str], value: str) -> None:
    """A line for each op and case, a marker for each direction, a color for each of ours."""
    contenders = list(dict.fromkeys(point.contender for point in found))
    for number, contender in enumerate(contenders):
        for direction, marker in _MARKERS.items():
            chosen = [p for p in found if (p.contender, p.direction) == (contender, direction)]
            axes.plot(
                [getattr(point, value) for point in chosen],
                [labels.index(f"{point.op} {point.case}") for point in chosen],
                marker,
                color=f"C{number}",
                fillstyle="none" if direction == "forward" else "full",
                label=f"{contender.removeprefix(OURS)} {direction}".strip(),
            )


def _rows(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels), -1)
    axes.grid(alpha=0.3)


def _times_as_fast(axes: Axes, label: str) -> None:
    axes.set(xlabel=f"{label} (left of 1: slower)", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.axvline(1, color="black", linewidth=1)


def _roofline(axes: Axes, found: list[Point], machine: dict[str, Any]) -> None:
    """Operations a second over operations a byte, below what the machine can do at the most."""
    peak, bandwidth = machine["gflop_per_s"], machine["gb_per_s"]
    at = sorted([*(point.intensity for point in found), peak / bandwidth])
    axes.plot(at, [min(peak, bandwidth * x) for x in at], color="black", linewidth=1)
    rates = f"{peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s"
    axes.annotate(rates, (peak / bandwidth, peak), (0, 4), textcoords="offset points")
    ops = list(dict.fromkeys(point.op for point in found))
    for number, op in enumerate(ops):
        for direction, marker in _MARKERS.items():
            chosen = [p for p in found if (p.op, p.direction) == (op, direction)]
            if not chosen:
                continue
            x = [point.intensity for point in chosen]
            ours = [point.gflop_per_s for point in chosen]
            best = [point.best_gflop_per_s for point in chosen]
            color = f"C{number}"
            label = f"{op} {direction}"
            axes.plot(x, ours, marker, color=color, markersize=4, label=label)
            axes.plot(x, best, marker, color=color, markersize=4, fillstyle="none")
            axes.vlines(x, best, ours, color=color, linewidth=0.5)
            for point in chosen:
                place = point.intensity, point.gflop_per_s
                axes.annotate(point.case, place, (3, 1), textcoords="offset points", fontsize=6)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="arithmetic intensity, FLOP/byte",
        ylabel="GFLOP/s (hollow: the best baseline)",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    write(path, text.getvalue())
