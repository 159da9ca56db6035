"""What is installed, what was built, what runs here and why not.

``python -m mimnet_fast.info [--json]`` prints it. Every probe is guarded on its own: a failure
becomes a value of the report, so that a broken installation can still be described.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent

_EFFECTS = {
    "MIMNET_FAST_BACKEND": "backend of calls that name none: auto, native, triton or reference",
    "MIMNET_FAST_ISA": "highest kernel variant to run: baseline, avx2 or avx512",
    "MIMNET_FAST_BUILD": "what an installation compiles: auto, none, cpu or cuda",
    "MIMNET_FAST_REAL_DATA": "folder of public data sets for the tests that need them",
}


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _cpu_features() -> dict[str, bool]:
    from mimnet_fast import _host

    return _host.cpu_features()


def _isa_name() -> str:
    from mimnet_fast import _host

    return _host.isa_name()


def _threads() -> dict[str, int]:
    import torch

    return {"intra-op": torch.get_num_threads(), "inter-op": torch.get_num_interop_threads()}


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _libraries() -> dict[str, str]:
    from mimnet_fast import backends

    return {name: problem or "loaded" for name, problem in backends.load_status().items()}


def _backends() -> dict[str, dict[str, str]]:
    from mimnet_fast import backends

    return {
        device: {name: why or "available" for name, why in backends.available(device).items()}
        for device in ("cpu", "cuda")
    }


def _build() -> Any:
    report = _PACKAGE / "_build_info.json"
    if not report.exists():
        return "no build report: this copy of the package was not installed"
    return json.loads(report.read_text())


def _shadowed() -> str | None:
    """The warning when this source tree hides an installed package, whose libraries it lacks."""
    for distribution in importlib.metadata.distributions(name="mimnet-fast"):
        installed = Path(str(distribution.locate_file("mimnet_fast"))).resolve()
        if installed.is_dir() and installed != _PACKAGE:
            return (
                f"the package installed in {installed} is hidden by this source tree, because "
                "Python searches the current folder first (`python -m pytest` does, plain `pytest` "
                "does not). Run from another folder, or install with `pip install -e .`"
            )
    return None


def _environment() -> dict[str, dict[str, str | None]]:
    names = sorted({*_EFFECTS, *(name for name in os.environ if name.startswith("MIMNET_FAST_"))})
    return {
        name: {
            "value": os.environ.get(name),
            "effect": _EFFECTS.get(name, "none: not a variable of mimnet_fast, check its spelling"),
        }
        for name in names
    }


def collect() -> dict[str, Any]:
    """The report as nested dictionaries of plain JSON values.

    >>> sorted(collect()["versions"])
    ['mimnet_fast', 'numpy', 'python', 'torch', 'triton']
    """
    return {
        "versions": {
            "mimnet_fast": _guarded(partial(_version, "mimnet-fast")),
            "python": platform.python_version(),
            **{name: _guarded(partial(_version, name)) for name in ("torch", "numpy", "triton")},
        },
        "package": {"location": str(_PACKAGE), "warning": _guarded(_shadowed)},
        "libraries": _guarded(_libraries),
        "backends": _guarded(_backends),
        "machine": {
            "platform": _guarded(platform.platform),
            "cpu": _guarded(_cpu_model),
            "cores": os.cpu_count(),
            "threads": _guarded(_threads),
            "cpu features": _guarded(_cpu_features),
            "kernel variant": _guarded(_isa_name),
            "gpus": _guarded(_gpus),
        },
        "build": _guarded(_build),
        "environment": _guarded(_environment),
    }


def render(report: Mapping[str, Any], indent: int = 0) -> str:
    """The report for reading: one line per value.

    >>> print(render({"versions": {"torch": "2.13.0", "triton": None}}))
    versions:
      torch: 2.13.0
      triton: -
    """
    lines = []
    for key, value in report.items():
        start = f"{' ' * indent}{key}:"
        if isinstance(value, Mapping) and value:
            lines += [start, render(value, indent + 2)]
        elif isinstance(value, list):
            lines.append(f"{start} {', '.join(map(str, value)) or '-'}")
        else:
            lines.append(f"{start} {'-' if value is None or value == {} else value}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit code is 0 whatever it says."""
    parser = argparse.ArgumentParser(prog="python -m mimnet_fast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(arguments).json
    report = collect()
    print(json.dumps(report, indent=2) if as_json else render(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
