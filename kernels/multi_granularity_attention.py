"""Multi-granularity attention: two heads over the same interests, which a program reads once.

The tiles are those of `target_attention`, and so is what a head does. A gate mixes the two outputs:

    out = (1 - gate) fine + gate coarse        gate = sigmoid(w . [item; prototype] + b)

Backward, a head's output meets the output's gradient in the interests, as ``sum_k a_k (g W_V) .
u_k + g . b_V``, so the gate's gradient costs no projection of its own. What the gradients of the
parameters are sums of is one row per candidate, and all sums share a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._tiles import bound
from .target_attention import (
    contiguous,
    dots,
    interest_offsets,
    interest_weights,
    interests_gradient,
    load_rows,
    score_gradients,
    tile_rows,
    tiling,
    times_weight,
    times_weight_transposed,
    weighted_sum,
    with_candidates,
)
from .weight_gradients import outer_sums


@triton.jit
def load_vector(vector, start, D: tl.constexpr, CHUNK: tl.constexpr):
    """Elements ``start ..`` of a parameter as a row [1, CHUNK], in float32."""
    d = start + tl.arange(0, CHUNK)[None, :]
    return tl.load(vector + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def shares(item, prototype, fusion_weight, fusion_bias, D: tl.constexpr):
    """What the fine and the coarse attention count, [R, 1], for rows of items and prototypes."""
    weighted = item * load_vector(fusion_weight, 0, D, item.shape[1])
    weighted += prototype * load_vector(fusion_weight + D, 0, D, item.shape[1])
    logit = tl.sum(weighted, 1, keep_dims=True) + tl.load(fusion_bias).to(tl.float32)
    return tl.sigmoid(-logit), tl.sigmoid(logit)


@triton.jit
def attend(
    query, here, stride_d, key_weight, interests, K: tl.constexpr, D: tl.constexpr,
    D_TILE: tl.constexpr, CHUNK: tl.constexpr, STORAGE: tl.constexpr,
):  # fmt: skip
    """Folded queries [R, D_TILE], scores and weights [R, K_TILE] of a head."""
    folded = times_weight(query, here, stride_d, key_weight, D, D_TILE, CHUNK)
    score = dots(folded, interests, STORAGE)
    present = tl.arange(0, score.shape[1])[None, :] < K
    return folded, score, interest_weights(score, present, 1.0, 1, False)


@triton.jit
def projected(pooled, value_weight, value_bias, start, D: tl.constexpr, CHUNK: tl.constexpr):
    """Elements ``start ..`` of a head's output from its weighted sums of the interests."""
    value = times_weight_transposed(pooled, value_weight, start, D, CHUNK)
    return value + load_vector(value_bias, start, D, CHUNK)


@triton.jit
def attend_backward(
    grad, here, stride_d, share, folded, score, weight, value_weight, interests,
    D: tl.constexpr, D_TILE: tl.constexpr, CHUNK: tl.constexpr, STORAGE: tl.constexpr,
):  # fmt: skip
    """Gradients of a head's weighted sums and scores, and its output's dot with ``grad``.

    ``grad`` [R, 1] points to the gradients of what the heads give together, of which this one gives
    its ``share``. The dot [R, 1] leaves out the value bias.
    """
    pooled_grad = times_weight(grad, here, stride_d, value_weight, D, D_TILE, CHUNK)
    weight_grad = dots(pooled_grad, interests, STORAGE)
    dot = tl.sum(weight * weight_grad, 1, keep_dims=True)
    score_grad = score_gradients(share * weight_grad, weight, score, 1.0, 1, False)
    return share * pooled_grad, score_grad, dot


@triton.jit
def store_part(row, part, value, here, D: tl.constexpr):
    """Part ``part`` of D numbers in rows that begin at ``row`` [R, 1]."""
    d = tl.arange(0, value.shape[1])[None, :]
    tl.store(row + part * D + d, value, mask=here & (d < D))


@triton.jit
def store_rows(
    row, here, item, prototype, grad, fine, coarse, gate_grad,
    fine_pooled, coarse_pooled, fine_folded_grad, coarse_folded_grad, D: tl.constexpr,
):  # fmt: skip
    """The rows that `fusion_products` takes apart."""
    store_part(row, 0, item, here, D)
    store_part(row, 1, fine_folded_grad, here, D)
    store_part(row, 2, fine * grad, here, D)
    store_part(row, 3, fine_pooled, here, D)
    store_part(row, 4, prototype, here, D)
    store_part(row, 5, coarse_folded_grad, here, D)
    store_part(row, 6, coarse * grad, here, D)
    store_part(row, 7, coarse_pooled, here, D)
    store_part(row, 8, gate_grad * item, here, D)
    store_part(row, 9, gate_grad * prototype, here, D)
    tl.store(row + 10 * D, gate_grad, mask=here)


