import json
from typing import Any

import pytest

from bench import recommender
from bench.recommender import BASE, closest, page, scores


def row(name: str, *mae: float, trivial: bool = False) -> dict[str, Any]:
    errors = {"mae": [*mae], "rmse": [2 * each for each in mae]}
    return {
        "beta": 0.2,
        "name": name,
        "title": name.upper(),
        "trivial": trivial,
        "seconds": None if trivial else 1.5,
        "honest": errors,
        "published": errors,
    }


@pytest.fixture
def tasks() -> dict[str, Any]:
    trivial = row("item_mean", 0.8, 0.9, trivial=True)
    task = {
        "dataset": {"overlap_users": 1234, "fingerprint": "0123456789abcdef0123"},
        "config": {"base": BASE, "interests": 7},
        "seeds": [2020, 2021],
        "versions": {"torch": "2"},
        "machine": "Linux",
        "bases": {
            "mf": [
                trivial,
                row("mimnet", 1.5, 1.6),
                row("mimnet-released", 1.6, 1.8),
                row("cmf", 0.69, 0.83),
            ],
            BASE: [
                trivial,
                row("mimnet", 0.7, 0.81),
                row("mimnet-released", 0.9, 0.9),
                row("cmf", 0.71, 0.82),
            ],
        },
    }
    return {"ciao-books-music": task}


def test_mimnet_is_compared_with_the_best_of_the_others(tasks: dict[str, Any]) -> None:
    found = scores(tasks["ciao-books-music"], 0.2)
    assert [score.label for score in found if score.trivial] == ["ITEM_MEAN"]
    trivial = closest(found, "rmse", trivial=True)
    assert trivial.mean == pytest.approx(-0.19)
    assert trivial.std == pytest.approx(0.01 * 2**0.5)
    assert trivial.verdict == "better"
    model = closest(found, "mae", trivial=False)
    assert (model.other.name, model.other.base) == ("cmf", "mf")
    assert model.mean == pytest.approx(-0.005)
    assert model.verdict == "level"


def test_the_page_says_where_mimnet_wins_and_where_not(tasks: dict[str, Any]) -> None:
    text = page(tasks)
    assert (
        "- By MAE, MIMNet is better than the best predictor without training in 1 of 1 cells."
    ) in text
    assert (
        "- By RMSE, MIMNet is better than the best other model in 0 of 1 cells; level in 1 "
        "(ciao-books-music 0.2)."
    ) in text
    assert "| -0.0050 ± 0.0212 CMF (mf), **level** |" in text
    assert "| 1.7000 ± 0.1414 | -0.1500 ± 0.0707 |" in text, "as released, and MIMNet less that"
    assert text.count("| ITEM_MEAN |") == 1


def test_the_document_is_what_the_program_writes() -> None:
    files = sorted(recommender.RESULTS.glob("*.json"))
    tasks = {path.stem: json.loads(path.read_text()) for path in files}
    assert tasks
    assert recommender.PAGE.read_text() == page(tasks)
