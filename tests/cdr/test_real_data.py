"""Epinions, movies to music: counts and errors that are known."""

import os
from pathlib import Path

import pytest
from rich.progress import Progress

from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, prepare
from mimnet_fast.cdr.experiment import run

ROOT = os.environ.get("MIMNET_FAST_REAL_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        ROOT is None, reason="MIMNET_FAST_REAL_DATA does not name a folder of real ratings"
    ),
]


def test_movies_to_music(tmp_path: Path) -> None:
    folder = Path(ROOT or "") / "epinions"
    info = prepare(folder / "movies.csv.gz", folder / "music.csv.gz", tmp_path / "data")
    assert (info["overlap_users"], info["source"]["ratings"], info["target"]["ratings"]) == (
        7226,
        166554,
        85176,
    )
    dataset, quiet = Dataset.load(tmp_path / "data"), Progress(disable=True)
    run(dataset, Config(epochs=1), ["mimnet", "tgt"], tmp_path / "run", quiet)
    names = ["cmf", "emcdr", "mimnet-released"]
    found = run(dataset, Config(), names, tmp_path / "run", quiet)["models"]
    assert found["global_mean"]["honest"]["mae"] == pytest.approx(0.789, abs=0.001)
    assert found["item_mean"]["honest"]["mae"] == pytest.approx(0.741, abs=0.001)
    assert found["mimnet"]["honest"]["mae"] == pytest.approx(1.96, abs=0.15)
    assert found["tgt"]["honest"]["mae"] == pytest.approx(4.4, abs=0.15)
    # What the public codes reach on this data.
    assert found["cmf"]["published"]["mae"] == pytest.approx(3.55, abs=0.15)
    assert found["emcdr"]["published"]["mae"] == pytest.approx(4.03, abs=0.1)
    assert found["mimnet-released"]["published"]["mae"] == pytest.approx(2.29, abs=0.1)
