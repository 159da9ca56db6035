"""The gradient of dynamic routing through all iterations: one program walks one user back.

The gradient of a vote is a sum of 2 R - 1 terms, each a coefficient of its input times a vector of
its capsule: of the weighted sum of iteration t, at place t, the coupling and the gradient of the
sum; of the agreement after it, at place R + t, the gradient of the agreement and the capsule. Votes
never appear: a term gives the inputs its coefficient times its vector as seen from the input space,
and the weight the outer product of the inputs, summed with the coefficients, and the vector.

The forward pass is run again and leaves its couplings and weighted sums at their places. The walk
back fills the others, a pass over tiles of inputs per iteration (two for a softmax over the inputs,
whose gradient needs a sum over them first); then every input adds up its terms, and so does the
weight. That is 4 R K L D_in multiply-adds a user on top of the forward pass, and (2 R - 1) K
(L + 2 D_in + D) numbers of memory.
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
    LOWEST,
    SHORTEST_VOTE,
    ZERO_AFTER,
    RoutingOptions,
    history_of,
    input_strides,
    largest_over_inputs,
    load_inputs,
    load_inverse_norms,
    load_real,
    mask_strides,
    measured_from_largest,
    strides_of,
    tiles_of,
    times_weight,
    times_weight_transposed,
    usual_length,
    votes_of,
)
from ._tiles import bound, padded, product
from .squash import squash_factor, squash_slope
from .weight_gradients import add_parts, outer_sums

_TILE_TERMS = 16
_USERS_OF_A_PART = 32


@triton.jit
def _products_with_inputs(vectors, x, OWN_VOTES: tl.constexpr, STORAGE: tl.constexpr):
    """Of the vectors [K_TILE, I_TILE] with a tile of inputs, [K_TILE, L_TILE]."""
    if OWN_VOTES:
        products = tl.sum(vectors[:, None, :] * x.to(tl.float32), 2)
    else:
        products = product(vectors, tl.trans(x), STORAGE)
    return products


@triton.jit
def _sums_and_gradient(
    total,
    back_grad,
    grad,
    weight,
    start,
    grad_stride_d,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    AGAIN: tl.constexpr,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Elements ``start ..`` of the capsules before the squash, and of the gradient after it."""
    sums = times_weight(
        total, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
        WEIGHT, K, D_IN, D, D_TILE,
    )  # fmt: skip
    if AGAIN:
        after = times_weight(
            back_grad, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
            WEIGHT, K, D_IN, D, D_TILE,
        )  # fmt: skip
    else:
        k = tl.arange(0, total.shape[0])[:, None]
        d = start + tl.arange(0, D_TILE)[None, :]
        after = tl.load(grad + d * grad_stride_d, mask=(k < K) & (d < D), other=0.0)
        after = after.to(tl.float32)
    return sums, after


