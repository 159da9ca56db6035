"""Multi-granularity attention: the item (fine) and its prototype (coarse) guide, a gate fuses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimnet_fast.reference._precision import accumulate_in_float32
from mimnet_fast.reference.target_attention import (
    target_attention,
    target_attention_reassociated,
)

AttentionWeights = tuple[Tensor, Tensor, Tensor, Tensor]


def _fuse(
    attend: Callable[..., tuple[Tensor, Tensor]],
    item: Tensor,
    prototype: Tensor,
    interests: Tensor,
    fine: AttentionWeights,
    coarse: AttentionWeights,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    by_item, _ = attend(item, interests, *fine)
    by_prototype, _ = attend(prototype, interests, *coarse)
    gate = torch.sigmoid(torch.cat([item, prototype], -1) @ fusion_weight + fusion_bias)
    mixed = (1 - gate)[..., None] * by_item + gate[..., None] * by_prototype
    return mixed, gate


@accumulate_in_float32
def multi_granularity_attention(
    item: Tensor,
    prototype: Tensor,
    interests: Tensor,
    fine: AttentionWeights,
    coarse: AttentionWeights,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Textbook form. Returns the fused user vector and the gate."""
    return _fuse(
        target_attention, item, prototype, interests, fine, coarse, fusion_weight, fusion_bias
    )


@accumulate_in_float32
def multi_granularity_attention_reassociated(
    item: Tensor,
    prototype: Tensor,
    interests: Tensor,
    fine: AttentionWeights,
    coarse: AttentionWeights,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same with both attentions in their reassociated form."""
    return _fuse(
        target_attention_reassociated,
        item,
        prototype,
        interests,
        fine,
        coarse,
        fusion_weight,
        fusion_bias,
    )
