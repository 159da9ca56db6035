"""Implicit feedback: which interactions are positive, who is tested on what, what is minimised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import DOMAINS, Dataset, Ratings
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.protocol import LIKED_ABOVE, Phase, last_items, split

Objective = Literal["bpr", "softmax"]
Protocol = Literal["cold", "leave-last-out"]

_FEWEST_POSITIVES = 3


def bpr(scores: Tensor) -> Tensor:
    """Bayesian personalised ranking (Rendle et al., UAI 2009): mean of ``-log sigmoid(s+ - s-)``.

    Args:
        scores: ``[B, 1 + N]``, of a positive and N negatives in each row.
    """
    return softplus(scores[:, 1:] - scores[:, :1]).mean()


def sampled_softmax(scores: Tensor) -> Tensor:
    """Cross-entropy of the positive among itself and its negatives; ``scores`` as in `bpr`.

    Negatives are uniform, so correcting logits by their log probability would change nothing.
    """
    return (scores.logsumexp(1) - scores[:, 0]).mean()


OBJECTIVES: dict[Objective, Callable[[Tensor], Tensor]] = {"bpr": bpr, "softmax": sampled_softmax}


@dataclass(frozen=True)
class RankingPhase(Phase):
    """A phase of which all training and evaluation ratings are positives."""

    train_source: Ratings
    """Positives of the source domain, for its base model."""
    seen_source: Ratings
    """All that was rated there, whatever the rating: never drawn as a negative."""
    seen_target: Ratings
    """The same of the target domain; not ranked either."""
    histories: tuple[Tensor, Tensor]
    """Item ids ``[O, L]`` and lengths of each user of both domains, when evaluated."""
    train_histories: tuple[Tensor, Tensor] | None
    """The same of each row of ``train_meta``, at its time; None where they are those above."""


@dataclass(frozen=True)
class RankingSplit:
    """See `protocol.Split`."""

    selection: RankingPhase
    final: RankingPhase


def positives(ratings: Ratings, domain: Ratings) -> Tensor:
    """Which ratings count as positive: those above 3, or all where none of their domain is."""
    liked = ratings.values > LIKED_ABOVE
    return liked if (domain.values > LIKED_ABOVE).any() else torch.ones_like(liked)


def ranking_split(dataset: Dataset, config: Config, protocol: Protocol) -> RankingSplit:
    """Who is tested on what.

    ``"cold"`` takes the users of `protocol.split`: all positives of test users in the target domain
    are the test set. ``"leave-last-out"`` takes the last target positive of each user of both
    domains who has three or more. There ``selection`` is measured on the last but one and trains on
    what came before, ``final`` is measured on the last and trains on all before that. Nothing that
    a measured user did in either domain at the time of the measured item or later is in a phase,
    but for training positives of the same time, which come earlier in the file.

    Raises:
        UserError: as `protocol.split`, or no timestamps, or nobody with three positives.
    """
    if protocol == "cold":
        return _cold(dataset, config)
    return _leave_last_out(dataset, config.history_length)


def _cold(dataset: Dataset, config: Config) -> RankingSplit:
    data = split(
        dataset,
        config.beta,
        config.seed,
        history_order=config.history_order,
        history_length=config.history_length,
    )

    def liked(ratings: Ratings, domain: Ratings = dataset.target) -> Ratings:
        return ratings.where(positives(ratings, domain))

    source = liked(dataset.source, dataset.source)
    ordered = source if config.history_order == "time" else replace(source, timestamps=None)
    histories = last_items(
        ordered,
        torch.arange(dataset.num_overlap),
        None,
        length=config.history_length,
        padding=dataset.num_source_items,
    )

    def phase(data: Phase) -> RankingPhase:
        return RankingPhase(
            train_target=liked(data.train_target),
            train_meta=liked(data.train_meta),
            evaluation=liked(data.evaluation),
            train_source=source,
            seen_source=dataset.source,
            seen_target=data.train_target,
            histories=histories,
            train_histories=None,
        )

    return RankingSplit(phase(data.selection), phase(data.final))


def _leave_last_out(dataset: Dataset, length: int) -> RankingSplit:
    for domain in DOMAINS:
        if getattr(dataset, domain).timestamps is None:
            raise UserError(
                f"protocol leave-last-out: {dataset.info[domain]['file']} has no timestamp column; "
                "use cold, or prepare the dataset from files with timestamps"
            )
    target = dataset.target
    assert target.timestamps is not None
    is_positive = positives(target, target)
    rows = (is_positive & (target.users < dataset.num_overlap)).nonzero().squeeze(1).numpy()
    users, times = target.users.numpy()[rows], target.timestamps.numpy()[rows]
    rows = rows[np.lexsort([times, users])]  # stable, so equal times stay in file order
    counts = np.bincount(users, minlength=dataset.num_overlap)
    last = (np.cumsum(counts) - 1)[counts >= _FEWEST_POSITIVES]
    if not len(last):
        raise UserError(
            f"protocol leave-last-out: none of {dataset.num_overlap} users of both domains has "
            f"{_FEWEST_POSITIVES} positives in the target domain: use cold"
        )
    test, validation = (torch.from_numpy(rows[last - back]) for back in (0, 1))
    phase = partial(_before, dataset, is_positive, length)
    return RankingSplit(
        phase(measured=validation, hidden=torch.cat([test, validation])),
        phase(measured=test, hidden=test),
    )


def _before(
    dataset: Dataset, is_positive: Tensor, length: int, *, measured: Tensor, hidden: Tensor
) -> RankingPhase:
    """A phase measured on some rows of the target ratings, with what came before."""
    source, target, overlap = dataset.source, dataset.target, dataset.num_overlap
    assert source.timestamps is not None
    assert target.timestamps is not None
    size = max(dataset.num_source_users, dataset.num_target_users)
    end = torch.full((size,), torch.inf, dtype=torch.float64)
    end[target.users[measured]] = target.timestamps[measured]

    shown = is_positive.clone()
    shown[hidden] = False
    known = (target.timestamps < end[target.users]) | shown
    train_target = target.where(known & is_positive)
    train_meta = train_target.where(train_target.users < overlap)
    before = source.timestamps < end[source.users]
    train_source = source.where(before & positives(source, source))
    recent = partial(last_items, train_source, length=length, padding=dataset.num_source_items)
    evaluated = torch.arange(overlap)
    return RankingPhase(
        train_target=train_target,
        train_meta=train_meta,
        evaluation=target.where(torch.zeros_like(is_positive).index_fill(0, measured, True)),
        train_source=train_source,
        seen_source=source.where(before),
        seen_target=target.where(known),
        histories=recent(evaluated, end[:overlap]),
        train_histories=recent(train_meta.users, train_meta.timestamps),
    )
