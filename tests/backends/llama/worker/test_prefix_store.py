"""The prefix store: what comes back is what was saved, whatever happened to the file, and the
folder keeps to its limit. No failure of a file system gets out."""

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orion_oie.backends.llama.worker import prefix_store
from orion_oie.backends.llama.worker.prefix_store import (
    PrefixStore,
    file_identity,
)

LIMIT = 1_000_000
HEADER = 40  # bytes in front of the tokens
TOKENS = [1, 2**31 - 1, 3, -1, 5]
STATE = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)
FILE_SIZE = HEADER + 4 * len(TOKENS) + len(STATE)
HOUR_S = 3600


def path_in(store: PrefixStore, tokens: list[int]) -> Path:
    """The file in which a store keeps the state of these tokens, there or not: tests damage it."""
    return store._path(prefix_store._pack(tokens))


def magic() -> bytes:
    """The first bytes of a file of the store, for headers that are forged in the rest."""
    return prefix_store._MAGIC


def packed(start: bytes, token_count: int, size: int, checksum: bytes) -> bytes:
    """A header in the layout of the store, which writes only true ones."""
    return prefix_store._HEADER.pack(start, token_count, size, checksum)


class Store:
    """PrefixStore in a folder that need not be there yet, with the problems they reported."""

    def __init__(self, folder: Path, identity: str = "a model", limit: int = LIMIT) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.store = PrefixStore(folder, identity, limit, self.problems.append)

    def save(self, tokens: list[int] = TOKENS, state: NDArray[np.uint8] = STATE) -> Path:
        """Save and wait; returns the file of these tokens."""
        self.store.save(tokens, state)
        assert self.store.flush()
        return self.path(tokens)

    def find(self, tokens: list[int] = TOKENS) -> NDArray[np.uint8] | None:
        return self.store.find(tokens)

    def path(self, tokens: list[int] = TOKENS) -> Path:
        return path_in(self.store, tokens)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "store")


def is_state(found: NDArray[np.uint8] | None) -> bool:
    return found is not None and found.dtype == np.uint8 and np.array_equal(found, STATE)


def unused_for(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


# -- what comes back


def test_a_state_comes_back(store: Store) -> None:
    """The same bytes, writable, also for another object; nothing is reported."""
    assert store.find() is None
    store.save()
    again = Store(store.folder)
    for one in (store, again):
        found = one.find()
        assert is_state(found)
        assert found is not None
        found[:] = 0
        assert is_state(one.find())
        assert one.problems == []


def test_only_exactly_these_tokens_are_found(store: Store) -> None:
    """No shorter, longer or other ones; each its own state."""
    store.save()
    store.save([7], STATE[:100])
    for tokens in (TOKENS[:-1], [*TOKENS, 0], TOKENS[::-1], []):
        assert store.find(tokens) is None
    assert is_state(store.find())
    assert np.array_equal(store.find([7]), STATE[:100])  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "state"), [([], STATE), ([1], STATE[:0]), ([], STATE[:0])])
def test_empty_ones_come_back(store: Store, tokens: list[int], state: NDArray[np.uint8]) -> None:
    """No tokens and no bytes are cases like others."""
    store.save(tokens, state)
    found = store.find(tokens)
    assert found is not None
    assert np.array_equal(found, state)


def test_another_identity_never_matches(store: Store) -> None:
    """Neither by its name, nor when a file is moved to the place of the other's."""
    path = store.save()
    other = Store(store.folder, "another model")
    assert other.find() is None
    assert path.exists()
    assert other.path().name[:16] != path.name[:16]
    assert other.path().name[17:] != path.name[17:]
    os.rename(path, other.path())
    assert other.find() is None
    assert "checksum" in other.problems[0]
    assert store.names() == set()


