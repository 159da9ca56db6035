"""Errors of predicted ratings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mimnet_fast.cdr.dataset import Ratings

Predict = Callable[[Tensor, Tensor], Tensor]
"""Ratings ``[B]`` of items ``[B]`` by users ``[B]``: called with (users, items)."""

_BATCH = 8192


class Errors(NamedTuple):
    """Mean absolute error and root mean squared error over all ratings."""

    mae: float
    rmse: float


def errors(predicted: Tensor, actual: Tensor) -> Errors:
    """Errors in float64; predictions are taken as they are, not clipped to the scale.

    >>> errors(torch.tensor([3.0, 7.0]), torch.tensor([3.0, 5.0]))
    Errors(mae=1.0, rmse=1.4142135623730951)
    """
    difference = predicted.double() - actual.double()
    return Errors(difference.abs().mean().item(), difference.square().mean().sqrt().item())


class Evaluation(NamedTuple):
    """What was measured of a model, by name, and what it predicted."""

    errors: dict[str, float]
    predicted: Tensor


@torch.no_grad()
def evaluate(predict: Predict, ratings: Ratings) -> Evaluation:
    """Predictions of ``ratings``, made in large batches, and their errors."""
    batches = zip(ratings.users.split(_BATCH), ratings.items.split(_BATCH), strict=True)
    predicted = torch.cat([predict(*batch) for batch in batches])
    return Evaluation(errors(predicted, ratings.values)._asdict(), predicted)
