"""Item metadata, from files to the views of REMIT."""

import gzip
import json
from pathlib import Path

import polars as pl
import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from mimnet_fast.cdr import checkpoints
from mimnet_fast.cdr.cli import app
from mimnet_fast.cdr.config import Config
from mimnet_fast.cdr.dataset import Dataset, prepare
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.experiment import run
from mimnet_fast.cdr.metadata import read_metadata

ROWS = {
    ("a", "category", "Pop"),
    ("a", "category", "Music"),
    ("a", "brand", "X"),
    ("b", "category", "Music"),
    ("c", "brand", "X"),
}
TABLE = "item_id,brand,category\na,X,Pop\na,X,Music\nb,, Music\nc,X,\n"
OF_2014 = [
    "{'asin': 'a', 'categories': [['Music', 'Pop'], ['Music']], 'brand': 'X', 'price': 1.5}",
    "{'asin': 'b', 'categories': [['Music']], 'title': \"It's\"}",
    "{'asin': 'c', 'brand': 'X', 'categories': [[]]}",
]
OF_2018 = [
    {"asin": "a", "category": ["Music", "Pop"], "brand": "X"},
    {"asin": "b", "category": ["Music"], "brand": ""},
    {"asin": "c", "category": [], "brand": "X", "also_buy": ["a"]},
]
FILES = {
    "m.csv": TABLE,
    "m.tsv": TABLE.replace(",", "\t"),
    "meta.json": "\n".join(OF_2014) + "\n",
    "meta.jsonl": "\n".join(map(json.dumps, OF_2018)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_formats(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / (f"{name}.gz" if zipped else name)
    text = FILES[name].encode()
    path.write_bytes(gzip.compress(text) if zipped else text)
    rows = read_metadata(path).rows()
    assert len(rows) == len(ROWS)
    assert set(rows) == ROWS


def test_parquet(tmp_path: Path) -> None:
    table = pl.DataFrame({"item_id": [7, 8, 8], "category": ["p", None, "q"]})
    table.write_parquet(tmp_path / "m.parquet")
    rows = read_metadata(tmp_path / "m.parquet").rows()
    assert rows == [("7", "category", "p"), ("8", "category", "q")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.csv", None, "none.csv: no such file"),
        ("m.xml", "x", "m.xml: unknown kind of file: name it one of .parquet, .csv"),
        ("m.csv", "item_id,label\na,b\n", "m.csv, line 1: need the column item_id and category"),
        ("m.csv", "category\na\n", "got category$"),
        ("m.csv", "item_id,brand\na,\n", "m.csv: no category and no brand of any item"),
        ("m.csv", "", "m.csv: cannot be read"),
        ("m.json", "{'asin': 'a'}\n{", "m.json, line 2: neither JSON nor a literal of Python"),
        ("m.json", "[1]", "m.json, line 1: need an object, got list"),
        ("m.json", '{"brand": "X"}', "m.json, line 1: asin is missing"),
        ("m.csv.gz", "no gzip", "m.csv.gz: cannot be read"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_metadata(tmp_path / name)


RATINGS = "user_id,item_id,rating\n1,b,4\n1,a,5\n2,a,4\n3,d,5\n"


def prepared_with(tmp_path: Path, metadata: str) -> Path:
    for name, text in (("s.csv", RATINGS), ("t.csv", RATINGS), ("m.csv", metadata)):
        (tmp_path / name).write_text(text)
    files = (tmp_path / name for name in ("s.csv", "t.csv", "out"))
    prepare(*files, source_metadata=tmp_path / "m.csv")
    return tmp_path / "out"


def test_metadata_is_part_of_the_dataset(tmp_path: Path) -> None:
    dataset = Dataset.load(prepared_with(tmp_path, TABLE))
    categories, brands = dataset.source_groups
    assert (categories.kind, brands.kind) == ("category", "brand")
    assert categories.items.tolist() == [0, 0, 1]  # a, a, b; c has no rating
    assert categories.groups.tolist() == [0, 1, 0]  # Music, Pop, Music
    assert (brands.items.tolist(), brands.groups.tolist()) == ([0], [0])
    found = dataset.info["source"]["metadata"]
    assert (found["items"], found["items_without_ratings"]) == (2, 1)
    assert found["values"] == {"category": 2, "brand": 1}

    (tmp_path / "other").mkdir()
    other = Dataset.load(prepared_with(tmp_path / "other", TABLE.replace("Pop", "Rock")))
    assert other.fingerprint != dataset.fingerprint


def test_one_kind_is_enough(tmp_path: Path) -> None:
    dataset = Dataset.load(prepared_with(tmp_path, "item_id,brand\na,X\nb,Y\n"))
    assert [groups.kind for groups in dataset.source_groups] == ["brand"]


def test_metadata_of_other_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of its items \(such as 'z'\) has ratings"):
        prepared_with(tmp_path, "item_id,brand\nz,X\n")
    assert not (tmp_path / "out").exists()


def test_remit_has_a_view_of_each_kind(prepared: Path, tmp_path: Path) -> None:
    items = pl.read_parquet(prepared / "source_items.parquet")["item_id"]
    table = pl.DataFrame({"item_id": items, "category": [f"c{i % 3}" for i in range(len(items))]})
    table.write_csv(tmp_path / "m.csv")
    source, target = (prepared.parent / f"{domain}.csv" for domain in ("source", "target"))
    result = CliRunner().invoke(
        app,
        [
            *("prepare", "--source", str(source), "--target", str(target)),
            *("--source-metadata", str(tmp_path / "m.csv"), "--out", str(tmp_path / "data")),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "metadata m.csv: of 40 source items, 3 values of category" in result.stdout

    config = Config(beta=0.25, base_epochs=1, epochs=1, backend="reference")
    views = {}
    for folder in (prepared, tmp_path / "data"):
        out = tmp_path / f"run-{folder.name}"
        run(Dataset.load(folder), config, ["remit"], out, Progress(disable=True))
        weights = checkpoints.load(out / "remit.safetensors")[0]
        views[folder.name] = weights["policy.2.bias"].numel()
        expected = "category" if folder.name == "data" else "none"
        assert f"metadata of the source items: {expected}" in (out / "results.md").read_text()
    assert views == {prepared.name: 2, "data": 3}
