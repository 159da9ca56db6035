"""Training of MIMNet's second stage, batch after batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mimnet_fast.reference.matrix_factorization_adam import adam_
from mimnet_fast.reference.mimnet_forward import MIMNetParameters, mimnet_forward


def mimnet_adam_(
    parameters: MIMNetParameters,
    moments: tuple[MIMNetParameters, MIMNetParameters],
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    histories: Tensor,
    lengths: Tensor,
    history_table: Tensor,
    source_table: Tensor,
    item_table: Tensor,
    prototype_table: Tensor,
    logits: Tensor,
    *,
    batch_size: int,
    weights: Tensor | None = None,
    average: MIMNetParameters | None = None,
    averaging: float = 0.0,
    iterations: int = 3,
    padding: str = "zero_after",
    first_step: int = 0,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    """Adam on the weighted mean squared error of `mimnet_forward`, in place.

    See `mimnet_fast.ops`.
    """
    losses = []
    first, second = (each.flat() for each in moments)
    position = torch.arange(histories.shape[1], device=histories.device)
    columns = users, items, ratings, logits
    batches = zip(*(column.split(batch_size) for column in columns), strict=True)
    for done, (user, item, rating, drawn) in enumerate(batches, first_step):
        leaves = [tensor.detach().requires_grad_() for tensor in parameters.flat()]
        with torch.enable_grad():
            rated = mimnet_forward(
                histories[user],
                source_table[user],
                item_table[item],
                prototype_table[item],
                MIMNetParameters.of(leaves),
                drawn,
                mask=position < lengths[user][:, None],
                table=history_table,
                iterations=iterations,
                padding=padding,
            )
            weight = 1 if weights is None else weights[user]
            loss = (weight * (rated - rating).square()).mean()
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, leaves)
        for n, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            values = leaf.detach()
            gradient = gradient + weight_decay * values
            moving = first[n], second[n]
            adam_(values, gradient, moving, done + 1, learning_rate, betas, eps)
            if average is not None:
                average.flat()[n].lerp_(values, 1 - min(averaging, done / (9 + done)))
    return torch.stack(losses)
