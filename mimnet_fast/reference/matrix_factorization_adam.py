"""Training of a matrix factorization, batch after batch."""

from __future__ import annotations

import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]
"""Adam's moving averages of the gradient of a table and of its square."""


def matrix_factorization_adam_(
    user_table: Tensor,
    item_table: Tensor,
    user_moments: Moments,
    item_moments: Moments,
    user_ids: Tensor,
    item_ids: Tensor,
    ratings: Tensor,
    *,
    batch_size: int,
    first_step: int = 0,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """Adam on the mean squared error of ``user_table[u] . item_table[i]``, in place.

    Every row of both tables moves in every step. See `mimnet_fast.ops`.
    """
    losses = []
    batches = zip(*(each.split(batch_size) for each in (user_ids, item_ids, ratings)), strict=True)
    for step, (user, item, rating) in enumerate(batches, first_step + 1):
        users, items = user_table[user], item_table[item]
        error = (users * items).sum(-1) - rating
        losses.append(error.square().mean())
        slope = (2 * error / len(error))[:, None]
        for table, moments, ids, gradients in (
            (user_table, user_moments, user, slope * items),
            (item_table, item_moments, item, slope * users),
        ):
            gradient = torch.zeros_like(table).index_add_(0, ids, gradients)
            adam_(table, gradient, moments, step, learning_rate, betas, eps)
    return torch.stack(losses)


def adam_(
    values: Tensor,
    gradient: Tensor,
    moments: Moments,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of Adam in place, algorithm 1 of Kingma and Ba (ICLR 2015)."""
    (first, second), (beta1, beta2) = moments, betas
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (second / (1 - beta2**step)).sqrt_().add_(eps)
    values.addcdiv_(first, scale, value=-learning_rate / (1 - beta1**step))
