"""SSCDR: the map of EMCDR, held in place by the items that a user liked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from mimnet_fast.cdr.config import Mapping
from mimnet_fast.cdr.models.mapping import MappingModel, build_mapping
from mimnet_fast.cdr.models.transfer import FrozenInputs

MARGIN = 1.0


class SSCDR(MappingModel):
    """Semi-supervised mapping (Kang et al., CIKM 2019).

    ::

        d(a, b) = |a - b|^2
        loss = mean over users of  d(f(source_user), target_user)
               + max(0, 1 + d(f(liked), target_user) - d(f(other), target_user))
        rating = f(source_user) . item

    ``liked`` is an item of the user's history and ``other`` any source item, both drawn for every
    batch; a user without a history has the first term only. ``f`` is one matrix with bias, or an
    MLP. Deviations: as in the code of DiffCDR, embeddings are those of the stage-1 factorizations
    and rate by inner product (the paper: metric learning inside the unit ball, rating by distance),
    and the map of a user is not mixed with those of neighbours. Unlike there, a user is one example
    for each epoch, and draws are new in each.

    Args:
        features: D, of the stage-1 embeddings.
        kind: ``"linear"`` or ``"mlp"``.
    """

    def __init__(self, features: int, kind: Mapping) -> None:
        super().__init__()
        self.mapping = build_mapping(kind, features, bias=True)

    def loss(
        self, inputs: FrozenInputs, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> Tensor:
        """Supervised and triplet term, with weight 1 each."""
        (users,) = batch
        lengths, anchors = inputs.lengths[users], inputs.target_users[users]
        position = (torch.rand(len(users), generator=generator) * lengths).long()
        liked = inputs.histories[users, position]
        other = torch.randint(len(inputs.source_items) - 1, (len(users),), generator=generator)

        def distance(source: Tensor) -> Tensor:
            return (self.transfer(source) - anchors).square().sum(-1)

        near, far = (distance(embedding(ids, inputs.source_items)) for ids in (liked, other))
        triplet = (MARGIN + near - far).clamp_min(0).where(lengths > 0, 0)
        return (distance(inputs.source_users[users]) + triplet).mean()
