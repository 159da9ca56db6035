"""MIMNet as its public code computes it, slips included."""

from __future__ import annotations

import torch
from torch import Tensor

from mimnet_fast.cdr.models.mimnet import MIMNet
from mimnet_fast.cdr.models.transfer import FrozenInputs, TransferModel


class MIMNetReleased(MIMNet):
    """`MIMNet` with what the public code (marqu22/MIMNet) does differently, each by its name.

    Nothing else differs: the auxiliary losses of that code are multiplied by zero there, and what
    its figures are, the best epoch on the test set, is reported as `published` for every model.
    Deviations: scikit-learn clusters (there: faiss), and the draws of ``fresh_logits`` are the same
    in every call, so that a run can be repeated.

    Args:
        features, hidden, interests, iterations, history_length, backend: See `MIMNet`.
        first_item_only: Routing takes the first position for the only one that is not padding.
        leaking_padding: What routing takes for padding is added to all capsules with weight 1/K.
        shared_padding_id: Padding is source item 0, so that a real item 0 makes a history count as
            one shorter. An empty history is one item whose embedding was never trained.
        fresh_logits: Every prediction has random routing logits of its own.
        untrained_prototypes: The rows that the target item table there has for source items, and
            that are never trained, are clustered too.
    """

    uses_profiles = False
    predict = TransferModel.predict  # ratings of one user have logits of their own
    no_history: Tensor
    logits_seed: Tensor

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        interests: int,
        iterations: int,
        history_length: int,
        backend: str | None = None,
        first_item_only: bool = True,
        leaking_padding: bool = True,
        shared_padding_id: bool = True,
        fresh_logits: bool = True,
        untrained_prototypes: bool = True,
    ) -> None:
        super().__init__(
            features,
            hidden,
            interests=interests,
            iterations=iterations,
            history_length=history_length,
            backend=backend,
        )
        self.first_item_only = first_item_only
        self.padding = "fill_before" if leaking_padding else "zero_after"
        self.shared_padding_id = shared_padding_id
        self.fresh_logits = fresh_logits
        self.clusters_untrained_rows = untrained_prototypes
        self.register_buffer("no_history", torch.randn(features))
        self.register_buffer("logits_seed", torch.randint(2**62, ()))

    def history(self, inputs: FrozenInputs, users: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embedded histories ``[B, L, D]`` or ids with their table, and what counts as length."""
        ids, lengths, table = super().history(inputs, users)
        assert table is not None
        if self.shared_padding_id:
            first = torch.arange(ids.shape[1]) == 0
            empty = lengths[:, None] == 0
            ids = ids.where(torch.arange(ids.shape[1]) < lengths[:, None], 0)
            lengths = (ids != 0).sum(1).where(lengths > 0, 1)
            history: Tensor = self.no_history.where((empty & first).unsqueeze(-1), table[ids])
            table = None
        else:
            history = ids
        return history, torch.ones_like(lengths) if self.first_item_only else lengths, table

    def logits(
        self, batch: int, generator: torch.Generator | None, out: Tensor | None = None
    ) -> Tensor:
        """First routing logits, a draw for every rating if ``fresh_logits``."""
        if self.fresh_logits and generator is None:
            generator = torch.Generator().manual_seed(int(self.logits_seed))
        return super().logits(batch, generator, out)
