"""The GPU kernels compile without a GPU, spill nothing and use the instructions meant for them.

The tables go straight to the terminal, for the log of a run whose tests pass.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]


def compile_all(language, capfd):
    # Of its own process: Triton decides at its import whether it compiles or interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PATH"] = sysconfig.get_path("scripts") + os.pathsep + environment["PATH"]
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("compiled.py"), language],
        capture_output=True,
        text=True,
        env=environment,
    )
    with capfd.disabled():
        print(f"\n{process.stdout}", file=sys.stderr)
    assert process.returncode == 0, f"\n{process.stderr}"


def test_triton(capfd):
    compile_all("triton", capfd)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda(capfd):
    compile_all("cuda", capfd)
