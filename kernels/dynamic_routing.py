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

Jagged histories are those of one long user, in whose rows every program finds its own by offsets.

Replaced logits need the last capsules alone in ``back``; those that add to the coupling read it
from where the last iteration left it. Normalised votes divide the agreement by their lengths. With
a weight these are products of all inputs, formed once, by a kernel of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._routing import (
    ACCUMULATE,
    CAPSULES,
    COUPLING,
    FILL_BEFORE,
    IGNORE,
    LOWEST,
    PADDING_LOGIT,
    REPLACE,
    SHARED,
    ZERO_AFTER,
    RoutingOptions,
    history_of,
    input_strides,
    inverse_norms_of,
    load_inputs,
    load_inverse_norms,
    load_logits,
    load_real,
    logit_strides,
    mask_strides,
    offsets_or_mask,
    squared_lengths,
    strides_of,
    tiles_of,
    times_weight,
    times_weight_transposed,
    usual_length,
    votes_of,
)
from ._tiles import bound, product
from .dynamic_routing_full import full_gradient_of
from .dynamic_routing_positions import PositionRouting
from .squash import squash_factor, squash_slope
from .weight_gradients import outer_sums


@triton.jit
def _finish_softmax(
    logits, top, total, length, K: tl.constexpr, K_TILE: tl.constexpr, L_TILE: tl.constexpr
):
    """Logits in memory [K, L] become the couplings of a softmax over L, in place."""
    k = tl.arange(0, K_TILE)[:, None]
    tl.debug_barrier()
    for start in range(0, bound(length), L_TILE):
        at = start + tl.arange(0, L_TILE)[None, :]
        here = (k < K) & (at < length)
        kept = tl.load(logits + at, mask=here, other=float("-inf"))
        share = tl.exp(kept - top) / tl.where(total > 0, total, 1.0)
        tl.store(logits + at, share, mask=here)


