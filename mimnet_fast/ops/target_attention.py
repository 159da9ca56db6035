"""Target-guided attention: the candidate item weighs the user's interests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast.ops import _autograd, _checks

_QUERY = "[B, D] or [B, C, D]"


def _check_projections(
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    like: Tensor,
) -> None:
    d = like.shape[-1]
    for kind, weight, bias in (
        ("key", key_weight, key_bias),
        ("value", value_weight, value_bias),
    ):
        if weight is not None:
            _checks.same(f"{kind}_weight", weight, (d, d), "[D, D]", like)
        if bias is not None:
            if weight is None:
                raise ValueError(f"{kind}_bias: got a tensor, but {kind}_weight is None")
            _checks.same(f"{kind}_bias", bias, (d,), "[D]", like)


def target_attention(
    query: Tensor,
    interests: Tensor,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    capsule_mask: Tensor | None = None,
    scale: float = 1.0,
    power: float = 1.0,
    hard: bool = False,
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from candidates to their user's K interests (label-aware attention of MIND, MIMNet).

    ``a = softmax_k(scale * (q . (W_K u_k + b_K))^power)``, ``out = sum_k a_k (W_V u_k + b_V)``; a
    projection that is None is the identity. The compiled backends move the projections to the query
    and to the sum; the key bias then cancels in the softmax, so its gradient is 0.

    Args:
        query: ``[B, D]``, or ``[B, C, D]`` for C candidates per user.
        interests: ``[B, K, D]``.
        key_weight: ``[D, D]`` as in ``torch.nn.Linear``, or None.
        key_bias: ``[D]`` or None.
        value_weight: ``[D, D]`` or None.
        value_bias: ``[D]`` or None.
        capsule_mask: Boolean ``[B, K]``; absent interests weigh 0, a user without any gets 0.
        scale: Multiplies the scores.
        power: A positive whole number, the exponent of a score before the scale. An even one loses
            the score's sign, as in the code that uses it.
        hard: Take the best interest alone (the first of equals); its gradient reaches the values
            only.
        return_weights: Also return the weights.
        backend: See :mod:`mimnet_fast.backends`.

    Returns:
        A tensor like ``query``; with ``return_weights`` also the weights, ``[B, K]`` or
        ``[B, C, K]``.

    Raises:
        ValueError: for shapes, devices or options that do not fit, naming the argument.
        TypeError: for wrong types or dtypes.

    Example:
        >>> import torch
        >>> interests = torch.eye(3)[None]
        >>> out, weights = target_attention(
        ...     interests[:, 0], interests, hard=True, return_weights=True)
        >>> weights
        tensor([[1., 0., 0.]])
    """
    tensors = (query, interests, key_weight, key_bias, value_weight, value_bias, capsule_mask)
    plain = type(scale) is type(power) is float and power == 1.0
    if plain and backends.trusts_native(backend, *tensors):
        try:
            out, weights = _CALLS["native"](*tensors, scale, 1, hard)
            return (out, weights) if return_weights else out
        except backends.REFUSALS:
            pass  # the checks below say what does not fit
    query = _checks.leading("query", query, (2, 3), _QUERY)
    _checks.is_tensor("interests", interests, (3,), "[B, K, D]")
    query, interests, key_weight, key_bias, value_weight, value_bias = _checks.autocast(
        (query, interests, key_weight, key_bias, value_weight, value_bias), query
    )
    k = interests.shape[1]
    shape = (query.shape[0], k, query.shape[-1])
    _checks.same("interests", interests, shape, "[B, K, D]", query)
    _checks.not_empty("interests", K=k, D=interests.shape[-1])
    _check_projections(key_weight, key_bias, value_weight, value_bias, interests)
    if capsule_mask is not None:
        _checks.capsule_mask(capsule_mask, query.shape[0], k, query)
    scale = _checks.number("scale", scale, above=0.0, meaning="multiplies the scores")
    power = _checks.number("power", power, above=0.0, meaning="exponent of the scores")
    if power != int(power):
        raise ValueError(
            f"power: got {power}, need a whole number: a negative score has no such power"
        )
    unsupported = []
    if power != 1.0 and key_bias is not None:
        unsupported.append("a key bias cancels only with power=1")
    chosen = backends.select(
        "target_attention", backend, query, dict.fromkeys(backends.KERNELS, unsupported)
    )
    if chosen == "reference":
        out, weights = reference.target_attention(
            query,
            interests,
            key_weight,
            key_bias,
            value_weight,
            value_bias,
            capsule_mask=capsule_mask,
            scale=scale,
            power=power,
            hard=hard,
        )
    else:
        out, weights = _CALLS[chosen](
            query,
            interests,
            key_weight,
            key_bias,
            value_weight,
            value_bias,
            capsule_mask,
            scale,
            int(power),
            hard,
        )
    return (out, weights) if return_weights else out


def _fake(query: Tensor, interests: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(*query.shape[:-1], interests.shape[1])


def _fake_backward(grad: Tensor, grad_weights: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _autograd.empty_or_like(args[:6], args[0], args[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.power, ctx.hard = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(
    kernel: Any, ctx: Any, grad: Tensor | None, grad_weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, capsule_mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    grads: Sequence[Tensor | None] = [None] * 6
    if torch.is_grad_enabled():

        def again(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return reference.target_attention(
                *tensors,
                capsule_mask=capsule_mask,
                scale=ctx.scale,
                power=ctx.power,
                hard=ctx.hard,
            )

        grads = _autograd.reference_vjp(again, tensors, needs, [grad, grad_weights])
    elif grad is not None or grad_weights is not None:
        found = kernel(
            torch.zeros_like(tensors[0]) if grad is None else grad,
            grad_weights,
            *tensors,
            capsule_mask,
            ctx.scale,
            ctx.power,
            ctx.hard,
            _autograd.bits(needs),
        )
        grads = _autograd.wanted(found, needs)
    return (*grads, *(None,) * 4)


_CALLS = _autograd.register("target_attention", _fake, _fake_backward, _setup, _backward)
