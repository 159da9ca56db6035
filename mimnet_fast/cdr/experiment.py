"""One run: base models, transfer models and trivial predictors on one split.

The folder of a run holds what it learned::

    source.safetensors                     base model of the source domain
    {selection,final}/target.safetensors   base model of the target domain
    {selection,final}/MODEL.safetensors    any other model after its last finished epoch
    MODEL.safetensors                      weights of the `final` one at the honestly chosen epoch
    results.json, results.md

A file of a phase also keeps what was predicted for the phase's cold-start users after each epoch.
Finished epochs found there are not trained again, so a run goes on where it was killed, and models
added later stand on the same base models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import Module

from mimnet_fast.cdr import checkpoints, results
from mimnet_fast.cdr.biases import fit_split, residuals
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.diagnostics import diagnose
from mimnet_fast.cdr.errors import require_same
from mimnet_fast.cdr.evaluation import Errors, Evaluation, errors, evaluate, user_errors
from mimnet_fast.cdr.losses import Loss, SquaredError, TransferLoss
from mimnet_fast.cdr.models import (
    TRAINABLE,
    TRIVIAL,
    FrozenInputs,
    JointTables,
    MatrixFactorization,
    MIMNet,
    TransferModel,
    item_prototypes,
)
from mimnet_fast.cdr.models.matrix_factorization import BASES
from mimnet_fast.cdr.profiles import profiles
from mimnet_fast.cdr.protocol import Phase, Split, keep_overlap, split
from mimnet_fast.cdr.tasks import Task
from mimnet_fast.cdr.training import (
    Epoch,
    Schedule,
    fit,
    seeded_generator,
    seeded_module,
    stored_predictions,
)

PhaseName = Literal["selection", "final"]

BIASED_SCALE, BIASED_DECAY = 0.1, 1e-3
"""Initial size and weight decay of the embeddings of the base `biased-mf`."""
BIASED_TRANSFER_DECAY, BIASED_AVERAGING, BIASED_BALANCE = 1e-2, 0.998, 100.0
"""Of the transfer models that stand on it: weight decay, the share of the old parameters in their
moving average, and how many ratings of a user halve what each of them counts."""

_BASE_SETTINGS = (
    "beta",
    "seed",
    "history_order",
    "base",
    "features",
    "learning_rate",
    "base_epochs",
    "base_batch_size",
)


class Rating(Task):
    """Prediction of the ratings of cold-start users."""

    selections = results.SELECTIONS
    title = "cold-start users"
    cold = True
    metrics = Errors._fields

    @property
    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        return {}

    def stage1(self, *args: Any) -> BaseModels:
        """See `Task.stage1`."""
        return BaseModels(*args)


RATING = Rating()


def run(
    dataset: Dataset,
    config: Config,
    models: Iterable[str],
    folder: Path,
    progress: Progress,
    *,
    task: Task = RATING,
) -> dict[str, Any]:
    """Train and measure ``models`` beside all predictors without training.

    Args:
        dataset: A prepared dataset.
        config: All settings.
        models: Names in `TRAINABLE`.
        folder: The run's folder, new or to be gone on with.
        progress: Where bars are drawn.
        task: What is learned and measured.

    Returns:
        What `results.json` says, models of earlier calls on ``folder`` included.

    Raises:
        UserError: settings or models that do not fit the task, settings that do not fit the data or
            what ``folder`` holds, or a diverging loss.
    """
    names = list(models)
    task.check(names, config)
    return train_models(task.stage1(dataset, config, folder, progress), names, folder)


def train_models(stage1: Stage1, models: Iterable[str], folder: Path) -> dict[str, Any]:
    """The part of `run` that stands on base models, which may be kept in another folder."""
    before = results.read(folder)
    if before:
        require_same(f"{folder} holds results", before.get("task", {}), stage1.task.settings)
    found: dict[str, Any] = {
        name: {"title": each.title, **results.without_training(each.scores)}
        for name, each in stage1.untrained.items()
    }
    found |= before.get("models", {})
    header = results.header(stage1.dataset, stage1.config, stage1.split, stage1.task)
    summary = {**header, "models": found}
    for name in models:
        found[name] = {**train(name, stage1, folder), **stage1.diagnostics(name, folder)}
        results.write(folder, summary, results.page(summary, stage1.measured()))
    return summary


def final_predictions(folder: Path, name: str) -> Tensor:
    """What a model of a finished run predicted for the test ratings, ``[epochs, ratings]``."""
    stem = "target" if _is_target_model(name) else name
    return stored_predictions(folder / "final" / f"{stem}.safetensors")


class Job(NamedTuple):
    """How one model is trained in one phase."""

    module: Module
    loss: Loss
    examples: tuple[Tensor, ...]
    schedule: Schedule
    evaluate: Callable[[], Evaluation]

    def fit(self, **options: Any) -> list[Epoch]:
        """Do it; the options are those of `training.fit`."""
        what = self.module, self.loss, self.examples, self.schedule
        return fit(*what, evaluate=self.evaluate, **options)


class Untrained(NamedTuple):
    """What a predictor without training reaches on the test users."""

    title: str
    scores: dict[str, float]
    totals: dict[str, Tensor]
    """See `Stage1.user_totals`."""


class Stage1(ABC):
    """What a run of any task stands on: its settings, and base models made when first asked for.

    Args:
        task: What is learned and measured.
        dataset: A prepared dataset.
        config: All settings.
        folder: The run's folder.
        progress: Where bars are drawn.
        identity: What the task's base models depend on, beside the settings of all of them.
        scale: Of their initial values.
        weight_decay: Of their training.
        criterion: The metric that chooses the weights to keep.
        best: ``min`` or ``max``: which value of a metric is best.
    """

    split: results.Phases

    def __init__(
        self,
        task: Task,
        dataset: Dataset,
        config: Config,
        folder: Path,
        progress: Progress,
        *,
        identity: dict[str, Any],
        scale: float,
        weight_decay: float,
        criterion: str,
        best: Callable[[list[float]], float],
    ) -> None:
        self.task, self.dataset, self.config = task, dataset, config
        self.folder, self.progress = folder, progress
        self.scale, self.criterion, self.best = scale, criterion, best
        self.schedule = Schedule(
            config.base_epochs, config.base_batch_size, config.learning_rate, weight_decay
        )
        self.identity = {
            "dataset": dataset.fingerprint,
            **{name: getattr(config, name) for name in _BASE_SETTINGS},
            **identity,
        }
        self._trained: dict[str, tuple[MatrixFactorization, list[Epoch]]] = {}

    @abstractmethod
    def source(self, phase: PhaseName) -> tuple[MatrixFactorization, list[Epoch]]:
        """Source model of a phase and its curve."""

    @abstractmethod
    def target(self, phase: PhaseName) -> tuple[MatrixFactorization, list[Epoch]]:
        """Target model of a phase and its curve on the phase's users."""

    @abstractmethod
    def job(self, name: str, phase: PhaseName, generator: torch.Generator) -> Job:
        """How a model other than the base models is trained; ``generator`` draws all."""

    @abstractmethod
    def measured(self) -> str:
        """A sentence about what is measured."""

    @property
    @abstractmethod
    def untrained(self) -> dict[str, Untrained]:
        """Predictors without training, by name."""

    @abstractmethod
    def user_totals(self, predicted: Tensor) -> dict[str, Tensor]:
        """What each user of both domains adds to each metric of the test set, float64 ``[O]``.

        Args:
            predicted: What a checkpoint of the phase ``final`` keeps of an epoch.
        """

    def diagnostics(self, name: str, folder: Path) -> dict[str, Any]:
        """What else `results.json` says of a trained model."""
        return {}

    def curve(self, checkpoint: Path, epochs: list[Epoch]) -> list[Epoch]:
        """The epochs of a finished fit with all that is reported of them."""
        return epochs

    def factorization(self, stream: str, users: int, items: int) -> MatrixFactorization:
        """An untrained base model."""
        return seeded_module(
            partial(BASES[self.config.base], users, items, self.config.features, scale=self.scale),
            self.config.seed,
            stream,
        )

    def _model(
        self,
        name: str,
        users: int,
        items: int,
        examples: tuple[Tensor, ...],
        loss: Callable[[MatrixFactorization, torch.Generator], Loss],
        evaluate: Callable[[MatrixFactorization], Evaluation],
        *,
        keep_predictions: bool,
    ) -> tuple[MatrixFactorization, list[Epoch]]:
        """A base model, trained when first asked for, and its curve."""
        if name not in self._trained:
            config, stream = self.config, name.rpartition("/")[2]
            model = self.factorization(stream, users, items)
            generator = seeded_generator(config.seed, f"{stream} batches")
            curve = fit(
                model,
                loss(model, generator),
                examples,
                self.schedule,
                generator=generator,
                evaluate=partial(evaluate, model),
                checkpoint=self.folder / f"{name}.safetensors",
                identity={"name": name, **self.identity},
                progress=self.progress,
                keep_predictions=keep_predictions,
            )
            self._trained[name] = model, curve
        return self._trained[name]

    def _with_prototypes(
        self, inputs: FrozenInputs, model: TransferModel | type[TransferModel]
    ) -> FrozenInputs:
        """The inputs with prototypes of the target items, for a model that uses them."""
        if not model.uses_prototypes:
            return inputs
        config = self.config
        seed = config.seed % 2**32  # what scikit-learn takes
        untrained = None
        if model.clusters_untrained_rows:
            generator = seeded_generator(config.seed, "untrained rows")
            shape = len(inputs.source_items), config.features  # one for empty histories
            untrained = self.scale * torch.randn(shape, generator=generator)
        found = item_prototypes(inputs.target_items, config.prototypes, seed, untrained)
        return replace(inputs, item_prototypes=found)


