"""Training of a matrix factorization: many small steps of Adam in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast.ops import _checks, _training


def matrix_factorization_adam_(
    user_table: Tensor,
    item_table: Tensor,
    user_moments: tuple[Tensor, Tensor],
    item_moments: tuple[Tensor, Tensor],
    user_ids: Tensor,
    item_ids: Tensor,
    ratings: Tensor,
    *,
    batch_size: int,
    first_step: int = 0,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    """One step of Adam for each batch of ratings of a matrix factorization, in place.

    The loss of a batch is ``mean((user_table[u] . item_table[i] - rating)^2)``, and the steps are
    what `torch.optim.Adam` without weight decay does to two embedding tables, batch after batch in
    the order given: also rows outside of a batch move in its step, as long as their first moment
    lasts. On the CPU only the rows of a batch are touched; a row makes up for the steps that it
    missed when it is next used, or at the end of the call, by a closed form that is exact to
    rounding. The time of a step therefore depends on the batch and not on the tables.

    Args:
        user_table: ``[U, D]``, float32 or float64, contiguous; updated in place.
        item_table: ``[I, D]``, the same.
        user_moments: Adam's ``exp_avg`` and ``exp_avg_sq`` of ``user_table``, like it, contiguous;
            updated in place. Zeros before the first step.
        item_moments: Those of ``item_table``.
        user_ids: Integers ``[N]``, row of ``user_table`` for each rating.
        item_ids: Integers ``[N]``, row of ``item_table``.
        ratings: ``[N]``, like the tables.
        batch_size: Ratings in a step; the last batch may have fewer.
        first_step: Number of steps that the moments have seen before.
        learning_rate: Adam's rate.
        betas: Decay of the moments, ``0 < beta1 < beta2 < 1``.
        eps: Added to the denominator.
        backend: See :mod:`mimnet_fast.backends`. GPUs have the reference only.

    Returns:
        The loss of every batch before its step, ``[ceil(N / batch_size)]``. No gradients flow.

    Raises:
        ValueError: for wrong shapes, tables that are not contiguous, ids that are not rows,
            numbers out of range.
        TypeError: for wrong types.

    Source: Adam is Kingma and Ba, ICLR 2015; the model is stage 1 of MIMNet (arXiv 2408.00038).

    Example:
        >>> import torch
        >>> users, items = torch.ones(3, 2), torch.ones(4, 2)
        >>> moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in (users, items)]
        >>> rated = torch.tensor([0, 2, 0]), torch.tensor([3, 3, 1]), torch.tensor([5.0, 3.0, 1.0])
        >>> matrix_factorization_adam_(
        ...     users, items, *moments, *rated, batch_size=2, learning_rate=0.5
        ... )
        tensor([5., 4.])
    """
    user_table = _table("user_table", user_table, "[U, D]", None)
    item_table = _table("item_table", item_table, "[I, D]", user_table)
    if item_table is user_table:
        raise ValueError("item_table: got user_table, need a table of its own to update")
    moments = (
        *_moments("user_moments", user_moments, user_table, "[U, D]"),
        *_moments("item_moments", item_moments, item_table, "[I, D]"),
    )
    count = _checks.is_tensor("ratings", ratings, (1,), "[N]").shape[0]
    _checks.not_empty("ratings", N=count)
    _checks.same("ratings", ratings, (count,), "[N]", user_table)
    rows = user_table.shape[0], item_table.shape[0]
    user_ids = _training.ids("user_ids", user_ids, count, "[N]", rows[0], user_table)
    item_ids = _training.ids("item_ids", item_ids, count, "[N]", rows[1], user_table)
    learning_rate, beta1, beta2, eps = _training.schedule(
        batch_size, first_step, learning_rate, betas, eps
    )
    tensors = (user_table, item_table, *moments)
    unsupported = _training.unsupported("matrix_factorization_adam_", user_table.device.type)
    chosen = backends.select("matrix_factorization_adam_", backend, user_table, unsupported)
    with torch.no_grad():
        if chosen == "reference":
            return reference.matrix_factorization_adam_(
                user_table,
                item_table,
                (moments[0], moments[1]),
                (moments[2], moments[3]),
                user_ids,
                item_ids,
                ratings,
                batch_size=batch_size,
                first_step=first_step,
                learning_rate=learning_rate,
                betas=(beta1, beta2),
                eps=eps,
            )
        losses: Tensor = torch.ops.mimnet_fast.matrix_factorization_adam_(
            *(t.detach() for t in tensors),
            user_ids,
            item_ids,
            ratings.detach().contiguous(),
            batch_size,
            first_step,
            learning_rate,
            beta1,
            beta2,
            eps,
        )
        _training.changed(tensors)
        return losses


def _table(name: str, value: Any, meaning: str, like: Tensor | None) -> Tensor:
    table = _checks.is_tensor(name, value, (2,), meaning)
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: got dtype {table.dtype}, need float32 or float64")
    _checks.not_empty(name, rows=table.shape[0], D=table.shape[1])
    if like is not None:
        _checks.same(name, table, (table.shape[0], like.shape[1]), meaning, like)
    return _training.contiguous(name, table)


def _moments(name: str, value: Any, table: Tensor, meaning: str) -> tuple[Tensor, Tensor]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: got {type(value).__name__}, need (exp_avg, exp_avg_sq)")
    for index, moment in enumerate(value):
        _checks.same(f"{name}[{index}]", moment, tuple(table.shape), meaning, table)
        _training.contiguous(f"{name}[{index}]", moment)
    return value[0], value[1]


@torch.library.register_fake("mimnet_fast::matrix_factorization_adam_")
def _fake(*arguments: Any) -> Tensor:
    ratings, batch_size = arguments[8], arguments[9]
    return ratings.new_empty((ratings.shape[0] + batch_size - 1) // batch_size)
