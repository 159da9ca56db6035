"""Which backend can serve a call, and why not.

``"native"`` is the compiled library of the tensors' device, ``"reference"`` is plain PyTorch and
always available, ``"auto"`` takes the first that can. A backend asked for by name that cannot serve
raises :class:`BackendUnavailable` with every reason; ``auto`` goes on to the next and logs that
once.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimnet_fast import _schemas  # noqa: F401  (declares the ops that the libraries implement)

logger = logging.getLogger("mimnet_fast")

NAMES = ("auto", "native", "triton", "reference")
"""What `backend=`, :func:`use_backend` and `MIMNET_FAST_BACKEND` accept."""

KERNELS = ("native", "triton")
"""The backends with kernels, in the order in which reasons are given."""
_AUTO = {"cpu": ("native",), "cuda": ("native", "triton")}
"""What `auto` tries, by device; on the CPU, Triton only has an interpreter for tests."""

Unsupported = Mapping[str, Sequence[str]]
"""By backend, what a call asks of its kernels that they do not offer."""


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
        mode, compiler = ("cuda", "nvcc") if name.endswith("_cuda") else ("cpu", "a C++ compiler")
        return (
            f"{path.name} is not built: reinstall with {compiler} and MIMNET_FAST_BUILD={mode} to "
            "see the build's error (in a checkout, install with `pip install -e .`)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    return None


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LIBRARY_OF_DEVICE = {"cpu": "_C", "cuda": "_C_cuda"}
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


class Served(NamedTuple):
    """A call of an op: who served it, and why no kernel did where that was the reference."""

    op: str
    backend: str
    why: str


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError)
"""What a call may end in that went to the compiled kernels as it was."""


_watched: list[Served] | None = None
"""Where :func:`watch` collects."""


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, which torch writes through a stream each time it is asked."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def load_status() -> dict[str, str | None]:
    """Native libraries by name: None when loaded, else the reason.

    >>> sorted(load_status())
    ['_C', '_C_cuda']
    """
    return dict(_load_status)


def _native_problem(device_type: str) -> str | None:
    library = _LIBRARY_OF_DEVICE.get(device_type)
    if library is None:
        return f"no compiled kernels for {device_type} tensors in this version"
    return _load_status[library] or (_architecture_problem() if device_type == "cuda" else None)


def _architecture_problem() -> str | None:
    return _compare_architectures()


if _load_status["_C_cuda"] is None:  # importing the compiler takes a second
    _architecture_problem = torch.compiler.assume_constant_result(_architecture_problem)


@lru_cache
def _compare_architectures() -> str | None:
    """Why the compiled CUDA kernels cannot run on every GPU of this process; None if they can."""
    report = json.loads(Path(__file__).with_name("_build_info.json").read_text())
    built = report["cuda_architectures"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not any(_runs_on(architecture, major, minor) for architecture in built):
            return (
                f"_C_cuda.so was built for {', '.join(built)}, but GPU {index} is {major}.{minor}: "
                f'reinstall with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
            )
    return None


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for ``"8.0"`` (that major, later minors) or ``"8.0+PTX"`` (all later) runs."""
    number, _, ptx = architecture.partition("+")
    built_major, built_minor = (int(part) for part in number.split("."))
    if ptx:
        return (built_major, built_minor) <= (major, minor)
    return built_major == major and built_minor <= minor


def _triton_problem(device_type: str) -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed: pip install triton (CUDA builds of torch bring their own)"
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cuda" or interpreted:
        return None
    return (
        f"no Triton kernels for {device_type} tensors, only for cuda (on the CPU, for tests, under "
        "TRITON_INTERPRET=1)"
    )


_PROBLEMS: dict[str, Callable[[str], str | None]] = {
    "native": _native_problem,
    "triton": _triton_problem,
}


_SERVE_FLOAT64 = [("native", "cpu")]


def _problem(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    if dtype is torch.float64 and (name, device_type) not in _SERVE_FLOAT64:
        return f"no {name} kernels for float64 {device_type} tensors: use float32"
    return _PROBLEMS[name](device_type)


def available(device_type: str = "cpu") -> dict[str, str | None]:
    """Backends by name for tensors on ``device_type``: None when usable, else the reason.

    >>> available()["reference"] is None
    True
    """
    return {**{name: _PROBLEMS[name](device_type) for name in KERNELS}, "reference": None}


def _reasons(like: Tensor, unsupported: Unsupported) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name in KERNELS:
        problem = _problem(name, device_type(like), like.dtype)
        reasons[name] = [problem] if problem else list(unsupported.get(name, ()))
    reasons["reference"] = []
    return reasons


def select(op: str, backend: str | None, like: Tensor, unsupported: Unsupported) -> str:
    """Name of the backend that serves this call of ``op`` on tensors like ``like``.

    ``unsupported`` lists, by backend, what this call asks of a kernel that it does not offer.
    """
    chosen = _choose(op, backend, like, unsupported)
    if _watched is not None:
        kernels = _AUTO.get(device_type(like), KERNELS) if chosen == "reference" else ()
        why = [reason for name in kernels for reason in _reasons(like, unsupported)[name]]
        _watched.append(Served(op, chosen, "; ".join(dict.fromkeys(why))))
    return chosen


def _choose(op: str, backend: str | None, like: Tensor, unsupported: Unsupported) -> str:
    if backend is _EXPLAIN:
        raise _Explanation(_reasons(like, unsupported))
    name = _default if backend is None else _checked(backend, "backend")
    if name == "reference":
        return name
    if name == "auto":
        for candidate in _AUTO.get(device_type(like), ()):
            if unsupported.get(candidate):
                continue
            if _problem(candidate, device_type(like), like.dtype) is None:
                return candidate
        if not torch.compiler.is_compiling():
            _log_fallback(op, _reasons(like, unsupported))
        return "reference"
    problems = _reasons(like, unsupported)[name]
    if problems:
        raise BackendUnavailable(
            f"{op}: backend {name!r} cannot serve this call: {'; '.join(problems)}. "
            'Use backend="auto" to fall back to the reference.'
        )
    return name


def trusts_native(backend: str | None, like: Any, *tensors: Any) -> bool:
    """Whether a call may go to the compiled kernels as it is, which refuse what does not fit.

    It may where they come first, all tensors (or None) are plain ones, and nothing traces, converts
    or watches the call. The op's function then looks for what is wrong only after a refusal.
    """
    return (
        (_default if backend is None else backend) in ("auto", "native")
        and isinstance(like, Tensor)
        and _PLAIN.issuperset(map(type, (like, *tensors)))
        and _watched is None
        and not torch.compiler.is_compiling()
        and _problem("native", device := device_type(like), like.dtype) is None
        and not torch.is_autocast_enabled(device)
    )


def _log_fallback(op: str, reasons: dict[str, list[str]]) -> None:
    why = tuple(f"{name}: {'; '.join(texts)}" for name, texts in reasons.items() if texts)
    if (op, *why) not in _logged:
        _logged.add((op, *why))
        logger.info("%s runs on the reference (%s)", op, " | ".join(why))


@contextmanager
def watch() -> Iterator[list[Served]]:
    """Collect which backend serves every call of an op in the block, in this process.

    >>> import torch
    >>> from mimnet_fast import ops
    >>> with watch() as served:
    ...     _ = ops.squash(torch.zeros(2), backend="reference")
    >>> [(call.op, call.backend) for call in served]
    [('squash', 'reference')]
    """
    global _watched
    before, _watched = _watched, []
    try:
        yield _watched
    finally:
        _watched = before


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
