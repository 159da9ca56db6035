"""Dynamic routing: one program routes one user, all iterations in one launch.

Agreement is linear, so the logits of a step are the first logits plus ``back . x_l``, where
``back [K,D_in]`` sums the capsules of the earlier steps as seen from the input space. No logits are
kept, no votes are formed, and an iteration is one pass over tiles of inputs, as in flash attention:
scores, coupling (an online softmax where it runs over the inputs), weighted sum. The weight meets K
pooled vectors instead of L inputs. A history that fits one tile is read once and stays on the chip:
a user costs L D_in elements of memory, and 2 (L + D) K D_in multiply-adds per iteration.

A weight per capsule is a matrix times one vector for each of them, which no matrix product serves;
votes per capsule are products elementwise. Where the weight exceeds a tile, the capsules are formed
in chunks of their D, once for the length and once for the result; a single chunk is formed once,
because the compiler finds the two equal.

Replaced logits need the last capsules alone in ``back``; those that add to the coupling read it
from where the last iteration left it. Normalised votes divide the agreement by their lengths. With
a weight these are products of all inputs, formed once, by a kernel of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import MOST_REGISTERS, launch
from ._tiles import bound, padded, product
from .squash import IDENTITY, squash_factor, squash_slope
from .weight_gradients import outer_sums

CAPSULES = tl.constexpr(0)
FILL_BEFORE = tl.constexpr(1)
IGNORE = tl.constexpr(2)

REPLACE = tl.constexpr(1)
COUPLING = tl.constexpr(2)

NO_WEIGHT = tl.constexpr(0)
SHARED = tl.constexpr(1)

_PADDING_LOGIT = tl.constexpr(-1e9)
_LOWEST = tl.constexpr(-3e38)
_SHORTEST_VOTE = tl.constexpr(1e-12)

_LONGEST_TILE = 64
_TILE_ELEMENTS = 4096


@triton.jit
def _load_weight(weight, start, stride_i, stride_d, D_IN, D, I_TILE, D_TILE):
    i = tl.arange(0, I_TILE)[:, None]
    d = start + tl.arange(0, D_TILE)[None, :]
    return tl.load(weight + i * stride_i + d * stride_d, mask=(i < D_IN) & (d < D), other=0.0)


@triton.jit
def _row(x, k):
    """Row ``k`` of a tile."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == k, x, 0.0), 0)


