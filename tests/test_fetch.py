"""Fetching over a real connection: whole files that are right, or a typed error and nothing to be
mistaken for a file. What arrived before any end is not fetched again."""

import errno
import hashlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import BOUND_S, Running, no_more_threads, run_all, wait_until

from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.downloads.arrival import BLOCK_BYTES, ArrivalMap, ArrivalState
from orion_oie.downloads.cache import ModelCache
from orion_oie.downloads.fetch import CHUNK_BYTES, Download, RemoteFile, map_path, part_path
from orion_oie.downloads.loopback import LoopbackRequest, LoopbackServer, Misbehave, Misbehaviour
from orion_oie.errors import (
    DigestMismatchError,
    DownloadError,
    ModelError,
    OrionError,
    RequestCancelledError,
)
from orion_oie.specs import SourceSpec

SIZE = 9 * BLOCK_BYTES + 12_345
CONTENT = random.Random(1).randbytes(SIZE)
PROBE = 1  # byte that is asked for to learn the size
ONE = DownloadConfig(connections=1, retries=1)
FOUR = DownloadConfig(connections=4, retries=1)


class Place(NamedTuple):
    """A server of one file, and where it is to come."""

    server: LoopbackServer
    cache: ModelCache
    source: SourceSpec

    @property
    def path(self) -> Path:
        (path,) = self.cache.paths(self.source)
        return path

    @property
    def kept(self) -> int:
        """Bytes of the file that are here."""
        return self.cache.arrived(self.source)[0]

    def pull(self, config: DownloadConfig = FOUR, scope: CancelScope | None = None) -> bytes:
        """Fetch the file; gives what is in it."""
        (path,) = self.cache.pull(self.source, config, scope or CancelScope())
        assert path == self.path
        return path.read_bytes()

    def download(self, config: DownloadConfig = ONE, **kwargs: Any) -> Download:
        """A prepared download to the same place, without locks and records."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = RemoteFile(f"{self.server.url}/file", self.path, **kwargs)
        download = Download([file], config, CancelScope())
        download.prepare()
        return download

    def assert_nothing_is_used(self) -> None:
        """There is no file that could be taken for the right one, and no record of one."""
        assert not self.path.exists()
        assert self.cache.find(self.source) is None
        assert self.cache.records() == {}


@contextmanager
def a_place(
    tmp_path: Path,
    content: bytes = CONTENT,
    misbehave: Misbehave | None = None,
    sha256: Iterable[str] = (),
    **kwargs: Any,
) -> Iterator[Place]:
    folder = tmp_path / "served"
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(content)
    with LoopbackServer(folder, misbehave=misbehave, **kwargs) as server:
        source = SourceSpec(url=server.url, shards=["file"], sha256=list(sha256))
        yield Place(server, ModelCache(tmp_path / "cache"), source)


class Script:
    """A misbehaviour for some requests, in the order in which they come: `{number: what}`. The
    probe has the number 0. `None` as a number stands for all that are not named."""

    def __init__(self, wrongs: dict[int | None, Misbehaviour | None]) -> None:
        self.wrongs = wrongs
        self._count = itertools.count()

    def __call__(self, request: LoopbackRequest) -> Misbehaviour | None:
        return self.wrongs.get(next(self._count), self.wrongs.get(None))


def ranges(server: LoopbackServer) -> list[tuple[int, int]]:
    """What was asked for after the probe: first bytes and ends."""
    found = []
    for request in server.requests:
        assert request.range is not None
        first, last = request.range
        assert first is not None
        assert last is not None
        found.append((first, last + 1))
    return found[1:]


def leave_half(tmp_path: Path) -> None:
    """Let a download of the content end in the middle."""
    script = Script({number: None for number in range(4)} | {None: Misbehaviour(status=410)})
    with a_place(tmp_path, misbehave=script) as place:
        with pytest.raises(DownloadError, match="410"):
            place.download().start() or Download.wait
