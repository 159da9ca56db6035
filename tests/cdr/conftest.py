from pathlib import Path

import pytest

from mimnet_fast.cdr.dataset import Dataset, prepare
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