def test_the_state_of_other_tokens_never_matches(store: Store) -> None:
    """A file that is moved to the place of another's."""
    path = store.save()
    for tokens in (TOKENS[:-1], [*TOKENS[:-1], 6]):
        store.save()
        os.rename(path, store.path(tokens))
        assert store.find(tokens) is None
        assert "of other tokens" in store.problems.pop()
        assert store.names() == set()


def test_the_bytes_are_those_at_the_time(store: Store, replacing: "Gate") -> None:
    """What is written to the array after it was saved does not reach the file."""
    state = STATE[::2].copy()
    with replacing.closed():
        store.store.save([1], STATE)
        store.store.save([2], state)
        expected = state.copy()
        state[:] = 0
    assert store.store.flush()
    assert np.array_equal(store.find([2]), expected)  # type: ignore[arg-type]


def test_a_view_is_saved(store: Store) -> None:
    """Bytes that do not lie side by side."""
    store.save(TOKENS, STATE[::3])
    assert np.array_equal(store.find(), STATE[::3])  # type: ignore[arg-type]


def test_name_and_rights(store: Store) -> None:
    """The documented name, and nobody else may read, whatever the mask allows."""
    mask = os.umask(0)
    try:
        path = store.save()
    finally:
        os.umask(mask)
    assert store.names() == {path.name}
    assert [len(part) for part in path.stem.split("-")] == [16, 32]
    assert path.suffix == ".kv"
    assert path.stat().st_size == FILE_SIZE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


# -- what cannot be trusted