class BaseModels(Stage1):
    """Stage 1 of rating prediction: matrix factorization of either domain.

    Args:
        dataset: A prepared dataset.
        config: All settings.
        folder: The run's folder.
        progress: Where bars are drawn.
    """

    split: Split

    def __init__(self, dataset: Dataset, config: Config, folder: Path, progress: Progress) -> None:
        self.biased = config.base == "biased-mf"
        scale, weight_decay = (BIASED_SCALE, BIASED_DECAY) if self.biased else (1.0, 0.0)
        super().__init__(
            RATING,
            dataset,
            config,
            folder,
            progress,
            identity={},
            scale=scale,
            weight_decay=weight_decay,
            criterion="mae",
            best=min,
        )
        self.raw = split(
            dataset,
            config.beta,
            config.seed,
            history_order=config.history_order,
            history_length=config.history_length,
        )
        self.biases = fit_split(dataset, self.raw)
        whole = residuals(self.raw, self.biases) if self.biased else self.raw
        self.split = keep_overlap(whole, config.overlap, config.seed)
        self._frozen: dict[tuple[PhaseName, bool, bool, bool, bool], FrozenInputs] = {}

    def source(self, phase: PhaseName = "final") -> tuple[MatrixFactorization, list[Epoch]]:
        """Source model, the same in both phases; its curve is measured on its training ratings."""
        train = self.split.train_source
        users, items = self.dataset.num_source_users, self.dataset.num_source_items
        return self._rated("source", users, items, train, train, keep_predictions=False)

    def target(self, phase: PhaseName) -> tuple[MatrixFactorization, list[Epoch]]:
        """Target model of a phase and its curve on the phase's cold-start users."""
        data: Phase = getattr(self.split, phase)
        users, items = self.dataset.num_target_users, self.dataset.num_target_items
        return self._rated(
            f"{phase}/target",
            users,
            items,
            data.train_target,
            data.evaluation,
            keep_predictions=True,
        )

    def _rated(
        self, name: str, users: int, items: int, train: Ratings, measured: Ratings, **options: Any
    ) -> tuple[MatrixFactorization, list[Epoch]]:
        return self._model(
            name,
            users,
            items,
            train.columns(),
            lambda model, generator: SquaredError(model),
            lambda model: evaluate(model, measured),
            **options,
        )

    def frozen(self, phase: PhaseName, model: TransferModel | type[TransferModel]) -> FrozenInputs:
        """What a transfer model is given in a phase."""
        key = (
            phase,
            model.uses_profiles,
            model.weighs_users,
            model.uses_prototypes,
            model.clusters_untrained_rows,
        )
        if key not in self._frozen:
            self._frozen[key] = self._freeze(phase, model)
        return self._frozen[key]

    def _freeze(self, phase: PhaseName, model: TransferModel | type[TransferModel]) -> FrozenInputs:
        source, target = self.source()[0], self.target(phase)[0]
        source_users, source_items, target_users, target_items = (
            table.detach()
            for table in (
                source.user_vectors(),
                source.items.weight,  # of histories, which nobody rates
                target.user_vectors(),
                target.item_vectors(),
            )
        )
        user_weights = None
        if self.biased and model.weighs_users:
            user_weights = balanced_weights(getattr(self.split, phase), self.dataset.num_overlap)
        if self.biased and model.uses_profiles:
            source_users, source_items, target_items = (
                torch.cat(tables, 1)
                for tables in zip(
                    (source_users, source_items, target_items),
                    profiles(self.dataset, getattr(self.raw, phase), self.biases.final.source),
                    strict=True,
                )
            )
        inputs = FrozenInputs(
            histories=self.split.histories,
            lengths=self.split.lengths,
            source_users=source_users,
            source_items=torch.cat([source_items, torch.zeros_like(source_items[:1])]),
            target_users=target_users,
            target_items=target_items,
            user_weights=user_weights,
            item_groups=self.dataset.source_groups,
        )
        return self._with_prototypes(inputs, model)

    def job(self, name: str, phase: PhaseName, generator: torch.Generator) -> Job:
        """See `Stage1.job`."""
        data: Phase = getattr(self.split, phase)
        spec = TRAINABLE[name]
        if (build := spec.build) is None:
            tables = JointTables.of(self.dataset, data)
            joint = self.factorization(name, tables.users, tables.items)
            examples = tables.examples(self.split.train_source, data)
            measured = partial(evaluate, tables.predict(joint), data.evaluation)
            return Job(joint, SquaredError(joint), examples, self.schedule, measured)
        config = self.config
        kinds = [len(self.dataset.source_groups)] if spec.takes_metadata else []
        model = seeded_module(partial(build, config, *kinds), config.seed, name)
        inputs = self.frozen(phase, model)
        decay = BIASED_TRANSFER_DECAY if self.biased else 0.0
        averaging = BIASED_AVERAGING if self.biased and model.averages else 0.0
        return Job(
            model,
            TransferLoss(model, inputs, generator),
            model.examples(inputs, data),
            Schedule(config.epochs, config.batch_size, config.learning_rate, decay, averaging),
            partial(evaluate, partial(model.predict, inputs), data.evaluation),
        )

    def measured(self) -> str:
        """See `Stage1.measured`."""
        test = self.split.final.evaluation
        return (
            f"{len(test)} ratings by {len(test.users.unique())} cold-start test users, of "
            f"{self.dataset.num_overlap} users of both domains."
        )

    @cached_property
    def untrained(self) -> dict[str, Untrained]:
        """See `Stage1.untrained`."""
        test, found = self.raw.final.evaluation, {}
        for name, (title, predict) in TRIVIAL.items():
            predicted = predict(self.raw, self.biases)
            scores = errors(predicted, test.values)._asdict()
            totals = user_errors(predicted, test, self.dataset.num_overlap)
            found[name] = Untrained(title, scores, totals)
        return found

    def user_totals(self, predicted: Tensor) -> dict[str, Tensor]:
        """See `Stage1.user_totals`; the totals of errors."""
        return user_errors(predicted, self.split.final.evaluation, self.dataset.num_overlap)

    def diagnostics(self, name: str, folder: Path) -> dict[str, Any]:
        """See `Stage1.diagnostics`: a MIMNet as it was kept, at the test users' ratings."""
        build = TRAINABLE[name].build
        model = build and seeded_module(partial(build, self.config), self.config.seed, name)
        if not isinstance(model, MIMNet):
            return {}
        model.load_state_dict(checkpoints.load(folder / f"{name}.safetensors")[0])
        inputs = self.frozen("final", model)
        return {"diagnostics": diagnose(model, inputs, self.split.final.evaluation)}


