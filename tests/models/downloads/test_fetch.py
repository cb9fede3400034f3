"""Fetching over real connections: whole files that are right, or a typed error and nothing that
could be taken for a file. What arrived before any end is not fetched again."""

import errno
import gc
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import BOUND_S, Running, wait_until
from loopback import (
    LoopbackRequest,
    LoopbackServer,
    Misbehaviour,
)

from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.errors import (
    DigestMismatchError,
    DownloadError,
    OrionError,
    RequestCancelledError,
)
from orion_oie.models.downloads.arrival import (
    BLOCK_BYTES,
    ArrivalState,
)
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.downloads.fetch import (
    CHUNK_BYTES,
    Download,
)
from orion_oie.models.downloads.parts import (
    map_path,
    part_path,
)
from orion_oie.models.downloads.ranges import RemoteFile
from orion_oie.models.specs import SourceSpec

SIZE = 9 * BLOCK_BYTES + 12_345
CONTENT = random.Random(1).randbytes(SIZE)
OTHER = CONTENT[::-1]
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PROBE = 1  # byte that is asked for to learn what there is
ONE = DownloadConfig(connections=1, retries=0)
FOUR = DownloadConfig(connections=4, retries=0)

Wrongs = Mapping[int | None, Misbehaviour | None]
"""What to answer to which request from now on; under None, to those that are not named."""

pytestmark = pytest.mark.usefixtures("only_this_machine")


class Script:
    """Wrong answers, by the order in which requests come; `hook` is called with each of them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.hook: Callable[[LoopbackRequest], None] = lambda _: None
        self.play({})

    def play(self, wrongs: Wrongs) -> None:
        """From the next request on; it has the number 0."""
        self._wrongs = wrongs
        self._count = itertools.count()

    def __call__(self, request: LoopbackRequest) -> Misbehaviour | None:
        self.times.append(time.monotonic())
        self.hook(request)
        number = next(self._count)
        return self._wrongs.get(number, self._wrongs.get(None))


@dataclass
class Place:
    """A server of files, and the cache they come to."""

    folder: Path
    server: LoopbackServer
    script: Script
    cache: ModelCache
    source: SourceSpec

    @property
    def path(self) -> Path:
        return self.cache.paths(self.source)[0]

    @property
    def kept(self) -> int:
        """Bytes that are here."""
        return self.cache.arrived(self.source)[0]

    def pull(
        self,
        config: DownloadConfig = FOUR,
        scope: CancelScope | None = None,
        on_progress: Callable[[Download | None], None] = lambda _: None,
    ) -> bytes:
        """Fetch the files; gives what is in the first."""
        paths = self.cache.pull(self.source, config, scope or CancelScope(), on_progress)
        assert paths == self.cache.paths(self.source) == self.cache.find(self.source)
        return paths[0].read_bytes()

    def download(self, config: DownloadConfig = ONE, **facts: Any) -> Download:
        """A prepared download of the files, without locks and records."""
        files = [
            RemoteFile(f"{self.server.url}/{path.name}", path, **facts)
            for path in self.cache.paths(self.source)
        ]
        download = Download(files, config, CancelScope())
        download.prepare()
        return download

    def leave_half(self) -> None:
        """Let a download end when some of it has arrived."""
        self.script.play(dict.fromkeys(range(4)) | {None: Misbehaviour(status=410)})
        with pytest.raises(DownloadError, match="410"):
            self.pull(ONE)
        self.script.play({})
        assert 0 < self.kept < SIZE
        self.assert_nothing_is_used()

    def assert_nothing_is_used(self) -> None:
        """No file could be taken for the right one, and none is known."""
        assert not self.path.exists()
        assert self.cache.find(self.source) is None
        assert self.cache.records() == {}

    def assert_nothing_is_left_over(self) -> None:
        """Beside the files there are only their locks."""
        left = [path for path in self.path.parent.rglob("*") if path.is_file()]
        assert {path for path in left if path.suffix != ".lock"} == set(
            self.cache.paths(self.source)
        )

    @property
    def is_free(self) -> bool:
        """Whether nobody fetches the files. Throws away what is here."""
        with suppress(DownloadError):
            self.cache.remove(self.source)
            return True
        return False


@contextmanager
def a_place(
    tmp_path: Path,
    files: Mapping[str, bytes] = {"file": CONTENT},
    sha256: Sequence[str] = (),
    **limits: float,
) -> Iterator[Place]:
    folder = tmp_path / "served"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    script = Script()
    with LoopbackServer(folder, misbehave=script, **limits) as server:
        source = SourceSpec(url=server.url, shards=list(files), sha256=list(sha256))
        yield Place(folder, server, script, ModelCache(tmp_path / "cache"), source)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A file to fetch; its digest is not known."""
    with a_place(tmp_path) as place:
        yield place


