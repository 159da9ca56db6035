"""Put the ops into somebody else's model: one instance at a time, checked, and back again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from mimnet_fast import backends
from mimnet_fast._adapters import ADAPTERS, Adapter, Forward
from mimnet_fast.verify import (
    _JITTERED_RUNS,
    Difference,
    _copy,
    _differences,
    _directions,
    _gradients,
    _named_tensors,
    _rms,
    _Run,
)

_registered: list[Adapter] = []
_MOST_CALLS = 4
"""Of one layer in one run of the model; a layer in a loop is not checked in every round."""


def register_adapter(adapter: Adapter) -> Adapter:
    """Teach :func:`swap` a layer, for all later calls; usable as a decorator.

    Args:
        adapter: Takes a module and returns its replacement, a function that is called like the
            layer's ``forward`` with the layer as its first argument; or a string that says why a
            layer that it knows has to stay; or None for every other module. It is asked before
            those that come with the package and those registered earlier.

    Returns:
        The adapter.

    Raises:
        TypeError: if it is not callable.

    Example:
        >>> import torch
        >>> from mimnet_fast import ops
        >>> class Squasher(torch.nn.Module):
        ...     def forward(self, x):
        ...         n2 = (x * x).sum(-1, keepdim=True)
        ...         return n2 / (1 + n2) * x / (n2 + 1e-8).sqrt()
        >>> @register_adapter
        ... def squasher(layer):
        ...     if type(layer).__name__ == "Squasher":
        ...         return lambda layer, x: ops.squash(x)
        >>> model = torch.nn.Sequential(Squasher())
        >>> swap(model, example_inputs=(torch.randn(5, 4),)).report[0].swapped
        True
    """
    if not callable(adapter):
        raise TypeError(f"adapter: got {type(adapter).__name__}, need a function of a module")
    _registered.insert(0, adapter)
    return adapter


@dataclass(frozen=True)
class Row:
    """What became of one layer."""

    path: str
    """Its name in the model, more than one where it is shared."""
    layer: str
    """Name of its class."""
    adapter: str
    swapped: bool
    outcome: str
    """The ops that serve it now, each with its backend; or why it was left alone."""
    worst: Difference | None = None
    """Of its outputs and gradients the one that comes nearest to what is allowed, or exceeds it."""


class Report(tuple[Row, ...]):
    """A row for each layer that an adapter knows; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "swap: no layer that an adapter knows; see register_adapter for your own"
        table = [("layer", "class", "adapter", "error / allowed", "outcome")]
        for row in self:
            error = f"{row.worst.error:.1e} / {row.worst.allowed:.1e}" if row.worst else "-"
            outcome = row.outcome if row.swapped else f"left alone: {row.outcome}"
            table.append((row.path, row.layer, row.adapter, error, outcome))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        )
        return "\n".join(lines)


class Handle:
    """What :func:`swap` did, and the way back. As a context manager it undoes at the exit."""

    def __init__(self, report: Report, replaced: list[tuple[Module, MethodType]]) -> None:
        self.report = report
        self._replaced = replaced

    def undo(self) -> None:
        """Give every layer its own forward back; a second call does nothing."""
        while self._replaced:
            layer, forward = self._replaced.pop()
            if vars(layer).get("forward") is forward:  # else it was replaced again since
                del layer.forward

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Candidate:
    """A layer that an adapter has something to say about."""

    layer: Module
    adapter: str
    found: Forward | str
    paths: list[str]
    calls: list[_Call] = field(default_factory=list)

    def row(self, swapped: bool, outcome: str, worst: Difference | None = None) -> Row:
        name = ", ".join(path or "(the model)" for path in self.paths)
        return Row(name, type(self.layer).__name__, self.adapter, swapped, outcome, worst)


def _candidates(model: Module) -> list[_Candidate]:
    known: dict[int, _Candidate | None] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if id(layer) not in known:
            known[id(layer)] = _recognise(layer)
        candidate = known[id(layer)]
        if candidate is not None:
            candidate.paths.append(path)
    return [candidate for candidate in known.values() if candidate is not None]


