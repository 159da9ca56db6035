"""Squash, elementwise and as a device function of the other kernels.

A program squashes a block of vectors. It reads each element once where the vector fits a tile;
of a longer vector the first tile stays in registers and the others are read twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._tiles import padded

SQRT_EPS = tl.constexpr(0)
NORM_PLUS_EPS = tl.constexpr(1)
POW_CLAMP = tl.constexpr(2)
IDENTITY = tl.constexpr(5)

_LONGEST_TILE = 1024
_ELEMENTS = 1024


@triton.jit
def squash_factor(norm2, FORM: tl.constexpr, eps, power):
    """What squash multiplies a vector with, and ``|x|^2 d factor / d |x|^2``.

    The derivative alone would leave the range of a float for very long or very short vectors.
    """
    nonzero = norm2 > 0
    safe = tl.where(nonzero, norm2, 1.0)
    # Quotients of quarters, because division gives 0 where the divisor exceeds 2^126.
    inverse = 0.25 / (0.25 + 0.25 * norm2)
    if FORM == SQRT_EPS:
        root2 = norm2 + eps
        factor = norm2 * inverse / tl.sqrt(root2)
        radial = factor * (inverse - 0.5 * ((0.25 * norm2) / (0.25 * root2)))
    elif FORM == NORM_PLUS_EPS:
        norm = tl.where(nonzero, tl.sqrt(safe), 0.0)
        factor = norm2 * inverse / (norm + eps)
        radial = factor * (inverse - 0.5 * (norm / (norm + eps)))
    elif FORM == POW_CLAMP:
        norm = tl.where(nonzero, tl.sqrt(safe), 0.0)
        clamped = norm <= eps
        powered = tl.exp(power * tl.log(safe * inverse)) / tl.where(clamped, eps, norm)
        factor = tl.where(nonzero, powered, 0.0)
        radial = factor * (power * inverse - tl.where(clamped, 0.0, 0.5))
    elif FORM == IDENTITY:
        factor = tl.full(norm2.shape, 1.0, tl.float32)
        radial = tl.zeros(norm2.shape, tl.float32)
    else:  # no_div or none_eps
        factor = tl.where(nonzero, tl.sqrt(safe) * inverse, 0.0)
        radial = factor * (0.5 - norm2 * inverse)
    return factor, radial


@triton.jit
def squash_slope(dot, norm2, radial):
    """How much of ``x`` its gradient holds, where ``dot`` is ``x . grad``."""
    inverse_norm = 1.0 / tl.sqrt(tl.where(norm2 > 0, norm2, 1.0))
    return 2.0 * (radial * inverse_norm) * (dot * inverse_norm)


@triton.jit
def squash_tile(x, FORM: tl.constexpr, eps, power):
    """Squash along the last axis of a float32 tile."""
    norm2 = tl.sum(x * x, len(x.shape) - 1, keep_dims=True)
    factor, _ = squash_factor(norm2, FORM, eps, power)
    return factor * x


@triton.jit
def squash_tile_backward(grad, x, FORM: tl.constexpr, eps, power):
    """Gradient of ``x`` from that of ``squash_tile(x)``."""
    norm2 = tl.sum(x * x, len(x.shape) - 1, keep_dims=True)
    dot = tl.sum(x * grad, len(x.shape) - 1, keep_dims=True)
    factor, radial = squash_factor(norm2, FORM, eps, power)
    return factor * grad + squash_slope(dot, norm2, radial) * x


@triton.jit
def _row_offsets(row, size1, size2, stride0, stride1, stride2):
    """Offset of a row of [size0, size1, size2, D]; sizes of 1 are compiled in and cost nothing."""
    outer = row // size2
    return outer // size1 * stride0 + outer % size1 * stride1 + row % size2 * stride2


@triton.jit(do_not_specialize=["rows"])
def _squash_forward_kernel(
    x,
    out,
    rows,
    size1,
    size2,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride_d,
    eps,
    power,
    D: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, TILE)[None, :].to(tl.int64)
    x += _row_offsets(row, size1, size2, x_stride0, x_stride1, x_stride2)
    out += row * D
    here = (row < rows) & (column < D)
    first = tl.load(x + column * x_stride_d, mask=here, other=0.0).to(tl.float32)
    norm2 = tl.sum(first * first, 1, keep_dims=True)
    for start in range(TILE, D, TILE):
        more = (row < rows) & (column + start < D)
        tile = tl.load(x + (column + start) * x_stride_d, mask=more, other=0.0).to(tl.float32)
        norm2 += tl.sum(tile * tile, 1, keep_dims=True)
    factor, _ = squash_factor(norm2, FORM, eps, power)
    tl.store(out + column, factor * first, mask=here)
    for start in range(TILE, D, TILE):
        more = (row < rows) & (column + start < D)
        tile = tl.load(x + (column + start) * x_stride_d, mask=more, other=0.0).to(tl.float32)
        tl.store(out + column + start, factor * tile, mask=more)


@triton.jit(do_not_specialize=["rows"])
def _squash_backward_kernel(
    grad,
    x,
    grad_x,
    rows,
    size1,
    size2,
    grad_stride0,
    grad_stride1,
    grad_stride2,
    grad_stride_d,
    x_stride0,
    x_stride1,
    x_stride2,
    x_stride_d,
    eps,
    power,
    D: tl.constexpr,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, TILE)[None, :].to(tl.int64)
    grad += _row_offsets(row, size1, size2, grad_stride0, grad_stride1, grad_stride2)
    x += _row_offsets(row, size1, size2, x_stride0, x_stride1, x_stride2)
    grad_x += row * D
    here = (row < rows) & (column < D)
    first = tl.load(x + column * x_stride_d, mask=here, other=0.0).to(tl.float32)
    first_grad = tl.load(grad + column * grad_stride_d, mask=here, other=0.0).to(tl.float32)
    norm2 = tl.sum(first * first, 1, keep_dims=True)
    dot = tl.sum(first * first_grad, 1, keep_dims=True)
    for start in range(TILE, D, TILE):
        at = column + start
        more = (row < rows) & (at < D)
        tile = tl.load(x + at * x_stride_d, mask=more, other=0.0).to(tl.float32)
        tile_grad = tl.load(grad + at * grad_stride_d, mask=more, other=0.0).to(tl.float32)
        norm2 += tl.sum(tile * tile, 1, keep_dims=True)
        dot += tl.sum(tile * tile_grad, 1, keep_dims=True)
    factor, radial = squash_factor(norm2, FORM, eps, power)
    along = squash_slope(dot, norm2, radial)
    tl.store(grad_x + column, factor * first_grad + along * first, mask=here)
    for start in range(TILE, D, TILE):
        at = column + start
        more = (row < rows) & (at < D)
        tile = tl.load(x + at * x_stride_d, mask=more, other=0.0).to(tl.float32)
        tile_grad = tl.load(grad + at * grad_stride_d, mask=more, other=0.0).to(tl.float32)
        tl.store(grad_x + at, factor * tile_grad + along * tile, mask=more)


def _folded(*tensors: Tensor) -> list[Tensor]:
    """As [size0, size1, size2, D], one size where it can be; only of many dimensions a copy."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1, 1, 1, t.shape[-1]) for t in tensors]
    return [t[(None,) * (4 - t.dim())].flatten(0, -4) for t in tensors]


