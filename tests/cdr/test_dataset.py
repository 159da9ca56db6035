import gzip
import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from bench.prepare import NAMES, write
from mimnet_fast.cdr.dataset import Dataset, prepare
from mimnet_fast.cdr.errors import UserError

HEADER = "user_id,item_id,rating\n"


def files(folder: Path, source: str, target: str) -> tuple[Path, Path, Path]:
    (folder / "s.csv").write_text(HEADER + source)
    (folder / "t.csv").write_text(HEADER + target)
    return folder / "s.csv", folder / "t.csv", folder / "out"


def users(folder: Path, domain: str) -> list[str]:
    return pl.read_parquet(folder / f"{domain}_users.parquet")["user_id"].to_list()


def test_shared_users_come_first_in_both_domains(tmp_path: Path) -> None:
    source = "10,x,1\n9,y,2\n100,x,3\n7,z,4\n"
    target = "100,x,5\n8,b,4\n10,a,3\n9,a,2\n"
    info = prepare(*files(tmp_path, source, target))
    assert info["overlap_users"] == 3
    assert users(tmp_path / "out", "source") == ["9", "10", "100", "7"]  # 9 < 10: by number
    assert users(tmp_path / "out", "target") == ["9", "10", "100", "8"]

    dataset = Dataset.load(tmp_path / "out")
    assert dataset.source.users.tolist() == [1, 0, 2, 3]  # rows stay in file order
    assert dataset.source.values.tolist() == [1, 2, 3, 4]
    assert dataset.target.users.tolist() == [2, 3, 1, 0]
    items = pl.read_parquet(tmp_path / "out" / "target_items.parquet")["item_id"]
    assert [items[i] for i in dataset.target.items.tolist()] == ["x", "b", "a", "a"]
    assert (dataset.num_source_items, dataset.num_target_items) == (3, 3)


def test_one_id_that_is_no_integer_makes_the_order_textual(tmp_path: Path) -> None:
    prepare(*files(tmp_path, "10,x,1\n9,x,2\nb,x,3\n", "10,x,1\n9,x,2\nb,x,3\n"))
    assert users(tmp_path / "out", "source") == ["10", "9", "b"]


def test_counts_and_skipped_rows_are_recorded(tmp_path: Path) -> None:
    paths = files(tmp_path, "1,x,1\n1,x,2\n2,y\n", "1,a,nope\n1,a,5\n")
    info = prepare(*paths, on_error="skip")
    nothing = {"user below minimum": 0, "item below minimum": 0}
    assert info["source"]["removed"] == {"malformed": 1, "duplicate": 1, **nothing}
    assert (info["source"]["rows"], info["source"]["ratings"]) == (3, 1)
    assert info == json.loads((paths[2] / "dataset.json").read_text())
    assert (paths[2] / "skipped.csv").read_text().splitlines() == [
        "domain,line,reason,text",
        'source,4,"2 columns, need 3","2,y"',
        "target,2,rating 'nope' is not a number,\"1,a,nope\"",
    ]


def test_minima_hold_within_each_domain_before_users_are_matched(tmp_path: Path) -> None:
    source = "1,x,1\n1,y,2\n2,x,3\n2,y,4\n3,x,5\n"
    target = "1,a,1\n1,b,2\n2,a,3\n2,b,4\n3,a,5\n3,b,5\n"
    options = {"min_user_ratings": 2, "min_item_ratings": 2}
    info = prepare(*files(tmp_path, source, target), **options)  # type: ignore[arg-type]
    assert info["overlap_users"] == 2
    assert users(tmp_path / "out", "source") == ["1", "2"]
    assert users(tmp_path / "out", "target") == ["1", "2", "3"]
    assert info["options"] == {
        "format": "auto",
        "on_error": "raise",
        "duplicates": "last",
        **options,
    }


def test_files_of_two_formats_make_one_dataset(tmp_path: Path) -> None:
    reviews = (("A1", "x", 5, 2), ("A2", "x", 4, 1))
    keys = ("reviewerID", "asin", "overall", "unixReviewTime")
    (tmp_path / "s.json").write_text(
        "".join(json.dumps(dict(zip(keys, review, strict=True))) + "\n" for review in reviews)
    )
    (tmp_path / "t.inter").write_text("user_id:token\titem_id:token\trating:float\nA2\ta\t1\n")
    info = prepare(tmp_path / "s.json", tmp_path / "t.inter", tmp_path / "out")
    assert (info["source"]["kind"], info["target"]["kind"]) == (
        "Amazon reviews",
        "RecBole atomic file",
    )
    dataset = Dataset.load(tmp_path / "out")
    assert dataset.source.timestamps is not None
    assert dataset.source.timestamps.tolist() == [2, 1]
    assert dataset.source.users.tolist() == [1, 0]
    assert dataset.target.timestamps is None


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("1,x,1\n", "2,x,1\n", "no user_id of"),
        ("1,x,1\n", "1,x\n", "t.csv, line 2: 2 columns"),
    ],
)
def test_failure_leaves_nothing_behind(
    tmp_path: Path, source: str, target: str, message: str
) -> None:
    paths = files(tmp_path, source, target)
    with pytest.raises(UserError, match=message):
        prepare(*paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.csv", "t.csv"]


def test_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    paths = files(tmp_path, "1,x,1\n", "1,x,1\n")
    prepare(*paths)
    before = (paths[2] / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        prepare(*paths)
    assert (paths[2] / "dataset.json").read_bytes() == before


def test_what_a_killed_run_left_is_no_hindrance(tmp_path: Path) -> None:
    paths = files(tmp_path, "1,x,1\n", "1,x,1\n")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old.parquet").write_text("half")
    prepare(*paths)
    assert not (paths[2] / "old.parquet").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_every_format_gives_the_same_tables(tmp_path: Path) -> None:
    tables = []
    for format in NAMES:
        (tmp_path / format).mkdir()
        source, target = write(tmp_path / format, format, 20_000)
        zipped = target.with_name(f"{target.name}.gz")
        zipped.write_bytes(gzip.compress(target.read_bytes()))
        info = prepare(source, zipped, tmp_path / format / "out", min_item_ratings=2)
        assert 0 < info["source"]["ratings"] < info["source"]["rows"] == 14_000
        tables.append(info["tables"])
    assert tables[0] == tables[1] == tables[2]


def test_same_ratings_give_the_same_fingerprint(tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    assert Dataset.load(tmp_path / "copy").fingerprint == Dataset.load(prepared).fingerprint
    other = prepare(*files(tmp_path, "1,x,1\n", "1,x,1\n"))
    assert other["tables"] != Dataset.load(prepared).info["tables"]


def test_damaged_or_foreign_folder_is_refused(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UserError, match="is no prepared dataset"):
        Dataset.load(tmp_path)
    folder = shutil.copytree(prepared, tmp_path / "copy")
    (folder / "source_items.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"source_items\.parquet is missing or damaged"):
        Dataset.load(folder)
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, "format_version": 99}))
    with pytest.raises(UserError, match=r"version 99, need .* version 1"):
        Dataset.load(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Dataset.load(folder)