@triton.jit
def times_weight(
    pooled,
    weight,
    start,
    stride_k,
    stride_i,
    stride_d,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Elements ``start ..`` of the capsules [K_TILE, D_TILE] from the weighted sums."""
    if WEIGHT == NO_WEIGHT:
        capsules = pooled
    elif WEIGHT == SHARED:
        w = _load_weight(weight, start, stride_i, stride_d, D_IN, D, pooled.shape[1], D_TILE)
        capsules = product(pooled, w, weight.dtype.element_ty)
    else:
        k = tl.arange(0, pooled.shape[0])[:, None]
        capsules = tl.zeros([pooled.shape[0], D_TILE], tl.float32)
        for row in range(K):
            w = _load_weight(
                weight + row * stride_k, start, stride_i, stride_d, D_IN, D, pooled.shape[1], D_TILE
            )
            capsule = tl.sum(_row(pooled, row)[:, None] * w.to(tl.float32), 0)
            capsules = tl.where(k == row, capsule[None, :], capsules)
    return capsules


@triton.jit
def times_weight_transposed(
    capsules,
    weight,
    start,
    stride_k,
    stride_i,
    stride_d,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    I_TILE: tl.constexpr,
):
    """What elements ``start ..`` of the capsules give in the input space, [K_TILE, I_TILE]."""
    if WEIGHT == NO_WEIGHT:
        back = capsules
    elif WEIGHT == SHARED:
        w = _load_weight(weight, start, stride_i, stride_d, D_IN, D, I_TILE, capsules.shape[1])
        back = product(capsules, tl.trans(w), weight.dtype.element_ty)
    else:
        k = tl.arange(0, capsules.shape[0])[:, None]
        back = tl.zeros([capsules.shape[0], I_TILE], tl.float32)
        for row in range(K):
            w = _load_weight(
                weight + row * stride_k, start, stride_i, stride_d, D_IN, D, I_TILE,
                capsules.shape[1],
            )  # fmt: skip
            vector = tl.sum(_row(capsules, row)[None, :] * w.to(tl.float32), 1)
            back = tl.where(k == row, vector[None, :], back)
    return back


@triton.jit
def _load_inputs(
    inputs,
    start,
    stride_k,
    stride_l,
    stride_d,
    length,
    OWN_VOTES: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
):
    """A tile of one user's inputs [L_TILE, I_TILE], or of the votes [K_TILE, L_TILE, I_TILE]."""
    at = (start + tl.arange(0, L_TILE)).to(tl.int64)[:, None]
    i = tl.arange(0, I_TILE).to(tl.int64)[None, :]
    here = (at < length) & (i < D_IN)
    offsets = at * stride_l + i * stride_d
    if OWN_VOTES:
        k = tl.arange(0, K_TILE).to(tl.int64)[:, None, None]
        x = tl.load(inputs + k * stride_k + offsets[None], mask=(k < K) & here[None], other=0.0)
    else:
        x = tl.load(inputs + offsets, mask=here, other=0.0)
    return x


@triton.jit
def load_logits(
    logits, start, stride_k, stride_l, length, K: tl.constexpr, K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
):  # fmt: skip
    """The first logits of a tile [K_TILE, L_TILE]; zeros where there are none."""
    if logits is None:
        first = tl.zeros([K_TILE, L_TILE], tl.float32)
    else:
        k = tl.arange(0, K_TILE).to(tl.int64)[:, None]
        at = (start + tl.arange(0, L_TILE)).to(tl.int64)[None, :]
        here = (k < K) & (at < length)
        first = tl.load(logits + k * stride_k + at * stride_l, mask=here, other=0.0).to(tl.float32)
    return first


@triton.jit
def load_real(mask, start, stride_l, length, L_TILE: tl.constexpr):
    """Which positions of a tile [1, L_TILE] hold an item."""
    at = (start + tl.arange(0, L_TILE))[None, :]
    real = at < length
    if mask is not None:
        if mask.dtype.element_ty.is_int1():
            real = tl.load(mask + at.to(tl.int64) * stride_l, mask=real, other=0) != 0
        else:
            real = real & (at < tl.load(mask))
    return real


@triton.jit
def _norm2(
    pooled,
    weight,
    stride_k,
    stride_i,
    stride_d,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Squared lengths [K_TILE, 1] of the capsules."""
    norm2 = tl.zeros([pooled.shape[0], 1], tl.float32)
    for start in range(0, D, D_TILE):
        c = times_weight(
            pooled, weight, start, stride_k, stride_i, stride_d, WEIGHT, K, D_IN, D, D_TILE
        )
        norm2 += tl.sum(c * c, 1, keep_dims=True)
    return norm2


@triton.jit
def _inverse_norm(norm2):
    return 1 / tl.maximum(tl.sqrt(norm2), _SHORTEST_VOTE)


@triton.jit
def _load_inverse_norms(
    inverse_norms, x, start, length, OWN_VOTES: tl.constexpr, WEIGHT: tl.constexpr,
    K: tl.constexpr, K_TILE: tl.constexpr, L_TILE: tl.constexpr,
):  # fmt: skip
    """One over the lengths of a tile's votes, [K_TILE, L_TILE], or [1, L_TILE] if all agree."""
    if OWN_VOTES:
        votes = x.to(tl.float32)
        inverse = _inverse_norm(tl.sum(votes * votes, 2))
    elif WEIGHT == NO_WEIGHT:
        votes = x.to(tl.float32)
        inverse = _inverse_norm(tl.sum(votes * votes, 1)[None, :])
    else:
        stride_k = 0 if WEIGHT == SHARED else length
        inverse = load_logits(inverse_norms, start, stride_k, 1, length, K, K_TILE, L_TILE)
    return inverse


@triton.jit(do_not_specialize=["length"])
def _inverse_norms_kernel(
    inputs,
    weight,
    out,
    length,
    inputs_stride_b,
    inputs_stride_l,
    inputs_stride_d,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """One over the lengths of a tile's votes for one capsule."""
    user, k = tl.program_id(0).to(tl.int64), tl.program_id(2)
    at = tl.program_id(1).to(tl.int64) * L_TILE + tl.arange(0, L_TILE)[:, None]
    inputs += user * inputs_stride_b + at * inputs_stride_l
    weight += k.to(tl.int64) * weight_stride_k
    norm2 = tl.zeros([L_TILE, 1], tl.float32)
    for start in range(0, D, D_TILE):
        d = start + tl.arange(0, D_TILE)[None, :]
        votes = tl.zeros([L_TILE, D_TILE], tl.float32)
        for first in range(0, D_IN, I_TILE):
            i = first + tl.arange(0, I_TILE)
            x = tl.load(
                inputs + i[None, :] * inputs_stride_d,
                mask=(at < length) & (i[None, :] < D_IN),
                other=0.0,
            )
            w = tl.load(
                weight + i[:, None] * weight_stride_i + d * weight_stride_d,
                mask=(i[:, None] < D_IN) & (d < D),
                other=0.0,
            )
            votes += product(x, w, weight.dtype.element_ty)
        norm2 += tl.sum(votes * votes, 1, keep_dims=True)
    out += (user * tl.num_programs(2) + k) * length + at
    tl.store(out, _inverse_norm(norm2), mask=at < length)


@triton.jit(do_not_specialize=["length", "iterations"])
def _dynamic_routing_forward_kernel(
    inputs,
    weight,
    logits,
    mask,
    capsule_mask,
    inverse_norms,
    out,
    coupling,
    pooled_out,
    length,
    iterations,
    inputs_stride_b,
    inputs_stride_k,
    inputs_stride_l,
    inputs_stride_d,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    logits_stride_b,
    logits_stride_k,
    logits_stride_l,
    mask_stride_b,
    mask_stride_l,
    capsule_mask_stride_b,
    capsule_mask_stride_k,
    inverse_temperature,
    eps,
    power,
    OWN_VOTES: tl.constexpr,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    AXIS: tl.constexpr,
    PADDING: tl.constexpr,
    UPDATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    INNER: tl.constexpr,
    FINAL: tl.constexpr,
    WHOLE: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    STORAGE: tl.constexpr = inputs.dtype.element_ty
    user = tl.program_id(0).to(tl.int64)
    inputs += user * inputs_stride_b
    if logits is not None:
        logits += user * logits_stride_b
    if mask is not None:
        mask += user * mask_stride_b
    if inverse_norms is not None:
        inverse_norms += user * length * (1 if WEIGHT == SHARED else K)
    k = tl.arange(0, K_TILE)[:, None]
    i = tl.arange(0, I_TILE)[None, :]
    coupling += (user * K + k) * length
    pooled_out += (user * K + k) * D_IN
    out += (user * K + k) * D
    present = k < K
    if capsule_mask is not None:
        offsets = user * capsule_mask_stride_b + k.to(tl.int64) * capsule_mask_stride_k
        present = tl.load(capsule_mask + offsets, mask=present, other=0) != 0

    if WHOLE:
        x = _load_inputs(
            inputs, 0, inputs_stride_k, inputs_stride_l, inputs_stride_d, length,
            OWN_VOTES, K, D_IN, K_TILE, L_TILE, I_TILE,
        )  # fmt: skip
        first = load_logits(logits, 0, logits_stride_k, logits_stride_l, length, K, K_TILE, L_TILE)
        real = load_real(mask, 0, mask_stride_l, length, L_TILE)
        if NORMALIZE:
            inverse = _load_inverse_norms(
                inverse_norms, x, 0, length, OWN_VOTES, WEIGHT, K, K_TILE, L_TILE
            )
    back = tl.zeros([K_TILE, I_TILE], tl.float32)
    pooled = tl.zeros([K_TILE, I_TILE], tl.float32)
    top = tl.full([K_TILE, 1], _LOWEST, tl.float32)
    total = tl.zeros([K_TILE, 1], tl.float32)
    # The first weighted sum knows no agreement. It is compiled apart, because a branch would have
    # Triton repeat the softmax in every layout that its uses ask for.
    for AGAIN in tl.static_range(2):
        for step in range(bound(iterations) - 1 if AGAIN else 1):
            if AGAIN:
                norm2 = _norm2(
                    pooled, weight, weight_stride_k, weight_stride_i, weight_stride_d,
                    WEIGHT, K, D_IN, D, D_TILE,
                )  # fmt: skip
                factor, _ = squash_factor(norm2, INNER, eps, power)
                if UPDATE != 0:
                    back = tl.zeros([K_TILE, I_TILE], tl.float32)
                for start in range(0, D, D_TILE):
                    c = times_weight(
                        pooled, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
                        WEIGHT, K, D_IN, D, D_TILE,
                    )  # fmt: skip
                    back += times_weight_transposed(
                        factor * c, weight, start, weight_stride_k, weight_stride_i,
                        weight_stride_d, WEIGHT, K, D_IN, D, I_TILE,
                    )  # fmt: skip
            pooled = tl.zeros([K_TILE, I_TILE], tl.float32)
            if UPDATE == COUPLING:
                last_top = top
                last_total = tl.where(total > 0, total, 1.0)
                tl.debug_barrier()
            top = tl.full([K_TILE, 1], _LOWEST, tl.float32)
            total = tl.zeros([K_TILE, 1], tl.float32)
            for start in range(0, L_TILE if WHOLE else bound(length), L_TILE):
                if not WHOLE:
                    x = _load_inputs(
                        inputs, start, inputs_stride_k, inputs_stride_l, inputs_stride_d, length,
                        OWN_VOTES, K, D_IN, K_TILE, L_TILE, I_TILE,
                    )  # fmt: skip
                    first = load_logits(
                        logits, start, logits_stride_k, logits_stride_l, length, K, K_TILE, L_TILE
                    )
                    real = load_real(mask, start, mask_stride_l, length, L_TILE)
                    if NORMALIZE:
                        inverse = _load_inverse_norms(
                            inverse_norms, x, start, length, OWN_VOTES, WEIGHT, K, K_TILE, L_TILE
                        )
                at = start + tl.arange(0, L_TILE)[None, :]
                logit = first
                if AGAIN:
                    if OWN_VOTES:
                        agreement = tl.sum(back[:, None, :] * x.to(tl.float32), 2)
                    else:
                        agreement = product(back, tl.trans(x), STORAGE)
                    if NORMALIZE:
                        agreement *= inverse
                    if UPDATE == REPLACE:
                        logit = agreement
                    elif UPDATE == COUPLING:
                        here = (k < K) & (at < length)
                        if AXIS == CAPSULES:
                            last = tl.load(coupling + at, mask=here, other=0.0)
                        else:
                            last = tl.load(coupling + at, mask=here, other=float("-inf"))
                            last = tl.exp(last - last_top) / last_total
                        # Others may write what this thread has just read.
                        tl.debug_barrier()
                        logit = last + agreement
                    else:
                        logit += agreement
                logit *= inverse_temperature
                if PADDING == FILL_BEFORE:
                    logit = tl.where(real, logit, _PADDING_LOGIT)
                taken = at < length if PADDING == FILL_BEFORE else real
                if AXIS == CAPSULES:
                    logit = tl.where(present, logit, _LOWEST)
                    share = tl.where(present, tl.exp(logit - tl.max(logit, 0, keep_dims=True)), 0.0)
                    sum_of_shares = tl.sum(share, 0, keep_dims=True)
                    share = share / tl.where(sum_of_shares > 0, sum_of_shares, 1.0)
                    share = tl.where(taken, share, 0.0)
                    tl.store(
                        coupling + at,
                        share,
                        mask=(k < K)
                        & (at < length)
                        & ((UPDATE == COUPLING) | (step + AGAIN == iterations - 1)),
                    )
                else:
                    counts = real if PADDING == IGNORE else at < length
                    logit = tl.where(counts, logit, _LOWEST)
                    new_top = tl.maximum(top, tl.max(logit, 1, keep_dims=True))
                    share = tl.where(counts, tl.exp(logit - new_top), 0.0)
                    rescale = tl.exp(top - new_top)
                    total = total * rescale + tl.sum(share, 1, keep_dims=True)
                    pooled *= rescale
                    top = new_top
                    share = tl.where(taken & present, share, 0.0)
                    # Kept as a logit until the sum is known.
                    kept = tl.where(taken & present, logit, float("-inf"))
                    tl.store(
                        coupling + at,
                        kept,
                        mask=(k < K)
                        & (at < length)
                        & ((UPDATE == COUPLING) | (step + AGAIN == iterations - 1)),
                    )
                if OWN_VOTES:
                    pooled += tl.sum(share[:, :, None] * x.to(tl.float32), 1)
                else:
                    pooled += product(share, x, STORAGE)
            if AXIS != CAPSULES:
                pooled /= tl.where(total > 0, total, 1.0)
    if AXIS != CAPSULES:
        tl.debug_barrier()
        for start in range(0, L_TILE if WHOLE else bound(length), L_TILE):
            at = start + tl.arange(0, L_TILE)[None, :]
            here = (k < K) & (at < length)
            kept = tl.load(coupling + at, mask=here, other=float("-inf"))
            share = tl.exp(kept - top) / tl.where(total > 0, total, 1.0)
            tl.store(coupling + at, share, mask=here)
    tl.store(pooled_out + i, pooled, mask=(k < K) & (i < D_IN))
    norm2 = _norm2(
        pooled, weight, weight_stride_k, weight_stride_i, weight_stride_d, WEIGHT, K, D_IN, D,
        D_TILE,
    )  # fmt: skip
    factor, _ = squash_factor(norm2, FINAL, eps, power)
    for start in range(0, D, D_TILE):
        c = times_weight(
            pooled, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
            WEIGHT, K, D_IN, D, D_TILE,
        )  # fmt: skip
        d = start + tl.arange(0, D_TILE)[None, :]
        tl.store(out + d, factor * c, mask=(k < K) & (d < D))


@triton.jit(do_not_specialize=["length"])
def _dynamic_routing_backward_kernel(
    grad,
    inputs_grad,
    capsule_grad,
    weight,
    coupling,
    pooled,
    length,
    grad_stride_b,
    grad_stride_k,
    grad_stride_d,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    eps,
    power,
    OWN_VOTES: tl.constexpr,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    FINAL: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    user = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_TILE)[:, None]
    i = tl.arange(0, I_TILE)[None, :]
    grad += user * grad_stride_b + k.to(tl.int64) * grad_stride_k
    coupling += (user * K + k) * length
    pooled = tl.load(pooled + (user * K + k) * D_IN + i, mask=(k < K) & (i < D_IN), other=0.0)

    norm2 = tl.zeros([K_TILE, 1], tl.float32)
    dot = tl.zeros([K_TILE, 1], tl.float32)
    for start in range(0, D, D_TILE):
        d = start + tl.arange(0, D_TILE)[None, :]
        c = times_weight(
            pooled, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
            WEIGHT, K, D_IN, D, D_TILE,
        )  # fmt: skip
        g = tl.load(grad + d * grad_stride_d, mask=(k < K) & (d < D), other=0.0).to(tl.float32)
        norm2 += tl.sum(c * c, 1, keep_dims=True)
        dot += tl.sum(c * g, 1, keep_dims=True)
    factor, radial = squash_factor(norm2, FINAL, eps, power)
    slope = squash_slope(dot, norm2, radial)

    pooled_grad = tl.zeros([K_TILE, I_TILE], tl.float32)
    for start in range(0, D, D_TILE):
        d = start + tl.arange(0, D_TILE)[None, :]
        c = times_weight(
            pooled, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
            WEIGHT, K, D_IN, D, D_TILE,
        )  # fmt: skip
        g = tl.load(grad + d * grad_stride_d, mask=(k < K) & (d < D), other=0.0).to(tl.float32)
        g = factor * g + slope * c
        if capsule_grad is not None:
            tl.store(capsule_grad + (user * K + k) * D + d, g, mask=(k < K) & (d < D))
        pooled_grad += times_weight_transposed(
            g, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
            WEIGHT, K, D_IN, D, I_TILE,
        )  # fmt: skip

    if inputs_grad is not None:
        for start in range(0, bound(length), L_TILE):
            at = start + tl.arange(0, L_TILE)
            share = tl.load(
                coupling + at[None, :], mask=(k < K) & (at[None, :] < length), other=0.0
            )
            x_grad = share[:, :, None] * pooled_grad[:, None, :]
            here = (at[:, None] < length) & (i < D_IN)
            if OWN_VOTES:
                row = (user * K + k) * length + at[None, :]
                tl.store(
                    inputs_grad + row[:, :, None] * D_IN + i[None],
                    x_grad,
                    mask=(k < K)[:, :, None] & here[None],
                )
            else:
                row = user * length + at[:, None]
                tl.store(inputs_grad + row * D_IN + i, tl.sum(x_grad, 0), mask=here)


def _kind(inputs: Tensor, weight: Tensor | None) -> dict[str, bool | int]:
    """Constants that say what votes are made of: 0 nothing, 1 a shared weight, 2 one a capsule."""
    return {
        "OWN_VOTES": inputs.dim() == 4,
        "WEIGHT": 0 if weight is None else weight.dim() - 1,
    }


def _strides(tensor: Tensor | None, dims: int) -> list[int]:
    """Strides of the last dimensions; 0 for those that the tensor does not have or repeats."""
    if tensor is None:
        return [0] * dims
    strides = [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return [0] * (dims - len(strides)) + strides


def _tiling(
    k: int, length: int, d_in: int, weight: Tensor | None, expanded: bool
) -> dict[str, int]:
    """Tiles that stay in registers, and warps enough to hold them.

    Positions are ``expanded`` where a tile holds one vector for each capsule.
    """
    k_tile, i_tile = padded(k), padded(d_in, 16)
    per_position = k_tile * i_tile if expanded else max(k_tile, i_tile)
    shortest = 1 if expanded else 16
    longest = max(shortest, min(_LONGEST_TILE, _TILE_ELEMENTS // per_position))
    l_tile = min(padded(length, shortest), longest)
    d_tile = i_tile
    if weight is not None:
        d_tile = min(padded(weight.shape[-1], 16), max(16, _TILE_ELEMENTS // i_tile))
    elements = max(per_position * l_tile, 0 if weight is None else i_tile * d_tile)
    outputs = k_tile * max(l_tile, i_tile, d_tile)
    warps = max(1, elements // 1024, outputs // 256, i_tile // 16)
    if weight is not None and weight.dtype is torch.float32 and (weight.dim() == 3 or k_tile > 8):
        # Products in float32 hold whole operands, next to the tile of inputs.
        warps *= 2
    return {
        "K_TILE": k_tile,
        "L_TILE": l_tile,
        "I_TILE": i_tile,
        "D_TILE": d_tile,
        "num_warps": min(8, warps),
        "num_stages": 1,
        "maxnreg": MOST_REGISTERS,
    }


def _inverse_norms(inputs: Tensor, weight: Tensor) -> Tensor:
    """One over the lengths of the votes [B,1,L], or [B,K,L] with a weight per capsule."""
    batch, length, d_in = inputs.shape
    rows = 1 if weight.dim() == 2 else weight.shape[0]
    out = inputs.new_empty(batch, rows, length, dtype=torch.float32)
    l_tile = min(padded(length, 16), 32)
    launch(
        _inverse_norms_kernel,
        (batch, triton.cdiv(length, l_tile), rows),
        inputs,
        weight,
        out,
        length,
        *inputs.stride(),
        *_strides(weight, 3),
        D_IN=d_in,
        D=weight.shape[-1],
        L_TILE=l_tile,
        I_TILE=min(padded(d_in, 16), 32),
        D_TILE=min(padded(weight.shape[-1], 16), 64),
        num_warps=4,
    )
    return out


def dynamic_routing(
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    capsule_mask: Tensor | None,
    num_capsules: int,
    iterations: int,
    softmax_over: int,
    padding: int,
    update: int,
    normalize_agreement: bool,
    full_gradient: bool,
    inner_squash: bool,
    final_squash: bool,
    temperature: float,
    squash: int,
    eps: float,
    power: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Capsules [B,K,D], and for backward the last coupling [B,K,L] and weighted sum [B,K,D_in].

    The capsules have the dtype of the inputs unless another is asked for.
    """
    batch, length, d_in = inputs.shape[0], inputs.shape[-2], inputs.shape[-1]
    d = d_in if weight is None else weight.shape[-1]
    out = inputs.new_empty(batch, num_capsules, d, dtype=dtype)
    coupling = inputs.new_empty(batch, num_capsules, length, dtype=torch.float32)
    pooled = inputs.new_empty(batch, num_capsules, d_in, dtype=torch.float32)
    kind = _kind(inputs, weight)
    tiles = _tiling(num_capsules, length, d_in, weight, kind["OWN_VOTES"])
    inverse_norms = None
    if normalize_agreement and weight is not None and iterations > 1:
        inverse_norms = _inverse_norms(inputs, weight)
    if inputs.dim() == 3:
        inputs = inputs[:, None]
    launch(
        _dynamic_routing_forward_kernel,
        (batch,),
        inputs,
        weight,
        logits,
        mask,
        capsule_mask,
        inverse_norms,
        out,
        coupling,
        pooled,
        length,
        iterations,
        *inputs.stride(),
        *_strides(weight, 3),
        *_strides(logits, 3),
        *(_strides(mask, 2) if mask is None or mask.dim() == 2 else (mask.stride(0), 0)),
        *_strides(capsule_mask, 2),
        1 / temperature,
        eps,
        power,
        **kind,
        K=num_capsules,
        D_IN=d_in,
        D=d,
        AXIS=softmax_over,
        PADDING=padding,
        UPDATE=update,
        NORMALIZE=normalize_agreement and iterations > 1,
        INNER=squash if inner_squash else IDENTITY.value,
        FINAL=squash if final_squash else IDENTITY.value,
        WHOLE=length <= tiles["L_TILE"],
        **tiles,
    )
    return out, coupling, pooled


def dynamic_routing_backward(
    grad: Tensor,
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    mask: Tensor | None,
    capsule_mask: Tensor | None,
    coupling: Tensor,
    pooled: Tensor,
    iterations: int,
    softmax_over: int,
    padding: int,
    update: int,
    normalize_agreement: bool,
    full_gradient: bool,
    inner_squash: bool,
    final_squash: bool,
    temperature: float,
    squash: int,
    eps: float,
    power: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs and of the weight through the last weighted sum."""
    coupling, pooled = coupling.contiguous(), pooled.contiguous()
    batch, k, length = coupling.shape
    d_in, d = pooled.shape[-1], grad.shape[-1]
    inputs_grad = inputs.new_empty(inputs.shape) if needs & 1 else None
    wants_weight = weight is not None and bool(needs & 2)
    capsule_grad = pooled.new_empty(batch, k, d) if wants_weight else None
    launch(
        _dynamic_routing_backward_kernel,
        (batch,),
        grad,
        inputs_grad,
        capsule_grad,
        weight,
        coupling,
        pooled,
        length,
        *grad.stride(),
        *_strides(weight, 3),
        eps,
        power,
        **_kind(inputs, weight),
        K=k,
        D_IN=d_in,
        D=d,
        FINAL=squash if final_squash else IDENTITY.value,
        **_tiling(k, length, d_in, weight, True),
    )
    weight_grad = None
    if wants_weight:
        rows = (batch, k) if weight.dim() == 3 else (batch * k, 1)
        (weight_grad,) = outer_sums([(pooled.view(*rows, d_in), capsule_grad.view(*rows, d))])
        weight_grad = weight_grad.view(weight.shape).to(weight.dtype)
    empty = inputs.new_empty(0)
    return (
        empty if inputs_grad is None else inputs_grad,
        empty if weight_grad is None else weight_grad,
        inputs.new_empty(0),
    )