def _tiling(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    tile = min(padded(x.shape[-1]), _LONGEST_TILE)
    block = max(1, _ELEMENTS // tile)
    return (triton.cdiv(x.shape[:-1].numel(), block),), {"ROWS": block, "TILE": tile}


def squash(x: Tensor, form: int, eps: float, power: float) -> Tensor:
    """Squash along the last dimension of ``x`` ``[.., D]``."""
    out = x.new_empty(x.shape)
    grid, tiles = _tiling(x)
    (x,) = _folded(x)
    rows = x.shape[:-1].numel()
    launch(
        _squash_forward_kernel,
        grid,
        x,
        out,
        rows,
        *x.shape[1:3],
        *x.stride(),
        eps,
        power,
        x.shape[-1],
        form,
        **tiles,
    )
    return out


def squash_backward(grad: Tensor, x: Tensor, form: int, eps: float, power: float) -> Tensor:
    """Gradient of ``x``."""
    grad_x = x.new_empty(x.shape)
    grid, tiles = _tiling(x)
    grad, x = _folded(grad, x)
    rows = x.shape[:-1].numel()
    launch(
        _squash_backward_kernel,
        grid,
        grad,
        x,
        grad_x,
        rows,
        *x.shape[1:3],
        *grad.stride(),
        *x.stride(),
        eps,
        power,
        x.shape[-1],
        form,
        **tiles,
    )
    return grad_x
