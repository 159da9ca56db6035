from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from bench import limits
from mimnet_fast.cdr.biases import fit_split
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.evaluation import errors
from mimnet_fast.cdr.experiment import BaseModels, run
from mimnet_fast.cdr.models import TRIVIAL
from mimnet_fast.cdr.protocol import split
from mimnet_fast.cdr.training import stored_predictions

BETA, SEED = 0.25, 7
QUIET = Progress(disable=True)
CONFIG = Config(beta=BETA, seed=SEED, base="biased-mf", base_epochs=1, epochs=2, prototypes=5)


@pytest.fixture(scope="module")
def grid(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    run(dataset, CONFIG, ["mimnet"], folder / f"beta-{BETA}" / f"seed-{SEED}", QUIET)
    return folder


def test_trees_find_what_they_are_told(
    dataset: Dataset, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = split(dataset, BETA, SEED)
    expected = TRIVIAL["item_user_bias"][1](data, fit_split(dataset, data))
    biases = errors(expected, data.final.evaluation.values)._asdict()

    def told(answer: float) -> dict[str, dict[str, list[float]]]:
        monkeypatch.setattr(
            limits,
            "_inputs",
            lambda stage1, phase, part: (
                answer * getattr(getattr(stage1.split, phase), part).values[:, None].numpy()
            ),
        )
        rows = limits.measure(dataset, [BETA], [SEED], grid)
        return {row["name"]: row["honest"] for row in rows}

    knowing, ignorant = told(1.0), told(0.0)
    for metric, error in biases.items():
        assert knowing["trees"][metric][0] < 0.3 * error
        assert ignorant["trees"][metric][0] == pytest.approx(error, rel=0.02)


def test_mimnet_is_moved_by_what_it_leaves_of_validation_ratings(
    dataset: Dataset, grid: Path
) -> None:
    folder = grid / f"beta-{BETA}" / f"seed-{SEED}"
    stage1 = BaseModels(dataset, CONFIG, folder, QUIET)
    found, mae = {}, {}
    for phase in ("selection", "final"):
        ratings = getattr(stage1.raw, phase).evaluation.values
        expected = getattr(stage1.biases, phase).expected(getattr(stage1.raw, phase).evaluation)
        found[phase] = expected + stored_predictions(folder / phase / "mimnet.safetensors"), ratings
    for epoch in range(CONFIG.epochs):
        left = found["selection"][1] - found["selection"][0][epoch]
        moved = {
            phase: (predicted[epoch] + left.median()).round().clamp(1, 5)
            for phase, (predicted, _) in found.items()
        }
        mae[errors(moved["selection"], found["selection"][1]).mae] = errors(
            moved["final"], found["final"][1]
        ).mae
    assert limits._rounded(stage1, folder) == pytest.approx(mae[min(mae)])


def test_trees_are_told_few_values(dataset: Dataset, grid: Path) -> None:
    stage1 = BaseModels(dataset, CONFIG, grid / f"beta-{BETA}" / f"seed-{SEED}", QUIET)
    inputs = torch.from_numpy(limits._inputs(stage1, "final", "train_meta"))
    assert len(inputs) == len(stage1.raw.final.train_meta)
    assert max(len(column.unique()) for column in inputs.T) <= 255, "bins of a tree"
    expected = stage1.raw.final.train_meta.values - stage1.split.final.train_meta.values
    torch.testing.assert_close(inputs[:, 0], expected, atol=limits._STEP / 2 + 1e-6, rtol=0)
