"""Per-interest bridge: a matrix generated from each interest maps the user's source vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast.ops import _autograd, _checks

_SOURCE = "[B, D_s] (one per user) or [B, K, D_s] (one per interest)"


def check_bridge(
    d_interest: int, d_source: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, like: Tensor
) -> int:
    """Shapes of the meta network's tensors; returns D_t."""
    hidden = _checks.is_tensor("w1", w1, (2,), "[H, D_i]").shape[0]
    _checks.same("w1", w1, (hidden, d_interest), "[H, D_i]", like)
    _checks.same("b1", b1, (hidden,), "[H]", like)
    outputs = _checks.is_tensor("b2", b2, (1,), "[D_s*D_t]").shape[0]
    if outputs % d_source:
        raise ValueError(f"b2: got {outputs} values, need a multiple of D_s = {d_source}")
    _checks.same("w2", w2, (outputs, hidden), "[D_s*D_t, H]", like)
    _checks.same("b2", b2, (outputs,), "[D_s*D_t]", like)
    _checks.not_empty("w1", H=hidden)
    _checks.not_empty("b2", D_t=outputs // d_source)
    return outputs // d_source


def interest_bridge(
    interests: Tensor,
    source: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Transfer a source vector by one generated matrix per interest (MIMNet, arXiv 2408.00038).

    ``out[b,k] = source[b(,k)] @ reshape(w2 relu(w1 interests[b,k] + b1) + b2, [D_s, D_t])``, a row
    vector times a matrix; PTUPCDR's bridge is the case K = 1. No backend but the reference forms a
    matrix: the source is contracted with ``w2`` first, once per user.

    Args:
        interests: ``[B, K, D_i]``.
        source: ``[B, D_s]``, shared by the K interests, or ``[B, K, D_s]``.
        w1: ``[H, D_i]``, as in ``torch.nn.Linear``.
        b1: ``[H]``.
        w2: ``[D_s*D_t, H]``, row ``i*D_t + j`` generates entry ``(i, j)``.
        b2: ``[D_s*D_t]``.
        backend: See :mod:`mimnet_fast.backends`.

    Returns:
        ``[B, K, D_t]``.

    Raises:
        ValueError: for shapes or devices that do not fit, naming the argument.
        TypeError: for wrong types or dtypes.

    Example:
        >>> import torch
        >>> interests, source = torch.randn(2, 3, 4), torch.randn(2, 5)
        >>> w1, b1 = torch.randn(8, 4), torch.randn(8)
        >>> w2, b2 = torch.zeros(5 * 5, 8), torch.eye(5).flatten()
        >>> torch.equal(interest_bridge(interests, source, w1, b1, w2, b2)[:, 0], source)
        True
    """
    if backends.trusts_native(backend, interests, source, w1, b1, w2, b2):
        try:
            return _CALLS["native"](interests, source, w1, b1, w2, b2)
        except backends.REFUSALS:
            pass  # the checks below say what does not fit
    interests = _checks.leading("interests", interests, (3,), "[B, K, D_i]")
    source = _checks.is_tensor("source", source, (2, 3), _SOURCE)
    interests, source, w1, b1, w2, b2 = _checks.autocast(
        (interests, source, w1, b1, w2, b2), interests
    )
    batch, k, d_interest = interests.shape
    d_source = source.shape[-1]
    shape = (batch, d_source) if source.dim() == 2 else (batch, k, d_source)
    _checks.same("source", source, shape, _SOURCE, interests)
    _checks.not_empty("interests", K=k, D_i=d_interest)
    _checks.not_empty("source", D_s=d_source)
    check_bridge(d_interest, d_source, w1, b1, w2, b2, interests)
    chosen = backends.select("interest_bridge", backend, interests, {})
    if chosen == "reference":
        return reference.interest_bridge(interests, source, w1, b1, w2, b2)
    return _CALLS[chosen](interests, source, w1, b1, w2, b2)


def _fake(
    interests: Tensor, source: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    return interests.new_empty(*interests.shape[:2], b2.shape[0] // source.shape[-1])


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, needs = args
    return _autograd.empty_or_like(inputs, inputs[0], needs)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(kernel: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, needs = ctx.saved_tensors, ctx.needs_input_grad
    if torch.is_grad_enabled():
        return tuple(_autograd.reference_vjp(reference.interest_bridge, inputs, needs, [grad]))
    found = kernel(grad, *inputs, _autograd.bits(needs))
    return _autograd.wanted(found, needs)


_CALLS = _autograd.register("interest_bridge", _fake, _fake_backward, _setup, _backward)
