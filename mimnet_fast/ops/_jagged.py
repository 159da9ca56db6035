"""Histories of different lengths without padding: values ``[T, ..]`` and offsets ``[B+1]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unpack(name: str, value: Any, offsets: Tensor | None) -> tuple[Any, Tensor | None]:
    """Values and offsets of a nested tensor, which shares its memory; else what was given."""
    if not isinstance(value, Tensor) or not value.is_nested:
        return value, offsets
    if offsets is not None:
        raise ValueError(f"offsets: got them next to a nested tensor as {name}, which has its own")
    if value.layout is not torch.jagged:
        raise ValueError(
            f"{name}: got a nested tensor of layout {value.layout}, need torch.jagged: "
            "torch.nested.nested_tensor(list_of_tensors, layout=torch.jagged)"
        )
    nested: Any = value
    if nested._ragged_idx != 1:
        raise ValueError(
            f"{name}: got a nested tensor whose dimension {nested._ragged_idx} is ragged, need "
            "dimension 1; transpose it back"
        )
    if nested.lengths() is not None:
        raise ValueError(
            f"{name}: got a nested tensor with holes between its rows, need one without; "
            "call .contiguous()"
        )
    return nested.values(), nested.offsets()


def longest(offsets: Tensor) -> int:
    """L of the longest history, at least 1; for other devices than the CPU the host waits."""
    return max(1, int(offsets.diff().max())) if offsets.shape[0] > 1 else 1


def pad(values: Tensor, offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Values ``[T, ..]`` as ``[B, length, ..]`` with zeros behind, and the mask of real ones."""
    first, lengths = offsets[:-1, None], offsets.diff()[:, None]
    position = torch.arange(length, device=offsets.device)
    mask = position < lengths
    rows = values.shape[0]
    behind = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    return behind[torch.where(mask, first + position, rows).clamp(0, rows)], mask


def pad_logits(logits: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Logits ``[K, T]`` as ``[B, K, length]``; others as they are."""
    return pad(logits.mT, offsets, length)[0].mT if logits.dim() == 2 else logits
