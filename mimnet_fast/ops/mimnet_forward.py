"""The whole second stage of MIMNet, history to rating, as one op with one backward op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast._options import PADDINGS, code
from mimnet_fast.ops import _autograd, _checks, _jagged
from mimnet_fast.ops.dynamic_routing import (
    JAGGED_LOGITS,
    LOGITS,
    saved_dtype,
    serve_some,
)
from mimnet_fast.ops.interest_bridge import check_bridge
from mimnet_fast.ops.multi_granularity_attention import check_count, check_fusion
from mimnet_fast.reference import MIMNetParameters

_PARAMETERS = 15
_KEEPING = {"cpu"}  # devices whose native kernels can keep more than they must


def mimnet_forward(
    history: Tensor,
    source: Tensor,
    item: Tensor,
    prototype: Tensor,
    parameters: MIMNetParameters,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    table: Tensor | None = None,
    iterations: int = 3,
    padding: str = "zero_after",
    backend: str | None = None,
) -> Tensor:
    """Predict ratings with MIMNet (arXiv 2408.00038): one op instead of about sixty.

    ::

        interests   = dynamic_routing(history, routing_weight, logits)
        transferred = interest_bridge(interests, source, w1, b1, w2, b2)
        user        = multi_granularity_attention(item, prototype, transferred, ...)
        rating      = user . item

    with last-pass routing gradient and softmax over the capsules.

    Args:
        history: Embedded histories ``[B, L, D]``, or integer item ids ``[B, L]`` with ``table``.
            Without padding ``[T, D]`` or ids ``[T]`` with ``offsets``, or a nested tensor of layout
            ``torch.jagged``, as in :func:`dynamic_routing`.
        source: The users' source-domain vectors ``[B, D]``.
        item: Candidate items ``[B, D]``.
        prototype: The candidates' prototypes ``[B, D]``.
        parameters: The trainable tensors, :class:`MIMNetParameters`.
        logits: First routing logits ``[B, K, L]`` or ``[1, K, L]``; with a jagged history
            ``[K, T]``, one for every item, or by position, with L at least the longest history.
        mask: Boolean ``[B, L]``, True at real items; or
        lengths: integer ``[B]``; or
        offsets: integer ``[B+1]`` where the jagged histories start, and T.
        table: Source item table ``[N, D]``, gathered inside the op when ``history`` holds ids.
        iterations: Routing passes, at least 1.
        padding: As in :func:`dynamic_routing`.
        backend: See :mod:`mimnet_fast.backends`.

    Returns:
        Ratings ``[B]``.

    Raises:
        ValueError: for shapes, ids, lengths, devices or options that do not fit, naming the
            argument.
        TypeError: for wrong types or dtypes.

    Example:
        >>> import torch
        >>> from mimnet_fast import nn
        >>> d, routing, bridge = 4, nn.DynamicRouting(4, 4, 3), nn.InterestBridge(4, 4, 4, 8)
        >>> attention = nn.MultiGranularityAttention(4)
        >>> parameters = MIMNetParameters(
        ...     routing.weight, *bridge.parameters(), *attention.weights())
        >>> x, s, v, p = torch.randn(2, 5, d), *torch.randn(3, 2, d)
        >>> mimnet_forward(x, s, v, p, parameters, torch.randn(1, 3, 5)).shape
        torch.Size([2])
    """
    _checks.whole("iterations", iterations, 1, "the number of weighted sums")
    padding_code = code("padding", padding, PADDINGS)
    if (
        lengths is None
        and offsets is None
        and isinstance(parameters, MIMNetParameters)
        and backends.trusts_native(backend, source, history, table, item, prototype, logits, mask)
        and (logits is None or not logits.requires_grad)
        and (table is None or not table.requires_grad)
        and (mask is None or mask.dim() == 2)  # to the op, fewer are lengths or offsets
    ):
        try:
            tensors = history, table, source, item, prototype, *parameters.flat(), logits, mask
            keep = _keeps(source, logits)
            return _CALLS["native"](*tensors, iterations, padding_code, keep)[0]
        except backends.REFUSALS:
            pass  # the checks below say what does not fit
    source = _checks.leading("source", source, (2,), "[B, D]")
    history, offsets = _jagged.unpack("history", history, offsets)
    jagged = offsets is not None
    dims, meaning = ((2, 3), JAGGED_LOGITS) if jagged else ((3,), LOGITS)
    logits = _checks.is_tensor("logits", logits, dims, meaning)
    if not isinstance(parameters, MIMNetParameters):
        raise TypeError(f"parameters: got {type(parameters).__name__}, need MIMNetParameters")
    check_count("parameters.fine", parameters.fine)
    check_count("parameters.coarse", parameters.coarse)
    floats = (source, item, prototype, table, logits, *parameters.flat())
    source, item, prototype, table, logits, *flat = _checks.autocast(floats, source)
    p = MIMNetParameters.of(flat)
    batch, d = source.shape
    rows = None if jagged else batch
    history = _check_history(history, table, rows, source)
    k, length = logits.shape[-2:]
    if not jagged:
        length = history.shape[1]
    _checks.same("item", item, (batch, d), "[B, D]", source)
    _checks.same("prototype", prototype, (batch, d), "[B, D]", source)
    if logits.dim() == 2:
        _checks.same("logits", logits, (k, history.shape[0]), "[K, T]", source)
        _checks.not_empty("logits", K=k)
    else:
        first = 1 if logits.shape[0] == 1 else batch
        _checks.same("logits", logits, (first, k, length), LOGITS, source)
        _checks.not_empty("logits", K=k, L=length)
    _checks.not_empty("source", D=d)
    _checks.same("routing_weight", p.routing_weight, (d, d), "[D, D]", source)
    if check_bridge(d, d, p.w1, p.b1, p.w2, p.b2, source) != d:
        raise ValueError(f"b2: got {p.b2.shape[0]} values, need D*D = {d * d}")
    check_fusion(p.fine, p.coarse, p.fusion_weight, p.fusion_bias, d, source)
    real: Tensor | None
    if offsets is not None:
        most = length if logits.dim() == 3 else None
        real = _checks.offsets(offsets, mask, lengths, history.shape[0], most, source)
        if real.shape[0] != batch + 1:
            raise ValueError(f"offsets: got {real.shape[0]} values, need B + 1 = {batch + 1}")
    else:
        real = _checks.history_mask(mask, lengths, batch, length, source)
    unsupported = []
    if table is not None and table.requires_grad:
        unsupported.append("the table is frozen inside the op; pass embedded histories to train it")
    reasons = {name: list(unsupported) for name in backends.KERNELS}
    if jagged:
        padding_code = PADDINGS.index("ignore")
        if kind := serve_some(source).get("native"):
            reasons["native"].append(f"no {kind} kernel for jagged histories in this version")
    chosen = backends.select("mimnet_forward", backend, source, reasons)
    if chosen == "reference":
        history, logits, mask = _padded(history, logits, real, table)
        return reference.mimnet_forward(
            history,
            source,
            item,
            prototype,
            p,
            logits,
            mask=mask,
            table=table,
            iterations=iterations,
            padding=padding,
        )
    ratings, *_ = _CALLS[chosen](
        history,
        table,
        source,
        item,
        prototype,
        *flat,
        logits.detach(),
        real,
        iterations,
        padding_code,
        chosen == "native" and _keeps(source, logits),
    )
    return ratings


def _keeps(source: Tensor, logits: Tensor) -> bool:
    """Whether the kernels of the CPU find the gradient of the bridge's hidden units in forward.

    A rating's gradient is a number, by which everything before it can be multiplied later. What
    backward needs not repeat for it are D*D*H multiply-adds a user, at K*H numbers to keep.
    """
    return (
        torch.is_grad_enabled()
        and source.shape[-1] ** 2 >= 32 * logits.shape[-2]
        and backends.device_type(source) in _KEEPING
    )


def _padded(
    history: Tensor, logits: Tensor, real: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """History, logits and mask as the reference takes them: a jagged history is padded."""
    if history.dim() == (2 if table is None else 1):
        assert real is not None
        length = logits.shape[2] if logits.dim() == 3 else _jagged.longest(real)
        logits = _jagged.pad_logits(logits, real, length)
        history, real = _jagged.pad(history, real, length)
    return history, logits, _checks.lengths_to_mask(real, history.shape[1])


def _check_history(history: Any, table: Tensor | None, batch: int | None, like: Tensor) -> Tensor:
    """The history, jagged where ``batch`` is None."""
    d = like.shape[-1]
    shape = "[B, L" if batch is not None else "[T"
    dims = 2 if batch is not None else 1
    if table is None:
        meaning = f"{shape}, D]"
        embedded = _checks.leading(
            "history", history, (dims + 1,), f"{meaning} (or ids with table=...)"
        )
        (embedded,) = _checks.autocast((embedded,), like)
        inner = (*embedded.shape[1:-1], d)
        first = embedded.shape[0] if batch is None else batch
        _checks.same("history", embedded, (first, *inner), meaning, like)
        return embedded
    ids = _checks.is_tensor("history", history, (dims,), f"ids {shape}] with a table")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"history: got dtype {ids.dtype}, need int64 or int32 ids with a table")
    rows = _checks.is_tensor("table", table, (2,), "[N, D]").shape[0]
    _checks.same("table", table, (rows, d), "[N, D]", like)
    if batch is not None and ids.shape[0] != batch:
        raise ValueError(f"history: got {ids.shape[0]} rows, need B = {batch}")
    if ids.device != like.device:
        raise ValueError(
            f"history: is on {ids.device}, but the other arguments are on {like.device}"
        )
    _checks.in_range("history", ids, 0, rows - 1, "a row of the table")
    return ids


def _fake(
    history: Tensor, table: Tensor | None, source: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, d = source.shape
    k, hidden = others[2 + _PARAMETERS].shape[-2], others[3].shape[0]
    saved = saved_dtype(source.dtype)
    return (
        source.new_empty(batch),
        source.new_empty(batch, k, d, dtype=saved),
        source.new_empty(batch, k, d, dtype=saved),
        source.new_empty((batch, k, hidden) if others[-1] else 0, dtype=saved),
    )


def _differentiable(history: Any, source: Any, *others: Any) -> tuple[Any, ...]:
    """The 19 inputs that may need a gradient: history, source, item, prototype, parameters."""
    return (history, source, *others[: 2 + _PARAMETERS])


def _fake_backward(
    grad: Tensor, pooled: Tensor, transferred: Tensor, hidden_grad: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    history, _, *others, needs = args
    return _autograd.empty_or_like(_differentiable(history, *others), grad, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.iterations, ctx.padding, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, *tensors)


def _backward(
    kernel: Any, ctx: Any, grad: Tensor | None, *_kept: None
) -> tuple[Tensor | None, ...]:
    flags = ctx.needs_input_grad
    needs = flags[:1] + flags[2 : 5 + _PARAMETERS]
    grads: Sequence[Tensor | None] = [None] * len(needs)
    if grad is not None and torch.is_grad_enabled():
        grads = _differentiable_backward(ctx, grad, needs)
    elif grad is not None:
        found = kernel(grad, *ctx.saved_tensors, ctx.iterations, ctx.padding, _autograd.bits(needs))
        grads = _autograd.wanted(found, needs)
    return (grads[0], None, *grads[1:], *(None,) * 5)


def _differentiable_backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    _, _, _, history, table, *others = ctx.saved_tensors
    logits, mask = others[-2:]

    def again(
        history: Tensor, source: Tensor, item: Tensor, prototype: Tensor, *flat: Tensor
    ) -> Tensor:
        padded, first, real = _padded(history, logits, mask, table)
        return reference.mimnet_forward(
            padded,
            source,
            item,
            prototype,
            MIMNetParameters.of(flat),
            first,
            mask=real,
            table=table,
            iterations=ctx.iterations,
            padding=PADDINGS[ctx.padding],
        )

    return _autograd.reference_vjp(again, _differentiable(history, *others), needs, [grad])


_CALLS = _autograd.register("mimnet_forward", _fake, _fake_backward, _setup, _backward)
