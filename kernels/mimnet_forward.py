"""The whole second stage of MIMNet: at small widths one program takes a user from ids to rating.

Nothing of a user leaves the chip between the parts, and launches are the time at these sizes:
forward is one, backward two. All arithmetic is in float32, whatever the tensors hold.

    gather -> routing, all iterations -> T = sum_s source_s w2_s -> hidden T + shift -> two heads

Backward starts from the weighted sums and the transferred interests that forward saved, and routes
again only for the gradient of the history. A user's share in every gradient of a parameter is a
row, or a factor of one: the interests are summed up here, and `outer_sums` sums up the users.

Larger widths fill the device with one part, so the launchers of the parts follow one another there,
with float32 between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._routing import (
    CAPSULES,
    FILL_BEFORE,
    SHARED,
    history_of,
    load_logits,
    load_real,
    logit_strides,
    mask_strides,
    offsets_or_mask,
    times_weight,
    usual_length,
)
from ._tiles import bound, padded, product
from .dynamic_routing import dynamic_routing, dynamic_routing_backward
from .interest_bridge import interest_bridge, interest_bridge_backward
from .multi_granularity_attention import (
    attend,
    attend_backward,
    fusion_products,
    load_vector,
    multi_granularity_attention,
    multi_granularity_attention_backward,
    parameter_gradients,
    projected,
    shares,
    store_rows,
)
from .squash import SQRT_EPS, squash_factor, squash_slope
from .target_attention import (
    interests_gradient,
    load_rows,
    times_weight_transposed,
    weighted_sum,
)

_EPS = tl.constexpr(1e-8)
_PADDING_LOGIT = tl.constexpr(-1e9)
_LOWEST = tl.constexpr(-3e38)

_WIDEST = 32
_TILE_ELEMENTS = 2048
_LONGEST_TILE = 32


@triton.jit
def _table_rows(
    table, ids, here, rows, stride_n, stride_d, D: tl.constexpr, D_TILE: tl.constexpr
):  # fmt: skip
    """Rows of the table in float32; NaN where it has none, because nothing can be raised here."""
    d = tl.arange(0, D_TILE)[None, :]
    known = (ids >= 0) & (ids < rows)
    offsets = ids.to(tl.int64) * stride_n + d.to(tl.int64) * stride_d
    x = tl.load(table + offsets, mask=here & known & (d < D), other=0.0).to(tl.float32)
    return tl.where(here & ~known, float("nan"), x)


@triton.jit
def _load_history(
    history, table, start, length, table_size, stride_l, stride_d, table_stride_n,
    table_stride_d, D: tl.constexpr, L_TILE: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """A tile of an embedded history [L_TILE, D_TILE] in float32, gathered where it holds ids."""
    at = start + tl.arange(0, L_TILE)[:, None]
    here = at < length
    history += at.to(tl.int64) * stride_l
    if table is None:
        x = load_rows(history, here, stride_d, D, D_TILE)
    else:
        ids = tl.load(history, mask=here, other=0)
        x = _table_rows(table, ids, here, table_size, table_stride_n, table_stride_d, D, D_TILE)
    return x


@triton.jit
def _load_matrix(matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_TILE: tl.constexpr,
                 COLUMN_TILE: tl.constexpr):  # fmt: skip
    """A contiguous matrix in float32."""
    row = tl.arange(0, ROW_TILE)[:, None]
    column = tl.arange(0, COLUMN_TILE)[None, :]
    here = (row < ROWS) & (column < COLUMNS)
    return tl.load(matrix + row * COLUMNS + column, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _store_matrix(matrix, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, value.shape[0])[:, None]
    column = tl.arange(0, value.shape[1])[None, :]
    here = (row < ROWS) & (column < COLUMNS)
    tl.store(matrix + row * COLUMNS + column, value, mask=here)


@triton.jit
def _coupling(logit, real, length, K: tl.constexpr, PADDING: tl.constexpr):
    """Softmax of the logits [K_TILE, L_TILE] over the capsules."""
    k = tl.arange(0, logit.shape[0])[:, None]
    taken = real
    if PADDING == FILL_BEFORE:
        logit = tl.where(real, logit, _PADDING_LOGIT)
        taken = tl.arange(0, logit.shape[1])[None, :] < length
    logit = tl.where(k < K, logit, _LOWEST)
    share = tl.where(k < K, tl.exp(logit - tl.max(logit, 0, keep_dims=True)), 0.0)
    return tl.where(taken, share / tl.sum(share, 0, keep_dims=True), 0.0)


@triton.jit
def _route(x, first, real, length, weight, iterations, K: tl.constexpr, PADDING: tl.constexpr):
    """One user's last coupling [K_TILE, L_TILE], weighted sums and capsules [K_TILE, D_TILE]."""
    back = tl.zeros([first.shape[0], x.shape[1]], tl.float32)
    share = _coupling(first, real, length, K, PADDING)
    # Each product stands before the loop and in it. One after it makes Triton convert an operand
    # that it has converted in the loop, where the result is out of scope.
    pooled = product(share, x, tl.float32)
    capsules = product(pooled, weight, tl.float32)
    for _ in range(bound(iterations) - 1):
        norm2 = tl.sum(capsules * capsules, 1, keep_dims=True)
        factor, _slope = squash_factor(norm2, SQRT_EPS, _EPS, 1.0)
        back += product(factor * capsules, tl.trans(weight), tl.float32)
        logit = first + product(back, tl.trans(x), tl.float32)
        share = _coupling(logit, real, length, K, PADDING)
        pooled = product(share, x, tl.float32)
        capsules = product(pooled, weight, tl.float32)
    return share, pooled, capsules


