"""A small HTTP file server on 127.0.0.1, for tests and benchmarks of downloads.

Serves at a limited speed and misbehaves on request. It is no server for anyone else: no TLS, no
passwords, no folder listings, one range per request. `python tests/loopback.py FOLDER` runs it as a
process, which prints its URL and ends when its standard input is closed.
"""

import argparse
import os
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

_PIECE_S = 0.002  # what one piece takes at the lowest limit
_PIECE_BYTES = (1 << 10, 256 << 10)  # the smallest and the largest piece
# A thread that woke up late may catch up by this much. More would be a burst that no link of this
# speed delivers, less would make the limit slower than it says.
_CATCH_UP_S = 0.02
_STOP_POLL_S = 0.02
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(eq=False)
class LoopbackRequest:
    """A GET or HEAD request.

    `path` is the whole request target, with its query; `range` the two numbers of the header:
    (a, b), (a, None) or (None, n), None without a single valid range; names in `headers` are in
    lower case. `sent` counts the bytes of the body that were sent so far: never less than the
    client has got, but some may still lie in the buffers of the connection.
    """

    method: str
    path: str
    range: tuple[int | None, int | None] | None
    headers: dict[str, str]
    sent: int = 0


@dataclass(frozen=True)
class Misbehaviour:
    """How the answer to one request differs from the right one. All fields can be combined."""

    status: int | None = None
    """Answer with this status and an empty body, whatever was asked for."""
    redirect: str | None = None
    """Answer with 302 (or `status`), this Location and an empty body."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent in addition to the usual headers, and instead of those with the same name."""
    body: bytes | None = None
    """The body is this, and Content-Length its length; status and other headers stay."""
    ignore_range: bool = False
    """Answer with 200 and the whole file."""
    claimed_size: int | None = None
    """The size of the file, according to Content-Range and to the Content-Length of HEAD."""
    etag: str | None = None
    """The ETag of the file, with its quotes, for If-Range too; an empty one is left out."""
    cut_after: int | None = None
    """Close the connection after this many bytes of the body."""
    delay_s: float = 0.0
    """Wait before answering."""


Misbehave = Callable[[LoopbackRequest], Misbehaviour | None]
"""Called with each request, in the thread of its connection; None for the right answer. It may
block, but closing the server waits for it."""


class LoopbackServer:
    """Serves the files of a folder on 127.0.0.1, at a limited speed. A context manager.

    `bytes_per_s` is shared by all connections, a piece for each in turn; `connection_bytes_per_s`
    limits each connection by itself. Both count bodies only. `headers` are sent with every
    answer. Symbolic links that leave the folder are not followed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bytes_per_s: float | None = None,
        connection_bytes_per_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        misbehave: Misbehave | None = None,
    ) -> None:
        limits = (bytes_per_s, connection_bytes_per_s)
        self._server = _Server(folder, limits, headers or {}, misbehave)
        self.requests = self._server.requests
        """All requests, each added before it is answered."""
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        """Without a slash at its end."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_STOP_POLL_S,), daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "LoopbackServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def bytes_sent(self) -> int:
        """Bytes of bodies that were sent, for all of `requests`."""
        return sum(request.sent for request in list(self.requests))

    def close(self) -> None:
        """Stop serving; transfers in progress are cut. Afterwards nothing changes any more."""
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()


