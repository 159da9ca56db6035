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
    found = run(
        Dataset.load(tmp_path / "data"),
        Config(epochs=1, base_epochs=10),
        ["mimnet", "tgt"],
        tmp_path / "run",
        Progress(disable=True),
    )["models"]
    assert found["global_mean"]["honest"]["mae"] == pytest.approx(0.789, abs=0.001)
    assert found["item_mean"]["honest"]["mae"] == pytest.approx(0.741, abs=0.001)
    assert found["mimnet"]["honest"]["mae"] == pytest.approx(1.96, abs=0.15)
    assert found["tgt"]["honest"]["mae"] == pytest.approx(4.4, abs=0.15)
