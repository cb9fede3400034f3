"""Files fetched over HTTP: several ranges at once, resumed after any end, checked before use.

    prepare:  probe -> resume, or allocate -> start: fetch, hash -> check -> rename

A file is called `NAME.part` until it is complete and its SHA-256 is right. `NAME.part.map` records
the blocks that have arrived, so that a download that was killed can be resumed. This module knows
nothing of models: a caller that needs the bytes in some order names that order.
"""

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.errors import DigestMismatchError, DownloadError, RequestCancelledError, described
from orion_oie.models.downloads.arrival import (
    ArrivalMap,
    ArrivalState,
)
from orion_oie.models.downloads.pace import (
    Meter,
    Pace,
)
from orion_oie.models.downloads.parts import (
    Part,
    Run,
    disk_error,
    facts_of,
    map_path,
    part_path,
    remove_part,
    resumed,
)
from orion_oie.models.downloads.ranges import (
    RETRIED,
    RangeClient,
    RemoteFile,
    etag_of,
    retry_after,
    total_size,
)
from orion_oie.schemas.units import size_text
from orion_oie.threads import Event

if TYPE_CHECKING:  # an extra, and slow to import
    import httpx

# One request asks for at most this much: enough to make round trips cheap, little enough that
# parallel ranges arrive nearly in order. Towards the end the ranges become smaller, so that the
# bytes that arrive last are those that were requested last.
CHUNK_BYTES = 4 << 20
SMALLEST_CHUNK_BYTES = 512 << 10
_CHUNKS_LEFT = 16
_HASH_BYTES = 256 << 10
_POLL_S = 0.01
_READ_AHEAD_BYTES = 2 << 20
_LONGEST_HOLD_S = 0.5  # between checks for the end of the download
_SHORTEST_BACKOFF_S = 0.25
_LONGEST_BACKOFF_S = 20.0
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Fetched:
    """A complete file: its size in bytes, its SHA-256, and the ETag that the server gave it."""

    file: RemoteFile
    size: int
    sha256: str
    etag: str | None


@dataclass(eq=False)
class _Chunk:
    """A range of missing bytes. `start` moves on as they arrive."""

    part: Part
    start: int
    end: int


_Result = TypeVar("_Result")


