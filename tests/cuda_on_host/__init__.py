"""The CUDA kernels on the host: every thread of every block as a fiber, every access checked.

It proves indexing and logic, not speed and not memory ordering: threads never run at the same time.
Plain reads and writes of shared memory are not checked, except that writes next to it are noticed.
"""

from __future__ import annotations

import fcntl
import importlib
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "cuda_on_host"


def _tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


MISSING = [tool for tool in ("cmake", "ninja", "c++") if _tool(tool) is None]
"""What a build needs and this machine lacks."""


def build(library: str) -> Path:
    """Compile what changed of a library of CMakeLists.txt."""
    BUILD.mkdir(parents=True, exist_ok=True)
    torch_dir = Path(torch.__file__).parent
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["-S", HERE, "-B", BUILD, "-G", "Ninja", f"-DTORCH_DIR={torch_dir}"],
            ["--build", BUILD, "--target", library, "--parallel", "2"],
        ):
            done = subprocess.run([_tool("cmake"), *command], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(done.stdout + done.stderr)
    return BUILD / f"{library}.so"


def load() -> None:
    """Make the CUDA kernels the ones that serve CPU tensors in this process."""
    from mimnet_fast import backends

    torch.ops.load_library(build("cuda_on_host"))
    backends._SERVE_FLOAT64.remove(("native", "cpu"))
    options = importlib.import_module("mimnet_fast.ops.dynamic_routing")._SERVE_SOME_OPTIONS
    options["cpu"] = options["cuda"]
    importlib.import_module("mimnet_fast.ops.mimnet_forward")._KEEPING.clear()
