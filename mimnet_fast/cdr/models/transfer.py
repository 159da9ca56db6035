"""What every stage-2 model gets and gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import mse_loss

from mimnet_fast.cdr.metadata import ItemGroups
from mimnet_fast.cdr.protocol import Phase


@dataclass(frozen=True)
class FrozenInputs:
    """The results of stage 1 and the histories; nothing in here is trained in stage 2.

    O users of both domains, L history length, D features.
    """

    histories: Tensor
    """Source item ids, int64 ``[O, L]``; the padding id is the last row of ``source_items``."""
    lengths: Tensor
    """int64 ``[O]``."""
    source_users: Tensor
    """``[O, D]``"""
    source_items: Tensor
    """``[source items + 1, D]``, zeros in the row of the padding."""
    target_users: Tensor
    """``[target users, D]``; the rows of the phase's cold-start users were never trained."""
    target_items: Tensor
    """``[target items, D]``"""
    item_prototypes: Tensor | None = None
    """``[target items, D]``, for models that use them: the prototype of each target item."""
    user_weights: Tensor | None = None
    """What an error of each user counts in training, ``[O]``; 1 where nothing is given."""
    item_groups: tuple[ItemGroups, ...] = ()
    """G kinds of metadata of the source items."""

    @cached_property
    def neighbours(self) -> Tensor:
        """Users who are near over one kind of path after another, ``[O, 1 + G, D]``.

        User-item-user is the mean over a history of the mean user who liked the item;
        user-item-group-item-user that of the mean over the item's groups of the mean such user over
        the group's items that anybody liked. Users are those of both domains, each counted in too.
        Items without a group are left out; zeros where nothing is left.
        """
        users = self.source_users[: len(self.lengths)]
        rows = users.repeat_interleave(self.lengths, 0)
        real = torch.arange(self.histories.shape[1]) < self.lengths[:, None]
        liked = self.histories[real]
        items, counts = _means(liked, rows, len(self.source_items))
        views = [self._pooled(items, counts > 0)]
        for group in self.item_groups:
            known = counts[group.items] > 0
            members, groups = group.items[known], group.groups[known]
            by_group, _ = _means(groups, items[members], int(group.groups.max()) + 1)
            by_item, has_group = _means(members, by_group[groups], len(items))
            views.append(self._pooled(by_item, has_group > 0))
        return torch.stack(views, 1)

    def _pooled(self, items: Tensor, counted: Tensor) -> Tensor:
        """The mean over every history of the rows that count."""
        real = torch.arange(self.histories.shape[1]) < self.lengths[:, None]
        share = (real & counted[self.histories]).to(items.dtype)
        sums = (share.unsqueeze(-1) * items[self.histories]).sum(1)
        return sums / share.sum(1, keepdim=True).clamp_min(1)


def _means(index: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The mean of the rows of each index ``[size, D]``, zeros without one, and their count."""
    counts = torch.bincount(index, minlength=size)
    sums = rows.new_zeros(size, rows.shape[1]).index_add_(0, index, rows)
    return sums / counts.clamp_min(1)[:, None], counts


class TransferModel(Module):
    """Base of the stage-2 models: how a user known from the source rates a target item."""

    uses_prototypes = False
    uses_profiles = False
    """Whether vectors are given with `profiles` where the base model has them."""
    weighs_users = averages = True
    """Whether errors are weighted by their users and parameters averaged on `biased-mf`."""
    clusters_untrained_rows = False
    """Whether prototypes are also made of as many untrained rows as there are source items."""

    def forward(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        items: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Ratings ``[B]`` of target items ``[B]`` by users ``[B]`` of both domains.

        ``generator`` is given in training only: whatever is random is drawn from it.
        """
        raise NotImplementedError

    def scores(
        self,
        inputs: FrozenInputs,
        users: Tensor,
        candidates: Tensor | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What `forward` gives for several items of each user, with the user's part done once.

        Args:
            inputs: As in `forward`.
            users: ``[B]``
            candidates: Target items ``[B, C]``, or None for all of them.
            generator: As in `forward`.

        Returns:
            ``[B, C]``
        """
        raise NotImplementedError

    def predict(self, inputs: FrozenInputs, users: Tensor, items: Tensor) -> Tensor:
        """What `forward` gives without a generator, with a user's part done once if that pays."""
        ratings: Tensor = self(inputs, users, items)
        return ratings

    def examples(self, inputs: FrozenInputs, phase: Phase) -> tuple[Tensor, ...]:
        """What the model learns from, as columns: users, items and ratings of ``train_meta``."""
        return phase.train_meta.columns()

    def loss(
        self, inputs: FrozenInputs, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> Tensor:
        """Loss of some rows of the examples: the mean squared error of the ratings."""
        users, items, values = batch
        return weighted_squared_error(
            inputs, users, self(inputs, users, items, generator=generator), values
        )


def dot_products(vectors: Tensor, items: Tensor, candidates: Tensor | None) -> Tensor:
    """User vectors ``[B, D]`` times their candidates ``[B, C]``, or times all ``items [M, D]``."""
    if candidates is None:
        return vectors @ items.T
    return (items[candidates] @ vectors.unsqueeze(-1)).squeeze(-1)


def weighted_squared_error(
    inputs: FrozenInputs, users: Tensor, predicted: Tensor, actual: Tensor
) -> Tensor:
    """The mean squared error of ratings, each weighted by its user."""
    if inputs.user_weights is None:
        return mse_loss(predicted, actual)
    return (inputs.user_weights[users] * (predicted - actual).square()).mean()
