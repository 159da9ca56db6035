"""Training of one model: batches are slices of tensors shuffled once per epoch.

A fit that was killed goes on after its last finished epoch and gives the same bits as one that was
not: the checkpoint holds parameters, optimizer state and the state of the random generator. It also
keeps what was predicted after each epoch, from which any error of any epoch can be found later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import Module
from torch.optim import Adam, Optimizer

from mimnet_fast.cdr import checkpoints
from mimnet_fast.cdr.errors import UserError, require_same
from mimnet_fast.cdr.evaluation import Evaluation
from mimnet_fast.cdr.losses import AdamState, Loss, Steps, fused_steps

_STEPS_PER_REFRESH = 20
_PREDICTIONS = "predictions"
_Module = TypeVar("_Module", bound=Module)

Epoch = dict[str, float]
"""One finished epoch: the mean ``loss`` of its batches, and what was measured after it."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    averaging: float = 0.0
    """Share that the past keeps in the moving average of the parameters, which is what is measured
    and kept; 0 takes the parameters as they are."""


def seeded_generator(seed: int, stream: str) -> torch.Generator:
    """A generator of its own for each named use of ``seed``, unrelated to the others."""
    entropy = np.random.SeedSequence([seed, *stream.encode()])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def seeded_module(build: Callable[[], _Module], seed: int, stream: str) -> _Module:
    """A module whose initial values depend on ``(seed, stream)`` only."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(seeded_generator(seed, stream).get_state())
        return build()


def adam(module: Module, learning_rate: float, weight_decay: float = 0.0) -> Adam:
    """The optimizer of every model here: constant rate, decay in the gradient, one kernel."""
    return Adam(module.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)


def training_step(optimizer: Optimizer, loss: Loss, *batch: Tensor) -> Tensor:
    """One update on the loss of a batch; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    value = loss(*batch)
    value.backward()
    optimizer.step()
    return value.detach()


def _single_steps(
    module: Module, schedule: Schedule, loss: Loss, state: AdamState, average: _Average | None
) -> Steps:
    """One batch at a time, with autograd."""
    optimizer = adam(module, schedule.learning_rate, schedule.weight_decay)
    optimizer.state = state

    def take(batch: tuple[Tensor, ...], before: int) -> Tensor:
        value = training_step(optimizer, loss, *batch)
        if average is not None:
            average.update(before)
        return value[None]

    return Steps(1, take)


