"""Wall time and peak memory of what a process trains."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimnet_fast.cdr.atomic import atomic_file

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@contextmanager
def measured(folder: Path, name: str) -> Iterator[None]:
    """Write what the block costs to `costs.json` of ``folder``, under ``name``.

    Peak memory is the largest resident set of the whole process during the block, with the
    interpreter and its libraries; None where the system keeps no such record (all but Linux).
    """
    resettable = _reset_peak()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    costs = read(folder) | {
        name: {"seconds": seconds, "peak_rss_bytes": _peak() if resettable else None}
    }
    with atomic_file(folder / "costs.json") as path:
        path.write_text(json.dumps(costs, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The `costs.json` of a folder, or nothing."""
    path = folder / "costs.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _reset_peak() -> bool:
    """Start the kernel's record of the peak anew; whether that can be done."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
