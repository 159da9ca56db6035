"""The whole second stage of MIMNet: history to rating."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import embedding

from mimnet_fast.reference._precision import accumulate_in_float32
from mimnet_fast.reference.dynamic_routing import dynamic_routing, dynamic_routing_reassociated
from mimnet_fast.reference.interest_bridge import interest_bridge, interest_bridge_reassociated
from mimnet_fast.reference.multi_granularity_attention import (
    AttentionWeights,
    multi_granularity_attention,
    multi_granularity_attention_reassociated,
)


class MIMNetParameters(NamedTuple):
    """The trainable tensors of MIMNet's second stage (H hidden units, embeddings of width D).

    ``fine`` and ``coarse`` are ``(key_weight, key_bias, value_weight, value_bias)``.
    """

    routing_weight: Tensor
    """``[D, D]``, one matrix shared by all capsules."""
    w1: Tensor
    """``[H, D]``"""
    b1: Tensor
    """``[H]``"""
    w2: Tensor
    """``[D*D, H]``"""
    b2: Tensor
    """``[D*D]``"""
    fine: AttentionWeights
    """``[D, D], [D], [D, D], [D]``: attention guided by the item."""
    coarse: AttentionWeights
    """The same for the attention guided by the prototype."""
    fusion_weight: Tensor
    """``[2*D]``"""
    fusion_bias: Tensor
    """``[]`` or ``[1]``"""

    def flat(self) -> tuple[Tensor, ...]:
        """All tensors, in this order."""
        return (*self[:5], *self.fine, *self.coarse, self.fusion_weight, self.fusion_bias)

    @staticmethod
    def of(flat: Sequence[Tensor]) -> MIMNetParameters:
        """The other way round."""
        routing, w1, b1, w2, b2, fkw, fkb, fvw, fvb, ckw, ckb, cvw, cvb, weight, bias = flat
        fine, coarse = (fkw, fkb, fvw, fvb), (ckw, ckb, cvw, cvb)
        return MIMNetParameters(routing, w1, b1, w2, b2, fine, coarse, weight, bias)


def _compose(
    route: Callable[..., tuple[Tensor, Tensor]],
    bridge: Callable[..., Tensor],
    attend: Callable[..., tuple[Tensor, Tensor]],
    history: Tensor,
    source: Tensor,
    item: Tensor,
    prototype: Tensor,
    parameters: MIMNetParameters,
    logits: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    iterations: int,
    padding: str,
) -> Tensor:
    p = parameters
    embedded = history if table is None else embedding(history, table)
    interests, _ = route(
        embedded, p.routing_weight, logits, mask=mask, iterations=iterations, padding=padding
    )
    transferred = bridge(interests, source, p.w1, p.b1, p.w2, p.b2)
    user, _ = attend(item, prototype, transferred, p.fine, p.coarse, p.fusion_weight, p.fusion_bias)
    return (user * item).sum(-1)


@accumulate_in_float32
def mimnet_forward(
    history: Tensor,
    source: Tensor,
    item: Tensor,
    prototype: Tensor,
    parameters: MIMNetParameters,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    table: Tensor | None = None,
    iterations: int = 3,
    padding: str = "zero_after",
) -> Tensor:
    """Textbook form: every part as the paper writes it."""
    return _compose(
        dynamic_routing,
        interest_bridge,
        multi_granularity_attention,
        history,
        source,
        item,
        prototype,
        parameters,
        logits,
        mask,
        table,
        iterations,
        padding,
    )


@accumulate_in_float32
def mimnet_forward_reassociated(
    history: Tensor,
    source: Tensor,
    item: Tensor,
    prototype: Tensor,
    parameters: MIMNetParameters,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    table: Tensor | None = None,
    iterations: int = 3,
    padding: str = "zero_after",
) -> Tensor:
    """The same ratings from the reassociated parts."""
    return _compose(
        dynamic_routing_reassociated,
        interest_bridge_reassociated,
        multi_granularity_attention_reassociated,
        history,
        source,
        item,
        prototype,
        parameters,
        logits,
        mask,
        table,
        iterations,
        padding,
    )
