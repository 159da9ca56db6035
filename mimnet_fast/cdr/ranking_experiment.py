"""One run of ranking by implicit feedback: the models of `experiment`, trained to rank.

The folder is that of `experiment`, but under leave-last-out the source model is one per phase too,
``{selection,final}/source.safetensors``. What a phase keeps of each epoch are the ranks of the
measured positives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from rich.progress import Progress
from torch import Tensor

from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.evaluation import Evaluation
from mimnet_fast.cdr.experiment import Job, PhaseName, Stage1, Untrained
from mimnet_fast.cdr.implicit import (
    OBJECTIVES,
    Objective,
    Protocol,
    RankingPhase,
    RankingSplit,
    ranking_split,
)
from mimnet_fast.cdr.losses import Loss
from mimnet_fast.cdr.models import (
    TRAINABLE,
    FrozenInputs,
    JointTables,
    MatrixFactorization,
    TransferModel,
)
from mimnet_fast.cdr.models.mapping import MappingModel
from mimnet_fast.cdr.ranking import Score, Seen, measure, ranks, user_metrics
from mimnet_fast.cdr.tasks import Task
from mimnet_fast.cdr.training import (
    Epoch,
    Schedule,
    seeded_generator,
    seeded_module,
    stored_predictions,
)

RANKED = ("mimnet", "ptupcdr", "emcdr", "sscdr", "lacdr", "cmf", "tgt")
"""Models that can be ranked by."""

INITIAL_SCALE = 0.1
"""Of the embeddings: scores start near 0, where the objectives are steep."""

SELECTIONS = {
    "honest": "epoch that was best on the validation positives, in a run that trained without them "
    "(each metric at its own)",
    "published": "best epoch on the test positives (each metric at its own)",
}

_TITLES = {"random": "chance", "popularity": "popularity"}

_REFUSED = {
    "mimnet-released": "it reproduces a code of rating prediction",
    "remit": "its policy is rewarded for the errors of ratings",
}


@dataclass(frozen=True)
class Ranking(Task):
    """What is ranked how.

    Raises:
        UserError: no negatives, no cutoff, or one below 1.
    """

    selections = SELECTIONS

    objective: Objective = "bpr"
    protocol: Protocol = "cold"
    negatives: int = 10
    """Items that the user has not seen, drawn anew for each positive in each epoch."""
    cutoffs: Sequence[int] = (10, 20)
    """The k of HR@k and NDCG@k."""

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise UserError(f"negatives: got {self.negatives}, need at least 1 for each positive")
        if not self.cutoffs or min(self.cutoffs) < 1:
            raise UserError(f"k: got {list(self.cutoffs)}, need numbers of at least 1")

    @property
    def title(self) -> str:
        """See `Task.title`."""
        return f"{self.protocol} by {self.objective}"

    @property
    def cold(self) -> bool:
        """See `Task.cold`."""
        return self.protocol == "cold"

    @property
    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        return {**asdict(self), "cutoffs": list(self.cutoffs)}

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Task.metrics`."""
        return (*(f"{name}@{k}" for k in self.cutoffs for name in ("hr", "ndcg")), "mrr")

    def stage1(self, *args: Any) -> RankingModels:
        """See `Task.stage1`."""
        return RankingModels(self, *args)

    def refusal(self, model: str, config: Config) -> str | None:
        """See `Task.refusal`."""
        if model in RANKED:
            return None
        reason = _REFUSED.get(model, "no way is known to rank by it")
        return f"{reason}: need one of {', '.join(RANKED)}"

    def check(self, models: Iterable[str], config: Config) -> None:
        """See `Task.check`."""
        super().check(models, config)
        if config.base == "biased-mf":
            raise UserError(
                "base: got 'biased-mf', whose biases explain ratings: need mf, gmf or dnn"
            )
        if config.overlap != 1:
            raise UserError(
                f"overlap: got {config.overlap}, need 1, as only ratings are studied by it"
            )