@triton.jit(do_not_specialize=["rows", "logits_length", "iterations"])
def _dynamic_routing_forward_kernel(
    inputs,
    weight,
    logits,
    offsets,
    mask,
    capsule_mask,
    inverse_norms,
    out,
    coupling,
    pooled_out,
    rows,
    logits_length,
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
    logits_stride_t,
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
    TRACE: tl.constexpr = out is None
    user = tl.program_id(0).to(tl.int64)
    owner, first_row, length = history_of(offsets, user, tl.num_programs(0), rows)
    rows = rows.to(tl.int64)
    known = length
    if logits_length is not None:
        known = tl.minimum(length, logits_length)
    inputs += owner * inputs_stride_b + first_row * inputs_stride_l
    if logits is not None:
        logits += user * logits_stride_b + first_row * logits_stride_t
    if mask is not None:
        mask += user * mask_stride_b
    if inverse_norms is not None:
        inverse_norms += owner * rows * (1 if WEIGHT == SHARED else K) + first_row
    k = tl.arange(0, K_TILE)[:, None]
    i = tl.arange(0, I_TILE)[None, :]
    # With a trace, those of each iteration, in the first of 2 R - 1 places.
    places = 2 * iterations - 1 if TRACE else 1
    coupling += (owner * places * K + k) * rows + first_row
    pooled_out += (user * places * K + k) * D_IN
    present = k < K
    if capsule_mask is not None:
        capsule_mask += user * capsule_mask_stride_b + k.to(tl.int64) * capsule_mask_stride_k
        present = tl.load(capsule_mask, mask=present, other=0) != 0

    if WHOLE:
        x = load_inputs(
            inputs, 0, inputs_stride_k, inputs_stride_l, inputs_stride_d, length,
            OWN_VOTES, K, D_IN, K_TILE, L_TILE, I_TILE,
        )  # fmt: skip
        first = load_logits(logits, 0, logits_stride_k, logits_stride_l, known, K, K_TILE, L_TILE)
        real = load_real(mask, 0, mask_stride_l, length, L_TILE)
        if NORMALIZE:
            inverse = load_inverse_norms(
                inverse_norms, x, 0, rows, length, OWN_VOTES, WEIGHT, K, K_TILE, L_TILE
            )
    back = tl.zeros([K_TILE, I_TILE], tl.float32)
    pooled = tl.zeros([K_TILE, I_TILE], tl.float32)
    top = tl.full([K_TILE, 1], LOWEST, tl.float32)
    total = tl.zeros([K_TILE, 1], tl.float32)
    # The first weighted sum knows no agreement. It is compiled apart, because a branch would have
    # Triton repeat the softmax in every layout that its uses ask for.
    for AGAIN in tl.static_range(2):
        for step in range(bound(iterations) - 1 if AGAIN else 1):
            if AGAIN:
                norm2 = squared_lengths(
                    pooled, weight, weight_stride_k, weight_stride_i, weight_stride_d,
                    WEIGHT, K, D_IN, D, D_TILE,
                )  # fmt: skip
                factor, _ = squash_factor(norm2, INNER, eps, power)
                if UPDATE != ACCUMULATE:
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
            top = tl.full([K_TILE, 1], LOWEST, tl.float32)
            total = tl.zeros([K_TILE, 1], tl.float32)
            if TRACE and AGAIN:
                coupling += K * rows
                pooled_out += K * D_IN
            for start in range(0, L_TILE if WHOLE else bound(length), L_TILE):
                if not WHOLE:
                    x = load_inputs(
                        inputs, start, inputs_stride_k, inputs_stride_l, inputs_stride_d, length,
                        OWN_VOTES, K, D_IN, K_TILE, L_TILE, I_TILE,
                    )  # fmt: skip
                    first = load_logits(
                        logits, start, logits_stride_k, logits_stride_l, known, K, K_TILE, L_TILE
                    )
                    real = load_real(mask, start, mask_stride_l, length, L_TILE)
                    if NORMALIZE:
                        inverse = load_inverse_norms(
                            inverse_norms, x, start, rows, length, OWN_VOTES, WEIGHT, K, K_TILE,
                            L_TILE,
                        )  # fmt: skip
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
                        if TRACE:
                            last = tl.load(coupling + at - K * rows, mask=here, other=0.0)
                            if PADDING == ZERO_AFTER:
                                last = tl.where(real, last, 0.0)
                        elif AXIS == CAPSULES:
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
                    logit = tl.where(real, logit, PADDING_LOGIT)
                taken = at < length if PADDING == FILL_BEFORE else real
                if AXIS == CAPSULES:
                    logit = tl.where(present, logit, LOWEST)
                    share = tl.where(present, tl.exp(logit - tl.max(logit, 0, keep_dims=True)), 0.0)
                    sum_of_shares = tl.sum(share, 0, keep_dims=True)
                    share = share / tl.where(sum_of_shares > 0, sum_of_shares, 1.0)
                    share = tl.where(taken, share, 0.0)
                    tl.store(
                        coupling + at,
                        share,
                        mask=(k < K)
                        & (at < length)
                        & ((UPDATE == COUPLING) | TRACE | (step + AGAIN == iterations - 1)),
                    )
                else:
                    counts = real if PADDING == IGNORE else at < length
                    logit = tl.where(counts, logit, LOWEST)
                    new_top = tl.maximum(top, tl.max(logit, 1, keep_dims=True))
                    share = tl.where(counts, tl.exp(logit - new_top), 0.0)
                    rescale = tl.exp(top - new_top)
                    total = total * rescale + tl.sum(share, 1, keep_dims=True)
                    pooled *= rescale
                    top = new_top
                    share = tl.where(taken & present, share, 0.0)
                    # A logit until the sum is known; a trace has the softmax before the mask.
                    kept = counts if TRACE else taken
                    kept = tl.where(kept & present, logit, float("-inf"))
                    tl.store(
                        coupling + at,
                        kept,
                        mask=(k < K)
                        & (at < length)
                        & ((UPDATE == COUPLING) | TRACE | (step + AGAIN == iterations - 1)),
                    )
                if OWN_VOTES:
                    pooled += tl.sum(share[:, :, None] * x.to(tl.float32), 1)
                else:
                    pooled += product(share, x, STORAGE)
            if AXIS != CAPSULES:
                pooled /= tl.where(total > 0, total, 1.0)
            if TRACE:
                if AXIS != CAPSULES:
                    _finish_softmax(coupling, top, total, length, K, K_TILE, L_TILE)
                    tl.debug_barrier()
                tl.store(pooled_out + i, pooled, mask=(k < K) & (i < D_IN))
    if not TRACE:
        if AXIS != CAPSULES:
            _finish_softmax(coupling, top, total, length, K, K_TILE, L_TILE)
        tl.store(pooled_out + i, pooled, mask=(k < K) & (i < D_IN))
        norm2 = squared_lengths(
            pooled, weight, weight_stride_k, weight_stride_i, weight_stride_d, WEIGHT, K, D_IN, D,
            D_TILE,
        )  # fmt: skip
        factor, _ = squash_factor(norm2, FINAL, eps, power)
        out += (user * K + k) * D
        for start in range(0, D, D_TILE):
            c = times_weight(
                pooled, weight, start, weight_stride_k, weight_stride_i, weight_stride_d,
                WEIGHT, K, D_IN, D, D_TILE,
            )  # fmt: skip
            d = start + tl.arange(0, D_TILE)[None, :]
            tl.store(out + d, factor * c, mask=(k < K) & (d < D))


@triton.jit(do_not_specialize=["rows"])
def _dynamic_routing_backward_kernel(
    grad,
    inputs_grad,
    capsule_grad,
    weight,
    offsets,
    coupling,
    pooled,
    rows,
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
    owner, first_row, length = history_of(offsets, user, tl.num_programs(0), rows)
    k = tl.arange(0, K_TILE)[:, None]
    i = tl.arange(0, I_TILE)[None, :]
    grad += user * grad_stride_b + k.to(tl.int64) * grad_stride_k
    coupling += (owner * K + k) * rows + first_row
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
                row = (owner * K + k) * rows + first_row + at[None, :]
                tl.store(
                    inputs_grad + row[:, :, None] * D_IN + i[None],
                    x_grad,
                    mask=(k < K)[:, :, None] & here[None],
                )
            else:
                row = owner * rows + first_row + at[:, None]
                tl.store(inputs_grad + row * D_IN + i, tl.sum(x_grad, 0), mask=here)


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

    The capsules have the dtype of the inputs unless another is asked for. With a weight per
    position the weighted sum is that of the votes [B,K,D]. Jagged inputs [T,D_in] have offsets as
    their mask, and a coupling [K,T].
    """
    options = RoutingOptions.of(
        iterations, softmax_over, padding, update, normalize_agreement, inner_squash, final_squash,
        temperature, squash, eps, power,
    )  # fmt: skip
    if weight is not None and weight.dim() == 4:
        routing = PositionRouting(inputs, weight, logits, mask, capsule_mask, num_capsules, options)
        return routing.forward(dtype)
    offsets, mask = offsets_or_mask(mask, inputs.dim() == 2)
    batch = inputs.shape[0] if offsets is None else offsets.shape[0] - 1
    length, d_in = inputs.shape[-2:]
    d = d_in if weight is None else weight.shape[-1]
    by_position = (num_capsules, length) if offsets is not None else (batch, num_capsules, length)
    out = inputs.new_empty(batch, num_capsules, d, dtype=dtype)
    coupling = inputs.new_empty(by_position, dtype=torch.float32)
    pooled = inputs.new_empty(batch, num_capsules, d_in, dtype=torch.float32)
    _route(inputs, weight, logits, offsets, mask, capsule_mask, out, coupling, pooled, options)
    return out, coupling, pooled


def _route(
    inputs: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    offsets: Tensor | None,
    mask: Tensor | None,
    capsule_mask: Tensor | None,
    out: Tensor | None,
    coupling: Tensor,
    pooled: Tensor,
    options: RoutingOptions,
) -> None:
    """Fills ``coupling`` and ``pooled``, without ``out`` with a trace of all iterations."""
    k, rows, d_in = coupling.shape[-2], inputs.shape[-2], inputs.shape[-1]
    kind = votes_of(inputs, weight)
    tiles = tiles_of(k, usual_length(rows, offsets), d_in, weight, kind["OWN_VOTES"])
    if options.normalize and kind["OWN_VOTES"]:
        # A tile of votes and what their lengths come from exceed the registers of fewer.
        tiles["num_warps"] = min(8, 2 * tiles["num_warps"])
    inverse_norms = None
    if options.normalize and weight is not None:
        inverse_norms = inverse_norms_of(inputs if offsets is None else inputs[None], weight)
    launch(
        _dynamic_routing_forward_kernel,
        (pooled.shape[0],),
        inputs,
        weight,
        logits,
        offsets,
        mask,
        capsule_mask,
        inverse_norms,
        out,
        coupling,
        pooled,
        rows,
        None if offsets is None or logits is None else logits.shape[-1],
        options.iterations,
        *input_strides(inputs),
        *strides_of(weight, 3),
        *logit_strides(logits),
        *mask_strides(mask),
        *strides_of(capsule_mask, 2),
        *options.numbers(),
        **kind,
        K=k,
        D_IN=d_in,
        D=d_in if weight is None else weight.shape[-1],
        **options.constants(),
        WHOLE=offsets is None and rows <= tiles["L_TILE"],
        **tiles,
    )


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
    """Gradients of the inputs, the weight and the logits; of the last two where they have one."""
    options = RoutingOptions.of(
        iterations, softmax_over, padding, update, normalize_agreement, inner_squash, final_squash,
        temperature, squash, eps, power,
    )  # fmt: skip
    offsets, mask = offsets_or_mask(mask, coupling.dim() == 2)
    batch, k = pooled.shape[:2]
    by_position = weight is not None and weight.dim() == 4
    if by_position or (full_gradient and weight is not None and options.normalize):
        routing = PositionRouting(inputs, weight, logits, mask, capsule_mask, k, options)
        if full_gradient:
            grads = routing.full_backward(grad, needs)
        else:
            grads = routing.last_backward(grad, coupling, pooled, needs)
    elif full_gradient:
        places = 2 * iterations - 1
        coefficients = coupling.new_empty(*coupling.shape[:-2], places, *coupling.shape[-2:])
        pooled = pooled.new_empty(batch, places, k, inputs.shape[-1])
        _route(
            inputs, weight, logits, offsets, mask, capsule_mask, None, coefficients, pooled, options
        )
        grads = full_gradient_of(
            grad, inputs, weight, logits, offsets, mask, coefficients, pooled, options, needs
        )
    else:
        grads = _last_gradient_of(grad, inputs, weight, offsets, coupling, pooled, options, needs)
    return tuple(inputs.new_empty(0) if grad is None else grad for grad in grads)


def _last_gradient_of(
    grad: Tensor,
    inputs: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    coupling: Tensor,
    pooled: Tensor,
    options: RoutingOptions,
    needs: int,
) -> tuple[Tensor | None, Tensor | None, None]:
    coupling, pooled = coupling.contiguous(), pooled.contiguous()
    batch, k, d_in = pooled.shape
    rows, d = coupling.shape[-1], grad.shape[-1]
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
        offsets,
        coupling,
        pooled,
        rows,
        *grad.stride(),
        *strides_of(weight, 3),
        options.eps,
        options.power,
        **votes_of(inputs, weight),
        K=k,
        D_IN=d_in,
        D=d,
        FINAL=options.final_squash,
        **tiles_of(k, usual_length(rows, offsets), d_in, weight, True),
    )
    weight_grad = None
    if wants_weight:
        groups = (batch, k) if weight.dim() == 3 else (batch * k, 1)
        (weight_grad,) = outer_sums([(pooled.view(*groups, d_in), capsule_grad.view(*groups, d))])
        weight_grad = weight_grad.view(weight.shape).to(weight.dtype)
    return inputs_grad, weight_grad, None
