"""Many runs and one table: variants of models at several betas and seeds.

::

    settings.json                 what all runs in the folder have in common
    beta-B/seed-S/                the folder of a run (see `experiment`)
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
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.evaluation import Errors, errors
from mimnet_fast.cdr.experiment import BaseModels, PhaseName, final_predictions, run
from mimnet_fast.cdr.models import TRAINABLE, TRIVIAL
from mimnet_fast.cdr.significance import Cell, Totals, summarize, user_totals

_BASE_MODELS = "base models"
_PHASES = get_args(PhaseName)
_SCORES = [(selection, metric) for selection in results.SELECTIONS for metric in Errors._fields]


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
    seeds: tuple[int, ...]
    reference: str = "mimnet"
    """The variant that the others are tested against, if it is among them."""
    swept: tuple[str, ...] = ()
    """Settings to draw curves over."""

    def __post_init__(self) -> None:
        names = tuple(variant.name for variant in self.variants)
        for what, values in (("models", names), ("betas", self.betas), ("seeds", self.seeds)):
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
    settings = {k: v for k, v in asdict(config).items() if k not in ("beta", "seed")}
    _claim(out / "settings.json", {"dataset": dataset.fingerprint, **settings})
    total = len(plan.seeds) * len(plan.betas) * len(plan.variants)
    task = progress.add_task(f"{plan.table}: cells", total=total)
    cells: list[Cell] = []
    base_models: list[dict[str, Any]] = []
    finished = 0
    found: dict[str, Any] = {}
    for seed in plan.seeds:  # first, so that an unfinished table has every beta
        for beta in plan.betas:
            here = _Cells(dataset, replace(config, beta=beta, seed=seed), out, progress)
            base_models.append({"beta": beta, "seed": seed, **here.train_base_models()})
            cells += here.trivial()
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
                    "dataset": results.describe(dataset),
                    "config": settings,
                    "reference": plan.reference,
                    "swept": plan.swept,
                    "seeds": plan.seeds,
                    "cells": total,
                    "finished_cells": finished,
                    "selections": results.SELECTIONS,
                    **results.environment(),
                    "base_models": base_models,
                    "rows": summarize(cells, plan.reference),
                }
                reports.write(out, found)
    return found


class _Cells:
    """The cells of one beta and seed."""

    def __init__(self, dataset: Dataset, config: Config, out: Path, progress: Progress) -> None:
        self.dataset, self.config, self.progress = dataset, config, progress
        self.folder = out / f"beta-{config.beta}" / f"seed-{config.seed}"
        self.stage1 = BaseModels(dataset, config, self.folder, progress)
        self.ratings = self.stage1.split.final.evaluation
        self.tested = np.zeros(dataset.num_overlap, dtype=np.bool_)
        self.tested[self.ratings.users] = True

    def train_base_models(self) -> dict[str, Any]:
        """Train what all models stand on, or find it trained; what it cost."""
        new = not (self.folder / "source.safetensors").exists()
        with self._bars(), costs.measured(self.folder, _BASE_MODELS) if new else nullcontext():
            self.stage1.source()
            for phase in _PHASES:
                self.stage1.target(phase)
        return costs.read(self.folder).get(_BASE_MODELS, {})

    def trivial(self) -> list[Cell]:
        """Predictions without training."""
        raw = self.stage1.raw
        actual = raw.final.evaluation
        cells = []
        for name, (title, predict) in TRIVIAL.items():
            predicted = predict(raw)
            scores = results.without_training(errors(predicted, actual.values)._asdict())
            totals = user_totals(dict.fromkeys(_SCORES, predicted), actual, len(self.tested))
            cells.append(self._cell(name, title, scores, totals, trivial=True))
        return cells

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
                run(self.dataset, config, [name], folder, self.progress, base_folder=self.folder)
        scores = results.read(folder)["models"][name]
        by_epoch = final_predictions(folder, name)
        predicted = {
            (selection, metric): by_epoch[scores[selection][f"{metric}_epoch"] - 1]
            for selection, metric in _SCORES
        }
        return self._cell(
            variant.name,
            variant.title,
            {selection: scores[selection] for selection in results.SELECTIONS},
            user_totals(predicted, self.ratings, len(self.tested)),
            costs=costs.read(folder).get(name, {}),
            settings={setting: getattr(config, setting) for setting in spec.settings},
        )

    def _place(self, variant: Variant) -> Path:
        return self.folder / variant.name if variant.changes else self.folder

    def _cell(
        self, name: str, title: str, scores: dict[str, Any], totals: Totals, **others: Any
    ) -> Cell:
        return Cell(
            self.config.beta, self.config.seed, name, title, scores, totals, self.tested, **others
        )

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
        stored = json.loads(path.read_text())
        changed = [k for k in {**stored, **settings} if stored.get(k) != settings.get(k)]
        if changed:
            was = ", ".join(f"{k} = {stored.get(k)} (now {settings.get(k)})" for k in changed)
            raise UserError(
                f"{path.parent} was made with {was}: name another --out or use the same settings"
            )
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
