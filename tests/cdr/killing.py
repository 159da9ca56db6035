"""Ways to kill a run: from inside at a known place, and from outside anywhere."""

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress


class KilledError(BaseException):
    """What a killed process looks like from inside: nothing catches it."""


class KillingProgress(Progress):
    """Ends the process, in a manner of speaking, at its n-th update."""

    def __init__(self, updates: int) -> None:
        super().__init__(disable=True)
        self.left = updates

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


def check_killed_at_random(
    work: Callable[[Path], None], result: Callable[[Path], Any], folder: Path
) -> None:
    """``work`` into a folder, killed 20 times and gone on with, has one ``result``.

    ``work`` is pickled, and runs in processes of its own.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, for all processes
    context.set_forkserver_preload(["mimnet_fast.cdr.grids", "sklearn.cluster", "scipy.stats"])

    def start(out: Path) -> Any:
        process = context.Process(target=_on_one_thread, args=(work, out))
        process.start()
        return process

    def finish(out: Path) -> float:
        begin = time.perf_counter()
        process = start(out)
        process.join(120)
        assert process.exitcode == 0
        return time.perf_counter() - begin

    finish(folder / "warm")
    whole = finish(folder / "undisturbed")
    expected = result(folder / "undisturbed")
    generator = random.Random(20)
    unfinished = 0
    for number in range(20):
        out = folder / str(number)
        process = start(out)
        # Spread over most of the run, and at a random point of each part.
        process.join(0.8 * whole * (number + generator.random()) / 20)
        process.kill()
        process.join()
        unfinished += process.exitcode != 0
        finish(out)
        assert result(out) == expected
    assert unfinished >= 15, "too few were killed before they ended"


def _on_one_thread(work: Callable[[Path], None], out: Path) -> None:
    torch.set_num_threads(1)
    work(out)
