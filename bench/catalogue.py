"""`python -m bench.catalogue` times the top 20 of 64,443 items for 1000 users, and its memory.

The baselines rate every pair in PyTorch for a few of the users, as many at a time as their
temporaries allow; their times are scaled to all users, to which they are proportional:

- textbook: as the model rates, a row for each pair, so every pair projects K keys and values
- shared keys: the same with all items as the candidates of a user
- reassociated: scores from a few matrix products, no user vectors

Runs are interleaved and the least time of each counts. Memory is measured as in `bench.memory`, in
a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimnet_fast import nn, ops, reference

from .memory import ALLOCATOR, peak_bytes

USERS, ITEMS, INTERESTS, TOP = 1000, 64443, 7, 20
Inputs = dict[str, Any]


def inputs(width: int, prototypes: int) -> Inputs:
    """A catalogue and users of random embeddings."""
    torch.manual_seed(0)
    fine, coarse, weight, bias = nn.MultiGranularityAttention(width).weights()
    ids = torch.randint(prototypes, (ITEMS,)) if prototypes < ITEMS else None
    return {
        "interests": torch.randn(USERS, INTERESTS, width),
        "items": torch.randn(ITEMS, width) * 2 * width**-0.5,
        "prototypes": torch.randn(prototypes, width) * 2 * width**-0.5,
        "fine": fine,
        "coarse": coarse,
        "fusion_weight": weight,
        "fusion_bias": bias,
        "k": TOP,
        "prototype_ids": ids,
    }


def _of_users(values: Inputs, users: int) -> Inputs:
    return {**values, "interests": values["interests"][:users]}


def _in_parts(
    values: Inputs, at_once: int, score: Callable[[Inputs, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    ids = values["prototype_ids"]
    guides = values["prototypes"] if ids is None else values["prototypes"][ids]
    parts = values["interests"].split(at_once)
    scores = [score({**values, "interests": part}, guides).topk(TOP) for part in parts]
    return torch.cat([found for found, _ in scores]), torch.cat([found for _, found in scores])


def _attend(values: Inputs, *tensors: Tensor) -> Tensor:
    names = ("fine", "coarse", "fusion_weight", "fusion_bias")
    user, _ = reference.multi_granularity_attention(*tensors, *(values[name] for name in names))
    return user


def textbook(values: Inputs) -> tuple[Tensor, Tensor]:
    """A row for each pair, of two users at a time: several temporaries of 230 MB at D = 64."""

    def score(part: Inputs, guides: Tensor) -> Tensor:
        interests, items = part["interests"], part["items"]
        users, count = interests.shape[0], items.shape[0]
        pairs = items.repeat(users, 1), guides.repeat(users, 1)
        user = _attend(part, *pairs, interests.repeat_interleave(count, 0))
        return (user * pairs[0]).sum(-1).view(users, count)

    return _in_parts(values, 2, score)


def shared_keys(values: Inputs) -> tuple[Tensor, Tensor]:
    """All items as candidates of ten users at a time."""

    def score(part: Inputs, guides: Tensor) -> Tensor:
        users = part["interests"].shape[0]
        items, guides = (t.expand(users, -1, -1) for t in (part["items"], guides))
        return (_attend(part, items, guides, part["interests"]) * items).sum(-1)

    return _in_parts(values, 10, score)


def reassociated(values: Inputs) -> tuple[Tensor, Tensor]:
    """The few matrix products, for ten users at a time."""

    def score(part: Inputs, guides: Tensor) -> Tensor:
        interests, items = part["interests"], part["items"]

        def attend(weights: tuple[Tensor, ...], queries: Tensor) -> Tensor:
            keys = interests @ weights[0].mT
            found = torch.nn.functional.linear(interests, weights[2], weights[3]) @ items.mT
            return (keys @ queries.mT).softmax(1).mul_(found).sum(1)

        both = torch.cat([items, guides], -1)
        gate = torch.sigmoid(both @ part["fusion_weight"] + part["fusion_bias"])
        return torch.lerp(attend(part["fine"], items), attend(part["coarse"], guides), gate)

    return _in_parts(values, 10, score)


BASELINES = {"textbook": textbook, "shared keys": shared_keys, "reassociated": reassociated}


def check(found: tuple[Tensor, Tensor], values: Inputs) -> None:
    """The scores are those of the textbook."""
    users = 4
    expected, _ = textbook(_of_users(values, users))
    torch.testing.assert_close(found[0][:users], expected, rtol=1e-4, atol=1e-4)


def contest(width: int, prototypes: int, users: int, rounds: int) -> None:
    """Print the least time of every contender."""
    values = inputs(width, prototypes)
    few = _of_users(values, users)
    check(ops.catalogue_top_k(**values), values)
    for baseline in BASELINES.values():
        check(baseline(few), values)
    steps = {"ours": lambda: ops.catalogue_top_k(**values)}
    steps.update({name: lambda f=f: f(few) for name, f in BASELINES.items()})
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds = (time.perf_counter() - start) * (1 if name == "ours" else USERS / users)
            best[name] = min(best[name], seconds)
    row = ", ".join(f"{name} {s:.3g} s ({s / best['ours']:.3g}x)" for name, s in best.items())
    print(f"D {width}, P {prototypes}: {row}", flush=True)


def measure_memory(width: int, prototypes: int) -> None:
    """Print the peak beyond inputs and process, in a process with the allocator for it."""
    values = inputs(width, prototypes)

    def step() -> None:
        with torch.no_grad():  # the thread's own
            ops.catalogue_top_k(**values)

    print(f"D {width}, P {prototypes}: peak {peak_bytes(step) / 2**20:.1f} MB", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each width and number of prototypes."""
    parser = argparse.ArgumentParser(prog="python -m bench.catalogue", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--users", type=int, default=10, help="of the baselines (default: 10)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        for width in (10, 64):
            for prototypes in (100, ITEMS):
                if options.memory:
                    measure_memory(width, prototypes)
                else:
                    contest(width, prototypes, options.users, options.rounds)
    if not options.memory:
        subprocess.run(
            [sys.executable, "-m", "bench.catalogue", "--memory", f"--threads={options.threads}"],
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, **ALLOCATOR},
            check=True,
        )


if __name__ == "__main__":
    main()
