"""CMF: one matrix factorization of both domains, where a shared user has one embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.evaluation import Predict
from mimnet_fast.cdr.protocol import Phase


@dataclass(frozen=True)
class JointTables:
    """Rows of collective matrix factorization (Singh & Gordon, KDD 2008).

    ::

        rating = users[u] . items[i], trained on the source and target ratings together

    One `MatrixFactorization` whose tables hold the users and items of both domains: first those of
    the source, then those of the target but the users that are there already. So what a cold-start
    user rated in the source trains the embedding that target items are rated with. As in the code
    of PTUPCDR, both domains weigh as much as they have ratings; the paper weighs them by choice.
    It is trained as the base models are (epochs, batches, decay).
    """

    overlap: int
    source_users: int
    source_items: int
    users: int
    items: int

    @staticmethod
    def of(dataset: Dataset) -> JointTables:
        """Tables for a dataset."""
        return JointTables(
            overlap=dataset.num_overlap,
            source_users=dataset.num_source_users,
            source_items=dataset.num_source_items,
            users=dataset.num_source_users + dataset.num_target_users - dataset.num_overlap,
            items=dataset.num_source_items + dataset.num_target_items,
        )

    def target_rows(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of users and items of the target domain.

        >>> tables = JointTables(overlap=2, source_users=5, source_items=7, users=9, items=10)
        >>> tables.target_rows(torch.tensor([1, 2]), torch.tensor([0, 2]))
        (tensor([1, 5]), tensor([7, 9]))
        """
        only_target = users + (self.source_users - self.overlap)
        return torch.where(users < self.overlap, users, only_target), items + self.source_items

    def examples(self, train_source: Ratings, phase: Phase) -> tuple[Tensor, ...]:
        """Columns of the ratings of both domains."""
        users, items = self.target_rows(phase.train_target.users, phase.train_target.items)
        target = (users, items, phase.train_target.values)
        return tuple(map(torch.cat, zip(train_source.columns(), target, strict=True)))

    def predict(self, model: Predict) -> Predict:
        """What ``model`` rates target items with, given users and items of the target domain."""
        return lambda users, items: model(*self.target_rows(users, items))
