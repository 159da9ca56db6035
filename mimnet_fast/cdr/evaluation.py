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


def user_errors(predicted: Tensor, ratings: Ratings, users: int) -> dict[str, Tensor]:
    """Each user's sum of absolute errors (``"mae"``) and of squared errors (``"rmse"``).

    Args:
        predicted: Predictions of all ``ratings``.
        ratings: What was predicted, by users 0 to ``users - 1``.
        users: O.

    Returns:
        float64 ``[O]`` each.

    >>> ratings = Ratings(torch.tensor([1, 1, 0]), torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))
    >>> user_errors(torch.tensor([2.0, 4.0, 3.0]), ratings, 3)["mae"].tolist()
    [0.0, 3.0, 0.0]
    """
    difference = predicted.double() - ratings.values.double()
    return {
        metric: torch.bincount(ratings.users, values, minlength=users)
        for metric, values in (("mae", difference.abs()), ("rmse", difference.square()))
    }


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
