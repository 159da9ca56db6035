"""Gradients of parameters: sums of outer products of rows, in one fixed order.

A program owns a tile of one sum and walks over rows with float32 products; all sums of a call share
one launch, because at small sizes the launches are the time. Few tiles and many rows would leave
most of the device idle, so rows are then split in parts, which a second launch adds up. Nothing is
added atomically: equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import MOST_REGISTERS, launch
from ._tiles import bound, padded, product

_TILE_ROWS = 16
_ROWS_OF_ONE_PART = 1024
_ROWS_OF_PARTS = 512
_PROGRAMS = 512
_ELEMENTS = 256


@triton.jit
def _at(values, index):
    """``values[index]`` of a tuple of integers, for an index known at run time."""
    value = tl.cast(values[0], tl.int64)
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, tl.cast(values[i], tl.int64), value)
    return value


@triton.jit
def _pointer_at(pointers, index):
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        if index == i:
            pointer = pointers[i]
    return pointer


@triton.jit
def _owner(firsts, position):
    """Index of the range that holds ``position``, where ``firsts`` are the starts of all ranges."""
    index = position * 0
    for i in tl.static_range(1, len(firsts)):
        index += (position >= firsts[i]).to(tl.int32)
    return index


@triton.jit
def _outer_sums_kernel(
    parts,
    outs,
    lefts,
    rights,
    first_tiles,
    first_elements,
    elements,
    rows,
    ms,
    left_columns,
    ns,
    left_strides_r,
    left_strides_g,
    left_strides_m,
    right_strides_r,
    right_strides_g,
    right_strides_n,
    SPLIT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    position = tl.program_id(0)
    part = tl.program_id(1)
    i = _owner(first_tiles, position)
    m_size, n_size = _at(ms, i).to(tl.int32), _at(ns, i).to(tl.int32)
    tile = position - _at(first_tiles, i).to(tl.int32)
    tiles_n = tl.cdiv(n_size, TILE_N)
    tiles_m = tl.cdiv(m_size, TILE_M)
    group = (tile // (tiles_m * tiles_n)).to(tl.int64)
    m = (tile // tiles_n % tiles_m * TILE_M + tl.arange(0, TILE_M))[None, :]
    n = (tile % tiles_n * TILE_N + tl.arange(0, TILE_N))[None, :]

    row_tiles = tl.cdiv(_at(rows, i), TILE_ROWS).to(tl.int32)
    per_part = tl.cdiv(row_tiles, tl.num_programs(1))
    first = part.to(tl.int64) * per_part * TILE_ROWS
    last = tl.minimum(_at(rows, i), first + per_part * TILE_ROWS)
    r = first + tl.arange(0, TILE_ROWS)[:, None]
    left_stride, right_stride = _at(left_strides_r, i), _at(right_strides_r, i)
    left = _pointer_at(lefts, i) + group * _at(left_strides_g, i)
    left += r * left_stride + m * _at(left_strides_m, i)
    right = _pointer_at(rights, i) + group * _at(right_strides_g, i)
    right += r * right_stride + n * _at(right_strides_n, i)
    # What is not there of the left is 1: a column sum has no left, and the right is then 0.
    in_left, in_right = m < _at(left_columns, i), n < n_size
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(bound(first), bound(last), TILE_ROWS):
        here = start + tl.arange(0, TILE_ROWS)[:, None] < last
        a = tl.load(left, mask=here & in_left, other=1.0)
        b = tl.load(right, mask=here & in_right, other=0.0)
        total += product(tl.trans(a), b, tl.float32)
        left += TILE_ROWS * left_stride
        right += TILE_ROWS * right_stride

    m = tl.trans(m)
    at = (group * m_size + m) * n_size + n
    here = (m < m_size) & (n < n_size)
    if SPLIT:
        tl.store(
            parts + part.to(tl.int64) * elements + _at(first_elements, i) + at, total, mask=here
        )
    else:
        tl.store(_pointer_at(outs, i) + at, total, mask=here)


@triton.jit(do_not_specialize=["count"])
def _add_parts_kernel(
    parts, outs, first_blocks, first_elements, sizes, elements, count, BLOCK: tl.constexpr
):
    position = tl.program_id(0)
    i = _owner(first_blocks, position)
    at = (position - _at(first_blocks, i)) * BLOCK + tl.arange(0, BLOCK)
    here = at < _at(sizes, i)
    part = parts + _at(first_elements, i) + at
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(bound(count)):
        total += tl.load(part, mask=here, other=0.0)
        part += elements
    tl.store(_pointer_at(outs, i) + at, total, mask=here)


def _starts(sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Where each of consecutive ranges begins, and where the last ends."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return tuple(starts[:-1]), starts[-1]


def add_parts(parts: Tensor, outs: Sequence[Tensor]) -> None:
    """Sum of ``parts`` ``[P, elements]`` over P into ``outs``, contiguous and one after another."""
    sizes = tuple(out.numel() for out in outs)
    first_elements, elements = _starts(sizes)
    first_blocks, blocks = _starts([triton.cdiv(size, _ELEMENTS) for size in sizes])
    launch(
        _add_parts_kernel,
        (blocks,),
        parts,
        tuple(outs),
        first_blocks,
        first_elements,
        sizes,
        elements,
        parts.shape[0],
        BLOCK=_ELEMENTS,
        num_warps=_ELEMENTS // 32,
    )


def outer_sums(
    products: Sequence[tuple[Tensor | None, Tensor]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Sum over R of ``left`` outer ``right`` for each pair of float32 rows.

    ``left`` ``[R, G, M]`` and ``right`` ``[R, G, N]`` of any strides give ``[G, M, N]``; without
    ``left`` the result is the column sum of ``right``, ``[G, N]``. Results have ``dtype``.
    """
    if not products:
        return []
    rights = tuple(right for _, right in products)
    lefts = tuple(right if left is None else left for left, right in products)
    rows, groups, ns = zip(*(right.shape for right in rights), strict=True)
    ms = tuple(1 if left is None else left.shape[2] for left, _ in products)
    outs = tuple(
        right.new_empty((g, n) if left is None else (g, m, n), dtype=dtype)
        for (left, right), g, m, n in zip(products, groups, ms, ns, strict=True)
    )
    tile_m, tile_n = (min(padded(max(sizes), 16), 64) for sizes in (ms, ns))
    tiles_of = zip(groups, ms, ns, strict=True)
    first_tiles, tiles = _starts(
        [g * triton.cdiv(m, tile_m) * triton.cdiv(n, tile_n) for g, m, n in tiles_of]
    )
    first_elements, elements = _starts([out.numel() for out in outs])
    count = 1
    if max(rows) > _ROWS_OF_ONE_PART and tiles:
        count = min(triton.cdiv(max(rows), _ROWS_OF_PARTS), max(1, _PROGRAMS // tiles))
    split = count > 1
    parts = rights[0].new_empty(count, elements) if split else outs[0]
    warps = max(4, tile_m * tile_n // 512)
    launch(
        _outer_sums_kernel,
        (tiles, count),
        parts,
        outs,
        lefts,
        rights,
        first_tiles,
        first_elements,
        elements,
        rows,
        ms,
        tuple(0 if left is None else left.shape[2] for left, _ in products),
        ns,
        *zip(*(left.stride() for left in lefts), strict=True),
        *zip(*(right.stride() for right in rights), strict=True),
        SPLIT=split,
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_ROWS=_TILE_ROWS,
        num_warps=warps,
        # Those of two blocks a multiprocessor; left to itself, ptxas spills to fit one more.
        maxnreg=min(MOST_REGISTERS, 1024 // warps),
    )
    if split:
        add_parts(parts, outs)
    return list(outs)
