"""MIMNet: several interests per user, each with its own generated bridge."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from mimnet_fast import nn, ops
from mimnet_fast.cdr.models.transfer import FrozenInputs, TransferModel


class MIMNet(TransferModel):
    """Multi-interest meta network (arXiv 2408.00038): `ops.mimnet_forward` with its parameters.

    Deviations from the published code, all corrections: the true history is seen (there: its first
    item only), padding has weight 0 in every capsule (there: 1/K) and an id of its own, and
    predictions are repeatable: training draws N(0, 1) routing logits for every batch, prediction
    uses one fixed draw for all users (there: drawn anew in every call).

    Args:
        features: D, of the stage-1 embeddings.
        hidden: Hidden units of the meta network.
        interests: K, capsules per user.
        iterations: Routing passes.
        history_length: L.
        backend: See `mimnet_fast.backends`.
    """

    uses_prototypes = uses_profiles = True
    padding = "zero_after"
    evaluation_logits: Tensor

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        interests: int,
        iterations: int,
        history_length: int,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.iterations, self.backend = iterations, backend
        self.routing = nn.DynamicRouting(features, features, interests)
        self.bridge = nn.InterestBridge(features, features, features, hidden)
        self.attention = nn.MultiGranularityAttention(features)
        self.register_buffer("evaluation_logits", torch.randn(1, interests, history_length))

    def forward(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        items: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `TransferModel.forward`; the generator draws the routing logits."""
        assert inputs.item_prototypes is not None
        history, lengths, table = self.history(inputs, users)
        return ops.mimnet_forward(
            history,
            inputs.source_users[users],
            inputs.target_items[items],
            inputs.item_prototypes[items],
            self.weights(),
            self.logits(users.shape[0], generator),
            lengths=lengths,
            table=table,
            iterations=self.iterations,
            padding=self.padding,
            backend=self.backend,
        )

    def scores(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        candidates: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `TransferModel.scores`."""
        assert inputs.item_prototypes is not None
        items, prototypes = (
            rows.expand(len(users), *rows.shape) if candidates is None else rows[candidates]
            for rows in (inputs.target_items, inputs.item_prototypes)
        )
        return self._rated(items, prototypes, self._interests(inputs, users, generator))

    def predict(self, inputs: FrozenInputs, users: Tensor, items: Tensor) -> Tensor:
        """See `TransferModel.predict`."""
        assert inputs.item_prototypes is not None
        known, places = users.unique(return_inverse=True)
        interests = self._interests(inputs, known)[places]
        items = items.unsqueeze(1)
        return self._rated(
            inputs.target_items[items], inputs.item_prototypes[items], interests
        ).squeeze(1)

    def _interests(
        self, inputs: FrozenInputs, users: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Interests of users ``[B]`` in the target domain, ``[B, K, D]``."""
        ids, lengths, table = self.history(inputs, users)
        assert table is not None
        capsules = ops.dynamic_routing(
            embedding(ids, table),
            self.routing.weight,
            self.logits(users.shape[0], generator),
            lengths=lengths,
            iterations=self.iterations,
            padding=self.padding,
            backend=self.backend,
        )
        assert isinstance(capsules, Tensor)
        bridge = self.bridge
        return ops.interest_bridge(
            capsules,
            inputs.source_users[users],
            bridge.w1,
            bridge.b1,
            bridge.w2,
            bridge.b2,
            backend=self.backend,
        )

    def _rated(self, items: Tensor, prototypes: Tensor, interests: Tensor) -> Tensor:
        """Ratings ``[B, C]`` of items ``[B, C, D]`` by users with these interests."""
        answers = ops.multi_granularity_attention(
            items, prototypes, interests, *self.attention.weights(), backend=self.backend
        )
        assert isinstance(answers, Tensor)
        return (answers * items).sum(-1)

    def weights(self) -> ops.MIMNetParameters:
        """All parameters."""
        bridge = self.bridge
        meta = bridge.w1, bridge.b1, bridge.w2, bridge.b2
        return ops.MIMNetParameters(self.routing.weight, *meta, *self.attention.weights())

    def history(self, inputs: FrozenInputs, users: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Item ids ``[B, L]``, lengths ``[B]`` and the item table, for `ops.mimnet_forward`."""
        return inputs.histories[users], inputs.lengths[users], inputs.source_items

    def logits(
        self, batch: int, generator: torch.Generator | None, out: Tensor | None = None
    ) -> Tensor:
        """First routing logits, ``[B, K, L]`` or ``[1, K, L]``, drawn into ``out`` if given."""
        fixed = self.evaluation_logits
        if generator is None:
            return fixed
        return torch.randn(batch, *fixed.shape[1:], generator=generator, out=out)
