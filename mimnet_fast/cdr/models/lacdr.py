"""LACDR: an autoencoder of each domain, aligned where the few hidden units are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import Linear

from mimnet_fast.cdr.models.mapping import MappingModel
from mimnet_fast.cdr.models.transfer import FrozenInputs
from mimnet_fast.cdr.protocol import Phase

HIDDEN = 4
ALIGNMENT = 2.0


class LACDR(MappingModel):
    """Low-dimensional alignment (Wang et al., CIKM 2021).

    ::

        loss = mean over users of  |dec_s enc_s source_user - source_user|   known in the source
               + |dec_t enc_t target_user - target_user|                     known in the target
               + 2 |enc_s source_user - enc_t target_user|                   known in both
        rating = (dec_t enc_s source_user) . item

    All four maps are matrices without bias, with 4 hidden units, as in the code of DiffCDR; unlike
    there, users of one domain only take part, which is the point of the paper, and a user is one
    example for each epoch. Cold-start users are known in the source. The learning rate is that of
    the other models (there: 0.001, and as many examples as a user has ratings).

    Args:
        features: D, of the stage-1 embeddings.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.source_encoder = Linear(features, HIDDEN, bias=False)
        self.source_decoder = Linear(HIDDEN, features, bias=False)
        self.target_encoder = Linear(features, HIDDEN, bias=False)
        self.target_decoder = Linear(HIDDEN, features, bias=False)

    def transfer(self, users: Tensor) -> Tensor:
        """See `MappingModel.transfer`."""
        decoded: Tensor = self.target_decoder(self.source_encoder(users))
        return decoded

    def examples(self, inputs: FrozenInputs, phase: Phase) -> tuple[Tensor, ...]:
        """Rows in the source and in the target table of everyone, -1 where unknown there."""
        source = len(inputs.source_users)
        known = phase.train_target.users.unique()
        partners = torch.full((source,), -1)
        shared = phase.train_meta.users.unique()
        partners[shared] = shared
        alone = known[~torch.isin(known, shared)]
        return (
            torch.cat([torch.arange(source), torch.full_like(alone, -1)]),
            torch.cat([partners, alone]),
        )

    def loss(
        self, inputs: FrozenInputs, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> Tensor:
        """Both reconstructions and the alignment."""
        in_source, in_target = (users >= 0 for users in batch)
        source = inputs.source_users[batch[0].clamp_min(0)]
        target = inputs.target_users[batch[1].clamp_min(0)]
        hidden_source, hidden_target = self.source_encoder(source), self.target_encoder(target)
        distances: Tensor = (
            in_source * vector_norm(self.source_decoder(hidden_source) - source, dim=-1)
            + in_target * vector_norm(self.target_decoder(hidden_target) - target, dim=-1)
            + ALIGNMENT * in_source * in_target * vector_norm(hidden_source - hidden_target, dim=-1)
        )
        return distances.mean()