def balanced_weights(phase: Phase, users: int) -> Tensor:
    """What an error of each user counts, so that a few who rate a lot do not decide alone.

    A user's errors are not independent. With n ratings each counts ``1 / (1 + n / BALANCE)``, times
    what makes the mean over the ratings 1.
    """
    counts = torch.bincount(phase.train_meta.users, minlength=users)
    weights = 1 / (1 + counts / BIASED_BALANCE)
    return weights * (counts.sum() / (counts * weights).sum())


def _is_target_model(name: str) -> bool:
    return TRAINABLE[name].build is None and TRAINABLE[name].base == "target"


def train(name: str, stage1: Stage1, folder: Path) -> dict[str, Any]:
    """Both phases of a model, and what `results.json` says of it.

    Weights of the honestly chosen epoch are kept, but of a base model.
    """
    spec = TRAINABLE[name]
    if _is_target_model(name):
        selection, final = (stage1.target(phase)[1] for phase in get_args(PhaseName))
    else:
        selection = _train_phase(name, stage1, folder, "selection")
        chosen = results.best_epoch(selection, stage1.criterion, stage1.best)
        final = _train_phase(name, stage1, folder, "final", keep=chosen)
    return {
        "title": spec.title,
        "source": spec.source,
        "settings": {setting: getattr(stage1.config, setting) for setting in spec.settings},
        **results.select_epochs(selection, final, stage1.best),
    }


def _train_phase(
    name: str, stage1: Stage1, folder: Path, phase: PhaseName, *, keep: int | None = None
) -> list[Epoch]:
    config = stage1.config
    generator = seeded_generator(config.seed, f"{name} batches")
    job = stage1.job(name, phase, generator)
    identity = {"name": f"{phase}/{name}", **stage1.identity} | {
        setting: getattr(config, setting) for setting in TRAINABLE[name].settings
    }

    def keep_chosen(epoch: int) -> None:
        if epoch == keep:
            checkpoints.save(folder / f"{name}.safetensors", job.module.state_dict(), identity)

    checkpoint = folder / phase / f"{name}.safetensors"
    epochs = job.fit(
        generator=generator,
        checkpoint=checkpoint,
        identity=identity,
        progress=stage1.progress,
        after_epoch=keep_chosen,
    )
    return stage1.curve(checkpoint, epochs)
