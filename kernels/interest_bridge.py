"""Interest bridge: the source is contracted with the generating weights once per user.

    T[u,h,t] = sum_s source[u,s] w2[(s,t),h]        out[u,k,t] = sum_h hidden[u,k,h] T[u,h,t] + ..

A program holds the hidden units of a tile of users in registers and walks over target columns t.
Of a column it needs ``T_t [users, H]``, one product of the sources with ``w2_t [D_s, H]``, which is
consumed at once: no generated matrix and no T reach memory. Per user this costs (D_s + K) H D_t
multiply-adds, and w2 is read once per tile of users, from the L2 cache. The gradients follow the
same walk, each from the side on which it needs no sum over programs:

    hidden[u,k,h] = sum_t T_t[u,h] grad[u,k,t]            a program per tile of users and h
    source[u,s]   = sum_t,h dT_t[u,h] w2[(s,t),h] + ..    a program per tile of users and s
    w2[(s,t),h]   = sum_u source[u,s] dT_t[u,h]           a program per tile of s, t, h and users

where ``dT_t[u,h] = sum_k hidden[u,k,h] grad[u,k,t]``. With one source per interest, each interest
is a user of its own, so tensors come as ``[outer, inner, ..]``, whose two first sizes count users.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import MOST_REGISTERS, launch
from ._tiles import bound, padded, product
from .weight_gradients import add_parts, outer_sums

_PROGRAMS = 128
# As many rows of w1 as a product needs at least: more are fetched early, into registers.
_INNER = tl.constexpr(16)


@triton.jit
def _users(user, inner, stride_outer, stride_inner):
    """Where the users of ``[outer, inner, ..]`` begin; an inner size of 1 costs nothing."""
    return user // inner * stride_outer + user % inner * stride_inner


@triton.jit
def hidden_units(x, here, stride_i, w1, b1, h, D_I: tl.constexpr, H: tl.constexpr):
    """``relu(w1 x + b1)`` at hidden units ``h [H_TILE]`` for vectors that begin at ``x [R, 1]``."""
    total = tl.zeros((x.shape[0], h.shape[0]), tl.float32)
    for start in range(0, D_I, _INNER):
        i = start + tl.arange(0, _INNER)
        vector = tl.load(x + i[None, :] * stride_i, mask=here & (i[None, :] < D_I), other=0.0)
        in_w1 = (i[:, None] < D_I) & (h[None, :] < H)
        weight = tl.load(w1 + h[None, :] * D_I + i[:, None], mask=in_w1, other=0.0)
        total += product(vector, weight, w1.dtype.element_ty)
    bias = tl.load(b1 + h, mask=h < H, other=0.0).to(tl.float32)
    return tl.maximum(total + bias[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _interests_hidden(
    interests,
    user,
    k,
    users,
    inner,
    stride_outer,
    stride_inner,
    stride_k,
    stride_i,
    w1,
    b1,
    h,
    K,
    D_I: tl.constexpr,
    H: tl.constexpr,
):
    """Hidden units ``[USERS, K_TILE, H_TILE]`` for ``user [USERS]`` and ``k [K_TILE]``."""
    USERS: tl.constexpr = user.shape[0]
    K_TILE: tl.constexpr = k.shape[0]
    x = _users(user, inner, stride_outer, stride_inner)[:, None] + k[None, :] * stride_k
    here = (user < users)[:, None] & (k < K)[None, :]
    x = interests + x.reshape(USERS * K_TILE, 1)
    here = here.reshape(USERS * K_TILE, 1)
    hidden = hidden_units(x, here, stride_i, w1, b1, h, D_I, H)
    return hidden.reshape(USERS, K_TILE, h.shape[0])


@triton.jit
def _w2_tile(w2, s, t, h, stride_row, stride_h, D_S, D_T, H):
    """``w2[(s,t),h]`` where one of ``s`` and ``h`` is a row of indices and the other a column."""
    at = (s * D_T + t).to(tl.int64) * stride_row + h.to(tl.int64) * stride_h
    return tl.load(w2 + at, mask=(s < D_S) & (h < H), other=0.0)


@triton.jit
def contract(source, here, stride_s, w2, stride_row, stride_h, s, t, h, D_S, D_T, H):
    """The share of ``s [S_TILE]`` in ``T_t [R, H_TILE]`` for vectors at ``source [R, 1]``."""
    vector = tl.load(source + s[None, :] * stride_s, mask=here & (s[None, :] < D_S), other=0.0)
    weight = _w2_tile(w2, s[:, None], t, h[None, :], stride_row, stride_h, D_S, D_T, H)
    return product(vector, weight, source.dtype.element_ty)


@triton.jit
def _shift(source, here, stride_s, b2, s, t, D_S, D_T):
    """The share of ``s [S_TILE]`` in ``source . b2_t``."""
    vector = tl.load(source + s[None, :] * stride_s, mask=here & (s[None, :] < D_S), other=0.0)
    bias = tl.load(b2 + s * D_T + t, mask=s < D_S, other=0.0)
    return tl.sum(vector.to(tl.float32) * bias.to(tl.float32)[None, :], 1)


@triton.jit(do_not_specialize=["users", "columns"])
def _interest_bridge_forward_kernel(
    interests,
    source,
    w1,
    b1,
    w2,
    b2,
    out,
    users,
    inner,
    columns,
    interests_stride_outer,
    interests_stride_inner,
    interests_stride_k,
    interests_stride_i,
    source_stride_outer,
    source_stride_inner,
    source_stride_s,
    w2_stride_row,
    w2_stride_h,
    K: tl.constexpr,
    D_I: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    H: tl.constexpr,
    USERS: tl.constexpr,
    K_TILE: tl.constexpr,
    H_TILE: tl.constexpr,
    S_TILE: tl.constexpr,
):
    user = tl.program_id(0).to(tl.int64) * USERS + tl.arange(0, USERS)
    k = tl.program_id(1) * K_TILE + tl.arange(0, K_TILE)
    out += tl.program_id(0).to(tl.int64) * (USERS * K * D_T)
    out += tl.arange(0, USERS)[:, None] * (K * D_T) + k[None, :] * D_T
    in_source = (user < users)[:, None]
    in_out = in_source & (k < K)[None, :]
    source += _users(user, inner, source_stride_outer, source_stride_inner)[:, None]
    first_t = tl.program_id(2) * columns
    last_t = tl.minimum(first_t + columns, D_T)
    STEPS: tl.constexpr = (D_S + S_TILE - 1) // S_TILE
    for first_h in range(0, H, H_TILE):
        h = first_h + tl.arange(0, H_TILE)
        hidden = _interests_hidden(
            interests,
            user,
            k,
            users,
            inner,
            interests_stride_outer,
            interests_stride_inner,
            interests_stride_k,
            interests_stride_i,
            w1,
            b1,
            h,
            K,
            D_I,
            H,
        )
        contracted = tl.zeros((USERS, H_TILE), tl.float32)
        shift = tl.zeros((USERS,), tl.float32)
        # One loop over columns and sources, so that the loads of a column overlap the last one.
        for step in range(bound(first_t * STEPS), bound(last_t * STEPS)):
            t = step // STEPS
            s = step % STEPS * S_TILE + tl.arange(0, S_TILE)
            contracted += contract(
                source,
                in_source,
                source_stride_s,
                w2,
                w2_stride_row,
                w2_stride_h,
                s,
                t,
                h,
                D_S,
                D_T,
                H,
            )
            if first_h == 0:
                shift += _shift(source, in_source, source_stride_s, b2, s, t, D_S, D_T)
            if step % STEPS == STEPS - 1:
                value = tl.sum(hidden * contracted[:, None, :], 2) + shift[:, None]
                if first_h > 0:
                    value += tl.load(out + t, mask=in_out, other=0.0)
                tl.store(out + t, value, mask=in_out)
                contracted = tl.zeros((USERS, H_TILE), tl.float32)
                shift = tl.zeros((USERS,), tl.float32)


@triton.jit(do_not_specialize=["users"])
def _hidden_backward_kernel(
    grad,
    interests,
    source,
    w1,
    b1,
    w2,
    hidden_rows,
    grad_rows,
    users,
    inner,
    grad_stride_outer,
    grad_stride_inner,
    grad_stride_k,
    grad_stride_t,
    interests_stride_outer,
    interests_stride_inner,
    interests_stride_k,
    interests_stride_i,
    source_stride_outer,
    source_stride_inner,
    source_stride_s,
    w2_stride_row,
    w2_stride_h,
    K: tl.constexpr,
    D_I: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    H: tl.constexpr,
    USERS: tl.constexpr,
    K_TILE: tl.constexpr,
    H_TILE: tl.constexpr,
    S_TILE: tl.constexpr,
):
    """Hidden units and the gradient of what relu takes, as rows ``[users, K, H]``."""
    user = tl.program_id(0).to(tl.int64) * USERS + tl.arange(0, USERS)
    k = tl.program_id(1) * K_TILE + tl.arange(0, K_TILE)
    h = tl.program_id(2) * H_TILE + tl.arange(0, H_TILE)
    in_source = (user < users)[:, None]
    in_grad = in_source & (k < K)[None, :]
    source += _users(user, inner, source_stride_outer, source_stride_inner)[:, None]
    grad += _users(user, inner, grad_stride_outer, grad_stride_inner)[:, None]
    grad += k[None, :] * grad_stride_k
    STEPS: tl.constexpr = (D_S + S_TILE - 1) // S_TILE
    contracted = tl.zeros((USERS, H_TILE), tl.float32)
    grad_hidden = tl.zeros((USERS, K_TILE, H_TILE), tl.float32)
    for step in range(D_T * STEPS):
        t = step // STEPS
        s = step % STEPS * S_TILE + tl.arange(0, S_TILE)
        contracted += contract(
            source,
            in_source,
            source_stride_s,
            w2,
            w2_stride_row,
            w2_stride_h,
            s,
            t,
            h,
            D_S,
            D_T,
            H,
        )
        if step % STEPS == STEPS - 1:
            column = tl.load(grad + t * grad_stride_t, mask=in_grad, other=0.0).to(tl.float32)
            grad_hidden += column[:, :, None] * contracted[:, None, :]
            contracted = tl.zeros((USERS, H_TILE), tl.float32)
    hidden = _interests_hidden(
        interests,
        user,
        k,
        users,
        inner,
        interests_stride_outer,
        interests_stride_inner,
        interests_stride_k,
        interests_stride_i,
        w1,
        b1,
        h,
        K,
        D_I,
        H,
    )
    first_row = tl.program_id(0).to(tl.int64) * (USERS * K * H)
    row = tl.arange(0, USERS)[:, None, None] * (K * H) + k[None, :, None] * H + h[None, None, :]
    here = in_grad[:, :, None] & (h < H)[None, None, :]
    tl.store(hidden_rows + first_row + row, hidden, mask=here)
    tl.store(grad_rows + first_row + row, tl.where(hidden > 0, grad_hidden, 0.0), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _interests_backward_kernel(
    grad_rows,
    w1,
    grad_interests,
    rows,
    D_I: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    I_TILE: tl.constexpr,
    H_TILE: tl.constexpr,
):
    """The rows of the hidden layer's gradient times ``w1``."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    i = (tl.program_id(1) * I_TILE + tl.arange(0, I_TILE))[None, :]
    total = tl.zeros((ROWS, I_TILE), tl.float32)
    for start in range(0, H, H_TILE):
        h = start + tl.arange(0, H_TILE)
        in_rows = (row < rows) & (h[None, :] < H)
        hidden = tl.load(grad_rows + row * H + h[None, :], mask=in_rows, other=0.0)
        in_w1 = (h[:, None] < H) & (i < D_I)
        weight = tl.load(w1 + h[:, None] * D_I + i, mask=in_w1, other=0.0)
        total += product(hidden, weight, w1.dtype.element_ty)
    tl.store(grad_interests + row * D_I + i, total, mask=(row < rows) & (i < D_I))


