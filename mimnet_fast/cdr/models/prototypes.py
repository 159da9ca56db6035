"""Prototypes of the target items: what kind of item each one is."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import normalize

from mimnet_fast.cdr.errors import UserError


def item_prototypes(
    items: Tensor, count: int, seed: int, untrained: Tensor | None = None
) -> Tensor:
    """The prototype of every item: its k-means centroid, scaled to length 1.

    Items belong to the nearest centroid before scaling, as published. The published code clusters
    with faiss, and ``untrained`` rows of source items too; here scikit-learn clusters.

    Args:
        items: Trained target item table ``[N, D]``.
        count: Number of prototypes.
        seed: Seed of the k-means++ start.
        untrained: Further rows ``[M, D]`` to be clustered, without a prototype in the result.

    Returns:
        ``[N, D]``

    Raises:
        UserError: fewer items than prototypes.
    """
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]  # takes a second to import

    if not 1 <= count <= len(items):
        raise UserError(
            f"prototypes: got {count} for {len(items)} target items, need at least 1 and at most "
            "one per item: set --prototypes"
        )
    rows = items if untrained is None else torch.cat([items, untrained])
    with threadpool_limits(1):  # sums of several threads come in no fixed order
        clusters = KMeans(count, n_init=1, random_state=seed).fit(rows.numpy())
    return normalize(torch.from_numpy(clusters.cluster_centers_))[clusters.labels_[: len(items)]]
