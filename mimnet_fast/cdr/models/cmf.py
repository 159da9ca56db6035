"""CMF: one matrix factorization of both domains, where a shared user has one embedding."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    apart: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Users of both domains who are not known to be, sorted: the last rows are theirs."""

    @staticmethod
    def of(dataset: Dataset, phase: Phase) -> JointTables:
        """Tables for a dataset and the overlap that is known in a phase."""
        known = phase.train_target.users.unique()
        both = known[known < dataset.num_overlap]
        apart = both[~torch.isin(both, phase.train_meta.users)]
        only_target = dataset.num_target_users - dataset.num_overlap
        return JointTables(
            overlap=dataset.num_overlap,
            source_users=dataset.num_source_users,
            source_items=dataset.num_source_items,
            users=dataset.num_source_users + only_target + len(apart),
            items=dataset.num_source_items + dataset.num_target_items,
            apart=apart,
        )

    def target_rows(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of users and items of the target domain.

        >>> tables = JointTables(overlap=2, source_users=5, source_items=7, users=9, items=10)
        >>> tables.target_rows(torch.tensor([1, 2]), torch.tensor([0, 2]))
        (tensor([1, 5]), tensor([7, 9]))
        """
        only_target = users + (self.source_users - self.overlap)
        rows = torch.where(users < self.overlap, users, only_target)
        second = self.users - len(self.apart) + torch.searchsorted(self.apart, users)
        rows = torch.where(torch.isin(users, self.apart), second, rows)
        return rows, items + self.source_items

    def examples(self, train_source: Ratings, phase: Phase) -> tuple[Tensor, ...]:
        """Columns of the ratings of both domains."""
        users, items = self.target_rows(phase.train_target.users, phase.train_target.items)
        target = (users, items, phase.train_target.values)
        return tuple(map(torch.cat, zip(train_source.columns(), target, strict=True)))

    def predict(self, model: Predict) -> Predict:
        """What ``model`` rates target items with, given users and items of the target domain."""
        return lambda users, items: model(*self.target_rows(users, items))