class RankingModels(Stage1):
    """Stage 1 of ranking: matrix factorization of either domain.

    Args:
        task: Objective, protocol and metrics.
        dataset: A prepared dataset.
        config: All settings; leave-last-out takes histories by time.
        folder: The run's folder.
        progress: Where bars are drawn.

    Raises:
        UserError: settings that do not fit the data.
    """

    task: Ranking
    split: RankingSplit

    def __init__(
        self, task: Ranking, dataset: Dataset, config: Config, folder: Path, progress: Progress
    ) -> None:
        if not task.cold:
            config = replace(config, history_order="time")
        identity = {name: getattr(task, name) for name in ("objective", "protocol", "negatives")}
        super().__init__(
            task,
            dataset,
            config,
            folder,
            progress,
            identity=identity,
            scale=INITIAL_SCALE,
            weight_decay=0.0,
            criterion="mrr",
            best=max,
        )
        self.split = ranking_split(dataset, config, task.protocol)
        self._seen: dict[PhaseName, Seen] = {}
        for phase in get_args(PhaseName):
            data = self.data(phase)
            if not len(data.evaluation):
                raise UserError(
                    f"protocol {task.protocol}: no positive to measure in the phase {phase}: use "
                    "another seed or beta, or a larger dataset"
                )
            self._seen[phase] = Seen(
                data.seen_target, dataset.num_target_users, dataset.num_target_items
            )

    def data(self, phase: PhaseName) -> RankingPhase:
        """Who learns from what in a phase."""
        found: RankingPhase = getattr(self.split, phase)
        return found

    def measured(self) -> str:
        """See `Stage1.measured`."""
        data = self.split.final
        users = data.evaluation.users.unique()
        without = int((data.histories[1][users] == 0).sum())
        return (
            f"{len(data.evaluation)} positives of {len(users)} test users ({without} without a "
            "history), each ranked among all items of the target domain that the user has not seen."
        )

    def source(self, phase: PhaseName) -> tuple[MatrixFactorization, list[Epoch]]:
        """See `Stage1.source`; under cold-start the same in both phases."""
        data, users, items = self.data(phase), *self._source_size()
        name = "source" if self.task.cold else f"{phase}/source"
        return self._ranked(
            name,
            users,
            items,
            data.train_source,
            Seen(data.seen_source, users, items),
            lambda model: Evaluation({}, torch.empty(0)),  # its users are measured in the target
            keep_predictions=False,
        )

    def target(self, phase: PhaseName) -> tuple[MatrixFactorization, list[Epoch]]:
        """See `Stage1.target`."""
        name = f"{phase}/target"
        model, epochs = self._ranked(
            name,
            self.dataset.num_target_users,
            self.dataset.num_target_items,
            self.data(phase).train_target,
            self._seen[phase],
            lambda model: self._evaluate(phase, _inner_products(model)),
            keep_predictions=True,
        )
        return model, self.curve(self.folder / f"{name}.safetensors", epochs)

    def curve(self, checkpoint: Path, epochs: list[Epoch]) -> list[Epoch]:
        """See `Stage1.curve`: the metrics of the stored ranks."""
        data = self.data("selection" if checkpoint.parent.name == "selection" else "final")
        return [
            {**epoch, **measure(found, data.evaluation.users, self.task.cutoffs)}
            for epoch, found in zip(epochs, stored_predictions(checkpoint), strict=True)
        ]

    def job(self, name: str, phase: PhaseName, generator: torch.Generator) -> Job:
        """See `Stage1.job`."""
        data, build, config = self.data(phase), TRAINABLE[name].build, self.config
        if build is None:
            return self._joint_job(name, phase, generator)
        model = seeded_module(partial(build, config), config.seed, name)
        inputs, learned_from = self._frozen(phase, model)
        schedule = Schedule(config.epochs, config.batch_size, config.learning_rate)
        evaluate = partial(self._evaluate, phase, partial(model.scores, inputs, candidates=None))
        if isinstance(model, MappingModel):  # which learns from embeddings
            examples = model.examples(inputs, data)
            return Job(
                model,
                lambda *batch: model.loss(inputs, batch, generator),
                examples,
                schedule,
                evaluate,
            )

        def loss(rows: Tensor, users: Tensor, items: Tensor) -> Tensor:
            candidates = self._candidates(self._seen[phase], users, items, generator)
            return self._objective(model.scores(learned_from, rows, candidates, generator))

        users, items, _ = data.train_meta.columns()
        rows = users if data.train_histories is None else torch.arange(len(users))
        return Job(model, loss, (rows, users, items), schedule, evaluate)

    @cached_property
    def untrained(self) -> dict[str, Untrained]:
        """See `Stage1.untrained`: chance and popularity."""
        data, count = self.split.final, self.dataset.num_target_items
        popularity = data.train_target.items.bincount(minlength=count).double()
        generator = seeded_generator(self.config.seed, "random ranks")
        scores: dict[str, Score] = {
            "random": lambda users: torch.rand(len(users), count, generator=generator),
            "popularity": lambda users: popularity.expand(len(users), count),
        }
        found = {}
        for name, score in scores.items():
            places = ranks(score, data.evaluation, self._seen["final"])
            metrics = measure(places, data.evaluation.users, self.task.cutoffs)
            found[name] = Untrained(_TITLES[name], metrics, self.user_totals(places))
        return found

    def user_totals(self, predicted: Tensor) -> dict[str, Tensor]:
        """See `Stage1.user_totals`; of ranks, the metrics of each user."""
        users, found = user_metrics(predicted, self.split.final.evaluation.users, self.task.cutoffs)
        nobody = torch.zeros(self.dataset.num_overlap, dtype=torch.float64)
        return {name: nobody.index_copy(0, users, values) for name, values in found.items()}

    def _joint_job(self, name: str, phase: PhaseName, generator: torch.Generator) -> Job:
        data, (_, shift) = self.data(phase), self._source_size()
        tables = JointTables.of(self.dataset, data)
        model = self.factorization(name, tables.users, tables.items)
        rows, _ = tables.target_rows(data.seen_target.users, data.seen_target.items)
        in_target = Seen(
            replace(data.seen_target, users=rows), tables.users, self.dataset.num_target_items
        )
        in_source = Seen(data.seen_source, tables.users, shift)

        def loss(users: Tensor, items: Tensor, values: Tensor) -> Tensor:
            """Negatives are of the positive's domain."""
            negatives = torch.where(
                items[:, None] < shift,
                in_source.draw_others(users, self.task.negatives, generator),
                in_target.draw_others(users, self.task.negatives, generator) + shift,
            )
            return self._objective(model(users[:, None], torch.cat([items[:, None], negatives], 1)))

        def evaluate() -> Evaluation:
            score = _inner_products(model, shift)
            return self._evaluate(phase, lambda users: score(tables.target_rows(users, users)[0]))

        examples = tables.examples(data.train_source, data)
        return Job(model, loss, examples, self.schedule, evaluate)

    def _frozen(self, phase: PhaseName, model: TransferModel) -> tuple[FrozenInputs, FrozenInputs]:
        """What a transfer model is given of users in evaluation, and of examples in training."""
        data, source, target = self.data(phase), self.source(phase)[0], self.target(phase)[0]
        items = source.items.weight.detach()
        histories, lengths = data.histories
        inputs = self._with_prototypes(
            FrozenInputs(
                histories=histories,
                lengths=lengths,
                source_users=source.user_vectors().detach(),
                source_items=torch.cat([items, torch.zeros_like(items[:1])]),
                target_users=target.user_vectors().detach(),
                target_items=target.item_vectors().detach(),
            ),
            model,
        )
        if data.train_histories is None:
            return inputs, inputs
        histories, lengths = data.train_histories
        users = inputs.source_users[data.train_meta.users]
        return inputs, replace(inputs, histories=histories, lengths=lengths, source_users=users)

    def _ranked(
        self,
        name: str,
        users: int,
        items: int,
        train: Ratings,
        seen: Seen,
        *rest: Any,
        **options: Any,
    ) -> tuple[MatrixFactorization, list[Epoch]]:
        def loss(model: MatrixFactorization, generator: torch.Generator) -> Loss:
            return lambda users, items: self._objective(
                model(users[:, None], self._candidates(seen, users, items, generator))
            )

        return self._model(name, users, items, train.columns()[:2], loss, *rest, **options)

    def _candidates(
        self, seen: Seen, users: Tensor, items: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Positives ``[B]`` and their negatives, ``[B, 1 + N]``."""
        negatives = seen.draw_others(users, self.task.negatives, generator)
        return torch.cat([items[:, None], negatives], 1)

    def _objective(self, scores: Tensor) -> Tensor:
        return OBJECTIVES[self.task.objective](scores)

    def _evaluate(self, phase: PhaseName, score: Score) -> Evaluation:
        return Evaluation({}, ranks(score, self.data(phase).evaluation, self._seen[phase]))

    def _source_size(self) -> tuple[int, int]:
        return self.dataset.num_source_users, self.dataset.num_source_items


@torch.no_grad()
def _inner_products(model: MatrixFactorization, first_item: int = 0) -> Score:
    """Scores of all items from one on, by the model as it is now."""
    users, items = model.user_vectors(), model.item_vectors()[first_item:]
    return lambda rows: users[rows] @ items.T
