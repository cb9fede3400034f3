"""The server that tests of downloads rely on: right answers by default, wrong ones where asked for,
never faster than allowed."""

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import loopback
import pytest
from loopback import (
    LoopbackRequest,
    LoopbackServer,
    Misbehaviour,
)

CONTENT = bytes(range(256)) * 40
SIZE = len(CONTENT)
BOUND_S = 20


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=BOUND_S)


def ask(
    connection: http.client.HTTPConnection,
    target: str = "/file",
    headers: Mapping[str, str] | None = None,
    method: str = "GET",
) -> Answer:
    connection.request(method, target, headers=headers or {})
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def ask_once(server: LoopbackServer, *args: Any, **kwargs: Any) -> Answer:
    with closing(connect(server.url)) as connection:
        return ask(connection, *args, **kwargs)


def etag_of(server: LoopbackServer) -> str:
    return ask_once(server, method="HEAD").headers["ETag"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, an empty one and one further down; something secret beside it."""
    folder = tmp_path / "served"
    (folder / "deep").mkdir(parents=True)
    (folder / "file").write_bytes(CONTENT)
    (folder / "empty").write_bytes(b"")
    (folder / "deep" / "a b").write_bytes(b"deep")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "served-not").mkdir()
    (tmp_path / "served-not" / "secret").write_bytes(b"secret")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[LoopbackServer]:
    with LoopbackServer(folder) as server:
        yield server


# -- right answers


def test_a_whole_file(server: LoopbackServer, capfd: pytest.CaptureFixture[str]) -> None:
    """Its bytes and its headers; HEAD has the same headers. Nothing is printed."""
    got = ask_once(server)
    assert (got.status, got.body) == (200, CONTENT)
    assert got.headers["Content-Length"] == str(SIZE)
    assert got.headers["Accept-Ranges"] == "bytes"
    head = ask_once(server, method="HEAD", headers={"Range": "bytes=0-1"})
    assert (head.status, head.body) == (200, b"")
    for name in ("Content-Length", "Accept-Ranges", "ETag"):
        assert head.headers[name] == got.headers[name]
    assert ask_once(server, method="DELETE").status == 501
    assert capfd.readouterr() == ("", "")


def test_a_connection_is_kept(server: LoopbackServer) -> None:
    """Many requests go over one, whatever the answers were."""
    with closing(connect(server.url)) as connection:
        connection.connect()
        ours = connection.sock
        for target in ("/file", "/nothing", "/empty", "/deep/a%20b?signed=1", "/file"):
            ask(connection, target)
            ask(connection, target, method="HEAD")
            assert connection.sock is ours


@pytest.mark.parametrize(
    ("header", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=100-", 100, SIZE - 1),
        (f"bytes=5-{SIZE * 9}", 5, SIZE - 1),
        ("bytes=-7", SIZE - 7, SIZE - 1),
        (f"bytes=-{SIZE * 9}", 0, SIZE - 1),
    ],
)
def test_a_range(server: LoopbackServer, header: str, first: int, last: int) -> None:
    """The part that was asked for, as far as the file goes."""
    got = ask_once(server, headers={"Range": header})
    assert (got.status, got.body) == (206, CONTENT[first : last + 1])
    assert got.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert got.headers["Content-Length"] == str(last - first + 1)


@pytest.mark.parametrize(
    ("target", "header"),
    [
        ("/file", f"bytes={SIZE}-"),
        ("/file", f"bytes={SIZE}-{SIZE + 5}"),
        ("/file", "bytes=-0"),
        ("/empty", "bytes=0-"),
        ("/empty", "bytes=-5"),
    ],
)
def test_a_range_behind_the_end(server: LoopbackServer, target: str, header: str) -> None:
    """416 and the size of the file."""
    got = ask_once(server, target, {"Range": header})
    size = SIZE if target == "/file" else 0
    assert (got.status, got.body) == (416, b"")
    assert got.headers["Content-Range"] == f"bytes */{size}"


@pytest.mark.parametrize("header", ["bytes=", "bytes=-", "bytes=9-5", "bytes=1-2,4-5", "lines=1-2"])
def test_a_range_that_is_none(server: LoopbackServer, header: str) -> None:
    """Ignored."""
    got = ask_once(server, headers={"Range": header})
    assert (got.status, got.body) == (200, CONTENT)
    assert server.requests[0].range is None


def test_if_range(server: LoopbackServer, folder: Path) -> None:
    """A part only of the version that is meant: else the whole file."""
    etag = etag_of(server)
    asked = {"Range": "bytes=3-5", "If-Range": etag}
    assert ask_once(server, headers=asked).body == CONTENT[3:6]
    for other in ('"other"', f"W/{etag}", "Sat, 01 Jan 2000 00:00:00 GMT"):
        got = ask_once(server, headers={**asked, "If-Range": other})
        assert (got.status, got.body) == (200, CONTENT)
    (folder / "new").write_bytes(CONTENT[::-1])
    (folder / "new").replace(folder / "file")
    got = ask_once(server, headers=asked)
    assert (got.status, got.body) == (200, CONTENT[::-1])
    assert got.headers["ETag"] != etag


def test_an_etag_is_of_a_version(server: LoopbackServer, folder: Path) -> None:
    """Another time, another ETag; the same file, the same one."""
    etag = etag_of(server)
    assert etag == etag_of(server)
    assert etag.startswith('"')
    assert etag.endswith('"')
    os.utime(folder / "file", ns=(1, 1))
    assert etag_of(server) != etag


@pytest.mark.parametrize(
    "target",
    [
        "/nothing",
        "/",
        "/deep",
        "/../secret",
        "/%2e%2e/secret",
        "/deep/../../secret",
        "/../served-not/secret",
        "//etc/hostname",
        "/way-out",
        "/round",
        "/%00",
        "/" + "long" * 1000,
    ],
)
def test_what_is_not_served(server: LoopbackServer, folder: Path, target: str) -> None:
    """404 for what is not there, is no file, or lies outside."""
    (folder / "way-out").symlink_to(folder.parent / "secret")
    (folder / "round").symlink_to(folder / "round")
    got = ask_once(server, target)
    assert (got.status, got.body) == (404, b"")


def test_files_further_down(server: LoopbackServer, folder: Path) -> None:
    """Names are unquoted, queries ignored, links inside the folder followed."""
    (folder / "link").symlink_to(folder / "deep" / "a b")
    assert ask_once(server, "/deep/a%20b?token=x/../y").body == b"deep"
    assert ask_once(server, "/link").body == b"deep"


def test_what_was_asked_for(server: LoopbackServer) -> None:
    """Every request is there, in order, with what it asked for and got."""
    for header in ("bytes=2-4", "bytes=10-", "bytes=-6"):
        ask_once(server, "/file?a=b", {"Range": header, "X-Trace": "Me"})
    ask_once(server, method="HEAD")
    ask_once(server, "/nothing")
    assert [request.range for request in server.requests] == [
        (2, 4),
        (10, None),
        (None, 6),
        None,
        None,
    ]
    assert [request.method for request in server.requests] == ["GET"] * 3 + ["HEAD", "GET"]
    assert [request.sent for request in server.requests] == [3, SIZE - 10, 6, 0, 0]
    assert server.bytes_sent == 3 + SIZE - 10 + 6
    assert server.requests[0].path == "/file?a=b"
    assert server.requests[0].headers["x-trace"] == "Me"


# -- speed


def write(folder: Path, size: int) -> None:
    (folder / "large").write_bytes(bytes(size))


def test_the_limit(folder: Path) -> None:
    """2 MB at 4 MB/s, in one piece and in two at once."""
    write(folder, 2_000_000)
    with LoopbackServer(folder, bytes_per_s=4e6) as server:
        started = time.monotonic()
        assert len(ask_once(server, "/large").body) == 2_000_000
        assert time.monotonic() - started >= 0.4

        halves: list[int] = []
        started = time.monotonic()
        threads = [
            threading.Thread(
                target=lambda part=part: halves.append(
                    len(ask_once(server, "/large", {"Range": part}).body)
                )
            )
            for part in ("bytes=0-999999", "bytes=1000000-")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started >= 0.4
        assert halves == [1_000_000, 1_000_000]


def test_many_small_requests_obey_the_limit(folder: Path) -> None:
    """Beginning anew is no way around it, nor is a pause between two requests."""
    write(folder, 2_000_000)
    with LoopbackServer(folder, bytes_per_s=4e6) as server:
        started = time.monotonic()
        with closing(connect(server.url)) as connection:
            for start in range(0, 1_600_000, 16_000):
                ask(connection, "/large", {"Range": f"bytes={start}-{start + 15_999}"})
        assert time.monotonic() - started >= 0.3


def test_the_limit_of_a_connection(folder: Path) -> None:
    """It holds for each one alone."""
    write(folder, 1_000_000)
    with LoopbackServer(folder, connection_bytes_per_s=2e6) as server:
        started = time.monotonic()
        ask_once(server, "/large")
        assert time.monotonic() - started >= 0.4


def test_connections_share_the_limit(folder: Path) -> None:
    """While one gets its bytes, another gets about as many."""
    write(folder, 2_000_000)
    with LoopbackServer(folder, bytes_per_s=4e6) as server, closing(connect(server.url)) as first:
        first.request("GET", "/large")
        response = first.getresponse()
        response.read(1)
        before = server.requests[0].sent
        ask_once(server, "/large", {"Range": "bytes=-300000"})
        meanwhile = server.requests[0].sent - before
        assert meanwhile >= 100_000
        assert len(response.read()) == 1_999_999


# -- wrong answers


@pytest.mark.parametrize(
    ("wrong", "status", "headers", "body"),
    [
        (Misbehaviour(), 206, {"Content-Range": f"bytes 2-5/{SIZE}"}, CONTENT[2:6]),
        (Misbehaviour(status=503, headers={"Retry-After": "7"}), 503, {"Retry-After": "7"}, b""),
        (Misbehaviour(status=403, body=b"no"), 403, {"Content-Length": "2"}, b"no"),
        (Misbehaviour(ignore_range=True), 200, {"Content-Length": str(SIZE)}, CONTENT),
        (Misbehaviour(body=b"<html>"), 206, {"Content-Length": "6"}, b"<html>"),
        (Misbehaviour(claimed_size=9), 206, {"Content-Range": "bytes 2-5/9"}, CONTENT[2:6]),
        (Misbehaviour(etag='"x"'), 206, {"ETag": '"x"'}, CONTENT[2:6]),
        (Misbehaviour(redirect="/other"), 302, {"Location": "/other"}, b""),
        (Misbehaviour(redirect="/other", status=307), 307, {"Location": "/other"}, b""),
        (Misbehaviour(headers={"etag": "mine"}), 206, {"ETag": "mine"}, CONTENT[2:6]),
    ],
)
def test_a_wrong_answer(
    folder: Path, wrong: Misbehaviour, status: int, headers: dict[str, str], body: bytes
) -> None:
    """Every one is as it was asked for, and the connection stays usable."""
    asked: list[LoopbackRequest] = []

    def misbehave(request: LoopbackRequest) -> Misbehaviour | None:
        asked.append(request)
        return wrong if len(asked) == 1 else None

    with (
        LoopbackServer(folder, misbehave=misbehave, headers={"X-Always": "1"}) as server,
        closing(connect(server.url)) as connection,
    ):
        got = ask(connection, headers={"Range": "bytes=2-5"})
        assert (got.status, got.body) == (status, body)
        assert got.headers["X-Always"] == "1"
        for name, value in headers.items():
            assert got.headers.get_all(name) == [value]
        assert ask(connection).body == CONTENT
        assert asked == server.requests


def test_a_claimed_size(folder: Path) -> None:
    """HEAD tells it too; a whole file is still sent whole."""
    with LoopbackServer(folder, misbehave=lambda _: Misbehaviour(claimed_size=5)) as server:
        assert ask_once(server, method="HEAD").headers["Content-Length"] == "5"
        assert ask_once(server).body == CONTENT


def test_another_etag(folder: Path) -> None:
    """If-Range is compared with it; an empty one is none."""
    etags = iter(['"x"', '"x"', 'W/"x"', ""])
    with LoopbackServer(folder, misbehave=lambda _: Misbehaviour(etag=next(etags))) as server:
        for condition, status in (('"x"', 206), ('"y"', 200), ('W/"x"', 200)):
            got = ask_once(server, headers={"Range": "bytes=1-2", "If-Range": condition})
            assert got.status == status
        assert "ETag" not in ask_once(server).headers


@pytest.mark.parametrize("after", [0, 1000])
def test_a_cut(folder: Path, after: int) -> None:
    """The connection ends after this many bytes of the body, and the server goes on."""
    wrongs = iter([Misbehaviour(cut_after=after), None])
    with LoopbackServer(folder, misbehave=lambda _: next(wrongs)) as server:
        with pytest.raises(http.client.IncompleteRead) as caught:
            ask_once(server)
        assert caught.value.partial == CONTENT[:after]
        assert server.bytes_sent == after
        assert ask_once(server).body == CONTENT


def test_a_delay(folder: Path) -> None:
    """The answer waits; the request is known at once."""
    with (
        LoopbackServer(folder, misbehave=lambda _: Misbehaviour(delay_s=0.2)) as server,
        closing(connect(server.url)) as connection,
    ):
        started = time.monotonic()
        assert ask(connection).body == CONTENT
        assert time.monotonic() - started >= 0.2


# -- the end


def test_closing_cuts_transfers(folder: Path) -> None:
    """What a client got until then is counted; no thread stays, and no port."""
    write(folder, 1_000_000)
    threads = threading.active_count()
    server = LoopbackServer(folder, bytes_per_s=10_000)
    with closing(connect(server.url)) as busy, closing(connect(server.url)) as idle:
        idle.connect()
        busy.request("GET", "/large")
        response = busy.getresponse()
        response.read(1)
        server.close()
        assert threading.active_count() == threads
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        assert server.bytes_sent == 1 + len(caught.value.partial) < 1_000_000
    with pytest.raises(ConnectionRefusedError):
        ask_once(server)


def test_closing_ends_delays(folder: Path) -> None:
    """An answer that waits is never given."""
    arrived = threading.Event()

    def misbehave(_: LoopbackRequest) -> Misbehaviour:
        arrived.set()
        return Misbehaviour(delay_s=600)

    server = LoopbackServer(folder, misbehave=misbehave)
    with closing(connect(server.url)) as connection:
        connection.request("GET", "/file")
        assert arrived.wait(BOUND_S)
        server.close()
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()


def test_a_client_that_goes_away(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ends its transfer only, and prints nothing."""
    write(folder, 40_000_000)
    with LoopbackServer(folder) as server:
        connection = connect(server.url)
        connection.request("GET", "/large")
        connection.getresponse().close()
        connection.close()
        assert ask_once(server).body == CONTENT
    assert server.requests[0].sent < 40_000_000
    assert capfd.readouterr() == ("", "")


def test_a_file_that_shrinks(folder: Path) -> None:
    """The transfer is cut where the file ends by then."""
    write(folder, 1_000_000)
    with LoopbackServer(folder, bytes_per_s=1e5) as server, closing(connect(server.url)) as client:
        client.request("GET", "/large")
        response = client.getresponse()
        os.truncate(folder / "large", 10_000)
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        assert server.bytes_sent == len(caught.value.partial) < 1_000_000


def test_a_server_of_its_own(folder: Path) -> None:
    """As a process: its URL first, then files at its speed until its standard input ends."""
    write(folder, 400_000)
    command = [sys.executable, loopback.__file__, str(folder)]
    process = subprocess.Popen(
        [*command, "--mb-per-s", "1", "--connection-mb-per-s", "50"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with closing(connect(url)) as connection:
        started = time.monotonic()
        assert len(ask(connection, "/large").body) == 400_000
        assert time.monotonic() - started >= 0.3
        assert process.communicate(timeout=BOUND_S) == ("", "")  # closes its standard input
    assert process.returncode == 0
