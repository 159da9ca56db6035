"""Predictors without a model, which every model has to beat and no paper reports."""

from __future__ import annotations

import torch
from torch import Tensor

from mimnet_fast.cdr.protocol import Split


def constant(split: Split) -> Tensor:
    """The middle of the rating scale seen in training: 3 for ratings from 1 to 5."""
    seen = split.final.train_target.values
    return ((seen.min() + seen.max()) / 2).expand(len(split.final.evaluation))


def global_mean(split: Split) -> Tensor:
    """The mean of all target ratings seen in training."""
    return split.final.train_target.values.mean().expand(len(split.final.evaluation))


def item_mean(split: Split) -> Tensor:
    """The mean of the item's training ratings; the global mean for an item without any."""
    train, evaluation = split.final.train_target, split.final.evaluation
    size = int(torch.cat([train.items, evaluation.items]).max()) + 1
    means = _group_means(train.items, train.values, size)
    return means.where(means.isfinite(), train.values.mean())[evaluation.items]


def user_mean(split: Split) -> Tensor:
    """The mean of the user's ratings in the source domain, where every test user has some."""
    train = split.train_source
    means = _group_means(train.users, train.values, int(train.users.max()) + 1)
    return means[split.final.evaluation.users]


def _group_means(groups: Tensor, values: Tensor, size: int) -> Tensor:
    """Mean of the values of each group ``[size]``, NaN for a group without any."""
    sums = torch.bincount(groups, values.double(), minlength=size)
    return (sums / torch.bincount(groups, minlength=size)).float()
