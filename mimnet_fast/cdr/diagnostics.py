"""What a trained MIMNet does inside: what feeds its interests, how they differ, which one answers.

Everything is what the model's own ops computed on the way to its ratings.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, normalize, pad, relu

from mimnet_fast import nn, ops
from mimnet_fast.cdr.dataset import Ratings
from mimnet_fast.cdr.models import FrozenInputs, MIMNet

COLLAPSED = 0.9
"""Mean cosine of a user's capsules above which they count as one interest."""
WARNED = 0.5
"""Share of users with collapsed capsules that is worth a warning."""

_USERS = 1024


class Interests(NamedTuple):
    """Of B users."""

    coupling: Tensor
    """How much of each position of the history went to each interest, ``[B, K, L]``."""
    lengths: Tensor
    """Positions that the model took for items, ``[B]``."""
    capsules: Tensor
    """``[B, K, D]``"""
    transferred: Tensor
    """What the bridges made of the source user, one vector for each interest, ``[B, K, D]``."""


class Answers(NamedTuple):
    """Of B users to an item each, or to C items each."""

    fine: Tensor
    """Weight of each interest in the attention guided by the item, ``[B, K]`` or ``[B, C, K]``."""
    coarse: Tensor
    """The same, guided by the item's prototype."""
    gate: Tensor
    """Share of the coarse attention, ``[B]`` or ``[B, C]``."""
    ratings: Tensor
    """Like ``gate``."""


@torch.no_grad()
def interests(model: MIMNet, inputs: FrozenInputs, users: Tensor) -> Interests:
    """The interests of ``users``, as the model finds them for its predictions."""
    history, lengths, table = model.history(inputs, users)
    capsules, coupling = ops.dynamic_routing(
        history if table is None else embedding(history, table),
        model.routing.weight,
        model.logits(len(users), None),
        lengths=lengths,
        iterations=model.iterations,
        padding=model.padding,
        return_coupling=True,
        backend=model.backend,
    )
    bridge = model.bridge
    transferred = ops.interest_bridge(
        capsules,
        inputs.source_users[users],
        bridge.w1,
        bridge.b1,
        bridge.w2,
        bridge.b2,
        backend=model.backend,
    )
    return Interests(coupling, lengths, capsules, transferred)


@torch.no_grad()
def answers(model: MIMNet, inputs: FrozenInputs, transferred: Tensor, items: Tensor) -> Answers:
    """What users with these transferred interests answer to ``items``, ``[B]`` or ``[B, C]``."""
    assert inputs.item_prototypes is not None
    item, prototype = inputs.target_items[items], inputs.item_prototypes[items]
    attention, backend = model.attention, model.backend
    (_, fine), (_, coarse) = (
        ops.target_attention(
            query, transferred, *layer.weights(), return_weights=True, backend=backend
        )
        for query, layer in ((item, attention.fine), (prototype, attention.coarse))
    )
    user, gate = ops.multi_granularity_attention(
        item, prototype, transferred, *attention.weights(), return_gate=True, backend=backend
    )
    return Answers(fine, coarse, gate, (user * item).sum(-1))


def capsule_cosines(capsules: Tensor) -> Tensor:
    """Cosine of every two interests of a user, ``[B, K, D]`` to ``[B, K, K]``."""
    directions = normalize(capsules, dim=-1)
    return directions @ directions.mT


@torch.no_grad()
def bridge_cosines(bridge: nn.InterestBridge, capsules: Tensor) -> Tensor:
    """Cosine of the matrices generated of every two capsules, ``[B, K, D]`` to ``[B, K, K]``.

    The matrix of capsule k is ``W h_k`` with ``h_k = [relu(w1 c_k + b1); 1]`` and ``W = [w2, b2]``,
    so ``<W h_j, W h_k> = h_j . (W^T W) h_k``: no matrix is formed.
    """
    hidden = pad(relu(linear(capsules, bridge.w1, bridge.b1)), (0, 1), value=1.0).double()
    generator = torch.cat([bridge.w2, bridge.b2[:, None]], 1).double()
    products = hidden @ (generator.mT @ generator) @ hidden.mT
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    return (products / (lengths[:, :, None] * lengths[:, None, :])).to(capsules.dtype)


def coupling_entropies(coupling: Tensor, lengths: Tensor) -> Tensor:
    """How undecided routing is about a user's items, ``[B]``: 0 one interest each, 1 all alike.

    The mean over the history of each item's entropy over the K interests, over ``log K``.
    """
    real = torch.arange(coupling.shape[-1]) < lengths[:, None]
    return (entropies(coupling.mT) * real).sum(-1) / lengths


