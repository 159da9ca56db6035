"""`python -m bench.epoch DATASET` tells where the seconds of the published run go.

DATASET is a folder made by `mimnet-fast prepare`. The run is the published one: 10 epochs of either
factorization, the prototypes, 5 epochs of MIMNet. (`mimnet-fast train` also chooses an epoch, for
which it does most of this twice.)

cProfile tells the parts of MIMNet's fit apart, but its kernel is one: it goes forward and backward
over a few users at a time, and gathers rows as it needs them. What is said of that comes from other
calls with the same ratings: forward from `ops.mimnet_forward` without gradients, large batches at a
time; the optimizer, with waking threads and all else that a step costs whatever its batch, from
batches of four times the size, of which there are fewer; backward is what remains. Their shares are
those of the least times that such steps take in turns with these calls.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import inspect
import pstats
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from mimnet_fast import backends, ops
from mimnet_fast.cdr import checkpoints
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.evaluation import evaluate
from mimnet_fast.cdr.experiment import BaseModels, Job
from mimnet_fast.cdr.losses import fused_steps
from mimnet_fast.cdr.models import MIMNet
from mimnet_fast.cdr.training import seeded_generator

_ROUNDS = 15  # in turns, of which the least time counts
_AT_ONCE = 8192


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the block takes."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.2f} s", flush=True)


def profiled(run: Callable[[], Any], parts: Sequence[Callable[..., Any]]) -> list[float]:
    """Seconds of a run and, of these, within each of the functions."""
    profile = cProfile.Profile()
    start = time.perf_counter()
    profile.runcall(run)
    seconds = [time.perf_counter() - start]
    found: dict[Any, Any] = vars(pstats.Stats(profile))["stats"]
    for part in parts:
        code = inspect.unwrap(part).__code__
        seconds.append(found[code.co_filename, code.co_firstlineno, code.co_name][3])
    return seconds


def forward(job: Job) -> float:
    """Seconds that an epoch takes forward, its routing logits drawn before."""
    model, inputs, generator = job.loss.model, job.loss.inputs, torch.Generator().manual_seed(0)
    seconds = 0.0
    for users, items, _ in zip(*(column.split(_AT_ONCE) for column in job.examples), strict=True):
        ids, lengths, table = model.history(inputs, users)
        rows = inputs.source_users[users], inputs.target_items[items], inputs.item_prototypes[items]
        logits = model.logits(len(users), generator)
        start = time.perf_counter()
        with torch.no_grad():
            ops.mimnet_forward(ids, *rows, model.weights(), logits, lengths=lengths, table=table)
        seconds += time.perf_counter() - start
    return seconds


def steps_alone(job: Job, batch: int) -> float:
    """Seconds of an epoch's steps of that many ratings, their routing logits drawn before."""
    loss = replace(job.loss, model=copy.deepcopy(job.loss.model))
    steps = fused_steps(loss, replace(job.schedule, batch_size=batch), defaultdict(dict), {})

    def run() -> None:
        for columns in zip(*(c.split(steps.at_once * batch) for c in job.examples), strict=True):
            steps.take(columns, 0)

    return profiled(run, [ops.mimnet_adam_])[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the seconds of the run, then those of an epoch of MIMNet."""
    parser = argparse.ArgumentParser(prog="python -m bench.epoch", description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    options = parser.parse_args(arguments)
    if reason := backends.available("cpu")["native"]:
        parser.error(f"needs the compiled kernels: {reason}")
    print(f"start of Python, with imports: {time.process_time():.2f} s (of one processor)")
    torch.set_num_threads(options.threads)
    config, progress = Config(epochs=5), Progress(disable=True)
    generator = seeded_generator(config.seed, "mimnet batches")
    with tempfile.TemporaryDirectory() as name, timed("all but the start of Python"):
        folder = Path(name)
        stage1 = BaseModels(Dataset.load(options.dataset), config, folder, progress)
        with timed(f"source factorization, {config.base_epochs} epochs"):
            stage1.source()
        with timed(f"target factorization, {config.base_epochs} epochs"):
            stage1.target("final")
        with timed("prototypes"):
            stage1.frozen("final", MIMNet)
        job = stage1.job("mimnet", "final", generator)
        whole, made, drawn, *others = profiled(
            lambda: job.fit(
                generator=generator,
                checkpoint=folder / "mimnet.safetensors",
                identity={"name": "mimnet"},
                progress=progress,
            ),
            (ops.mimnet_adam_, MIMNet.logits, evaluate, checkpoints.save),
        )
        print(f"MIMNet, {config.epochs} epochs: {whole:.2f} s")
    epoch, made, drawn, predicting, saving = (
        seconds / config.epochs for seconds in (whole, made, drawn, *others)
    )
    batch = job.schedule.batch_size
    steps = -(-len(job.examples[0]) // batch)
    rounds = [
        (forward(job), steps_alone(job, 4 * batch), steps_alone(job, batch)) for _ in range(_ROUNDS)
    ]
    there, few, many = (min(seconds) for seconds in zip(*rounds, strict=True))
    update = (many - few) * 4 / 3  # three of four steps less
    there, update = (seconds * made / many for seconds in (there, update))
    rest = epoch - made - drawn
    print(f"an epoch of MIMNet, {steps} steps of {batch} ratings:")
    for what, seconds in {
        "drawing routing logits": drawn,
        "forward": there,
        "backward": made - there - update,
        "optimizer": update,
        "rest": rest,
        "  of which test ratings predicted": predicting,
        "  checkpoint": saving,
        "  shuffling and Python": rest - predicting - saving,
        "all": epoch,
    }.items():
        print(
            f"{what:33} {seconds * 1e3:6.1f} ms {seconds / epoch:6.1%} "
            f"{seconds / steps * 1e6:7.1f} us a step"
        )


if __name__ == "__main__":
    main()