class _Link:
    """A line of limited speed: says when what is put on it has gone through."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._senders = 0

    @contextmanager
    def sender(self) -> Iterator[None]:
        """Inside, a body is sent. The time before the first one is no reason to catch up."""
        with self._lock:
            if self._senders == 0:
                self._free_at = max(self._free_at, time.monotonic())
            self._senders += 1
        try:
            yield
        finally:
            with self._lock:
                self._senders -= 1

    def put(self, size: int) -> float:
        """Put a piece of `size` bytes behind those that wait already; returns the seconds until
        it has gone through, at most 0 when it is late already."""
        if self._bytes_per_s is None:
            return 0.0
        now = time.monotonic()
        with self._lock:
            self._free_at = max(self._free_at, now - _CATCH_UP_S) + size / self._bytes_per_s
            return self._free_at - now


class _Server(socketserver.TCPServer):
    """One thread for each connection. Unlike the mix-in of the standard library it can end them,
    and an error of a thread is raised there instead of printed."""

    request_queue_size = 128

    def __init__(
        self,
        folder: Path,
        limits: tuple[float | None, float | None],
        headers: Mapping[str, str],
        misbehave: Misbehave | None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = os.path.realpath(folder)
        self.limits = limits
        self.link = _Link(limits[0])
        self.headers = headers
        self.misbehave = misbehave
        self.requests: list[LoopbackRequest] = []
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._is_ending = threading.Event()

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._serve, args=(request, client_address), daemon=True)
        self._connections[thread] = request
        thread.start()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            with suppress(OSError):  # the client went away, or the server ends
                self.finish_request(request, client_address)
        finally:
            self.shutdown_request(request)
            del self._connections[threading.current_thread()]

    def wait(self, seconds: float) -> None:
        """Wait. Raises `ConnectionAbortedError` when the server ends meanwhile."""
        if seconds > 0 and self._is_ending.wait(seconds):
            raise ConnectionAbortedError

    def end_connections(self) -> None:
        """End all connections; none may begin meanwhile."""
        self._is_ending.set()
        for thread, connection in list(self._connections.items()):
            with suppress(OSError):  # ended by itself just now
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def open(self, target: str) -> BinaryIO | None:
        """The file of the folder that a request target names; None when there is none."""
        name = unquote(urlsplit(target).path).lstrip("/")
        try:
            path = Path(os.path.realpath(os.path.join(self.folder, name), strict=True))
            if path.is_relative_to(self.folder) and path.is_file():
                return path.open("rb")
        except (OSError, ValueError):  # no such file, or no name of a file at all
            pass
        return None


@dataclass
class _Answer:
    """A status, headers, and a part of a file or of some bytes as the body."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    source: BinaryIO | memoryview = field(default_factory=lambda: memoryview(b""))
    start: int = 0
    size: int = 0


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a short body waits for the receipt of its headers

    def setup(self) -> None:
        super().setup()
        self._link = _Link(self.server.limits[1])

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = _parse_range(headers.get("range", ""))
        request = LoopbackRequest(self.command, self.path, asked, headers)
        self.server.requests.append(request)
        wrong = self.server.misbehave(request) if self.server.misbehave else None
        wrong = wrong or Misbehaviour()
        self.server.wait(wrong.delay_s)
        file = self.server.open(request.path)
        try:
            answer = _answer(request, file, wrong)
            if wrong.body is not None:
                answer.source, answer.start = memoryview(wrong.body), 0
                answer.size = len(wrong.body)
            self._send_headers(answer, wrong)
            if request.method == "GET":
                self._send_body(request, answer, wrong.cut_after)
        finally:
            if file is not None:
                file.close()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass  # prints, in the base class

    def _send_headers(self, answer: _Answer, wrong: Misbehaviour) -> None:
        size = answer.size
        if self.command == "HEAD" and answer.status == HTTPStatus.OK:
            size = size if wrong.claimed_size is None else wrong.claimed_size
        headers = {**answer.headers, "Content-Length": str(size)}
        for extra in (self.server.headers, wrong.headers):
            replaced = {name.lower() for name in extra}
            headers = {
                name: value for name, value in headers.items() if name.lower() not in replaced
            }
            headers.update(extra)
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_body(self, request: LoopbackRequest, answer: _Answer, cut_after: int | None) -> None:
        size = answer.size if cut_after is None else min(answer.size, cut_after)
        rates = [rate for rate in self.server.limits if rate is not None]
        smallest, largest = _PIECE_BYTES
        largest = min([largest, *(max(smallest, int(rate * _PIECE_S)) for rate in rates)])
        with self.server.link.sender(), self._link.sender():
            while request.sent < size:
                piece = min(largest, size - request.sent)
                self.server.wait(self._link.put(piece))
                self.server.wait(self.server.link.put(piece))
                if not self._send_piece(request, answer, piece):
                    break
        if cut_after is not None or request.sent < answer.size:
            self.close_connection = True

    def _send_piece(self, request: LoopbackRequest, answer: _Answer, size: int) -> bool:
        """False when the file is shorter than it was."""
        offset, left = answer.start + request.sent, size
        request.sent += size  # not afterwards: who got these bytes must find them counted
        try:
            while left:
                if isinstance(answer.source, memoryview):
                    sent = self.connection.send(answer.source[offset : offset + left])
                else:
                    sent = os.sendfile(
                        self.connection.fileno(), answer.source.fileno(), offset, left
                    )
                if not sent:
                    break
                offset += sent
                left -= sent
        finally:
            request.sent -= left
        return not left


