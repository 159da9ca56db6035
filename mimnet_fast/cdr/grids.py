"""Many runs and one table: variants of models at several betas and seeds.

::

    settings.json                 what all runs in the folder have in common
    beta-B/seed-S/                the folder of a run (see `experiment`); all-users/seed-S/ where
                                  all users are tested
    beta-B/seed-S/VARIANT/        the same for other settings of MIMNet; its base models are above
    .../costs.json                what training took there
    TABLE.{json,csv,md,png}       what was found so far (see `reports`)

A cell is one variant at one beta and seed. The tables are written anew after every cell. Cells that
are found there are not computed again, and a cell that was killed goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.progress import Progress

from mimnet_fast.cdr import costs, reports, results
from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.errors import UserError, require_same
from mimnet_fast.cdr.experiment import RATING, PhaseName, Stage1, final_predictions, train_models
from mimnet_fast.cdr.models import TRAINABLE
from mimnet_fast.cdr.significance import Cell, Totals, summarize
from mimnet_fast.cdr.tasks import Task

_BASE_MODELS = "base models"
_PHASES = get_args(PhaseName)


@dataclass(frozen=True)
class Variant:
    """What is compared: a model, with settings of its own or without."""

    name: str
    title: str
    model: str
    """Its name in `TRAINABLE`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model that differ from the grid's."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Raises:
        UserError: nothing to run, or the same twice.
    """

    table: str
    """Name of the table's files."""
    variants: tuple[Variant, ...]
    betas: tuple[float, ...]
    """Shares of users to test on; none where the task tests all."""
    seeds: tuple[int, ...]
    reference: str = "mimnet"
    """The variant that the others are tested against, if it is among them."""
    swept: tuple[str, ...] = ()
    """Settings to draw curves over."""
    task: Task = RATING
    """What is learned and measured."""

    def __post_init__(self) -> None:
        names = tuple(variant.name for variant in self.variants)
        if self.betas and not self.task.cold:
            listed = " ".join(map(str, self.betas))
            raise UserError(
                f"betas: got {listed}, but {self.task.title} tests all users: need none"
            )
        betas = self.betas if self.task.cold else (None,)
        for what, values in (("models", names), ("betas", betas), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                listed = " ".join(map(str, values)) or "none"
                raise UserError(f"{what}: got {listed}, need at least one and none twice")


def run_grid(
    dataset: Dataset, config: Config, plan: Plan, out: Path, progress: Progress
) -> dict[str, Any]:
    """Run what is not finished of a plan and report on all of it.

    Args:
        dataset: A prepared dataset.
        config: All settings but beta and seed, which the plan tells.
        plan: What to run.
        out: Folder of the grid, new or to be gone on with.
        progress: Where bars are drawn.

    Returns:
        What `TABLE.json` says.

    Raises:
        UserError: settings that do not fit the data or what ``out`` holds, or a diverging loss.
    """
    for variant in plan.variants:
        plan.task.check([variant.model], replace(config, **variant.changes))
    settings = {"dataset": dataset.fingerprint, **_common(config), **plan.task.settings}
    _claim(out / "settings.json", settings)
    betas = plan.betas or (config.beta,)
    total = len(plan.seeds) * len(betas) * len(plan.variants)
    task = progress.add_task(f"{plan.table}: cells", total=total)
    cells: list[Cell] = []
    base_models: list[dict[str, Any]] = []
    finished = 0
    found: dict[str, Any] = {}
    for seed in plan.seeds:  # first, so that an unfinished table has every beta
        for beta in betas:
            cell_config = replace(config, beta=beta, seed=seed)
            here = _Cells(plan.task, dataset, cell_config, out, progress)
            base_models.append({"beta": here.beta, "seed": seed, **here.train_base_models()})
            cells += here.untrained()
            for variant in plan.variants:
                was_there = here.has(variant)
                cells.append(here.measure(variant))
                finished += 1
                progress.update(task, completed=finished)
                if was_there and finished < total:
                    continue
                found = {
                    "format": "mimnet_fast.grid",
                    "format_version": 1,
                    "table": plan.table,
                    "title": plan.task.title,
                    "dataset": results.describe(dataset),
                    "config": _common(here.stage1.config),
                    "reference": plan.reference,
                    "swept": plan.swept,
                    "seeds": plan.seeds,
                    "cells": total,
                    "finished_cells": finished,
                    **results.scored(plan.task),
                    **results.environment(),
                    "base_models": base_models,
                    "rows": summarize(cells, plan.reference),
                }
                reports.write(out, found)
    return found


def _common(config: Config) -> dict[str, Any]:
    """What is the same in all cells."""
    return {name: value for name, value in asdict(config).items() if name not in ("beta", "seed")}


class _Cells:
    """The cells of one beta and seed."""

    def __init__(
        self, task: Task, dataset: Dataset, config: Config, out: Path, progress: Progress
    ) -> None:
        self.task, self.dataset, self.config, self.progress = task, dataset, config, progress
        self.beta = config.beta if task.cold else None
        place = f"beta-{config.beta}" if task.cold else "all-users"
        self.folder = out / place / f"seed-{config.seed}"
        self.stage1 = self._stage1(config)
        self.tested = np.zeros(dataset.num_overlap, dtype=np.bool_)
        self.tested[self.stage1.split.final.evaluation.users] = True

    def _stage1(self, config: Config) -> Stage1:
        return self.task.stage1(self.dataset, config, self.folder, self.progress)

    def train_base_models(self) -> dict[str, Any]:
        """Train what all models stand on, or find it trained; what it cost."""
        new = not any(self.folder.glob("**/source.safetensors"))
        with self._bars(), costs.measured(self.folder, _BASE_MODELS) if new else nullcontext():
            for phase in _PHASES:
                self.stage1.source(phase)
                self.stage1.target(phase)
        return costs.read(self.folder).get(_BASE_MODELS, {})

    def untrained(self) -> list[Cell]:
        """Predictions without training."""
        return [
            self._cell(
                name,
                each.title,
                results.without_training(each.scores),
                {
                    (selection, metric): each.totals[metric].numpy()
                    for selection in self.task.selections
                    for metric in self.task.metrics
                },
                trivial=True,
            )
            for name, each in self.stage1.untrained.items()
        ]

    def has(self, variant: Variant) -> bool:
        """Whether a variant was trained to its end."""
        return variant.model in results.read(self._place(variant)).get("models", {})

    def measure(self, variant: Variant) -> Cell:
        """Train a variant, or find it trained."""
        name, spec, folder = variant.model, TRAINABLE[variant.model], self._place(variant)
        config = replace(self.config, **variant.changes)
        if not self.has(variant):
            # What a killed process spent is not known, so only whole runs are measured.
            new = not any((folder / phase / f"{name}.safetensors").exists() for phase in _PHASES)
            with self._bars(), costs.measured(folder, name) if new else nullcontext():
                stage1 = self._stage1(config) if variant.changes else self.stage1
                train_models(stage1, [name], folder)
        scores = results.read(folder)["models"][name]
        by_epoch = final_predictions(folder, name)
        totals = {
            (selection, metric): self.stage1.user_totals(
                by_epoch[scores[selection][f"{metric}_epoch"] - 1]
            )[metric].numpy()
            for selection in self.task.selections
            for metric in self.task.metrics
        }
        return self._cell(
            variant.name,
            variant.title,
            {selection: scores[selection] for selection in self.task.selections},
            totals,
            costs=costs.read(folder).get(name, {}),
            settings={setting: getattr(config, setting) for setting in spec.settings},
        )

    def _place(self, variant: Variant) -> Path:
        return self.folder / variant.name if variant.changes else self.folder

    def _cell(
        self, name: str, title: str, scores: dict[str, Any], totals: Totals, **others: Any
    ) -> Cell:
        return Cell(self.beta, self.config.seed, name, title, scores, totals, self.tested, **others)

    @contextmanager
    def _bars(self) -> Iterator[None]:
        """Bars drawn within the block are gone after it."""
        before = set(self.progress.task_ids)
        yield
        for task in set(self.progress.task_ids) - before:
            self.progress.remove_task(task)


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Write what all runs of a grid have in common, or check that it is this."""
    if path.exists():
        require_same(f"{path.parent} was made", json.loads(path.read_text()), settings)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
