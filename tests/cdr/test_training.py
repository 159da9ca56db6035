import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from mimnet_fast import backends
from mimnet_fast.cdr import checkpoints, experiment, training
from mimnet_fast.cdr.config import Base, Config
from mimnet_fast.cdr.dataset import Dataset, Ratings
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.evaluation import Evaluation
from mimnet_fast.cdr.experiment import run
from mimnet_fast.cdr.losses import SquaredError
from mimnet_fast.cdr.models import MODELS, TRIVIAL, MatrixFactorization, MIMNet
from mimnet_fast.cdr.training import (
    Schedule,
    adam,
    fit,
    seeded_generator,
    seeded_module,
    stored_predictions,
    training_step,
)

from .killing import KilledError, KillingProgress, check_killed_at_random

QUIET = Progress(disable=True)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("finished")
    config = Config(
        beta=0.25,
        seed=2,
        learning_rate=0.2,
        base_epochs=2,
        base_batch_size=64,
        epochs=5,
        batch_size=64,
        prototypes=6,
    )
    run(dataset, config, MODELS, folder, QUIET)
    return folder, config


@pytest.mark.parametrize("updates", [0, 3, 11, 13, 20, 30, 55, 88])
def test_a_killed_run_goes_on_to_the_same_bits(
    dataset: Dataset, finished: tuple[Path, Config], tmp_path: Path, updates: int
) -> None:
    expected, config = finished
    with pytest.raises(KilledError):
        run(dataset, config, MODELS, tmp_path, KillingProgress(updates))
    run(dataset, config, MODELS, tmp_path, QUIET)
    assert files(tmp_path) == files(expected)


def _small_run(prepared: Path, config: Config, out: Path) -> None:
    run(Dataset.load(prepared), config, ("mimnet",), out, QUIET)


@pytest.mark.slow
def test_a_run_killed_at_random_goes_on_to_the_same_bits(
    prepared: Path, finished: tuple[Path, Config], tmp_path: Path
) -> None:
    # Epochs enough to take longer than what surrounds them.
    config = replace(finished[1], base_epochs=20, epochs=40)
    check_killed_at_random(partial(_small_run, prepared, config), files, tmp_path)


def test_models_added_later_share_the_base_models(
    dataset: Dataset,
    finished: tuple[Path, Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, config = finished
    trained = []

    def counting_fit(*args: Any, **kwargs: Any) -> Any:
        trained.append(kwargs["identity"]["name"])
        return fit(*args, **kwargs)

    monkeypatch.setattr(experiment, "fit", counting_fit)
    for name in MODELS:
        run(dataset, config, [name], tmp_path, QUIET)
    assert files(tmp_path) == files(expected)
    before = files(tmp_path)
    again = run(dataset, config, ["tgt"], tmp_path, QUIET)
    assert list(again["models"]) == [*TRIVIAL, *MODELS]
    assert files(tmp_path) == before


def test_results_say_what_was_selected(finished: tuple[Path, Config]) -> None:
    folder, _ = finished
    found = json.loads((folder / "results.json").read_text())
    for name in MODELS:
        model = found["models"][name]
        for metric in ("mae", "rmse"):
            final = [epoch[metric] for epoch in model["curves"]["final"]]
            selection = [epoch[metric] for epoch in model["curves"]["selection"]]
            assert model["published"][metric] == min(final)
            chosen = selection.index(min(selection))
            assert model["honest"][metric] == final[chosen]
            assert model["honest"][f"{metric}_epoch"] == chosen + 1
        line = next(
            row for row in (folder / "results.md").read_text().splitlines() if model["title"] in row
        )
        assert f"{model['honest']['mae']:.4f} @{model['honest']['mae_epoch']}" in line
    assert set(found["models"]) == {*TRIVIAL, *MODELS}


def test_kept_weights_are_those_of_the_honest_epoch(
    dataset: Dataset, finished: tuple[Path, Config]
) -> None:
    folder, config = finished
    stage1 = experiment.BaseModels(dataset, config, folder, QUIET)
    honest = json.loads((folder / "results.json").read_text())["models"]["mimnet"]["honest"]
    assert honest["mae_epoch"] != config.epochs, "the last epoch's weights would pass as well"
    build = MODELS["mimnet"].build
    assert build is not None
    model = build(config)
    model.load_state_dict(checkpoints.load(folder / "mimnet.safetensors")[0])
    inputs = stage1.frozen("final", MIMNet)
    found = experiment.evaluate(partial(model.predict, inputs), stage1.split.final.evaluation)
    assert found.errors["mae"] == honest["mae"]
    stored = stored_predictions(folder / "final" / "mimnet.safetensors")
    assert stored.shape == (config.epochs, len(stage1.split.final.evaluation))
    assert stored[honest["mae_epoch"] - 1].equal(found.predicted)


@pytest.mark.parametrize("updates", [None, 9, 11])
def test_averaged_parameters_are_kept(
    dataset: Dataset, tmp_path: Path, updates: int | None
) -> None:
    config = Config(beta=0.25, base="biased-mf", base_epochs=1, epochs=3, prototypes=4)
    if updates is not None:
        with pytest.raises(KilledError):
            run(dataset, config, ["mimnet"], tmp_path, KillingProgress(updates))
    found = run(dataset, config, ["mimnet"], tmp_path, QUIET)
    stage1 = experiment.BaseModels(dataset, config, tmp_path, QUIET)
    build = MODELS["mimnet"].build
    assert build is not None
    model = seeded_module(partial(build, config), config.seed, "mimnet")
    inputs = stage1.frozen("final", MIMNet)
    generator = seeded_generator(config.seed, "mimnet batches")
    data: Any = stage1.split.final
    optimizer = adam(model, config.learning_rate, experiment.BIASED_TRANSFER_DECAY)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = 0
    for _ in range(found["models"]["mimnet"]["honest"]["mae_epoch"]):
        order = torch.randperm(len(data.train_meta), generator=generator)
        for batch in order.split(config.batch_size):
            columns = tuple(column[batch] for column in data.train_meta.columns())
            training_step(optimizer, lambda *c: model.loss(inputs, c, generator), *columns)
            share = min(experiment.BIASED_AVERAGING, step / (9 + step))
            for name, tensor in model.state_dict().items():
                average[name] = torch.lerp(tensor, average[name], share)
            step += 1
    kept = checkpoints.load(tmp_path / "mimnet.safetensors")[0]
    torch.testing.assert_close(kept, average)


def test_errors_of_users_who_rate_a_lot_count_less(dataset: Dataset, tmp_path: Path) -> None:
    config = Config(beta=0.25, base="biased-mf", base_epochs=1, prototypes=4)
    stage1 = experiment.BaseModels(dataset, config, tmp_path, QUIET)
    inputs = stage1.frozen("final", MIMNet)
    users, items, values = stage1.split.final.train_meta.columns()
    weights = inputs.user_weights
    assert weights is not None
    counts = users.bincount(minlength=len(weights))
    assert weights[counts.argmax()] < weights[counts.argmin()]
    torch.testing.assert_close(
        weights * (100 + counts), (weights * (100 + counts)).mean().expand_as(weights)
    )
    build = MODELS["mimnet"].build
    assert build is not None
    model = build(config)
    predicted = model(inputs, users, items, seeded_generator(1, "logits"))
    loss = model.loss(inputs, (users, items, values), seeded_generator(1, "logits"))
    expected = (weights[users] * (predicted - values).square()).sum() / weights[users].sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.5}, r"source\.safetensors was trained with beta = 0.25 \(now 0.5\)"),
        ({"seed": 8}, r"seed = 2 \(now 8\)"),
        ({"interests": 2}, r"mimnet\.safetensors was trained with interests = 7 \(now 2\)"),
        ({"epochs": 9}, r"epochs = 5 \(now 9\)"),
    ],
)
def test_other_settings_are_refused(
    dataset: Dataset, finished: tuple[Path, Config], change: dict[str, Any], message: str
) -> None:
    folder, config = finished
    before = files(folder)
    with pytest.raises(UserError, match=message):
        run(dataset, Config(**{**vars(config), **change}), ["mimnet"], folder, QUIET)
    assert files(folder) == before


