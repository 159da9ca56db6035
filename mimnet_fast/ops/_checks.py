"""Argument checks shared by the ops: what was got, what is needed, which argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)


def _text(shape: Any) -> str:
    return f"[{', '.join(map(str, shape))}]"


def is_tensor(name: str, value: Any, dims: tuple[int, ...], meaning: str) -> Tensor:
    """``value``, a tensor with one of the numbers of dimensions in ``dims``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, need a tensor {meaning}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: got shape {_text(value.shape)}, need {meaning}")
    return value


def leading(name: str, value: Any, dims: tuple[int, ...], meaning: str) -> Tensor:
    """The tensor that settles dtype and device for the others: floating, of a supported dtype."""
    tensor = is_tensor(name, value, dims, meaning)
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, need float32, float64, bfloat16 or float16"
        )
    return tensor


def same(name: str, value: Any, shape: tuple[int, ...], meaning: str, like: Tensor) -> None:
    """``value`` has exactly this shape and the dtype and device of ``like``."""
    if (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype is like.dtype
        and value.device == like.device
    ):
        return
    tensor = is_tensor(name, value, (len(shape),), meaning)
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: got shape {_text(tensor.shape)}, need {meaning} = {_text(shape)}"
        )
    if tensor.dtype is not like.dtype:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, need {like.dtype} as in the other arguments; "
            "convert one side or use torch.autocast"
        )
    _same_device(name, tensor, like)


def not_empty(name: str, **sizes: int) -> None:
    """No size is 0: an op has something to sum over, only the batch may be empty."""
    for letter, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: got {letter} = {size}, need at least 1 (only B may be 0)")


def _same_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: is on {tensor.device}, but the other arguments are on {like.device}; "
            "move them to one device"
        )


def history_mask(
    mask: Tensor | None, lengths: Tensor | None, batch: int, length: int, like: Tensor
) -> Tensor | None:
    """The given one of ``mask`` (bool ``[B,L]``) and ``lengths`` (integer ``[B]``), checked."""
    if mask is not None and lengths is not None:
        raise ValueError("mask, lengths: got both, need at most one")
    if mask is not None:
        tensor = is_tensor("mask", mask, (2,), "[B, L]")
        if tensor.dtype is not torch.bool:
            raise TypeError(f"mask: got dtype {tensor.dtype}, need bool, True at real items")
        if tensor.shape != (batch, length):
            raise ValueError(
                f"mask: got shape {_text(tensor.shape)}, need [B, L] = {_text((batch, length))}"
            )
        _same_device("mask", tensor, like)
        return tensor
    if lengths is None:
        return None
    tensor = is_tensor("lengths", lengths, (1,), "[B]")
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"lengths: got dtype {tensor.dtype}, need int64 or int32")
    if tensor.shape != (batch,):
        raise ValueError(f"lengths: got shape {_text(tensor.shape)}, need [B] = [{batch}]")
    _same_device("lengths", tensor, like)
    in_range("lengths", tensor, 0, length, "the number of real items, at most L")
    return tensor


def offsets(
    offsets: Any,
    mask: Tensor | None,
    lengths: Tensor | None,
    rows: int,
    length: int | None,
    like: Tensor,
    name: str = "offsets",
) -> Tensor:
    """Offsets ``[B+1]`` of ``rows`` values, each history at most ``length`` long where that counts.

    Values are looked at as in :func:`in_range`; kernels bound what they read by them.
    """
    if mask is not None or lengths is not None:
        raise ValueError(f"{name}: got them together with mask or lengths, which they replace")
    tensor = is_tensor(name, offsets, (1,), "[B+1]")
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, need int64 or int32")
    if tensor.shape[0] < 1:
        raise ValueError(f"{name}: got no value, need [B+1]: 0 and the end of every history")
    _same_device(name, tensor, like)
    if torch.compiler.is_compiling() or not tensor.is_cpu:
        return tensor
    if tensor[0] != 0:
        raise ValueError(f"{name}: start at {int(tensor[0])}, need 0")
    if tensor[-1] != rows:
        raise ValueError(f"{name}: end at {int(tensor[-1])}, need T = {rows}, the number of values")
    if tensor.shape[0] > 1:
        shortest, longest = (int(value) for value in torch.aminmax(tensor.diff()))
        if shortest < 0:
            raise ValueError(f"{name}: decrease by {-shortest} at a user, need none to decrease")
        if length is not None and longest > length:
            raise ValueError(
                f"{name}: got a history of {longest} items, need at most L = {length}, for which "
                "logits or weight have positions"
            )
    return tensor


def integers(name: str, value: Any, count: int, meaning: str, like: Tensor) -> Tensor:
    """``value``, a vector of ``count`` integers, as int64."""
    tensor = is_tensor(name, value, (1,), meaning)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, need int64 or int32")
    if tensor.shape != (count,):
        raise ValueError(f"{name}: got shape {_text(tensor.shape)}, need {meaning} = [{count}]")
    _same_device(name, tensor, like)
    return tensor.long()


def in_range(name: str, tensor: Tensor, low: int, high: int, meaning: str) -> None:
    """Values of a CPU tensor in ``[low, high]``.

    On other devices a look at the values would stall the stream, and while tracing there are none;
    the kernels are safe there: lengths are clamped, ids are checked by the CPU kernel.
    """
    if torch.compiler.is_compiling() or not tensor.is_cpu or tensor.numel() == 0:
        return
    smallest, largest = torch.aminmax(tensor)
    for value in (int(smallest), int(largest)):
        if not low <= value <= high:
            raise ValueError(f"{name}: got {value}, need {low} to {high} ({meaning})")


def capsule_mask(mask: Any, batch: int, capsules: int, like: Tensor) -> None:
    """Boolean ``[B,K]``."""
    tensor = is_tensor("capsule_mask", mask, (2,), "[B, K]")
    if tensor.dtype is not torch.bool:
        raise TypeError(f"capsule_mask: got dtype {tensor.dtype}, need bool, True at real capsules")
    if tensor.shape != (batch, capsules):
        raise ValueError(
            f"capsule_mask: got shape {_text(tensor.shape)}, "
            f"need [B, K] = {_text((batch, capsules))}"
        )
    _same_device("capsule_mask", tensor, like)


def whole(name: str, value: Any, least: int, meaning: str) -> int:
    """An integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, need an integer ({meaning})")
    if value < least:
        raise ValueError(f"{name}: got {value}, need at least {least} ({meaning})")
    return value


def number(name: str, value: Any, *, above: float, meaning: str) -> float:
    """A finite number greater than ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, need a number ({meaning})")
    if not above < value < float("inf"):
        raise ValueError(f"{name}: got {value}, need a finite number above {above} ({meaning})")
    return float(value)


def lengths_to_mask(mask: Tensor | None, length: int) -> Tensor | None:
    """Lengths ``[B]`` as the mask ``[B,L]`` that the references take; a mask stays as it is."""
    if mask is None or mask.dim() == 2:
        return mask
    return torch.arange(length, device=mask.device) < mask[:, None]


def autocast(tensors: tuple[Any, ...], like: Tensor) -> tuple[Any, ...]:
    """Under ``torch.autocast`` the tensors in its dtype, float64 apart, as for a linear layer."""
    device_type = backends.device_type(like)
    # A meta tensor, for one, knows no autocast.
    if not torch.amp.is_autocast_available(device_type):
        return tensors
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )
