"""How an op becomes one of torch's: implementations, fakes and gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from mimnet_fast._schemas import LIBRARY

SUFFIX = {"native": "", "triton": "_triton"}
"""What the name of an op ends in, by the backend that serves it."""


def _run_triton(module: str, function: str, *args: Any) -> Any:
    # Kernels are imported at their first call: Triton is optional and slow to import.
    kernels = importlib.import_module(f"mimnet_fast.kernels.{module}")
    return getattr(kernels, function)(*args)


def register(
    name: str,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> dict[str, Callable[..., Any]]:
    """Register an op and its backward op for every backend; the ops by backend, as called here.

    ``backward(kernel, ctx, *grads)`` is the gradient's formula around a backward op.
    """
    _declare(name, name, fake)
    kernels = _declare(name, f"{name}_backward", fake_backward)
    return {
        backend: _differentiable(f"{name}{suffix}", setup, partial(backward, kernels[backend]))
        for backend, suffix in SUFFIX.items()
    }


def register_inference(name: str, fake: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The same for an op without a gradient, which refuses inputs that require one."""
    return {backend: kernel.default for backend, kernel in _declare(name, name, fake).items()}


def _declare(module: str, function: str, fake: Callable[..., Any]) -> dict[str, Any]:
    """One registered op for each backend, served by ``kernels/<module>.py`` in Triton."""

    def on_one_device(*args: Any) -> Any:
        devices = {arg.device for arg in args if isinstance(arg, Tensor)}
        if len(devices) > 1:  # a meta tensor among others leads here
            raise RuntimeError(f"{function}: the tensors are on {' and '.join(map(str, devices))}")
        return fake(*args)

    for suffix in SUFFIX.values():
        torch.library.register_fake(f"mimnet_fast::{function}{suffix}", on_one_device)
    run = partial(_run_triton, module, function)
    LIBRARY.impl(f"{function}{SUFFIX['triton']}", run, "CompositeExplicitAutograd")
    return {
        backend: getattr(torch.ops.mimnet_fast, f"{function}{suffix}")
        for backend, suffix in SUFFIX.items()
    }


def _differentiable(
    name: str, setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The op with its gradient.

    The registration serves traced graphs and callers of ``torch.ops``. Its per-call bookkeeping
    grows with the square of the number of arguments (0.1 ms for the 24 of ``mimnet_forward``), so
    an eager call that may need a gradient goes through a plain autograd function with the same two
    formulas.
    """
    torch.library.register_autograd(f"mimnet_fast::{name}", backward, setup_context=setup)
    op = getattr(torch.ops.mimnet_fast, name).default

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # past the layer in Python for traced graphs
            return op(*args)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = below_autograd(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    # What `Eager.apply` ends in, without what it does before for torch.func.
    apply = super(torch.autograd.Function, Eager).apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if not torch.is_grad_enabled():
            return below_autograd(*args)
        if torch._C._are_functorch_transforms_active():
            return Eager.apply(*args)
        return apply(*args)

    return call


@lru_cache
def bits(needs: tuple[bool, ...]) -> int:
    """Flags as the bit mask that the backward ops take: bit i is ``needs[i]``."""
    return sum(1 << i for i, need in enumerate(needs) if need)


@lru_cache
def _picked(needs: tuple[bool, ...]) -> Callable[[Sequence[Any]], Any]:
    return itemgetter(*(i if need else -1 for i, need in enumerate(needs)))


def wanted(grads: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that were asked for; the backward op returns empty tensors for the others."""
    found: tuple[Tensor | None, ...] = _picked(needs)((*grads, None))
    return found


def empty_or_like(tensors: Sequence[Tensor | None], like: Tensor, needs: int) -> tuple[Tensor, ...]:
    """Fake result of a backward op: like the input where its bit is set, else empty."""
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        if t is not None and needs >> i & 1
        else like.new_empty(0)
        for i, t in enumerate(tensors)
    )


def reference_vjp(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Differentiable gradients of ``function(*inputs)``, for a backward to differentiate again.

    Kernels have no second derivative of their own, so the reference supplies it. Every input
    becomes a view of itself: the same tensor passed twice must not get both shares in both places.
    """
    with torch.enable_grad():
        views = [
            t.view_as(t) if n and t is not None else t for t, n in zip(inputs, needs, strict=True)
        ]
        outputs = function(*views)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grad_outputs, strict=True)
            if grad is not None and out.requires_grad
        ]
        targets = [v for v, n in zip(views, needs, strict=True) if n and v is not None]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                targets,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(found) if n and v is not None else None for v, n in zip(views, needs, strict=True)]
