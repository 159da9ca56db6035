"""Downloads from a server on this machine that can be told to misbehave."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from mimnet_fast.cdr import download as module
from mimnet_fast.cdr.cli import app
from mimnet_fast.cdr.download import AMAZON_NAMES, CATEGORIES, KNOWN, download, download_amazon
from mimnet_fast.cdr.errors import UserError

CONTENT = bytes(range(256)) * 2000


@dataclass
class Server:
    """What the server has, how it misbehaves, and what it was asked."""

    address: str = ""
    content: bytes = CONTENT
    version: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off."""
    refuse: list[int] = field(default_factory=list)
    """Status codes of the next answers."""
    wrong_part: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and range of each request."""
    answered: list[int] = field(default_factory=list)
    """Status codes."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            state.asked.append((self.path, wanted))
            if state.refuse:
                self.send_error(state.refuse.pop(0))
                return
            first, total = 0, len(state.content)
            valid = self.headers["If-Range"] in state.version.values()
            if wanted and valid and state.ranges:
                first = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if first >= total:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{total}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                start = first + state.wrong_part
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(total - first))
            for name, value in state.version.items():
                self.send_header(name, value)
            self.end_headers()
            end = first + state.break_after.pop(0) if state.break_after else total
            self.wfile.write(state.content[first:end])

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            state.answered.append(int(code))

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_first_download_records_the_checksum_and_later_ones_keep_to_it(
    tmp_path: Path, server: Server
) -> None:
    url, folder = f"{server.address}/a/r.csv", tmp_path / "new" / "folder"
    progress = Progress(disable=True)
    first = download(url, folder, progress=progress)
    assert (first.path, first.sha256) == (folder / "r.csv", digest(CONTENT))
    assert (first.check, first.fetched) == ("recorded now", True)
    assert first.path.read_bytes() == CONTENT
    assert (folder / "r.csv.sha256").read_text() == f"{digest(CONTENT)}  r.csv\n"
    assert names(folder) == ["r.csv", "r.csv.sha256"]
    assert progress.tasks[0].completed == progress.tasks[0].total == len(CONTENT)

    again = download(url, folder)
    assert (again.check, again.fetched) == ("recorded before", False)
    assert server.asked == [("/a/r.csv", None)]

    first.path.unlink()
    server.content = CONTENT + b"!"
    with pytest.raises(UserError, match=f"SHA-256 {digest(server.content)}, recorded before is"):
        download(url, folder)
    assert names(folder) == ["r.csv.sha256"]


def test_dropped_connections_are_taken_up_where_they_broke(tmp_path: Path, server: Server) -> None:
    server.break_after = [100_000, 1, 200_000]
    found = download(f"{server.address}/r.csv", tmp_path, known=digest(CONTENT))
    assert found.path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [
        None,
        "bytes=100000-",
        "bytes=100001-",
        "bytes=300001-",
    ]
    assert names(tmp_path) == ["r.csv", "r.csv.sha256"]


def test_another_call_goes_on_where_a_hopeless_one_stopped(tmp_path: Path, server: Server) -> None:
    url = f"{server.address}/r.csv"
    server.break_after = [100_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match=r"broke at 100,000 of 512,000 .*; 100,000 bytes are kept"):
        download(url, tmp_path)
    assert not (tmp_path / "r.csv").exists()
    assert len(server.asked) == 5
    download(url, tmp_path)
    assert server.asked[-1] == ("/r.csv", "bytes=100000-")
    assert (tmp_path / "r.csv").read_bytes() == CONTENT


def test_complete_file_that_was_not_renamed_yet(tmp_path: Path, server: Server) -> None:
    (tmp_path / ".r.csv.partial").write_bytes(CONTENT)
    (tmp_path / ".r.csv.partial.version").write_text('"one"')
    download(f"{server.address}/r.csv", tmp_path)
    assert server.asked == [("/r.csv", f"bytes={len(CONTENT)}-")]
    assert names(tmp_path) == ["r.csv", "r.csv.sha256"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": {"ETag": '"two"'}},
        {"version": {}},
        {"version": {"ETag": 'W/"one"'}},
        {"ranges": False},
    ],
    ids=["other version", "no version", "weak version", "no ranges"],
)
def test_parts_of_two_versions_are_never_joined(
    tmp_path: Path, server: Server, change: dict[str, Any]
) -> None:
    url = f"{server.address}/r.csv"
    server.break_after = [100_000, 0, 0, 0, 0]
    if not change.get("version", {}).get("ETag", "W/").startswith('"'):
        server.version = change.get("version", server.version)
    with pytest.raises(UserError, match="broke at"):
        download(url, tmp_path)
    for name, value in change.items():
        setattr(server, name, value)
    server.content = CONTENT[::-1]
    assert download(url, tmp_path).path.read_bytes() == CONTENT[::-1]


