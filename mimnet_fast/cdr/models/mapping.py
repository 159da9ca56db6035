"""Models that carry a user over without looking at ratings: base class and the maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Linear, Module, Sequential, Tanh

from mimnet_fast.cdr.config import Mapping
from mimnet_fast.cdr.models.transfer import FrozenInputs, TransferModel, dot_products
from mimnet_fast.cdr.protocol import Phase


class MappingModel(TransferModel):
    """Base of the models whose examples are the training users of both domains, one row each."""

    mapping: Module
    """What `transfer` applies, where a model has no other way."""

    def transfer(self, users: Tensor) -> Tensor:
        """Source users ``[B, D]`` as target users ``[B, D]``."""
        mapped: Tensor = self.mapping(users)
        return mapped

    def forward(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        items: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `TransferModel.forward`: ``transfer(source_user) . item``."""
        transferred = self.transfer(inputs.source_users[users])
        ratings: Tensor = (transferred * inputs.target_items[items]).sum(-1)
        return ratings

    def scores(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        candidates: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `TransferModel.scores`."""
        transferred = self.transfer(inputs.source_users[users])
        return dot_products(transferred, inputs.target_items, candidates)

    def examples(self, inputs: FrozenInputs, phase: Phase) -> tuple[Tensor, ...]:
        """See `TransferModel.examples`: the users alone."""
        return (phase.train_meta.users.unique(),)


def build_mapping(kind: Mapping, features: int, *, bias: bool) -> Module:
    """A map of embeddings: ``"linear"``, or ``"mlp"``: 2 D hidden units and tanh."""
    if kind == "linear":
        return Linear(features, features, bias)
    return Sequential(Linear(features, 2 * features), Tanh(), Linear(2 * features, features))