@triton.jit
def _jagged_tile(
    history, table, logits, back, start, length, known, table_size, stride_l, stride_d,
    table_stride_n, table_stride_d, logits_stride_k, logits_stride_l, K: tl.constexpr,
    D: tl.constexpr, PADDING: tl.constexpr, L_TILE: tl.constexpr,
):  # fmt: skip
    """Positions ``start ..`` of a history [L_TILE, D_TILE] and their coupling [K_TILE, L_TILE]."""
    x = _load_history(
        history, table, start, length, table_size, stride_l, stride_d, table_stride_n,
        table_stride_d, D, L_TILE, back.shape[1],
    )  # fmt: skip
    logit = load_logits(
        logits, start, logits_stride_k, logits_stride_l, known, K, back.shape[0], L_TILE
    )
    logit += product(back, tl.trans(x), tl.float32)
    real = load_real(None, start, 0, length, L_TILE)
    return x, _coupling(logit, real, length, K, PADDING)


@triton.jit
def _route_jagged(
    history, table, logits, weight, length, known, iterations, table_size, stride_l, stride_d,
    table_stride_n, table_stride_d, logits_stride_k, logits_stride_l, K: tl.constexpr,
    D: tl.constexpr, PADDING: tl.constexpr, K_TILE: tl.constexpr, L_TILE: tl.constexpr,
):  # fmt: skip
    """Of a history of any length: what its last logits add, weighted sums and capsules."""
    back = tl.zeros([K_TILE, weight.shape[0]], tl.float32)
    pooled = tl.zeros([K_TILE, weight.shape[0]], tl.float32)
    capsules = tl.zeros([K_TILE, weight.shape[1]], tl.float32)
    for _ in range(bound(iterations)):
        norm2 = tl.sum(capsules * capsules, 1, keep_dims=True)
        factor, _slope = squash_factor(norm2, SQRT_EPS, _EPS, 1.0)
        back += product(factor * capsules, tl.trans(weight), tl.float32)
        pooled = tl.zeros([K_TILE, weight.shape[0]], tl.float32)
        for start in range(0, bound(length), L_TILE):
            x, share = _jagged_tile(
                history, table, logits, back, start, length, known, table_size, stride_l, stride_d,
                table_stride_n, table_stride_d, logits_stride_k, logits_stride_l, K, D, PADDING,
                L_TILE,
            )  # fmt: skip
            pooled += product(share, x, tl.float32)
        capsules = product(pooled, weight, tl.float32)
    return back, pooled, capsules


@triton.jit
def _hidden(interests, w1, b1, D: tl.constexpr, H: tl.constexpr, H_TILE: tl.constexpr):
    """Hidden units [K_TILE, H_TILE] of the interests [K_TILE, D_TILE]."""
    weight = _load_matrix(w1, H, D, H_TILE, interests.shape[1])
    total = product(interests, tl.trans(weight), tl.float32) + load_vector(b1, 0, H, H_TILE)
    return tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows", "logits_length", "iterations"])
