"""Who is tested on what: the split of MIMNet and its neighbours, as a function of three things.

Nothing of it is stored. `split(dataset, beta, seed)` gives the same tensors on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.errors import UserError

HistoryOrder = Literal["file", "time"]

HISTORY_LENGTH = 20
LIKED_ABOVE = 3.0
VALIDATION_FRACTION = 0.1


@dataclass(frozen=True)
class Phase:
    """One training run: what it learns from and the cold-start users it is measured on."""

    train_target: Ratings
    """For the target base model: target ratings of everyone but the phase's cold-start users."""
    train_meta: Ratings
    """For the transfer model: the part of ``train_target`` by users of both domains."""
    evaluation: Ratings
    """All target ratings of the phase's cold-start users."""


@dataclass(frozen=True)
class Split:
    """The data of one (beta, seed).

    Two training runs serve both ways to choose the epoch. In ``selection`` the validation users,
    10 % of the training users of both domains, are cold-start users exactly like the test users:
    none of their target ratings is in ``train_target`` or ``train_meta``. ``final`` learns from all
    training users and is measured on the test users after every epoch. The `published` figure is
    the best epoch of ``final`` on the test set; the `honest` figure is ``final`` at the epoch that
    was best in ``selection`` on the validation users. So both figures speak of one model, and only
    ``honest`` never saw the test set. The source base model is the same in both runs.
    """

    train_source: Ratings
    """All source ratings, the cold-start users' too."""
    histories: Tensor
    """Source items liked by each user of both domains, int64 ``[O, L]``, oldest first, padded at
    the end with the index ``num_source_items``, which is no item."""
    lengths: Tensor
    """Items in each history, int64 ``[O]``; 0 for a user who liked nothing."""
    selection: Phase
    final: Phase


def split(
    dataset: Dataset,
    beta: float,
    seed: int,
    *,
    history_order: HistoryOrder = "file",
    history_length: int = HISTORY_LENGTH,
) -> Split:
    """Hold out ``round(beta * O)`` of the O users of both domains as cold-start test users.

    They are the first ones of ``numpy.random.default_rng(seed).permutation`` over the users sorted
    by id. Validation users are drawn by the same rule and seed from those that are left. A history
    holds the last L source items that the user rated above 3.

    Args:
        dataset: A prepared dataset.
        beta: Share of test users, above 0 and below 1.
        seed: Seed of the permutations.
        history_order: ``"file"`` takes the order of the raw file, ``"time"`` that of timestamps
            (equal ones in file order).
        history_length: L.

    Raises:
        UserError: ``beta`` out of range, too few users, or no timestamps to order by.
    """
    if not 0 < beta < 1:
        raise UserError(f"beta: got {beta}, need a share of test users above 0 and below 1")
    users = np.arange(dataset.num_overlap)
    test, training = _hold_out(users, beta, seed)
    validation, fitting = _hold_out(training, VALIDATION_FRACTION, seed)
    if not (len(test) and len(validation) and len(fitting)):
        raise UserError(
            f"beta {beta} of {dataset.num_overlap} users of both domains leaves {len(test)} test, "
            f"{len(validation)} validation and {len(fitting)} training users, need one of each"
        )
    found, lengths = histories(dataset, dataset.num_overlap, history_order, history_length)
    return Split(
        train_source=dataset.source,
        histories=found,
        lengths=lengths,
        selection=_phase(dataset, hidden=np.concatenate([test, validation]), measured=validation),
        final=_phase(dataset, hidden=test, measured=test),
    )


