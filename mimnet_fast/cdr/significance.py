"""Means over seeds, and whether a model's scores differ from the reference's.

The scores of a table are sums over users, so users are the units that are compared: ratings of one
user are not independent, and a few seeds tell next to nothing (the sign of five differences cannot
reach 5 %). Every user who was tested has one total per model and metric, over all seeds that tested
the user: of absolute errors for MAE, of squared errors for RMSE, of the metric itself for ranks. A
paired t-test compares the totals of two models. Their mean is the pooled score times a constant, so
the test is about the number in the table. All comparisons share the reference, so p-values are
adjusted with the method of Benjamini and Yekutieli (2001), which holds under any dependence.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy  # type: ignore[import-untyped]  # loads its parts when they are used
from numpy.typing import NDArray

Totals = dict[tuple[str, str], NDArray[np.float64]]
"""By selection and metric: what each user adds to it, ``[O]``."""

LEVEL = 0.05


@dataclass(frozen=True)
class Cell:
    """What one model did at one beta and seed."""

    beta: float | None
    """Share of test users; None where all users are tested."""
    seed: int
    name: str
    title: str
    scores: dict[str, Any]
    """By selection and metric, as in `results.json`."""
    totals: Totals
    tested: NDArray[np.bool_]
    """Users who are measured ``[O]``."""
    costs: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trivial: bool = False


def paired_p(cells: Sequence[Cell], reference: Sequence[Cell], key: tuple[str, str]) -> float:
    """p-value of a paired t-test of the users' totals at the seeds that both have.

    NaN with fewer than two users; 1 where no user's total differs.
    """
    pairs = [(a, b) for a in cells for b in reference if a.seed == b.seed]
    tested = np.logical_or.reduce([a.tested for a, _ in pairs])
    if tested.sum() < 2:
        return float("nan")
    left, right = np.sum([(a.totals[key], b.totals[key]) for a, b in pairs], axis=0)[:, tested]
    return 1.0 if (left == right).all() else float(scipy.stats.ttest_rel(left, right).pvalue)


def summarize(cells: Sequence[Cell], reference: str) -> list[dict[str, Any]]:
    """One row for each beta and name, in the order of the cells.

    Each selection and metric of a row has ``mean``, ``std`` (over seeds, None for one seed) and
    ``values``; rows other than the reference's also have ``p`` and ``p_adjusted``, None where
    there is nothing to compare with.
    """
    scores = list(cells[0].totals)
    groups: dict[tuple[float | None, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.beta or 0.0):
        groups.setdefault((cell.beta, cell.name), []).append(cell)
    rows: dict[tuple[float | None, str], dict[str, Any]] = {}
    for (beta, name), group in groups.items():
        first = group[0]
        seconds = [cell.costs["seconds"] for cell in group if "seconds" in cell.costs]
        peaks = [peak for cell in group if (peak := cell.costs.get("peak_rss_bytes"))]
        rows[beta, name] = {
            "beta": beta,
            "name": name,
            "title": first.title,
            "trivial": first.trivial,
            "settings": first.settings,
            "seeds": [cell.seed for cell in group],
            "seconds": statistics.fmean(seconds) if seconds else None,
            "peak_rss_bytes": max(peaks, default=None),
        }
        for selection, metric in scores:
            values = [cell.scores[selection][metric] for cell in group]
            rows[beta, name].setdefault(selection, {})[metric] = _moments(values)
    for selection, metric in scores:
        found = {
            key: paired_p(group, groups[key[0], reference], (selection, metric))
            for key, group in groups.items()
            if key[1] != reference and (key[0], reference) in groups
        }
        found = {key: p for key, p in found.items() if p == p}
        adjusted = (
            scipy.stats.false_discovery_control(list(found.values()), method="by") if found else []
        )
        for key in rows:
            rows[key][selection][metric] |= {"p": found.get(key), "p_adjusted": None}
        for key, p in zip(found, adjusted, strict=True):
            rows[key][selection][metric]["p_adjusted"] = float(p)
    return list(rows.values())


def _moments(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}
