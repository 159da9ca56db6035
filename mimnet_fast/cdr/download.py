"""Public rating files over HTTP: resumed where they broke off, checked, complete or not there.

Amazon's files of 2014 are those of the published experiments. Where a checksum of a file is known,
a download must have it; of other files the first download records it in `NAME.sha256` (the form of
sha256sum), and later ones must agree.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Literal, get_args

from rich.progress import Progress, TaskID

from mimnet_fast.cdr.atomic import atomic_file, sha256
from mimnet_fast.cdr.errors import UserError

Category = Literal["Movies_and_TV", "CDs_and_Vinyl", "Books"]
Files = Literal["reviews", "ratings"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
AMAZON = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
AMAZON_NAMES: dict[Files, str] = {
    "reviews": "reviews_{}_5.json.gz",
    "ratings": "ratings_{}.csv",
}
# As the loaders of OmniRec pin them; those of CDs and books are pinned by other projects alike.
# Of the reviews no checksum is published.
KNOWN = {
    "ratings_Movies_and_TV.csv": "05fd3bbb387bca99f16b7a64a26abb736429da416e3cc0cc7423483e9ec4c265",
    "ratings_CDs_and_Vinyl.csv": "74b503152bc8f92f389a1f841ec00361f903772e5ebb2b664ce678c023dbbceb",
    "ratings_Books.csv": "87d923ddac2aacf40c1d0e0e056dbf4bf69c9c7d41852c6b434e781e759c0707",
}

_TIMEOUT = 60.0  # seconds without a byte
_FAILURES = 4  # attempts in a row without a new byte
_PAUSE = 1.0  # seconds before the next attempt, doubled for each failure in a row
_WORTH_ANOTHER_TRY = {408, 416, 429, 500, 502, 503, 504}
_PIECE = 1 << 16


@dataclass(frozen=True)
class Downloaded:
    """A complete file and how it is known to be right."""

    path: Path
    sha256: str
    check: Literal["known", "recorded before", "recorded now"]
    """What the checksum was compared with."""
    fetched: bool
    """False where the file was there already."""


def download(
    url: str, folder: Path, *, known: str | None = None, progress: Progress | None = None
) -> Downloaded:
    """Fetch one file into a folder, going on where an earlier call broke off.

    A broken connection is taken up again by itself as long as bytes arrive. What was received stays
    in a hidden file beside the result; it is continued only while the server vouches (``If-Range``)
    that its file is still the same one.

    Args:
        url: ``http`` or ``https``; its last part is the name of the file.
        folder: Made where it is not there.
        known: The SHA-256 of the file, as hexadecimal digits.
        progress: Gets a task that counts bytes.

    Raises:
        UserError: the server refuses, the connection stays broken, or the checksum is another one.
    """
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url}: need an address that begins with https:// or http://")
    path = folder / url.rpartition("/")[2]
    record = path.with_name(f"{path.name}.sha256")
    folder.mkdir(parents=True, exist_ok=True)
    recorded = record.read_text().split()[:1] if record.is_file() else []
    expected = known or "".join(recorded)
    check: Literal["known", "recorded before", "recorded now"] = (
        "known" if known else "recorded before" if recorded else "recorded now"
    )
    if path.is_file():
        found = sha256(path)
        if expected and found != expected:
            raise UserError(
                f"{path} is damaged or another version: its SHA-256 is {found}, {check} is "
                f"{expected}: delete it and download it again"
            )
    partial = path.with_name(f".{path.name}.partial")
    fetched = not path.is_file()
    if fetched:
        _receive(url, partial, progress or Progress(disable=True))
        found = sha256(partial)
        if expected and found != expected:
            partial.unlink()
            _version(partial).unlink(missing_ok=True)
            raise UserError(
                f"{url}: got a file with SHA-256 {found}, {check} is {expected}: nothing was kept; "
                "try again, and if it stays the same, the server has another version now"
            )
        os.replace(partial, path)
        _version(partial).unlink(missing_ok=True)
    with atomic_file(record) as temporary:
        temporary.write_text(f"{found}  {path.name}\n")
    return Downloaded(path, found, check, fetched)


def download_amazon(
    categories: Iterable[Category],
    files: Files,
    folder: Path,
    *,
    base: str = AMAZON,
    progress: Progress | None = None,
) -> list[Downloaded]:
    """Fetch the files of categories: 5-core reviews (JSON lines) or all ratings (CSV).

    Raises:
        UserError: see `download`.
    """
    names = [AMAZON_NAMES[files].format(category) for category in categories]
    return [
        download(f"{base}/{name}", folder, known=KNOWN.get(name), progress=progress)
        for name in names
    ]


class _Interrupted(Exception):
    """The connection broke; asking again may help."""


def _receive(url: str, partial: Path, progress: Progress) -> None:
    """Fill ``partial``, with as many requests as it takes."""
    task = progress.add_task(url.rpartition("/")[2], total=None)
    failures = 0
    while True:
        before = _size(partial)
        try:
            _request(url, partial, progress, task)
            return
        except _Interrupted as error:
            failures = 0 if _size(partial) > before else failures + 1
            if failures == _FAILURES:
                raise UserError(
                    f"{url}: {error}; {_size(partial):,} bytes are kept: run the same command "
                    "again to go on"
                ) from error
            time.sleep(_PAUSE * 2**failures)


def _request(url: str, partial: Path, progress: Progress, task: TaskID) -> None:
    """Ask once for what is missing."""
    version = _version(partial)
    have = _size(partial) if version.is_file() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": version.read_text()} if have else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # everything was there already
        message = f"the server answers {error.code} {error.reason}"
        if error.code not in _WORTH_ANOTHER_TRY:
            raise UserError(f"{url}: {message}") from error
        raise _Interrupted(message) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"no connection: {error}") from error
    with response:
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise UserError(f"{url}: the server sends another part than the one asked for")
        else:
            have = 0
            _write_version(version, response.headers)
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        progress.update(task, completed=have, total=total)
        with partial.open("ab" if have else "wb") as file:
            for piece in _pieces(response):
                file.write(piece)
                progress.advance(task, len(piece))
    if total is not None and _size(partial) != total:
        raise _Interrupted(f"the connection broke at {_size(partial):,} of {total:,} bytes")


def _version(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.version")


def _write_version(path: Path, headers: Message) -> None:
    """Keep what names the server's version of the file byte for byte, if anything does."""
    etag = headers.get("ETag", "W/")
    name = headers.get("Last-Modified") if etag.startswith("W/") else etag
    path.unlink(missing_ok=True)
    if name:
        path.write_text(name)


def _pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            piece = response.read(_PIECE)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(f"the connection broke: {error}") from error
        if not piece:
            return
        yield piece


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
