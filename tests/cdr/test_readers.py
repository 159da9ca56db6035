import gzip
from pathlib import Path

import polars as pl
import pytest

from mimnet_fast.cdr.errors import UserError
from mimnet_fast.cdr.readers import read_ratings

GOOD = "user_id,item_id,rating\n1,a,4\n2,b,3.5\n"


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.csv.gz", "r.tsv.gz", "R.CSV", "a[1].csv"])
def test_text_files(tmp_path: Path, name: str) -> None:
    text = GOOD.replace(",", "\t") if "tsv" in name else GOOD
    table = read_ratings(write(tmp_path / name, text))
    assert table.ratings.rows() == [("1", "a", 4.0), ("2", "b", 3.5)]
    assert table.skipped.is_empty()


@pytest.mark.parametrize(
    ("text", "rows"),
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
    tmp_path: Path, text: str, rows: list[tuple[str, str, float]]
) -> None:
    ratings = read_ratings(write(tmp_path / "r.csv", text)).ratings
    assert ratings.select("user_id", "item_id", "rating").rows() == rows


def test_parquet_file_gives_the_same_as_text(tmp_path: Path) -> None:
    columns = {"user_id": [1, 2], "item_id": ["a", "b"], "rating": [4, 3]}
    pl.DataFrame(columns).write_parquet(tmp_path / "r.parquet")
    assert read_ratings(tmp_path / "r.parquet").ratings.rows() == [("1", "a", 4.0), ("2", "b", 3.0)]


def test_last_of_several_ratings_counts_at_its_own_place(tmp_path: Path) -> None:
    text = "user_id,item_id,rating,timestamp\n1,a,1,5\n1,b,2,6\n1,a,3,4\n1,a,5,1\n"
    table = read_ratings(write(tmp_path / "r.csv", text))
    assert table.ratings.rows() == [("1", "b", 2.0, 6.0), ("1", "a", 5.0, 1.0)]
    assert table.duplicates == 2


MALFORMED = {
    "1,a": "line 3: 2 columns, need 3",
    "1,a,4,5": "line 3: 4 columns, need 3",
    "": "line 3: the line is empty",
    "1,a,good": "line 3: rating 'good' is not a number",
    "1,a,": "line 3: rating '' is not a number",
    "1,a,nan": "line 3: rating 'nan' is not finite",
    "1,a,-inf": "line 3: rating '-inf' is not finite",
    ",a,4": "line 3: user_id is missing",
    "1,  ,4": "line 3: item_id is missing",
    '1,"a,4': 'line 3: 2 columns, need 3|line 3: a quotation mark (")',
    '1,a"b,4': 'line 3: a quotation mark (")',
}


@pytest.mark.parametrize(("row", "message"), MALFORMED.items(), ids=repr)
@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz"])
def test_malformed_row_stops_or_is_listed(
    tmp_path: Path, name: str, row: str, message: str
) -> None:
    path = write(tmp_path / name, f"user_id,item_id,rating\n1,a,4\n{row}\n2,b,3\n")
    with pytest.raises(UserError) as caught:
        read_ratings(path)
    assert any(f"{path}, {part}" in str(caught.value) for part in message.split("|"))
    assert "--on-error skip" in str(caught.value)

    table = read_ratings(path, on_error="skip")
    assert table.ratings["user_id"].to_list() == ["1", "2"]
    assert table.skipped.select("line", "text").rows() == [(3, row)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rating": [4.0, None]}, "row 2: rating '' is not a number"),
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
        ("r.csv", b"", "the file is empty, need a header user_id,item_id,rating"),
        ("r.csv", b"user_id,item_id,rating\n", "no ratings"),
        ("r.csv", b"user_id,item,rating\n1,a,4\n", "line 1: missing column item_id"),
        ("r.csv", b"user_id,item_id,rating,stars\n", "line 1: unknown column 'stars'"),
        ("r.csv", b"user_id,item_id,rating,rating\n", "line 1: a column is named twice"),
        ("r.csv", b"user_id,item_id,rating\n1,a,4\n\xff,a,4\n", "line 3: not UTF-8 text"),
        ("r.csv.gz", b"user_id,item_id,rating\n1,\xff,4\n", "line 2: not UTF-8 text"),
        ("r.parquet", b"user_id,item_id,rating\n", "cannot be read"),
        ("r.json", b"{}", "unknown kind of file, need .parquet, .csv"),
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
    broken.write_bytes(gzip.compress(GOOD.encode() * 99)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_ratings(broken)