def flip(offset: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 0x10
        path.write_bytes(data)

    return damage


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def pretend(token_count: int, size: int, length: int = FILE_SIZE) -> Callable[[Path], None]:
    """A header that says something else, in a file of so many bytes."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        header = packed(magic(), token_count, size, data[24:HEADER])
        path.write_bytes(header + data[HEADER:])
        os.truncate(path, length)

    return damage


def link(path: Path) -> None:
    os.rename(path, path.with_suffix(".target"))
    path.symlink_to(path.with_suffix(".target"))


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def listening(path: Path) -> None:
    path.unlink()
    # By its name alone: the address of a socket may have about a hundred characters.
    with chdir(path.parent), socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)


DAMAGES = {
    "format": flip(0),
    "version": flip(7),
    "number of tokens": flip(8),
    "many tokens": flip(15),
    "size": flip(16),
    "large size": flip(23),
    "checksum": flip(24),
    "end of the checksum": flip(39),
    "first token": flip(40),
    "last token": flip(HEADER + 4 * len(TOKENS) - 1),
    "first byte": flip(HEADER + 4 * len(TOKENS)),
    "middle": flip(FILE_SIZE // 2),
    "last byte": flip(-1),
    "empty": cut(0),
    "part of a header": cut(HEADER - 1),
    "no more than a header": cut(HEADER),
    "tokens without a state": cut(HEADER + 4 * len(TOKENS)),
    "cut": cut(FILE_SIZE - 1),
    "longer": cut(FILE_SIZE + 1),
    "shifted": pretend(len(TOKENS) - 1, len(STATE) + 4),
    "huge": pretend(len(TOKENS), 2**63),
    "huge in tokens": pretend(2**62, 0),
    "huge and hollow": pretend(len(TOKENS), 2**40, HEADER + 4 * len(TOKENS) + 2**40),
    "negative in sum": pretend(2**62 + 5, 2**64 - 1),
    "foreign": lambda path: path.write_bytes(b"GGUF" * 5000),
    "link": link,
    "link to nowhere": dangle,
    "directory": directory,
    "pipe": pipe,
    "socket": listening,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_as_good_as_none(store: Store, kind: str) -> None:
    """It is not found, reported in one line, removed, and written again by the next save."""
    path = store.save()
    DAMAGES[kind](path)
    assert store.find() is None
    assert len(store.problems) == 1
    assert str(path) in store.problems[0]
    assert "\n" not in store.problems[0]
    assert not os.path.lexists(path)
    assert store.find() is None
    store.save()
    assert is_state(store.find())
    assert len(store.problems) == 1


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if "last byte" not in kind])
def test_a_damaged_file_is_written_again(store: Store, kind: str) -> None:
    """Also when nobody looked for it; where only the contents are wrong, after a look."""
    path = store.save()
    DAMAGES[kind](path)
    store.save()
    if kind in ("checksum", "end of the checksum", "first byte", "middle"):
        assert store.find() is None
        store.save()
    assert is_state(store.find())


def test_a_link_is_not_followed(store: Store) -> None:
    """What it points to stays as it is."""
    path = store.save()
    link(path)
    target = path.with_suffix(".target")
    before = target.read_bytes()
    store.save()
    assert target.read_bytes() == before
    assert not path.is_symlink()


def test_a_directory_that_is_not_empty_stays(store: Store) -> None:
    """Somebody's files are not removed: nothing is stored then."""
    path = store.save()
    directory(path)
    (path / "file").touch()
    assert store.find() is None
    store.save()
    assert store.find() is None
    assert any("not written" in problem for problem in store.problems)
    assert store.names() == {path.name}
    assert (path / "file").exists()


def test_a_pipe_that_is_in_use(store: Store) -> None:
    """It is not waited for what somebody may write to it."""
    path = store.save()
    pipe(path)
    end = os.open(path, os.O_RDWR)
    try:
        assert store.find() is None
    finally:
        os.close(end)
    assert "not a regular file" in store.problems[0]
    assert not path.exists()


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Let no file of a state be opened."""
    really_open = os.open

    def fail(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(".kv"):
            raise OSError(code, os.strerror(code), path)
        return really_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE])
def test_an_unreadable_file(store: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It goes, unless the reason lies elsewhere and passes."""
    path = store.save()
    with monkeypatch.context() as patch:
        refuse(patch, code)
        assert store.find() is None
    assert os.strerror(code) in store.problems[0]
    assert path.exists() == (code in (errno.EMFILE, errno.ENFILE))
    assert is_state(store.find()) == path.exists()


def test_without_memory_nothing_is_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays for better times."""
    path = store.save()

    def fail(*_args: Any) -> None:
        raise MemoryError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", fail)
        assert store.find() is None
    assert "too much" in store.problems[0]
    assert path.exists()
    assert is_state(store.find())


valid = st.just((5, len(STATE)))
lengths = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))


def header(parts: tuple[bytes, tuple[int, int], bytes]) -> bytes:
    start, (token_count, size), checksum = parts
    return packed(start, token_count, size, checksum)


headers = st.tuples(
    st.sampled_from([magic(), b"ORIONKV2"]),
    st.one_of(valid, lengths),
    st.binary(min_size=16, max_size=16),
).map(header)


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, bytes]:
    store = Store(tmp_path_factory.mktemp("store"))
    return store, store.save().read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_is_in_the_file(one_store: tuple[Store, bytes], data: st.DataObject) -> None:
    """Any bytes in place of the file: nothing is raised, and no wrong state comes back."""
    store, good = one_store
    place = st.integers(0, len(good))
    begin, end = sorted((data.draw(place), data.draw(place)))
    part = data.draw(st.binary(max_size=60))
    content = data.draw(
        st.one_of(
            st.binary(max_size=200),
            headers.map(lambda start: start + good[HEADER:]),
            st.just(good[:begin] + part + good[end:]),
            st.just(good[:begin] + part + good[begin + len(part) :]),
        )
    )
    store.path().write_bytes(content)
    found = store.find()
    assert is_state(found) if content == good else found is None
    assert store.path().exists() == (content == good)


# -- what is kept


def fill(store: Store, count: int) -> list[Path]:
    """So many states, the first unused for the longest time; files of `FILE_SIZE` bytes."""
    paths = [store.save([*TOKENS[:-1], number]) for number in range(count)]
    for number, path in enumerate(paths):
        unused_for(path, 1000 - number)
    return paths


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    """To be found is to be used, and so is to be saved again."""
    store = Store(tmp_path, limit=4 * FILE_SIZE)
    paths = fill(store, 4)
    assert store.find([*TOKENS[:-1], 0]) is not None
    store.save([*TOKENS[:-1], 1])
    new = store.save()
    assert store.names() == {path.name for path in (paths[0], paths[1], paths[3], new)}
    newer = store.save([1], STATE[:1])
    assert store.names() == {path.name for path in (paths[0], paths[1], new, newer)}
    assert store.problems == []


@pytest.mark.parametrize(("limit", "kept"), [(0, 3), (-1, 2), (-FILE_SIZE, 2), (-FILE_SIZE - 1, 1)])
def test_the_limit_holds_to_the_byte(tmp_path: Path, limit: int, kept: int) -> None:
    """Of the whole folder, whichever model the files are of; the newest files stay."""
    paths = fill(Store(tmp_path, "another model"), 2)
    store = Store(tmp_path, limit=3 * FILE_SIZE + limit)
    new = store.save()
    assert store.names() == {path.name for path in [*paths, new][-kept:]}


def test_what_was_just_written_stays(tmp_path: Path) -> None:
    """Also when all others, by their times, were used after it."""
    store = Store(tmp_path, limit=2 * FILE_SIZE)
    for path in fill(store, 2):
        unused_for(path, -1000)
    new = store.save()
    assert new.name in store.names()
    assert len(store.names()) == 2


def test_a_state_larger_than_the_limit_is_not_written(tmp_path: Path) -> None:
    """It costs nothing of what is there; one as large as the limit is kept, alone."""
    store = Store(tmp_path, limit=FILE_SIZE)
    path = store.save()
    larger = np.zeros(len(STATE) + 1, np.uint8)
    store.save([5, 4, 3, 2, 1], larger)
    assert store.names() == {path.name}
    assert str(FILE_SIZE + 1) in store.problems[0]
    path = store.save([5, 4, 3, 2, 1], STATE)
    assert store.names() == {path.name}


def test_a_limit_of_zero_touches_nothing(store: Store) -> None:
    """Not even what others wrote, or the folder."""
    off = Store(store.folder, limit=0)
    off.save()
    assert not store.folder.exists()
    path = store.save()
    unused_for(path, 1000)
    before = path.stat()
    assert off.find() is None
    off.save()
    off.save([1])
    after = path.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert store.names() == {path.name}
    assert off.problems == []


def test_only_files_count(tmp_path: Path) -> None:
    """A link and a directory where states could be take no room, and stay until they are in the
    way."""
    store = Store(tmp_path, limit=FILE_SIZE)
    large = tmp_path / "large"
    large.write_bytes(bytes(LIMIT))
    store.path([1]).symlink_to(large)
    store.path([2]).mkdir()
    path = store.save()
    assert store.names() == {p.name for p in (path, large, store.path([1]), store.path([2]))}
    small = store.save([3], STATE[:1])
    assert store.names() == {p.name for p in (small, large, store.path([1]), store.path([2]))}


def test_leftovers_go_after_an_hour(tmp_path: Path) -> None:
    """Those of writers that were killed; what other programs keep in the folder stays."""
    store = Store(tmp_path)
    path = store.save()
    old, young = (tmp_path / f".{path.name}.{name}.new" for name in ("old", "young"))
    foreign = [tmp_path / name for name in ("a.kv", ".a.new", f"{path.name}.new", "a")]
    for file in (old, young, *foreign):
        file.write_bytes(bytes(LIMIT))
    for file in (old, *foreign):
        unused_for(file, HOUR_S + 60)
    unused_for(young, HOUR_S - 60)
    new = store.save([1])
    assert store.names() == {file.name for file in (path, young, *foreign, new)}


# -- how it is written


class Gate:
    """Stops the writer before a file gets its name."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.is_reached = threading.Event()
        self.passed = 0
        self._replace = os.replace

    def replace(self, source: Any, target: Any) -> None:
        self.is_reached.set()
        assert self._open.wait(30)
        self._replace(source, target)
        self.passed += 1

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.is_reached.clear()
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()


@pytest.fixture
def replacing(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(os, "replace", gate.replace)
    return gate


def test_what_is_there_is_not_written_again(store: Store, replacing: Gate) -> None:
    """Neither what is in a file, nor what waits to be."""
    with replacing.closed():
        store.store.save(TOKENS, STATE)
        assert replacing.is_reached.wait(10)
        for _ in range(10):
            store.store.save(TOKENS, STATE)
            store.store.save([1], STATE)
    store.save()
    Store(store.folder).save()
    assert replacing.passed == 2
    assert store.problems == []


def test_flush(store: Store, replacing: Gate) -> None:
    """True at once when there is nothing to write; False while there is."""
    assert store.store.flush(0)
    with replacing.closed():
        store.store.save(TOKENS, STATE)
        store.store.save([1], STATE)
        assert replacing.is_reached.wait(10)
        assert not store.store.flush(0)
        assert not store.store.flush(0.01)
        assert store.find() is None
    assert store.store.flush()
    assert is_state(store.find())
    assert is_state(store.find([1]))


def test_too_many_at_once_are_dropped(store: Store, replacing: Gate) -> None:
    """Those that came first are written; one that was dropped may come again."""
    with replacing.closed():
        for token in range(6):
            store.store.save([token], STATE)
        assert len(store.problems) == 2
        assert all("4 others wait" in problem for problem in store.problems)
        store.store.save([0], STATE)
        assert len(store.problems) == 2
    assert store.store.flush()
    assert [is_state(store.find([token])) for token in range(6)] == [True] * 4 + [False] * 2
    store.save([5])
    assert is_state(store.find([5]))


def test_the_thread_is_there_only_while_it_writes(store: Store, replacing: Gate) -> None:
    """One for all that waits; the next save starts another."""

    def writers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "prefix-store"]

    def settled() -> bool:
        for thread in writers():
            thread.join(10)
        return not writers()

    assert settled()
    for _ in range(2):
        with replacing.closed():
            store.store.save([1], STATE)
            store.store.save([2], STATE)
            assert [thread.daemon for thread in writers()] == [True]
        assert store.store.flush()
        assert settled()
        store.path([1]).unlink()
        store.path([2]).unlink()


def fail_with(code: int) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("function", ["os.replace", f"{prefix_store.__name__}._open_private"])
def test_a_full_disk(store: Store, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """It is reported and nothing is left over, not even by others; the next save is as ever."""
    path = store.save()
    leftover = store.folder / f".{path.name}.x.new"
    leftover.touch()
    unused_for(leftover, HOUR_S + 60)
    with monkeypatch.context() as patch:
        patch.setattr(function, fail_with(errno.ENOSPC))
        store.save([1])
    assert len(store.problems) == 1
    assert os.strerror(errno.ENOSPC) in store.problems[0]
    assert store.names() == {path.name}
    assert store.find([1]) is None
    store.save([1])
    assert is_state(store.find([1]))


@pytest.mark.parametrize("depth", [0, 1])
def test_a_file_where_the_folder_should_be(tmp_path: Path, depth: int) -> None:
    """Nothing is written, found or raised; the file stays."""
    in_the_way = tmp_path / "file"
    in_the_way.write_text("text")
    store = Store(in_the_way / "folder" if depth else in_the_way)
    store.save()
    assert any("not written" in problem for problem in store.problems)
    assert store.find() is None
    assert in_the_way.read_text() == "text"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(store: Store) -> None:
    """What is in it is still found."""
    store.save()
    store.folder.chmod(0o500)
    try:
        store.save([1])
        assert "not written" in store.problems[0]
        assert is_state(store.find())
    finally:
        store.folder.chmod(0o700)


def test_no_thread_can_be_started(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is dropped, and the next one is not."""

    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        store.store.save(TOKENS, STATE)
    assert "can't start" in store.problems[0]
    assert store.store.flush(0)
    store.save()
    assert is_state(store.find())


def test_files_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process trims at the same time: what it removed counts as removed."""
    store = Store(tmp_path, limit=3 * FILE_SIZE)
    paths = fill(store, 3)
    really_unlink = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        really_unlink(path)
        really_unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        new = store.save()
    assert store.names() == {path.name for path in (*paths[1:], new)}
    assert store.problems == []


def test_many_at_once_on_one_folder(tmp_path: Path) -> None:
    """Objects as those of several processes, with little room: a state is right or not there."""
    stores = [Store(tmp_path, limit=4 * FILE_SIZE) for _ in range(3)]
    states = [np.full(len(STATE), number, np.uint8) for number in range(8)]
    wrong: list[int] = []
    found: list[int] = []

    def work(store: Store, turn: int) -> None:
        for step in range(150):
            number = (turn + 1) * step % len(states)
            state = store.store.find([number])
            if state is None:
                store.store.save([number], states[number])
                store.store.flush()
            else:
                (found if np.array_equal(state, states[number]) else wrong).append(number)

    threads = [
        threading.Thread(target=work, args=(store, turn)) for turn, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert found
    assert wrong == []
    assert [store.problems for store in stores] == [[], [], []]
    stores[0].save([99])
    assert len(list(tmp_path.iterdir())) <= 4
    assert all(path.suffix == ".kv" for path in tmp_path.iterdir())


# -- the identity of model files

MODEL_SIZE = 100_000_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A large file without contents."""
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.truncate(MODEL_SIZE)
    os.utime(path, (1000, 1000))
    return path


def test_the_same_files_have_the_same_identity(model: Path, tmp_path: Path) -> None:
    """Wherever they lie; their order counts."""
    small = tmp_path / "small"
    small.write_bytes(b"abc")
    identity = file_identity([model, small])
    moved = model.rename(tmp_path / "moved")
    assert file_identity([moved, small]) == identity
    assert file_identity([small, moved]) != identity
    assert len({file_identity(paths) for paths in ([], [small], [small, small], [moved])}) == 4


@pytest.mark.parametrize(
    "offset",
    [
        0,
        (1 << 20) - 1,
        (MODEL_SIZE - 4096) // 64 * 2 + 1000,
        (MODEL_SIZE - 4096) // 2 + 4095,
        MODEL_SIZE - 1,
    ],
)
def test_other_contents_have_another_identity(model: Path, offset: int) -> None:
    """A byte in the beginning or in a sample, with the time put back."""
    before = file_identity([model])
    with model.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")
    os.utime(model, (1000, 1000))
    assert file_identity([model]) != before


def test_size_and_time_are_part_of_the_identity(model: Path) -> None:
    """Each alone makes another file of it."""
    before = file_identity([model])
    os.utime(model, ns=(1000 * 10**9, 1000 * 10**9 + 1_000_000))
    later = file_identity([model])
    os.truncate(model, MODEL_SIZE + 1)
    os.utime(model, (1000, 1000))
    assert len({before, later, file_identity([model])}) == 3


def test_it_does_not_see_everything(model: Path) -> None:
    """What the documentation admits: a change between the samples, with the time put back."""
    before = file_identity([model])
    with model.open("r+b") as file:
        file.seek(MODEL_SIZE // 64 * 3 // 2)
        file.write(b"x")
    os.utime(model, (1000, 1000))
    assert file_identity([model]) == before


def test_a_file_that_is_not_there_has_no_identity(tmp_path: Path) -> None:
    """That is for the caller to know."""
    with pytest.raises(FileNotFoundError):
        file_identity([tmp_path / "nothing"])
