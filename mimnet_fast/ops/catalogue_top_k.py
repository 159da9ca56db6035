"""Exact top-k over a whole catalogue, the multi-granularity attention inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends, reference
from mimnet_fast.ops import _autograd, _checks
from mimnet_fast.ops.multi_granularity_attention import check_count, check_fusion
from mimnet_fast.reference.multi_granularity_attention import AttentionWeights


def catalogue_top_k(
    interests: Tensor,
    items: Tensor,
    prototypes: Tensor,
    fine: AttentionWeights,
    coarse: AttentionWeights,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    k: int,
    *,
    prototype_ids: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items of a catalogue that MIMNet (arXiv 2408.00038) rates highest, for every user.

    ``score[b, n] = items[n] . u``, where ``u`` is :func:`multi_granularity_attention` of item n and
    its prototype over the interests of user b: the rating that :func:`mimnet_forward` gives. The
    result is exact. Kernels pass over the items in tiles and keep k numbers per user; nothing of
    size B x N is stored. Half-precision inputs are scored and ranked in float32.

    The op has no gradient.

    Args:
        interests: ``[B, K, D]``, transferred to the items' domain.
        items: ``[N, D]``, the catalogue.
        prototypes: ``[P, D]``.
        fine: ``(key_weight [D, D], key_bias [D], value_weight [D, D], value_bias [D])``.
        coarse: The same for the prototype.
        fusion_weight: ``[2*D]``, first the item's half.
        fusion_bias: ``[]`` or ``[1]``.
        k: Items per user, at least 1.
        prototype_ids: Integer ``[N]``, the row of ``prototypes`` for each item. None: ``P = N``,
            item n has prototype n. A few prototypes with ids are faster than N rows.
        exclude: ``(indices [T], offsets [B+1])``: user b gets none of
            ``indices[offsets[b]:offsets[b+1]]``, integers in any order.
        backend: See :mod:`mimnet_fast.backends`.

    Returns:
        Scores ``[B, k]`` in the inputs' dtype, falling, and the items' indices ``[B, k]`` (int64);
        of equal scores the lower index comes first. Where fewer than k items are left, the score is
        -inf and the index -1. An item whose score is NaN or -inf is not chosen.

    Raises:
        ValueError: for shapes, devices or numbers that do not fit, naming the argument, and for a
            tensor that requires a gradient while gradients are recorded.
        TypeError: for wrong types or dtypes.

    Example:
        >>> import torch
        >>> eye, zero = torch.eye(2), torch.zeros(2)
        >>> weights = (eye, zero, eye, zero)
        >>> items = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
        >>> fusion = torch.zeros(4), torch.zeros(())
        >>> scores, indices = catalogue_top_k(
        ...     torch.tensor([[[1.0, 0.5]]]), items, items, weights, weights, *fusion, k=2,
        ...     exclude=(torch.tensor([1]), torch.tensor([0, 1])))
        >>> indices
        tensor([[2, 0]])
        >>> scores
        tensor([[1.5000, 0.5000]])
    """
    interests = _checks.leading("interests", interests, (3,), "[B, K, D]")
    _checks.is_tensor("items", items, (2,), "[N, D]")
    _checks.is_tensor("prototypes", prototypes, (2,), "[P, D]")
    check_count("fine", fine)
    check_count("coarse", coarse)
    tensors = (interests, items, prototypes, *fine, *coarse, fusion_weight, fusion_bias)
    tensors = _checks.autocast(tensors, interests)
    interests, items, prototypes = tensors[:3]
    batch, capsules, d = interests.shape
    n, p = items.shape[0], prototypes.shape[0]
    _checks.not_empty("interests", K=capsules, D=d)
    _checks.same("items", items, (n, d), "[N, D]", interests)
    _checks.same("prototypes", prototypes, (p, d), "[P, D]", interests)
    _checks.not_empty("items", N=n)
    _checks.not_empty("prototypes", P=p)
    check_fusion(tensors[3:7], tensors[7:11], tensors[11], tensors[12], d, interests)
    _checks.whole("k", k, 1, "items per user")
    if prototype_ids is not None:
        prototype_ids = _checks.integers("prototype_ids", prototype_ids, n, "[N]", interests)
        _checks.in_range("prototype_ids", prototype_ids, 0, p - 1, "a row of prototypes")
    elif p != n:
        raise ValueError(
            f"prototypes: got {p} rows for {n} items, need one for each item, or prototype_ids"
        )
    excluded, offsets = _check_exclude(exclude, batch, n, interests)
    _refuse_gradients(tensors)
    unsupported = _unsupported(interests, K=capsules, D=d, k=k)
    chosen = backends.select("catalogue_top_k", backend, interests, unsupported)
    if chosen == "reference":
        return reference.catalogue_top_k(
            *tensors[:3],
            tensors[3:7],
            tensors[7:11],
            *tensors[11:],
            k,
            prototype_ids=prototype_ids,
            exclude=None if excluded is None or offsets is None else (excluded, offsets),
        )
    out: tuple[Tensor, Tensor] = _CALLS[chosen](
        *tensors[:3], prototype_ids, *tensors[3:], excluded, offsets, k
    )
    return out


def _check_exclude(
    exclude: Any, batch: int, n: int, like: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if exclude is None:
        return None, None
    if not isinstance(exclude, (tuple, list)) or len(exclude) != 2:
        raise TypeError(f"exclude: got {type(exclude).__name__}, need (indices [T], offsets [B+1])")
    rows = _checks.is_tensor("exclude[0]", exclude[0], (1,), "[T]").shape[0]
    indices = _checks.integers("exclude[0]", exclude[0], rows, "[T]", like)
    _checks.in_range("exclude[0]", indices, 0, n - 1, "a row of items")
    offsets = _checks.integers("exclude[1]", exclude[1], batch + 1, "[B+1]", like)
    return indices, _checks.offsets(offsets, None, None, rows, None, like, "exclude[1]")


def _refuse_gradients(tensors: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            "catalogue_top_k: a tensor requires a gradient, but the op has none: call it under "
            "torch.no_grad() or detach the tensors"
        )


def _unsupported(like: Tensor, **sizes: int) -> dict[str, list[str]]:
    # What a block or program keeps of these in shared memory and registers.
    most: dict[tuple[str, str], dict[str, int]] = {
        ("triton", "Triton"): {"K": 16, "D": 32 if like.dtype is torch.float32 else 64, "k": 64}
    }
    if not like.is_cpu:
        most["native", "CUDA"] = {"k": 2048}
    return {
        backend: [
            f"no {kind} kernel for catalogue_top_k with {name} = {sizes[name]} in this version, "
            f"at most {limit} in {like.dtype}"
            for name, limit in limits.items()
            if sizes[name] > limit
        ]
        for (backend, kind), limits in most.items()
    }


def _fake(interests: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = interests.shape[0], others[-1]
    return interests.new_empty(shape), interests.new_empty(shape, dtype=torch.int64)


_CALLS = _autograd.register_inference("catalogue_top_k", _fake)
