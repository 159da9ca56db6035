"""What the models of a run are trained for and measured by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.models import TRAINABLE

if TYPE_CHECKING:
    from mimnet_fast.cdr.experiment import Stage1


class Task(ABC):
    """Rating prediction (`experiment.Rating`) or ranking (`ranking_experiment.Ranking`)."""

    selections: Mapping[str, str]
    """How an epoch is chosen, by name."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Who is measured, and how."""

    @property
    @abstractmethod
    def cold(self) -> bool:
        """Whether a share beta of the users of both domains is tested, as cold-start users."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What results depend on beside the config, as JSON gives it back."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """What is measured, by name."""

    @abstractmethod
    def stage1(self, dataset: Dataset, config: Config, folder: Path, progress: Progress) -> Stage1:
        """The base models of a run, made when first asked for."""

    def refusal(self, model: str, config: Config) -> str | None:
        """Why a model cannot take part, and what is needed."""
        if model not in TRAINABLE:
            return f"it is not known: need one of {', '.join(TRAINABLE)}"
        needed = TRAINABLE[model].only_on
        if needed not in (None, config.base):
            return f"base {config.base} has nothing that it leaves out: need base {needed}"
        return None

    def check(self, models: Iterable[str], config: Config) -> None:
        """Refuse what cannot take part, before anything is trained.

        Raises:
            UserError: a setting or a model that the task has no use for.
        """
        for name in models:
            if reason := self.refusal(name, config):
                raise UserError(f"model: got {name!r}, but {reason}")