def fit(
    module: Module,
    loss: Loss,
    examples: tuple[Tensor, ...],
    schedule: Schedule,
    *,
    generator: torch.Generator,
    evaluate: Callable[[], Evaluation],
    checkpoint: Path,
    identity: dict[str, Any],
    progress: Progress,
    keep_predictions: bool = True,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train ``module`` on ``examples``, or go on from ``checkpoint`` where that exists.

    Args:
        module: Its parameters are trained in place.
        loss: The module's loss on a batch, drawing from ``generator``.
        examples: Columns of the training data, one row each.
        schedule: Epochs, batch size, learning rate.
        generator: Source of the shuffling and of whatever ``loss`` draws.
        evaluate: Measures the module after each epoch.
        checkpoint: Written after each epoch.
        identity: What the result depends on; a checkpoint of another identity is refused.
        progress: Where the bar is drawn.
        keep_predictions: Whether the checkpoint holds the predictions of ``evaluate``.
        after_epoch: Called with the number of a new epoch, from 1, before its checkpoint is
            written.

    While ``evaluate`` and ``after_epoch`` run, the module has the average of its parameters if the
    schedule asks for one.

    Returns:
        All epochs, those before a resumption too.

    Raises:
        UserError: a loss that is not finite, or a checkpoint that is not of this fit.
    """
    identity = {**identity, **asdict(schedule)}
    state: AdamState = defaultdict(dict)
    average = _Average(module, schedule.averaging) if schedule.averaging else None
    curve: list[Epoch] = []
    predictions: list[Tensor] = []
    if checkpoint.exists():
        curve, predictions = _restore(checkpoint, identity, module, average, state, generator)
    batches = -(-len(examples[0]) // schedule.batch_size)
    total = schedule.epochs * batches
    task = progress.add_task(identity["name"], total=total, completed=len(curve) * batches)
    averages = {} if average is None else average.by_parameter(module)
    steps = fused_steps(loss, schedule, state, averages) or _single_steps(
        module, schedule, loss, state, average
    )
    for epoch in range(len(curve) + 1, schedule.epochs + 1):
        losses = torch.empty(batches)
        order = torch.randperm(len(examples[0]), generator=generator)
        columns = (column[order].split(steps.at_once * schedule.batch_size) for column in examples)
        done = range((epoch - 1) * batches, epoch * batches, steps.at_once)
        for before, batch in zip(done, zip(*columns, strict=True), strict=True):
            taken = steps.take(batch, before)
            first = before - done.start
            losses[first : first + len(taken)] = taken
            if steps.at_once > 1 or first % _STEPS_PER_REFRESH == 0:
                progress.update(task, completed=before)
        if not losses.isfinite().all():
            step = int(losses.isfinite().logical_not().nonzero()[0])
            raise UserError(
                f"{identity['name']}: the loss became {losses[step].item()} in batch {step + 1} of "
                f"epoch {epoch}: lower --learning-rate (now {schedule.learning_rate})"
            )
        with nullcontext() if average is None else average.applied():
            measured = evaluate()
            curve.append({"loss": losses.mean().item(), **measured.errors})
            if keep_predictions:
                predictions.append(measured.predicted)
            after_epoch(epoch)
        _store(checkpoint, identity, module, average, state, generator, curve, predictions)
    progress.update(task, completed=total)
    return curve


def stored_predictions(checkpoint: Path) -> Tensor:
    """What a fit predicted after each of its epochs, ``[epochs, ratings]``.

    Raises:
        UserError: the checkpoint is damaged or holds none.
    """
    tensors, _ = checkpoints.load(checkpoint)
    if _PREDICTIONS not in tensors:
        raise UserError(f"{checkpoint} holds no predictions: delete it to train anew")
    return tensors[_PREDICTIONS]


class _Average:
    """An exponential moving average of parameters, shorter while little was seen.

    Written out, because updating torch's `AveragedModel` takes longer than a training step.
    """

    def __init__(self, module: Module, share: float) -> None:
        self.share = share
        self.parameters = [parameter.detach() for parameter in module.parameters()]
        self.tensors = [parameter.clone() for parameter in self.parameters]

    def update(self, step: int) -> None:
        """Take in the parameters after a step, the first of which is 0."""
        share = min(self.share, step / (9 + step))
        torch._foreach_lerp_(self.tensors, self.parameters, 1 - share)

    def by_parameter(self, module: Module) -> dict[Tensor, Tensor]:
        """The average of each parameter."""
        return dict(zip(module.parameters(), self.tensors, strict=True))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the average within the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        kept = [parameter.clone() for parameter in self.parameters]
        torch._foreach_copy_(self.parameters, self.tensors)
        torch._foreach_copy_(self.tensors, kept)


def _store(
    path: Path,
    identity: dict[str, Any],
    module: Module,
    average: _Average | None,
    state: AdamState,
    generator: torch.Generator,
    curve: list[Epoch],
    predictions: list[Tensor],
) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{index}": each for index, each in enumerate(average.tensors)}
    for index, parameter in enumerate(module.parameters()):
        moments = state[parameter]
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    tensors["generator"] = generator.get_state()
    if predictions:
        tensors[_PREDICTIONS] = torch.stack(predictions)
    checkpoints.save(path, tensors, {"identity": identity, "curve": curve})


def _restore(
    path: Path,
    identity: dict[str, Any],
    module: Module,
    average: _Average | None,
    state: AdamState,
    generator: torch.Generator,
) -> tuple[list[Epoch], list[Tensor]]:
    tensors, record = checkpoints.load(path)
    require_same(f"{path} was trained", record["identity"], identity)
    parameters = list(module.parameters())
    weights: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "optimizer":
            index, _, moment = name.partition(".")
            state[parameters[int(index)]][moment] = tensor
        elif kind == "average" and average is not None:
            average.tensors[int(name)] = tensor
        elif kind == "module":
            weights[name] = tensor
    module.load_state_dict(weights)
    generator.set_state(tensors["generator"])
    predictions = list(tensors[_PREDICTIONS]) if _PREDICTIONS in tensors else []
    return record["curve"], predictions
