"""What a run found: `results.json`, `results.md` and the table on the screen."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

import mimnet_fast
from mimnet_fast.cdr import diagnostics
from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.protocol import Phase
from mimnet_fast.cdr.tasks import Task
from mimnet_fast.cdr.training import Epoch

SELECTIONS = {
    "published": "best epoch on the test set, MAE and RMSE each at its own (as the papers do)",
    "honest": "epoch that was best for validation users, who were cold-start users in a run of "
    "their own (MAE and RMSE each at its own)",
}


class Phases(Protocol):
    """A split of any task."""

    @property
    def selection(self) -> Phase:
        """See `Split`."""
        ...

    @property
    def final(self) -> Phase:
        """See `Split`."""
        ...


def header(dataset: Dataset, config: Config, data: Phases, task: Task) -> dict[str, Any]:
    """Everything in `results.json` but the models."""
    beta = [f"beta {config.beta}"] if task.cold else []
    return {
        "format": "mimnet_fast.results",
        "format_version": 1,
        "title": ", ".join([task.title, *beta, f"seed {config.seed}"]),
        "dataset": {
            **describe(dataset),
            "test_users": len(data.final.evaluation.users.unique()),
            "test_ratings": len(data.final.evaluation),
            "validation_ratings": len(data.selection.evaluation),
            "train_meta_ratings": len(data.final.train_meta),
        },
        "config": asdict(config),
        **scored(task),
        **environment(),
    }


def scored(task: Task) -> dict[str, Any]:
    """What is measured in a run or a grid of a task."""
    return {
        "task": task.settings,
        "selections": task.selections,
        "metrics": list(task.metrics),
    }


def describe(dataset: Dataset) -> dict[str, Any]:
    """Which dataset it is."""
    return {
        "fingerprint": dataset.fingerprint,
        "source": dataset.info["source"]["file"],
        "target": dataset.info["target"]["file"],
        "overlap_users": dataset.num_overlap,
        "item_metadata": [groups.kind for groups in dataset.source_groups],
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


def without_training(found: dict[str, float]) -> dict[str, Any]:
    """Both selections of a predictor that has no epochs."""
    return dict.fromkeys(SELECTIONS, found)


def select_epochs(
    selection: list[Epoch], final: list[Epoch], best: Callable[[list[float]], float] = min
) -> dict[str, Any]:
    """Both selections of a trained model, with the epochs counted from 1 and both curves.

    >>> values = [(3, 3), (2, 4)], [(1, 9), (5, 8)]
    >>> curves = [[{"loss": 0, "mae": mae, "rmse": rmse} for mae, rmse in each] for each in values]
    >>> found = select_epochs(*curves)
    >>> found["published"]
    {'mae': 1, 'mae_epoch': 1, 'rmse': 8, 'rmse_epoch': 2}
    >>> found["honest"]
    {'mae': 5, 'mae_epoch': 2, 'rmse': 9, 'rmse_epoch': 1}
    """

    def at_best_of(curve: list[Epoch]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for metric in [name for name in final[0] if name != "loss"]:
            chosen = best_epoch(curve, metric, best)
            found |= {metric: final[chosen - 1][metric], f"{metric}_epoch": chosen}
        return found

    return {
        "published": at_best_of(final),
        "honest": at_best_of(selection),
        "curves": {"selection": selection, "final": final},
    }


def best_epoch(curve: list[Epoch], metric: str, best: Callable[[list[float]], float] = min) -> int:
    """The first epoch, from 1, with the lowest (or best) value of ``metric``."""
    values = [epoch[metric] for epoch in curve]
    return values.index(best(values)) + 1


def read(folder: Path) -> dict[str, Any]:
    """The `results.json` of a run, or nothing."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path, results: dict[str, Any], page: str) -> None:
    """Write `results.json` and, with the page, `results.md`."""
    with atomic_file(folder / "results.md") as path:
        path.write_text(page)
    with atomic_file(folder / "results.json") as path:  # last: a model in it is finished
        path.write_text(json.dumps(results, indent=2) + "\n")


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """The results for the terminal."""
    for part, scores in parts(results):
        title = ", ".join(filter(None, [results["title"], part]))
        shown = rows(results, scores.values())
        yield screen_table(["model", *scores], shown, title=title, caption=LEGEND)


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


LEGEND = "@n: at epoch n"


def parts(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """The tables that show all scores: a name, and selection and metric by the column's title.

    Both selections of two metrics stand side by side in a table without a name; of more metrics,
    each selection has a table of its own.
    """
    selections, metrics = found["selections"], found["metrics"]
    if len(metrics) <= 2:
        yield (
            "",
            {
                f"{metric.upper()} {name}": (name, metric)
                for name in selections
                for metric in metrics
            },
        )
    else:
        for name in selections:
            yield name, {metric.upper(): (name, metric) for metric in metrics}


def rows(results: dict[str, Any], scores: Collection[tuple[str, str]]) -> list[list[str]]:
    """Each model's title and its (selection, metric) ``scores``."""

    def cell(found: dict[str, Any], metric: str) -> str:
        epoch = found.get(f"{metric}_epoch")
        return f"{found[metric]:.4f}" + (f" @{epoch}" if epoch else "")

    return [
        [
            model["title"],
            *(cell(model[selection], metric) for selection, metric in scores),
        ]
        for model in results["models"].values()
    ]


def page(results: dict[str, Any], measured: str) -> str:
    """The results of a run in Markdown; ``measured`` says on what."""
    data = results["dataset"]
    lines = [f"# {data['source']} -> {data['target']}, {results['title']}", "", measured, ""]
    for part, scores in parts(results):
        lines += [f"## {part}", ""] if part else []
        lines += [*markdown_table(["model", *scores], rows(results, scores.values())), ""]
    lines += [f"- {LEGEND}"]
    lines += [f"- {name}: {meaning}" for name, meaning in results["selections"].items()]
    lines += [
        f"- {model['title']}: {diagnostics.sentence(model['diagnostics'])}"
        for model in results["models"].values()
        if "diagnostics" in model
    ]
    return "\n".join([*lines, *provenance(results), ""])


def provenance(results: dict[str, Any]) -> list[str]:
    """What the numbers come from, as lines of a list."""
    return [
        f"- settings of the last run: {listed({**results['task'], **results['config']})}",
        f"- dataset {results['dataset']['fingerprint'][:16]}, metadata of the source items: "
        f"{', '.join(results['dataset']['item_metadata']) or 'none'}",
        f"- {listed(results['versions'])}; {results['machine']}",
    ]
