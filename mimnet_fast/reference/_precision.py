"""Half-precision inputs are computed in float32 and rounded once, at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_HALF = (torch.float16, torch.bfloat16)


def _map(value: Any, cast: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return cast(value)
    if isinstance(value, tuple):
        mapped = [_map(item, cast) for item in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)
    return value


def accumulate_in_float32(function: F) -> F:
    """Run ``function`` on float32 copies of half-precision tensors; round what it returns back.

    An epsilon of 1e-8 is zero in float16 and a norm of ten bfloat16 numbers has three digits, so an
    equation is only a usable oracle when its sums are kept in float32, as the kernels keep them.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        if first.dtype not in _HALF:
            return function(*args, **kwargs)

        def widen(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.dtype in _HALF else tensor

        wide = function(*_map(args, widen), **{k: _map(v, widen) for k, v in kwargs.items()})
        return _map(wide, lambda t: t.to(first.dtype) if t.is_floating_point() else t)

    return wrapper  # type: ignore[return-value]