def range_of(request: LoopbackRequest) -> range:
    """The bytes that a request asked for."""
    assert request.range is not None
    first, last = request.range
    assert first is not None
    assert last is not None
    return range(first, last + 1)


def ranges(server: LoopbackServer, since: int = 1) -> list[range]:
    """What was asked for after the probe."""
    return [range_of(request) for request in server.requests[since:]]


def sent_since(server: LoopbackServer, number: int) -> int:
    """Bytes sent for all requests from that number on."""
    return sum(request.sent for request in server.requests[number:])


# -- all of it


def test_a_whole_file(place: Place) -> None:
    """It has the right bytes and its digest is known; each byte was sent once, beside the probe."""
    assert place.pull() == CONTENT
    place.assert_nothing_is_left_over()
    (record,) = place.cache.records().values()
    assert (record.sha256, record.size, record.is_expected) == (SHA256, SIZE, False)
    assert range_of(place.server.requests[0]) == range(PROBE)
    asked = sorted(ranges(place.server), key=lambda one: one.start)
    assert [one.start for one in asked] == [0, *(one.stop for one in asked[:-1])]
    assert asked[-1].stop == SIZE
    assert place.server.bytes_sent == SIZE + PROBE


def test_what_is_here_is_not_asked_for(place: Place) -> None:
    """A second pull sends no request."""
    place.pull()
    asked = len(place.server.requests)
    assert place.pull() == CONTENT
    assert len(place.server.requests) == asked


@pytest.mark.parametrize("connections", [1, 4])
def test_connections_work_side_by_side(place: Place, connections: int) -> None:
    """As many ranges are asked for at once as there may be connections, and no more."""
    more, go_on = threading.Event(), threading.Event()

    def hold(request: LoopbackRequest) -> None:
        number = place.server.requests.index(request)
        if number > connections:
            more.set()
        if number > 0:
            assert go_on.wait(BOUND_S)

    place.script.hook = hold
    running = Running(place.pull, DownloadConfig(connections=connections))
    wait_until(lambda: len(place.server.requests) == 1 + connections)
    assert not more.wait(0.1)
    go_on.set()
    assert running.join() == CONTENT


FILES = {
    "one": b"1",
    "block": CONTENT[:BLOCK_BYTES],
    "blocks": CONTENT[: 4 * BLOCK_BYTES],
    "more": CONTENT[: BLOCK_BYTES + 1],
    "less": CONTENT[: BLOCK_BYTES - 1],
    "deep/a b ü%20?#": CONTENT[:1000],
    "deep/er/file": CONTENT,
}


def test_many_files(tmp_path: Path) -> None:
    """Of any size and name, together: each is right, and no byte is sent twice."""
    digests = [hashlib.sha256(content).hexdigest() for content in FILES.values()]
    with a_place(tmp_path, FILES, digests) as place:
        place.pull()
        for path, content in zip(place.cache.paths(place.source), FILES.values(), strict=True):
            assert path.read_bytes() == content, path
        total = sum(len(content) for content in FILES.values())
        assert place.server.bytes_sent == total + PROBE * len(FILES)
        assert place.cache.arrived(place.source) == (total, total)
        records = place.cache.records().values()
        assert sorted(record.sha256 for record in records) == sorted(digests)
        assert all(record.is_expected for record in records)


def test_the_missing_file_of_many(tmp_path: Path) -> None:
    """Only that one is fetched again."""
    with a_place(tmp_path, FILES) as place:
        place.pull()
        place.cache.paths(place.source)[-1].unlink()
        sent = place.server.bytes_sent
        place.pull()
        assert place.server.bytes_sent - sent == SIZE + PROBE


# -- in which order


