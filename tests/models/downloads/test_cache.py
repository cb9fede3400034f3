"""The cache of fetched files: shared by processes and threads, sure of what it has, tidy."""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest
from helpers import BOUND_S, Running, run_all, wait_until
from loopback import (
    LoopbackRequest,
    LoopbackServer,
)

from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.errors import (
    DigestMismatchError,
    DownloadError,
    RegistryError,
    RequestCancelledError,
)
from orion_oie.models.downloads.arrival import BLOCK_BYTES
from orion_oie.models.downloads.cache import (
    CachedFile,
    ModelCache,
    default_root,
)
from orion_oie.models.downloads.fetch import (
    CHUNK_BYTES,
    Download,
)
from orion_oie.models.downloads.parts import (
    map_path,
    part_path,
)
from orion_oie.models.specs import SourceSpec

SIZE = 5 * BLOCK_BYTES + 77
CONTENT = random.Random(1).randbytes(SIZE)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CONFIG = DownloadConfig(connections=2, retries=0)

pytestmark = pytest.mark.usefixtures("only_this_machine")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name in ("file", "second", "third"):
        (folder / name).write_bytes(CONTENT)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[LoopbackServer]:
    with LoopbackServer(folder) as server:
        yield server


@pytest.fixture
def go_on() -> threading.Event:
    """Set when `held` may answer everything."""
    return threading.Event()


@pytest.fixture
def held(folder: Path, go_on: threading.Event) -> Iterator[LoopbackServer]:
    """A server that answers the probe and the first range of each file; the others wait."""

    def hold(request: LoopbackRequest) -> None:
        ranges = [r for r in server.requests if r.path == request.path and r.range != (0, 0)]
        if request in ranges[1:]:
            assert go_on.wait(BOUND_S)

    with LoopbackServer(folder, misbehave=hold) as server:
        yield server
        go_on.set()


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache")


def source_of(server: LoopbackServer, *names: str, sha256: Sequence[str] = ()) -> SourceSpec:
    return SourceSpec(url=server.url, shards=list(names or ["file"]), sha256=list(sha256))


def pull(cache: ModelCache, source: SourceSpec) -> tuple[Path, ...]:
    return cache.pull(source, CONFIG, CancelScope())


def leave_half(cache: ModelCache, server: LoopbackServer, *names: str) -> Path:
    """Let a download be cancelled when some of it is here; gives where the last file belongs."""
    source = source_of(server, *names)
    scope = CancelScope()
    download = cache.open_download(source, CONFIG, scope)
    assert download is not None
    for number, size in enumerate(download.sizes[:-1]):
        download.read(number, 0, size)
    download.read(len(download.sizes) - 1, 0, 1)
    download.close()
    return cache.paths(source)[-1]


# -- where things are


def test_where_files_belong(cache: ModelCache, tmp_path: Path) -> None:
    """In the folder of their source: another address or revision, another folder."""
    sources = [
        SourceSpec(url="http://example.org/a", shards=["x", "deep/y"]),
        SourceSpec(url="http://example.org/b", shards=["x", "deep/y"]),
        SourceSpec(hub="org/name", files=["x", "deep/y"]),
        SourceSpec(hub="org/other", files=["x", "deep/y"]),
        SourceSpec(hub="org/name", files=["x", "deep/y"], revision="v 1/../..;"),
    ]
    folders = set()
    for source in sources:
        first, second = cache.paths(source)
        assert first.name == "x"
        assert second == first.parent / "deep" / "y"
        assert first.parent.parent == tmp_path / "cache" / "models"
        folders.add(first.parent)
    assert len(folders) == len(sources)
    assert not cache.root.exists()


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "a/..", "..", "/x", "//x", "", ".", "./", "a/../b"]
)
@pytest.mark.parametrize("kind", ["url", "hub"])
def test_names_that_leave_the_folder(cache: ModelCache, kind: str, name: str) -> None:
    """They are a mistake of the registry, whatever is done with the source."""
    if kind == "url":
        source = SourceSpec(url="http://127.0.0.1:9", shards=["x", name])
    else:
        source = SourceSpec(hub="org/name", files=["x", name])
    for call in (cache.paths, cache.find, cache.arrived, cache.remove):
        with pytest.raises(RegistryError, match="must not leave its folder"):
            call(source)
    with pytest.raises(RegistryError, match="must not leave its folder"):
        pull(cache, source)
    assert not cache.root.exists()


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment names, else the folder for caches."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ORION_CACHE_DIR", raising=False)
    own = "Library/Caches/orion-oie" if sys.platform == "darwin" else ".cache/orion-oie"
    assert default_root() == tmp_path / own
    monkeypatch.setenv("ORION_CACHE_DIR", "~/mine")
    assert default_root() == ModelCache().root == tmp_path / "mine"
    assert ModelCache("~/other").root == tmp_path / "other"


