"""`python -m bench.training` times the training steps of both stages.

Stage 1, a matrix factorization, has a row for each size of the tables; stage 2, MIMNet, has one
for each batch. The contenders make the same steps, PyTorch only some of those of stage 1, and all
are given batches that were shuffled before:

- ours: `ops.matrix_factorization_adam_` or `ops.mimnet_adam_`, all steps in one call
- loop: autograd and `torch.optim.Adam` as it comes; in stage 2 through `ops.mimnet_forward`
- fused: the same with `Adam(fused=True)`
- compiled: the same with the loss compiled; in stage 2 that of the reassociated reference
- textbook, of stage 2: the reference as papers write it, with `Adam(fused=True)`
- sparse, of stage 1: sparse gradients and `SparseAdam`, which leaves the rows outside of a batch
  alone: it trains another model

Losses are compared first. Runs are interleaved and the least time of each counts. The epoch at the
end is of ten million ratings, with the peak of the process's memory before and after it.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Embedding
from torch.nn.functional import mse_loss
from torch.optim import Adam, Optimizer, SparseAdam

from mimnet_fast import nn, ops, reference
from mimnet_fast.ops import MIMNetParameters

BATCH, RATE = 256, 0.01


class Size(NamedTuple):
    """Of a data set: its tables and how many steps are made in PyTorch and by us."""

    users: int
    items: int
    width: int
    slow_steps: int
    steps: int


SIZES = {
    "epinions, D 10": Size(9_500, 40_000, 10, 100, 800),
    "amazon, D 10": Size(120_000, 50_000, 10, 40, 4000),
    "amazon, D 64": Size(120_000, 50_000, 64, 20, 2000),
}
LARGEST = Size(1_000_000, 200_000, 10, 0, 10_000_000 // BATCH)


def ratings(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Users, items and ratings; the popularity of both falls with their index."""
    torch.manual_seed(0)
    count = size.steps * BATCH
    users, items = ((torch.rand(count) ** 2 * n).long() for n in (size.users, size.items))
    return users, items, torch.randint(1, 6, (count,)).float()


class Factorization:
    """Steps of stage 1 by the op, with its moments."""

    def __init__(self, size: Size, columns: tuple[Tensor, ...]) -> None:
        self.tables = tables(size)
        self.moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in self.tables]
        self.columns, self.step = columns, 0

    def __call__(self) -> Tensor:
        """All steps."""
        losses = ops.matrix_factorization_adam_(
            *self.tables,
            *self.moments,
            *self.columns,
            batch_size=BATCH,
            first_step=self.step,
            learning_rate=RATE,
        )
        self.step += len(losses)
        return losses


class FactorizationLoop:
    """Steps of stage 1 in PyTorch."""

    def __init__(
        self,
        size: Size,
        columns: tuple[Tensor, ...],
        optimizer: Callable[..., Optimizer],
        *,
        sparse: bool = False,
        compiled: bool = False,
    ) -> None:
        users, items = tables(size)
        self.users = Embedding.from_pretrained(users, freeze=False, sparse=sparse)
        self.items = Embedding.from_pretrained(items, freeze=False, sparse=sparse)
        self.optimizer = optimizer([self.users.weight, self.items.weight], lr=RATE)
        self.loss = torch.compile(self._loss) if compiled else self._loss
        count = size.slow_steps * BATCH
        self.batches = list(zip(*(c[:count].split(BATCH) for c in columns), strict=True))

    def _loss(self, users: Tensor, items: Tensor, values: Tensor) -> Tensor:
        return mse_loss((self.users(users) * self.items(items)).sum(-1), values)

    def __call__(self) -> Tensor:
        """Some steps."""
        losses = []
        for batch in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(*batch)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)


def tables(size: Size) -> tuple[Tensor, Tensor]:
    """Users and items as the base model has them at first."""
    torch.manual_seed(1)
    return torch.randn(size.users, size.width), torch.randn(size.items, size.width)


class Second(NamedTuple):
    """Inputs of stage 2 at the published sizes, and how many steps are made."""

    batch: int
    steps: int = 40
    users: int = 7_000
    items: int = 40_000
    width: int = 10
    interests: int = 7
    length: int = 20
    hidden: int = 50


class Model(torch.nn.Module):
    """MIMNet's parameters and the data of a stage 2."""

    def __init__(self, size: Second) -> None:
        super().__init__()
        torch.manual_seed(0)
        d, count = size.width, size.batch * size.steps
        self.size = size
        self.routing = nn.DynamicRouting(d, d, size.interests)
        self.bridge = nn.InterestBridge(d, d, d, size.hidden)
        self.attention = nn.MultiGranularityAttention(d)
        self.users, self.items = (torch.randint(n, (count,)) for n in (size.users, size.items))
        self.ratings = torch.randint(1, 6, (count,)).float()
        self.histories = torch.randint(size.items, (size.users, size.length))
        self.lengths = torch.randint(size.length + 1, (size.users,))
        rows = (size.items, size.users, size.items, size.items)
        self.tables = [torch.randn(n, d) for n in rows]
        self.drawn = torch.randn(count, size.interests, size.length)

    def weights(self) -> MIMNetParameters:
        """All parameters."""
        bridge = self.bridge
        meta = bridge.w1, bridge.b1, bridge.w2, bridge.b2
        return MIMNetParameters(self.routing.weight, *meta, *self.attention.weights())


