"""Tensors and what belongs to them in one safetensors file, written atomically, never unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mimnet_fast.cdr.atomic import atomic_file
from mimnet_fast.cdr.errors import UserError

if TYPE_CHECKING:  # what is read as arrays is read without torch
    from numpy import ndarray
    from torch import Tensor

_KEY = "mimnet_fast"


def save(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write ``tensors`` with ``record`` as JSON in the file's header."""
    from safetensors.torch import save as serialized

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    content = serialized(contiguous, metadata={_KEY: json.dumps(record)})
    with atomic_file(path) as temporary:  # save_file has a random name, which stays when killed
        temporary.write_bytes(content)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Raises:
        UserError: the file is damaged or comes from elsewhere.
    """
    return _read(path, "pt")


def load_arrays(path: Path) -> tuple[dict[str, ndarray], dict[str, Any]]:
    """The same as NumPy arrays, without torch."""
    return _read(path, "np")


def _read(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework=framework) as file:
            record = json.loads((file.metadata() or {})[_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: no checkpoint of mimnet_fast, or damaged ({error}): delete it to train anew"
        ) from error