def test_what_is_found(cache: ModelCache, server: LoopbackServer) -> None:
    """All files of a source, or nothing."""
    source = source_of(server, "file", "second")
    assert cache.find(source) is None
    paths = pull(cache, source)
    assert cache.find(source) == paths == cache.paths(source)
    paths[1].unlink()
    assert cache.find(source) is None


def test_how_much_has_arrived(cache: ModelCache, server: LoopbackServer) -> None:
    """Whole files and parts together; of what was never asked for, nothing is known."""
    source = source_of(server, "file", "second", "third")
    assert cache.arrived(source) == (0, 0)
    leave_half(cache, server, "file", "second")
    arrived, total = cache.arrived(source)
    assert SIZE < arrived <= total == 2 * SIZE
    pull(cache, source)
    assert cache.arrived(source) == (3 * SIZE, 3 * SIZE)


def test_use_is_noted(cache: ModelCache, server: LoopbackServer, tmp_path: Path) -> None:
    """In the time of the last access; the time of the last change stays, as do files of others."""
    (path,) = pull(cache, source_of(server))
    other = tmp_path / "other"
    other.touch()
    for each in (path, other):
        os.utime(each, (1000, 2000))
    before = time.time()
    cache.note_use([path, other, path.with_name("gone")])
    assert path.stat().st_atime >= before - 1
    assert path.stat().st_mtime == 2000
    assert other.stat().st_atime == 1000


# -- what is known


def test_the_digest_that_came_first_counts(
    cache: ModelCache, server: LoopbackServer, folder: Path
) -> None:
    """Nobody named one: other content under the same address is refused, naming both, until the
    source is removed."""
    source = source_of(server)
    (path,) = pull(cache, source)
    path.unlink()
    other = CONTENT[::-1]
    (folder / "file").write_bytes(other)
    digests = (hashlib.sha256(other).hexdigest(), SHA256)
    with pytest.raises(DigestMismatchError, match=f"{digests[0]}.*{digests[1]}") as caught:
        pull(cache, source)
    assert (caught.value.details["sha256"], caught.value.details["expected"]) == digests
    assert cache.find(source) is None
    assert not part_path(path).exists()
    assert [record.sha256 for record in cache.records().values()] == [SHA256]

    cache.remove(source)
    assert cache.records() == {}
    assert pull(cache, source)[0].read_bytes() == other


def test_the_same_content_is_taken_again(cache: ModelCache, server: LoopbackServer) -> None:
    """A file that was removed by hand may come back."""
    source = source_of(server)
    pull(cache, source)[0].unlink()
    assert pull(cache, source)[0].read_bytes() == CONTENT


def test_a_named_digest_outweighs_the_first_one(
    cache: ModelCache, server: LoopbackServer, folder: Path
) -> None:
    """Whoever writes it into the registry knows what they want."""
    pull(cache, source_of(server))[0].unlink()
    other = CONTENT[::-1]
    (folder / "file").write_bytes(other)
    digest = hashlib.sha256(other).hexdigest()
    pull(cache, source_of(server, sha256=[digest]))
    (record,) = cache.records().values()
    assert (record.sha256, record.is_expected) == (digest, True)


