import csv
import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress

from mimnet_fast.cdr import readers
from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.readers import RatingTable, read_ratings

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).filter(
    str.strip
)
GOOD = "user_id,item_id,rating\n1,a,4\n2,b,3.5\n"


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows(table: RatingTable) -> list[tuple[Any, ...]]:
    """Without line numbers."""
    return table.ratings.drop("line").rows()


@pytest.fixture(params=[1, 1 << 20], ids=["a line a block", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to cut a file must tell the same."""
    monkeypatch.setattr(readers, "_BLOCK_BYTES", request.param)
    monkeypatch.setattr(readers, "_BLOCK_ROWS", request.param)


@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.csv.gz", "r.tsv.gz", "R.CSV", "a[1].csv"])
def test_text_files(tmp_path: Path, name: str) -> None:
    text = GOOD.replace(",", "\t") if "tsv" in name else GOOD
    table = read_ratings(write(tmp_path / name, text))
    assert table.ratings.rows() == [(2, "1", "a", 4.0), (3, "2", "b", 3.5)]
    assert table.skipped.is_empty()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rating,user_id,item_id\n4,1,a\n", [("1", "a", 4.0)]),
        ("\ufeffuser_id,item_id,rating\r\n1,a,4\r\n", [("1", "a", 4.0)]),
        ('user_id,item_id,rating\n"x,y","say ""hi""",4\n', [("x,y", 'say "hi"', 4.0)]),
        ("user_id,item_id,rating\n007, a,4e0\n1,a, 2 ", [("007", " a", 4.0), ("1", "a", 2.0)]),
        ("user_id,item_id,rating\nnull,NA,4\n", [("null", "NA", 4.0)]),
    ],
    ids=["column order", "byte order mark and CRLF", "quotes", "ids as written", "words are ids"],
)
def test_text_is_taken_literally(
    tmp_path: Path, text: str, expected: list[tuple[str, str, float]]
) -> None:
    ratings = read_ratings(write(tmp_path / "r.csv", text)).ratings
    assert ratings.select("user_id", "item_id", "rating").rows() == expected


def test_parquet_file_gives_the_same_as_text(tmp_path: Path) -> None:
    columns = {"user_id": [1, 2], "item_id": ["a", "b"], "rating": [4, 3]}
    pl.DataFrame(columns).write_parquet(tmp_path / "r.parquet")
    table = read_ratings(tmp_path / "r.parquet")
    assert table.ratings.rows() == [(1, "1", "a", 4.0), (2, "2", "b", 3.0)]


REVIEW = {"reviewerID": "A1", "asin": "B1", "overall": 4.0, "unixReviewTime": 7}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.json.gz", "without_suffix"])
def test_amazon_reviews(tmp_path: Path, name: str) -> None:
    second = {
        **REVIEW,
        "asin": 'B"2',
        "overall": 5,
        "helpful": [0, {"a": 1}],
        "reviewText": "{x,\n",
    }
    text = "".join(json.dumps(review) + "\n" for review in (REVIEW, second))
    table = read_ratings(write(tmp_path / name, text), format="amazon" if "w" in name else "auto")
    assert table.ratings.rows() == [(1, "A1", "B1", 4.0, 7.0), (2, "A1", 'B"2', 5.0, 7.0)]
    assert table.format == "Amazon reviews"


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "the line is empty"),
        ('{"asin": "B1"', "not JSON: Expecting ',' delimiter at column 14:"),
        ("{'asin': 'B1'}", "not JSON: Expecting property name enclosed in double quotes"),
        ('{"a": 1}, {"a": 2}', "not JSON: Extra data"),
        ("[1]", "need a JSON object"),
        ("{}", "reviewerID is missing"),
        (json.dumps({**REVIEW, "asin": None}), "asin is missing"),
        (json.dumps({**REVIEW, "overall": "good"}), "overall 'good' is not a number"),
        (json.dumps({**REVIEW, "overall": [4]}), "need text or numbers in reviewerID, asin"),
        (json.dumps({**REVIEW, "unixReviewTime": None}), "unixReviewTime is missing"),
    ],
)
def test_malformed_amazon_reviews(tmp_path: Path, line: str, reason: str) -> None:
    good = json.dumps(REVIEW)
    path = write(tmp_path / "r.json", "\n".join([good, good, line, good, ""]))
    with pytest.raises(UserError) as caught:
        read_ratings(path)
    assert f"{path}, line 3: {reason}" in str(caught.value)
    table = read_ratings(path, on_error="skip")
    assert table.ratings["line"].to_list() == [1, 2, 4]
    assert table.skipped.select("line", "text").rows() == [(3, line)]