def keep_overlap(split: Split, share: float, seed: int) -> Split:
    """Forget of some training users that they are in both domains: fewer people to learn from.

    ``round(share * n)`` of the n training users stay in ``train_meta``, the same ones in both
    phases; a smaller share keeps some of those that a larger one keeps. The ratings of the others
    stay in ``train_source`` and ``train_target``, as ratings of somebody there and of somebody
    here, so that only what is known of the overlap changes, not how well either domain is known:
    base models, test users and validation users are the same for every share.

    Raises:
        UserError: nobody is left to learn from.
    """
    if share == 1:
        return split
    users = split.final.train_meta.users.unique()
    # Another permutation than the one that draws the validation users.
    order = np.random.default_rng([seed, 1]).permutation(users)
    kept = torch.from_numpy(order[: round(share * len(users))])
    phases = []
    for phase in (split.selection, split.final):
        meta = phase.train_meta.where(torch.isin(phase.train_meta.users, kept))
        if not len(meta):
            raise UserError(
                f"overlap {share} of {len(users)} training users of both domains leaves nobody to "
                "learn from: name a larger share"
            )
        phases.append(replace(phase, train_meta=meta))
    return replace(split, selection=phases[0], final=phases[1])


def _hold_out(users: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out users, and the others in their old order."""
    permuted = np.random.default_rng(seed).permutation(users)
    count = round(fraction * len(users))
    return permuted[:count], np.sort(permuted[count:])


def _phase(dataset: Dataset, *, hidden: np.ndarray, measured: np.ndarray) -> Phase:
    is_hidden = torch.zeros(dataset.num_target_users, dtype=torch.bool)
    is_hidden[hidden] = True
    is_measured = torch.zeros(dataset.num_target_users, dtype=torch.bool)
    is_measured[measured] = True
    users = dataset.target.users
    train_target = dataset.target.where(~is_hidden[users])
    return Phase(
        train_target=train_target,
        train_meta=train_target.where(train_target.users < dataset.num_overlap),
        evaluation=dataset.target.where(is_measured[users]),
    )


def histories(
    dataset: Dataset, users: int, order: HistoryOrder, length: int
) -> tuple[Tensor, Tensor]:
    """Liked source items of the first ``users`` source users, as in `Split`: ids and lengths."""
    source = dataset.source
    liked = source.where((source.values > LIKED_ABOVE) & (source.users < users))
    if order == "time" and liked.timestamps is None:
        raise UserError(
            f"history order 'time': {dataset.info['source']['file']} has no timestamp column; "
            "use 'file', or prepare the dataset from a file with timestamps"
        )
    if order == "file":
        liked = replace(liked, timestamps=None)
    padding = dataset.num_source_items
    return last_items(liked, torch.arange(users), None, length=length, padding=padding)


def last_items(
    ratings: Ratings, users: Tensor, until: Tensor | None, *, length: int, padding: int
) -> tuple[Tensor, Tensor]:
    """The last items of each user before a time.

    Args:
        ratings: In the order of the file, which breaks ties, or decides where no times are.
        users: ``[R]``, a row of the result each.
        until: Times ``[R]``, none of which is reached; or the end of time.
        length: L.
        padding: What stands behind the items.

    Returns:
        Item ids ``[R, L]``, oldest first, and how many there are ``[R]``.
    """
    rows, count = len(users), len(ratings)
    ends = np.full(rows, np.inf) if until is None else until.numpy()
    times = np.zeros(count) if ratings.timestamps is None else ratings.timestamps.numpy()
    owners = np.concatenate([users.numpy(), ratings.users.numpy()])
    is_rating = np.arange(rows + count) >= rows
    # Stable; a row comes before the ratings of its time.
    order = np.lexsort([is_rating, np.concatenate([ends, times]), owners])
    sorted_is_rating = is_rating[order]
    rated = order[sorted_is_rating] - rows
    items = np.append(ratings.items.numpy()[rated], padding)
    stop = np.empty(rows, np.int64)
    stop[order[~sorted_is_rating]] = np.cumsum(sorted_is_rating)[~sorted_is_rating]
    start = np.searchsorted(ratings.users.numpy()[rated], users.numpy())
    lengths = np.minimum(stop - start, length)
    column = np.arange(length)
    position = np.where(column < lengths[:, None], (stop - lengths)[:, None] + column, count)
    return torch.from_numpy(items[position]), torch.from_numpy(lengths)