def entropies(weights: Tensor) -> Tensor:
    """Entropy along the last dimension over the largest possible one, ``log K``.

    >>> entropies(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([1., 0.])
    """
    return torch.special.entr(weights).sum(-1) / math.log(weights.shape[-1])


def mean_off_diagonal(cosines: Tensor) -> Tensor:
    """Mean over all pairs of different interests, ``[B, K, K]`` to ``[B]``."""
    k = cosines.shape[-1]
    return (cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / (k * (k - 1))


def diagnose(model: MIMNet, inputs: FrozenInputs, ratings: Ratings) -> dict[str, Any]:
    """Diagnostics of the users and items of ``ratings``, as `results.json` holds them.

    Capsules of a user who liked a single item are all its multiples, so what is said of capsules,
    bridges and coupling is said of users who liked two items or more; attentions and gate are of
    all ratings. Means and standard deviations; None of nobody, or where K = 1 leaves no choice.

    Args:
        model: Trained.
        inputs: What it was trained with.
        ratings: Of users of both domains.
    """
    order = ratings.users.argsort(stable=True)
    items = ratings.items[order]
    users, counts = ratings.users.unique(return_counts=True)
    by_user: dict[str, list[Tensor]] = {"capsules": [], "bridges": [], "coupling": []}
    fine, coarse, gates = [], [], []
    of_users = zip(users.split(_USERS), counts.split(_USERS), strict=True)
    of_items = items.split([int(part.sum()) for part in counts.split(_USERS)])
    for (some, count), theirs in zip(of_users, of_items, strict=True):
        found = interests(model, inputs, some)
        answer = answers(model, inputs, found.transferred.repeat_interleave(count, 0), theirs)
        fine.append(answer.fine)
        coarse.append(answer.coarse)
        gates.append(answer.gate)
        several = inputs.lengths[some] > 1
        capsules = found.capsules[several]
        by_user["capsules"].append(mean_off_diagonal(capsule_cosines(capsules)))
        by_user["bridges"].append(mean_off_diagonal(bridge_cosines(model.bridge, capsules)))
        by_user["coupling"].append(
            coupling_entropies(found.coupling[several], found.lengths[several])
        )
    cosines, bridges, coupling = (torch.cat(parts) for parts in by_user.values())
    choice = model.routing.num_capsules > 1 and len(cosines) > 0
    return {
        "users": len(users),
        "users_of_several_items": len(cosines),
        "ratings": len(items),
        "capsule_cosine": _spread(cosines) if choice else None,
        "bridge_cosine": _spread(bridges) if choice else None,
        "coupling_entropy": _spread(coupling) if choice else None,
        "collapsed": (cosines > COLLAPSED).double().mean().item() if choice else None,
        "collapsed_above": COLLAPSED,
        "fine": _attention(torch.cat(fine)),
        "coarse": _attention(torch.cat(coarse)),
        "gate": _spread(torch.cat(gates)),
    }


def sentence(diagnostics: dict[str, Any]) -> str:
    """Diagnostics in one line."""
    named = {
        "cosine of capsules": "capsule_cosine",
        "of bridges": "bridge_cosine",
        "entropy of coupling": "coupling_entropy",
        "share of the coarse attention": "gate",
    }
    said = [
        f"{what} {diagnostics[name]['mean']:.2f}"
        for what, name in named.items()
        if diagnostics[name] is not None
    ]
    if diagnostics["collapsed"] is not None:
        said.append(
            f"one interest in all but name for {diagnostics['collapsed']:.0%} of the users with "
            f"several liked items (mean cosine of capsules above {diagnostics['collapsed_above']})"
        )
    return ", ".join(said)


def warning(title: str, diagnostics: dict[str, Any]) -> str | None:
    """What to tell about a model whose capsules collapsed for most users."""
    share = diagnostics["collapsed"]
    if share is None or share <= WARNED:
        return None
    return (
        f"{title}: the interests of {share:.0%} of the users with several liked items have "
        f"collapsed into one (mean cosine of their capsules above {diagnostics['collapsed_above']})"
        ": as good as fewer interests; see diagnostics in results.json, and try --interests"
    )


def _attention(weights: Tensor) -> dict[str, Any]:
    choice = weights.shape[-1] > 1
    return {
        "weights": weights.double().mean(0).tolist(),
        "entropy": _spread(entropies(weights)) if choice else None,
    }


def _spread(values: Tensor) -> dict[str, float]:
    values = values.double()
    return {"mean": values.mean().item(), "std": values.std(correction=0).item()}
