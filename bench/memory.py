"""Peak memory of a training step (forward, backward) of every contender: `python -m bench.memory`.

Measured from the kernel's count of resident pages, in a process of its own whose allocator returns
freed memory at once. So every allocation counts, whoever makes it: tensors, a kernel's scratch,
thread stacks. Needs Linux with glibc; good to about 0.2 MB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import baselines, cases

# Without these, freed pages stay with the process and hide what the next step allocates.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def with_allocator() -> None:
    """Start this process anew with `ALLOCATOR`, which is read at a start, unless it has it."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ALLOCATOR})


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _in_new_thread(step: Callable[[], Any]) -> None:
    """Run ``step`` where nothing of an earlier call is kept.

    A new thread gets a new team of workers, so scratch that a kernel or a library keeps with its
    threads from call to call is allocated anew and counts.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            step()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def peak_bytes(step: Callable[[], Any]) -> int:
    """What ``step`` needs at its peak beyond what the process holds already.

    Raises:
        OSError: this system does not tell.
    """
    _in_new_thread(step)  # code that is loaded or compiled on first use
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _resident("VmRSS")
    _in_new_thread(step)
    return max(0, _resident("VmHWM") - before)


def peak_bytes_of_gpu(step: Callable[[], Any]) -> int:
    """The same on the current GPU, as torch's allocator counts it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure(options: argparse.Namespace) -> dict[tuple[str, str, str], int]:
    """Bytes by op, case and contender, from a new process; what cannot be measured is left out."""
    command = [sys.executable, "-m", f"{__package__}.memory", "--ops", *options.ops]
    command += ["--modes", *options.modes, "--backends", *options.backends]
    command += ["--dtype", options.dtype, "--threads", str(options.threads)]
    command += ["--cases", *options.cases] if options.cases else []
    process = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ALLOCATOR}
    )
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    return {(row["op"], row["case"], row["contender"]): row["bytes"] for row in rows}


def main() -> int:
    """Print one JSON line per contender."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    cases.add_arguments(parser)
    options = parser.parse_args()
    with_allocator()
    torch.set_num_threads(options.threads)
    dtype = cases.DTYPES[options.dtype]
    for op, case in cases.selected(options):
        call, direction = cases.make_call(op, case, dtype), cases.directions(op)[-1]
        contenders = baselines.contenders(op, tuple(options.modes), tuple(options.backends))
        for name, function in contenders.items():
            try:
                step = baselines.Step(function, baselines.call_of(name, op, call), direction)
                peak = peak_bytes(step)
            except Exception as error:
                print(f"{op} {case.name} {name}: {error}", file=sys.stderr)
                continue
            row = {"op": op, "case": case.name, "contender": name, "bytes": peak}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