def test_amazon_ratings_of_either_release(tmp_path: Path) -> None:
    expected = [(1, "A123456789012", "B000000001", 4.0, 7.0), (2, "A2", "B000000002", 1.0, 8.0)]
    first = "A123456789012,B000000001,4.0,7\nA2,B000000002,1.0,8\n"
    table = read_ratings(write(tmp_path / "a.csv", first))
    assert (table.format, table.ratings.rows()) == ("Amazon ratings, users first", expected)
    items_first = "B000000001,A123456789012,4.0,7\nB000000002,A2,1.0,8\n"
    table = read_ratings(write(tmp_path / "b.csv", items_first))
    assert table.format == "Amazon ratings, items first"
    names = ("line", "user_id", "item_id", "rating", "timestamp")
    assert table.ratings.select(names).rows() == expected


def test_undecodable_line_at_the_start_of_amazon_ratings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"A\xff,B000000001,4.0,7\nA2,B000000002,1.0,8\n")
    with pytest.raises(UserError, match="line 1: not UTF-8 text"):
        read_ratings(path)
    assert rows(read_ratings(path, on_error="skip")) == [("A2", "B000000002", 1.0, 8.0)]


@settings(deadline=None, max_examples=20)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, st.floats(-1e9, 1e9)), min_size=1, max_size=9),
    separator=st.sampled_from(",\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
    block=st.integers(1, 60),
)
def test_what_python_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, float]],
    separator: str,
    quoting: Any,
    end: str,
    block: int,
) -> None:
    path = tmp_path_factory.mktemp("csv") / ("r.csv" if separator == "," else "r.tsv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end)
        writer.writerows([("user_id", "item_id", "rating"), *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_BLOCK_BYTES", block)
        table = read_ratings(path)
    assert table.ratings.drop("line").rows() == rows
    assert table.ratings["line"].to_list() == list(range(2, len(rows) + 2))


def test_recbole_file(tmp_path: Path) -> None:
    header = "item_id:token\tuser_id:token\trating:float\treview:token_seq\n"
    path = write(tmp_path / "r.inter", header + "a\t1\t4\tvery good\n")
    table = read_ratings(path)
    assert rows(table) == [("1", "a", 4.0)]
    assert table.unused_columns == ("review",)
    for change, message in (
        ("rating:token", "need the column rating:float between tabs, got item_id:token"),
        ("label:float", "need the column rating:float"),
        ("rating:float\ttimestamp:token", "need the column timestamp:float"),
        ("rating:float\tuser_id:token", "a column is named twice"),
    ):
        path = write(tmp_path / "r.inter", header.replace("rating:float", change))
        with pytest.raises(UserError, match=f"line 1: {message}"):
            read_ratings(path)


@pytest.mark.parametrize("format", ["amazon", "recbole"])
def test_format_that_is_not_the_file_s(tmp_path: Path, format: Any) -> None:
    with pytest.raises(UserError, match=r"r\.csv, line 1: "):
        read_ratings(write(tmp_path / "r.csv", GOOD), format=format)
    pl.DataFrame({"user_id": [1]}).write_parquet(tmp_path / "r.parquet")
    with pytest.raises(UserError, match=f"--format {format} is a text format"):
        read_ratings(tmp_path / "r.parquet", format=format)


def test_format_makes_up_for_a_suffix(tmp_path: Path) -> None:
    assert len(rows(read_ratings(write(tmp_path / "r.txt", GOOD), format="csv"))) == 2


@pytest.mark.usefixtures("blocks")
def test_repeated_rows_stay_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD + "1,a,5\n1,a,5\n"
    assert [row[:2] for row in rows(read_ratings(write(tmp_path / "r.csv", text)))] == [
        ("1", "a"),
        ("2", "b"),
        ("1", "a"),
        ("1", "a"),
    ]


def test_progress_ends_at_the_size_of_the_file(tmp_path: Path) -> None:
    path, progress = write(tmp_path / "r.csv.gz", GOOD), Progress(disable=True)
    read_ratings(path, progress=progress)
    assert progress.tasks[0].completed == progress.tasks[0].total == path.stat().st_size


MALFORMED = {
    "1,a": "line 3: 2 columns, need 3",
    "1,a,4,5": "line 3: 4 columns, need 3",
    "": "line 3: the line is empty",
    "1,a,good": "line 3: rating 'good' is not a number",
    "1,a,": "line 3: rating is missing",
    "1,a,\xff": "line 3: not UTF-8 text",
    "1,a,nan": "line 3: rating 'nan' is not finite",
    "1,a,-inf": "line 3: rating '-inf' is not finite",
    ",a,4": "line 3: user_id is missing",
    "1,  ,4": "line 3: item_id is missing",
    '1,"a,4': 'line 3: 2 columns, need 3|line 3: a quotation mark (")',
    '1,a"b,4': 'line 3: a quotation mark (")',
}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("row", "message"), MALFORMED.items(), ids=repr)
@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz"])
def test_malformed_row_stops_or_is_listed(
    tmp_path: Path, name: str, row: str, message: str
) -> None:
    text = f"user_id,item_id,rating\n1,a,4\n{row}\n2,b,3\n"
    path = write(tmp_path / name, text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_ratings(path)
    assert any(f"{path}, {part}" in str(caught.value) for part in message.split("|"))
    assert "--on-error skip" in str(caught.value)

    table = read_ratings(path, on_error="skip")
    assert table.ratings.select("line", "user_id").rows() == [(2, "1"), (4, "2")]
    assert table.skipped.select("line", "text").rows() == [(3, row.replace("\xff", "\\xff"))]


def test_first_malformed_row_is_the_one_that_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", GOOD + "1,a,good\n1,a\n")
    with pytest.raises(UserError, match=r"line 4: rating 'good' is not a number"):
        read_ratings(path)
    assert read_ratings(path, on_error="skip").skipped["line"].to_list() == [4, 5]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rating": [4.0, None]}, "row 2: rating is missing"),
        ({"rating": [4.0, float("nan")]}, "row 2: rating 'NaN' is not finite"),
        ({"user_id": ["1", None]}, "row 2: user_id is missing"),
        ({"user_id": [1.0, 2.0]}, "column user_id is of type Float64, need text or integers"),
        ({"rating": [[1], [2]]}, "column rating is of type List(Int64), need numbers"),
        ({"extra": [1, 2]}, "unknown column 'extra'"),
    ],
)
def test_unusable_parquet_file(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    good = {"user_id": ["1", "2"], "item_id": ["a", "b"], "rating": [4.0, 3.0]}
    path = tmp_path / "r.parquet"
    pl.DataFrame({**good, **columns}).write_parquet(path)
    with pytest.raises(UserError) as caught:
        read_ratings(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", b"", "the file is empty"),
        ("r.csv", b"user_id,item_id,rating\n", "no ratings"),
        ("r.csv", b"user_id,item,rating\n1,a,4\n", "line 1: missing column item_id"),
        ("r.csv", b"user_id,item_id,rating,stars\n", "line 1: unknown column 'stars'"),
        ("r.csv", b"user_id,item_id,rating,rating\n", "line 1: a column is named twice"),
        ("r.csv", b"user_id,item_id,r\xff\n", "line 1: missing column rating"),
        ("r.parquet", b"user_id,item_id,rating\n", "cannot be read"),
        ("r.json", b"x", "line 1: not JSON"),
        ("r.txt", b"{}", "unknown kind of file: name it .parquet or .csv, .tsv"),
    ],
)
def test_unusable_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    for on_error in ("raise", "skip"):
        with pytest.raises(UserError) as caught:
            read_ratings(path, on_error=on_error)  # type: ignore[arg-type]
        assert str(caught.value).startswith(str(path))
        assert message in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_ratings(tmp_path / "r.csv")
    broken = tmp_path / "r.csv.gz"
    for content in (
        gzip.compress(GOOD.encode() * 99)[:-9],
        b"user_id",
        b"\x1f\x8b\x08" + b"x" * 99,
    ):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_ratings(broken)