def _mimnet_forward_kernel(
    history,
    table,
    source,
    item,
    prototype,
    routing_weight,
    w1,
    b1,
    w2,
    b2,
    fine_key_weight,
    fine_value_weight,
    fine_value_bias,
    coarse_key_weight,
    coarse_value_weight,
    coarse_value_bias,
    fusion_weight,
    fusion_bias,
    logits,
    offsets,
    mask,
    ratings,
    pooled_out,
    transferred_out,
    rows,
    logits_length,
    iterations,
    table_size,
    history_stride_b,
    history_stride_l,
    history_stride_d,
    table_stride_n,
    table_stride_d,
    source_stride_b,
    source_stride_d,
    item_stride_b,
    item_stride_d,
    prototype_stride_b,
    prototype_stride_d,
    logits_stride_b,
    logits_stride_k,
    logits_stride_l,
    logits_stride_t,
    mask_stride_b,
    mask_stride_l,
    K: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    PADDING: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    H_TILE: tl.constexpr,
):
    user = tl.program_id(0).to(tl.int64)
    owner, first_row, length = history_of(offsets, user, tl.num_programs(0), rows)
    history += owner * history_stride_b + first_row * history_stride_l
    logits += user * logits_stride_b + first_row * logits_stride_t
    weight = _load_matrix(routing_weight, D, D, D_TILE, D_TILE)
    if offsets is None:
        if mask is not None:
            mask += user * mask_stride_b
        x = _load_history(
            history, table, 0, length, table_size, history_stride_l, history_stride_d,
            table_stride_n, table_stride_d, D, L_TILE, D_TILE,
        )  # fmt: skip
        first = load_logits(logits, 0, logits_stride_k, logits_stride_l, length, K, K_TILE, L_TILE)
        real = load_real(mask, 0, mask_stride_l, length, L_TILE)
        _, pooled, capsules = _route(x, first, real, length, weight, iterations, K, PADDING)
    else:
        _, pooled, capsules = _route_jagged(
            history, table, logits, weight, length, tl.minimum(length, logits_length), iterations,
            table_size, history_stride_l, history_stride_d, table_stride_n, table_stride_d,
            logits_stride_k, logits_stride_l, K, D, PADDING, K_TILE, L_TILE,
        )  # fmt: skip
    _store_matrix(pooled_out + user * K * D, pooled, K, D)
    factor, _ = squash_factor(tl.sum(capsules * capsules, 1, keep_dims=True), SQRT_EPS, _EPS, 1.0)

    source += user * source_stride_b
    contracted = tl.zeros([D_TILE, H_TILE], tl.float32)
    shift = tl.zeros([1, D_TILE], tl.float32)
    for s in tl.range(D, loop_unroll_factor=4):
        element = tl.load(source + s * source_stride_d).to(tl.float32)
        contracted += element * _load_matrix(w2 + s * D * H, D, H, D_TILE, H_TILE)
        shift += element * load_vector(b2 + s * D, 0, D, D_TILE)
    hidden = _hidden(factor * capsules, w1, b1, D, H, H_TILE)
    transferred = product(hidden, tl.trans(contracted), tl.float32) + shift
    _store_matrix(transferred_out + user * K * D, transferred, K, D)

    here = tl.full([1, 1], 1, tl.int1)
    u = transferred[None]
    item += user * item_stride_b + tl.zeros([1, 1], tl.int64)
    prototype += user * prototype_stride_b + tl.zeros([1, 1], tl.int64)
    item_row = load_rows(item, here, item_stride_d, D, D_TILE)
    fine, coarse = shares(
        item_row, load_rows(prototype, here, prototype_stride_d, D, D_TILE),
        fusion_weight, fusion_bias, D,
    )  # fmt: skip
    _, _, share = attend(
        item, here, item_stride_d, fine_key_weight, u, K, D, D_TILE, D_TILE, tl.float32
    )
    fine_pooled = weighted_sum(share, u, tl.float32)
    _, _, share = attend(
        prototype, here, prototype_stride_d, coarse_key_weight, u, K, D, D_TILE, D_TILE, tl.float32
    )
    coarse_pooled = weighted_sum(share, u, tl.float32)
    out = fine * projected(fine_pooled, fine_value_weight, fine_value_bias, 0, D, D_TILE)
    out += coarse * projected(coarse_pooled, coarse_value_weight, coarse_value_bias, 0, D, D_TILE)
    tl.store(ratings + user, tl.sum(out * item_row))