def test_runs_come_first_and_in_their_order(tmp_path: Path) -> None:
    """One connection asks for exactly the blocks of the runs, as they are given, then for the
    rest."""
    block = BLOCK_BYTES
    runs = [(1, 5 * block + 7, 7 * block), (0, 2 * block, 2 * block + 1), (1, 0, 9), (1, 0, block)]
    first = [(1, 5), (1, 6), (0, 2), (1, 0)]
    rest = [
        (number, each) for number in (0, 1) for each in range(10) if (number, each) not in first
    ]
    with a_place(tmp_path, {"file": CONTENT, "second": OTHER}) as place:
        download = place.download()
        download.start(runs)
        download.wait()
        asked = [
            (["/file", "/second"].index(request.path), each // block)
            for request in place.server.requests[2:]
            for each in range_of(request)[::block]
        ]
        assert asked == first + rest
        assert [path.read_bytes() for path in place.cache.paths(place.source)] == [CONTENT, OTHER]


def test_any_bytes_can_be_read_first(tmp_path: Path) -> None:
    """They are fetched, with some of what follows and nothing before; what is here is not asked
    for again, neither then nor by the rest of the download."""
    block = BLOCK_BYTES
    content = random.Random(4).randbytes(24 * block + 5)
    with a_place(tmp_path, {"file": content}) as place:
        download = place.download()

        def read(offset: int, length: int) -> list[range]:
            """What had to be asked for."""
            before = len(place.server.requests)
            assert download.read(0, offset, length) == content[offset : offset + length]
            return ranges(place.server, before)

        (asked,) = read(12 * block + 3, 50)
        assert (asked.start, asked.stop) == (12 * block, 20 * block)
        assert read(10 * block, 10) == [range(10 * block, 12 * block)]
        assert read(8, 3 * block) == [range(8 * block)]
        assert read(block - 1, 2 * block) == read(13 * block, 2 * block) == []
        assert read(len(content) - 2, 99) == [range(24 * block, len(content))]
        assert read(len(content), 5) == read(len(content) + 5, 5) == []

        download.start()
        download.wait()
        assert place.path.read_bytes() == content
        assert place.server.bytes_sent == len(content) + PROBE


def test_a_little_is_read_for_a_little(tmp_path: Path) -> None:
    """Reading the beginning of a large file fetches a small part of it."""
    with a_place(tmp_path, {"file": bytes(30_000_000)}) as place:
        download = place.download()
        assert download.read(0, 0, 10) == bytes(10)
        assert place.server.bytes_sent <= PROBE + (2 << 20)
        assert download.arrived_bytes == place.server.bytes_sent - PROBE
        download.discard()
        place.assert_nothing_is_used()
        assert list(place.path.parent.iterdir()) == []


def test_files_can_be_held_where_they_arrive(place: Place) -> None:
    """Held, a complete file is checked and marked, but has no name; released, it gets it."""
    download = place.download()
    download.hold()
    download.start()
    wait_until(lambda: download.maps[0].state is ArrivalState.COMPLETE)
    assert not place.path.exists()
    assert part_path(place.path).read_bytes() == CONTENT
    download.release()
    download.wait()
    assert place.path.read_bytes() == CONTENT


def test_progress_is_told(tmp_path: Path) -> None:
    """Every so often, and at the end: bytes only grow, the total and a speed are known."""
    with a_place(tmp_path, bytes_per_s=5e6) as place:
        seen = []

        def on_progress(download: Download | None) -> None:
            assert download is not None
            assert download.total_bytes == SIZE
            assert download.sizes == [SIZE]
            seen.append((download.arrived_bytes, download.bytes_per_s, place.kept))

        place.pull(on_progress=on_progress)
        arrived = [one[0] for one in seen]
        assert arrived == sorted(arrived)
        assert len(set(arrived)) > 2
        assert arrived[-1] == SIZE
        assert any(1e6 < speed < 25e6 for _, speed, _ in seen)
        assert all(kept >= here for here, _, kept in seen)


def test_the_limit_of_the_configuration(place: Place) -> None:
    """2.4 MB at 5 MB/s take their time, however many connections there are."""
    started = time.monotonic()
    assert place.pull(DownloadConfig(connections=8, bytes_per_s=5e6)) == CONTENT
    assert time.monotonic() - started >= 0.4


# -- wrong answers

FROM_THE_START = [
    ("ranges ignored", Misbehaviour(ignore_range=True), "ignores ranges"),
    ("a page", Misbehaviour(status=200, body=b"<html>Log in</html>"), "ignores ranges"),
    ("not there", Misbehaviour(status=404), "status 404"),
    ("no token", Misbehaviour(status=401), "401.*token"),
    ("forbidden", Misbehaviour(status=403), "403.*token"),
    ("nothing", Misbehaviour(status=204), "status 204"),
    ("no such range", Misbehaviour(status=416), "status 416"),
    ("other bytes", Misbehaviour(headers={"Content-Range": "bytes 7-7/99"}), "says 'bytes 7-7/99'"),
    ("no total", Misbehaviour(headers={"Content-Range": "bytes 0-0/*"}), "says 'bytes 0-0/"),
    ("no range told", Misbehaviour(headers={"Content-Range": ""}), "says ''"),
    ("broken", Misbehaviour(status=500), "status 500, 1 times"),
    ("busy", Misbehaviour(status=429, headers={"Retry-After": "nonsense²"}), "status 429"),
    ("round and round", Misbehaviour(redirect="/file"), "redirect"),
    ("to nowhere", Misbehaviour(redirect="http://[bad"), "cannot be reached"),
    ("to another protocol", Misbehaviour(redirect="ftp://127.0.0.1/x"), "cannot be reached"),
    ("larger than any disk", Misbehaviour(claimed_size=10**18), "make room"),
    ("larger than any number", Misbehaviour(claimed_size=10**30), "make room"),
]
IN_THE_MIDDLE = [
    ("ranges ignored", Misbehaviour(ignore_range=True), "ignores ranges"),
    ("gone", Misbehaviour(status=404), "status 404"),
    ("forbidden", Misbehaviour(status=403), "403.*token"),
    ("no such range", Misbehaviour(status=416), "status 416"),
    ("broken", Misbehaviour(status=500), "status 500.*what arrived is kept"),
    ("a page", Misbehaviour(body=b"<html>Log in</html>"), "did not send all"),
    ("an empty body", Misbehaviour(body=b""), "did not send all"),
    ("cut at once", Misbehaviour(cut_after=0), "Error.*what arrived is kept"),
    ("other bytes", Misbehaviour(headers={"Content-Range": f"bytes 1-9/{SIZE}"}), "says 'bytes 1"),
    ("longer", Misbehaviour(claimed_size=SIZE + 1), f"changed .*has {SIZE + 1} bytes now"),
    ("shorter", Misbehaviour(claimed_size=SIZE - 1), f"changed .*has {SIZE - 1} bytes now"),
    ("another version", Misbehaviour(etag='"other"'), "changed while"),
    ("round and round", Misbehaviour(redirect="/file"), "redirect"),
]


@pytest.mark.parametrize(
    ("wrong", "message"), [pytest.param(*rest, id=name) for name, *rest in FROM_THE_START]
)
def test_a_wrong_answer_from_the_start(place: Place, wrong: Misbehaviour, message: str) -> None:
    """It is a `DownloadError` that says what is wrong; afterwards the file can be fetched."""
    place.script.play({None: wrong})
    with pytest.raises(DownloadError, match=message):
        place.pull()
    place.assert_nothing_is_used()
    place.script.play({})
    assert place.pull() == CONTENT


@pytest.mark.parametrize(
    ("wrong", "message"), [pytest.param(*rest, id=name) for name, *rest in IN_THE_MIDDLE]
)
def test_a_wrong_answer_in_the_middle(place: Place, wrong: Misbehaviour, message: str) -> None:
    """The same when some of the file is here. Only what is of another version is thrown away."""
    place.script.play({0: None, 1: None, None: wrong})
    with pytest.raises(DownloadError, match=message):
        place.pull(ONE)
    place.assert_nothing_is_used()
    assert (place.kept == 0) == ("changed" in message)
    place.script.play({})
    assert place.pull() == CONTENT


def test_errors_that_pass(place: Place) -> None:
    """They are tried again, not before the server wants that; no byte is fetched twice."""
    busy = Misbehaviour(status=429, headers={"Retry-After": "1"})
    place.script.play({0: Misbehaviour(status=500), 2: Misbehaviour(status=503), 3: busy})
    assert place.pull(DownloadConfig(connections=1, retries=2)) == CONTENT
    assert place.script.times[4] - place.script.times[3] >= 1.0
    assert place.server.bytes_sent == SIZE + PROBE


def test_errors_that_stay(place: Place) -> None:
    """Each range is tried as often as it may be, and no more often."""
    place.script.play({0: None, None: Misbehaviour(status=500)})
    with pytest.raises(DownloadError, match=r"failed 2 times in a row at byte 0 \(status 500\)"):
        place.pull(DownloadConfig(connections=1, retries=1))
    assert ranges(place.server) == [range(2 * BLOCK_BYTES)] * 2


def test_a_connection_that_is_cut(place: Place) -> None:
    """The next one goes on where it ended: at the last block that was whole."""
    cut = Misbehaviour(cut_after=BLOCK_BYTES + 1000)
    place.script.play({1: cut, 3: cut})
    assert place.pull(DownloadConfig(connections=1, retries=1)) == CONTENT
    starts = [one.start // BLOCK_BYTES for one in ranges(place.server)]
    assert starts[:5] == [0, 1, 2, 3, 4]
    assert place.server.bytes_sent == SIZE + PROBE + 2 * 1000


def test_progress_makes_up_for_cuts(place: Place) -> None:
    """A connection that is cut again and again, but brings something each time, is no failure."""
    place.script.play({0: None, None: Misbehaviour(cut_after=BLOCK_BYTES)})
    # One retry: a kept connection may be found closed before anything is sent.
    assert place.pull(DownloadConfig(connections=4, retries=1)) == CONTENT


def test_more_than_was_asked_for(place: Place) -> None:
    """Bytes behind the range are not taken, and not waited for."""
    first = CONTENT[: 2 * BLOCK_BYTES]
    place.script.play({1: Misbehaviour(body=first + bytes(64 << 20))})
    assert place.pull(ONE) == CONTENT
    assert place.server.bytes_sent < 48 << 20


def test_nobody_listens(tmp_path: Path) -> None:
    """That is a `DownloadError` with the address; a file that was begun is kept."""
    with a_place(tmp_path) as place:
        place.leave_half()
        kept = place.kept
    with pytest.raises(DownloadError, match=r"/file cannot be reached .*ConnectError"):
        place.pull()
    assert place.kept == kept


def test_a_server_that_goes_away(tmp_path: Path) -> None:
    """What had arrived is not fetched again from another address."""
    with a_place(tmp_path, bytes_per_s=2e6) as place:
        download = place.download(sha256=SHA256)
        download.start()
        wait_until(lambda: download.arrived_bytes > 3 * BLOCK_BYTES)
    with pytest.raises(DownloadError, match="what arrived is kept"):
        download.wait()
    assert download.maps[0].state is ArrivalState.FAILED
    kept = download.arrived_bytes
    with LoopbackServer(place.folder) as server:
        file = RemoteFile(f"{server.url}/file", place.path, SHA256)
        again = Download([file], ONE, CancelScope())
        assert again.prepare() == [SIZE]
        assert again.arrived_bytes == kept
        again.start()
        again.wait()
        assert server.bytes_sent == SIZE - kept + PROBE
    assert place.path.read_bytes() == CONTENT


def test_a_redirect_to_another_server(place: Place) -> None:
    """It is followed; what is secret stays with the first."""
    with LoopbackServer(place.folder) as other:
        place.script.play({None: Misbehaviour(redirect=f"{other.url}/file?signed=1")})
        download = place.download(headers={"Authorization": "Bearer x", "X-Mine": "y"})
        download.start()
        download.wait()
        assert place.path.read_bytes() == CONTENT
        for request in place.server.requests:
            assert request.headers["authorization"] == "Bearer x"
        assert other.requests
        for request in other.requests:
            assert request.headers["x-mine"] == "y"
            assert "authorization" not in request.headers


def test_a_secret_is_not_shown(place: Place) -> None:
    """Headers are not part of what a file looks like."""
    file = RemoteFile(place.server.url, place.path, headers={"Authorization": "Bearer hidden"})
    assert "hidden" not in repr(file)


@pytest.mark.parametrize(
    "url", ["http://", "http://[bad", "http://127.0.0.1:99999", "http:///x", "https://\0"]
)
def test_an_address_that_is_none(place: Place, url: str) -> None:
    """That is a `DownloadError` when it is fetched, and no file until then."""
    source = SourceSpec(url=url, shards=["file"])
    assert place.cache.find(source) is None
    with pytest.raises(DownloadError):
        place.cache.pull(source, ONE, CancelScope())
    assert place.cache.find(source) is None


def test_without_the_http_library(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra that brings it; nobody is left with the lock."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(DownloadError, match=r"orion-oie\[download\]"):
        place.pull()
    monkeypatch.undo()
    assert place.pull() == CONTENT


# -- which content


def test_the_wrong_content(tmp_path: Path) -> None:
    """It gets no name, and none of it is kept. Once the right one is there it is taken."""
    with a_place(tmp_path, {"file": OTHER}, [SHA256]) as place:
        with pytest.raises(DigestMismatchError) as caught:
            place.pull()
        digests = {hashlib.sha256(OTHER).hexdigest(), SHA256}
        assert {caught.value.details["sha256"], caught.value.details["expected"]} == digests
        assert all(digest in caught.value.message for digest in digests)
        place.assert_nothing_is_used()
        assert not part_path(place.path).exists()
        assert not map_path(place.path).exists()
        (place.folder / "file").write_bytes(CONTENT)
        assert place.pull() == CONTENT


def test_one_wrong_file_of_two(tmp_path: Path) -> None:
    """None of them gets its name; the right one is not fetched again."""
    digests = [SHA256, SHA256]
    with a_place(tmp_path, {"file": CONTENT, "second": OTHER}, digests) as place:
        with pytest.raises(DigestMismatchError, match="second"):
            place.pull()
        place.assert_nothing_is_used()
        assert place.kept == SIZE
        (place.folder / "second").write_bytes(CONTENT)
        sent = place.server.bytes_sent
        assert place.pull() == CONTENT
        assert place.server.bytes_sent - sent == SIZE + 2 * PROBE


def test_servers_that_disagree_about_the_version(tmp_path: Path) -> None:
    """Of a file with a known digest they may: it is checked anyway."""
    with a_place(tmp_path, sha256=[SHA256]) as place:
        place.script.play({number: Misbehaviour(etag=f'"{number}"') for number in range(99)})
        assert place.pull() == CONTENT


def test_a_weak_version_is_none(place: Place) -> None:
    """The time of the last change counts then, while a file is fetched and for the next time."""
    number = itertools.count()

    def of(day: int) -> Misbehaviour:
        changed = f"Mon, {day:02} Jan 2024 00:00:00 GMT"
        return Misbehaviour(etag=f'W/"{next(number)}"', headers={"Last-Modified": changed})

    place.script.play({0: of(1), 1: of(1), None: of(8)})
    with pytest.raises(DownloadError, match="changed while"):
        place.pull(ONE)
    place.script.play({0: of(1), 1: of(1), None: Misbehaviour(status=410)})
    with pytest.raises(DownloadError, match="410"):
        place.pull(ONE)
    kept, sent = place.kept, place.server.bytes_sent
    assert kept > 0
    place.script.play({None: of(1)})
    assert place.pull() == CONTENT
    assert place.server.bytes_sent - sent == SIZE - kept + PROBE


# -- what is kept


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(OTHER, id="another version"),
        pytest.param(CONTENT + b"more", id="longer"),
        pytest.param(CONTENT[:-BLOCK_BYTES], id="shorter"),
    ],
)
def test_content_that_changed_meanwhile(place: Place, change: bytes) -> None:
    """What arrived of the old is thrown away: the new is fetched whole."""
    place.leave_half()
    (place.folder / "new").write_bytes(change)
    (place.folder / "new").replace(place.folder / "file")
    sent = place.server.bytes_sent
    assert place.pull() == change
    assert place.server.bytes_sent - sent == len(change) + PROBE


def test_a_server_that_names_no_version(place: Place) -> None:
    """Other content of the same size would go unseen: nothing of before is used."""
    nameless = Misbehaviour(etag="")
    place.script.play({0: nameless, 1: nameless, None: Misbehaviour(status=410)})
    with pytest.raises(DownloadError, match="410"):
        place.pull(ONE)
    (place.folder / "file").write_bytes(OTHER)
    place.script.play({None: nameless})
    assert place.pull() == OTHER


def test_a_digest_that_became_known(place: Place) -> None:
    """What arrived without it is not used."""
    place.leave_half()
    place.source = place.source.model_copy(update={"sha256": [SHA256]})
    sent = place.server.bytes_sent
    assert place.pull() == CONTENT
    assert place.server.bytes_sent - sent == SIZE + PROBE


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: map_path(path).write_bytes(b""), id="an empty map"),
        pytest.param(lambda path: map_path(path).write_bytes(b"ORIONMAP"), id="a short map"),
        pytest.param(lambda path: os.truncate(map_path(path), 4096), id="a map without marks"),
        pytest.param(lambda path: map_path(path).write_bytes(bytes(9999)), id="no map"),
        pytest.param(lambda path: map_path(path).unlink(), id="a map that is gone"),
        pytest.param(lambda path: part_path(path).unlink(), id="a part that is gone"),
        pytest.param(lambda path: os.truncate(part_path(path), 1000), id="a short part"),
        pytest.param(lambda path: os.truncate(part_path(path), SIZE + 1), id="a long part"),
    ],
)
def test_damage_to_what_is_kept(place: Place, damage: Callable[[Path], object]) -> None:
    """Nobody trips over it: the file is fetched whole."""
    place.leave_half()
    damage(place.path)
    sent = place.server.bytes_sent
    assert place.pull() == CONTENT
    assert place.server.bytes_sent - sent == SIZE + PROBE
    place.assert_nothing_is_left_over()


