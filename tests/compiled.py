"""Kernels compiled ahead of time, without a GPU, and what the machine code says of them.

`python tests/compiled.py triton|cuda [ARCHITECTURE ...]` prints one table. The exit code is 1 where
a kernel spills, asks for more than the hardware has or misses instructions it was written for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from cases import (  # noqa: E402
    EVERY_OP,
    SAME_TRITON_KERNELS,
    Call,
    attention_call,
    catalogue_call,
    mimnet_call,
    padded_and_jagged,
    routing_call,
)

from bench import cases as sizes  # noqa: E402
from mimnet_fast import backends, ops  # noqa: E402

JOBS = 2
ARCHITECTURES = {"triton": ("90",), "cuda": ("90",)}

# Bytes of shared memory that a block can have. sm_86, sm_89 and sm_120 have the least of all.
SHARED_MEMORY = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10}
LEAST_SHARED_MEMORY = 99 << 10

_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
_WIDE_LOADS = re.compile(r"\b(?:LDG\.\S*128|LDGSTS\.\S*128|UTMALDG|UBLKCP)\b")


@dataclass(frozen=True)
class Code:
    """What a kernel needs on one architecture."""

    registers: int
    stack: int  # bytes; what spills is here
    shared: int  # bytes
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A kernel, where it comes from, and its code by architecture."""

    name: str
    origin: str
    codes: dict[str, Code]


def _run(*command: str | Path) -> str:
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{process.stdout}")
    return process.stdout


def _dump(binary: Path, *options: str) -> str:
    import triton

    return _run(triton.knobs.nvidia.cuobjdump.path, *options, binary)


def read(binary: Path, *options: str) -> dict[str, Code]:
    """Every kernel of a cubin or an object file, by its symbol."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        _dump(binary, "--dump-resource-usage", *options),
    )
    return {
        symbol: Code(int(registers), int(stack) + int(local), int(shared))
        for symbol, registers, stack, shared, local in usage
    }


def instructions(binary: Path, *options: str) -> dict[str, str]:
    """The disassembly of every kernel, by its symbol."""
    _, *parts = re.split(r"Function : (\S+)", _dump(binary, "--dump-sass", *options))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def over_the_limits(code: Code, architecture: str) -> Iterator[str]:
    if code.stack:
        yield f"{code.stack} bytes of stack: registers spill, or an array is indexed at run time"
    most = SHARED_MEMORY.get(architecture, LEAST_SHARED_MEMORY)
    if code.shared > most:
        yield f"{code.shared >> 10} KB of shared memory, where a block has at most {most >> 10}"


# Triton


class _NoDriver:
    """Stands for the driver of a machine that has such a GPU."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", int(architecture), 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # Triton keeps code per device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class _Variant:
    """A kernel with its constants, argument types and options, as a launcher asks for it."""

    kernel: Any
    label: str  # of the first call that asks for it
    data: dict[str, str] = field(default_factory=dict)  # by architecture, for JITFunction.preload


