"""Training of MIMNet's second stage: many steps of Adam in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast._options import PADDINGS, code
from mimnet_fast.ops import _checks, _training
from mimnet_fast.ops.interest_bridge import check_bridge
from mimnet_fast.ops.multi_granularity_attention import check_count, check_fusion
from mimnet_fast.reference import MIMNetParameters


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
    backend: str | None = None,
) -> Tensor:
    """One step of Adam for each batch of ratings of :func:`mimnet_forward`, in place.

    The loss of a batch is the mean of ``weights[u] * (mimnet_forward(..) - rating)^2``, with
    ``histories[u]`` and rows of the frozen tables, and the steps are those of `torch.optim.Adam`,
    batch after batch in the order given. The key biases of both attentions, which the ratings do
    not depend on, have a gradient of exactly 0 in the kernel.

    Args:
        parameters: As in :func:`mimnet_forward`, float32 or float64; updated in place.
        moments: Adam's ``exp_avg`` and ``exp_avg_sq`` of each parameter; updated in place. Zeros
            before the first step.
        users: Integers ``[N]``: row of ``histories``, ``lengths``, ``source_table``, ``weights``.
        items: Integers ``[N]``: row of ``item_table`` and ``prototype_table``.
        ratings: ``[N]``
        histories: Integer ids ``[U, L]``, rows of ``history_table``.
        lengths: Integers ``[U]``: how many ids of each history are real.
        history_table: ``[S, D]``
        source_table: ``[U, D]`` or with more rows.
        item_table: ``[M, D]``
        prototype_table: ``[M, D]``, the prototype of each item.
        logits: First routing logits of each rating, ``[N, K, L]``.
        batch_size: Ratings in a step; the last batch may have fewer.
        weights: ``[U]``, what an error of each user counts; None is 1.
        average: A moving average of the parameters, updated in place after each step s (from 0):
            it keeps the share ``min(averaging, s / (9 + s))`` of what it was.
        averaging: From 0 to 1, see ``average``.
        iterations: As in :func:`mimnet_forward`.
        padding: As in :func:`mimnet_forward`.
        first_step: Number of steps that the moments have seen before.
        learning_rate: Adam's rate.
        betas: Decay of the moments, ``0 < beta1 < beta2 < 1``.
        eps: Added to the denominator.
        weight_decay: Times a parameter, added to its gradient; at least 0.
        backend: See :mod:`mimnet_fast.backends`. GPUs have the reference only.

    Returns:
        The loss of every batch before its step, ``[ceil(N / batch_size)]``. No gradients flow.

    Raises:
        ValueError: for wrong shapes, ids that are not rows, numbers out of range.
        TypeError: for wrong types.

    Source: the second stage of MIMNet (arXiv 2408.00038), Adam of Kingma and Ba (ICLR 2015).

    Example:
        >>> import torch
        >>> from mimnet_fast import nn
        >>> _ = torch.manual_seed(0)
        >>> routing, bridge = nn.DynamicRouting(4, 4, 3), nn.InterestBridge(4, 4, 4, 8)
        >>> parameters = MIMNetParameters(
        ...     routing.weight, *bridge.parameters(), *nn.MultiGranularityAttention(4).weights())
        >>> zeros = [MIMNetParameters.of([torch.zeros_like(t) for t in parameters.flat()])
        ...          for _ in range(2)]
        >>> users, items, ratings = torch.tensor([0, 1]), torch.tensor([2, 0]), torch.ones(2)
        >>> histories, lengths = torch.tensor([[0, 1], [1, 0]]), torch.tensor([2, 1])
        >>> tables = torch.randn(2, 4), torch.randn(2, 4), torch.randn(3, 4), torch.randn(3, 4)
        >>> mimnet_adam_(parameters, zeros, users, items, ratings, histories, lengths, *tables,
        ...              torch.randn(2, 3, 2), batch_size=1).shape
        torch.Size([2])
    """
    flat = _check_parameters(parameters, source_table)
    d, hidden = source_table.shape[1], parameters.w1.shape[0]
    states = [
        *_check_moments(moments, flat),
        *([] if average is None else [_like("average", average, flat)]),
    ]
    count = _checks.is_tensor("ratings", ratings, (1,), "[N]").shape[0]
    _checks.not_empty("ratings", N=count)
    _checks.same("ratings", ratings, (count,), "[N]", source_table)
    known, length = _checks.is_tensor("histories", histories, (2,), "[U, L]").shape
    size = _checks.is_tensor("history_table", history_table, (2,), "[S, D]").shape[0]
    _checks.same("history_table", history_table, (size, d), "[S, D]", source_table)
    if source_table.shape[0] < known:
        raise ValueError(
            f"source_table: got {source_table.shape[0]} rows, need U = {known} or more"
        )
    goods = _checks.is_tensor("item_table", item_table, (2,), "[M, D]").shape[0]
    _checks.same("item_table", item_table, (goods, d), "[M, D]", source_table)
    _checks.same("prototype_table", prototype_table, (goods, d), "[M, D]", source_table)
    interests = _checks.is_tensor("logits", logits, (3,), "[N, K, L]").shape[1]
    _checks.same("logits", logits, (count, interests, length), "[N, K, L]", source_table)
    _checks.not_empty("logits", K=interests, L=length)
    if weights is not None:
        _checks.same("weights", weights, (known,), "[U]", source_table)
    users = _training.ids("users", users, count, "[N]", known, source_table)
    items = _training.ids("items", items, count, "[N]", goods, source_table)
    lengths = _checks.integers("lengths", lengths, known, "[U]", source_table)
    _checks.in_range("lengths", lengths, 0, length, "the number of real items, at most L")
    ids = _training.ids(
        "histories", histories.reshape(-1), known * length, "[U * L]", size, source_table
    ).view(known, length)
    _checks.whole("iterations", iterations, 1, "the number of weighted sums")
    padding_code = code("padding", padding, PADDINGS)
    learning_rate, beta1, beta2, eps = _training.schedule(
        batch_size, first_step, learning_rate, betas, eps
    )
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay: got {weight_decay}, need at least 0")
    if not 0 <= averaging <= 1:
        raise ValueError(f"averaging: got {averaging}, need 0 to 1 (share that the past keeps)")
    unsupported = _training.unsupported("mimnet_adam_", source_table.device.type)
    chosen = backends.select("mimnet_adam_", backend, source_table, unsupported)
    with torch.no_grad():
        if chosen == "reference":
            losses = reference.mimnet_adam_(
                parameters,
                moments,
                users,
                items,
                ratings,
                ids,
                lengths,
                history_table,
                source_table,
                item_table,
                prototype_table,
                logits,
                batch_size=batch_size,
                weights=weights,
                average=average,
                averaging=averaging,
                iterations=iterations,
                padding=padding,
                first_step=first_step,
                learning_rate=learning_rate,
                betas=(beta1, beta2),
                eps=eps,
                weight_decay=weight_decay,
            )
            return losses
        vectors = [torch.cat([t.reshape(-1) for t in tensors]) for tensors in (flat, *states)]
        losses = torch.ops.mimnet_fast.mimnet_adam_(
            *vectors[:3],
            None if average is None else vectors[3],
            users,
            items,
            ratings.detach().contiguous(),
            None if weights is None else weights.contiguous(),
            ids,
            lengths.contiguous(),
            *(t.detach().contiguous() for t in (history_table, source_table)),
            *(t.detach().contiguous() for t in (item_table, prototype_table, logits)),
            hidden,
            batch_size,
            iterations,
            padding_code,
            first_step,
            learning_rate,
            beta1,
            beta2,
            eps,
            weight_decay,
            averaging,
        )
        for tensors, vector in zip((flat, *states), vectors, strict=True):
            parts = vector.split([t.numel() for t in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        return losses


def _check_parameters(p: Any, source_table: Any) -> tuple[Tensor, ...]:
    table = _checks.is_tensor("source_table", source_table, (2,), "[U, D]")
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"source_table: got dtype {table.dtype}, need float32 or float64")
    d = table.shape[1]
    _checks.not_empty("source_table", D=d)
    if not isinstance(p, MIMNetParameters):
        raise TypeError(f"parameters: got {type(p).__name__}, need MIMNetParameters")
    check_count("parameters.fine", p.fine)
    check_count("parameters.coarse", p.coarse)
    _checks.same("routing_weight", p.routing_weight, (d, d), "[D, D]", table)
    if check_bridge(d, d, p.w1, p.b1, p.w2, p.b2, table) != d:
        raise ValueError(f"b2: got {p.b2.shape[0]} values, need D*D = {d * d}")
    check_fusion(p.fine, p.coarse, p.fusion_weight, p.fusion_bias, d, table)
    return p.flat()


def _check_moments(moments: Any, flat: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    if not isinstance(moments, (tuple, list)) or len(moments) != 2:
        raise TypeError(f"moments: got {type(moments).__name__}, need (exp_avg, exp_avg_sq)")
    return [_like(f"moments[{index}]", each, flat) for index, each in enumerate(moments)]


def _like(name: str, value: Any, flat: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors of a value that is built as the parameters."""
    if not isinstance(value, MIMNetParameters):
        raise TypeError(f"{name}: got {type(value).__name__}, need MIMNetParameters")
    tensors = value.flat()
    for index, (tensor, parameter) in enumerate(zip(tensors, flat, strict=True)):
        shape = tuple(parameter.shape)
        _checks.same(f"{name}.flat()[{index}]", tensor, shape, "that of the parameter", parameter)
    return tensors


@torch.library.register_fake("mimnet_fast::mimnet_adam_")
def _fake(*arguments: Any) -> Tensor:
    ratings, batch_size = arguments[6], arguments[16]
    return ratings.new_empty((ratings.shape[0] + batch_size - 1) // batch_size)
