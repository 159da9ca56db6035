"""How much any model could win over the biases: boosted trees, and MIMNet aimed at MAE.

Trees on a few numbers find what there is in them, interactions too, so where they are level with
the biases a model that is told the same has little to win. They are fitted to the residuals of the
biases on what the biases expect, alone or with the profiles of `mimnet_fast.cdr.profiles`: those of
the user, the mean of those of the user's history, and that of the item. Errors weigh as in MIMNet.

Squared errors are fitted for RMSE and absolute ones for MAE. MIMNet is trained by squared errors,
so its predictions are moved by a median and rounded, as those of the hardest predictor without
training are. The number of trees (none are the biases) and the median come from validation users.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from sklearn.ensemble import HistGradientBoostingRegressor  # type: ignore[import-untyped]
from torch import Tensor

from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.evaluation import errors
from mimnet_fast.cdr.experiment import BaseModels, PhaseName, balanced_weights
from mimnet_fast.cdr.models.trivial import nearest_rating
from mimnet_fast.cdr.profiles import profiles
from mimnet_fast.cdr.training import stored_predictions

TREES = 100
_STEP = 0.04

_TITLES = {
    "trees": "boosted trees",
    "trees-alone": "boosted trees on the biases alone",
    "mimnet-rounded": "MIMNet + median of the rest, rounded",
}
_LOSSES = {"mae": "absolute_error", "rmse": "squared_error"}


def measure(
    dataset: Dataset, betas: Iterable[float], seeds: Iterable[int], grid: Path
) -> list[dict[str, Any]]:
    """Rows like those of the other tables; ``grid`` has MIMNet on biases at all of them."""
    rows = []
    for beta in betas:
        found: dict[str, dict[str, list[float]]] = {name: {} for name in _TITLES}
        for seed in seeds:
            run = grid / f"beta-{beta}" / f"seed-{seed}"
            config = Config(beta=beta, seed=seed, base="biased-mf")
            stage1 = BaseModels(dataset, config, run, Progress(disable=True))
            for name in ("trees", "trees-alone"):
                for metric in _LOSSES:
                    error = _trees(stage1, metric, alone=name == "trees-alone")
                    found[name].setdefault(metric, []).append(round(error, 6))
            error = _rounded(stage1, run)
            found["mimnet-rounded"].setdefault("mae", []).append(round(error, 6))
        rows += [
            {"beta": beta, "name": name, "title": _TITLES[name], "honest": by_metric}
            for name, by_metric in found.items()
        ]
    return rows


def _rounded(stage1: BaseModels, run: Path) -> float:
    """MAE of MIMNet with the median of what it leaves of the validation users' ratings, rounded."""
    phases: tuple[PhaseName, ...] = ("selection", "final")
    (told, validation), (asked, test) = (_predicted(stage1, run, phase) for phase in phases)
    scale = stage1.raw.final.train_target.values
    medians = (validation - told).median(1, keepdim=True).values
    epoch = (nearest_rating(told + medians, scale) - validation).abs().mean(1).argmin()
    return errors(nearest_rating(asked[epoch] + medians[epoch], scale), test).mae


def _predicted(stage1: BaseModels, run: Path, phase: PhaseName) -> tuple[Tensor, Tensor]:
    """Ratings as MIMNet predicts them after each epoch, ``[epochs, ratings]``, and as they are."""
    ratings = getattr(stage1.raw, phase).evaluation.values
    expected = ratings - getattr(stage1.split, phase).evaluation.values
    return stored_predictions(run / phase / "mimnet.safetensors") + expected, ratings


def _trees(stage1: BaseModels, metric: str, *, alone: bool) -> float:
    """Error on the test users; trees told ``alone`` know nothing but what the biases expect."""

    def error(predicted: np.ndarray | Tensor, ratings: Ratings) -> float:
        found = errors(torch.as_tensor(predicted), ratings.values)
        return getattr(found, metric)

    def told(phase: PhaseName, part: str) -> np.ndarray:
        inputs = _inputs(stage1, phase, part)
        return inputs[:, :1] if alone else inputs

    def fitted(phase: PhaseName, trees: int) -> HistGradientBoostingRegressor:
        learned = getattr(stage1.split, phase).train_meta
        weights = balanced_weights(getattr(stage1.split, phase), stage1.dataset.num_overlap)
        model = HistGradientBoostingRegressor(
            loss=_LOSSES[metric],
            learning_rate=0.1,
            max_iter=trees,
            max_leaf_nodes=8,
            min_samples_leaf=100,
            early_stopping=False,
            random_state=stage1.config.seed,
        )
        return model.fit(
            told(phase, "train_meta"), learned.values.numpy(), weights[learned.users].numpy()
        )

    validation, test = stage1.split.selection.evaluation, stage1.split.final.evaluation
    stages = fitted("selection", TREES).staged_predict(told("selection", "evaluation"))
    tried = [torch.zeros_like(validation.values), *stages]
    trees = int(np.argmin([error(predicted, validation) for predicted in tried]))
    if not trees:
        return error(torch.zeros_like(test.values), test)
    return error(fitted("final", trees).predict(told("final", "evaluation")), test)


def _inputs(stage1: BaseModels, phase: PhaseName, part: str) -> np.ndarray:
    """What the trees are told of each rating of ``part``."""
    raw, left = getattr(stage1.raw, phase), getattr(stage1.split, phase)
    ratings = getattr(raw, part)
    told = profiles(stage1.dataset, raw, stage1.biases.final.source)
    items = torch.cat([told.source_items, torch.zeros_like(told.source_items[:1])])
    lengths = stage1.split.lengths.clamp_min(1)[:, None]
    histories = items[stage1.split.histories].sum(1) / lengths
    columns = (
        (ratings.values - getattr(left, part).values)[:, None],  # what the biases expect
        told.source_users[ratings.users],
        histories[ratings.users],
        told.target_items[ratings.items],
    )
    # So few different values are bins as they are; quantiles would take longer than the trees.
    return (torch.cat(columns, 1) / _STEP).round().mul(_STEP).numpy()