def test_a_part_that_shrinks_while_it_is_fetched(tmp_path: Path) -> None:
    """The download ends with an error instead of waiting for bytes that never come."""
    with a_place(tmp_path) as place:
        silent = Misbehaviour(delay_s=60)
        place.script.play(dict.fromkeys(range(6)) | {None: silent})
        download = place.download()
        download.start([(0, BLOCK_BYTES, SIZE)])  # nothing can be hashed until the first is here
        wait_until(lambda: download.arrived_bytes == SIZE - BLOCK_BYTES)
        os.truncate(part_path(place.path), 2 * BLOCK_BYTES)
        download.maps[0].mark(0)
        with pytest.raises(DownloadError, match="shortened"):
            download.wait()


def test_an_end_just_before_the_name(place: Place, tmp_path: Path) -> None:
    """A file that is whole but for its name is only checked again."""
    download = place.download()
    download.hold()
    download.start()
    wait_until(lambda: download.maps[0].state is ArrivalState.COMPLETE)
    for path in (part_path(place.path), map_path(place.path)):
        shutil.copy(path, tmp_path / path.name)
    download.release()
    download.wait()
    place.path.unlink()
    for path in (part_path(place.path), map_path(place.path)):
        (tmp_path / path.name).replace(path)
    sent = place.server.bytes_sent
    assert place.pull() == CONTENT
    assert place.server.bytes_sent - sent == PROBE
    place.assert_nothing_is_left_over()