class _Launchers(TorchDispatchMode):
    """Calls the launchers in the place of the ops, whose arguments are theirs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "mimnet_fast":
            return func(*args, **(kwargs or {}))
        function = func.__name__.partition(".")[0].removesuffix("_triton")
        module = f"mimnet_fast.kernels.{function.removesuffix('_backward')}"
        return getattr(importlib.import_module(module), function)(*args)


def _calls() -> Iterator[tuple[str, Call]]:
    """The standard sizes, from padded to wide, and every kind of argument; few for every path."""
    widest = sizes.Case("D128", 16, 20, 7, 128, 128)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for op in ops.DIFFERENTIABLE:
            for case in (sizes.PAPER, sizes.WIDE, widest):
                call = sizes.make_call(op, case, dtype)
                yield f"{case.name} {name}", Call(getattr(ops, op), call.args, call.kwargs)
        capsnet = {"b": 16, "length": 1152, "k": 10, "d_in": 8, "d": 16, "weight": "per_capsule"}
        yield f"capsnet {name}", routing_call(**capsnet, dtype=dtype).trainable()
        over_inputs = {"k": 10, "d_in": 64, "d": 64, "softmax_over": "inputs", "padding": "ignore"}
        call = routing_call(**over_inputs, weight="per_capsule", history="mask", dtype=dtype)
        yield f"over inputs {name}", call.trainable()
        for weight in ("shared", "per_capsule"):
            update = {"update": "coupling", "normalize_agreement": True, "weight": weight}
            wide = {"length": 50, "k": 8, "d_in": 64, "d": 64, "history": "mask"}
            call = routing_call(**update, **wide, dtype=dtype)
            yield f"update {name}", call.trainable()
            full = {"gradient": "full", "softmax_over": "inputs", "weight": weight}
            call = routing_call(**full, **wide, dtype=dtype)
            yield f"full {name}", call.trainable()
        for jagged in (
            wide,
            full | wide,
            {"length": 12, "k": 7, "d_in": 128, "d": 128, "gradient": "full"},
        ):
            call = routing_call(**{**jagged, "history": "all"}, dtype=dtype)
            lengths = [call.args[0].shape[1]] * call.args[0].shape[0]
            yield f"jagged {name}", padded_and_jagged(call, lengths)[1].trainable()
        for ids in (None, torch.int64):
            call = mimnet_call(length=50, k=7, d=32, h=64, ids=ids, dtype=dtype)
            yield f"jagged {name}", padded_and_jagged(call, [50] * 5)[1].trainable()
        yield f"C=100 {name}", attention_call(k=8, d=64, c=100, dtype=dtype).trainable()
        for d in (10, 32, 64):
            for prototypes, seen in ((3, 5), (None, 0)):
                options = {"prototypes": prototypes, "seen": seen, "dtype": dtype}
                yield f"catalogue D{d} {name}", catalogue_call(k=7, d=d, n=999, **options)
        for kind in ("votes", "per_position"):
            normalized = full | {"weight": kind, "normalize_agreement": True, "b": 128}
            yield f"{kind} {name}", routing_call(**normalized, **wide, dtype=dtype).trainable()
    for kind, build in EVERY_OP.items():
        if kind not in SAME_TRITON_KERNELS:
            yield kind, build().trainable()


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def variants(calls: Iterable[tuple[str, Call]], architectures: Sequence[str]) -> list[_Variant]:
    """Every kernel that the launchers start in forward and backward of the calls."""
    import triton

    def select(_op: str, _backend: str | None, _like: Tensor, unsupported: Any) -> str:
        if unsupported.get("triton"):
            raise backends.BackendUnavailable
        return "triton"

    backends.select = select  # no backend has kernels for meta tensors
    found: dict[tuple[Any, ...], _Variant] = {}

    def collect(
        label: str, architecture: str, *, fn: Any, compile: dict[str, Any], **_: Any
    ) -> bool:
        data = json.loads(compile["specialization_data"])
        for of_the_architecture in ("options", "key", "target"):
            data.pop(of_the_architecture, None)
        key = fn.jit_function, json.dumps(data), compile["num_warps"], compile["num_stages"]
        variant = found.setdefault(key, _Variant(fn.jit_function, label))
        variant.data[architecture] = compile["specialization_data"]
        return True  # that is, neither compile nor launch

    for label, call in calls:
        for architecture in architectures:
            triton.runtime.driver.set_active(_NoDriver(architecture))
            triton.knobs.runtime.jit_cache_hook = partial(collect, label, architecture)
            with _Launchers(), suppress(backends.BackendUnavailable):
                outputs = call.map(_on_meta).outputs()
                used = [out for out in outputs if out.requires_grad]
                if used:
                    torch.autograd.backward(used, [torch.empty_like(out) for out in used])
    triton.knobs.runtime.jit_cache_hook = None
    return list(found.values())


_found: list[_Variant] = []  # each process finds them anew: a JIT function cannot be sent


def _find_variants(architectures: Sequence[str]) -> None:
    _found[:] = variants(_calls(), architectures)


def _compile_variant(index: int, architecture: str) -> Code:
    import triton

    variant = _found[index]
    triton.runtime.driver.set_active(_NoDriver(architecture))
    compiled = variant.kernel.preload(variant.data[architecture])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        binary = Path(file.name)
        binary.write_bytes(compiled.asm["cubin"])
        (code,) = read(binary).values()
        code = replace(code, shared=compiled.metadata.shared)
        problems = list(over_the_limits(code, architecture))
        dots = re.findall(r"tt\.dot .*", compiled.asm["ttir"])
        if any("xf16>" in dot or "xbf16>" in dot for dot in dots):
            (sass,) = instructions(binary).values()
            if not _TENSOR_CORES.search(sass):
                problems.append("multiplies half-precision tiles without tensor cores")
    return replace(code, problems=tuple(problems))


def compile_triton(architectures: Sequence[str]) -> list[Kernel]:
    """What the launchers start for `_calls`."""
    _find_variants(architectures)
    # Not forked: locks that the threads of torch hold would stay locked in the workers.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(JOBS, spawn, _find_variants, (architectures,)) as pool:
        jobs = [
            {arch: pool.submit(_compile_variant, index, arch) for arch in variant.data}
            for index, variant in enumerate(_found)
        ]
        return [
            Kernel(
                variant.kernel.__name__,
                variant.label,
                {architecture: job.result() for architecture, job in by_architecture.items()},
            )
            for variant, by_architecture in zip(_found, jobs, strict=True)
        ]


# CUDA


def _build(folder: Path, architectures: Sequence[str]) -> list[Path]:
    """Object files of the kernels, compiled as an installation compiles them."""
    targets = ";".join(f"{architecture}-real" for architecture in architectures)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_ARCHITECTURES": targets,
        "MIMNET_FAST_CUDA": "ON",
        "MIMNET_FAST_VERSION": "0",
        "TORCH_DIR": Path(torch.__file__).parent,
        "PYBIND11_INCLUDE_DIR": "unused",
    }
    configure = ["-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items())]
    _run("cmake", "-S", ROOT, "-B", folder, *configure)
    _run("cmake", "--build", folder, "--target", "kernels_cuda", "--parallel", str(JOBS))
    return sorted(folder.rglob("*.cu.o"))


def _readable(symbol: str) -> str:
    """The name of a kernel without its arguments and the namespaces that all kernels are in."""
    name = _run("c++filt", symbol).strip().replace("(anonymous namespace)::", "")
    return name.removeprefix("void ").removeprefix("mimnet_fast::cuda::").partition("(")[0]


def _examine(binary: Path, architecture: str) -> dict[str, Code]:
    only = f"--gpu-architecture=sm_{architecture}"
    sass = instructions(binary, only)
    found = {}
    for symbol, code in read(binary, only).items():
        name = _readable(symbol)
        problems = list(over_the_limits(code, architecture))
        if "tensor" in name and not _TENSOR_CORES.search(sass[symbol]):
            problems.append("is named after the tensor cores and does not use them")
        if "packed" in name and not _WIDE_LOADS.search(sass[symbol]):
            problems.append("is named after packs of 16 bytes and does not load them")
        found[name] = replace(code, problems=tuple(problems))
    return found


def compile_cuda(architectures: Sequence[str]) -> list[Kernel]:
    """Every kernel of `csrc/cuda`."""
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for binary in _build(Path(folder), architectures):
            by_architecture = {arch: _examine(binary, arch) for arch in architectures}
            kernels += [
                Kernel(
                    name,
                    binary.name.removesuffix(".o"),
                    {arch: codes[name] for arch, codes in by_architecture.items()},
                )
                for name in by_architecture[architectures[0]]
            ]
    return kernels


# The result


def table(kernels: Sequence[Kernel]) -> str:
    """One row per kernel; per architecture its registers and its KB of shared memory."""
    architectures = list(kernels[0].codes) if kernels else []
    header = ["kernel", "from", *(f"sm_{arch}: registers, KB" for arch in architectures)]
    rows = [header]
    for kernel in kernels:
        cells = []
        for code in kernel.codes.values():
            mark = "*" if code.shared > LEAST_SHARED_MEMORY else ""
            cells.append(f"{code.registers:>3} {code.shared / 1024:>6.1f}{mark}")
        rows.append([kernel.name, kernel.origin, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    note = f"* more than the {LEAST_SHARED_MEMORY >> 10} KB of shared memory of sm_86, 89 and 120"
    return "\n".join([line.rstrip() for line in lines] + [note] * ("*" in "".join(lines)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("language", choices=ARCHITECTURES)
    parser.add_argument("architectures", nargs="*")
    options = parser.parse_args()
    architectures = options.architectures or ARCHITECTURES[options.language]
    if options.language == "triton":
        kernels = compile_triton(architectures)
    else:
        kernels = compile_cuda(architectures)
    print(table(kernels))
    wrong = [
        f"{kernel.name} ({kernel.origin}) on sm_{architecture}: {problem}"
        for kernel in kernels
        for architecture, code in kernel.codes.items()
        for problem in code.problems
    ]
    print(*wrong, sep="\n", end="", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
