"""The base models of both domains, whose embeddings everything else stands on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module

from mimnet_fast.cdr.config import Base


class MatrixFactorization(Module):
    """``rating = users[u] . items[i]``, no biases, N(0, scale^2) initial values.

    With a scale of 1 the stage-1 model of EMCDR (Man et al., IJCAI 2017), PTUPCDR and MIMNet. Their
    code gives both domains tables over the users and items of both; here each domain has rows for
    its own only, as the others are never read. Without weight decay, rows without a training rating
    keep their initial values.

    >>> model = MatrixFactorization(num_users=3, num_items=5, features=4)
    >>> model(torch.tensor([0, 2]), torch.tensor([4, 1])).shape
    torch.Size([2])
    """

    def __init__(
        self, num_users: int, num_items: int, features: int, *, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.users = Embedding(num_users, features)
        self.items = Embedding(num_items, features)
        with torch.no_grad():
            for table in (self.users, self.items):
                table.weight.mul_(scale)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Ratings ``[B]`` of items ``[B]`` by users ``[B]``."""
        ratings: Tensor = (self.users(users) * self.items(items)).sum(-1)
        return ratings

    def user_vectors(self) -> Tensor:
        """What transfer models take for users: times `item_vectors`, they are ratings."""
        return self.users.weight

    def item_vectors(self) -> Tensor:
        """What transfer models take for items to rate."""
        return self.items.weight


class GMF(MatrixFactorization):
    """``rating = w . (users[u] * items[i])``, a weight for each feature (He et al., WWW 2017).

    A user who is carried over is rated with by the target domain's ``w``, as in PTUPCDR, so ``w``
    belongs to the items: ``rating = users[u] . (w * items[i])``.
    """

    def __init__(
        self, num_users: int, num_items: int, features: int, *, scale: float = 1.0
    ) -> None:
        super().__init__(num_users, num_items, features, scale=scale)
        self.linear = Linear(features, 1, bias=False)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """See `MatrixFactorization.forward`."""
        ratings: Tensor = self.linear(self.users(users) * self.items(items))
        return ratings.squeeze(-1)

    def item_vectors(self) -> Tensor:
        """See `MatrixFactorization.item_vectors`."""
        return self.linear.weight * self.items.weight


class DNN(MatrixFactorization):
    """``rating = (W users[u] + b) . items[i]``, the two towers of PTUPCDR's experiments.

    Named there after the deep network for YouTube (Covington et al., RecSys 2016). What is carried
    over, and compared with in the target domain, is the output of the users' tower.
    """

    def __init__(
        self, num_users: int, num_items: int, features: int, *, scale: float = 1.0
    ) -> None:
        super().__init__(num_users, num_items, features, scale=scale)
        self.linear = Linear(features, features)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """See `MatrixFactorization.forward`."""
        ratings: Tensor = (self.linear(self.users(users)) * self.items(items)).sum(-1)
        return ratings

    def user_vectors(self) -> Tensor:
        """See `MatrixFactorization.user_vectors`."""
        vectors: Tensor = self.linear(self.users.weight)
        return vectors


BASES: dict[Base, type[MatrixFactorization]] = {
    "mf": MatrixFactorization,
    "biased-mf": MatrixFactorization,
    "gmf": GMF,
    "dnn": DNN,
}
"""Base models by their name in `Config`."""