# -- the disk

Usage = namedtuple("Usage", "total used free")


def test_too_little_room(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is known before the first byte is fetched; only what is missing needs room."""
    place.leave_half()
    kept, sent = place.kept, place.server.bytes_sent
    room = SIZE - kept + (16 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(room * 2, 0, room - 1))
    with pytest.raises(DownloadError, match="make room") as caught:
        place.pull()
    assert caught.value.details == {"needed_bytes": SIZE - kept, "free_bytes": room - 1}
    assert place.server.bytes_sent - sent == PROBE
    assert place.kept == kept
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(room * 2, 0, room))
    assert place.pull() == CONTENT
    assert place.server.bytes_sent - sent == SIZE - kept + 2 * PROBE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_gets_full(place: Place, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """What arrived is kept, and the next download goes on with it."""
    count = itertools.count()
    write = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if next(count) >= 4:
            raise OSError(number, "no")
        return write(descriptor, data[: BLOCK_BYTES // 2], offset)  # less than it was given

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DownloadError, match=r"the disk is full.*what arrived is kept"):
        place.pull(ONE)
    monkeypatch.undo()
    place.assert_nothing_is_used()
    kept, sent = place.kept, place.server.bytes_sent
    assert kept == 2 * BLOCK_BYTES
    assert place.pull() == CONTENT
    assert place.server.bytes_sent - sent == SIZE - kept + PROBE


@pytest.mark.parametrize("name", ["replace", "ftruncate", "preadv", "fsync"])
def test_a_disk_that_fails(place: Place, name: str) -> None:
    """Whatever fails, at the beginning or at the end, is a `DownloadError` that says why; the file
    can be fetched when the disk works again."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(DownloadError, match="the disk is broken"):
            place.pull()
    assert place.cache.find(place.source) is None
    assert place.pull() == CONTENT


def test_a_disk_that_fails_under_a_reader(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is a `DownloadError` as well."""

    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no")

    download = place.download()
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DownloadError, match="the disk is full"):
        download.read(0, 0, 10)
    download.close()


@pytest.mark.parametrize(
    ("file", "root"), [("cache", "cache"), ("cache/models", "cache"), ("above", "above/cache")]
)
def test_a_folder_that_cannot_be_made(place: Place, tmp_path: Path, file: str, root: str) -> None:
    """A file in its place is a `DownloadError` that names it, and stays."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    cache = ModelCache(tmp_path / root)
    with pytest.raises(DownloadError, match=r"cannot be written to.*choose another cache_dir"):
        cache.pull(place.source, ONE, CancelScope())
    assert cache.find(place.source) is None
    assert (tmp_path / file).read_text() == "mine"


def test_a_folder_where_the_file_should_be(place: Place) -> None:
    """Where the part should lie there is a folder: a `DownloadError`."""
    part_path(place.path).mkdir(parents=True)
    (part_path(place.path) / "mine").touch()
    with pytest.raises(DownloadError, match="cannot be written to"):
        place.pull()
    assert place.cache.find(place.source) is None


# -- an end on purpose

SILENT = Misbehaviour(delay_s=600)
WAIT = Misbehaviour(status=503, headers={"Retry-After": "60"})


@pytest.mark.parametrize(
    ("limits", "wrongs", "config", "requests"),
    [
        pytest.param({"bytes_per_s": 4e5}, {}, {}, 3, id="while bytes come"),
        pytest.param({}, {0: None, None: SILENT}, {}, 3, id="while the server is silent"),
        pytest.param({}, {None: SILENT}, {}, 1, id="before the first answer"),
        pytest.param({}, {0: None, None: WAIT}, {}, 3, id="while it has to wait"),
        pytest.param({}, {None: WAIT}, {}, 1, id="while it has to wait for the first answer"),
        pytest.param({}, {}, {"bytes_per_s": 2e4}, 3, id="while it waits for its limit"),
    ],
)
def test_a_cancelled_download(
    tmp_path: Path,
    limits: dict[str, float],
    wrongs: Wrongs,
    config: dict[str, float],
    requests: int,
) -> None:
    """Ends within a second with the error of its scope, and soon others can have the file."""
    with a_place(tmp_path, **limits) as place:
        place.script.play(wrongs)
        scope, error = CancelScope(), RequestCancelledError("enough")
        running = Running(place.pull, DownloadConfig(connections=2, **config), scope)
        wait_until(lambda: len(place.server.requests) >= requests)
        scope.cancel(error)
        cancelled = time.monotonic()
        with pytest.raises(RequestCancelledError) as caught:
            running.join()
        assert caught.value is error
        assert time.monotonic() - cancelled < 1.0
        place.assert_nothing_is_used()
        wait_until(lambda: place.is_free, 2.0)


def test_a_cancelled_read(tmp_path: Path) -> None:
    """Ends as well."""
    with a_place(tmp_path) as place:
        scope, error = CancelScope(), RequestCancelledError("enough")
        file = RemoteFile(f"{place.server.url}/file", place.path)
        download = Download([file], ONE, scope)
        download.prepare()
        place.script.play({None: SILENT})
        running = Running(download.read, 0, 0, 10)
        wait_until(lambda: len(place.server.requests) == 2)
        scope.cancel(error)
        with pytest.raises(RequestCancelledError) as caught:
            running.join()
        assert caught.value is error
        assert download.error is error
        download.close()


def test_what_arrived_before_a_cancel_is_kept(tmp_path: Path) -> None:
    """The next download fetches only the rest."""
    with a_place(tmp_path, bytes_per_s=4e6) as place:
        scope = CancelScope()
        running = Running(place.pull, FOUR, scope)
        wait_until(lambda: place.kept > 0)
        scope.cancel(RequestCancelledError("enough"))
        with pytest.raises(RequestCancelledError):
            running.join()
        place.assert_nothing_is_used()
        again = place.cache.open_download(place.source, FOUR, CancelScope())
        assert again is not None
        kept, asked = again.arrived_bytes, len(place.server.requests)
        assert kept > 0
        again.start()
        again.wait()
        assert place.path.read_bytes() == CONTENT
        assert sent_since(place.server, asked) == SIZE - kept


def test_a_scope_that_was_cancelled_before(place: Place) -> None:
    """Nothing is fetched."""
    scope, error = CancelScope(), OrionError("over")
    scope.cancel(error)
    with pytest.raises(OrionError) as caught:
        place.pull(scope=scope)
    assert caught.value is error
    assert place.server.requests == []
    assert place.is_free


def test_who_waits_is_interrupted(tmp_path: Path) -> None:
    """Ctrl-C, or an error of who is told of the progress, ends the download too."""

    def on_progress(download: Download | None) -> None:
        if download is not None and download.arrived_bytes:
            raise KeyboardInterrupt

    with a_place(tmp_path, bytes_per_s=2e6) as place:
        with pytest.raises(KeyboardInterrupt):
            place.pull(on_progress=on_progress)
        kept = place.kept
        assert 0 < kept < SIZE
        wait_until(lambda: place.is_free, 2.0)
        assert place.server.bytes_sent < SIZE


def test_no_thread_to_fetch_with(place: Place) -> None:
    """That is a `DownloadError`; the file can be had when there are threads again."""
    started = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("orion-"):
            raise RuntimeError("no more threads")
        started(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(DownloadError, match="no more threads"):
            place.pull()
    assert place.pull() == CONTENT


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_nothing_stays_open(place: Place) -> None:
    """When a pull returns, others can have its files; its threads end, and no file of the cache
    stays open until garbage is collected."""

    def open_files() -> list[str]:
        found = []
        for each in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/self/fd/{each}"))
        return [name for name in found if name.startswith(str(place.cache.root))]

    before = set(threading.enumerate())
    gc.disable()
    try:
        place.pull()
        assert place.is_free
        wait_until(lambda: set(threading.enumerate()) <= before)
        assert open_files() == []
    finally:
        gc.enable()


# -- an end by force

PULL = """
import sys
from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.specs import SourceSpec

root, url = sys.argv[1:]
source = SourceSpec(url=url, shards=["file"])
ModelCache(root).pull(source, DownloadConfig(), CancelScope())
"""


def kill_at(place: Place, kept: int) -> int:
    """Let another process fetch, and kill it when so many bytes are here; gives how many were sent
    in vain. The process is held up a little later, so that it cannot get away."""
    asked, before = len(place.server.requests), place.kept
    is_killed = threading.Event()

    def hold(request: LoopbackRequest) -> None:
        if range_of(request).start > kept + CHUNK_BYTES:
            assert is_killed.wait(2 * BOUND_S)

    place.script.hook = hold
    process = subprocess.Popen(
        [sys.executable, "-c", PULL, str(place.cache.root), place.server.url]
    )
    try:
        wait_until(lambda: place.kept >= kept or process.poll() is not None)
        assert process.poll() is None, "it ended by itself"
    finally:
        process.kill()
        process.wait()
        lost = sent_since(place.server, asked) - PROBE - (place.kept - before)
        is_killed.set()
        place.script.hook = lambda _: None
    return lost


LARGE = random.Random(2).randbytes(24 << 20)


def test_a_process_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """Whenever that is, the next one goes on: a kill costs at most one chunk, and what comes in
    the end is right."""
    moments = random.Random(3)
    with a_place(tmp_path, {"file": LARGE}, bytes_per_s=40e6) as place:
        for _ in range(3):
            before = place.kept
            progress = CHUNK_BYTES + moments.randrange(CHUNK_BYTES // 2)
            assert kill_at(place, before + progress) <= CHUNK_BYTES
            assert place.kept >= before + progress
            place.assert_nothing_is_used()
        kept, asked = place.kept, len(place.server.requests)
        assert kept < len(LARGE)
        assert place.pull() == LARGE
        assert sent_since(place.server, asked) == len(LARGE) - kept + PROBE


def test_a_kill_before_the_content_changes(tmp_path: Path) -> None:
    """What the killed process left of the old content is not used."""
    with a_place(tmp_path, {"file": LARGE}, bytes_per_s=40e6) as place:
        kill_at(place, BLOCK_BYTES)
        (place.folder / "new").write_bytes(OTHER)
        (place.folder / "new").replace(place.folder / "file")
        asked = len(place.server.requests)
        assert place.pull() == OTHER
        assert sent_since(place.server, asked) == SIZE + PROBE
