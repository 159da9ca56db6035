"""Matrix products of tiles at float32 accuracy, and the sizes of tiles.

Tensor cores multiply what bfloat16 or tf32 holds and add up in float32. A half-precision operand is
exact there, and a float32 operand is the sum of a high and a low part that nearly are, so two
products (three where both operands are float32) lose next to nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 tiles as the integers that store them.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def padded(size: int, least: int = 1) -> int:
    """The smallest tile that holds ``size``: a power of two, at least ``least``."""
    return max(least, triton.next_power_of_2(size))


if triton.knobs.runtime.interpret:

    def bound(n: tl.tensor) -> int:
        """``n`` as the end of a loop, which the interpreter of Triton 3.6 spoils on NumPy 2.4."""
        return n.handle.data.item() if isinstance(n, tl.tensor) else int(n)
else:

    @triton.jit
    def bound(n):
        """``n`` as the end of a loop."""
        return n


@triton.jit
def _split(x, STORAGE: tl.constexpr):
    """High and low part of a float32 tile, as the tensor cores of ``STORAGE`` take them."""
    if STORAGE.is_bf16():
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    else:
        # Every float16 is exact in tf32, which has its mantissa and the range of a float32.
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = x - high
    return high, low


@triton.jit
def _dot(a, b, STORAGE: tl.constexpr):
    if _INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32))
    elif STORAGE.is_fp32():
        result = tl.dot(a, b, input_precision="ieee")
    elif a.dtype == b.dtype:
        result = tl.dot(a, b, input_precision="tf32")
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    return result


@triton.jit
def product(a, b, STORAGE: tl.constexpr):
    """``a @ b`` in float32, of 2-D or batched 3-D tiles whose inner size is at least 16.

    ``STORAGE`` is the dtype of the caller's tensors in memory, which says which tensor cores may
    serve: ``pointer.dtype.element_ty``. Each operand has this dtype or float32.
    """
    if STORAGE.is_fp32() or (a.dtype == STORAGE and b.dtype == STORAGE):
        result = _dot(a, b, STORAGE)
    elif b.dtype == STORAGE:
        high, low = _split(a, STORAGE)
        result = _dot(low, b, STORAGE) + _dot(high, b, STORAGE)
    elif a.dtype == STORAGE:
        high, low = _split(b, STORAGE)
        result = _dot(a, low, STORAGE) + _dot(a, high, STORAGE)
    else:
        a_high, a_low = _split(a, STORAGE)
        b_high, b_low = _split(b, STORAGE)
        low = _dot(a_low, b_high, STORAGE) + _dot(a_high, b_low, STORAGE)
        result = low + _dot(a_high, b_high, STORAGE)
    return result
