"""All settings of a run, with the published values as defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.protocol import HISTORY_LENGTH, HistoryOrder

Base = Literal["mf", "biased-mf", "gmf", "dnn"]
Mapping = Literal["linear", "mlp"]


@dataclass(frozen=True)
class Config:
    """Settings of one run; the dataset, ``beta`` and ``seed`` decide the split.

    Raises:
        UserError: a number that is not positive.
    """

    beta: float = 0.2
    seed: int = 2020
    history_order: HistoryOrder = "file"
    history_length: int = HISTORY_LENGTH
    overlap: float = 1.0
    """Share of the training users of both domains who are known to be in both: see
    `protocol.keep_overlap`."""
    base: Base = "mf"
    """``"mf"``, ``"gmf"`` or ``"dnn"`` as published, or ``"biased-mf"``: biases in closed form
    (`biases`), models for the rest, with small initial embeddings and weight decay."""
    learning_rate: float = 0.01
    features: int = 10
    """D, width of all embeddings."""
    base_epochs: int = 10
    base_batch_size: int = 256
    epochs: int = 10
    """Stage-2 epochs (published: 10 for PTUPCDR, 5 for MIMNet); the best one counts."""
    batch_size: int = 128
    hidden: int = 50
    """Hidden units of the meta networks."""
    mapping: Mapping = "linear"
    """From source to target users in EMCDR and SSCDR: one matrix, or an MLP as in their papers."""
    interests: int = 7
    iterations: int = 3
    prototypes: int = 100
    backend: str = "auto"
    """Which kernels: see `mimnet_fast.backends`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and isinstance(value, (int, float)) and not value > 0:
                raise UserError(f"{field.name}: got {value}, need a number above 0")
        if self.overlap > 1:
            raise UserError(f"overlap: got {self.overlap}, need a share above 0 and at most 1")
        for name, choices in (("base", get_args(Base)), ("mapping", get_args(Mapping))):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"{name}: got {value!r}, need one of {', '.join(choices)}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: got {self.seed}, need an integer from 0 to 2^63 - 1")
