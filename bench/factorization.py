"""`python -m bench.factorization` times the training of base models: a matrix factorization, Adam.

Every row is a size of the tables. The contenders make the same steps, those in PyTorch only some of
them, and all are given batches that were shuffled before:

- ours: `ops.matrix_factorization_adam_`, all steps in one call
- loop: embeddings, `mse_loss`, backward, `torch.optim.Adam` as it comes
- fused: the same with `Adam(fused=True)`
- compiled: the same with the loss compiled
- sparse: sparse gradients and `SparseAdam`, which leaves the rows outside of a batch alone: it
  trains another model

Losses are compared first. Runs are interleaved and the least time of each counts. The epoch at the
end is of ten million ratings, with the peak of the process's memory before and after it.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Embedding
from torch.nn.functional import mse_loss
from torch.optim import Adam, Optimizer, SparseAdam

from mimnet_fast import ops

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


class Ours:
    """The op, with its moments."""

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


class Loop:
    """Steps in PyTorch."""

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


def contest(name: str, size: Size, rounds: int) -> None:
    """Print the least time of a step of every contender."""
    columns = ratings(size)
    contenders = {
        "ours": Ours(size, columns),
        "loop": Loop(size, columns, Adam),
        "fused": Loop(size, columns, lambda p, lr: Adam(p, lr=lr, fused=True)),
        "compiled": Loop(size, columns, lambda p, lr: Adam(p, lr=lr, fused=True), compiled=True),
        "sparse": Loop(size, columns, SparseAdam, sparse=True),
    }
    losses = {key: contender()[: size.slow_steps] for key, contender in contenders.items()}
    for key in ("loop", "fused", "compiled"):
        torch.testing.assert_close(losses["ours"], losses[key], rtol=1e-4, atol=1e-4)
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
    ours = Ours(LARGEST, ratings(LARGEST))
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
    parser = argparse.ArgumentParser(prog="python -m bench.factorization", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name, size in SIZES.items():
        contest(name, size, options.rounds)
    epoch()


if __name__ == "__main__":
    main()
