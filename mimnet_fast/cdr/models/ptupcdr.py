"""PTUPCDR: one generated bridge for each user."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import embedding

from mimnet_fast import nn
from mimnet_fast.cdr.models.transfer import FrozenInputs, TransferModel, dot_products


class PTUPCDR(TransferModel):
    """Personalised transfer of user preferences (Zhu et al., WSDM 2022, arXiv 2110.11154).

    ::

        s_j = h . relu(W x_j + b);  a = softmax over the history of s;  p = sum_j a_j x_j
        M = reshape(w2 relu(w1 p + b1) + b2);  rating = (source_user M) . item

    Deviations from the published code: a user with an empty history has ``p = 0`` (there: the
    embedding of a row made for it), and padding has its own id (there: item 0 is padding too).

    Args:
        features: D, of the stage-1 embeddings.
        hidden: Hidden units of the meta network.
        backend: See `mimnet_fast.backends`.
    """

    def __init__(self, features: int, hidden: int, *, backend: str | None = None) -> None:
        super().__init__()
        self.score = Sequential(Linear(features, features), ReLU(), Linear(features, 1, bias=False))
        self.bridge = nn.InterestBridge(features, features, features, hidden, backend=backend)

    def forward(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        items: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `TransferModel.forward`; nothing in it is random."""
        ratings: Tensor = (self.transfer(inputs, users) * inputs.target_items[items]).sum(-1)
        return ratings

    def scores(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        candidates: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `TransferModel.scores`."""
        return dot_products(self.transfer(inputs, users), inputs.target_items, candidates)

    def transfer(self, inputs: FrozenInputs, users: Tensor) -> Tensor:
        """What users ``[B]`` are in the target domain, ``[B, D]``."""
        ids, lengths = inputs.histories[users], inputs.lengths[users]
        history = embedding(ids, inputs.source_items)
        padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        score = self.score(history).squeeze(-1).masked_fill(padding, -1e8)
        weights = score.softmax(-1).masked_fill(padding, 0)  # an empty history has none at all
        characteristics = (weights.unsqueeze(1) @ history).squeeze(1)
        transferred: Tensor = self.bridge(characteristics.unsqueeze(1), inputs.source_users[users])
        return transferred.squeeze(1)
