"""The whole way on synthetic data with planted interests, and the kernels against the reference."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mimnet_fast import backends
from mimnet_fast.cdr import results
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, prepare
from mimnet_fast.cdr.evaluation import Errors, errors
from mimnet_fast.cdr.experiment import BaseModels, run
from mimnet_fast.cdr.losses import SquaredError
from mimnet_fast.cdr.models import MODELS, MIMNet
from mimnet_fast.cdr.synthetic import Synthetic
from mimnet_fast.cdr.training import (
    adam,
    seeded_generator,
    seeded_module,
    training_step,
)

BASE_EPOCHS = 30
"""More than the published 10: the base models of so small a dataset see few batches per epoch."""
EPOCHS = 5
SHOWN = ("mimnet", "ptupcdr", "tgt")
"""Not all models: the demonstration takes a minute."""
COMPARED_LOSSES = 50
_TIMED_STEPS = 100
_COMPILED = "torch.compile(reference)"


def demo(config: Config, progress: Progress, sizes: Synthetic) -> dict[str, Any]:
    """Generate, prepare, train, compare; nothing is kept on disk.

    Args:
        config: All settings; its seed decides the data too.
        progress: Where bars are drawn.
        sizes: Of the dataset.

    Returns:
        ``results`` as in `results.json` with one more predictor, the oracle; ``steps`` with the
        milliseconds of a training step of MIMNet's second stage, or why there are none;
        ``largest_difference`` of the first losses between the kernels and the reference, None
        without compiled kernels.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = sizes.generate(folder, config.seed)
        prepare(folder / "source.csv", folder / "target.csv", folder / "dataset")
        dataset = Dataset.load(folder / "dataset")
        found = run(dataset, config, SHOWN, folder / "run", progress)
        stage1 = BaseModels(dataset, config, folder / "run", Progress(disable=True))
        test = stage1.split.final.evaluation
        median, mean = planted.oracle(test, folder / "dataset")
        best = Errors(errors(median, test.values).mae, errors(mean, test.values).rmse)
        found["models"]["oracle"] = {
            "title": "oracle",
            **results.without_training(best._asdict()),
        }
        return {"results": found, **_compare_backends(stage1, progress)}


def tables(found: dict[str, Any]) -> list[Table]:
    """What `demo` found, for the terminal."""
    steps = Table(title="Training step of MIMNet's second stage", title_justify="left")
    steps.add_column("implementation")
    steps.add_column("ms (median)", justify="right")
    for name, value in found["steps"].items():
        steps.add_row(name, value if isinstance(value, str) else f"{value:.3f}")
    steps.caption = (
        "no compiled kernels here: mimnet-fast info tells why"
        if found["largest_difference"] is None
        else f"largest difference of the first {COMPARED_LOSSES} losses between kernels and "
        f"reference: {found['largest_difference']:.1e}"
    )
    steps.caption_justify = "left"
    shown = {**found["results"], "title": "cold-start users of synthetic data"}
    return [*results.tables(shown), steps]


def _compare_backends(stage1: BaseModels, progress: Progress) -> dict[str, Any]:
    """Train MIMNet from the same start on each implementation: losses side by side, then times."""
    names = dict.fromkeys([_fastest_backend(), "reference"])
    steppers = {name: _stepper(stage1, name) for name in names}
    losses = [torch.stack([step() for _ in range(COMPARED_LOSSES)]) for step in steppers.values()]
    difference = (losses[0] - losses[1]).abs().max().item() if len(losses) == 2 else None

    steps: dict[str, float | str] = {}
    task = progress.add_task("compile the reference", total=None)
    try:
        compiled = _stepper(stage1, "reference", compiled=True)
        compiled()
        steppers[_COMPILED] = compiled
    except Exception as error:  # whatever the compiler's absence or failure raises
        steps[_COMPILED] = f"not available: {str(error).strip().splitlines()[0]}"
    progress.update(task, total=1, completed=1)

    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in progress.track(range(_TIMED_STEPS), description="time a step"):
        for name, step in steppers.items():  # interleaved, so that a disturbance meets all
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    times = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return {"steps": times | steps, "largest_difference": difference}


def _stepper(stage1: BaseModels, backend: str, *, compiled: bool = False) -> Callable[[], Tensor]:
    """A function that makes the next training step of a fresh model and gives its loss."""
    config, build = stage1.config, MODELS["mimnet"].build
    assert build is not None
    model = seeded_module(
        partial(build, replace(config, backend=backend)), config.seed, "compared model"
    )
    generator = seeded_generator(config.seed, "compared batches")
    forward = torch.compile(model) if compiled else model
    inputs = stage1.frozen("final", MIMNet)
    loss = SquaredError(partial(forward, inputs, generator=generator))
    optimizer = adam(model, config.learning_rate)
    data = stage1.split.final.train_meta
    whole = len(data) - len(data) % config.batch_size
    columns = (column[:whole].split(config.batch_size) for column in data.columns())
    slices = zip(*columns, strict=True)
    batches = itertools.cycle(slices)
    return lambda: training_step(optimizer, loss, *next(batches))


def _fastest_backend() -> str:
    """The backend that `auto` takes on this machine."""
    return next(name for name, problem in backends.available("cpu").items() if problem is None)
