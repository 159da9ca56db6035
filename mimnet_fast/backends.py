"""Which backend can serve a call, and why not.

``"native"`` is the compiled library of the tensors' device, ``"reference"`` is plain PyTorch and
always available, ``"auto"`` takes the first that can. A backend asked for by name that cannot serve
raises :class:`BackendUnavailable` with every reason; ``auto`` goes on to the next and logs that
once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mimnet_fast import _schemas  # noqa: F401  (declares the ops that the libraries implement)

logger = logging.getLogger("mimnet_fast")

NAMES = ("auto", "native", "triton", "reference")
"""What `backend=`, :func:`use_backend` and `MIMNET_FAST_BACKEND` accept."""

_ORDER = ("native", "triton")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot serve this call; the message says why."""


class _Explanation(Exception):
    """Carries the reasons of a call out of its op, for :func:`explain`."""

    def __init__(self, reasons: dict[str, list[str]]) -> None:
        super().__init__()
        self.reasons = reasons


def _load(name: str) -> str | None:
    """Load ``mimnet_fast/<name>.so``; None, or the reason why it is not there."""
    path = Path(__file__).with_name(f"{name}.so")
    if not path.exists():
        return (
            f"{path.name} is not built: reinstall with a C++ compiler and MIMNET_FAST_BUILD=cpu to "
            "see the build's error (in a checkout, install with `pip install -e .`)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    return None


_LIBRARY_OF_DEVICE = {"cpu": "_C"}
_load_status = {name: _load(name) for name in _LIBRARY_OF_DEVICE.values()}


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        choices = ", ".join(map(repr, NAMES))
        raise ValueError(f"{where}: got {name!r}, need one of {choices}")
    return name


_default = _checked(os.environ.get("MIMNET_FAST_BACKEND", "auto"), "MIMNET_FAST_BACKEND")
_EXPLAIN: Any = object()
"""As `backend` of a call: raise :class:`_Explanation` instead of choosing."""
_logged: set[tuple[str, ...]] = set()


def load_status() -> dict[str, str | None]:
    """Native libraries by name: None when loaded, else the reason.

    >>> sorted(load_status())
    ['_C']
    """
    return dict(_load_status)


def _native_problem(device_type: str) -> str | None:
    library = _LIBRARY_OF_DEVICE.get(device_type)
    if library is None:
        return f"no compiled kernels for {device_type} tensors in this version"
    return _load_status[library]


def _triton_problem(device_type: str) -> str | None:
    return "this version has no Triton kernels"


_PROBLEMS: dict[str, Callable[[str], str | None]] = {
    "native": _native_problem,
    "triton": _triton_problem,
}


def available(device_type: str = "cpu") -> dict[str, str | None]:
    """Backends by name for tensors on ``device_type``: None when usable, else the reason.

    >>> available()["reference"] is None
    True
    """
    return {**{name: _PROBLEMS[name](device_type) for name in _ORDER}, "reference": None}


def _reasons(device_type: str, unsupported: list[str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name in _ORDER:
        problem = _PROBLEMS[name](device_type)
        reasons[name] = [problem] if problem else list(unsupported)
    reasons["reference"] = []
    return reasons


def select(op: str, backend: str | None, device_type: str, unsupported: list[str]) -> str:
    """Name of the backend that serves this call of ``op``.

    ``unsupported`` lists what this call asks of a kernel that no kernel offers yet.
    """
    if backend is _EXPLAIN:
        raise _Explanation(_reasons(device_type, unsupported))
    name = _default if backend is None else _checked(backend, "backend")
    if name == "reference":
        return name
    if name == "auto":
        if not unsupported and _native_problem(device_type) is None:
            return "native"
        if not torch.compiler.is_compiling():
            _log_fallback(op, _reasons(device_type, unsupported))
        return "reference"
    problems = _reasons(device_type, unsupported)[name]
    if problems:
        raise BackendUnavailable(
            f"{op}: backend {name!r} cannot serve this call: {'; '.join(problems)}. "
            'Use backend="auto" to fall back to the reference.'
        )
    return name


def _log_fallback(op: str, reasons: dict[str, list[str]]) -> None:
    why = tuple(f"{name}: {'; '.join(texts)}" for name, texts in reasons.items() if texts)
    if (op, *why) not in _logged:
        _logged.add((op, *why))
        logger.info("%s runs on the reference (%s)", op, " | ".join(why))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make ``name`` the backend of every call in the block that does not name one itself.

    The setting belongs to the process, not to the thread.

    >>> import torch
    >>> from mimnet_fast import ops
    >>> with use_backend("reference"):
    ...     ops.squash(torch.zeros(2)).tolist()
    [0.0, 0.0]
    """
    global _default
    before, _default = _default, _checked(name, "use_backend")
    try:
        yield
    finally:
        _default = before


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, list[str]]:
    """Per backend the reasons why it cannot serve this call of ``op``; an empty list means it can.

    Nothing is computed, but wrong arguments raise as in the call itself.

    >>> import torch
    >>> explain("squash", torch.ones(3))["reference"]
    []
    """
    from mimnet_fast import ops

    functions = {name: getattr(ops, name) for name in ops.FUNCTIONS}
    function: Any = functions.get(op, op) if isinstance(op, str) else op
    if function not in functions.values():
        raise ValueError(f"op: got {op!r}, need one of {', '.join(functions)}")
    try:
        function(*args, **{**kwargs, "backend": _EXPLAIN})
    except _Explanation as explanation:
        return explanation.reasons
    raise AssertionError("an op always selects a backend")
