"""Losses of training, and which of them kernels train on for many steps in one call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from mimnet_fast import backends, ops
from mimnet_fast.cdr.evaluation import Predict
from mimnet_fast.cdr.models.matrix_factorization import MatrixFactorization
from mimnet_fast.cdr.models.mimnet import MIMNet
from mimnet_fast.cdr.models.transfer import FrozenInputs, TransferModel

if TYPE_CHECKING:
    from mimnet_fast.cdr.training import Schedule

AdamState = defaultdict[Tensor, dict[str, Tensor]]
"""What `torch.optim.Adam` keeps as its ``state``. The optimizer itself is made for steps of its own
only, because the first one imports torch's compiler, which takes a second."""

Loss = Callable[..., Tensor]
"""Mean loss of a batch: called with the batch's part of each column of the training data."""


@dataclass(frozen=True)
class SquaredError:
    """The mean squared error of ``predict``: called with users, items and their ratings."""

    predict: Predict

    def __call__(self, users: Tensor, items: Tensor, values: Tensor) -> Tensor:
        """The loss of a batch."""
        return mse_loss(self.predict(users, items), values)


@dataclass(frozen=True)
class TransferLoss:
    """What a stage-2 model makes of a batch of its examples."""

    model: TransferModel
    inputs: FrozenInputs
    generator: torch.Generator

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.model.loss(self.inputs, batch, self.generator)


class Steps(NamedTuple):
    """How training proceeds: some batches in a call."""

    at_once: int
    take: Callable[[tuple[Tensor, ...], int], Tensor]
    """Takes columns of up to that many batches and the number of steps before; gives losses."""


def fused_steps(
    loss: Loss, schedule: Schedule, state: AdamState, averages: Mapping[Tensor, Tensor]
) -> Steps | None:
    """Steps that a kernel makes, if there is one for this loss and schedule.

    ``averages`` are the moving averages of the parameters, if they are to have one.
    """
    if backends.available("cpu")["native"]:
        return None
    if isinstance(loss, SquaredError) and type(loss.predict) is MatrixFactorization:
        if schedule.weight_decay or averages:
            return None
        return _factorization_steps(loss.predict, schedule, state)
    if isinstance(loss, TransferLoss) and isinstance(loss.model, MIMNet):
        if type(loss.model).history is not MIMNet.history:  # not the rows that the kernel gathers
            return None
        if loss.model.backend not in (None, "auto", "native"):
            return None
        return _mimnet_steps(loss.model, loss, schedule, state, averages)
    return None


def _factorization_steps(model: MatrixFactorization, schedule: Schedule, state: AdamState) -> Steps:
    tables = model.users.weight, model.items.weight

    def take(columns: tuple[Tensor, ...], before: int) -> Tensor:
        losses = ops.matrix_factorization_adam_(
            *tables,
            _moments(state, tables[0]),
            _moments(state, tables[1]),
            *columns,
            batch_size=schedule.batch_size,
            first_step=before,
            learning_rate=schedule.learning_rate,
        )
        _count(state, tables, len(losses))
        return losses

    # Few enough to interrupt a run soon, more than enough to spread the cost of a call.
    return Steps(20 * 1024, take)


def _mimnet_steps(
    model: MIMNet,
    loss: TransferLoss,
    schedule: Schedule,
    state: AdamState,
    averages: Mapping[Tensor, Tensor],
) -> Steps:
    inputs, parameters = loss.inputs, model.weights()
    flat = parameters.flat()
    at_once = 256  # their routing logits take 20 MB at the published sizes
    drawn = torch.empty(at_once * schedule.batch_size, *model.evaluation_logits.shape[1:])

    def take(columns: tuple[Tensor, ...], before: int) -> Tensor:
        users, items, ratings = columns
        assert inputs.item_prototypes is not None
        pairs = [_moments(state, parameter) for parameter in flat]
        first_logits = drawn[: len(users)]
        for batch in first_logits.split(schedule.batch_size):  # as step by step
            model.logits(len(batch), loss.generator, out=batch)
        losses = ops.mimnet_adam_(
            parameters,
            (
                ops.MIMNetParameters.of([first for first, _ in pairs]),
                ops.MIMNetParameters.of([second for _, second in pairs]),
            ),
            users,
            items,
            ratings,
            inputs.histories,
            inputs.lengths,
            inputs.source_items,
            inputs.source_users,
            inputs.target_items,
            inputs.item_prototypes,
            first_logits,
            batch_size=schedule.batch_size,
            weights=inputs.user_weights,
            average=ops.MIMNetParameters.of([averages[p] for p in flat]) if averages else None,
            averaging=schedule.averaging,
            iterations=model.iterations,
            padding=model.padding,
            first_step=before,
            learning_rate=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
            backend=model.backend,
        )
        _count(state, flat, len(losses))
        return losses

    return Steps(at_once, take)


def _moments(state: AdamState, parameter: Tensor) -> tuple[Tensor, Tensor]:
    kept = state[parameter]
    if not kept:  # as torch has it after its first step
        kept["step"] = torch.zeros(())
        kept["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        kept["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
    return kept["exp_avg"], kept["exp_avg_sq"]


def _count(state: AdamState, parameters: tuple[Tensor, ...], steps: int) -> None:
    for parameter in parameters:
        state[parameter]["step"] += steps
