"""Dynamic routing with a weight per position, in launches over tiles of users and positions.

No input space is common to all positions, but a sum over them is still one matrix product for each
capsule: of the inputs, scaled by their coefficients, with the weight, over positions and features
together. The agreement is the same product the other way: capsules times the weight give a vector
for every position, which meets its input while the tile is in registers. So no vote is formed, and
each of the two passes of an iteration has the B K L D_in D multiply-adds that forming the votes
would have. A tile of the weight serves a tile of users; what is kept for a user is one number per
capsule and position, and partial sums of chunks of positions.

The gradients have the terms of :mod:`dynamic_routing_full`. Their vote gradients are formed a tile
at a time, once for the inputs and once for the weight.

A weight without a position comes here for the full gradient of its normalised votes, which take
part in their own gradient, with strides of 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import MOST_REGISTERS, launch
from ._routing import (
    ACCUMULATE,
    CAPSULES,
    COUPLING,
    FILL_BEFORE,
    IGNORE,
    LOWEST,
    PADDING_LOGIT,
    SHORTEST_VOTE,
    ZERO_AFTER,
    RoutingOptions,
    inverse_norms_of,
    largest_over_inputs,
    load_logits,
    load_real,
    mask_strides,
    measured_from_largest,
    strides_of,
)
from ._tiles import bound, padded, product
from .dynamic_routing_full import gradient_of_logits
from .squash import squash_tile, squash_tile_backward
from .weight_gradients import add_parts

_CHUNK = 32
"""Positions of a partial sum: fixed, so that no sum depends on the device."""
_MOST_USERS = 32


@triton.jit(do_not_specialize=["batch", "length"])
def _weighted_sums_kernel(
    inputs,
    weight,
    coefficients,
    parts,
    batch,
    length,
    inputs_stride_b,
    inputs_stride_l,
    inputs_stride_d,
    weight_stride_l,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    U_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Votes of a chunk of positions, summed with the coefficients: one capsule, a tile of users."""
    STORAGE: tl.constexpr = inputs.dtype.element_ty
    user = (tl.program_id(0).to(tl.int64) * U_TILE + tl.arange(0, U_TILE))[:, None]
    k = tl.program_id(1) % K
    d = (tl.program_id(1) // K * D_TILE + tl.arange(0, D_TILE)).to(tl.int64)[None, :]
    chunk = tl.program_id(2)
    inputs += user * inputs_stride_b
    coefficients += (user * K + k) * length
    weight += k.to(tl.int64) * weight_stride_k + d * weight_stride_d
    last = tl.minimum(length, (chunk + 1) * CHUNK)
    n = tl.arange(0, L_TILE * I_TILE)
    total = tl.zeros([U_TILE, D_TILE], tl.float32)
    for start in range(0, CHUNK, L_TILE):
        position = (chunk * CHUNK + start + n // I_TILE).to(tl.int64)
        here = (user < batch) & (position < last)[None, :]
        c = tl.load(coefficients + position[None, :], mask=here, other=0.0)
        for first in range(0, D_IN, I_TILE):
            i = (first + n % I_TILE).to(tl.int64)
            there = (position < last) & (i < D_IN)
            offsets = position * inputs_stride_l + i * inputs_stride_d
            x = tl.load(inputs + offsets[None, :], mask=(user < batch) & there[None, :], other=0.0)
            scaled = x.to(tl.float32) * c
            w = tl.load(
                weight + (position * weight_stride_l + i * weight_stride_i)[:, None],
                mask=there[:, None] & (d < D),
                other=0.0,
            )
            total += product(scaled, w, STORAGE)
    row = (chunk.to(tl.int64) * batch + user) * K + k
    tl.store(parts + row * D + d, total, mask=(user < batch) & (d < D))


@triton.jit(do_not_specialize=["batch", "length"])
def _agreement_kernel(
    inputs,
    weight,
    vectors,
    inverse_norms,
    out,
    batch,
    length,
    inputs_stride_b,
    inputs_stride_l,
    inputs_stride_d,
    weight_stride_l,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    norms_stride_b,
    norms_stride_k,
    norms_stride_l,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    U_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Products of the votes of a tile of positions with one vector of each of a tile of users."""
    STORAGE: tl.constexpr = inputs.dtype.element_ty
    tiles = tl.cdiv(batch, U_TILE)
    user = (tl.program_id(0) % tiles).to(tl.int64) * U_TILE + tl.arange(0, U_TILE)[:, None]
    first_l = tl.program_id(0) // tiles * L_TILE
    k = tl.program_id(1)
    n = tl.arange(0, L_TILE * I_TILE)
    position = (first_l + n // I_TILE).to(tl.int64)
    inputs += user * inputs_stride_b + position[None, :] * inputs_stride_l
    weight += k.to(tl.int64) * weight_stride_k + position[None, :] * weight_stride_l
    vectors += (user * K + k) * D
    agreement = tl.zeros([U_TILE, L_TILE], tl.float32)
    for first in range(0, D_IN, I_TILE):
        i = (first + n % I_TILE).to(tl.int64)[None, :]
        there = (position[None, :] < length) & (i < D_IN)
        back = tl.zeros([U_TILE, L_TILE * I_TILE], tl.float32)
        for start in range(0, D, D_TILE):
            d = start + tl.arange(0, D_TILE).to(tl.int64)
            v = tl.load(vectors + d[None, :], mask=(user < batch) & (d[None, :] < D), other=0.0)
            w = tl.load(
                weight + i * weight_stride_i + d[:, None] * weight_stride_d,
                mask=there & (d[:, None] < D),
                other=0.0,
            )
            back += product(v, w, STORAGE)
        x = tl.load(inputs + i * inputs_stride_d, mask=(user < batch) & there, other=0.0)
        agreement += tl.sum(tl.reshape(back * x.to(tl.float32), [U_TILE, L_TILE, I_TILE]), 2)
    at = (first_l + tl.arange(0, L_TILE)).to(tl.int64)[None, :]
    here = (user < batch) & (at < length)
    if inverse_norms is not None:
        offsets = user * norms_stride_b + k * norms_stride_k + at * norms_stride_l
        agreement *= tl.load(inverse_norms + offsets, mask=here, other=0.0)
    tl.store(out + (user * K + k) * length + at, agreement, mask=here)


@triton.jit
def _scaled_logits(
    logits, real, at, length, inverse_temperature,
    AXIS: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """What the softmax is taken of, and which positions count in one over the inputs."""
    logits *= inverse_temperature
    if PADDING == FILL_BEFORE:
        logits = tl.where(real, logits, PADDING_LOGIT)
    counts = real if PADDING == IGNORE else at < length
    if AXIS != CAPSULES:
        logits = tl.where(counts, logits, LOWEST)
    return logits, counts


@triton.jit(do_not_specialize=["length", "prior_stride_b", "prior_stride_k", "prior_stride_l"])
def _softmax_kernel(
    prior,
    agreement,
    mask,
    capsule_mask,
    logits,
    softmax,
    coupling,
    length,
    prior_stride_b,
    prior_stride_k,
    prior_stride_l,
    mask_stride_b,
    mask_stride_l,
    capsule_mask_stride_b,
    capsule_mask_stride_k,
    inverse_temperature,
    K: tl.constexpr,
    AXIS: tl.constexpr,
    PADDING: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
):
    """Couplings of one user from what was there before and the agreement; a tile of positions.

    A softmax over the inputs needs all tiles. It is kept apart from its coupling where there is
    room for it.
    """
    user = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_TILE)[:, None]
    row = (user * K + k) * length
    coupling += row
    if prior is not None:
        prior += user * prior_stride_b
    if agreement is not None:
        agreement += user * K * length
    if mask is not None:
        mask += user * mask_stride_b
    present = k < K
    if capsule_mask is not None:
        offsets = user * capsule_mask_stride_b + k.to(tl.int64) * capsule_mask_stride_k
        present = tl.load(capsule_mask + offsets, mask=present, other=0) != 0

    top = tl.full([K_TILE, 1], LOWEST, tl.float32)
    total = tl.zeros([K_TILE, 1], tl.float32)
    first, end = tl.program_id(1) * L_TILE, (tl.program_id(1) + 1) * L_TILE
    if AXIS != CAPSULES:
        first, end = 0, length
        for start in range(0, bound(length), L_TILE):
            at = start + tl.arange(0, L_TILE)[None, :]
            logit = load_logits(
                prior, start, prior_stride_k, prior_stride_l, length, K, K_TILE, L_TILE
            ) + load_logits(agreement, start, length, 1, length, K, K_TILE, L_TILE)
            real = load_real(mask, start, mask_stride_l, length, L_TILE)
            logit, counts = _scaled_logits(
                logit, real, at, length, inverse_temperature, AXIS, PADDING
            )
            new_top = tl.maximum(top, tl.max(logit, 1, keep_dims=True))
            share = tl.where(counts, tl.exp(logit - new_top), 0.0)
            total = total * tl.exp(top - new_top) + tl.sum(share, 1, keep_dims=True)
            top = new_top
    for start in range(bound(first), bound(end), L_TILE):
        at = start + tl.arange(0, L_TILE)[None, :]
        here = (k < K) & (at < length)
        raw = load_logits(
            prior, start, prior_stride_k, prior_stride_l, length, K, K_TILE, L_TILE
        ) + load_logits(agreement, start, length, 1, length, K, K_TILE, L_TILE)
        real = load_real(mask, start, mask_stride_l, length, L_TILE)
        logit, counts = _scaled_logits(raw, real, at, length, inverse_temperature, AXIS, PADDING)
        if AXIS == CAPSULES:
            logit = tl.where(present, logit, LOWEST)
            share = tl.where(present, tl.exp(logit - tl.max(logit, 0, keep_dims=True)), 0.0)
            sum_of_shares = tl.sum(share, 0, keep_dims=True)
            share = share / tl.where(sum_of_shares > 0, sum_of_shares, 1.0)
        else:
            share = tl.where(counts & present, tl.exp(logit - top), 0.0)
            share = share / tl.where(total > 0, total, 1.0)
        # Others may still read what was there before, in the same memory.
        tl.debug_barrier()
        if logits is not None:
            tl.store(logits + row + at, raw, mask=here)
        if softmax is not None:
            tl.store(softmax + row + at, share, mask=here)
        if PADDING != FILL_BEFORE:
            share = tl.where(real, share, 0.0)
        tl.store(coupling + at, share, mask=here)


@triton.jit(do_not_specialize=["length"])
def _softmax_backward_kernel(
    softmax,
    coupling_grad,
    logit_grad,
    mask,
    agreement,
    inverse_norms,
    radial,
    agreement_grad,
    length,
    mask_stride_b,
    mask_stride_l,
    norms_stride_b,
    norms_stride_k,
    norms_stride_l,
    inverse_temperature,
    K: tl.constexpr,
    AXIS: tl.constexpr,
    PADDING: tl.constexpr,
    UPDATE: tl.constexpr,
    AGAIN: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
):
    """Of one user: from couplings to logits, and on to the agreement that they came from.

    ``logit_grad`` holds that of the next iteration unless this is the last. ``radial`` collects
    what a normalised vote takes from its own gradient, times itself.
    """
    user = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_TILE)[:, None]
    row = (user * K + k) * length
    softmax += row
    coupling_grad += row
    logit_grad += row
    if mask is not None:
        mask += user * mask_stride_b
    top = tl.full([K_TILE, 1], LOWEST, tl.float32)
    base = tl.zeros([K_TILE, 1], tl.float32)
    mean = tl.zeros([K_TILE, 1], tl.float32)
    shares = tl.zeros([K_TILE, 1], tl.float32)
    first, end = tl.program_id(1) * L_TILE, (tl.program_id(1) + 1) * L_TILE
    if AXIS != CAPSULES:
        first, end = 0, length
        for start in range(0, bound(length), L_TILE):
            at = start + tl.arange(0, L_TILE)[None, :]
            here = (k < K) & (at < length)
            share = tl.load(softmax + at, mask=here, other=0.0)
            share_grad = tl.load(coupling_grad + at, mask=here, other=0.0)
            if AGAIN and UPDATE == COUPLING:
                share_grad += tl.load(logit_grad + at, mask=here, other=0.0)
            if PADDING == ZERO_AFTER:
                real = load_real(mask, start, mask_stride_l, length, L_TILE)
                share_grad = tl.where(real, share_grad, 0.0)
            top, base, mean, shares = largest_over_inputs(
                share, share_grad, here, top, base, mean, shares
            )
    for start in range(bound(first), bound(end), L_TILE):
        at = start + tl.arange(0, L_TILE)[None, :]
        here = (k < K) & (at < length)
        share = tl.load(softmax + at, mask=here, other=0.0)
        share_grad = tl.load(coupling_grad + at, mask=here, other=0.0)
        before = tl.load(logit_grad + at, mask=here, other=0.0) if AGAIN else 0.0
        if AGAIN and UPDATE == COUPLING:
            share_grad += before
        real = load_real(mask, start, mask_stride_l, length, L_TILE)
        if PADDING == ZERO_AFTER:
            share_grad = tl.where(real, share_grad, 0.0)
        if AXIS == CAPSULES:
            share_grad = measured_from_largest(share, share_grad, k < K)
        else:
            share_grad = share_grad - base - mean
        update_grad = share * share_grad * inverse_temperature
        if PADDING == FILL_BEFORE:
            update_grad = tl.where(real, update_grad, 0.0)
        if AGAIN and UPDATE == ACCUMULATE:
            update_grad += before
        # Others may still read what was there.
        tl.debug_barrier()
        tl.store(logit_grad + at, update_grad, mask=here)
        if agreement_grad is not None:
            if inverse_norms is not None:
                offsets = (
                    user * norms_stride_b + k * norms_stride_k + at.to(tl.int64) * norms_stride_l
                )
                inverse = tl.load(inverse_norms + offsets, mask=here, other=0.0)
                share_of_vote = tl.load(radial + row + at, mask=here, other=0.0)
                agreed = tl.load(agreement + row + at, mask=here, other=0.0)
                tl.debug_barrier()
                # Shorter votes are merely scaled.
                across = tl.where(inverse * SHORTEST_VOTE < 0.99, inverse * inverse, 0.0)
                share_of_vote += update_grad * agreed * across
                tl.store(radial + row + at, share_of_vote, mask=here)
                update_grad *= inverse
            tl.store(agreement_grad + row + at, update_grad, mask=here)


@triton.jit(do_not_specialize=["rows", "count"])
def _capsules_kernel(
    parts,
    sums,
    out,
    rows,
    count,
    eps,
    power,
    D: tl.constexpr,
    FORM: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Adds up parts, and squashes the sums or gives them their gradient."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, D_TILE)[None, :]
    at = row * D + d
    here = (row < rows) & (d < D)
    total = tl.zeros([ROWS, D_TILE], tl.float32)
    for _ in range(bound(count)):
        total += tl.load(parts + at, mask=here, other=0.0).to(tl.float32)
        parts += rows.to(tl.int64) * D
    if BACKWARD:
        x = tl.load(sums + at, mask=here, other=0.0)
        result = squash_tile_backward(total, x, FORM, eps, power)
    else:
        tl.store(sums + at, total, mask=here)
        result = squash_tile(total, FORM, eps, power)
    tl.store(out + at, result, mask=here)


@triton.jit
def _load_vote_gradients(
    coefficients, vectors, radial, inputs, weight, user, position, k, d, batch, length,
    inputs_stride_b, inputs_stride_l, inputs_stride_d, weight_stride_l, weight_stride_k,
    weight_stride_i, weight_stride_d, TERMS: tl.constexpr, K: tl.constexpr, D_IN: tl.constexpr,
    D: tl.constexpr, I_TILE: tl.constexpr,
):  # fmt: skip
    """Those of one position and capsule for a tile of users [U_TILE, D_TILE]: sums of terms."""
    STORAGE: tl.constexpr = inputs.dtype.element_ty
    here = user < batch
    row = user * K + k
    grad = tl.zeros([user.shape[0], d.shape[1]], tl.float32)
    for term in range(TERMS):
        place = term * batch.to(tl.int64) * K + row
        c = tl.load(coefficients + place * length + position, mask=here, other=0.0)
        grad += c * tl.load(vectors + place * D + d, mask=here & (d < D), other=0.0)
    if radial is not None:
        inputs += user * inputs_stride_b + position * inputs_stride_l
        weight += position * weight_stride_l + k * weight_stride_k
        votes = tl.zeros([user.shape[0], d.shape[1]], tl.float32)
        for first in range(0, D_IN, I_TILE):
            i = (first + tl.arange(0, I_TILE)).to(tl.int64)
            x = tl.load(
                inputs + i[None, :] * inputs_stride_d, mask=here & (i[None, :] < D_IN), other=0.0
            )
            w = tl.load(
                weight + i[:, None] * weight_stride_i + d * weight_stride_d,
                mask=(i[:, None] < D_IN) & (d < D),
                other=0.0,
            )
            votes += product(x, w, STORAGE)
        grad -= tl.load(radial + row * length + position, mask=here, other=0.0) * votes
    return grad


@triton.jit(do_not_specialize=["batch", "length"])
def _input_gradient_kernel(
    inputs,
    weight,
    coefficients,
    vectors,
    radial,
    inputs_grad,
    batch,
    length,
    inputs_stride_b,
    inputs_stride_l,
    inputs_stride_d,
    weight_stride_l,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    TERMS: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    U_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Of one position, for a tile of users and a tile of features."""
    STORAGE: tl.constexpr = inputs.dtype.element_ty
    tiles = tl.cdiv(batch, U_TILE)
    user = (tl.program_id(0) % tiles).to(tl.int64) * U_TILE + tl.arange(0, U_TILE)[:, None]
    position = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(1) * I_TILE + tl.arange(0, I_TILE)).to(tl.int64)[None, :]
    x_grad = tl.zeros([U_TILE, I_TILE], tl.float32)
    k = position * 0
    for _ in range(K):
        for start in range(0, D, D_TILE):
            d = (start + tl.arange(0, D_TILE)).to(tl.int64)
            grad = _load_vote_gradients(
                coefficients, vectors, radial, inputs, weight, user, position, k, d[None, :], batch,
                length, inputs_stride_b, inputs_stride_l, inputs_stride_d, weight_stride_l,
                weight_stride_k, weight_stride_i, weight_stride_d, TERMS, K, D_IN, D, I_TILE,
            )  # fmt: skip
            transposed = tl.load(
                weight
                + (position * weight_stride_l + k * weight_stride_k)
                + i * weight_stride_i
                + d[:, None] * weight_stride_d,
                mask=(i < D_IN) & (d[:, None] < D),
                other=0.0,
            )
            x_grad += product(grad, transposed, STORAGE)
        k += 1
    out = inputs_grad + (user * length + position) * D_IN + i
    tl.store(out, x_grad, mask=(user < batch) & (i < D_IN))


@triton.jit(do_not_specialize=["batch", "length"])
def _weight_gradient_kernel(
    inputs,
    weight,
    coefficients,
    vectors,
    radial,
    weight_grad,
    batch,
    length,
    inputs_stride_b,
    inputs_stride_l,
    inputs_stride_d,
    weight_stride_l,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    TERMS: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    U_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """A tile of the matrix of one position and capsule: users in one order."""
    STORAGE: tl.constexpr = inputs.dtype.element_ty
    position, k = tl.program_id(0).to(tl.int64) // K, tl.program_id(0).to(tl.int64) % K
    i = (tl.program_id(1) * I_TILE + tl.arange(0, I_TILE)).to(tl.int64)[None, :]
    d = (tl.program_id(2) * D_TILE + tl.arange(0, D_TILE)).to(tl.int64)[None, :]
    total = tl.zeros([I_TILE, D_TILE], tl.float32)
    for first in range(0, bound(batch), U_TILE):
        user = (first + tl.arange(0, U_TILE)).to(tl.int64)[:, None]
        grad = _load_vote_gradients(
            coefficients, vectors, radial, inputs, weight, user, position, k, d, batch, length,
            inputs_stride_b, inputs_stride_l, inputs_stride_d, weight_stride_l, weight_stride_k,
            weight_stride_i, weight_stride_d, TERMS, K, D_IN, D, I_TILE,
        )  # fmt: skip
        x = tl.load(
            inputs + user * inputs_stride_b + position * inputs_stride_l + i * inputs_stride_d,
            mask=(user < batch) & (i < D_IN),
            other=0.0,
        )
        total += product(tl.trans(x), grad, STORAGE)
    i = tl.trans(i)
    out = weight_grad + (tl.program_id(0).to(tl.int64) * D_IN + i) * D + d
    tl.store(out, total, mask=(i < D_IN) & (d < D))


class PositionRouting:
    """A call: its tensors, its options, and the launches that both directions are made of."""

    def __init__(
        self,
        inputs: Tensor,
        weight: Tensor,
        logits: Tensor | None,
        mask: Tensor | None,
        capsule_mask: Tensor | None,
        num_capsules: int,
        options: RoutingOptions,
    ) -> None:
        self.inputs, self.logits, self.mask, self.capsule_mask = inputs, logits, mask, capsule_mask
        self.batch, self.length, self.d_in = inputs.shape
        self.k, self.d = num_capsules, weight.shape[-1]
        self.given = weight
        if weight.dim() == 3:
            weight = weight[None]
        self.weight = weight.expand(self.length, self.k, self.d_in, self.d)
        self.options = options
        self.norms = None
        if options.normalize:
            by_position = inverse_norms_of(inputs.transpose(0, 1), self.weight)
            self.norms = by_position.permute(2, 1, 0)
        self.strides = (*inputs.stride(), *self.weight.stride())
        self.users = min(padded(self.batch, 16), _MOST_USERS)
        # Products in float32 hold whole operands in registers.
        self.widest = 32 if inputs.dtype is torch.float32 else 64
        i_tile = min(padded(self.d_in), self.widest)
        self.columns = {"L_TILE": self.widest // i_tile, "I_TILE": i_tile}
        k_tile = padded(self.k)
        self.tile = {"K_TILE": k_tile, "L_TILE": min(padded(self.length), max(16, 1024 // k_tile))}
        over_capsules = triton.cdiv(self.length, self.tile["L_TILE"])
        at_once = options.softmax_over == CAPSULES.value
        self.softmax_grid = (self.batch, over_capsules if at_once else 1)

    def _empty(self, *shape: int) -> Tensor:
        return self.inputs.new_empty(shape, dtype=torch.float32)

    def _per_vote(self, *places: int) -> Tensor:
        return self._empty(*places, self.batch, self.k, self.length)

    def _per_capsule(self, *places: int) -> Tensor:
        return self._empty(*places, self.batch, self.k, self.d)

    def _norm_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.norms is None else self.norms.stride()

    def _weighted_sums(self, coefficients: Tensor) -> Tensor:
        """Parts of the votes' sums ``[P, B, K, D]``."""
        chunks = triton.cdiv(self.length, _CHUNK)
        parts = self._per_capsule(chunks)
        d_tile = min(padded(self.d, 16), self.widest)
        launch(
            _weighted_sums_kernel,
            (
                triton.cdiv(self.batch, self.users),
                self.k * triton.cdiv(self.d, d_tile),
                chunks,
            ),
            self.inputs,
            self.weight,
            coefficients,
            parts,
            self.batch,
            self.length,
            *self.strides,
            K=self.k,
            D_IN=self.d_in,
            D=self.d,
            CHUNK=_CHUNK,
            U_TILE=self.users,
            **self.columns,
            D_TILE=d_tile,
            num_warps=4,
            maxnreg=MOST_REGISTERS,
        )
        return parts

    def _agreement(self, vectors: Tensor, out: Tensor, norms: Tensor | None) -> None:
        launch(
            _agreement_kernel,
            (
                triton.cdiv(self.batch, self.users)
                * triton.cdiv(self.length, self.columns["L_TILE"]),
                self.k,
            ),
            self.inputs,
            self.weight,
            vectors,
            norms,
            out,
            self.batch,
            self.length,
            *self.strides,
            *self._norm_strides(),
            K=self.k,
            D_IN=self.d_in,
            D=self.d,
            U_TILE=self.users,
            **self.columns,
            D_TILE=min(padded(self.d, 16), 32),
            num_warps=4,
            maxnreg=MOST_REGISTERS,
        )

    def _softmax(
        self,
        prior: Tensor | None,
        agreement: Tensor | None,
        logits: Tensor | None,
        softmax: Tensor | None,
        coupling: Tensor,
    ) -> None:
        launch(
            _softmax_kernel,
            self.softmax_grid,
            prior,
            agreement,
            self.mask,
            self.capsule_mask,
            logits,
            softmax,
            coupling,
            self.length,
            *strides_of(prior, 3),
            *mask_strides(self.mask),
            *strides_of(self.capsule_mask, 2),
            self.options.inverse_temperature,
            K=self.k,
            AXIS=self.options.softmax_over,
            PADDING=self.options.padding,
            **self.tile,
            num_warps=4,
        )

    def _capsules(
        self, parts: Tensor, sums: Tensor, out: Tensor, form: int, backward: bool = False
    ) -> None:
        """Squashed sums, or in backward the gradient of the sums."""
        d_tile = padded(self.d)
        rows = max(1, 1024 // d_tile)
        launch(
            _capsules_kernel,
            (triton.cdiv(self.batch * self.k, rows),),
            parts,
            sums,
            out,
            self.batch * self.k,
            parts.shape[0],
            self.options.eps,
            self.options.power,
            D=self.d,
            FORM=form,
            BACKWARD=backward,
            ROWS=rows,
            D_TILE=d_tile,
            num_warps=4,
        )

    def _iterate(
        self,
        couplings: list[Tensor],
        softmaxes: list[Tensor] | None,
        capsules: list[Tensor],
        agreements: list[Tensor],
        sums: list[Tensor],
        out: Tensor | None,
    ) -> None:
        """All iterations; what they leave behind comes in a list with a place for each."""
        options, logits = self.options, None
        prior, agreement = self.logits, None
        if options.update == ACCUMULATE.value and options.iterations > 1:
            logits = self._per_vote()
        for step in range(options.iterations):
            is_last = step + 1 == options.iterations
            self._softmax(
                prior,
                agreement,
                None if is_last else logits,
                None if softmaxes is None else softmaxes[step],
                couplings[step],
            )
            parts = self._weighted_sums(couplings[step])
            if is_last:
                to = self._per_capsule() if out is None else out
                self._capsules(parts, sums[step], to, options.final_squash)
                return
            self._capsules(parts, sums[step], capsules[step], options.inner_squash)
            agreement = agreements[step]
            self._agreement(capsules[step], agreement, self.norms)
            prior = couplings[step] if options.update == COUPLING.value else logits

    def forward(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """Capsules, the last coupling and the last sums."""
        coupling, sums = self._per_vote(), self._per_capsule()
        out = torch.empty_like(sums, dtype=dtype or self.inputs.dtype)
        steps = self.options.iterations
        self._iterate(
            [coupling] * steps,
            None,
            [self._per_capsule()] * steps,
            [self._per_vote()] * steps,
            [sums] * steps,
            out,
        )
        return out, coupling, sums

    def last_backward(
        self, grad: Tensor, coupling: Tensor, sums: Tensor, needs: int
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of inputs and weight through the last sums."""
        sum_grad = self._per_capsule()
        self._capsules(
            grad.contiguous()[None], sums, sum_grad, self.options.final_squash, backward=True
        )
        inputs_grad, weight_grad = self._gradients(coupling[None], sum_grad[None], None, needs)
        return inputs_grad, weight_grad, None

    def full_backward(
        self, grad: Tensor, needs: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of inputs, weight and logits through all iterations, which run again."""
        options = self.options
        steps, terms = options.iterations, 2 * options.iterations - 1
        wants_logits = self.logits is not None and bool(needs & 4)
        coefficients, vectors = self._per_vote(terms), self._per_capsule(terms)
        sums = self._per_capsule(steps)
        over_inputs = options.softmax_over != CAPSULES.value
        masks = over_inputs and options.padding == ZERO_AFTER.value and self.mask is not None
        softmaxes = self._per_vote(steps) if masks else coefficients[:steps]
        agreements = self._per_vote(max(1, steps - 1) if self.norms is not None else 1)
        agreements = agreements.expand(steps, -1, -1, -1) if len(agreements) == 1 else agreements
        self._iterate(
            list(coefficients[:steps]),
            list(softmaxes) if masks else None,
            list(vectors[steps:]),
            list(agreements),
            list(sums),
            None,
        )
        radial = None if self.norms is None else torch.zeros_like(coefficients[0])
        coupling_grad, logit_grad = self._per_vote(), self._per_vote()
        self._capsules(
            grad.contiguous()[None],
            sums[-1],
            vectors[steps - 1],
            options.final_squash,
            backward=True,
        )
        for step in range(steps - 1, -1 if wants_logits else 0, -1):
            self._agreement(vectors[step], coupling_grad, None)
            launch(
                _softmax_backward_kernel,
                self.softmax_grid,
                softmaxes[step],
                coupling_grad,
                logit_grad,
                self.mask,
                agreements[step - 1],
                self.norms,
                radial,
                coefficients[steps + step - 1] if step else None,
                self.length,
                *mask_strides(self.mask),
                *self._norm_strides(),
                options.inverse_temperature,
                K=self.k,
                AXIS=options.softmax_over,
                PADDING=options.padding,
                UPDATE=options.update,
                AGAIN=step + 1 < steps,
                **self.tile,
                num_warps=4,
            )
            if step:
                parts = self._weighted_sums(coefficients[steps + step - 1])
                self._capsules(
                    parts,
                    sums[step - 1],
                    vectors[step - 1],
                    options.inner_squash,
                    backward=True,
                )
        inputs_grad, weight_grad = self._gradients(coefficients, vectors, radial, needs)
        logits_grad = None
        if wants_logits:
            assert self.logits is not None
            logits_grad = gradient_of_logits(logit_grad, self.logits)
        return inputs_grad, weight_grad, logits_grad

    def _gradients(
        self, coefficients: Tensor, vectors: Tensor, radial: Tensor | None, needs: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the inputs and the weight, from the terms of the votes' gradients."""
        i_tile, d_tile = (min(padded(size, 16), self.widest) for size in (self.d_in, self.d))
        i_tiles, d_tiles = triton.cdiv(self.d_in, i_tile), triton.cdiv(self.d, d_tile)
        tensors = self.inputs, self.weight, coefficients.contiguous(), vectors, radial
        numbers = self.batch, self.length, *self.strides
        constants = {
            "TERMS": len(coefficients),
            "K": self.k,
            "D_IN": self.d_in,
            "D": self.d,
            "U_TILE": self.users,
            "I_TILE": i_tile,
            "D_TILE": d_tile,
            "num_warps": 4,
            "maxnreg": MOST_REGISTERS,
        }
        inputs_grad = weight_grad = None
        if needs & 1:
            inputs_grad = self.inputs.new_empty(self.inputs.shape)
            grid = triton.cdiv(self.batch, self.users) * self.length, i_tiles
            launch(_input_gradient_kernel, grid, *tensors, inputs_grad, *numbers, **constants)
        if needs & 2:
            every = self._empty(self.length, self.k, self.d_in, self.d)
            grid = self.length * self.k, i_tiles, d_tiles
            launch(_weight_gradient_kernel, grid, *tensors, every, *numbers, **constants)
            weight_grad = every
            if self.given.dim() < 4:
                weight_grad = self._empty(*self.given.shape)
                add_parts(every.view(-1, weight_grad.numel()), [weight_grad])
            weight_grad = weight_grad.to(self.given.dtype)
        return inputs_grad, weight_grad
