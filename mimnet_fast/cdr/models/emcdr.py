"""EMCDR: one map for all users, fitted to their embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from mimnet_fast.cdr.config import Mapping
from mimnet_fast.cdr.models.mapping import MappingModel, build_mapping
from mimnet_fast.cdr.models.transfer import FrozenInputs


class EMCDR(MappingModel):
    """Embedding and mapping (Man et al., IJCAI 2017).

    ::

        loss = mean over users and features of (f(source_user) - target_user)^2
        rating = f(source_user) . item

    ``f`` is one matrix without bias, as in the code of PTUPCDR, or the paper's MLP. Deviations: the
    MLP ends without a tanh, since these embeddings are not bounded, and batches have as many users
    as those of other models have ratings (PTUPCDR's code: 64 or 128).

    Args:
        features: D, of the stage-1 embeddings.
        kind: ``"linear"`` or ``"mlp"``.
    """

    def __init__(self, features: int, kind: Mapping) -> None:
        super().__init__()
        self.mapping = build_mapping(kind, features, bias=False)

    def loss(
        self, inputs: FrozenInputs, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> Tensor:
        """Mean squared error of the embeddings."""
        (users,) = batch
        return mse_loss(self.transfer(inputs.source_users[users]), inputs.target_users[users])
