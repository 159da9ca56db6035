"""Check an op against its reference on one's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimnet_fast import backends

# What rounding leaves of agreement after a few hundred additions, per unit of the largest value.
_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@dataclass(frozen=True)
class Difference:
    """One tensor's largest difference from the reference."""

    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    """``absolute`` over the largest absolute value of the reference."""
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; true when every tensor agrees, prints as a table."""

    op: str
    backend: str
    differences: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return all(d.ok for d in self.differences)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} against reference"]
        width = max(len(d.name) for d in self.differences)
        for d in self.differences:
            verdict = "ok" if d.ok else f"DIFFERS (tolerance {d.tolerance:.0e})"
            lines.append(f"  {d.name:<{width}}  abs {d.absolute:.2e}  rel {d.relative:.2e}  {verdict}")
        return "\n".join(lines)


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", range(len(value)))
        for field, item in zip(fields, value, strict=True):
            yield from _named_tensors(item, f"{name}.{field}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named_tensors(item, str(key))


def _replace(value: Any, leaves: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return leaves.get(id(value), value)
    if isinstance(value, (tuple, list)):
        items = [_replace(item, leaves) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _replace(item, leaves) for key, item in value.items()}
    return value


def _run(
    op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], backend: str
) -> list[tuple[str, Tensor]]:
    """Outputs and the gradients of all floating inputs, for one fixed random output gradient."""
    floats = [
        (name, t)
        for name, t in (*_named_tensors(args, "input"), *_named_tensors(kwargs, "input"))
        if t.is_floating_point()
    ]
    leaves = {id(t): t.detach().clone().requires_grad_() for _, t in floats}
    result = op(*_replace(args, leaves), **{**_replace(kwargs, leaves), "backend": backend})
    outputs = list(_named_tensors(result, "output"))
    generator = torch.Generator().manual_seed(0)
    directions = [
        torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for _, out in outputs
    ]
    unique = {id(t): (name, leaves[id(t)]) for name, t in floats}
    grads = torch.autograd.grad(
        [out for _, out in outputs],
        [leaf for _, leaf in unique.values()],
        directions,
        allow_unused=True,
    )
    named = [
        (f"grad of {name}", torch.zeros_like(leaf) if grad is None else grad)
        for (name, leaf), grad in zip(unique.values(), grads, strict=True)
    ]
    return [(name, out.detach()) for name, out in outputs] + named


def verify(
    op: Callable[..., Any],
    *args: Any,
    backend: str = "auto",
    tolerance: float | None = None,
    **kwargs: Any,
) -> Verification:
    """Outputs and gradients of ``op`` against its reference, on the tensors given here.

    Args:
        op: A function of :mod:`mimnet_fast.ops`.
        args: Its arguments; they are copied, not changed. Integer ids and masks pass through, and a
            ``table`` counts as frozen.
        backend: The backend to check.
        tolerance: Largest difference allowed, as a share of the reference's largest value; None takes
            what rounding in the dtype explains.
        kwargs: Further arguments of the op.

    Returns:
        A :class:`Verification`: true or false, and a table when printed.

    Raises:
        TypeError: if ``op`` is not an op.

    Example:
        >>> import torch
        >>> from mimnet_fast import ops
        >>> bool(verify(ops.squash, torch.randn(4, 8)))
        True
    """
    name = getattr(op, "__name__", str(op))
    if getattr(op, "__module__", "") != f"mimnet_fast.ops.{name}":
        raise TypeError(f"op: got {name!r}, need a function of mimnet_fast.ops")
    frozen = {"table": kwargs.pop("table")} if "table" in kwargs else {}

    def call(*a: Any, **k: Any) -> Any:
        return op(*a, **k, **frozen)

    fast = _run(call, args, kwargs, backend)
    slow = _run(call, args, kwargs, "reference")
    differences = []
    for (label, mine), (_, theirs) in zip(fast, slow, strict=True):
        absolute = (mine.double() - theirs.double()).abs().amax().item() if mine.numel() else 0.0
        largest = theirs.double().abs().amax().item() if mine.numel() else 0.0
        allowed = _TOLERANCE[mine.dtype] if tolerance is None else tolerance
        relative = absolute / largest if largest else absolute
        differences.append(Difference(label, tuple(mine.shape), absolute, relative, allowed))
    return Verification(name, backend, tuple(differences))