def test_modification_time_serves_where_there_is_no_strong_tag(
    tmp_path: Path, server: Server
) -> None:
    server.version = {"ETag": 'W/"x"', "Last-Modified": "Thu, 18 Feb 2016 00:00:00 GMT"}
    server.break_after = [5]
    download(f"{server.address}/r.csv", tmp_path)
    assert server.asked[1] == ("/r.csv", "bytes=5-")
    assert server.answered == [200, 206]


def test_wrong_checksum_leaves_nothing(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UserError, match=rf"SHA-256 {digest(CONTENT)}, known is {'0' * 64}"):
        download(f"{server.address}/r.csv", tmp_path, known="0" * 64)
    assert names(tmp_path) == []


def test_damaged_file_is_told_and_not_replaced(tmp_path: Path, server: Server) -> None:
    (tmp_path / "r.csv").write_text("mine")
    with pytest.raises(UserError, match=r"r\.csv is damaged or another version"):
        download(f"{server.address}/r.csv", tmp_path, known=digest(CONTENT))
    assert (tmp_path / "r.csv").read_text() == "mine"
    assert server.asked == []


def test_busy_server_is_asked_again_and_a_refusal_is_final(tmp_path: Path, server: Server) -> None:
    server.refuse = [503, 429, 500]
    assert download(f"{server.address}/r.csv", tmp_path).fetched
    server.refuse = [404, 404]
    with pytest.raises(UserError, match=r"s\.csv: the server answers 404 Not Found"):
        download(f"{server.address}/s.csv", tmp_path)
    assert server.refuse == [404]


def test_part_that_was_not_asked_for(tmp_path: Path, server: Server) -> None:
    server.break_after, server.wrong_part = [5], True
    with pytest.raises(UserError, match="sends another part"):
        download(f"{server.address}/r.csv", tmp_path)


def test_address_that_cannot_be_reached(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UserError, match=r"no connection: .*; 0 bytes are kept"):
        download("http://127.0.0.1:9/r.csv", tmp_path)
    with pytest.raises(UserError, match="need an address that begins with https"):
        download("file:///etc/passwd", tmp_path)


def test_names_and_checksums_of_amazon_s_files(tmp_path: Path, server: Server) -> None:
    assert all(len(bytes.fromhex(checksum)) == 32 for checksum in KNOWN.values())
    assert {AMAZON_NAMES["ratings"].format(name) for name in CATEGORIES} == set(KNOWN)
    found = download_amazon(CATEGORIES, "reviews", tmp_path, base=server.address)
    assert [each.path.name for each in found] == [
        "reviews_Movies_and_TV_5.json.gz",
        "reviews_CDs_and_Vinyl_5.json.gz",
        "reviews_Books_5.json.gz",
    ]
    assert [path for path, _ in server.asked] == [f"/{each.path.name}" for each in found]


def test_command(tmp_path: Path, server: Server) -> None:
    arguments = ["download", "amazon", "--category", "Books", "--out", str(tmp_path)]
    arguments += ["--from", server.address]
    runner = CliRunner()
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    path = tmp_path / "reviews_Books_5.json.gz"
    assert result.stdout == f"{path}: fetched, SHA-256 {digest(CONTENT)} (recorded now)\n"
    (found,) = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert found == {
        "path": str(path),
        "sha256": digest(CONTENT),
        "check": "recorded before",
        "fetched": False,
    }
    refused = runner.invoke(app, [*arguments, "--files", "ratings"])
    assert refused.exit_code == 2
    assert "ratings_Books.csv: got a file with SHA-256" in refused.stderr
