"""Target attention: the projections stand on the query and on the weighted sum of the interests.

    folded = query W_K      score_k = folded . u_k      out = W_V sum_k a_k u_k + b_V

No keys or values are formed: a candidate costs 2 (D + K) D multiply-adds. A program holds interests
in registers, where they are read once for all that follows. With few candidates they are those of a
tile of users, and a row of the other tiles is a user: products with the interests are elementwise.
With many candidates they are those of one user, a row is a candidate, and the products are matrix
products. Forward, the tiles of candidates are programs of their own. Backward, one program goes
over them in order, so that the gradient of the interests is a sum in its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import MOST_REGISTERS, launch
from ._tiles import bound, padded, product
from .weight_gradients import outer_sums

_LOWEST = tl.constexpr(-3e38)

_MANY_CANDIDATES = 16
_TILE_ELEMENTS = 8192
_WEIGHT_ELEMENTS = 4096


@triton.jit
def tile_rows(
    first_candidate, users, candidates, USERS: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """User and candidate of the rows [R, 1] of a tile, of which one is the same for all of them."""
    row = tl.arange(0, USERS * CANDIDATES).to(tl.int64)[:, None]
    user = tl.program_id(0).to(tl.int64) * USERS + row // CANDIDATES
    candidate = first_candidate + row % CANDIDATES
    return user, candidate, (user < users) & (candidate < candidates)


@triton.jit
def interest_offsets(
    users,
    stride_b,
    stride_k,
    stride_d,
    K: tl.constexpr,
    D: tl.constexpr,
    USERS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    K_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """Where a program's interests are: [USERS, K_TILE, D_TILE], of one user [K_TILE, D_TILE]."""
    first_user = tl.program_id(0).to(tl.int64) * USERS
    k = tl.arange(0, K_TILE)[:, None]
    d = tl.arange(0, D_TILE)[None, :]
    offsets = first_user * stride_b + k.to(tl.int64) * stride_k + d.to(tl.int64) * stride_d
    here = (k < K) & (d < D)
    if CANDIDATES == 1:
        user = tl.arange(0, USERS).to(tl.int64)[:, None, None]
        offsets = user * stride_b + offsets[None]
        here = (first_user + user < users) & here[None]
    return offsets, here


@triton.jit
def dots(rows, interests, STORAGE: tl.constexpr):
    """``rows`` [R, D_TILE] times the interests of their users, [R, K_TILE]."""
    if len(interests.shape) == 3:
        result = tl.sum(rows[:, None, :] * interests.to(tl.float32), 2)
    else:
        result = product(rows, tl.trans(interests), STORAGE)
    return result


@triton.jit
def weighted_sum(weight, interests, STORAGE: tl.constexpr):
    """The interests of each row's user with ``weight`` [R, K_TILE], [R, D_TILE]."""
    if len(interests.shape) == 3:
        result = tl.sum(weight[:, :, None] * interests.to(tl.float32), 1)
    else:
        result = product(weight, interests, STORAGE)
    return result


@triton.jit
def _outer(weight, rows, interests, STORAGE: tl.constexpr):
    """``weight`` [R, K_TILE] outer ``rows`` [R, D_TILE], of the shape of the interests."""
    if len(interests.shape) == 3:
        result = weight[:, :, None] * rows[:, None, :]
    else:
        result = product(tl.trans(weight), rows, STORAGE)
    return result


@triton.jit
def load_rows(x, here, stride_d, D: tl.constexpr, D_TILE: tl.constexpr):
    """Vectors that begin at ``x`` [R, 1], in float32."""
    d = tl.arange(0, D_TILE)[None, :]
    offsets = d.to(tl.int64) * stride_d
    return tl.load(x + offsets, mask=here & (d < D), other=0.0).to(tl.float32)


@triton.jit
def _load_weight(weight, start, D: tl.constexpr, D_TILE: tl.constexpr, CHUNK: tl.constexpr):
    i = start + tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, D_TILE)[None, :]
    return tl.load(weight + i * D + d, mask=(i < D) & (d < D), other=0.0)


