"""The base model of both domains, whose embeddings everything else stands on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Embedding, Module


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
