"""The pieces of `bench/gpu.sh`: `python -m bench.gpu check|compile|exercise|render ...`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import baselines, cases, compare, report
from bench.cases import Case
from mimnet_fast import ops

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


def _plot(result: dict[str, Any], path: Path) -> None:
    """Ours against the best baseline and against the floor, forward+backward."""
    from matplotlib.figure import Figure

    rows = [r for r in result["results"] if r["direction"] != "forward" and "contenders" in r]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        times = {n: c["median_ms"] for n, c in row["contenders"].items() if "median_ms" in c}
        best = min((ms for n, ms in times.items() if not report.is_ours(n)), default=None)
        for name, ms in times.items():
            if report.is_ours(name) and best is not None:
                place = found.setdefault(name, {})
                place[f"{row['op']} {row['case']}"] = best / ms, 100 * row["floor_ms"] / ms
    labels = [f"{row['op']} {row['case']}" for row in rows]
    figure = Figure(figsize=(12, 1.5 + 0.35 * len(labels)), layout="constrained")
    against_best, of_floor = figure.subplots(1, 2, sharey=True)
    height = 0.8 / max(1, len(found))
    for number, (name, values) in enumerate(found.items()):
        at = [labels.index(label) + height * (number + 0.5) - 0.4 for label in values]
        for axes, column in ((against_best, 0), (of_floor, 1)):
            axes.barh(at, [value[column] for value in values.values()], height, label=name)
    against_best.set_yticks(range(len(labels)), labels)
    against_best.invert_yaxis()
    against_best.set_xscale("log")
    against_best.axvline(1, color="black", linewidth=1)
    against_best.set_xlabel("times as fast as the best baseline")
    of_floor.set_xlabel("% of the floor")
    of_floor.legend()
    dtype = rows[0]["dtype"] if rows else ""
    figure.suptitle(f"{report.title(result)}, {dtype}, forward and backward")
    figure.savefig(path, dpi=120)


def render(folder: Path) -> None:
    """`table.md` and a plot per result file of ``folder``."""
    files = sorted(folder.glob("results-*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    report.write(folder / "table.md", report.page(results))
    for file, result in zip(files, results, strict=True):
        try:
            _plot(result, file.with_suffix(".png"))
        except ImportError as error:
            print(f"{file.stem} is not plotted: {error}")


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
                arena.in_rotation(arena.step(name, direction))()
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
