"""The best items of a catalogue for every user, scored as MIMNet rates them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from mimnet_fast.reference._precision import accumulate_in_float32
from mimnet_fast.reference.multi_granularity_attention import (
    AttentionWeights,
    multi_granularity_attention,
)

_ELEMENTS = 1 << 22
"""Of a temporary [B, items, D]: the catalogue is cut into chunks of that size."""


def _stream(
    score: Callable[[Tensor, Tensor], Tensor],
    users: int,
    items: Tensor,
    prototypes: Tensor,
    k: int,
    prototype_ids: Tensor | None,
    exclude: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, merge ``score(items, prototypes)`` [users, chunk] into the best k so far."""
    device = items.device
    best = items.new_full((users, k), -torch.inf)
    indices = torch.full((users, k), -1, device=device)
    step = max(1, _ELEMENTS // max(1, users * items.shape[1]))
    for start in range(0, items.shape[0], step):
        chunk = items[start : start + step]
        size = chunk.shape[0]
        if prototype_ids is None:
            guides = prototypes[start : start + step]
        else:
            guides = prototypes[prototype_ids[start : start + step]]
        scores = score(chunk, guides)
        absent = scores.isnan()
        if exclude is not None:
            absent |= _excluded(exclude, users, start, size)
        scores = scores.masked_fill(absent, -torch.inf)
        ids = torch.arange(start, start + size, device=device).expand(users, size)
        # What is there already has lower indices, so a stable sort lets them win a tie.
        best, order = torch.cat([best, scores], 1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, :k], order[:, :k]
        indices = torch.cat([indices, ids], 1).gather(1, order)
    return best, indices.masked_fill(best == -torch.inf, -1)


def _excluded(exclude: tuple[Tensor, Tensor], users: int, start: int, size: int) -> Tensor:
    """Which of the items from ``start`` on each user must not get, ``[users, size]``."""
    items, offsets = exclude
    place = torch.arange(len(items), device=items.device)
    user = torch.searchsorted(offsets.contiguous(), place, right=True)
    outside = (items < start) | (items >= start + size)
    flags = torch.zeros(users, size + 1, dtype=torch.bool, device=items.device)
    flags[user - 1, torch.where(outside, size, items - start)] = True
    return flags[:, :size]


@accumulate_in_float32
def catalogue_top_k(
    interests: Tensor,
    items: Tensor,
    prototypes: Tensor,
    fine: AttentionWeights,
    coarse: AttentionWeights,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    k: int,
    *,
    prototype_ids: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Textbook form: a user vector for every user and item. Returns scores and indices."""
    users = interests.shape[0]

    def score(item: Tensor, prototype: Tensor) -> Tensor:
        item, prototype = item.expand(users, -1, -1), prototype.expand(users, -1, -1)
        user, _ = multi_granularity_attention(
            item, prototype, interests, fine, coarse, fusion_weight, fusion_bias
        )
        return (user * item).sum(-1)

    return _stream(score, users, items, prototypes, k, prototype_ids, exclude)


@accumulate_in_float32
def catalogue_top_k_reassociated(
    interests: Tensor,
    items: Tensor,
    prototypes: Tensor,
    fine: AttentionWeights,
    coarse: AttentionWeights,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    k: int,
    *,
    prototype_ids: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The same from scores alone: ``score = sum_k a_k (W_V u_k + b_V) . v``, no user vectors."""

    def attend(weights: AttentionWeights) -> Callable[[Tensor, Tensor], Tensor]:
        key_weight, _, value_weight, value_bias = weights
        keys = interests @ key_weight.mT
        values = linear(interests, value_weight, value_bias)
        return lambda query, item: ((keys @ query.mT).softmax(1) * (values @ item.mT)).sum(1)

    by_item, by_prototype = attend(fine), attend(coarse)

    def score(item: Tensor, prototype: Tensor) -> Tensor:
        gate = torch.sigmoid(torch.cat([item, prototype], -1) @ fusion_weight + fusion_bias)
        return (1 - gate) * by_item(item, item) + gate * by_prototype(prototype, item)

    users = interests.shape[0]
    return _stream(score, users, items, prototypes, k, prototype_ids, exclude)
