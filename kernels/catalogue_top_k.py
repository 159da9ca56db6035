"""The best items of a catalogue: a program takes a user through a part of it, tile by tile.

Keys and values are projected once per user, before the launch, so that a tile of items meets them
in four products and a softmax over the interests. A program keeps its best items as one tile of
integers whose order is that of the result: the score's bits above the index counted down. Most
tiles have nothing better than the worst of these and are done after one comparison; the others
are merged by a sort. The parts of a user are merged in the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import MOST_REGISTERS, launch
from ._tiles import bound, padded, product

# Programs that keep a GPU busy.
_PROGRAMS = 2048
_LEAST_TILES = 8  # of a part
_ITEMS = 64  # of a tile, and the best that a program keeps

NOTHING = tl.constexpr(-(2**63))
_INDEX = tl.constexpr(2**32 - 1)


@triton.jit
def _attended(query, item, keys, values, K: tl.constexpr, STORAGE: tl.constexpr):
    """``sum_k softmax_k(keys . query) (values . item)`` for tiles of queries and items, [ITEMS]."""
    score = product(keys, tl.trans(query), STORAGE)
    real = tl.arange(0, score.shape[0])[:, None] < K
    score = tl.where(real, score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 0)[None, :])
    value = product(values, tl.trans(item), STORAGE)
    return tl.sum(weight * value, 0) / tl.sum(weight, 0)


@triton.jit
def _ranks(score, index):
    """Integers in the order of the result; NaN and -inf are nothing."""
    score = tl.where(score == 0, 0.0, score)  # both zeros are the same score
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = (ordered.to(tl.int64) << 32) | (_INDEX - index)
    return tl.where(score > float("-inf"), rank, NOTHING)


@triton.jit
def _among(index, excluded, first, end, steps):
    """Which of the indices stand in the rising list ``excluded[first:end]``."""
    low = tl.zeros_like(index) + first
    high = tl.zeros_like(index) + end
    for _ in range(bound(steps)):
        open_ = low < high
        middle = (low + high) // 2
        value = tl.load(excluded + middle, mask=open_, other=0)
        low = tl.where(open_ & (value < index), middle + 1, low)
        high = tl.where(open_ & (value >= index), middle, high)
    return tl.load(excluded + low, mask=low < end, other=-1) == index


@triton.jit(do_not_specialize=["count", "part", "steps"])
def _catalogue_top_k_kernel(
    projected,
    items,
    prototypes,
    prototype_ids,
    fusion_weight,
    fusion_bias,
    excluded,
    offsets,
    ranks,
    count,
    rows,
    part,
    steps,
    items_stride_n,
    items_stride_d,
    prototypes_stride_n,
    prototypes_stride_d,
    K: tl.constexpr,
    D: tl.constexpr,
    K_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    ITEMS: tl.constexpr,
):
    STORAGE: tl.constexpr = items.dtype.element_ty
    user = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * part
    end = tl.minimum(begin + part, count)
    k = tl.arange(0, K_TILE)[:, None]
    d = tl.arange(0, D_TILE)[None, :]
    own = projected + user * 4 * K * D + k * D + d
    inside = (k < K) & (d < D)
    fine_keys = tl.load(own, mask=inside, other=0.0)
    fine_values = tl.load(own + K * D, mask=inside, other=0.0)
    coarse_keys = tl.load(own + 2 * K * D, mask=inside, other=0.0)
    coarse_values = tl.load(own + 3 * K * D, mask=inside, other=0.0)
    item_weight = tl.load(fusion_weight + d, mask=d < D, other=0.0).to(tl.float32)
    guide_weight = tl.load(fusion_weight + D + d, mask=d < D, other=0.0).to(tl.float32)
    bias = tl.load(fusion_bias).to(tl.float32)
    if excluded is not None:
        seen = tl.load(offsets + user)
        seen_end = tl.load(offsets + user + 1)

    best = tl.full([ITEMS], NOTHING, tl.int64)
    for start in range(bound(begin), bound(end), ITEMS):
        index = start + tl.arange(0, ITEMS).to(tl.int64)
        here = index < end
        row = index
        if prototype_ids is not None:
            row = tl.load(prototype_ids + index, mask=here, other=0)
        known = (row >= 0) & (row < rows)
        item = tl.load(
            items + index[:, None] * items_stride_n + d * items_stride_d,
            mask=here[:, None] & (d < D), other=0.0,
        )  # fmt: skip
        guide = tl.load(
            prototypes + row[:, None] * prototypes_stride_n + d * prototypes_stride_d,
            mask=(here & known)[:, None] & (d < D), other=0.0,
        )  # fmt: skip
        logit = tl.sum(item.to(tl.float32) * item_weight + guide.to(tl.float32) * guide_weight, 1)
        gate = tl.sigmoid(logit + bias)
        score = (1 - gate) * _attended(item, item, fine_keys, fine_values, K, STORAGE)
        score += gate * _attended(guide, item, coarse_keys, coarse_values, K, STORAGE)
        rank = tl.where(here & known, _ranks(score, index), NOTHING)
        if tl.max(rank, 0) > tl.min(best, 0):
            if excluded is not None:
                rank = tl.where(_among(index, excluded, seen, seen_end, steps), NOTHING, rank)
            both = tl.reshape(tl.join(best, rank), [2 * ITEMS])
            best = tl.topk(both, ITEMS)
    place = (user * tl.num_programs(1) + tl.program_id(1)) * ITEMS + tl.arange(0, ITEMS)
    tl.store(ranks + place, best)


def catalogue_top_k(
    interests: Tensor,
    items: Tensor,
    prototypes: Tensor,
    prototype_ids: Tensor | None,
    fine_kw: Tensor,
    fine_kb: Tensor,
    fine_vw: Tensor,
    fine_vb: Tensor,
    coarse_kw: Tensor,
    coarse_kb: Tensor,
    coarse_vw: Tensor,
    coarse_vb: Tensor,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    excluded: Tensor | None,
    excluded_offsets: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel and merge the parts of every user; the key biases cancel."""
    users, capsules, d = interests.shape
    count = items.shape[0]
    tiles = triton.cdiv(count, _ITEMS)
    parts = max(1, min(_PROGRAMS // max(1, users), tiles // _LEAST_TILES))
    wide = interests.float()
    projected = torch.stack(
        [
            wide @ fine_kw.float().mT,
            wide @ fine_vw.float().mT + fine_vb.float(),
            wide @ coarse_kw.float().mT,
            wide @ coarse_vw.float().mT + coarse_vb.float(),
        ],
        1,
    )
    if excluded is not None and excluded_offsets is not None:
        excluded, excluded_offsets = _sorted(excluded, excluded_offsets)
    ranks = torch.empty((users, parts * _ITEMS), dtype=torch.int64, device=items.device)
    launch(
        _catalogue_top_k_kernel,
        (users, parts),
        projected,
        items,
        prototypes,
        None if prototype_ids is None else prototype_ids.contiguous(),
        fusion_weight.contiguous(),
        fusion_bias,
        excluded,
        excluded_offsets,
        ranks,
        count,
        prototypes.shape[0],
        triton.cdiv(tiles, parts) * _ITEMS,
        0 if excluded is None else excluded.shape[0].bit_length(),
        *items.stride(),
        *prototypes.stride(),
        K=capsules,
        D=d,
        K_TILE=padded(capsules, 16),
        D_TILE=padded(d, 16),
        ITEMS=_ITEMS,
        maxnreg=MOST_REGISTERS,
    )
    best = ranks.sort(1, descending=True).values[:, :k]
    nothing = best == NOTHING.value
    ordered = (best >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    indices = _INDEX.value - (best & _INDEX.value)
    scores = scores.masked_fill(nothing, -torch.inf).to(interests.dtype)
    return scores, indices.masked_fill(nothing, -1)


def _sorted(excluded: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Every user's list in rising order, and offsets that stay inside."""
    offsets = offsets.clamp(0, excluded.shape[0]).cummax(0).values
    place = torch.arange(excluded.shape[0], device=excluded.device)
    user = torch.searchsorted(offsets, place, right=True)
    rising, order = excluded.sort()
    return rising[user[order].argsort(stable=True)], offsets
