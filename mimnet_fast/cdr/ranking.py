"""Ranks of items among the whole catalogue, and what is read off them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mimnet_fast.cdr.dataset import Ratings
from mimnet_fast.cdr.errors import UserError

Score = Callable[[Tensor], Tensor]
"""Scores ``[B, M]`` of all items for users ``[B]``."""

_SCORES_AT_ONCE = 2**20


class Seen:
    """Which items each user has seen.

    Args:
        ratings: What was seen, whatever the rating; no user and item twice.
        users: How many users there are.
        items: How many items there are, M.

    Raises:
        UserError: somebody has seen all items.
    """

    def __init__(self, ratings: Ratings, users: int, items: int) -> None:
        keys, _ = (ratings.users * items + ratings.items).sort()
        owners, self.items = keys // items, keys % items
        self.num_items = items
        self.counts = owners.bincount(minlength=users)
        self.starts = self.counts.cumsum(0) - self.counts
        if (self.counts >= items).any():
            raise UserError(
                f"somebody has rated all {items} items of a domain, so nothing is left to compare "
                "with: prepare the dataset with more items"
            )
        # How many unseen items come before each seen one.
        self._unseen_before = owners * items + self.items - self._column(owners)

    def _column(self, owners: Tensor) -> Tensor:
        return torch.arange(len(owners)) - self.starts[owners]

    def draw_others(self, users: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Items ``[B, count]`` that users ``[B]`` have not seen, each as probable as any other.

        >>> seen = Seen(Ratings(torch.tensor([0, 0]), torch.tensor([1, 3]), torch.ones(2)), 2, 4)
        >>> seen.draw_others(torch.tensor([0]), 50, torch.Generator()).unique()
        tensor([0, 2])
        """
        left = (self.num_items - self.counts[users])[:, None]
        draws = torch.rand(len(users), count, generator=generator, dtype=torch.float64)
        drawn = (draws * left).long()  # the how-manieth of the unseen items
        keys = users[:, None] * self.num_items + drawn
        before = torch.searchsorted(self._unseen_before, keys, right=True)
        return drawn + before - self.starts[users][:, None]

    def positions(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Row in ``users`` and item of everything that they have seen."""
        counts = self.counts[users]
        rows = torch.arange(len(users)).repeat_interleave(counts)
        column = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        return rows, self.items[self.starts[users][rows] + column]


@torch.no_grad()
def ranks(score: Score, positives: Ratings, seen: Seen) -> Tensor:
    """Rank, from 1, of each positive among all items that its user has not seen.

    Equal scores are ranked by index, as in `ops.catalogue_top_k`. The catalogue is scored for as
    many users at once, and compared with as many positives, as memory allows for any size of it.

    Returns:
        int64 ``[n]``, in the order of ``positives``.

    Raises:
        UserError: a score that is not finite.
    """
    found = torch.empty(len(positives), dtype=torch.int64)
    index = torch.arange(seen.num_items)
    at_once = max(1, _SCORES_AT_ONCE // seen.num_items)
    everyone, rows, counts = positives.users.unique(return_inverse=True, return_counts=True)
    by_user = rows.argsort(stable=True).split([int(part.sum()) for part in counts.split(at_once)])
    for users, theirs in zip(everyone.split(at_once), by_user, strict=True):
        scores = score(users)
        if not scores.isfinite().all():
            raise UserError("scores are not finite: lower --learning-rate")
        scores = scores.index_put(seen.positions(users), scores.new_tensor(-torch.inf))
        first = rows[theirs[0]]
        for part in theirs.split(at_once):
            of_user, items = scores[rows[part] - first], positives.items[part][:, None]
            own = of_user.gather(1, items)
            ahead = (of_user > own) | ((of_user == own) & (index < items))
            found[part] = 1 + ahead.sum(1)
    return found


def user_metrics(
    ranks: Tensor, users: Tensor, cutoffs: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Users with positives, and what the ranks ``[n]`` of a user's positives say.

    ::

        HR@k = 1 if any rank <= k, else 0
        NDCG@k = sum over ranks r <= k of 1 / log2(1 + r), over the largest possible such sum
        MRR = 1 / smallest rank

    >>> user_metrics(torch.tensor([2, 9]), torch.tensor([4, 1]), [5])[1]["hr@5"].tolist()
    [0.0, 1.0]
    """
    everyone, rows, counts = users.unique(return_inverse=True, return_counts=True)
    first = torch.full_like(counts, ranks.max().item()).scatter_reduce(0, rows, ranks, "amin")
    ideal = (1 / torch.arange(2, 2 + int(counts.max())).double().log2()).cumsum(0)
    gains = 1 / (1 + ranks).double().log2()
    found = {}
    for k in cutoffs:
        sums = torch.zeros(len(counts), dtype=torch.float64)
        sums.index_add_(0, rows, gains.where(ranks <= k, 0))
        found[f"hr@{k}"] = (first <= k).double()
        found[f"ndcg@{k}"] = sums / ideal[counts.clamp_max(k) - 1]
    return everyone, {**found, "mrr": 1 / first.double()}


def measure(ranks: Tensor, users: Tensor, cutoffs: Sequence[int]) -> dict[str, float]:
    """Means over users of their `user_metrics`.

    >>> measure(torch.tensor([2, 9]), torch.tensor([0, 1]), [5])  # doctest: +ELLIPSIS
    {'hr@5': 0.5, 'ndcg@5': 0.3154..., 'mrr': 0.3055...}
    """
    _, found = user_metrics(ranks, users, cutoffs)
    return {name: values.mean().item() for name, values in found.items()}
