"""The page of a user says what the model computed, and opens in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from mimnet_fast.cdr import inspection
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import run
from mimnet_fast.cdr.packing import pack
from mimnet_fast.cdr.serving import Recommender

from .test_cli import invoke

K = 3
TABLES = ("coupling", "capsule_cosine", "bridge_cosine", "fused", "fine", "coarse")


@pytest.fixture(scope="module")
def trained(dataset: Dataset, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    config = Config(base="biased-mf", beta=0.25, base_epochs=3, epochs=1, prototypes=6, interests=K)
    run(dataset, config, ["mimnet"], folder, Progress(disable=True))
    pack(prepared, folder)
    return folder


@pytest.fixture(scope="module")
def found(trained: Path) -> dict[str, Any]:
    return inspection.inspect(trained, "u20")


def test_the_best_items_and_their_scores(trained: Path, found: dict[str, Any]) -> None:
    (best,) = Recommender.load(trained).recommend(["u20"], top_k=8, exclude_seen=False)
    assert found["items"] == [each.item for each in best]
    assert found["scores"] == pytest.approx([each.score for each in best], rel=1e-4)
    named = inspection.inspect(trained, "u20", found["items"][2:4])
    assert named["items"] == found["items"][2:4]
    for name in ("scores", "gate"):
        assert named[name] == pytest.approx(found[name][2:4], rel=1e-4)


def test_shares_add_up(prepared: Path, found: dict[str, Any]) -> None:
    assert len(found["history"]) == len(found["coupling"]) > 1
    for name in ("coupling", "fine", "coarse", "fused"):
        for row in found[name]:
            assert len(row) == K
            assert sum(row) == pytest.approx(1, abs=1e-5)
    for gate, fine, coarse, fused in zip(
        *(found[name] for name in ("gate", "fine", "coarse", "fused")), strict=True
    ):
        mixed = [(1 - gate) * a + gate * b for a, b in zip(fine, coarse, strict=True)]
        assert fused == pytest.approx(mixed, abs=1e-6)
    source = (prepared.parent / "source.csv").read_text().splitlines()
    liked = [row.split(",")[1] for row in source if re.fullmatch(r"u20,s\d+,[45]", row)]
    assert found["history"] == liked[-20:]


class Tables(HTMLParser):
    """Titles of all shaded cells, by table, and whatever would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[float]] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [name for name in ("src", "href", "action", "data") if name in values]
        if tag == "table":
            self.tables.append([])
        if tag == "td" and "title" in values:
            self.tables[-1].append(float(values["title"] or ""))


def test_the_page_shows_every_number(found: dict[str, Any]) -> None:
    page, parser = inspection.page(found), Tables()
    parser.feed(page)
    assert not parser.fetched
    assert "url(" not in page
    assert "<script" not in page
    for name, shown in zip(TABLES, parser.tables, strict=False):
        flat = [value for row in found[name] for value in row]
        assert shown == pytest.approx(flat, abs=1e-4), name
    assert parser.tables[-1] == pytest.approx(found["gate"], abs=1e-4)
    assert len(parser.tables) == page.count("<p>How to read it")
    for name in (*found["items"], *found["history"]):
        assert f'<th scope="row">{name}</th>' in page


def test_names_are_text(found: dict[str, Any]) -> None:
    evil = "<script>alert('$user')</script>"
    named = {**found, "user": evil, "source": evil, "items": [evil] * len(found["items"])}
    page = inspection.page(named)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;$user&#x27;)") >= 2 + 4 * len(found["items"])


def test_a_user_who_liked_nothing(found: dict[str, Any]) -> None:
    page = inspection.page({**found, "history": [], "coupling": []})
    assert "This user liked nothing there" in page
    assert "mean cosine" not in page


def test_a_collapse_is_told(found: dict[str, Any]) -> None:
    page = inspection.page({**found, "capsule_cosine": [[1.0, 0.95, 0.97]] * 3})
    assert "they have collapsed into one" in page
    page = inspection.page({**found, "capsule_cosine": [[1.0, -0.5, 0.1]] * 3})
    assert "they would count as one" in page


def test_the_command(trained: Path, found: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "pages" / "u20.html"
    result = invoke("inspect", trained, "--user", "u20", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == found
    assert out.read_text() == inspection.page(found)
    result = invoke("inspect", trained, "--user", "u20", "--items", "t1", "t2", "--out", out)
    assert result.exit_code == 0, result.output
    assert '<th scope="row">t2</th>' in out.read_text()
    for wrong, message in (
        (["--user", "nobody"], "nobody"),
        (["--user", "u20", "--items", "s1"], "s1"),
    ):
        result = invoke("inspect", trained, *wrong, "--out", out)
        assert result.exit_code == 2
        assert f"got '{message}'" in result.stderr
    with pytest.raises(UserError, match="train --model mimnet writes it"):
        inspection.inspect(tmp_path, "u20")


def test_it_opens_in_a_browser(found: dict[str, Any], tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine")
    page = tmp_path / "page.html"
    page.write_text(inspection.page(found))
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'user'}",
    )
    dumped = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    parser = Tables()
    parser.feed(dumped)
    assert [len(table) for table in parser.tables] == [
        *(sum(map(len, found[name])) for name in TABLES),
        len(found["gate"]),
    ]
    assert "<h1>Interests of user u20</h1>" in dumped