def test_a_digest_that_changed_in_the_registry(
    cache: ModelCache, server: LoopbackServer, folder: Path
) -> None:
    """What is here is another file then: it is not found, and the right one takes its place. Where
    no digest is named, or nothing is known of the file, it is taken as it is."""
    other = CONTENT[::-1]
    new = source_of(server, sha256=[hashlib.sha256(other).hexdigest()])
    paths = pull(cache, source_of(server, sha256=[SHA256]))
    assert cache.find(source_of(server)) == paths
    assert cache.find(new) is None
    assert paths[0].read_bytes() == CONTENT

    (folder / "file").write_bytes(other)
    assert pull(cache, new) == paths == cache.find(new)
    assert paths[0].read_bytes() == other
    assert cache.find(source_of(server, sha256=[SHA256])) is None
    (cache.root / "models.lock.json").unlink()
    assert cache.find(source_of(server, sha256=[SHA256])) == paths


def test_records_that_changed_in_the_same_moment(cache: ModelCache, server: LoopbackServer) -> None:
    """They are seen, though the clock of the disk did not move on."""
    named = source_of(server, sha256=[SHA256])
    paths = pull(cache, named)
    records = cache.root / "models.lock.json"
    assert cache.find(named) == paths
    facts = records.stat()
    new = records.with_name("new")
    new.write_text(records.read_text().replace(SHA256, "0" * 64))
    os.utime(new, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    new.replace(records)
    assert cache.find(named) is None


def test_records_of_files(cache: ModelCache, server: LoopbackServer) -> None:
    """They can be read by people, and by the next process."""
    (path,) = pull(cache, source_of(server))
    text = (cache.root / "models.lock.json").read_text()
    (key,) = json.loads(text)
    assert cache.root / key == path
    record = ModelCache(cache.root).records()[key]
    assert (record.sha256, record.size, record.revision) == (SHA256, SIZE, None)
    assert record.url == f"{server.url}/file"
    assert record.first_seen.startswith("20")
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", '{"a": 5}', '{"a": {"sha256": "x"}}', "\0" * 100, "\xff"]
)
def test_damaged_records(cache: ModelCache, server: LoopbackServer, text: str) -> None:
    """Nothing is fetched, shown or removed on a guess: an error says what to do, and doing it
    helps."""
    source = source_of(server)
    cache.root.mkdir()
    records = cache.root / "models.lock.json"
    records.write_bytes(text.encode("latin-1"))
    for call in (cache.records, cache.files, cache.prune, lambda: pull(cache, source)):
        with pytest.raises(DownloadError, match=r"models\.lock\.json cannot be read.*remove it"):
            call()
    assert cache.find(source) is None
    assert server.requests == []
    records.unlink()
    assert pull(cache, source)[0].read_bytes() == CONTENT


def test_records_written_at_once(tmp_path: Path, server: LoopbackServer) -> None:
    """None is lost."""
    names = ["file", "second", "third"]
    caches = [ModelCache(tmp_path / "cache") for _ in names]
    run_all(
        [
            lambda cache=cache, name=name: pull(cache, source_of(server, name))
            for cache, name in zip(caches, names, strict=True)
        ]
    )
    assert len(caches[0].records()) == 3


# -- who fetches

PULL = """
import sys
from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.specs import SourceSpec

def report(download):
    print("waits" if download is None else "fetches", flush=True)

root, url = sys.argv[1:]
source = SourceSpec(url=url, shards=["file"])
(path,) = ModelCache(root).pull(source, DownloadConfig(), CancelScope(), report)
print(path, flush=True)
"""