def _parse_range(header: str) -> tuple[int | None, int | None] | None:
    """The numbers of `bytes=a-b`, `bytes=a-` or `bytes=-n`. None when it is none of them: several
    ranges, or nonsense, either of which a server may ignore."""
    found = _RANGE.fullmatch(header.strip())
    if not found:
        return None
    first, last = (int(number) if number else None for number in found.groups())
    is_nothing = first is None and last is None
    is_backwards = first is not None and last is not None and last < first
    return None if is_nothing or is_backwards else (first, last)


def _answer(request: LoopbackRequest, file: BinaryIO | None, wrong: Misbehaviour) -> _Answer:
    if wrong.redirect is not None:
        return _Answer(wrong.status or HTTPStatus.FOUND, {"Location": wrong.redirect})
    if wrong.status is not None:
        return _Answer(wrong.status)
    if file is None:
        return _Answer(HTTPStatus.NOT_FOUND)

    found = os.fstat(file.fileno())
    size = found.st_size
    etag = wrong.etag
    if etag is None:
        etag = f'"{size:x}-{found.st_mtime_ns:x}-{found.st_ino:x}"'
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if etag:
        headers["ETag"] = etag

    asked = None if wrong.ignore_range or request.method == "HEAD" else request.range
    condition = request.headers.get("if-range")
    if condition is not None and (condition != etag or not etag.startswith('"')):
        asked = None
    if asked is None:
        return _Answer(HTTPStatus.OK, headers, file, 0, size)

    first, last = asked
    if first is None:
        first, last = max(0, size - (last or 0)), None
    total = size if wrong.claimed_size is None else wrong.claimed_size
    if first >= size:
        headers["Content-Range"] = f"bytes */{total}"
        return _Answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers)
    last = size - 1 if last is None else min(last, size - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{total}"
    return _Answer(HTTPStatus.PARTIAL_CONTENT, headers, file, first, last - first + 1)


def main() -> None:
    """Serve a folder until standard input ends, so that no server outlives who started it."""
    parser = argparse.ArgumentParser(description="Serve the files of a folder on 127.0.0.1.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mb-per-s", type=float, metavar="X", help="10^6 bytes/s, in all")
    parser.add_argument(
        "--connection-mb-per-s", type=float, metavar="Y", help="10^6 bytes/s, each connection"
    )
    options = parser.parse_args()
    in_all, each = (
        None if limit is None else limit * 1e6
        for limit in (options.mb_per_s, options.connection_mb_per_s)
    )
    with (
        suppress(KeyboardInterrupt),
        LoopbackServer(options.folder, bytes_per_s=in_all, connection_bytes_per_s=each) as server,
    ):
        print(server.url, flush=True)
        for _ in sys.stdin.buffer:
            pass


if __name__ == "__main__":
    main()
