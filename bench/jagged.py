"""What padding costs: `python -m bench.jagged` times routing on histories padded and jagged.

Lengths are skewed as in real data: geometric with a mean of 12, cut at 50. Both calls do the same
for the items that there are; the padded one with `lengths`. Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mimnet_fast import ops

from .cases import ITERATIONS, MIND, PAPER512, Case
from .compare import interleave

CASES = (PAPER512, MIND)
LONGEST, MEAN = 50, 12


def steps(case: Case, *, backward: bool) -> dict[str, Callable[[], Any]]:
    """The same routing on padded and on jagged histories."""
    torch.manual_seed(0)
    lengths = torch.empty(case.batch).geometric_(1 / MEAN).clamp(max=LONGEST).long()
    padded = torch.randn(case.batch, LONGEST, case.width)
    mask = torch.arange(LONGEST) < lengths[:, None]
    weight = torch.randn(case.width, case.width).div(case.width**0.5).requires_grad_()
    logits = torch.randn(1, case.capsules, LONGEST)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    inputs: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
        "padded": (padded, {"lengths": lengths}),
        "jagged": (padded[mask], {"offsets": offsets}),
    }

    def step(history: Tensor, options: dict[str, Tensor]) -> Callable[[], Any]:
        history.requires_grad_(backward)
        leaves = (history, weight)

        def run() -> Any:
            with torch.set_grad_enabled(backward):
                out = ops.dynamic_routing(history, weight, logits, iterations=ITERATIONS, **options)
            return torch.autograd.grad(out.sum(), leaves) if backward else out

        return run

    return {name: step(*arguments) for name, arguments in inputs.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each case and direction."""
    parser = argparse.ArgumentParser(prog="python -m bench.jagged", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for case in CASES:
        for backward in (False, True):
            samples = interleave(steps(case, backward=backward), options.seconds)
            padded, jagged = (1e3 * statistics.median(samples[n]) for n in ("padded", "jagged"))
            direction = "forward+backward" if backward else "forward"
            print(
                f"{case.name} {direction}: padded {padded:.3f} ms, jagged {jagged:.3f} ms, "
                f"ratio {jagged / padded:.2f}"
            )


if __name__ == "__main__":
    main()