@contextlib.contextmanager
def puller(cache: ModelCache, server: LoopbackServer) -> Iterator["subprocess.Popen[str]"]:
    """Another process that pulls the file, and says what it does, line by line."""
    process = subprocess.Popen(
        [sys.executable, "-c", PULL, str(cache.root), server.url],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def test_two_processes_share_a_download(
    cache: ModelCache, held: LoopbackServer, go_on: threading.Event
) -> None:
    """One fetches, the other waits; each byte is fetched once, and both get the file."""
    (path,) = cache.paths(source_of(held))
    with puller(cache, held) as first, puller(cache, held) as second:
        assert {next_line(first), next_line(second)} == {"fetches", "waits"}
        go_on.set()
        for process in (first, second):
            assert process.communicate(timeout=BOUND_S)[0].endswith(f"{path}\n")
            assert process.returncode == 0
    assert path.read_bytes() == CONTENT
    assert held.bytes_sent == SIZE + 1


def test_a_process_takes_over(
    cache: ModelCache, held: LoopbackServer, go_on: threading.Event
) -> None:
    """When the one that fetches is killed, the one that waits goes on with what is here."""
    source = source_of(held)
    (path,) = cache.paths(source)
    with puller(cache, held) as first, contextlib.ExitStack() as stack:
        wait_until(lambda: cache.arrived(source)[0] > 0)
        second = stack.enter_context(puller(cache, held))
        assert next_line(second) == "waits"
        first.kill()
        first.wait()
        kept, asked = cache.arrived(source)[0], len(held.requests)
        assert 0 < kept < SIZE
        go_on.set()
        assert second.communicate(timeout=BOUND_S)[0].endswith(f"{path}\n")
        assert second.returncode == 0
    assert path.read_bytes() == CONTENT
    assert sum(request.sent for request in held.requests[asked:]) == SIZE - kept + 1
    assert held.bytes_sent - SIZE <= CHUNK_BYTES


def test_threads_share_a_download(
    cache: ModelCache, held: LoopbackServer, go_on: threading.Event
) -> None:
    """As processes do, with one cache or several."""
    source = source_of(held)
    seen: list[set[Download | None]] = [set(), set(), set()]
    runs = [
        Running(each.pull, source, CONFIG, CancelScope(), told.add)
        for each, told in zip((cache, cache, ModelCache(cache.root)), seen, strict=True)
    ]
    wait_until(lambda: all(seen))
    go_on.set()
    assert [run.join() for run in runs] == [cache.paths(source)] * 3
    assert sum(told == {None} for told in seen) == 2
    assert held.bytes_sent == SIZE + 1


def test_who_waits_can_be_cancelled(
    cache: ModelCache, held: LoopbackServer, go_on: threading.Event
) -> None:
    """That ends the waiting within a second, and not the download of the other."""
    source = source_of(held)
    fetching = Running(pull, cache, source)
    wait_until(lambda: cache.arrived(source)[0] > 0)
    scope, waits = CancelScope(), []
    waiting = Running(cache.pull, source, CONFIG, scope, waits.append)
    wait_until(lambda: waits)
    error = RequestCancelledError("enough")
    scope.cancel(error)
    cancelled = time.monotonic()
    with pytest.raises(RequestCancelledError) as caught:
        waiting.join()
    assert caught.value is error
    assert time.monotonic() - cancelled < 1.0
    assert fetching.is_running
    go_on.set()
    assert fetching.join() == cache.find(source)
    assert held.bytes_sent == SIZE + 1


def test_the_folder_goes_while_somebody_waits(cache: ModelCache, server: LoopbackServer) -> None:
    """Who waits for a file that is then removed with its folder fetches it."""
    source = source_of(server)
    scope = CancelScope()
    download = cache.open_download(source, CONFIG, scope)
    assert download is not None
    waits: list[Download | None] = []
    waiting = Running(cache.pull, source, CONFIG, CancelScope(), waits.append)
    wait_until(lambda: waits)
    (path,) = cache.paths(source)
    for each in path.parent.iterdir():
        each.unlink()
    path.parent.rmdir()
    download.close()
    assert waiting.join() == (path,)
    assert path.read_bytes() == CONTENT


def test_a_lock_that_was_removed_is_none(
    cache: ModelCache,
    held: LoopbackServer,
    go_on: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever got the lock of a file that others removed just before takes the new one: nobody
    else can have it."""
    source = source_of(held)
    (path,) = cache.paths(source)
    first, take = iter([True]), fcntl.flock

    def flock(file: IO[str], how: int) -> None:
        if next(first, False):
            path.with_name("file.lock").unlink()
        take(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    fetching = Running(pull, cache, source)
    wait_until(lambda: cache.arrived(source)[0] > 0)
    with pytest.raises(DownloadError, match="is being fetched"):
        cache.remove(source)
    go_on.set()
    assert fetching.join() == (path,)


# -- what is here


def facts_of(files: Sequence[CachedFile]) -> list[tuple[str, str, int, int]]:
    return [(file.path.name, file.state, file.size, file.arrived_bytes) for file in files]


def test_the_list_of_files(cache: ModelCache, server: LoopbackServer, tmp_path: Path) -> None:
    """Whole files, parts and links with their sizes; no locks, maps or what a killed process left
    of those, and no link that leads nowhere."""
    assert cache.files() == []
    pull(cache, source_of(server))
    other = tmp_path / "elsewhere"
    other.write_bytes(bytes(10))
    (whole,) = cache.paths(source_of(server))
    (whole.parent / "linked").symlink_to(other)
    (whole.parent / "to nowhere").symlink_to(tmp_path / "nothing")
    part = leave_half(cache, server, "second")
    for left in (".second.part.map.1a2b3c4d.new", ".second.1a2b3c4d.new"):
        (whole.parent / left).touch()
    files = cache.files()
    arrived = files[2].arrived_bytes
    assert 0 < arrived <= SIZE
    assert facts_of(files) == [
        ("file", "complete", SIZE, SIZE),
        ("linked", "linked", 10, 10),
        ("second", "partial", SIZE, arrived),
    ]
    assert files[2].path == part
    record = files[0].record
    assert record is not None
    assert record.sha256 == SHA256
    assert files[1].record is files[2].record is None
    os.utime(whole, (1000, 2000))
    assert cache.files()[0].last_used == 1000


def test_a_part_without_a_map(cache: ModelCache, server: LoopbackServer) -> None:
    """It is listed, as if nothing of it had arrived, and goes with the other parts."""
    for name, damage in (("file", Path.unlink), ("second", lambda path: os.truncate(path, 5))):
        damage(map_path(leave_half(cache, server, name)))
    expected = [("file", "partial", SIZE, 0), ("second", "partial", SIZE, 0)]
    assert facts_of(cache.files()) == expected
    assert facts_of(cache.prune()) == expected
    assert cache.files() == []


def test_files_are_removed(cache: ModelCache, server: LoopbackServer) -> None:
    """With parts, locks, records and the folder; the bytes that are free are told. What is not
    there is no mistake."""
    source = source_of(server, "file", "second")
    assert cache.remove(source) == 0
    paths = pull(cache, source)
    assert cache.remove(source) >= 2 * SIZE
    assert not paths[0].parent.exists()
    assert cache.records() == {}
    assert cache.files() == []

    leave_half(cache, server, "file")
    assert cache.remove(source) > 0
    assert not paths[0].parent.exists()


def test_one_source_of_two_is_removed(cache: ModelCache, server: LoopbackServer) -> None:
    """The other stays, with its record."""
    (kept,) = pull(cache, source_of(server, "second"))
    (gone,) = pull(cache, source_of(server))
    cache.remove(source_of(server))
    assert kept.read_bytes() == CONTENT
    assert not gone.exists()
    assert [cache.root / key for key in cache.records()] == [kept]


def test_a_link_is_removed(cache: ModelCache, server: LoopbackServer, tmp_path: Path) -> None:
    """And not what it leads to; that frees nothing."""
    other = tmp_path / "elsewhere"
    other.write_bytes(CONTENT)
    source = source_of(server)
    (path,) = cache.paths(source)
    path.parent.mkdir(parents=True)
    path.symlink_to(other)
    assert cache.find(source) == (path,)
    assert cache.remove(source) == 0
    assert not path.is_symlink()
    assert other.read_bytes() == CONTENT


def test_what_is_fetched_cannot_be_removed(
    cache: ModelCache, held: LoopbackServer, go_on: threading.Event
) -> None:
    """That is an error, and the download goes on; when it has ended, it can."""
    source = source_of(held)
    fetching = Running(pull, cache, source)
    wait_until(lambda: cache.arrived(source)[0] > 0)
    with pytest.raises(DownloadError, match="is being fetched"):
        cache.remove(source)
    go_on.set()
    (path,) = fetching.join()
    assert path.read_bytes() == CONTENT
    assert cache.remove(source) >= SIZE


def test_files_are_hashed_again(cache: ModelCache, server: LoopbackServer) -> None:
    """Whoever changes a single byte is found out; what nobody knows is not called wrong."""
    first, second = pull(cache, source_of(server, "file", "second"))
    leave_half(cache, server, "third")
    assert [one.is_right for one in cache.verify()] == [True, True]
    with first.open("r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)[0]
        file.seek(SIZE // 2)
        file.write(bytes([byte ^ 1]))
    wrong, right = cache.verify()
    assert (wrong.path, wrong.is_right, wrong.expected) == (first, False, SHA256)
    assert wrong.sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    assert (right.path, right.is_right, right.sha256) == (second, True, SHA256)
    assert [one.path for one in cache.verify([second])] == [second]
    (cache.root / "models.lock.json").unlink()
    (unknown,) = cache.verify([first])
    assert unknown.is_right
    assert unknown.expected is None


# -- making room


def test_parts_go_first(cache: ModelCache, server: LoopbackServer) -> None:
    """Without a limit only they go, and a whole file that lies beside one stays."""
    whole = pull(cache, source_of(server, "file", "third"))
    part = leave_half(cache, server, "second")
    part_path(whole[0]).write_bytes(b"left by a process of before")
    assert [file.path for file in cache.prune()] == [whole[0], part]
    assert [file.path for file in cache.files()] == list(whole)
    assert not part_path(part).exists()
    assert not map_path(part).exists()
    assert [path.read_bytes() for path in whole] == [CONTENT] * 2


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        (3 * SIZE, []),
        (3 * SIZE - 1, ["second"]),
        (2 * SIZE, ["second"]),
        (2 * SIZE - 1, ["second", "third"]),
        (0, ["second", "third", "file"]),
    ],
)
def test_the_longest_unused_goes_first(
    cache: ModelCache, server: LoopbackServer, keep: int, gone: list[str]
) -> None:
    """As many as must; what is known of them stays, so that the same must come back."""
    paths = pull(cache, source_of(server, "file", "second", "third"))
    for used, path in zip((3000, 1000, 2000), paths, strict=True):
        os.utime(path, (used, 5000))
    assert [file.path.name for file in cache.prune(keep)] == gone
    assert {path.name for path in paths if path.exists()} == {"file", "second", "third"} - {*gone}
    assert len(cache.records()) == 3


def test_noted_use_counts(cache: ModelCache, server: LoopbackServer) -> None:
    """A file that was used lately outlives one that was fetched later."""
    first, second = pull(cache, source_of(server, "file", "second"))
    for path in (first, second):
        os.utime(path, (1000, 1000))
    cache.note_use([first])
    assert [file.path for file in cache.prune(SIZE)] == [second]


def test_links_are_left_alone(cache: ModelCache, server: LoopbackServer, tmp_path: Path) -> None:
    """They take no room."""
    (path,) = pull(cache, source_of(server))
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert cache.prune(0) == []
    assert path.read_bytes() == CONTENT


def test_what_is_being_fetched_stays(
    cache: ModelCache, held: LoopbackServer, go_on: threading.Event
) -> None:
    """The part as well as the files of its source that are here already."""
    go_on.set()
    (path,) = pull(cache, source_of(held))
    go_on.clear()
    source = source_of(held, "file", "second")
    fetching = Running(pull, cache, source)
    wait_until(lambda: cache.arrived(source)[0] > SIZE)
    assert cache.prune(0) == []
    go_on.set()
    assert fetching.join() == cache.find(source)
    assert path.read_bytes() == CONTENT
    assert len(cache.prune(0)) == 2


def test_a_part_that_became_whole_meanwhile_stays(
    cache: ModelCache, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the removal a download may end: its file is not thrown away."""
    source = source_of(server)
    leave_half(cache, server, "file")
    look = cache.files

    def files() -> list[CachedFile]:
        seen = look()
        pull(cache, source)
        return seen

    monkeypatch.setattr(cache, "files", files)
    cache.prune()
    assert cache.find(source) is not None
