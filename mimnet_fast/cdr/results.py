"""What a run found: `results.json`, `results.md` and the table on the screen."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

import mimnet_fast
from mimnet_fast.cdr import diagnostics
from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.evaluation import Errors
from mimnet_fast.cdr.protocol import Split
from mimnet_fast.cdr.training import Epoch

SELECTIONS = {
    "published": "best epoch on the test set, MAE and RMSE each at its own (as the papers do)",
    "honest": "epoch that was best for validation users, who were cold-start users in a run of "
    "their own (MAE and RMSE each at its own)",
}


def header(dataset: Dataset, config: Config, data: Split) -> dict[str, Any]:
    """Everything in `results.json` but the models."""
    return {
        "format": "mimnet_fast.results",
        "format_version": 1,
        "dataset": {
            **describe(dataset),
            "test_users": len(data.final.evaluation.users.unique()),
            "test_ratings": len(data.final.evaluation),
            "validation_ratings": len(data.selection.evaluation),
            "train_meta_ratings": len(data.final.train_meta),
        },
        "config": asdict(config),
        "selections": SELECTIONS,
        **environment(),
    }


def describe(dataset: Dataset) -> dict[str, Any]:
    """Which dataset it is."""
    return {
        "fingerprint": dataset.fingerprint,
        "source": dataset.info["source"]["file"],
        "target": dataset.info["target"]["file"],
        "overlap_users": dataset.num_overlap,
    }


def environment() -> dict[str, Any]:
    """What computed the results."""
    packages = ("torch", "numpy", "polars", "scikit-learn", "scipy", "safetensors")
    return {
        "versions": {
            "mimnet_fast": mimnet_fast.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": f"{platform.system()} {platform.machine()}",
    }


def without_training(found: Errors) -> dict[str, Any]:
    """Both selections of a predictor that has no epochs."""
    return {selection: found._asdict() for selection in SELECTIONS}


def select_epochs(selection: list[Epoch], final: list[Epoch]) -> dict[str, Any]:
    """Both selections of a trained model, with the epochs counted from 1 and both curves.

    >>> curves = [Epoch(0, 3, 3), Epoch(0, 2, 4)], [Epoch(0, 1, 9), Epoch(0, 5, 8)]
    >>> found = select_epochs(*curves)
    >>> found["published"]
    {'mae': 1, 'mae_epoch': 1, 'rmse': 8, 'rmse_epoch': 2}
    >>> found["honest"]
    {'mae': 5, 'mae_epoch': 2, 'rmse': 9, 'rmse_epoch': 1}
    """

    def at_best_of(curve: list[Epoch]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for metric in Errors._fields:
            best = best_epoch(curve, metric)
            found |= {metric: getattr(final[best - 1], metric), f"{metric}_epoch": best}
        return found

    return {
        "published": at_best_of(final),
        "honest": at_best_of(selection),
        "curves": {
            "selection": [asdict(epoch) for epoch in selection],
            "final": [asdict(epoch) for epoch in final],
        },
    }


def best_epoch(curve: list[Epoch], metric: str) -> int:
    """The first epoch, from 1, with the lowest value of ``metric``."""
    values: list[float] = [getattr(epoch, metric) for epoch in curve]
    return values.index(min(values)) + 1


def read(folder: Path) -> dict[str, Any]:
    """The `results.json` of a run, or nothing."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json` and `results.md`."""
    with atomic_file(folder / "results.md") as path:
        path.write_text(_markdown(results))
    with atomic_file(folder / "results.json") as path:  # last: a model in it is finished
        path.write_text(json.dumps(results, indent=2) + "\n")


def table(results: dict[str, Any], title: str) -> Table:
    """The results for the terminal."""
    return screen_table(_COLUMNS, _rows(results), title=title, caption=_LEGEND)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is of words and the others of numbers."""
    alignment = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows)]


def screen_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str, caption: str
) -> Table:
    """The same for the terminal."""
    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def listed(values: dict[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


_LEGEND = "@n: at epoch n"
_COLUMNS = ("model", "MAE published", "RMSE published", "MAE honest", "RMSE honest")


def _rows(results: dict[str, Any]) -> list[list[str]]:
    def cell(found: dict[str, Any], metric: str) -> str:
        epoch = found.get(f"{metric}_epoch")
        return f"{found[metric]:.4f}" + (f" @{epoch}" if epoch else "")

    return [
        [
            model["title"],
            *(
                cell(model[selection], metric)
                for selection in SELECTIONS
                for metric in Errors._fields
            ),
        ]
        for model in results["models"].values()
    ]


def _markdown(results: dict[str, Any]) -> str:
    data, config = results["dataset"], results["config"]
    settings, versions = listed(config), listed(results["versions"])
    return "\n".join(
        [
            f"# {data['source']} -> {data['target']}, beta {config['beta']}, seed {config['seed']}",
            "",
            f"{data['test_ratings']} ratings by {data['test_users']} cold-start test users, "
            f"of {data['overlap_users']} users of both domains.",
            "",
            *markdown_table(_COLUMNS, _rows(results)),
            "",
            f"- {_LEGEND}",
            *(f"- {name}: {meaning}" for name, meaning in results["selections"].items()),
            *(
                f"- {model['title']}: {diagnostics.sentence(model['diagnostics'])}"
                for model in results["models"].values()
                if "diagnostics" in model
            ),
            f"- settings of the last run: {settings}",
            f"- dataset {data['fingerprint'][:16]}",
            f"- {versions}; {results['machine']}",
            "",
        ]
    )