@triton.jit(do_not_specialize=["rows", "iterations"])
def _walk_back_kernel(
    grad,
    inputs,
    weight,
    offsets,
    mask,
    coefficients,
    pooled,
    vectors,
    seen,
    coupling_grad,
    logit_grad,
    rows,
    iterations,
    grad_stride_b,
    grad_stride_k,
    grad_stride_d,
    inputs_stride_b,
    inputs_stride_k,
    inputs_stride_l,
    inputs_stride_d,
    weight_stride_k,
    weight_stride_i,
    weight_stride_d,
    mask_stride_b,
    mask_stride_l,
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
    WANTS_LOGITS: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    STORAGE: tl.constexpr = inputs.dtype.element_ty
    # The softmax over the inputs is there before the mask, its coupling takes its place.
    MASKS: tl.constexpr = AXIS != CAPSULES and PADDING == ZERO_AFTER and mask is not None
    user = tl.program_id(0).to(tl.int64)
    owner, first_row, length = history_of(offsets, user, tl.num_programs(0), rows)
    rows = rows.to(tl.int64)
    k = tl.arange(0, K_TILE)[:, None]
    i = tl.arange(0, I_TILE)[None, :]
    inputs += owner * inputs_stride_b + first_row * inputs_stride_l
    if mask is not None:
        mask += user * mask_stride_b
    grad += user * grad_stride_b + k.to(tl.int64) * grad_stride_k
    last_place = 2 * iterations - 2
    place = owner * (last_place + 1) + iterations - 1
    coefficients += (place * K + k) * rows + first_row
    row = (user * (last_place + 1) + iterations - 1) * K + k
    pooled += row * D_IN + i
    seen += row * D_IN + i
    if vectors is not None:
        vectors += row * D
    coupling_grad += (owner * K + k) * rows + first_row
    logit_grad += (owner * K + k) * rows + first_row
    in_sum = (k < K) & (i < D_IN)

    back_grad = tl.zeros([K_TILE, I_TILE], tl.float32)
    # The last weighted sum gets its gradient from the capsules, the others from an agreement.
    for AGAIN in tl.static_range(2):
        for turn in range(bound(iterations) - 1 if AGAIN else 1):
            step = iterations - 1 - turn - AGAIN
            if AGAIN:
                coefficients -= K * rows
                pooled -= K * D_IN
                seen -= K * D_IN
                if vectors is not None:
                    vectors -= K * D
            # What belongs to the agreement after this weighted sum is ``iterations`` places on.
            total = tl.load(pooled, mask=in_sum, other=0.0)
            norm2 = tl.zeros([K_TILE, 1], tl.float32)
            dot = tl.zeros([K_TILE, 1], tl.float32)
            for start in range(0, D, D_TILE):
                c, g = _sums_and_gradient(
                    total, back_grad, grad, weight, start, grad_stride_d, weight_stride_k,
                    weight_stride_i, weight_stride_d, AGAIN, WEIGHT, K, D_IN, D, D_TILE,
                )  # fmt: skip
                norm2 += tl.sum(c * c, 1, keep_dims=True)
                dot += tl.sum(c * g, 1, keep_dims=True)
            factor, radial = squash_factor(norm2, INNER if AGAIN else FINAL, eps, power)
            slope = squash_slope(dot, norm2, radial)
            sum_seen = tl.zeros([K_TILE, I_TILE], tl.float32)
            back = tl.zeros([K_TILE, I_TILE], tl.float32)
            for start in range(0, D, D_TILE):
                d = start + tl.arange(0, D_TILE)[None, :]
                here = (k < K) & (d < D)
                c, g = _sums_and_gradient(
                    total, back_grad, grad, weight, start, grad_stride_d, weight_stride_k,
                    weight_stride_i, weight_stride_d, AGAIN, WEIGHT, K, D_IN, D, D_TILE,
                )  # fmt: skip
                if AGAIN:
                    capsule = factor * c
                    back += times_weight_transposed(
                        capsule, weight, start, weight_stride_k, weight_stride_i,
                        weight_stride_d, WEIGHT, K, D_IN, D, I_TILE,
                    )  # fmt: skip
                    if vectors is not None:
                        tl.store(vectors + iterations * K * D + d, capsule, mask=here)
                g = factor * g + slope * c
                if vectors is not None:
                    tl.store(vectors + d, g, mask=here)
                sum_seen += times_weight_transposed(
                    g, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
                    WEIGHT, K, D_IN, D, I_TILE,
                )  # fmt: skip
            tl.store(seen, sum_seen, mask=in_sum)
            if AGAIN:
                tl.store(seen + iterations * K * D_IN, back, mask=in_sum)
                tl.store(pooled + iterations * K * D_IN, back_grad, mask=in_sum)

            end = length if WANTS_LOGITS or MASKS else tl.where(step > 0, length, 0)
            top = tl.full([K_TILE, 1], LOWEST, tl.float32)
            base = tl.zeros([K_TILE, 1], tl.float32)
            mean = tl.zeros([K_TILE, 1], tl.float32)
            shares = tl.zeros([K_TILE, 1], tl.float32)
            if AXIS != CAPSULES:
                for start in range(0, bound(end), L_TILE):
                    at = start + tl.arange(0, L_TILE)[None, :]
                    here = (k < K) & (at < length)
                    x = load_inputs(
                        inputs, start, inputs_stride_k, inputs_stride_l, inputs_stride_d, length,
                        OWN_VOTES, K, D_IN, K_TILE, L_TILE, I_TILE,
                    )  # fmt: skip
                    share = tl.load(coefficients + at, mask=here, other=0.0)
                    share_grad = _products_with_inputs(sum_seen, x, OWN_VOTES, STORAGE)
                    if AGAIN and UPDATE == COUPLING:
                        share_grad += tl.load(logit_grad + at, mask=here, other=0.0)
                    if MASKS:
                        real = load_real(mask, start, mask_stride_l, length, L_TILE)
                        share_grad = tl.where(real, share_grad, 0.0)
                    tl.store(coupling_grad + at, share_grad, mask=here)
                    top, base, mean, shares = largest_over_inputs(
                        share, share_grad, here, top, base, mean, shares
                    )
                tl.debug_barrier()
            back_grad = tl.zeros([K_TILE, I_TILE], tl.float32)
            for start in range(0, bound(end), L_TILE):
                at = start + tl.arange(0, L_TILE)[None, :]
                here = (k < K) & (at < length)
                x = load_inputs(
                    inputs, start, inputs_stride_k, inputs_stride_l, inputs_stride_d, length,
                    OWN_VOTES, K, D_IN, K_TILE, L_TILE, I_TILE,
                )  # fmt: skip
                share = tl.load(coefficients + at, mask=here, other=0.0)
                before = tl.load(logit_grad + at, mask=here, other=0.0) if AGAIN else 0.0
                if AXIS == CAPSULES:
                    share_grad = _products_with_inputs(sum_seen, x, OWN_VOTES, STORAGE)
                    if AGAIN and UPDATE == COUPLING:
                        share_grad += before
                    share_grad = measured_from_largest(share, share_grad, k < K)
                else:
                    share_grad = tl.load(coupling_grad + at, mask=here, other=0.0) - base - mean
                update_grad = share * share_grad * inverse_temperature
                real = load_real(mask, start, mask_stride_l, length, L_TILE)
                if PADDING == FILL_BEFORE:
                    update_grad = tl.where(real, update_grad, 0.0)
                if AGAIN and UPDATE == ACCUMULATE:
                    update_grad += before
                # Others may still read what was there.
                tl.debug_barrier()
                if MASKS:
                    tl.store(coefficients + at, tl.where(real, share, 0.0), mask=here)
                tl.store(logit_grad + at, update_grad, mask=here)
                if NORMALIZE:
                    update_grad *= load_inverse_norms(
                        None, x, start, rows, length, OWN_VOTES, WEIGHT, K, K_TILE, L_TILE
                    )
                tl.store(
                    coefficients + (iterations - 1) * K * rows + at,
                    update_grad,
                    mask=here & (step > 0),
                )
                if OWN_VOTES:
                    back_grad += tl.sum(update_grad[:, :, None] * x.to(tl.float32), 1)
                else:
                    back_grad += product(update_grad, x, STORAGE)
            tl.debug_barrier()


@triton.jit
def _sum_of_terms(
    coefficients, vectors, first, last, stride, at, rows, length, i,
    D_IN: tl.constexpr, STORAGE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Of the terms ``first .. last``, which are ``stride`` rows apart: [L_TILE, I_TILE]."""
    total = tl.zeros([at.shape[1], i.shape[1]], tl.float32)
    for start in range(bound(first), bound(last), TERMS):
        term = start + tl.arange(0, TERMS)[:, None]
        row = term.to(tl.int64) * stride
        c = tl.load(coefficients + row * rows + at, mask=(term < last) & (at < length), other=0.0)
        v = tl.load(vectors + row * D_IN + i, mask=(term < last) & (i < D_IN), other=0.0)
        total += product(tl.trans(c), v, STORAGE)
    return total


@triton.jit
def _store_input_gradients(
    inputs, inputs_grad, coefficients, seen, start, rows, length, iterations, stride_l, stride_d,
    OWN_VOTES: tl.constexpr, K: tl.constexpr, D_IN: tl.constexpr, NORMALIZE: tl.constexpr,
    L_TILE: tl.constexpr, I_TILE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """A tile of one user's inputs, or of one capsule's votes, adds up its terms."""
    STORAGE: tl.constexpr = inputs.dtype.element_ty
    STRIDE: tl.constexpr = K if OWN_VOTES else 1
    ROWS: tl.constexpr = 1 if OWN_VOTES else K
    at = start + tl.arange(0, L_TILE)[None, :]
    i = tl.arange(0, I_TILE)[None, :]
    sums, terms = iterations * ROWS, (2 * iterations - 1) * ROWS
    x_grad = _sum_of_terms(
        coefficients, seen, 0, sums if NORMALIZE else terms, STRIDE, at, rows, length, i,
        D_IN, STORAGE, TERMS,
    )  # fmt: skip
    position = tl.trans(at).to(tl.int64)
    here = (position < length) & (i < D_IN)
    if NORMALIZE:
        of_agreements = _sum_of_terms(
            coefficients, seen, sums, terms, STRIDE, at, rows, length, i, D_IN, STORAGE, TERMS
        )
        x_offsets = position * stride_l + i.to(tl.int64) * stride_d
        x = tl.load(inputs + x_offsets, mask=here, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(x * x, 1, keep_dims=True))
        # Only what is across a normalised vote moves it. Shorter ones are merely scaled.
        x = tl.where(norm > SHORTEST_VOTE, x / tl.where(norm > 0, norm, 1.0), 0.0)
        x_grad += of_agreements - tl.sum(of_agreements * x, 1, keep_dims=True) * x
    tl.store(inputs_grad + position * D_IN + i, x_grad, mask=here)


@triton.jit(do_not_specialize=["rows", "iterations"])
def _input_gradient_kernel(
    inputs,
    inputs_grad,
    offsets,
    coefficients,
    seen,
    rows,
    iterations,
    inputs_stride_b,
    inputs_stride_k,
    inputs_stride_l,
    inputs_stride_d,
    OWN_VOTES: tl.constexpr,
    K: tl.constexpr,
    D_IN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    L_TILE: tl.constexpr,
    I_TILE: tl.constexpr,
    TERMS: tl.constexpr,
):
    """One tile, or of a history whose length the host does not know every so many."""
    STRIDE: tl.constexpr = K if OWN_VOTES else 1
    program = tl.program_id(0).to(tl.int64)
    user = program // STRIDE
    own = program % STRIDE
    owner, first_row, length = history_of(offsets, user, tl.num_programs(0) // STRIDE, rows)
    coefficients += (owner * (2 * iterations - 1) * K + own) * rows + first_row
    seen += (user * (2 * iterations - 1) * K + own) * D_IN
    inputs += owner * inputs_stride_b + own * inputs_stride_k + first_row * inputs_stride_l
    inputs_grad += ((owner * STRIDE + own) * rows + first_row) * D_IN
    first = tl.program_id(1) * L_TILE
    if offsets is None:
        _store_input_gradients(
            inputs, inputs_grad, coefficients, seen, first, rows, length, iterations,
            inputs_stride_l, inputs_stride_d, OWN_VOTES, K, D_IN, NORMALIZE, L_TILE, I_TILE, TERMS,
        )  # fmt: skip
    else:
        for start in range(bound(first), bound(length), bound(tl.num_programs(1) * L_TILE)):
            _store_input_gradients(
                inputs, inputs_grad, coefficients, seen, start, rows, length, iterations,
                inputs_stride_l, inputs_stride_d, OWN_VOTES, K, D_IN, NORMALIZE, L_TILE, I_TILE,
                TERMS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "length", "batch", "users"])
def _logit_gradient_kernel(
    logit_grad,
    offsets,
    parts,
    rows,
    length,
    batch,
    users,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
):
    """A tile of positions [K, L] adds up the gradients of some histories, one after another."""
    part = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_TILE)[:, None]
    at = tl.program_id(1) * L_TILE + tl.arange(0, L_TILE)[None, :]
    total = tl.zeros([K_TILE, L_TILE], tl.float32)
    for user in range(bound(part * users), bound(tl.minimum((part + 1) * users, batch))):
        _, first_row, own_length = history_of(offsets, user, batch, rows)
        here = (k < K) & (at < own_length)
        total += tl.load(logit_grad + k * rows.to(tl.int64) + first_row + at, mask=here, other=0.0)
    tl.store(parts + (part * K + k) * length + at, total, mask=(k < K) & (at < length))


def gradient_of_logits(logit_grad: Tensor, logits: Tensor, offsets: Tensor | None = None) -> Tensor:
    """From that of every user [B,K,L] or value [K,T], summed where users share their logits."""
    if offsets is not None and logits.dim() == 3:
        batch, (shown, k, length) = offsets.shape[0] - 1, logits.shape
        users = 1 if shown == batch else _USERS_OF_A_PART
        parts = logit_grad.new_empty(triton.cdiv(batch, users), k, length)
        l_tile = min(padded(length), 64)
        launch(
            _logit_gradient_kernel,
            (parts.shape[0], triton.cdiv(length, l_tile)),
            logit_grad,
            offsets,
            parts,
            logit_grad.shape[1],
            length,
            batch,
            users,
            K=k,
            K_TILE=padded(k),
            L_TILE=l_tile,
            num_warps=1,
        )
        logit_grad = parts
        if shown != batch:
            logit_grad = parts.new_empty(k, length)
            add_parts(parts.view(-1, k * length), [logit_grad])
    elif logits.dim() == 3 and logits.shape[0] != logit_grad.shape[0]:
        (logit_grad,) = outer_sums([(None, logit_grad.flatten(1)[:, None])])
    return logit_grad.view(logits.shape).to(logits.dtype)


def full_gradient_of(
    grad: Tensor,
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    offsets: Tensor | None,
    mask: Tensor | None,
    coefficients: Tensor,
    pooled: Tensor,
    options: RoutingOptions,
    needs: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of inputs, weight and logits from the trace of the forward pass.

    ``coefficients`` ``[B, 2R-1, K, L]`` and ``pooled`` ``[B, 2R-1, K, D_in]`` hold the softmax and
    the weighted sums of the R iterations at their first places. Coefficients of jagged inputs are
    ``[2R-1, K, T]``, those of a single user who has all positions.
    """
    batch, places, k, d_in = pooled.shape
    rows, d = coefficients.shape[-1], grad.shape[-1]
    wants_weight = weight is not None and bool(needs & 2)
    wants_logits = logits is not None and bool(needs & 4)
    vectors = pooled.new_empty(batch, places, k, d) if wants_weight else None
    seen = torch.empty_like(pooled)
    logit_grad = coefficients.new_empty(*coefficients.shape[:-3], k, rows)
    kind = votes_of(inputs, weight)
    tiles = tiles_of(k, usual_length(rows, offsets), d_in, weight, kind["OWN_VOTES"])
    if offsets is not None and inputs.dtype is torch.float32:
        # Where a history starts takes registers, of which float32 products leave none.
        tiles["L_TILE"] = min(32, tiles["L_TILE"])
    launch(
        _walk_back_kernel,
        (batch,),
        grad,
        inputs,
        weight,
        offsets,
        mask,
        coefficients,
        pooled,
        vectors,
        seen,
        torch.empty_like(logit_grad),
        logit_grad,
        rows,
        options.iterations,
        *grad.stride(),
        *input_strides(inputs),
        *strides_of(weight, 3),
        *mask_strides(mask),
        *options.numbers(),
        **kind,
        K=k,
        D_IN=d_in,
        D=d,
        **options.constants(),
        WANTS_LOGITS=wants_logits,
        **tiles,
    )
    inputs_grad = weight_grad = logits_grad = None
    if needs & 1:
        inputs_grad = inputs.new_empty(inputs.shape)
        i_tile = padded(d_in, 16)
        usual = usual_length(rows, offsets)
        l_tile = min(padded(usual, 16), max(16, 2048 // i_tile))
        launch(
            _input_gradient_kernel,
            (batch * (k if kind["OWN_VOTES"] else 1), triton.cdiv(usual, l_tile)),
            inputs,
            inputs_grad,
            offsets,
            coefficients,
            seen,
            rows,
            options.iterations,
            *input_strides(inputs),
            OWN_VOTES=kind["OWN_VOTES"],
            K=k,
            D_IN=d_in,
            NORMALIZE=options.normalize,
            L_TILE=l_tile,
            I_TILE=i_tile,
            TERMS=_TILE_TERMS,
            num_warps=min(8, max(1, l_tile * i_tile // 512)),
            # In the loop over tiles, a pipeline of terms would take all registers.
            num_stages=3 if offsets is None else 1,
            maxnreg=MOST_REGISTERS,
        )
    if wants_weight:
        groups = (batch * places, k) if weight.dim() == 3 else (batch * places * k, 1)
        (weight_grad,) = outer_sums([(pooled.view(*groups, d_in), vectors.view(*groups, d))])
        weight_grad = weight_grad.view(weight.shape).to(weight.dtype)
    if wants_logits:
        logits_grad = gradient_of_logits(logit_grad, logits, offsets)
    return inputs_grad, weight_grad, logits_grad