@triton.jit(do_not_specialize=["users"])
def _multi_granularity_attention_forward_kernel(
    item,
    prototype,
    interests,
    fine_key_weight,
    fine_value_weight,
    fine_value_bias,
    coarse_key_weight,
    coarse_value_weight,
    coarse_value_bias,
    fusion_weight,
    fusion_bias,
    out,
    gate,
    users,
    candidates,
    item_stride_b,
    item_stride_c,
    item_stride_d,
    prototype_stride_b,
    prototype_stride_c,
    prototype_stride_d,
    interests_stride_b,
    interests_stride_k,
    interests_stride_d,
    K: tl.constexpr,
    D: tl.constexpr,
    USERS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    K_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    STORAGE: tl.constexpr = item.dtype.element_ty
    first_candidate = tl.program_id(1).to(tl.int64) * CANDIDATES
    user, candidate, here = tile_rows(first_candidate, users, candidates, USERS, CANDIDATES)
    offsets, in_interests = interest_offsets(
        users, interests_stride_b, interests_stride_k, interests_stride_d,
        K, D, USERS, CANDIDATES, K_TILE, D_TILE,
    )  # fmt: skip
    u = tl.load(interests + offsets, mask=in_interests, other=0.0)
    item += user * item_stride_b + candidate * item_stride_c
    prototype += user * prototype_stride_b + candidate * prototype_stride_c
    fine, coarse = shares(
        load_rows(item, here, item_stride_d, D, D_TILE),
        load_rows(prototype, here, prototype_stride_d, D, D_TILE),
        fusion_weight, fusion_bias, D,
    )  # fmt: skip
    _, _, weight = attend(
        item, here, item_stride_d, fine_key_weight, u, K, D, D_TILE, CHUNK, STORAGE
    )
    fine_pooled = weighted_sum(weight, u, STORAGE)
    _, _, weight = attend(
        prototype, here, prototype_stride_d, coarse_key_weight, u, K, D, D_TILE, CHUNK, STORAGE
    )
    coarse_pooled = weighted_sum(weight, u, STORAGE)

    row = user * candidates + candidate
    tl.store(gate + row, coarse, mask=here)
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)[None, :]
        value = fine * projected(fine_pooled, fine_value_weight, fine_value_bias, start, D, CHUNK)
        value += coarse * projected(
            coarse_pooled, coarse_value_weight, coarse_value_bias, start, D, CHUNK
        )
        tl.store(out + row * D + d, value, mask=here & (d < D))


