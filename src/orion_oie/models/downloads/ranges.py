"""Requests for ranges of files, and the facts about the whole file in their answers.

Retries nothing and stores nothing; `fetch` does.
"""

import contextlib
import logging
import re
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_oie.config import DownloadConfig
from orion_oie.errors import DownloadError

if TYPE_CHECKING:  # an extra, and slow to import
    import httpx

# Statuses after which the same request may succeed.
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})

_LOGGERS = ("httpx", "httpcore.http11", "httpcore.connection", "httpcore.proxy")
_QUERY = re.compile(r"(https?://[^\s'\"?]*)\?[^\s'\"]*")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)$")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that can be fetched to `path`. `sha256` is its expected digest, None if unknown.

    `headers` and `query` are sent with each request, and never shown: they may hold secrets.
    `revision` is the commit in the file's repository.
    """

    url: str
    path: Path
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    revision: str | None = None
    query: str = field(default="", repr=False, compare=False)

    @property
    def address(self) -> str:
        """The address of a request, with the query."""
        return f"{self.url}?{self.query}" if self.query else self.url


class RangeClient:
    """Connections to servers, for the threads of one download. Raises `DownloadError` when the
    `download` extra is not installed."""

    def __init__(self, config: DownloadConfig) -> None:
        self._client = _client(config)
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._is_over = False

    @contextlib.contextmanager
    def ask(self, file: RemoteFile, start: int, end: int) -> "Iterator[httpx.Response]":
        """Request bytes of a file and yield the response."""
        import httpx

        headers = {
            **file.headers,
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        notes = {"trace": self._note}
        try:
            with (
                _QUIET.asking(),
                self._client.stream(
                    "GET", file.address, headers=headers, extensions=notes
                ) as answer,
            ):
                yield answer
        except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
            raise DownloadError(f"{file.url}: {error}", url=file.url) from error

    def _note(self, event: str, info: Mapping[str, Any]) -> None:
        """Collect the sockets; the HTTP library calls this at each of its steps."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            with self._lock:
                self._sockets.add(info["return_value"].get_extra_info("socket"))
            if self._is_over:
                self.end()

    def end(self) -> None:
        """End all connections, open and future ones: their results are no longer wanted."""
        with self._lock:
            self._is_over = True
            sockets = list(self._sockets)
        for one in sockets:
            with contextlib.suppress(OSError):  # it was closed meanwhile
                # Not the method of an SSL socket, which is not made for other threads.
                socket.socket.shutdown(one, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections. No request may be running."""
        self._client.close()


def total_size(response: "httpx.Response", file: RemoteFile, start: int) -> int:
    """The size of the whole file, from an answer to a ranged request. Raises `DownloadError`."""
    url, status = file.url, response.status_code
    if file.query and status in (400, 401, 403, 410):
        raise DownloadError(
            f"{url}: access denied (status {status}): the signature in the address may have run "
            "out: get a new address, with which the download goes on",
            url=url,
            status=status,
        )
    if status in (401, 403):
        raise DownloadError(
            f"{url}: access denied (status {status}): a token or a licence may be needed",
            url=url,
            status=status,
        )
    if status in (200, 206) and _is_web_page(response):
        raise DownloadError(
            f"{url}: this is a web page, not a file: use the download link, and check the access "
            "rights",
            url=url,
            status=status,
        )
    if status == 200:
        raise DownloadError(
            f"{url}: the server ignores ranges, so that the file can neither be resumed nor "
            "checked as it comes: fetch it by other means and name it with a 'path' source",
            url=url,
            status=status,
        )
    if status != 206:
        raise DownloadError(
            f"{url}: the server answers with status {status}", url=url, status=status
        )
    said = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.match(said)
    if match is None or int(match[1]) != start:
        raise DownloadError(
            f"{url}: the server was asked for bytes from {start} on and says {said!r}", url=url
        )
    return int(match[3])


def _is_web_page(response: "httpx.Response") -> bool:
    kind: str = response.headers.get("Content-Type", "")
    return kind.lower().startswith(("text/html", "application/xhtml"))


def etag_of(response: "httpx.Response", file: RemoteFile) -> str | None:
    """The identifier of the content by its server, if it is a reliable one: the ETag or the date.
    None for a file with a known digest: servers behind one address may disagree on the ETag."""
    if file.sha256:
        return None
    etag: str = response.headers.get("ETag", "")
    is_weak = not etag or etag.startswith("W/")
    return response.headers.get("Last-Modified") if is_weak else etag


def retry_after(response: "httpx.Response") -> float:
    """The pause in seconds that the server asks for, at most a minute; 0 for none."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), 60.0) if said.isdecimal() else 0.0


class _QuietLogs(logging.Filter):
    """Leaves the queries of addresses out of what the HTTP library logs about our requests: its
    logs name each address, also those that a server redirects to. Leaves other requests alone."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = threading.local()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Inside, this thread makes one of our requests."""
        self._of_thread.is_asking = True
        try:
            yield
        finally:
            self._of_thread.is_asking = False

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(self._of_thread, "is_asking", False):
            record.msg = _QUERY.sub(r"\1?...", record.getMessage())
            record.args = ()
        return True


_QUIET = _QuietLogs()


def _client(config: DownloadConfig) -> "httpx.Client":
    try:
        import httpx
    except ImportError as error:
        raise DownloadError(
            "downloads need httpx: pip install 'orion-oie[download]'", extra="download"
        ) from error
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_QUIET)  # once: it is the same filter
    return httpx.Client(
        timeout=config.timeout_s,
        follow_redirects=True,
        limits=httpx.Limits(max_connections=config.connections + 1),
    )