class _PassingError(Exception):
    """A failure after which the same request may succeed. `wait_s` is the pause that the server
    asks for; `count` is the number of failures in a row."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.count = 0


class Download:
    """Some files, fetched together. The caller holds their locks.

    1. `prepare` asks the server for the sizes and allocates the files.
    2. `read` returns any bytes, and fetches those that are missing.
    3. `start` fetches the rest in the background, in the given order.
    4. `wait` waits for the end.

    A cancelled or failed download leaves the bytes that have arrived for the next one.
    `on_checked(fetched)` is called for each complete file before it gets its name; an error that it
    raises ends the download. `on_closed()` is called after the last write.
    """

    def __init__(
        self,
        files: Sequence[RemoteFile],
        config: DownloadConfig,
        scope: CancelScope,
        on_checked: Callable[[Fetched], None] = lambda _fetched: None,
        on_closed: Callable[[], None] = lambda: None,
    ) -> None:
        self._files = files
        self._config = config
        self._scope = scope
        self._on_checked = on_checked
        self._on_closed = on_closed
        self._closed = Event()
        self._parts: list[Part] = []
        self._client = RangeClient(config)
        self._pace = Pace(config.bytes_per_s)
        self._meter = Meter()
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._chunks: deque[_Chunk] = deque()  # ranges to request
        self._chunk_bytes = 0
        self._running = 0
        self._error: BaseException | None = None
        self._ended = Event()
        self._may_rename = Event()
        self._may_rename.set()
        self._undo = scope.on_cancel(self._end)

    # -- the files

    def prepare(self) -> list[int]:
        """Ask for the sizes of the files and allocate them; return the sizes in bytes.

        Raises `DownloadError`, or the error that the scope was cancelled with.
        """
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            try:
                self._allocate()
            except OSError as error:
                raise disk_error(error, self._files[0].path) from error
            on_error.pop_all()
        return self.sizes

    @property
    def sizes(self) -> list[int]:
        """The size of each file in bytes."""
        return [part.size for part in self._parts]

    @property
    def paths(self) -> list[Path]:
        """The final path of each file."""
        return [part.file.path for part in self._parts]

    @property
    def total_bytes(self) -> int:
        return sum(part.size for part in self._parts)

    @property
    def arrived_bytes(self) -> int:
        return sum(part.arrival.arrived_bytes for part in self._parts)

    @property
    def bytes_per_s(self) -> float:
        """The speed of the last seconds."""
        return self._meter.bytes_per_s

    @property
    def maps(self) -> list[ArrivalMap]:
        """The map of each file."""
        return [part.arrival for part in self._parts]

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a file; missing ones are fetched. Raises the same errors as `prepare`."""
        part = self._parts[number]
        try:
            return self._read(part, offset, length)
        except OSError as error:
            raise disk_error(error, part.file.path) from error

    def _read(self, part: Part, offset: int, length: int) -> bytes:
        end = min(offset + length, part.size)
        for block in _blocks(part.arrival, offset, end):
            if part.arrival.has_block(block):
                continue
            start = part.arrival.bounds(block)[0]
            ahead = _blocks(part.arrival, start, min(start + _READ_AHEAD_BYTES, part.size))
            missing = itertools.takewhile(lambda b: not part.arrival.has_block(b), ahead)
            chunk = _Chunk(part, start, part.arrival.bounds(max(missing))[1])
            self._fetch_chunk(chunk)
        return os.pread(part.descriptor, length, offset)

    # -- the whole download

    def start(self, runs: Iterable[Run] | None = None) -> None:
        """Fetch the missing bytes in the background: first `runs` in their order, then the rest."""
        whole = [(number, 0, part.size) for number, part in enumerate(self._parts)]
        seen: set[tuple[int, int]] = set()
        for number, start, end in [*(runs or []), *whole]:
            self._add_missing(number, start, end, seen)
        self._chunk_bytes = sum(chunk.end - chunk.start for chunk in self._chunks)
        works = [("orion-fetch", self._fetch_all)] * self._config.connections
        works.append(("orion-hash", self._check_all))
        self._running = len(works)
        for name, work in works:
            try:
                threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()
            except RuntimeError as error:
                self._fail(DownloadError(f"the system gives no thread to fetch with: {error}"))
                self._leave()

    def _add_missing(self, number: int, start: int, end: int, seen: set[tuple[int, int]]) -> None:
        """Queue the missing blocks of a run that are not queued yet."""
        part = self._parts[number]
        for block in _blocks(part.arrival, start, end):
            if (number, block) in seen or part.arrival.has_block(block):
                continue
            seen.add((number, block))
            first, last = part.arrival.bounds(block)
            before = self._chunks[-1] if self._chunks else None
            if before is not None and before.part is part and before.end == first:
                before.end = last
            else:
                self._chunks.append(_Chunk(part, first, last))

    def _next_chunk(self) -> _Chunk | None:
        with self._lock:
            if not self._chunks:
                return None
            run = self._chunks[0]
            block = run.part.arrival.block_bytes
            most = min(CHUNK_BYTES, max(SMALLEST_CHUNK_BYTES, self._chunk_bytes // _CHUNKS_LEFT))
            end = min(run.end, (run.start // block + max(1, most // block)) * block)
            chunk = _Chunk(run.part, run.start, end)
            run.start = end
            if run.start == run.end:
                self._chunks.popleft()
            self._chunk_bytes -= end - chunk.start
            return chunk

    def hold(self) -> None:
        """Keep the files under their `.part` names until `release`: a worker is about to open
        them."""
        self._may_rename.clear()

    def release(self) -> None:
        """Give the files their names as soon as they are complete."""
        self._may_rename.set()

    def wait(
        self,
        on_progress: Callable[[], None] = lambda: None,
        interval_s: float = 0.1,
    ) -> None:
        """Wait until all files have their names. `on_progress` is called every `interval_s`.

        Raises `DownloadError`, `DigestMismatchError`, or the error that the scope was cancelled
        with. An exception that interrupts the wait, such as Ctrl-C, ends the download.
        """
        try:
            while not self._ended.wait(interval_s):
                on_progress()
        except BaseException as error:
            self._fail(error)
            raise
        self._closed.wait(_LONGEST_HOLD_S)  # so that the next caller can take the locks
        self._scope.check()
        if self._error is not None:
            raise self._error
        on_progress()

    @property
    def error(self) -> BaseException | None:
        """The error that ended the download, or None."""
        return self._error or self._scope.error

    def discard(self) -> None:
        """Remove the bytes that have arrived. Only before `start`."""
        for part in self._parts:
            self._discard(part)
        self.close()

    def close(self) -> None:
        """Release everything; the bytes that have arrived stay. Only while no thread runs."""
        if self._closed.is_set():
            return
        self._undo()
        self._client.close()
        for part in self._parts:
            with contextlib.suppress(OSError):
                os.close(part.descriptor)
        self._on_closed()
        self._closed.set()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._fail(disk_error(error, self._parts[0].file.path))
        except BaseException as error:  # noqa: BLE001 (raised by `wait`)
            self._fail(error)
        self._leave()

    def _leave(self) -> None:
        """End one thread. The last one releases everything before it announces the end."""
        with self._lock:
            self._running -= 1
            is_last = self._running == 0
        if is_last:
            self.close()
            self._ended.set()

    def _fail(self, error: BaseException) -> None:
        """End the download; the first error is the one that is reported."""
        with self._lock:
            self._error = self._error or error
        if not isinstance(error, RequestCancelledError):
            for part in self._parts:
                part.arrival.state = ArrivalState.FAILED
        self._end()

    def _end(self) -> None:
        """Wake all threads: those that wait for the end, and those that wait for the server."""
        self._ended.set()
        self._client.end()

    def _stop_if_over(self) -> None:
        self._scope.check()
        if self._error is not None:
            raise RequestCancelledError("another part of the download failed")

    def _fetch_all(self) -> None:
        while (chunk := self._next_chunk()) is not None:
            self._fetch_chunk(chunk)

    # -- attempts

    def _retry(
        self, attempt: Callable[[], _Result], position: Callable[[], int] = lambda: 0
    ) -> _Result:
        """Repeat an attempt, with growing pauses, until it succeeds; return its result.

        Raises the last `_PassingError` after more than `retries` failures in a row. A failed
        attempt that moved `position` forward restarts the count.
        """
        import httpx

        failures = 0
        while True:
            self._stop_if_over()
            before = position()
            try:
                return attempt()
            except httpx.TransportError as error:
                failure = _PassingError(described(error))
            except _PassingError as error:
                failure = error
            self._stop_if_over()
            failures = 0 if position() > before else failures + 1
            if failures > self._config.retries:
                failure.count = failures
                raise failure
            backoff_s = min(_LONGEST_BACKOFF_S, _SHORTEST_BACKOFF_S * 2.0**failures)
            # Threads that failed together should not come back together.
            self._pause(max(failure.wait_s, backoff_s * random.uniform(0.5, 1.0)))

    def _pause(self, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0:
            self._stop_if_over()
            if self._ended.wait(min(left, 0.2)):
                self._stop_if_over()

    # -- one range

    def _fetch_chunk(self, chunk: _Chunk) -> None:
        """Fetch a range; after a passing failure, continue where it ended."""
        try:
            self._retry(lambda: self._request(chunk), lambda: chunk.start)
        except _PassingError as error:
            url = chunk.part.file.url
            raise DownloadError(
                f"{url} failed {error.count} times in a row at byte {chunk.start} "
                f"({error}); what arrived is kept: try again later",
                url=url,
                offset=chunk.start,
            ) from error

    def _request(self, chunk: _Chunk) -> None:
        """Request the missing bytes of a range once. Raises `_PassingError`."""
        part = chunk.part
        if chunk.start == chunk.end:  # the last request failed after its last byte
            return
        with self._client.ask(part.file, chunk.start, chunk.end) as response:
            _check_passing(response)
            size = total_size(response, part.file, chunk.start)
            if size != part.size or etag_of(response, part.file) != part.etag:
                self._discard(part)
                raise DownloadError(
                    f"{part.file.url} changed while it was fetched (it has {size} bytes now, and "
                    f"had {part.size}): what arrived was thrown away; fetch it again",
                    url=part.file.url,
                )
            self._store(chunk, response.iter_raw())
        if chunk.start < chunk.end:
            raise _PassingError("it did not send all of it")

    def _store(self, chunk: _Chunk, pieces: Iterable[bytes]) -> None:
        """Write the body of a response block by block; an incomplete block is dropped."""
        part, arrival = chunk.part, chunk.part.arrival
        held = self._buffer(arrival.block_bytes)
        filled = 0
        for piece in pieces:
            self._stop_if_over()
            self._pause(self._pace.take(len(piece)))
            self._meter.add(len(piece))
            rest = memoryview(piece)
            while rest and chunk.start < chunk.end:
                block = chunk.start // arrival.block_bytes
                wanted = arrival.bounds(block)[1] - chunk.start
                taken = min(wanted - filled, len(rest))
                held[filled : filled + taken] = rest[:taken]
                filled += taken
                rest = rest[taken:]
                if filled == wanted:
                    _write(part.descriptor, held[:wanted], chunk.start)
                    arrival.mark(block)
                    chunk.start += wanted
                    filled = 0
            if rest:
                break  # the server sends more than the range

    def _buffer(self, size: int) -> memoryview:
        """The buffer of this thread. A new one for each block would cost more than the copy."""
        buffer: memoryview | None = getattr(self._of_thread, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._of_thread.buffer = memoryview(bytearray(size))
        return buffer

    # -- the beginning and the end of a file

    def _allocate(self) -> None:
        probed = [(file, *self._probe(file)) for file in self._files]
        maps = [resumed(*one) for one in probed]
        arrived = sum(arrival.arrived_bytes for arrival in maps if arrival is not None)
        self._check_space(sum(size for _, size, _ in probed) - arrived)
        for (file, size, etag), arrival in zip(probed, maps, strict=True):
            if arrival is None:
                facts = facts_of(file, etag)
                arrival = ArrivalMap.create(map_path(file.path), size, facts)
            arrival.state = ArrivalState.ARRIVING
            descriptor = os.open(part_path(file.path), os.O_RDWR | os.O_CREAT, 0o644)
            self._parts.append(Part(file, size, etag, arrival, descriptor))
            os.ftruncate(descriptor, size)

    def _probe(self, file: RemoteFile) -> tuple[int, str | None]:
        """The size and the ETag of a file, by a request for its first byte."""
        try:
            return self._retry(lambda: self._request_first_byte(file))
        except _PassingError as error:
            raise DownloadError(
                f"{file.url} cannot be reached ({error}, {error.count} times); check the address "
                "and the network",
                url=file.url,
            ) from error

    def _request_first_byte(self, file: RemoteFile) -> tuple[int, str | None]:
        with self._client.ask(file, 0, 1) as response:
            _check_passing(response)
            found = total_size(response, file, 0), etag_of(response, file)
            # Read the byte and the end of the body, so that the connection can be reused.
            list(itertools.islice(response.iter_raw(), 2))
            return found

    def _check_space(self, missing: int) -> None:
        folder = self._files[0].path.parent
        free = shutil.disk_usage(folder).free
        if missing + _SPARE_BYTES > free:
            raise DownloadError(
                f"{size_text(missing)} are to be fetched into {folder}, but only "
                f"{size_text(free)} are free there: make room, or choose another cache_dir",
                needed_bytes=missing,
                free_bytes=free,
            )

    def _check_all(self) -> None:
        """Hash the files as they arrive, check them, and give them their names."""
        checked = [(part, self._hash_of(part)) for part in self._parts]
        for part, digest in checked:
            expected = part.file.sha256
            if expected is not None and digest != expected:
                self._discard(part)
                raise DigestMismatchError(
                    f"{part.file.url} has the SHA-256 {digest}, but {expected} is expected: what "
                    "arrived was thrown away",
                    url=part.file.url,
                    sha256=digest,
                    expected=expected,
                )
        for part, digest in checked:
            try:
                self._on_checked(Fetched(part.file, part.size, digest, part.etag))
            except DigestMismatchError:
                self._discard(part)
                raise
        for part, _ in checked:
            part.arrival.state = ArrivalState.COMPLETE
        while not self._may_rename.wait(_LONGEST_HOLD_S):
            self._stop_if_over()
        for part, _ in checked:
            os.fsync(part.descriptor)
            os.replace(part.path, part.file.path)
            map_path(part.file.path).unlink(missing_ok=True)

    def _hash_of(self, part: Part) -> str:
        digest = hashlib.sha256()
        piece = memoryview(bytearray(_HASH_BYTES))
        at = 0
        while at < part.size:
            self._stop_if_over()
            here = min(part.arrival.contiguous(at) - at, _HASH_BYTES)
            if here == 0:
                time.sleep(_POLL_S)
                continue
            count = os.preadv(part.descriptor, [piece[:here]], at)
            if count == 0:
                raise DownloadError(f"{part.path} was shortened by others: fetch it again")
            digest.update(piece[:count])
            at += count
        return digest.hexdigest()

    def _discard(self, part: Part) -> None:
        part.arrival.state = ArrivalState.FAILED
        remove_part(part.file.path)


def _check_passing(response: "httpx.Response") -> None:
    """Raise `_PassingError` for a status after which the same request may succeed."""
    if response.status_code in RETRIED:
        raise _PassingError(f"status {response.status_code}", retry_after(response))


def _blocks(arrival: ArrivalMap, start: int, end: int) -> range:
    """The blocks that contain the bytes from `start` to `end`."""
    return range(start // arrival.block_bytes, -(-end // arrival.block_bytes))


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
