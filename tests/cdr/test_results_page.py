import json
from pathlib import Path
from typing import Any

import pytest

from bench import recommender
from bench.recommender_page import BASE, RANKS, closest, page, scores


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


def ranked(name: str, *values: float) -> dict[str, Any]:
    return row(name) | {"honest": {metric: [*values] for metric in RANKS}}


@pytest.fixture
def tasks() -> dict[str, Any]:
    trivial = row("item_user_bias", 0.8, 0.9, trivial=True)
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
        "studies": {
            f"parts-{BASE}": {
                "base": BASE,
                "beta": 0.2,
                "seeds": [2020, 2021],
                "reference": "mimnet",
                "rows": [row("mimnet", 0.7, 0.81), row("no-fine", 0.8, 0.9)],
            }
        },
        "rankings": {
            "cold": {
                "beta": 0.2,
                "seeds": [2020, 2021],
                "rows": [ranked("mimnet", 0.3, 0.4), ranked("popularity", 0.1, 0.3)],
            }
        },
        "limits": {
            "rows": [
                row("trees", 0.6, 0.7),
                row("trees-alone", 0.8, 0.9),
                row("mimnet-rounded", 0.7, 0.9),
            ]
        },
    }
    return {"ciao-books-music": task}


def test_mimnet_is_compared_with_the_best_of_the_others(tasks: dict[str, Any]) -> None:
    found = scores(tasks["ciao-books-music"], 0.2)
    assert [score.label for score in found if score.trivial] == ["ITEM_USER_BIAS"]
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
    assert text.count("| ITEM_USER_BIAS |") == 1
    assert (
        "- **against the best other model** by MAE better in 0, level in 1, worse in 0; by RMSE"
    ) in text
    assert "in no cell is one more than 0.0850 in MAE or 0.1700 in RMSE away" in text


def test_the_page_says_what_studies_found(tasks: dict[str, Any]) -> None:
    text = page(tasks)
    assert "## MIMNet without one of its parts, on biased-mf" in text
    assert "Beta 0.2; seeds: 2 on ciao-books-music." in text
    assert "| NO-FINE | +0.0950 ± 0.0071 | +0.1900 ± 0.0141 |" in text
    assert "- By MAE: worse: NO-FINE." in text


def test_the_page_says_how_much_there_is_to_win(tasks: dict[str, Any]) -> None:
    text = page(tasks)
    assert "| ciao-books-music | 0.2 | -0.4000 ± 0.0000 |" in text
    assert "- RMSE: trees less biases: better in 1, level in 0, worse in 0 of 1 cells." in text
    del tasks["ciao-books-music"]["limits"]
    assert "trees" not in page(tasks)


def test_higher_is_better_in_rankings(tasks: dict[str, Any]) -> None:
    text = page(tasks)
    assert "## Ranking, cold: ciao-books-music, beta 0.2" in text
    assert "by HR@10 better (+0.1500 ± 0.0707 against POPULARITY)" in text
    assert text.index("| MIMNET | 0.3500") < text.index("| POPULARITY | 0.2000")


def test_a_file_has_a_line_for_each_row(tmp_path: Path, tasks: dict[str, Any]) -> None:
    path, task = tmp_path / "task.json", tasks["ciao-books-music"]
    recommender._write(path, task)
    assert json.loads(path.read_text()) == task
    assert sum(line.startswith('  {"beta"') for line in path.read_text().splitlines()) == 15


def test_the_document_is_what_the_program_writes() -> None:
    files = sorted(recommender.RESULTS.glob("*.json"))
    tasks = {path.stem: json.loads(path.read_text()) for path in files}
    assert tasks
    assert recommender.PAGE.read_text() == page(tasks)
