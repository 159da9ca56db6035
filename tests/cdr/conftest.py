from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, prepare
from mimnet_fast.cdr.experiment import BaseModels, run
from mimnet_fast.cdr.models import FrozenInputs
from mimnet_fast.cdr.packing import pack
from mimnet_fast.cdr.serving import Recommender
from mimnet_fast.cdr.synthetic import Synthetic

SIZES = Synthetic(users=120, items=40, topics=4, interests=2, ratings_per_user=12)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small prepared dataset; never write to it."""
    folder = tmp_path_factory.mktemp("synthetic")
    SIZES.generate(folder, seed=3)
    prepare(folder / "source.csv", folder / "target.csv", folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="session")
def dataset(prepared: Path) -> Dataset:
    return Dataset.load(prepared)


@pytest.fixture
def inputs() -> FrozenInputs:
    """Users 0 to 8; user 0 has an empty history, user 8 a full one."""
    draw = torch.Generator().manual_seed(5)
    lengths = torch.tensor([0, 1, 2, 3, 5, 8, 13, 19, 20])
    histories = torch.randint(30, (9, 20), generator=draw)
    histories[torch.arange(20) >= lengths[:, None]] = 30
    tables = torch.randn(4, 31, 10, generator=draw)
    tables[0, 30] = 0
    prototypes = torch.nn.functional.normalize(torch.randn(31, 10, generator=draw), dim=-1)
    return FrozenInputs(
        histories,
        lengths,
        source_users=tables[1],
        source_items=tables[0],
        target_users=tables[3],
        target_items=tables[2],
        item_prototypes=prototypes,
    )


@pytest.fixture(scope="session", params=["mf", "biased-mf"])
def trained(
    request: pytest.FixtureRequest,
    prepared: Path,
    dataset: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, BaseModels]:
    """A packed run and its base models."""
    folder, quiet = tmp_path_factory.mktemp("trained"), Progress(disable=True)
    config = Config(
        base=request.param, beta=0.25, base_epochs=20, epochs=3, prototypes=6, learning_rate=0.05
    )
    run(dataset, config, ["mimnet"], folder, quiet)
    pack(prepared, folder)
    return folder, BaseModels(dataset, config, folder, quiet)


@pytest.fixture
def recommender(trained: tuple[Path, BaseModels]) -> Recommender:
    return Recommender.load(trained[0])
