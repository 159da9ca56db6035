"""Prototypes of the target items: what kind of item each one is."""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import normalize

from mimnet_fast.cdr.errors import UserError


def item_prototypes(items: Tensor, count: int, seed: int) -> Tensor:
    """The prototype of every item: its k-means centroid, scaled to length 1.

    Items belong to the nearest centroid before scaling, as published. The published code clusters
    with faiss and also clusters the untrained rows of source items; here scikit-learn clusters the
    target items.

    Args:
        items: Trained target item table ``[N, D]``.
        count: Number of prototypes.
        seed: Seed of the k-means++ start.

    Returns:
        ``[N, D]``

    Raises:
        UserError: fewer items than prototypes.
    """
    if not 1 <= count <= len(items):
        raise UserError(
            f"prototypes: got {count} for {len(items)} target items, need at least 1 and at most "
            "one per item: set --prototypes"
        )
    with threadpool_limits(1):  # sums of several threads come in no fixed order
        clusters = KMeans(count, n_init=1, random_state=seed).fit(items.numpy())
    return normalize(torch.from_numpy(clusters.cluster_centers_))[clusters.labels_]
