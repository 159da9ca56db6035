"""Target-guided attention: the candidate item weighs the user's interests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from mimnet_fast.reference._precision import accumulate_in_float32


def _interest_weights(
    scores: Tensor, capsule_mask: Tensor | None, scale: float, power: float, hard: bool
) -> Tensor:
    """Scores ``[B,C,K]`` to weights over K; absent capsules weigh 0, also when all are absent."""
    scores = scale * (scores if power == 1.0 else scores**power)
    if capsule_mask is not None:
        present = capsule_mask[:, None, :]
        scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
    if hard:
        best = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
        weights = best.to(scores.dtype)
    else:
        weights = scores.softmax(-1)
    return weights if capsule_mask is None else weights * present


@accumulate_in_float32
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
) -> tuple[Tensor, Tensor]:
    """Textbook form: K keys and K values per user. Returns the output and the weights."""
    candidates = query[:, None] if query.dim() == 2 else query
    keys = interests if key_weight is None else linear(interests, key_weight, key_bias)
    values = interests if value_weight is None else linear(interests, value_weight, value_bias)
    weights = _interest_weights(candidates @ keys.mT, capsule_mask, scale, power, hard)
    out = weights @ values
    return (out[:, 0], weights[:, 0]) if query.dim() == 2 else (out, weights)


@accumulate_in_float32
def target_attention_reassociated(
    query: Tensor,
    interests: Tensor,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    capsule_mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The same output with the projections moved from K interests to one query and one sum.

    ``q . (W_K u + b_K) = (W_K^T q) . u + const``, and softmax does not see a constant, so the key
    bias drops out; ``sum_k a_k (W_V u_k + b_V) = W_V (sum_k a_k u_k) + b_V sum_k a_k``.
    """
    candidates = query[:, None] if query.dim() == 2 else query
    folded = candidates if key_weight is None else candidates @ key_weight
    weights = _interest_weights(folded @ interests.mT, capsule_mask, scale, 1.0, False)
    out = weights @ interests
    if value_weight is not None:
        out = out @ value_weight.mT
        if value_bias is not None:
            out = out + weights.sum(-1, keepdim=True) * value_bias
    return (out[:, 0], weights[:, 0]) if query.dim() == 2 else (out, weights)
