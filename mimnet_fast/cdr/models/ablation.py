"""MIMNet without one of its parts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import embedding

from mimnet_fast import nn
from mimnet_fast.cdr.models.transfer import FrozenInputs, TransferModel

Part = Literal["capsules", "bridges", "fine", "coarse", "fusion"]


class Ablation(TransferModel):
    """MIMNet made of its parts, with some of them replaced by something plain.

    ==========  ================================================================================
    capsules    K linear maps of the mean of the history instead of dynamic routing
    bridges     one bridge for each user, made of the mean of the interests
    fine        no attention from the item
    coarse      no attention from the item's prototype; without fine and coarse the mean of the
                transferred interests
    fusion      the mean of fine and coarse attention instead of learned shares
    ==========  ================================================================================

    Without nothing it is `MIMNet`, parameter by parameter, only slower. The public code names such
    variants, but the files with most of them are missing there, so what replaces a part is our
    choice.

    Args:
        features: D, of the stage-1 embeddings.
        hidden: Hidden units of the meta network.
        interests: K, capsules per user.
        iterations: Routing passes.
        history_length: L.
        without: The parts to replace; a missing fine or coarse attention leaves nothing to fuse.
        backend: See `mimnet_fast.backends`.
    """

    uses_prototypes = uses_profiles = True

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        interests: int,
        iterations: int,
        history_length: int,
        without: Collection[Part],
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.one_bridge = "bridges" in without
        self.extract = (
            _HistoryMaps(features, interests)
            if "capsules" in without
            else _Capsules(features, interests, iterations, history_length, backend)
        )
        self.bridge = nn.InterestBridge(features, features, features, hidden, backend=backend)
        self.attend = (
            nn.MultiGranularityAttention(features, backend=backend)
            if {"fine", "coarse", "fusion"}.isdisjoint(without)
            else _MeanAttention(features, "fine" not in without, "coarse" not in without, backend)
        )

    def forward(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        items: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `TransferModel.forward`; the generator draws the routing logits."""
        assert inputs.item_prototypes is not None
        history = embedding(inputs.histories[users], inputs.source_items)
        interests = self.extract(history, inputs.lengths[users], generator)
        if self.one_bridge:
            interests = interests.mean(1, keepdim=True)
        transferred = self.bridge(interests, inputs.source_users[users])
        target = inputs.target_items[items]
        user = self.attend(target, inputs.item_prototypes[items], transferred)
        return (user * target).sum(-1)


class _Capsules(Module):
    """Dynamic routing, from one fixed draw of logits where no generator is given."""

    evaluation_logits: Tensor

    def __init__(
        self, features: int, interests: int, iterations: int, length: int, backend: str | None
    ) -> None:
        super().__init__()
        self.routing = nn.DynamicRouting(
            features, features, interests, iterations=iterations, backend=backend
        )
        self.register_buffer("evaluation_logits", torch.randn(1, interests, length))

    def forward(
        self, history: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        logits = self.evaluation_logits
        if generator is not None:
            logits = torch.randn(len(history), *logits.shape[1:], generator=generator)
        capsules: Tensor = self.routing(history, lengths=lengths, logits=logits)
        return capsules


class _HistoryMaps(Module):
    """K linear maps of the mean of a history, which is 0 where the history is empty."""

    def __init__(self, features: int, interests: int) -> None:
        super().__init__()
        self.maps = Linear(features, interests * features)

    def forward(
        self, history: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        mean = history.sum(1) / lengths.clamp_min(1)[:, None]  # padding is zeros
        interests: Tensor = self.maps(mean)
        return interests.unflatten(-1, (-1, history.shape[-1]))


class _MeanAttention(Module):
    """The mean of what is left of fine and coarse attention, or of all interests alike."""

    def __init__(self, features: int, fine: bool, coarse: bool, backend: str | None) -> None:
        super().__init__()
        self.fine = nn.TargetAttention(features, backend=backend) if fine else None
        self.coarse = nn.TargetAttention(features, backend=backend) if coarse else None

    def forward(self, item: Tensor, prototype: Tensor, interests: Tensor) -> Tensor:
        queries = ((self.fine, item), (self.coarse, prototype))
        found = [layer(query, interests) for layer, query in queries if layer is not None]
        return torch.stack(found).mean(0) if found else interests.mean(1)