class MIMNet(Model):
    """Steps of stage 2 by the op."""

    def __init__(self, size: Second) -> None:
        super().__init__(size)
        flat = self.weights().flat()
        self.moments = [MIMNetParameters.of([torch.zeros_like(t) for t in flat]) for _ in range(2)]
        self.step = 0

    def __call__(self) -> Tensor:
        """All steps."""
        losses = ops.mimnet_adam_(
            self.weights(),
            self.moments,
            self.users,
            self.items,
            self.ratings,
            self.histories,
            self.lengths,
            *self.tables,
            self.drawn,
            batch_size=self.size.batch,
            first_step=self.step,
            learning_rate=RATE,
        )
        self.step += len(losses)
        return losses


class MIMNetLoop(Model):
    """Steps of stage 2 in PyTorch, around a function with the signature of the reference."""

    def __init__(
        self, size: Second, function: Callable[..., Tensor], optimizer: Callable[..., Optimizer]
    ) -> None:
        super().__init__(size)
        self.function, self.optimizer = function, optimizer(self.parameters(), lr=RATE)

    def __call__(self) -> Tensor:
        """All steps."""
        losses = []
        history, source, item, prototype = self.tables
        position = torch.arange(self.size.length)
        columns = self.users, self.items, self.ratings, self.drawn
        for users, items, ratings, drawn in zip(
            *(column.split(self.size.batch) for column in columns), strict=True
        ):
            self.optimizer.zero_grad(set_to_none=True)
            rated = self.function(
                self.histories[users],
                source[users],
                item[items],
                prototype[items],
                self.weights(),
                drawn,
                mask=position < self.lengths[users][:, None],
                table=history,
            )
            loss = mse_loss(rated, ratings)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)


def fused_adam(parameters: Any, lr: float) -> Optimizer:
    """Adam with one kernel for all parameters."""
    return Adam(parameters, lr=lr, fused=True)


def factorization(size: Size) -> dict[str, Callable[[], Tensor]]:
    """The contenders of stage 1."""
    columns = ratings(size)
    return {
        "ours": Factorization(size, columns),
        "loop": FactorizationLoop(size, columns, Adam),
        "fused": FactorizationLoop(size, columns, fused_adam),
        "compiled": FactorizationLoop(size, columns, fused_adam, compiled=True),
        "sparse": FactorizationLoop(size, columns, SparseAdam, sparse=True),
    }


def second_stage(size: Second) -> dict[str, Callable[[], Tensor]]:
    """The contenders of stage 2."""
    compiled = torch.compile(reference.mimnet_forward_reassociated)
    return {
        "ours": MIMNet(size),
        "loop": MIMNetLoop(size, ops.mimnet_forward, Adam),
        "fused": MIMNetLoop(size, ops.mimnet_forward, fused_adam),
        "compiled": MIMNetLoop(size, compiled, fused_adam),
        "textbook": MIMNetLoop(size, reference.mimnet_forward, fused_adam),
    }


def contest(name: str, contenders: dict[str, Callable[[], Tensor]], rounds: int) -> None:
    """Print the least time of a step of every contender."""
    losses = {key: contender() for key, contender in contenders.items()}
    for key in contenders.keys() - {"sparse"}:
        steps = len(losses[key])
        torch.testing.assert_close(losses["ours"][:steps], losses[key], rtol=1e-3, atol=1e-3)
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for key, contender in contenders.items():
            start = time.perf_counter()
            steps = len(contender())
            best[key] = min(best[key], (time.perf_counter() - start) / steps)
    row = ", ".join(f"{k} {s * 1e6:.1f} us ({s / best['ours']:.3g}x)" for k, s in best.items())
    print(f"{name}: {row}", flush=True)


def epoch() -> None:
    """Print time and memory of ten million ratings."""
    ours = Factorization(LARGEST, ratings(LARGEST))
    before = _peak()
    start = time.perf_counter()
    ours()
    seconds = time.perf_counter() - start
    print(
        f"{LARGEST.steps * BATCH:,} ratings, {LARGEST.users:,} users, {LARGEST.items:,} items, "
        f"D {LARGEST.width}: {seconds:.2f} s, peak memory {before:.0f} MB before, {_peak():.0f} MB "
        "after"
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each size, then the epoch."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name, size in SIZES.items():
        contest(f"stage 1, {name}", factorization(size), options.rounds)
    for batch in (128, 512):
        contest(f"stage 2, B {batch}", second_stage(Second(batch)), options.rounds)
    epoch()


if __name__ == "__main__":
    main()
