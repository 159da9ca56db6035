"""Check an op against its reference on one's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A kernel may be this many times as far from the float64 result as plain PyTorch in its dtype ...
_OUTPUT_FACTOR, _GRADIENT_FACTOR = 2.0, 3.0
# ... and this many units of rounding further, for results that plain PyTorch happens to hit.
_ULPS = 4
# Runs of the reference on inputs moved by two units of rounding: where routing is nearly tied, how
# far a single run of anything ends from the exact result is luck. Many runs before a verdict of
# too far, few otherwise.
_JITTERED_RUNS = (8, 64)


@dataclass(frozen=True)
class Difference:
    """Distance of one tensor from the float64 reference, as root mean squares."""

    name: str
    shape: tuple[int, ...]
    error: float
    reference_error: float
    """Plain PyTorch's distance: the farthest of some runs on inputs within rounding of these."""
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the tensor is close enough; never where one of the two is not finite."""
        return self.error <= self.allowed < float("inf")


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; true when every tensor is close enough, prints as a table."""

    op: str
    backend: str
    differences: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return all(d.ok for d in self.differences)

    def __str__(self) -> str:
        width = max(len(d.name) for d in self.differences)
        lines = [f"{self.op}: error (rms) against float64, {self.backend} and reference"]
        for d in self.differences:
            verdict = "ok" if d.ok else f"TOO FAR (allowed {d.allowed:.2e})"
            lines.append(f"  {d.name:<{width}}  {d.error:.2e}  {d.reference_error:.2e}  {verdict}")
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


_Run = list[tuple[str, Tensor]]
"""Outputs, then gradients, by name."""


def _copy(
    tensor: Tensor, dtype: torch.dtype | None = None, noise: torch.Generator | None = None
) -> Tensor:
    """A leaf of its own; ``noise`` moves it by up to two units of (at most float32) rounding."""
    tensor = tensor.detach().to(dtype, copy=True)
    if noise is not None:
        eps = min(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps)
        unit = torch.rand(tensor.shape, generator=noise, dtype=torch.float64, device="cpu")
        unit = unit.to(tensor.device)
        tensor = (tensor.double() * (1 + eps * (4 * unit - 2))).to(tensor.dtype)
    return tensor


def _directions(outputs: list[tuple[str, Tensor]]) -> list[Tensor]:
    """One fixed random gradient of every output."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu").to(out)
        for _, out in outputs
    ]


def _gradients(
    outputs: list[tuple[str, Tensor]], directions: list[Tensor], wanted: list[Tensor]
) -> tuple[Tensor, ...]:
    # Hard attention weights, for one, are constants.
    pairs = [
        (out, grad) for (_, out), grad in zip(outputs, directions, strict=True) if out.requires_grad
    ]
    if not pairs or not wanted:
        return tuple(torch.zeros_like(leaf) for leaf in wanted)
    return torch.autograd.grad(
        [out for out, _ in pairs],
        wanted,
        [grad for _, grad in pairs],
        allow_unused=True,
        materialize_grads=True,
    )


def _run(
    op: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str,
    dtype: torch.dtype | None = None,
    jitter: int = 0,
) -> _Run:
    """Outputs and the gradients of all floating inputs, for one fixed random output gradient.

    A ``jitter`` seeds a change of every input by up to two units of (at most float32) rounding.
    """
    noise = torch.Generator("cpu").manual_seed(jitter) if jitter else None
    floats = [
        (name, t)
        for name, t in (*_named_tensors(args, "input"), *_named_tensors(kwargs, "input"))
        if t.is_floating_point()
    ]
    unique = {id(t): (name, _copy(t, dtype, noise)) for name, t in floats}
    # A table of embeddings is frozen inside the ops that take one.
    leaves = {key: leaf.requires_grad_(name != "table") for key, (name, leaf) in unique.items()}
    result = op(*_replace(args, leaves), **{**_replace(kwargs, leaves), "backend": backend})
    outputs = list(_named_tensors(result, "output"))
    wanted = [(name, leaf) for name, leaf in unique.values() if leaf.requires_grad]
    # Of long sums that are rounded alike in two runs the error cancels between them, whatever the
    # last bits of the terms. Scaled sums are rounded at other places.
    scale = 0.75 if jitter and outputs[0][1].dtype is torch.float64 else 1.0
    directions = [scale * direction for direction in _directions(outputs)]
    grads = _gradients(outputs, directions, [leaf for _, leaf in wanted])
    named = [
        (f"grad of {name}", grad / scale) for (name, _), grad in zip(wanted, grads, strict=True)
    ]
    return [(name, out.detach()) for name, out in outputs] + named


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def _differences(
    fast: _Run, oracle: _Run, plain: list[_Run], single: _Run, is_double: bool
) -> tuple[Difference, ...]:
    differences = []
    for i, ((label, mine), (_, exact)) in enumerate(zip(fast, oracle, strict=True)):
        rounding = torch.finfo(mine.dtype).eps * _rms(exact)
        factor = _GRADIENT_FACTOR if label.startswith("grad") else _OUTPUT_FACTOR
        error = _rms(mine - exact)
        reference_error = max(_rms(run[i][1] - exact) for run in plain)
        if is_double:
            # The oracle rounds as the call does, so what cancels in both shows only in float32.
            scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            reference_error = max(reference_error, scale * _rms(single[i][1] - exact))
        allowed = factor * reference_error + _ULPS * rounding
        differences.append(Difference(label, tuple(mine.shape), error, reference_error, allowed))
    return tuple(differences)


def verify(
    op: Callable[..., Any], *args: Any, backend: str = "auto", **kwargs: Any
) -> Verification:
    """Outputs and gradients of ``op`` against its reference, on the tensors given here.

    The yardstick is the reference in float64. The backend passes where it is at most twice as far
    from it (three times for gradients) as plain PyTorch gets in the dtype of the call, on these
    inputs or on inputs within rounding of them.

    Args:
        op: A function of :mod:`mimnet_fast.ops`.
        args: Its arguments; they are copied, not changed.
        backend: The backend to check.
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
    fast = _run(op, args, kwargs, backend)
    oracle = _run(op, args, kwargs, "reference", torch.float64)
    is_double = fast[0][1].dtype is torch.float64
    single = _run(op, args, kwargs, "reference", torch.float32) if is_double else oracle
    plain = [_run(op, args, kwargs, "reference")]
    for runs in _JITTERED_RUNS:
        seeds = range(len(plain), 1 + runs)
        plain += [_run(op, args, kwargs, "reference", jitter=seed) for seed in seeds]
        found = Verification(name, backend, _differences(fast, oracle, plain, single, is_double))
        if found:
            break
    return found
