"""Synthetic ratings of two domains with planted interests: the best possible error is known.

Every item of either domain has one of T topics; every user is interested in a few of them, the same
in both domains, and likes an item exactly when its topic is among them. Topics and interests are
drawn evenly, so no mean of users or items tells anything; which items a user liked in the source
domain tells everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mimnet_fast.cdr.dataset import Ratings

_LIKED, _DISLIKED = 4.6, 1.8
_SCALE = np.arange(1, 6)


@dataclass(frozen=True)
class Planted:
    """What is behind the ratings."""

    expected: np.ndarray
    """Rating of each topic's items by each user before noise ``[users, topics]``."""
    target_topics: np.ndarray
    """Topic of each target item."""
    noise: float

    def oracle(self, ratings: Ratings, folder: Path) -> tuple[Tensor, Tensor]:
        """The best possible predictions of target ``ratings`` from the dataset in ``folder``.

        A predictor that knows every interest still does not know the noise.

        Returns:
            The conditional median, which has the lowest expected MAE, and the conditional mean,
            which has the lowest expected RMSE.
        """
        users, items = (
            pl.read_parquet(folder / f"target_{kind}s.parquet")[f"{kind}_id"]
            .str.slice(1)
            .cast(pl.Int64)
            .to_numpy()[indices]
            for kind, indices in (("user", ratings.users), ("item", ratings.items))
        )
        expected = torch.from_numpy(self.expected[users, self.target_topics[items]])
        upper = torch.from_numpy(_SCALE[:-1] + 0.5)
        below = torch.special.ndtr((upper - expected[:, None]) / self.noise)
        median = 1 + (below < 0.5).sum(-1)
        mean = 1 + (1 - below).sum(-1)
        return median, mean


@dataclass(frozen=True)
class Synthetic:
    """Sizes of a synthetic dataset.

    A tenth of the users is in the source domain only, another tenth in the target domain only.
    """

    users: int = 2000
    items: int = 400
    """In each domain."""
    topics: int = 12
    interests: int = 3
    """Topics that each user likes."""
    ratings_per_user: int = 30
    """In each domain; half of them of liked items."""
    noise: float = 0.5
    """Standard deviation, before rounding and clipping to 1..5."""

    def generate(self, folder: Path, seed: int) -> Planted:
        """Write `source.csv` and `target.csv` to ``folder``; the same ones for the same seed."""
        rng = np.random.default_rng(seed)
        interests = rng.random((self.users, self.topics)).argsort(1)[:, : self.interests]
        expected = np.full((self.users, self.topics), _DISLIKED)
        np.put_along_axis(expected, interests, _LIKED, axis=1)
        topics = {domain: rng.integers(self.topics, size=self.items) for domain in "st"}
        tenth = self.users // 10
        members = {"s": slice(None, self.users - tenth), "t": slice(tenth, None)}
        for domain, name in (("s", "source"), ("t", "target")):
            users = np.arange(self.users)[members[domain]]
            ratings = self._rate(rng, users, expected[users][:, topics[domain]], domain)
            ratings.write_csv(folder / f"{name}.csv")
        return Planted(expected, topics["t"], self.noise)

    def _rate(
        self, rng: np.random.Generator, users: np.ndarray, expected: np.ndarray, domain: str
    ) -> pl.DataFrame:
        """Ratings of a weighted sample of items without replacement (Gumbel top-k)."""
        liked = expected == _LIKED
        share = liked.mean(1, keepdims=True).clip(1 / self.items, 1 - 1 / self.items)
        preference = np.log(np.where(liked, 1 / share, 1 / (1 - share)))
        chosen = (preference + rng.gumbel(size=expected.shape)).argsort(1)
        items = chosen[:, -self.ratings_per_user :]
        noisy = np.take_along_axis(expected, items, 1) + self.noise * rng.standard_normal(
            items.shape
        )
        return pl.DataFrame(
            {
                "user_id": np.repeat(users, self.ratings_per_user),
                "item_id": items.ravel(),
                "rating": np.rint(noisy).clip(_SCALE[0], _SCALE[-1]).astype(np.int64).ravel(),
            }
        ).with_columns(
            pl.format("u{}", "user_id").alias("user_id"),
            pl.format(f"{domain}{{}}", "item_id").alias("item_id"),
        )
