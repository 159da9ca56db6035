"""The kernels, compiled with the sanitizers of the compiler and run without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_run_clean(sanitizers: str, tmp_path: Path) -> None:
    assert COMPILER is not None
    program = tmp_path / "sanitized_kernels"
    flags = ["-std=c++20", "-O1", "-g", "-w", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [
            COMPILER,
            *flags,
            f"-fsanitize={sanitizers}",
            "-fno-sanitize-recover=all",
            "-DMIMNET_FAST_ISA=baseline",
            *map(str, SOURCES),
            str(ROOT / "tests" / "cpp" / "sanitized_kernels.cpp"),
            "-pthread",
            "-o",
            str(program),
        ],
        check=True,
    )
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "baseline: every kernel ran\n"