@triton.jit(do_not_specialize=["rows", "logits_length", "iterations"])
def _mimnet_backward_kernel(
    grad,
    pooled,
    transferred,
    history,
    table,
    source,
    item,
    prototype,
    routing_weight,
    w1,
    b1,
    w2,
    b2,
    fine_key_weight,
    fine_value_weight,
    fine_value_bias,
    coarse_key_weight,
    coarse_value_weight,
    coarse_value_bias,
    fusion_weight,
    fusion_bias,
    logits,
    offsets,
    mask,
    history_grad,
    source_grad,
    item_grad,
    prototype_grad,
    factors,
    rows,
    logits_length,
    iterations,
    table_size,
    grad_stride,
    history_stride_b,
    history_stride_l,
    history_stride_d,
    table_stride_n,
    table_stride_d,
    source_stride_b,
    source_stride_d,
    item_stride_b,
    item_stride_d,
    prototype_stride_b,
    prototype_stride_d,
    logits_stride_b,
    logits_stride_k,
    logits_stride_l,
    logits_stride_t,
    mask_stride_b,
    mask_stride_l,
    K: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    PADDING: tl.constexpr,
    K_TILE: tl.constexpr,
    L_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    H_TILE: tl.constexpr,
):
    user = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_TILE)[None, :]
    here = tl.full([1, 1], 1, tl.int1)
    rating_grad = tl.load(grad + user * grad_stride).to(tl.float32)
    u = _load_matrix(transferred + user * K * D, K, D, K_TILE, D_TILE)[None]
    source += user * source_stride_b + tl.zeros([1, 1], tl.int64)
    item += user * item_stride_b + tl.zeros([1, 1], tl.int64)
    prototype += user * prototype_stride_b + tl.zeros([1, 1], tl.int64)
    item_row = load_rows(item, here, item_stride_d, D, D_TILE)
    prototype_row = load_rows(prototype, here, prototype_stride_d, D, D_TILE)

    # The rating's gradient is a factor of that of the user's vector, which else is the item.
    fine, coarse = shares(item_row, prototype_row, fusion_weight, fusion_bias, D)
    folded, score, share = attend(
        item, here, item_stride_d, fine_key_weight, u, K, D, D_TILE, D_TILE, tl.float32
    )
    pooled_grad, score_grad, fine_dot = attend_backward(
        item, here, item_stride_d, rating_grad * fine, folded, score, share, fine_value_weight, u,
        D, D_TILE, D_TILE, tl.float32,
    )  # fmt: skip
    fine_pooled = weighted_sum(share, u, tl.float32)
    fine_folded_grad = weighted_sum(score_grad, u, tl.float32)
    u_grad = interests_gradient(share, pooled_grad, score_grad, folded, u, tl.float32)
    folded, score, share = attend(
        prototype, here, prototype_stride_d, coarse_key_weight, u, K, D, D_TILE, D_TILE, tl.float32
    )
    pooled_grad, score_grad, coarse_dot = attend_backward(
        item, here, item_stride_d, rating_grad * coarse, folded, score, share, coarse_value_weight,
        u, D, D_TILE, D_TILE, tl.float32,
    )  # fmt: skip
    coarse_pooled = weighted_sum(share, u, tl.float32)
    coarse_folded_grad = weighted_sum(score_grad, u, tl.float32)
    u_grad += interests_gradient(share, pooled_grad, score_grad, folded, u, tl.float32)
    biases = load_vector(coarse_value_bias, 0, D, D_TILE)
    biases -= load_vector(fine_value_bias, 0, D, D_TILE)
    gate_grad = coarse_dot - fine_dot + tl.sum(item_row * biases, 1, keep_dims=True)
    gate_grad *= rating_grad * fine * coarse
    # Each part's rows are stored as soon as they are known, to free registers for the next.
    if factors is not None:
        factors += user * (12 * D + 1 + D * D + H + 2 * D * H)
        store_rows(
            factors + tl.zeros([1, 1], tl.int64), here, item_row, prototype_row,
            rating_grad * item_row, fine, coarse, gate_grad, fine_pooled, coarse_pooled,
            fine_folded_grad, coarse_folded_grad, D,
        )  # fmt: skip
        factors += 10 * D + 1
    if item_grad is not None:
        value = fine * projected(fine_pooled, fine_value_weight, fine_value_bias, 0, D, D_TILE)
        value += coarse * projected(
            coarse_pooled, coarse_value_weight, coarse_value_bias, 0, D, D_TILE
        )
        value = rating_grad * value + gate_grad * load_vector(fusion_weight, 0, D, D_TILE)
        value += times_weight_transposed(fine_folded_grad, fine_key_weight, 0, D, D_TILE)
        tl.store(item_grad + user * D + d, value, mask=d < D)
    if prototype_grad is not None:
        value = gate_grad * load_vector(fusion_weight + D, 0, D, D_TILE)
        value += times_weight_transposed(coarse_folded_grad, coarse_key_weight, 0, D, D_TILE)
        tl.store(prototype_grad + user * D + d, value, mask=d < D)

    t_grad = tl.reshape(u_grad, [K_TILE, D_TILE])
    weight = _load_matrix(routing_weight, D, D, D_TILE, D_TILE)
    pooled = _load_matrix(pooled + user * K * D, K, D, K_TILE, D_TILE)
    capsules = product(pooled, weight, tl.float32)
    norm2 = tl.sum(capsules * capsules, 1, keep_dims=True)
    factor, radial = squash_factor(norm2, SQRT_EPS, _EPS, 1.0)
    interests = factor * capsules
    hidden = _hidden(interests, w1, b1, D, H, H_TILE)
    contracted_grad = product(tl.trans(t_grad), hidden, tl.float32)
    shift_grad = tl.sum(t_grad, 0, keep_dims=True)
    if factors is not None:
        source_row = load_rows(source, here, source_stride_d, D, D_TILE)
        _store_matrix(factors, source_row, 1, D)
        _store_matrix(factors + D, shift_grad, 1, D)
        _store_matrix(factors + 2 * D, contracted_grad, D, H)
        factors += 2 * D + D * H
    contracted = tl.zeros([D_TILE, H_TILE], tl.float32)
    for s in tl.range(D, loop_unroll_factor=4):
        element = tl.load(source + s * source_stride_d).to(tl.float32)
        generating = _load_matrix(w2 + s * D * H, D, H, D_TILE, H_TILE)
        contracted += element * generating
        if source_grad is not None:
            total = tl.sum(generating * contracted_grad)
            total += tl.sum(load_vector(b2 + s * D, 0, D, D_TILE) * shift_grad)
            tl.store(source_grad + user * D + s, total)
    hidden_grad = tl.where(hidden > 0, product(t_grad, contracted, tl.float32), 0.0)
    w1_tile = _load_matrix(w1, H, D, H_TILE, D_TILE)
    interests_grad = product(hidden_grad, w1_tile, tl.float32)
    dot = tl.sum(capsules * interests_grad, 1, keep_dims=True)
    capsules_grad = factor * interests_grad + squash_slope(dot, norm2, radial) * capsules
    if factors is not None:
        _store_matrix(factors, product(tl.trans(hidden_grad), interests, tl.float32), H, D)
        _store_matrix(factors + D * H, tl.sum(hidden_grad, 0, keep_dims=True), 1, H)
        factors += D * H + H
        _store_matrix(factors, product(tl.trans(pooled), capsules_grad, tl.float32), D, D)

    if history_grad is not None:
        owner, first_row, length = history_of(offsets, user, tl.num_programs(0), rows)
        history += owner * history_stride_b + first_row * history_stride_l
        history_grad += (owner * rows + first_row) * D
        logits += user * logits_stride_b + first_row * logits_stride_t
        if offsets is None:
            if mask is not None:
                mask += user * mask_stride_b
            x = _load_history(
                history, table, 0, length, table_size, history_stride_l, history_stride_d,
                table_stride_n, table_stride_d, D, L_TILE, D_TILE,
            )  # fmt: skip
            first = load_logits(
                logits, 0, logits_stride_k, logits_stride_l, length, K, K_TILE, L_TILE
            )
            real = load_real(mask, 0, mask_stride_l, length, L_TILE)
            coupling, _, _ = _route(x, first, real, length, weight, iterations, K, PADDING)
            x_grad = product(capsules_grad, tl.trans(weight), tl.float32)
            x_grad = product(tl.trans(coupling), x_grad, tl.float32)
            at = tl.arange(0, L_TILE)[:, None]
            tl.store(history_grad + at * D + d, x_grad, mask=(at < length) & (d < D))
        else:
            known = tl.minimum(length, logits_length)
            sum_seen = product(capsules_grad, tl.trans(weight), tl.float32)
            back, _, _ = _route_jagged(
                history, table, logits, weight, length, known, iterations, table_size,
                history_stride_l, history_stride_d, table_stride_n, table_stride_d,
                logits_stride_k, logits_stride_l, K, D, PADDING, K_TILE, L_TILE,
            )  # fmt: skip
            for start in range(0, bound(length), L_TILE):
                _x, coupling = _jagged_tile(
                    history, table, logits, back, start, length, known, table_size,
                    history_stride_l, history_stride_d, table_stride_n, table_stride_d,
                    logits_stride_k, logits_stride_l, K, D, PADDING, L_TILE,
                )  # fmt: skip
                x_grad = product(tl.trans(coupling), sum_seen, tl.float32)
                at = start + tl.arange(0, L_TILE).to(tl.int64)[:, None]
                tl.store(history_grad + at * D + d, x_grad, mask=(at < length) & (d < D))