@triton.jit
def times_weight(
    x, here, stride_d, weight, D: tl.constexpr, D_TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """Vectors that begin at ``x`` [R, 1] times ``weight``, or themselves where there is none."""
    if weight is None:
        result = load_rows(x, here, stride_d, D, D_TILE)
    else:
        result = tl.zeros([x.shape[0], D_TILE], tl.float32)
        for start in range(0, D, CHUNK):
            i = start + tl.arange(0, CHUNK)[None, :]
            part = tl.load(x + i.to(tl.int64) * stride_d, mask=here & (i < D), other=0.0)
            w = _load_weight(weight, start, D, D_TILE, CHUNK)
            result += product(part, w, weight.dtype.element_ty)
    return result


@triton.jit
def times_weight_transposed(rows, weight, start, D: tl.constexpr, CHUNK: tl.constexpr):
    """Columns ``start ..`` of ``rows`` times the transpose of ``weight``, or of the rows."""
    if weight is None:
        result = rows
    else:
        w = _load_weight(weight, start, D, rows.shape[1], CHUNK)
        result = product(rows, tl.trans(w), weight.dtype.element_ty)
    return result


@triton.jit
def _whole_power(x, EXPONENT: tl.constexpr):
    y = tl.full(x.shape, 1.0, tl.float32)
    for _ in tl.static_range(EXPONENT):
        y *= x
    return y


@triton.jit
def interest_weights(score, present, scale, POWER: tl.constexpr, HARD: tl.constexpr):
    """Scores [R, K_TILE] to weights; absent interests weigh 0, also where all of them are."""
    logit = tl.where(present, scale * _whole_power(score, POWER), _LOWEST)
    if HARD:
        k = tl.arange(0, score.shape[1])[None, :]
        weight = tl.where(k == tl.argmax(logit, 1, keep_dims=True), 1.0, 0.0)
    else:
        weight = tl.exp(logit - tl.max(logit, 1, keep_dims=True))
    weight = tl.where(present, weight, 0.0)
    total = tl.sum(weight, 1, keep_dims=True)
    return weight / tl.where(total > 0, total, 1.0)


@triton.jit
def score_gradients(
    weight_grad, weight, score, scale, POWER: tl.constexpr, HARD: tl.constexpr
):  # fmt: skip
    """Gradients of the scores from those of the weights."""
    if HARD:
        grad = tl.zeros(score.shape, tl.float32)
    else:
        # Where one interest takes nearly all the weight, its gradient is nearly the mean. Without
        # it first, the little that is left of the others would be lost in a difference.
        k = tl.arange(0, score.shape[1])[None, :]
        heaviest = k == tl.argmax(weight, 1, keep_dims=True)
        centred = weight_grad - tl.sum(tl.where(heaviest, weight_grad, 0.0), 1, keep_dims=True)
        centred -= tl.sum(weight * centred, 1, keep_dims=True)
        grad = weight * centred * (scale * POWER * _whole_power(score, POWER - 1))
    return grad


@triton.jit
def interests_gradient(weight, pooled_grad, score_grad, folded, interests, STORAGE: tl.constexpr):
    """What the rows give to the gradient of their users' interests, as values and as keys."""
    values = _outer(weight, pooled_grad, interests, STORAGE)
    return values + _outer(score_grad, folded, interests, STORAGE)


@triton.jit
def _load_present(
    capsule_mask, user, users, stride_b, stride_k, K: tl.constexpr, K_TILE: tl.constexpr
):  # fmt: skip
    """Which interests the users of the rows have, [R, K_TILE] or the same for all [1, K_TILE]."""
    k = tl.arange(0, K_TILE)[None, :]
    present = k < K
    if capsule_mask is not None:
        offsets = user * stride_b + k.to(tl.int64) * stride_k
        present = tl.load(capsule_mask + offsets, mask=present & (user < users), other=0) != 0
    return present


@triton.jit(do_not_specialize=["users"])
def _target_attention_forward_kernel(
    query,
    interests,
    key_weight,
    value_weight,
    value_bias,
    capsule_mask,
    out,
    weights,
    users,
    candidates,
    scale,
    query_stride_b,
    query_stride_c,
    query_stride_d,
    interests_stride_b,
    interests_stride_k,
    interests_stride_d,
    mask_stride_b,
    mask_stride_k,
    K: tl.constexpr,
    D: tl.constexpr,
    POWER: tl.constexpr,
    HARD: tl.constexpr,
    USERS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    K_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    STORAGE: tl.constexpr = query.dtype.element_ty
    OUT_CHUNK: tl.constexpr = D_TILE if value_weight is None else CHUNK
    first_candidate = tl.program_id(1).to(tl.int64) * CANDIDATES
    user, candidate, here = tile_rows(first_candidate, users, candidates, USERS, CANDIDATES)
    offsets, in_interests = interest_offsets(
        users, interests_stride_b, interests_stride_k, interests_stride_d,
        K, D, USERS, CANDIDATES, K_TILE, D_TILE,
    )  # fmt: skip
    u = tl.load(interests + offsets, mask=in_interests, other=0.0)
    present = _load_present(capsule_mask, user, users, mask_stride_b, mask_stride_k, K, K_TILE)
    query += user * query_stride_b + candidate * query_stride_c
    folded = times_weight(query, here, query_stride_d, key_weight, D, D_TILE, CHUNK)
    weight = interest_weights(dots(folded, u, STORAGE), present, scale, POWER, HARD)
    pooled = weighted_sum(weight, u, STORAGE)

    row = user * candidates + candidate
    k = tl.arange(0, K_TILE)[None, :]
    tl.store(weights + row * K + k, weight, mask=here & (k < K))
    for start in range(0, D, OUT_CHUNK):
        d = start + tl.arange(0, OUT_CHUNK)[None, :]
        value = times_weight_transposed(pooled, value_weight, start, D, CHUNK)
        if value_bias is not None:
            bias = tl.load(value_bias + d, mask=d < D, other=0.0).to(tl.float32)
            value += tl.where(tl.max(weight, 1, keep_dims=True) > 0, bias, 0.0)
        tl.store(out + row * D + d, value, mask=here & (d < D))


@triton.jit(do_not_specialize=["users"])
def _target_attention_backward_kernel(
    grad,
    grad_weights,
    query,
    interests,
    key_weight,
    value_weight,
    capsule_mask,
    query_grad,
    interests_grad,
    query_rows,
    folded_rows,
    grad_rows,
    pooled_rows,
    users,
    candidates,
    scale,
    grad_stride_b,
    grad_stride_c,
    grad_stride_d,
    grad_weights_stride_b,
    grad_weights_stride_c,
    grad_weights_stride_k,
    query_stride_b,
    query_stride_c,
    query_stride_d,
    interests_stride_b,
    interests_stride_k,
    interests_stride_d,
    mask_stride_b,
    mask_stride_k,
    K: tl.constexpr,
    D: tl.constexpr,
    POWER: tl.constexpr,
    HARD: tl.constexpr,
    USERS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    K_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    STORAGE: tl.constexpr = query.dtype.element_ty
    KEY_CHUNK: tl.constexpr = D_TILE if key_weight is None else CHUNK
    d = tl.arange(0, D_TILE)[None, :]
    offsets, in_interests = interest_offsets(
        users, interests_stride_b, interests_stride_k, interests_stride_d,
        K, D, USERS, CANDIDATES, K_TILE, D_TILE,
    )  # fmt: skip
    u = tl.load(interests + offsets, mask=in_interests, other=0.0)
    u_grad = tl.zeros(u.shape, tl.float32)
    for first_candidate in range(0, bound(candidates), CANDIDATES):
        user, candidate, here = tile_rows(first_candidate, users, candidates, USERS, CANDIDATES)
        present = _load_present(capsule_mask, user, users, mask_stride_b, mask_stride_k, K, K_TILE)
        row = user * candidates + candidate
        in_rows = here & (d < D)
        q = query + user * query_stride_b + candidate * query_stride_c
        g = grad + user * grad_stride_b + candidate * grad_stride_c

        folded = times_weight(q, here, query_stride_d, key_weight, D, D_TILE, CHUNK)
        score = dots(folded, u, STORAGE)
        weight = interest_weights(score, present, scale, POWER, HARD)
        pooled_grad = times_weight(g, here, grad_stride_d, value_weight, D, D_TILE, CHUNK)
        weight_grad = dots(pooled_grad, u, STORAGE)
        if grad_weights is not None:
            more = grad_weights + user * grad_weights_stride_b + candidate * grad_weights_stride_c
            weight_grad += load_rows(more, here, grad_weights_stride_k, K, K_TILE)
        score_grad = score_gradients(weight_grad, weight, score, scale, POWER, HARD)

        folded_grad = weighted_sum(score_grad, u, STORAGE)
        if query_grad is not None:
            for start in range(0, D, KEY_CHUNK):
                i = start + tl.arange(0, KEY_CHUNK)[None, :]
                value = times_weight_transposed(folded_grad, key_weight, start, D, CHUNK)
                tl.store(query_grad + row * D + i, value, mask=here & (i < D))
        if folded_rows is not None:
            tl.store(folded_rows + row * D + d, folded_grad, mask=in_rows)
        if query_rows is not None:
            x = load_rows(q, here, query_stride_d, D, D_TILE)
            tl.store(query_rows + row * D + d, x, mask=in_rows)
        if pooled_rows is not None:
            tl.store(pooled_rows + row * D + d, weighted_sum(weight, u, STORAGE), mask=in_rows)
        if grad_rows is not None:
            # Without any interest the output is 0, whatever the bias.
            x = load_rows(g, here, grad_stride_d, D, D_TILE)
            x = tl.where(tl.max(weight, 1, keep_dims=True) > 0, x, 0.0)
            tl.store(grad_rows + row * D + d, x, mask=in_rows)
        # Last, so that the products before it have its registers.
        if interests_grad is not None:
            u_grad += interests_gradient(weight, pooled_grad, score_grad, folded, u, STORAGE)
    if interests_grad is not None:
        offsets, _ = interest_offsets(
            users, K * D, D, 1, K, D, USERS, CANDIDATES, K_TILE, D_TILE
        )  # fmt: skip
        tl.store(interests_grad + offsets, u_grad, mask=in_interests)


def tiling(k: int, d: int, candidates: int, backward: bool = False) -> dict[str, int]:
    """Tiles that stay in registers, and warps enough to hold them.

    Backward keeps a gradient of the interests from candidate to candidate: room for half as many.
    """
    many = candidates >= _MANY_CANDIDATES
    k_tile, d_tile = padded(k, 16 if many else 1), padded(d, 16)
    users = 1 if many else max(1, min(16, _TILE_ELEMENTS // (k_tile * d_tile)))
    candidate_tile = 32 if many else 1
    elements = max(users * k_tile, 2 * k_tile, candidate_tile) * d_tile
    # Float32 products hold whole rows and columns in registers: those of many rows must be short.
    weight_elements = _WEIGHT_ELEMENTS // (2 if many else 1)
    if backward and candidates > 1:
        users, candidate_tile = max(1, users // 2), max(1, candidate_tile // 2)
    return {
        "USERS": users,
        "CANDIDATES": candidate_tile,
        "K_TILE": k_tile,
        "D_TILE": d_tile,
        "CHUNK": min(d_tile, max(16, weight_elements // d_tile)),
        "num_warps": min(8, max(1, elements // 512)),
        "maxnreg": MOST_REGISTERS,
    }


def with_candidates(tensor: Tensor, dims: int) -> Tensor:
    """``tensor`` with its second dimension, that of candidates; ``dims`` counts it."""
    return tensor if tensor.dim() == dims else tensor.unsqueeze(1)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it."""
    return None if tensor is None else tensor.contiguous()


def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of a tensor that may be missing."""
    return (0,) * dims if tensor is None else tensor.stride()


def target_attention(
    query: Tensor,
    interests: Tensor,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    capsule_mask: Tensor | None,
    scale: float,
    power: int,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    """Output like ``query`` and weights ``[B,(C,)K]``; the key bias cancels."""
    k, d = interests.shape[1:]
    out = query.new_empty(query.shape)
    weights = query.new_empty(*query.shape[:-1], k)
    query = with_candidates(query, 3)
    users, candidates, _ = query.shape
    tiles = tiling(k, d, candidates)
    launch(
        _target_attention_forward_kernel,
        (triton.cdiv(users, tiles["USERS"]), triton.cdiv(candidates, tiles["CANDIDATES"])),
        query,
        interests,
        contiguous(key_weight),
        contiguous(value_weight),
        contiguous(value_bias),
        capsule_mask,
        out,
        weights,
        users,
        candidates,
        scale,
        *query.stride(),
        *interests.stride(),
        *strides(capsule_mask, 2),
        k,
        d,
        power,
        hard,
        **tiles,
    )
    return out, weights


def target_attention_backward(
    grad: Tensor,
    grad_weights: Tensor | None,
    query: Tensor,
    interests: Tensor,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    capsule_mask: Tensor | None,
    scale: float,
    power: int,
    hard: bool,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of the six floating inputs, empty where bit i of ``needs`` is not set."""
    inputs = (query, interests, key_weight, key_bias, value_weight, value_bias)
    wanted = [t is not None and bool(needs >> i & 1) for i, t in enumerate(inputs)]
    grads = [
        t.new_empty(t.shape) if t is not None and want else query.new_empty(0)
        for t, want in zip(inputs, wanted, strict=True)
    ]
    k, d = interests.shape[1:]
    query, grad = with_candidates(query, 3), with_candidates(grad, 3)
    if grad_weights is not None:
        grad_weights = with_candidates(grad_weights, 3)
    users, candidates, _ = query.shape

    def rows(want: bool) -> Tensor | None:
        return query.new_empty(users * candidates, 1, d, dtype=torch.float32) if want else None

    # The others are the inputs themselves.
    half = query.dtype != torch.float32
    query_rows, folded_rows = rows(wanted[2] and half), rows(wanted[2])
    grad_rows = rows((wanted[4] or wanted[5]) and (half or capsule_mask is not None))
    pooled_rows = rows(wanted[4])
    tiles = tiling(k, d, candidates, True)
    launch(
        _target_attention_backward_kernel,
        (triton.cdiv(users, tiles["USERS"]),),
        grad,
        grad_weights,
        query,
        interests,
        contiguous(key_weight),
        contiguous(value_weight),
        capsule_mask,
        grads[0] if wanted[0] else None,
        grads[1] if wanted[1] else None,
        query_rows,
        folded_rows,
        grad_rows,
        pooled_rows,
        users,
        candidates,
        scale,
        *grad.stride(),
        *strides(grad_weights, 3),
        *query.stride(),
        *interests.stride(),
        *strides(capsule_mask, 2),
        k,
        d,
        power,
        hard,
        **tiles,
    )
    query_rows = query.reshape(-1, 1, d) if query_rows is None else query_rows
    grad_rows = grad.reshape(-1, 1, d) if grad_rows is None else grad_rows
    products = {2: (query_rows, folded_rows), 4: (grad_rows, pooled_rows), 5: (None, grad_rows)}
    summed = [i for i in products if wanted[i]]
    sums = outer_sums([products[i] for i in summed], query.dtype)
    for i, found in zip(summed, sums, strict=True):
        grads[i] = found.view(inputs[i].shape)
    grads[3].zero_()
    return tuple(grads)