@triton.jit(do_not_specialize=["users"])
def _source_backward_kernel(
    grad,
    grad_sum,
    hidden_rows,
    w2,
    b2,
    grad_source,
    users,
    inner,
    grad_stride_outer,
    grad_stride_inner,
    grad_stride_k,
    grad_stride_t,
    w2_stride_row,
    w2_stride_h,
    K: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    H: tl.constexpr,
    USERS: tl.constexpr,
    K_TILE: tl.constexpr,
    H_TILE: tl.constexpr,
    S_TILE: tl.constexpr,
    T_TILE: tl.constexpr,
):
    user = tl.program_id(0).to(tl.int64) * USERS + tl.arange(0, USERS)
    s = tl.program_id(1) * S_TILE + tl.arange(0, S_TILE)
    in_users = (user < users)[:, None]
    grad += _users(user, inner, grad_stride_outer, grad_stride_inner)[:, None]
    total = tl.zeros((USERS, S_TILE), tl.float32)
    for start in range(0, D_T, T_TILE):
        t = start + tl.arange(0, T_TILE)
        in_sum = in_users & (t[None, :] < D_T)
        tile = tl.load(grad_sum + user[:, None] * D_T + t[None, :], mask=in_sum, other=0.0)
        in_b2 = (t[:, None] < D_T) & (s[None, :] < D_S)
        bias = tl.load(b2 + s[None, :] * D_T + t[:, None], mask=in_b2, other=0.0)
        total += product(tile, bias, b2.dtype.element_ty)
    hidden_rows += tl.program_id(0).to(tl.int64) * (USERS * K * H)
    row = tl.arange(0, USERS)[:, None, None] * (K * H)
    for first_k in range(0, K, K_TILE):
        k = first_k + tl.arange(0, K_TILE)
        in_grad = in_users & (k < K)[None, :]
        for first_h in range(0, H, H_TILE):
            h = first_h + tl.arange(0, H_TILE)
            at = row + k[None, :, None] * H + h[None, None, :]
            in_rows = in_grad[:, :, None] & (h < H)[None, None, :]
            hidden = tl.load(hidden_rows + at, mask=in_rows, other=0.0)
            for t in range(D_T):
                column = grad + k[None, :] * grad_stride_k + t * grad_stride_t
                column = tl.load(column, mask=in_grad, other=0.0).to(tl.float32)
                grad_contracted = tl.sum(hidden * column[:, :, None], 1)
                weight = _w2_tile(
                    w2, s[None, :], t, h[:, None], w2_stride_row, w2_stride_h, D_S, D_T, H
                )
                total += product(grad_contracted, weight, w2.dtype.element_ty)
    at = grad_source + user[:, None] * D_S + s[None, :]
    tl.store(at, total, mask=in_users & (s[None, :] < D_S))