@triton.jit
def _gather_kernel(
    ids,
    table,
    out,
    length,
    table_size,
    count,
    ids_stride_b,
    ids_stride_l,
    table_stride_n,
    table_stride_d,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    D_TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    here = row < count
    at = ids + row // length * ids_stride_b + row % length * ids_stride_l
    found = tl.load(at, mask=here, other=0)
    x = _table_rows(table, found, here, table_size, table_stride_n, table_stride_d, D, D_TILE)
    d = tl.arange(0, D_TILE)[None, :]
    tl.store(out + row * D + d, x, mask=here & (d < D))


@triton.jit
def _interests_kernel(
    pooled,
    weight,
    out,
    weight_stride_i,
    weight_stride_d,
    count,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    I_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    here = row < count
    x = load_rows(pooled + row * D, here, 1, D, I_TILE)
    norm2 = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, D, D_TILE):
        c = times_weight(
            x, weight, start, 0, weight_stride_i, weight_stride_d, SHARED, ROWS, D, D, D_TILE
        )
        norm2 += tl.sum(c * c, 1, keep_dims=True)
    factor, _ = squash_factor(norm2, SQRT_EPS, _EPS, 1.0)
    for start in range(0, D, D_TILE):
        c = times_weight(
            x, weight, start, 0, weight_stride_i, weight_stride_d, SHARED, ROWS, D, D, D_TILE
        )
        d = start + tl.arange(0, D_TILE)[None, :]
        tl.store(out + row * D + d, factor * c, mask=here & (d < D))


def _tiles(k: int, rows: int, d: int, hidden: int, offsets: Tensor | None) -> dict[str, int] | None:
    """Tiles of a user that stay in registers; None where they are too large for that."""
    length = rows if offsets is None else min(usual_length(rows, offsets), _LONGEST_TILE)
    # The sums over the interests are products, whose inner size is at least 16.
    k_tile, l_tile, d_tile, h_tile = (padded(size, 16) for size in (k, length, d, hidden))
    elements = max(k_tile, d_tile) * max(l_tile, h_tile)
    if d > _WIDEST or elements > _TILE_ELEMENTS:
        return None
    return {
        "K_TILE": k_tile,
        "L_TILE": l_tile,
        "D_TILE": d_tile,
        "H_TILE": h_tile,
        "num_warps": 4 if max(elements, 64 * d_tile) <= 1024 else 8,
        # Left to itself, ptxas spills a few bytes to fit one more block on a multiprocessor.
        "maxnreg": 255,
    }


def _inputs(
    history: Tensor,
    table: Tensor | None,
    vectors: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """The tensors that both kernels take, but for the key biases, which cancel."""
    kept = [p.contiguous() for i, p in enumerate(parameters) if i not in (6, 10)]
    return (history, table, *vectors, *kept)


def _strides(
    history: Tensor,
    table: Tensor | None,
    vectors: tuple[Tensor, ...],
    logits: Tensor,
    mask: Tensor | None,
) -> tuple[int, ...]:
    """Strides of what is not contiguous; 0 for dimensions that are not there or repeated."""
    found = [0] * _is_jagged(history, table) + list(history.stride()) + [0] * (table is not None)
    found += (0, 0) if table is None else table.stride()
    for vector in vectors:
        found += vector.stride()
    return (*found, *logit_strides(logits), *mask_strides(mask))


def _check_ids(ids: Tensor, rows: int) -> None:
    """On the CPU, where an interpreter runs the kernels, as the compiled kernels do there."""
    if ids.device.type == "cpu" and ids.numel():
        for value in map(int, torch.aminmax(ids)):
            if not 0 <= value < rows:
                raise ValueError(
                    f"history: got id {value}, need 0 to {rows - 1} (a row of the table)"
                )


def _is_jagged(history: Tensor, table: Tensor | None) -> bool:
    return history.dim() == (2 if table is None else 1)


def _embedded(history: Tensor, table: Tensor | None) -> Tensor:
    """Histories ``[B,L,D]``, or jagged ones ``[T,D]``."""
    if table is None:
        return history
    ids = history if history.dim() == 2 else history[None]
    length, d = ids.shape[1], table.shape[1]
    out = table.new_empty(*history.shape, d)
    d_tile = padded(d)
    rows = max(1, _TILE_ELEMENTS // d_tile)
    launch(
        _gather_kernel,
        (triton.cdiv(ids.numel(), rows),),
        ids,
        table,
        out,
        length,
        table.shape[0],
        ids.numel(),
        *ids.stride(),
        *table.stride(),
        d,
        rows,
        d_tile,
    )
    return out


def _interests(pooled: Tensor, weight: Tensor) -> Tensor:
    """Interests in float32 from what routing saved."""
    out = torch.empty_like(pooled)
    batch, k, d = pooled.shape
    tile = padded(d, 16)
    launch(
        _interests_kernel,
        (triton.cdiv(batch * k, 16),),
        pooled,
        weight,
        out,
        *weight.stride(),
        batch * k,
        d,
        16,
        tile,
        min(tile, max(16, _TILE_ELEMENTS // tile)),
    )
    return out


def _routing_options(iterations: int, padding: int) -> tuple[int | float, ...]:
    """MIMNet's, as the launchers of a routing take them from ``iterations`` to ``power``."""
    accumulate, normalize_agreement, full_gradient, inner_squash, final_squash = 0, 0, 0, 1, 1
    return (
        iterations, CAPSULES.value, padding, accumulate, normalize_agreement, full_gradient,
        inner_squash, final_squash, 1.0, SQRT_EPS.value, _EPS.value, 1.0,
    )  # fmt: skip


def _route_in_parts(
    history: Tensor, table: Tensor | None, weight: Tensor, logits: Tensor, mask: Tensor | None,
    iterations: int, padding: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Interests in float32, coupling and weighted sums."""
    return dynamic_routing(
        _embedded(history, table), weight, logits, mask, None, logits.shape[-2],
        *_routing_options(iterations, padding), torch.float32,
    )  # fmt: skip


def mimnet_forward(
    history: Tensor,
    table: Tensor | None,
    source: Tensor,
    item: Tensor,
    prototype: Tensor,
    *others: Tensor | int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ratings [B], and for backward the weighted sums and the transferred interests [B,K,D].

    ``others`` are the fifteen parameters, logits, mask, iterations, padding and False: these
    kernels keep nothing else.
    """
    *parameters, logits, mask, iterations, padding, keep = others
    if keep:
        raise RuntimeError("mimnet_forward: only the CPU keeps gradients")
    nothing = source.new_empty(0, dtype=torch.float32)
    jagged = _is_jagged(history, table)
    if table is not None:
        _check_ids(history, table.shape[0])
    vectors = source, item, prototype
    batch, d = source.shape
    k, hidden = logits.shape[-2], parameters[1].shape[0]
    rows = history.shape[0 if jagged else 1]
    offsets, dense_mask = offsets_or_mask(mask, jagged)
    tiles = _tiles(k, rows, d, hidden, offsets)
    if tiles is None:
        interests, _, pooled = _route_in_parts(
            history, table, parameters[0], logits, mask, iterations, padding
        )
        transferred = interest_bridge(interests, source, *parameters[1:5])
        user, _ = multi_granularity_attention(item, prototype, transferred, *parameters[5:])
        return (user * item).sum(-1).to(source.dtype), pooled, transferred, nothing
    ratings = source.new_empty(batch)
    pooled = source.new_empty(batch, k, d, dtype=torch.float32)
    transferred = torch.empty_like(pooled)
    launch(
        _mimnet_forward_kernel,
        (batch,),
        *_inputs(history, table, vectors, parameters),
        logits,
        offsets,
        dense_mask,
        ratings,
        pooled,
        transferred,
        rows,
        logits.shape[-1] if jagged else None,
        iterations,
        0 if table is None else table.shape[0],
        *_strides(history, table, vectors, logits, dense_mask),
        k,
        d,
        hidden,
        padding,
        **tiles,
    )
    return ratings, pooled, transferred, nothing


def mimnet_forward_backward(
    grad: Tensor,
    pooled: Tensor,
    transferred: Tensor,
    hidden_grad: Tensor,
    history: Tensor,
    table: Tensor | None,
    source: Tensor,
    item: Tensor,
    prototype: Tensor,
    *others: Tensor | int | None,
) -> tuple[Tensor, ...]:
    """Gradients of history, source, item, prototype and parameters, empty where not needed."""
    *parameters, logits, mask, iterations, padding, needs = others
    pooled, transferred = pooled.contiguous(), transferred.contiguous()
    vectors = source, item, prototype
    batch, d = source.shape
    k, hidden = logits.shape[-2], parameters[1].shape[0]
    jagged = _is_jagged(history, table)
    rows = history.shape[0 if jagged else 1]
    offsets, dense_mask = offsets_or_mask(mask, jagged)
    tiles = _tiles(k, rows, d, hidden, offsets)
    if tiles is None:
        return _backward_in_parts(
            grad, pooled, transferred, history, table, vectors, parameters, logits, mask,
            iterations, padding, needs,
        )  # fmt: skip
    embeddings = history, *vectors
    grads = [t.new_empty(t.shape) if needs >> i & 1 else None for i, t in enumerate(embeddings)]
    parts = [10 * d + 1, d, d, d * hidden, d * hidden, hidden, d * d]
    factors = None
    if needs >> 4:
        factors = source.new_empty(batch, 1, sum(parts), dtype=torch.float32)
    launch(
        _mimnet_backward_kernel,
        (batch,),
        grad,
        pooled,
        transferred,
        *_inputs(history, table, vectors, parameters),
        logits,
        offsets,
        dense_mask,
        *grads,
        factors,
        rows,
        logits.shape[-1] if jagged else None,
        iterations,
        0 if table is None else table.shape[0],
        *grad.stride(),
        *_strides(history, table, vectors, logits, dense_mask),
        k,
        d,
        hidden,
        padding,
        **tiles,
    )
    products = []
    if factors is not None:
        attention, source_rows, shift, contracted, w1, b1, weight = factors.split(parts, 2)
        products = [
            (None, weight), (None, w1), (None, b1), (source_rows, contracted),
            (source_rows, shift), *fusion_products(attention, d),
        ]  # fmt: skip
    found = [source.new_empty(0) if g is None else g for g in grads]
    return (*found, *parameter_gradients(products, parameters, needs >> 4))


def _backward_in_parts(
    grad: Tensor,
    pooled: Tensor,
    transferred: Tensor,
    history: Tensor,
    table: Tensor | None,
    vectors: tuple[Tensor, ...],
    parameters: list[Tensor],
    logits: Tensor,
    mask: Tensor | None,
    iterations: int,
    padding: int,
    needs: int,
) -> tuple[Tensor, ...]:
    source, item, prototype = vectors
    attention = parameters[5:]
    # Bits of the op's inputs become those of each part's.
    routes = needs & 0b10001
    bridges = (1 if routes else 0) | (needs >> 1 & 1) << 1 | (needs >> 5 & 0b1111) << 2
    attends = needs >> 2 & 0b11 | (4 if bridges else 0) | needs >> 9 << 3
    grad = grad.float()[:, None]
    item_grad, prototype_grad, transferred_grad, *attention_grads = (
        multi_granularity_attention_backward(
            grad * item, None, item, prototype, transferred, *attention, attends
        )
    )
    if needs & 4:
        user, _ = multi_granularity_attention(item, prototype, transferred, *attention)
        item_grad = (item_grad + grad * user).to(item.dtype)
    bridge_grads = [source.new_empty(0) for _ in range(6)]
    if bridges:
        interests = _interests(pooled, parameters[0])
        bridge_grads = interest_bridge_backward(
            transferred_grad, interests, source, *parameters[1:5], bridges
        )
    interests_grad, source_grad, *meta_grads = bridge_grads
    history_grad, weight_grad = source.new_empty(0), source.new_empty(0)
    if routes:
        # Without a gradient of the history, nothing reads the coupling.
        *batch, positions = history.shape if table is not None else history.shape[:-1]
        coupling = pooled.new_empty(*batch, logits.shape[-2], positions)
        if needs & 1:
            _, coupling, _ = _route_in_parts(
                history, table, parameters[0], logits, mask, iterations, padding
            )
        found = dynamic_routing_backward(
            interests_grad, history, parameters[0], logits, mask, None, coupling, pooled,
            *_routing_options(iterations, padding), needs & 1 | needs >> 3 & 2,
        )  # fmt: skip
        history_grad = found[0] if needs & 1 else history_grad
        weight_grad = found[1] if needs & 16 else weight_grad
    return (
        history_grad,
        source_grad,
        item_grad,
        prototype_grad,
        weight_grad,
        *meta_grads,
        *attention_grads,
    )