def small_fit(folder: Path, *, learning_rate: float = 0.01) -> None:
    model = seeded_module(lambda: MatrixFactorization(4, 5, 3), 1, "x")
    ratings = Ratings(torch.arange(40) % 4, torch.arange(40) % 5, torch.arange(40) % 3 + 1.0)
    fit(
        model,
        SquaredError(model),
        ratings.columns(),
        Schedule(2, 8, learning_rate),
        generator=seeded_generator(1, "x"),
        evaluate=lambda: Evaluation({}, torch.zeros(3)),
        checkpoint=folder / "x.safetensors",
        identity={"name": "x"},
        progress=QUIET,
    )


def test_loss_that_is_not_finite_stops_the_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x: the loss became (inf|nan) in batch \d of epoch 1"):
        small_fit(tmp_path, learning_rate=1e30)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" * 99]
)
def test_damaged_checkpoint_is_refused(tmp_path: Path, damage: Any) -> None:
    small_fit(tmp_path)
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"x\.safetensors: no checkpoint of mimnet_fast, or damaged"
    ):
        small_fit(tmp_path)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7), "c": torch.zeros(0)}
    checkpoints.save(tmp_path / "c.safetensors", tensors, {"epochs": [1, 2]})
    loaded, record = checkpoints.load(tmp_path / "c.safetensors")
    assert record == {"epochs": [1, 2]}
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_random_streams_depend_on_seed_and_name() -> None:
    def draw(seed: int, stream: str) -> float:
        return torch.rand((), generator=seeded_generator(seed, stream)).item()

    assert draw(1, "a") == draw(1, "a")
    assert len({draw(1, "a"), draw(1, "b"), draw(2, "a"), draw(0, "")}) == 4
    state = torch.get_rng_state()
    seeded_module(lambda: torch.nn.Linear(2, 2), 1, "a")
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("base", ["mf", "biased-mf"])
def test_kernels_train_in_few_calls_as_autograd_does_step_by_step(
    dataset: Dataset,
    finished: tuple[Path, Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: Base,
) -> None:
    config = replace(finished[1], base=base, learning_rate=0.01, batch_size=48)
    ours = ["mimnet"] if base == "mf" else ["mimnet", "no-averaging"]
    with backends.watch() as served:
        run(dataset, config, ["cmf", *ours], tmp_path / "fused", QUIET)
    counts = Counter(call.op for call in served)
    assert counts["mimnet_adam_"] == 2 * config.epochs * len(ours)
    factorizations = 5 * config.base_epochs if base == "mf" else 0  # the source, twice two models
    assert counts["matrix_factorization_adam_"] == factorizations
    monkeypatch.setattr(training, "fused_steps", lambda *_: None)
    run(dataset, config, ["cmf", *ours], tmp_path / "steps", QUIET)
    for name in ("target", "cmf", *ours):
        fused, steps = (
            checkpoints.load(tmp_path / kind / "final" / f"{name}.safetensors")[0]
            for kind in ("fused", "steps")
        )
        assert fused.keys() == steps.keys()
        assert torch.equal(fused.pop("generator"), steps.pop("generator"))
        for key, value in fused.items():
            torch.testing.assert_close(value, steps[key], rtol=1e-3, atol=1e-4, msg=key)
