"""Multi-granularity attention: the item (fine) and its prototype (coarse) guide, a gate fuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast.ops import _autograd, _checks
from mimnet_fast.reference.multi_granularity_attention import AttentionWeights

_PARTS = ("key_weight", "key_bias", "value_weight", "value_bias")


def check_count(name: str, weights: Any) -> None:
    """An attention has four tensors."""
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"{name}: got {type(weights).__name__}, need ({', '.join(_PARTS)})")
    if len(weights) != len(_PARTS):
        raise ValueError(f"{name}: got {len(weights)} tensors, need 4 ({', '.join(_PARTS)})")


def check_fusion(
    fine: AttentionWeights,
    coarse: AttentionWeights,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    d: int,
    like: Tensor,
) -> None:
    """Both attentions' tensors and the gate's."""
    for name, weights in (("fine", fine), ("coarse", coarse)):
        for part, tensor in zip(_PARTS, weights, strict=True):
            shape = (d, d) if part.endswith("weight") else (d,)
            meaning = "[D, D]" if part.endswith("weight") else "[D]"
            _checks.same(f"{name}.{part}", tensor, shape, meaning, like)
    _checks.same("fusion_weight", fusion_weight, (2 * d,), "[2*D]", like)
    bias = _checks.is_tensor("fusion_bias", fusion_bias, (0, 1), "[] or [1]")
    _checks.same("fusion_bias", fusion_bias, (1,) * bias.dim(), "[] or [1]", like)


def multi_granularity_attention(
    item: Tensor,
    prototype: Tensor,
    interests: Tensor,
    fine: AttentionWeights,
    coarse: AttentionWeights,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    *,
    return_gate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fuse two target-guided attentions over one user's interests (MIMNet, arXiv 2408.00038).

    ``u_f`` attends from the item with the ``fine`` weights, ``u_c`` from its prototype with
    ``coarse`` (:func:`target_attention`, no scale); ``gate = sigmoid(fusion_weight . [item;
    prototype] + fusion_bias)``; the result is ``(1 - gate) u_f + gate u_c``.

    Args:
        item: ``[B, D]``, or ``[B, C, D]`` for C candidates per user.
        prototype: Like ``item``: the prototype of each candidate.
        interests: ``[B, K, D]``.
        fine: ``(key_weight [D, D], key_bias [D], value_weight [D, D], value_bias [D])``.
        coarse: The same for the prototype.
        fusion_weight: ``[2*D]``, first the item's half.
        fusion_bias: ``[]`` or ``[1]``.
        return_gate: Also return the gate.
        backend: See :mod:`mimnet_fast.backends`.

    Returns:
        A tensor like ``item``; with ``return_gate`` also the gate ``[B]`` or ``[B, C]``.

    Raises:
        ValueError: for shapes or devices that do not fit, naming the argument.
        TypeError: for wrong types or dtypes.

    Example:
        >>> import torch
        >>> eye, zero = torch.eye(4), torch.zeros(4)
        >>> item, interests = torch.randn(2, 4), torch.randn(2, 3, 4)
        >>> weights = (eye, zero, eye, zero)
        >>> fusion = torch.zeros(8), torch.zeros(())
        >>> out, gate = multi_granularity_attention(
        ...     item, item, interests, weights, weights, *fusion, return_gate=True)
        >>> gate
        tensor([0.5000, 0.5000])
    """
    if isinstance(fine, tuple) and isinstance(coarse, tuple):
        tensors = (item, prototype, interests, *fine, *coarse, fusion_weight, fusion_bias)
        if backends.trusts_native(backend, *tensors):
            try:
                out, gate = _CALLS["native"](*tensors)
                return (out, gate) if return_gate else out
            except backends.REFUSALS:
                pass  # the checks below say what does not fit
    item = _checks.leading("item", item, (2, 3), "[B, D] or [B, C, D]")
    _checks.is_tensor("interests", interests, (3,), "[B, K, D]")
    check_count("fine", fine)
    check_count("coarse", coarse)
    tensors = (item, prototype, interests, *fine, *coarse, fusion_weight, fusion_bias)
    tensors = _checks.autocast(tensors, item)
    item, prototype, interests = tensors[:3]
    d, k = item.shape[-1], interests.shape[1]
    _checks.same("prototype", prototype, tuple(item.shape), "the shape of item", item)
    _checks.same("interests", interests, (item.shape[0], k, d), "[B, K, D]", item)
    _checks.not_empty("interests", K=k, D=interests.shape[-1])
    check_fusion(tensors[3:7], tensors[7:11], tensors[11], tensors[12], d, item)
    chosen = backends.select("multi_granularity_attention", backend, item, {})
    if chosen == "reference":
        out, gate = _reference(*tensors)
    else:
        out, gate = _CALLS[chosen](*tensors)
    return (out, gate) if return_gate else out


def _reference(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    item, prototype, interests, fkw, fkb, fvw, fvb, ckw, ckb, cvw, cvb, weight, bias = tensors
    fine, coarse = (fkw, fkb, fvw, fvb), (ckw, ckb, cvw, cvb)
    return reference.multi_granularity_attention(
        item, prototype, interests, fine, coarse, weight, bias
    )


def _fake(item: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return item.new_empty(item.shape), item.new_empty(item.shape[:-1])


def _fake_backward(grad: Tensor, grad_gate: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *inputs, needs = args
    return _autograd.empty_or_like(inputs, inputs[0], needs)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(
    kernel: Any, ctx: Any, grad: Tensor | None, grad_gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    inputs, needs = ctx.saved_tensors, ctx.needs_input_grad
    if torch.is_grad_enabled():
        return tuple(_autograd.reference_vjp(_reference, inputs, needs, [grad, grad_gate]))
    if grad is None and grad_gate is None:
        return (None,) * 13
    found = kernel(
        torch.zeros_like(inputs[0]) if grad is None else grad,
        grad_gate,
        *inputs,
        _autograd.bits(needs),
    )
    return _autograd.wanted(found, needs)


_CALLS = _autograd.register("multi_granularity_attention", _fake, _fake_backward, _setup, _backward)
