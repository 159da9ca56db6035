"""The pieces of `bench/gpu.sh`: `python -m bench.gpu check|compile|exercise|render ...`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from mimnet_fast import ops

from . import baselines, cases, compare, report
from .cases import Case

_TOOLS = ("nvidia-smi", "nvcc", "cmake", "ninja", "compute-sanitizer", "timeout", "git")
_MODULES = ("triton", "pytest", "xdist", "hypothesis", "matplotlib", "pybind11", "setuptools")

# One program and many, one tile and several, with and without remainders.
_EXERCISES = (
    (Case("tiny", 3, 5, 2, 3, 7), torch.float32),
    (Case("odd", 33, 70, 7, 10, 50), torch.float32),
    (Case("even", 65, 20, 8, 64, 64), torch.bfloat16),
    (Case("wide", 5, 20, 4, 128, 32), torch.float16),
)


def exercise(device: str, backend: str) -> None:
    """Run every op forward and backward on one backend, for a sanitizer to watch."""
    for op in ops.DIFFERENTIABLE:
        function = baselines.served_by(getattr(ops, op), backend)
        for case, dtype in _EXERCISES:
            call = cases.make_call(op, case, dtype, device)
            baselines.Step(function, call, "forward+backward")()
            if device == "cuda":
                torch.cuda.synchronize()
        print(op, flush=True)


def _compile_one(op: str, case: Case, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    call = cases.make_call(op, case, cases.DTYPES[options.dtype], options.device)
    for name, function in baselines.contenders(op, tuple(options.modes)).items():
        if name.startswith("compile"):
            for direction in cases.DIRECTIONS:
                with contextlib.suppress(Exception):  # the contest says which fail, and why
                    baselines.Step(function, call, direction)()


def compile_baselines(options: argparse.Namespace) -> None:
    """Fill torch's cache of compiled baselines, many at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, max_tasks_per_child=4) as pool:
        jobs = {
            pool.submit(_compile_one, op, case, options): f"{op} {case.name}"
            for op, case in cases.selected(options)
        }
        for job in as_completed(jobs):
            print(jobs[job], job.exception() or "compiled", flush=True)


def render(folder: Path) -> None:
    """`table.md` and a plot per result file of ``folder``."""
    report.render(sorted(folder.glob("results-*.json")), folder / "table.md", folder)


def check() -> None:
    """Everything of a run that needs no GPU, at small sizes; fails where a piece is missing."""
    for tool in _TOOLS:
        print(f"{tool}: {shutil.which(tool) or 'not here'}")
    for module in _MODULES:
        print(f"{module}: {'here' if importlib.util.find_spec(module) else 'not here'}")
    for op in ops.DIFFERENTIABLE:
        for case in cases.of_device(op, "cuda"):
            for dtype in cases.DTYPES.values():
                cases.make_call(op, replace(case, batch=2), dtype)
        arena = baselines.Contest(op, _EXERCISES[0][0], modes=())
        for name in baselines.names(op, modes=()):
            for direction in cases.DIRECTIONS:
                arena.in_rotation(name, arena.step(name, direction))()
        print(f"{op}: every case builds, every baseline is right")
    exercise("cpu", "auto")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results-float32.json")
        arguments = ["--ops", "squash", "--cases", "paper", "--modes", "--seconds", "0.01"]
        failed = compare.main([*arguments, "--out", str(out)])
        render(Path(folder))
        print("written:", *sorted(os.listdir(folder)))
    if failed:
        raise SystemExit("a measurement failed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one piece."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    pieces = parser.add_subparsers(dest="piece", required=True)
    pieces.add_parser("check", help=check.__doc__)
    compiling = pieces.add_parser("compile", help=compile_baselines.__doc__)
    cases.add_arguments(compiling)
    compiling.add_argument("--jobs", type=int, default=4)
    exercising = pieces.add_parser("exercise", help=exercise.__doc__)
    exercising.add_argument("--device", default="cuda")
    exercising.add_argument("--backend", default="auto")
    rendering = pieces.add_parser("render", help=render.__doc__)
    rendering.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.piece == "check":
        check()
    elif options.piece == "compile":
        compile_baselines(options)
    elif options.piece == "exercise":
        exercise(options.device, options.backend)
    else:
        render(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
