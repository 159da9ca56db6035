"""REMIT: several views of a user, each with its own bridge, mixed by a selector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import embedding

from mimnet_fast import nn
from mimnet_fast.cdr.models.transfer import FrozenInputs, TransferModel, weighted_squared_error


class REMIT(TransferModel):
    """Reinforced multi-interest transfer (Sun et al., AAAI 2023).

    ::

        q_1 = source_user;  q_2 = what users of the liked items have in common (user-item-user)
        q_3, q_4 = the same over items of the same category, of the same brand, with metadata
        p_m = attention of q_m over the history;  t_m = q_m reshape(meta(p_m))
        pi = softmax(policy([item, t_1, .., t_M, t_1 . item, .., t_M . item]))
        rating = sum_m pi_m (t_m . item)

    The bridges learn from the squared error with ``pi`` held fixed; the policy learns by REINFORCE:
    a view m is drawn from ``pi`` for each rating, and its reward is by how much the squared error
    of ``t_m . item`` is below that of the plain mean of the views.

    Deviations. How the public code trained its views is not published: here they are means, see
    `FrozenInputs.neighbours`. There, no gradient reaches the policy, its state holds a
    target user looked up by an item's id, and the reward is that of the whole batch; bridges and
    policy take turns with a replay of an epoch, after an epoch with equal weights.

    Args:
        features: D, of the stage-1 embeddings.
        hidden: Hidden units of the meta network.
        kinds: Kinds of item metadata, each of which is one more view.
        backend: See `mimnet_fast.backends`.
    """

    def __init__(
        self, features: int, hidden: int, kinds: int = 0, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.attention = nn.TargetAttention(features, projections=False, backend=backend)
        self.bridge = nn.InterestBridge(features, features, features, hidden, backend=backend)
        views = 2 + kinds
        state = features + views * (features + 1)
        self.policy = Sequential(Linear(state, state // 2), ReLU(), Linear(state // 2, views))

    def forward(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        items: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `TransferModel.forward`; nothing in it is random."""
        ratings, log_weights = self.views(inputs, users, items)
        return (ratings * log_weights.exp()).sum(-1)

    def views(self, inputs: FrozenInputs, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """What each of M views rates ``[B, M]``, and the logarithm of its weight ``[B, M]``."""
        ids, lengths = inputs.histories[users], inputs.lengths[users]
        history = embedding(ids, inputs.source_items)
        own = inputs.source_users[users].unsqueeze(1)
        interests = torch.cat([own, inputs.neighbours[users]], 1)
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        pooled = self.attention(interests, history, capsule_mask=real)
        transferred = self.bridge(pooled, interests)
        item = inputs.target_items[items]
        ratings = (transferred @ item.unsqueeze(-1)).squeeze(-1)
        state = torch.cat([item, transferred.flatten(1), ratings], 1).detach()
        return ratings, self.policy(state).log_softmax(-1)

    def loss(
        self, inputs: FrozenInputs, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> Tensor:
        """Squared error, for the bridges, and policy loss."""
        users, items, values = batch
        ratings, log_weights = self.views(inputs, users, items)
        weights = log_weights.detach().exp()
        drawn = weights.multinomial(1, generator=generator)
        seen = ratings.detach()
        error = (seen.gather(1, drawn).squeeze(1) - values).square()
        reward = (seen.mean(1) - values).square() - error
        policy_loss = -(reward * log_weights.gather(1, drawn).squeeze(1)).mean()
        return (
            weighted_squared_error(inputs, users, (ratings * weights).sum(-1), values) + policy_loss
        )