@triton.jit(do_not_specialize=["users"])
def _w2_backward_kernel(
    grad,
    source,
    hidden_rows,
    grad_w2,
    users,
    inner,
    grad_stride_outer,
    grad_stride_inner,
    grad_stride_k,
    grad_stride_t,
    source_stride_outer,
    source_stride_inner,
    source_stride_s,
    K: tl.constexpr,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    H: tl.constexpr,
    USERS: tl.constexpr,
    S_TILE: tl.constexpr,
    T_TILE: tl.constexpr,
    H_TILE: tl.constexpr,
):
    H_TILES: tl.constexpr = (H + H_TILE - 1) // H_TILE
    t = tl.program_id(0) // H_TILES * T_TILE + tl.arange(0, T_TILE)
    h = tl.program_id(0) % H_TILES * H_TILE + tl.arange(0, H_TILE)
    s = tl.program_id(1) * S_TILE + tl.arange(0, S_TILE)
    part = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(tl.cdiv(users, USERS), tl.num_programs(2))
    total = tl.zeros((S_TILE, T_TILE * H_TILE), tl.float32)
    grad_contracted = tl.zeros((USERS, T_TILE, H_TILE), tl.float32)
    # One loop over users and interests, so that the loads of a tile overlap the last one.
    for step in range(bound(tiles * K)):
        user = (part * tiles + step // K) * USERS + tl.arange(0, USERS)
        k = step % K
        column = grad + _users(user, inner, grad_stride_outer, grad_stride_inner)[:, None]
        column += k * grad_stride_k + t[None, :] * grad_stride_t
        in_grad = (user < users)[:, None] & (t < D_T)[None, :]
        column = tl.load(column, mask=in_grad, other=0.0).to(tl.float32)
        row = hidden_rows + user[:, None] * (K * H) + k * H + h[None, :]
        in_row = (user < users)[:, None] & (h < H)[None, :]
        hidden = tl.load(row, mask=in_row, other=0.0)
        grad_contracted += column[:, :, None] * hidden[:, None, :]
        if k == K - 1:
            vector = source + _users(user, inner, source_stride_outer, source_stride_inner)[None, :]
            in_source = (user < users)[None, :] & (s < D_S)[:, None]
            vector = tl.load(vector + s[:, None] * source_stride_s, mask=in_source, other=0.0)
            columns = grad_contracted.reshape(USERS, T_TILE * H_TILE)
            total += product(vector, columns, source.dtype.element_ty)
            grad_contracted = tl.zeros((USERS, T_TILE, H_TILE), tl.float32)
    grad_w2 += part * (D_S * D_T * H)
    at = s[:, None, None] * (D_T * H) + t[None, :, None] * H + h[None, None, :]
    here = (s < D_S)[:, None, None] & (t < D_T)[None, :, None] & (h < H)[None, None, :]
    tl.store(grad_w2 + at, total.reshape(S_TILE, T_TILE, H_TILE), mask=here)


def _by_user(source: Tensor, *per_interest: Tensor) -> list[Tensor]:
    """Users counted by two sizes: ``source`` [outer, inner, D_s], the others [.., .., K, D]."""
    if source.dim() == 2:
        return [source.unsqueeze(1), *(t.unsqueeze(1) for t in per_interest)]
    return [source, *(t.unsqueeze(2) for t in per_interest)]


def _tiles(k: int, d_source: int, hidden: int) -> dict[str, int]:
    """Tiles whose users, interests and hidden units make at most 8192 values in registers."""
    k_tile = min(padded(k), 16)
    return {
        "USERS": 32 if k_tile == 1 else 16,
        "K_TILE": k_tile,
        "H_TILE": min(padded(hidden, 16), 32 if k_tile == 16 else 64),
        "S_TILE": min(padded(d_source, 16), 64),
        "num_warps": 8,
    }


def interest_bridge(
    interests: Tensor, source: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Vectors ``[B, K, D_t]``."""
    d_source, d_target = source.shape[-1], b2.shape[0] // source.shape[-1]
    source, interests = _by_user(source, interests)
    outer, inner, k, d_interest = interests.shape
    hidden = w1.shape[0]
    tiles = _tiles(k, d_source, hidden)
    chunked = hidden > tiles["H_TILE"]
    # Sums over several tiles of hidden units stay in float32 between them.
    dtype = torch.float32 if chunked else interests.dtype
    out = interests.new_empty(outer, inner * k, d_target, dtype=dtype)
    blocks = triton.cdiv(outer * inner, tiles["USERS"]), triton.cdiv(k, tiles["K_TILE"])
    columns = triton.cdiv(d_target, max(1, _PROGRAMS // max(1, blocks[0] * blocks[1])))
    launch(
        _interest_bridge_forward_kernel,
        (*blocks, triton.cdiv(d_target, columns)),
        interests,
        source,
        w1.contiguous(),
        b1.contiguous(),
        w2,
        b2.contiguous(),
        out,
        outer * inner,
        inner,
        columns,
        *interests.stride(),
        *source.stride(),
        *w2.stride(),
        k,
        d_interest,
        d_source,
        d_target,
        hidden,
        **tiles,
    )
    return out.to(interests.dtype)


def _w2_backward(grad: Tensor, source: Tensor, hidden_rows: Tensor, w2: Tensor) -> Tensor:
    grad_w2 = w2.new_empty(w2.shape)
    outer, inner, k, d_target = grad.shape
    users, hidden, d_source = outer * inner, hidden_rows.shape[1], source.shape[-1]
    h_tile = min(padded(hidden, 16), 64)
    s_tile = min(padded(d_source, 16), 128)
    t_tile = 1 if k == 1 else min(padded(d_target), 2)
    blocks = triton.cdiv(d_target, t_tile) * triton.cdiv(hidden, h_tile)
    programs = blocks * triton.cdiv(d_source, s_tile)
    count = max(1, min(_PROGRAMS // programs, triton.cdiv(users, 64)))
    parts = grad_w2
    if count > 1:
        parts = grad_w2.new_empty(count, grad_w2.numel(), dtype=torch.float32)
    launch(
        _w2_backward_kernel,
        (blocks, triton.cdiv(d_source, s_tile), count),
        grad,
        source,
        hidden_rows,
        parts,
        users,
        inner,
        *grad.stride(),
        *source.stride(),
        k,
        d_source,
        d_target,
        hidden,
        USERS=16,
        S_TILE=s_tile,
        T_TILE=t_tile,
        H_TILE=h_tile,
        num_warps=8,
        maxnreg=MOST_REGISTERS,
    )
    if count > 1:
        add_parts(parts, [grad_w2])
    return grad_w2


def interest_bridge_backward(
    grad: Tensor,
    interests: Tensor,
    source: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of the six inputs, empty where bit i of ``needs`` is not set."""
    inputs = (interests, source, w1, b1, w2, b2)
    grads = [t.new_empty(0) for t in inputs]
    d_source, d_target = source.shape[-1], b2.shape[0] // source.shape[-1]
    source, interests, grad = _by_user(source, interests, grad)
    outer, inner, k, d_interest = interests.shape
    users, hidden = outer * inner, w1.shape[0]
    w1, b1, b2 = w1.contiguous(), b1.contiguous(), b2.contiguous()
    hidden_rows = interests.new_empty(users * k, hidden, dtype=torch.float32)
    grad_rows = torch.empty_like(hidden_rows)
    tiles = _tiles(k, d_source, hidden)
    launch(
        _hidden_backward_kernel,
        (
            triton.cdiv(users, tiles["USERS"]),
            triton.cdiv(k, tiles["K_TILE"]),
            triton.cdiv(hidden, tiles["H_TILE"]),
        ),
        grad,
        interests,
        source,
        w1,
        b1,
        w2,
        hidden_rows,
        grad_rows,
        users,
        inner,
        *grad.stride(),
        *interests.stride(),
        *source.stride(),
        *w2.stride(),
        k,
        d_interest,
        d_source,
        d_target,
        hidden,
        maxnreg=MOST_REGISTERS if d_source <= 64 and w2.element_size() == 2 else None,
        **tiles,
    )
    if needs & 1:
        grads[0] = inputs[0].new_empty(inputs[0].shape)
        rows_tile, i_tile = 64, min(padded(d_interest, 16), 64)
        launch(
            _interests_backward_kernel,
            (triton.cdiv(users * k, rows_tile), triton.cdiv(d_interest, i_tile)),
            grad_rows,
            w1,
            grads[0],
            users * k,
            d_interest,
            hidden,
            ROWS=rows_tile,
            I_TILE=i_tile,
            H_TILE=min(padded(hidden, 16), 32),
        )
    products = []
    if needs & 4:
        products.append((2, grad_rows, interests.reshape(users * k, d_interest)))
    if needs & 8:
        products.append((3, None, grad_rows))
    if needs & (2 | 32):
        grad_sum = grad.sum(2, dtype=torch.float32).reshape(users, d_target).contiguous()
    if needs & 32:
        products.append((5, source.reshape(users, d_source), grad_sum))
    if needs & 2:
        grads[1] = inputs[1].new_empty(inputs[1].shape)
        launch(
            _source_backward_kernel,
            (triton.cdiv(users, tiles["USERS"]), triton.cdiv(d_source, tiles["S_TILE"])),
            grad,
            grad_sum,
            hidden_rows,
            w2,
            b2,
            grads[1],
            users,
            inner,
            *grad.stride(),
            *w2.stride(),
            k,
            d_source,
            d_target,
            hidden,
            T_TILE=min(padded(d_target, 16), 32),
            **tiles,
            # With a wider source it is having them all that spills.
            maxnreg=MOST_REGISTERS if d_source <= 64 else None,
        )
    if needs & 16:
        grads[4] = _w2_backward(grad, source, hidden_rows, w2)
    rows = [
        (None if left is None else left.float().unsqueeze(1), right.float().unsqueeze(1))
        for _, left, right in products
    ]
    for (i, *_), found in zip(products, outer_sums(rows, b1.dtype), strict=True):
        grads[i] = found.view(inputs[i].shape)
    return tuple(grads)