def _recognise(layer: Module) -> _Candidate | None:
    for adapter in (*_registered, *ADAPTERS):
        name = getattr(adapter, "__name__", str(adapter))
        found = adapter(layer)
        if found is None:
            continue
        if not isinstance(found, str) and not callable(found):
            raise TypeError(
                f"adapter {name}: returned {type(found).__name__}, need a function, a reason as a "
                "string, or None"
            )
        cells = getattr(found, "__closure__", None) or ()
        if any(cell.cell_contents is layer for cell in cells):
            raise ValueError(
                f"adapter {name}: its replacement keeps the layer it was made for, so that a copy "
                "of the model would run the layer of the original; use the first argument instead"
            )
        if "forward" in vars(layer):
            found = "the forward of this instance was replaced before"
        return _Candidate(layer, name, found, [])
    return None


def swap(model: Module, example_inputs: Sequence[Any] | None = None, check: bool = True) -> Handle:
    """Let the ops compute what layers of ``model`` compute; nothing outside of this instance.

    Only the ``forward`` of a layer changes, on the instance. Modules, parameters, buffers and hooks
    stay the same objects under the same names, so an optimiser goes on as before.

    With ``check`` the model runs once on the example inputs. Each layer that would be replaced is
    then called on what reached it, old and new with the same random numbers, and outputs and
    gradients are compared with the layer in float64. The new one may be twice (for gradients three
    times) as far from that as the old one is in its own dtype; a layer that is farther stays, and
    the report says by how much. The model's buffers, gradients and the random state stay as they
    were.

    Args:
        model: Any module, also a compiled one.
        example_inputs: Positional arguments of the model, in the mode (train or eval), dtype and
            autocast that it is used in.
        check: Without it every layer that an adapter knows is replaced unchecked.

    Returns:
        A :class:`Handle` with ``report`` and ``undo()``, also usable in a ``with`` statement.

    Raises:
        TypeError: for a model that is no module, inputs that are no tuple, an adapter that returns
            something else than it should.
        ValueError: for a check without inputs, an adapter whose replacement keeps its layer.

    Example:
        >>> import torch
        >>> from mimnet_fast import swap
        >>> class CapsuleLayer(torch.nn.Module):  # as the released MIMNet names it
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.k_max, self.iters, self.init_std, self.device = 3, 3, 1.0, "cpu"
        ...         self.bilinear_mapping_matrix = torch.nn.Parameter(torch.randn(4, 4))
        ...     def forward(self, behavior_embs, seq_len):
        ...         raise NotImplementedError("its own loop over iterations")
        >>> model = torch.nn.ModuleDict({"capsules": CapsuleLayer()})
        >>> with swap(model, check=False) as handle:
        ...     model["capsules"](torch.randn(2, 5, 4), torch.tensor([[5], [2]])).shape
        torch.Size([2, 3, 4])
        >>> print(handle.report)
        layer     class         adapter          error / allowed  outcome
        capsules  CapsuleLayer  mimnet_capsules  -                not checked
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: got {type(model).__name__}, need a torch.nn.Module instance")
    if check and example_inputs is None:
        raise ValueError(
            "example_inputs: got None, need the arguments of the model as a tuple, to check the "
            "layers on; pass check=False to replace them unchecked"
        )
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise TypeError(
            f"example_inputs: got {type(example_inputs).__name__}, need a tuple of the positional "
            "arguments of the model, as in example_inputs=(x,)"
        )
    candidates = _candidates(model)
    with torch.compiler.set_stance("force_eager"):  # what is compiled cannot be recorded
        replaceable = [c for c in candidates if not isinstance(c.found, str)]
        if check and replaceable:
            _record(model, replaceable, example_inputs or ())
        report = Report(_judge(candidate, check) for candidate in candidates)
    replaced = []
    for candidate, row in zip(candidates, report, strict=True):
        if row.swapped:
            replaced.append((candidate.layer, _replace_forward(candidate.layer, candidate.found)))
    return Handle(report, replaced)


def _replace_forward(layer: Module, forward: Any) -> MethodType:
    # A bound method and not a closure: copy.deepcopy binds it to the copy of the layer.
    layer.forward = method = MethodType(forward, layer)
    return method


# What reaches the layers


def _record(model: Module, candidates: list[_Candidate], example_inputs: Sequence[Any]) -> None:
    """Run the model and keep the arguments of the layers.

    Forwards are replaced for that and not hooked, because released models call ``layer.forward``
    directly, which runs no hooks.
    """

    def recorder(candidate: _Candidate) -> Forward:
        def record(layer: Module, *args: Any, **kwargs: Any) -> Any:
            if len(candidate.calls) < _MOST_CALLS:
                copied = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
                candidate.calls.append(copied)
            return type(layer).forward(layer, *args, **kwargs)

        return record

    for candidate in candidates:
        _replace_forward(candidate.layer, recorder(candidate))
    try:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad(), _same_random_numbers():
            functional_call(model, buffers, tuple(example_inputs))
    finally:
        for candidate in candidates:
            del candidate.layer.forward


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Start from the present random state and leave it as it is."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        yield


# Old against new


def _judge(candidate: _Candidate, check: bool) -> Row:
    new = candidate.found
    if isinstance(new, str):
        return candidate.row(False, new)
    if not check:
        return candidate.row(True, "not checked")
    if not candidate.calls:
        return candidate.row(
            False, "example_inputs do not reach it, so that it could not be checked"
        )
    found: list[Difference] = []
    served: list[backends.Served] = []
    try:
        for call in candidate.calls:
            found += _compare(candidate.layer, new, call, served)
    except _Refused as refused:
        return candidate.row(False, str(refused))
    except Exception as error:  # whatever a layer of somebody else raises
        return candidate.row(False, f"the check raised {type(error).__name__}: {error}")
    worst = max(found, key=_closeness)
    if not worst.ok:
        far = f"{worst.name} is {worst.error:.1e} from the layer in float64"
        return candidate.row(False, f"{far}, allowed are {worst.allowed:.1e}", worst)
    outcome = {
        f"{call.op} on {call.backend}" + (f" ({call.why})" if call.why else "") for call in served
    }
    return candidate.row(True, ", ".join(sorted(outcome)) or "no op", worst)


def _closeness(difference: Difference) -> float:
    """Error in units of what is allowed, infinite where there is no saying."""
    if difference.ok:
        return difference.error / difference.allowed if difference.allowed else 0.0
    ratio = difference.error / difference.allowed if difference.allowed else float("inf")
    return ratio if ratio > 1 else float("inf")


class _Refused(Exception):
    """Old and new cannot even be compared."""


def _compare(
    layer: Module, new: Forward, call: _Call, served: list[backends.Served]
) -> tuple[Difference, ...]:
    """Differences of ``new`` from the layer on one call, and in ``served`` who computes it."""
    old = type(layer).forward
    tensors = [*layer.parameters(), *(t for _, t in _inputs(call))]
    own = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    plain = [_run(layer, old, call)]
    oracle = _run(layer, old, call, own, torch.float64)
    single = oracle
    if own is torch.float64:
        single = _run(layer, old, call, own, torch.float32)
    with backends.watch() as watched:
        fast = _run(layer, new, call)
    served += watched
    got, needed = _described(fast), _described(plain[0])
    if got != needed:
        raise _Refused(f"its replacement returns {got}, the layer {needed}")
    _be_near(plain[0], oracle, own)
    for runs in _JITTERED_RUNS:
        seeds = range(len(plain), 1 + runs)
        plain += [_run(layer, old, call, jitter=seed) for seed in seeds]
        found = _differences(fast, oracle, plain, single, own is torch.float64)
        if all(difference.ok for difference in found):
            break
    return found


def _be_near(plain: _Run, oracle: _Run, own: torch.dtype) -> None:
    """Refuse a yardstick that is no yardstick: any result would be as near to it as the layer is.

    A layer that draws random numbers in a way of its own gets other ones in float64.
    """
    for (name, mine), (_, exact) in zip(plain, oracle, strict=True):
        far, size = _rms(mine - exact), _rms(exact)
        if not name.startswith("grad") and not far <= torch.finfo(own).eps ** 0.25 * size:
            raise _Refused(
                f"{name} of the layer itself is {far:.1e} from float64, {size:.1e} in size: "
                "nothing can be compared with that"
            )


def _described(run: _Run) -> str:
    outputs = [t for name, t in run if not name.startswith("grad")]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in outputs)


def _inputs(call: _Call) -> Iterator[tuple[str, Tensor]]:
    args, kwargs = call
    named = (*_named_tensors(args, "input"), *_named_tensors(kwargs, "input"))
    for i, (name, tensor) in enumerate(named):
        yield f"{name} (tensor {i})", tensor  # names of dictionaries inside may repeat


class _Bare(Module):
    """A layer called without its hooks, which have seen the recorded arguments already."""

    def __init__(self, layer: Module, forward: Forward) -> None:
        super().__init__()
        self.layer, self.call = layer, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.layer, *args, **kwargs)


def _run(
    layer: Module,
    forward: Forward,
    call: _Call,
    own: torch.dtype | None = None,
    target: torch.dtype | None = None,
    jitter: int = 0,
) -> _Run:
    """Outputs and the gradients of parameters and floating inputs.

    With a ``target`` in that dtype instead of the layer's ``own``, with a ``jitter`` on tensors
    within rounding of these.
    """
    noise = torch.Generator("cpu").manual_seed(jitter) if jitter else None
    mode: AbstractContextManager[Any] = nullcontext()
    if own is not None and target is not None:
        mode = _InDtype(own, target)
    wanted: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        return wanted.setdefault(name, _copy(tensor, target, noise).requires_grad_())

    state = {f"layer.{n}": leaf(f"parameter {n}", t) for n, t in layer.named_parameters()}
    for name, buffer in layer.named_buffers():
        to = target if buffer.is_floating_point() else None
        state[f"layer.{name}"] = buffer.to(to, copy=True)
    given = {id(t): leaf(n, t) for n, t in _inputs(call)}
    args, kwargs = tree_map_only(Tensor, lambda t: given.get(id(t), t), call)
    with torch.enable_grad(), _same_random_numbers():
        with mode:
            result = functional_call(_Bare(layer, forward), state, args, kwargs)
        outputs = [
            # Masks and indices have to be the same, which is the case of error 0.
            (n, t if t.is_floating_point() else t.double())
            for n, t in _named_tensors(result, "output")
        ]
        directions = _directions(outputs)
        with mode:
            grads = _gradients(outputs, directions, list(wanted.values()))
    named = [(f"grad of {name}", grad) for name, grad in zip(wanted, grads, strict=True)]
    return [(name, out.detach()) for name, out in outputs] + named


class _InDtype(TorchDispatchMode):
    """Compute in ``target`` what a layer computes in its own dtype, with the same random numbers.

    A layer that asks for float32 by name (an accumulator, a mask) gets ``target`` too.
    """

    def __init__(self, own: torch.dtype, target: torch.dtype) -> None:
        super().__init__()
        self.own, self.target = own, target

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Random numbers depend on the dtype that they are drawn in.
        random = torch.Tag.nondeterministic_seeded in func.tags
        inputs = self.own if random else self.target

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(inputs) if value.is_floating_point() else value
            if isinstance(value, torch.dtype) and value.is_floating_point:
                return inputs if value is self.target or not random else value
            return value

        inner = tree_map(cast, args)
        result = func(*inner, **tree_map(cast, kwargs or {}))
        if func._schema.is_mutable and inner and inner[0] is not args[0]:
            return args[0].copy_(result)
        return tree_map(
            lambda t: t.to(self.target) if isinstance(t, Tensor) and t.is_floating_point() else t,
            result,
        )