@triton.jit(do_not_specialize=["users"])
def _multi_granularity_attention_backward_kernel(
    grad,
    grad_gate,
    item,
    prototype,
    interests,
    fine_key_weight,
    fine_value_weight,
    fine_value_bias,
    coarse_key_weight,
    coarse_value_weight,
    coarse_value_bias,
    fusion_weight,
    fusion_bias,
    item_grad,
    prototype_grad,
    interests_grad,
    rows,
    users,
    candidates,
    grad_stride_b,
    grad_stride_c,
    grad_stride_d,
    grad_gate_stride_b,
    grad_gate_stride_c,
    item_stride_b,
    item_stride_c,
    item_stride_d,
    prototype_stride_b,
    prototype_stride_c,
    prototype_stride_d,
    interests_stride_b,
    interests_stride_k,
    interests_stride_d,
    K: tl.constexpr,
    D: tl.constexpr,
    USERS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    K_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    STORAGE: tl.constexpr = item.dtype.element_ty
    offsets, in_interests = interest_offsets(
        users, interests_stride_b, interests_stride_k, interests_stride_d,
        K, D, USERS, CANDIDATES, K_TILE, D_TILE,
    )  # fmt: skip
    u = tl.load(interests + offsets, mask=in_interests, other=0.0)
    u_grad = tl.zeros(u.shape, tl.float32)
    for first_candidate in range(0, bound(candidates), CANDIDATES):
        user, candidate, here = tile_rows(first_candidate, users, candidates, USERS, CANDIDATES)
        row = user * candidates + candidate
        v = item + user * item_stride_b + candidate * item_stride_c
        p = prototype + user * prototype_stride_b + candidate * prototype_stride_c
        g = grad + user * grad_stride_b + candidate * grad_stride_c
        item_rows = load_rows(v, here, item_stride_d, D, D_TILE)
        prototype_rows = load_rows(p, here, prototype_stride_d, D, D_TILE)
        grad_rows = load_rows(g, here, grad_stride_d, D, D_TILE)
        fine, coarse = shares(item_rows, prototype_rows, fusion_weight, fusion_bias, D)

        biases = load_vector(coarse_value_bias, 0, D, D_TILE)
        biases -= load_vector(fine_value_bias, 0, D, D_TILE)
        gate_grad = tl.sum(grad_rows * biases, 1, keep_dims=True)
        if grad_gate is not None:
            more = grad_gate + user * grad_gate_stride_b + candidate * grad_gate_stride_c
            gate_grad += tl.load(more, mask=here, other=0.0).to(tl.float32)

        folded, score, weight = attend(
            v, here, item_stride_d, fine_key_weight, u, K, D, D_TILE, CHUNK, STORAGE
        )
        pooled_grad, score_grad, dot = attend_backward(
            g, here, grad_stride_d, fine, folded, score, weight, fine_value_weight, u,
            D, D_TILE, CHUNK, STORAGE,
        )  # fmt: skip
        gate_grad -= dot
        fine_pooled = weighted_sum(weight, u, STORAGE)
        fine_folded_grad = weighted_sum(score_grad, u, STORAGE)
        if interests_grad is not None:
            u_grad += interests_gradient(weight, pooled_grad, score_grad, folded, u, STORAGE)

        folded, score, weight = attend(
            p, here, prototype_stride_d, coarse_key_weight, u, K, D, D_TILE, CHUNK, STORAGE
        )
        pooled_grad, score_grad, dot = attend_backward(
            g, here, grad_stride_d, coarse, folded, score, weight, coarse_value_weight, u,
            D, D_TILE, CHUNK, STORAGE,
        )  # fmt: skip
        gate_grad += dot
        coarse_pooled = weighted_sum(weight, u, STORAGE)
        coarse_folded_grad = weighted_sum(score_grad, u, STORAGE)
        if interests_grad is not None:
            u_grad += interests_gradient(weight, pooled_grad, score_grad, folded, u, STORAGE)

        gate_grad *= fine * coarse
        for start in range(0, D, CHUNK):
            d = start + tl.arange(0, CHUNK)[None, :]
            if item_grad is not None:
                value = times_weight_transposed(fine_folded_grad, fine_key_weight, start, D, CHUNK)
                value += gate_grad * load_vector(fusion_weight, start, D, CHUNK)
                tl.store(item_grad + row * D + d, value, mask=here & (d < D))
            if prototype_grad is not None:
                value = times_weight_transposed(
                    coarse_folded_grad, coarse_key_weight, start, D, CHUNK
                )
                value += gate_grad * load_vector(fusion_weight + D, start, D, CHUNK)
                tl.store(prototype_grad + row * D + d, value, mask=here & (d < D))
        if rows is not None:
            store_rows(
                rows + row * (10 * D + 1), here, item_rows, prototype_rows, grad_rows,
                fine, coarse, gate_grad, fine_pooled, coarse_pooled,
                fine_folded_grad, coarse_folded_grad, D,
            )  # fmt: skip
    if interests_grad is not None:
        offsets, _ = interest_offsets(
            users, K * D, D, 1, K, D, USERS, CANDIDATES, K_TILE, D_TILE
        )  # fmt: skip
        tl.store(interests_grad + offsets, u_grad, mask=in_interests)


def _tiles(k: int, d: int, candidates: int) -> dict[str, int]:
    """Those of one head, with fewer users and more warps, because two heads keep more at a time."""
    tiles = tiling(k, d, candidates)
    per_user = tiles["K_TILE"] * tiles["D_TILE"]
    if tiles["CANDIDATES"] == 1:
        # A program reads the weights once for all its users, and small weights are read fast.
        most = max(1, min(tiles["USERS"], 4096 // per_user))
        tiles["USERS"] = min(most, tiles["D_TILE"] // 8)
        tiles["num_warps"] = min(8, max(1, tiles["USERS"] * per_user // 512))
    else:
        tiles["num_warps"] = min(8, 2 * tiles["num_warps"])
    tiles["CHUNK"] = min(tiles["CHUNK"], max(16, min(32, 2048 // tiles["D_TILE"])))
    # Left to itself, ptxas spills a few bytes to fit one more block on a multiprocessor.
    return {**tiles, "maxnreg": 255}


def fusion_products(rows: Tensor, d: int) -> list[tuple[Tensor | None, Tensor]]:
    """What `outer_sums` makes the gradients of the ten parameters of, from rows ``[R, 1, ..]``."""
    *parts, gate_items, gate = rows.split([d] * 8 + [2 * d, 1], 2)
    products = []
    for query, folded_grad, grad, pooled in (parts[:4], parts[4:]):
        # The key bias cancels: its gradient is the sum of no rows.
        products += [(query, folded_grad), (None, grad[:0]), (grad, pooled), (None, grad)]
    return [*products, (None, gate_items), (None, gate)]


def multi_granularity_attention(
    item: Tensor,
    prototype: Tensor,
    interests: Tensor,
    fine_key_weight: Tensor,
    fine_key_bias: Tensor,
    fine_value_weight: Tensor,
    fine_value_bias: Tensor,
    coarse_key_weight: Tensor,
    coarse_key_bias: Tensor,
    coarse_value_weight: Tensor,
    coarse_value_bias: Tensor,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output like ``item`` and gate ``[B(,C)]``, both in the dtype of the interests."""
    out = interests.new_empty(item.shape)
    gate = interests.new_empty(item.shape[:-1])
    k, d = interests.shape[1:]
    item, prototype = with_candidates(item, 3), with_candidates(prototype, 3)
    users, candidates, _ = item.shape
    tiles = _tiles(k, d, candidates)
    launch(
        _multi_granularity_attention_forward_kernel,
        (triton.cdiv(users, tiles["USERS"]), triton.cdiv(candidates, tiles["CANDIDATES"])),
        item,
        prototype,
        interests,
        contiguous(fine_key_weight),
        contiguous(fine_value_weight),
        contiguous(fine_value_bias),
        contiguous(coarse_key_weight),
        contiguous(coarse_value_weight),
        contiguous(coarse_value_bias),
        contiguous(fusion_weight),
        fusion_bias,
        out,
        gate,
        users,
        candidates,
        *item.stride(),
        *prototype.stride(),
        *interests.stride(),
        k,
        d,
        **tiles,
    )
    return out, gate


def multi_granularity_attention_backward(
    grad: Tensor,
    grad_gate: Tensor | None,
    item: Tensor,
    prototype: Tensor,
    interests: Tensor,
    fine_key_weight: Tensor,
    fine_key_bias: Tensor,
    fine_value_weight: Tensor,
    fine_value_bias: Tensor,
    coarse_key_weight: Tensor,
    coarse_key_bias: Tensor,
    coarse_value_weight: Tensor,
    coarse_value_bias: Tensor,
    fusion_weight: Tensor,
    fusion_bias: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of the thirteen inputs, empty where bit i of ``needs`` is not set."""
    tensors = (item, prototype, interests)
    parameters = (
        fine_key_weight, fine_key_bias, fine_value_weight, fine_value_bias, coarse_key_weight,
        coarse_key_bias, coarse_value_weight, coarse_value_bias, fusion_weight, fusion_bias,
    )  # fmt: skip
    grads = [t.new_empty(t.shape) if needs >> i & 1 else None for i, t in enumerate(tensors)]
    k, d = interests.shape[1:]
    item, prototype = with_candidates(item, 3), with_candidates(prototype, 3)
    grad = with_candidates(grad, 3)
    if grad_gate is not None:
        grad_gate = with_candidates(grad_gate, 2)
    users, candidates, _ = item.shape
    rows = None
    if needs >> 3:
        rows = item.new_empty(users * candidates, 1, 10 * d + 1, dtype=torch.float32)
    tiles = _tiles(k, d, candidates)
    launch(
        _multi_granularity_attention_backward_kernel,
        (triton.cdiv(users, tiles["USERS"]),),
        grad,
        grad_gate,
        item,
        prototype,
        interests,
        contiguous(fine_key_weight),
        contiguous(fine_value_weight),
        contiguous(fine_value_bias),
        contiguous(coarse_key_weight),
        contiguous(coarse_value_weight),
        contiguous(coarse_value_bias),
        contiguous(fusion_weight),
        fusion_bias,
        *grads,
        rows,
        users,
        candidates,
        *grad.stride(),
        *((0, 0) if grad_gate is None else grad_gate.stride()),
        *item.stride(),
        *prototype.stride(),
        *interests.stride(),
        k,
        d,
        **tiles,
    )
    found = [item.new_empty(0) if g is None else g for g in grads]
    products = [] if rows is None else fusion_products(rows, d)
    return (*found, *parameter_gradients(products, parameters, needs >> 3))


def parameter_gradients(
    products: list[tuple[Tensor | None, Tensor]], parameters: tuple[Tensor, ...], needs: int
) -> list[Tensor]:
    """The sums of the products, like the parameters; empty where bit i of ``needs`` is not set."""
    wanted = [i for i in range(len(parameters)) if needs >> i & 1]
    grads = [p.new_empty(0) for p in parameters]
    sums = outer_sums([products[i] for i in wanted], parameters[0].dtype)
    for i, found in zip(wanted, sums, strict=True):
        grads[i] = found.view(parameters[i].shape)
    return grads
