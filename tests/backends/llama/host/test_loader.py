"""Models that arrive: computed while their bytes come, checked before anything is said.

Real servers, real workers, tiny models; the real instruct model where words are compared.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import worker_processes
from helpers import Running, is_running, wait_until
from loopback import (
    LoopbackRequest,
    LoopbackServer,
    Misbehaviour,
)
from tiny import write_tiny_llama

from orion_oie.backends.base import (
    GenerationJob,
    LoadSpec,
)
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.backends.llama.host.load_order import forward_order
from orion_oie.backends.llama.host.loader import (
    LlamaBackend,
    LoaderSettings,
    read_ahead,
)
from orion_oie.cancellation import CancelScope
from orion_oie.config import DownloadConfig, ShardingConfig
from orion_oie.errors import (
    DigestMismatchError,
    DownloadError,
    ModelCorruptError,
    OrionError,
    RequestCancelledError,
    WorkerCrashedError,
)
from orion_oie.models.downloads.arrival import BLOCK_BYTES
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.downloads.parts import part_path
from orion_oie.models.formats.gguf import read_header
from orion_oie.models.specs import SourceSpec
from orion_oie.schemas.loading import LoadProgress
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)
from orion_oie.schemas.results import ModelInfo

INFO = ModelInfo(model_id="arriving", variant="v", name="A", version="1", license="x")
BOUND_S = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the servers serve: models of some MB, so that they arrive in several blocks."""
    folder = tmp_path_factory.mktemp("served")
    size = {"layers": 4, "width": 256, "ffn": 1024, "heads": 8, "kv_heads": 4}
    bias = {"<|im_end|>": -40.0}
    for weights in ("F16", "Q4_0"):
        write_tiny_llama(
            folder / f"{weights}.gguf",
            weights=weights,
            context_length=1024,
            token_bias=bias,
            **size,
        )
    write_tiny_llama(folder / "split.gguf", tensors_per_file=10, token_bias=bias, **size)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache")


def spec_of(cache: ModelCache, url: str, *names: str, sha256: str | None = None) -> LoadSpec:
    source = SourceSpec(url=url, shards=list(names), sha256=[sha256] if sha256 else [])
    return LoadSpec(INFO, cache.paths(source), slots=2, context_length=512, source=source)


def backend_of(cache: ModelCache, **settings: Any) -> LlamaBackend:
    quick = DownloadConfig(retries=1, timeout_s=5.0)
    return LlamaBackend(LoaderSettings(**{"download": quick, **settings}), cache=cache)


def job(question: str = "Hello there", max_tokens: int = 16) -> GenerationJob:
    options = GenerationOptions(temperature=0.0, max_tokens=max_tokens, max_tokens_asked=True)
    return GenerationJob((Message(role="user", content=question),), options)


def say(model: LlamaModel, work: GenerationJob | None = None) -> str:
    pieces: list[str] = []
    model.generate(work or job(), CancelScope(), lambda text, _tokens: pieces.append(text))
    return "".join(pieces)


def said_by(file: Path, work: GenerationJob | None = None) -> str:
    """What a model says that was loaded from a local file."""
    spec = LoadSpec(INFO, (file,), slots=2, context_length=512)
    model = LlamaBackend().load(spec, CancelScope(), lambda _progress: None)
    try:
        return say(model, work)
    finally:
        model.close()


def said_by_a_load(cache: ModelCache, spec: LoadSpec) -> str:
    """What a model says that is fetched, or whose rest is, up to its last byte."""
    model = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
    try:
        text = say(model)
        model.completion.result(BOUND_S)
    finally:
        model.close()
    return text


class Late:
    """A server's hook: from a byte on, ranges are held back until they are let go, or refused."""

    def __init__(self, first: int, refusal: Misbehaviour | None = None) -> None:
        self.asked = threading.Event()
        self.let_go = threading.Event()
        self._first = first
        self.refusal = refusal

    def __call__(self, request: LoopbackRequest) -> Misbehaviour | None:
        if request.range is None or (request.range[0] or 0) < self._first:
            return None
        self.asked.set()
        assert self.let_go.wait(BOUND_S)
        return self.refusal


@pytest.fixture
def late(folder: Path) -> Iterator[Callable[..., tuple[LoopbackServer, Late]]]:
    """Servers that hold the end of a file back."""
    servers: list[tuple[LoopbackServer, Late]] = []

    def make(name: str, refusal: Misbehaviour | None = None) -> tuple[LoopbackServer, Late]:
        size = (folder / name).stat().st_size
        hook = Late((size // BLOCK_BYTES - 1) * BLOCK_BYTES, refusal)
        servers.append((LoopbackServer(folder, misbehave=hook), hook))
        return servers[-1]

    yield make
    for server, hook in servers:
        hook.let_go.set()
        server.close()


@pytest.mark.parametrize("name", ["F16.gguf", "Q4_0.gguf"])
def test_it_answers_while_it_arrives(name: str, folder: Path, cache: ModelCache) -> None:
    """The phases come in order, and it says what it says when loaded from the disk: also where
    llama.cpp keeps weights in an order of its own."""
    seen: list[LoadProgress] = []
    with LoopbackServer(folder, bytes_per_s=8e6) as server:
        spec = spec_of(cache, server.url, name)
        model = backend_of(cache).load(spec, CancelScope(), seen.append)
        try:
            assert say(model) == said_by(folder / name)
            assert model.completion.result(BOUND_S).architecture == "llama"
            assert say(model) == said_by(folder / name)
            wait_until(lambda: seen[-1].phase == "complete")
        finally:
            model.close()
    phases = list(dict.fromkeys(progress.phase for progress in seen))
    assert phases == ["initializing", "downloading", "loading_shard", "ready", "complete"]
    assert {progress.mode for progress in seen[2:]} == {"progressive"}
    counts = [progress.shards_loaded for progress in seen[1:]]
    assert counts == sorted(counts)
    assert counts[-1] == seen[-1].shards == 8
    assert spec.files[0].read_bytes() == (folder / name).read_bytes()


def test_nothing_is_said_before_all_is_here(folder: Path, cache: ModelCache, late: Any) -> None:
    """The prompt waits for the last layers, however long they take; then the answer comes."""
    server, hook = late("F16.gguf")
    spec = spec_of(cache, server.url, "F16.gguf")
    model = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
    try:
        answer = Running(say, model)
        assert hook.asked.wait(BOUND_S)
        assert answer.is_running
        assert model.load_progress.phase == "loading_shard"
        assert not spec.files[0].exists()
        hook.let_go.set()
        assert answer.join() == said_by(folder / "F16.gguf")
    finally:
        model.close()


def test_what_has_the_wrong_digest_says_nothing(folder: Path, cache: ModelCache) -> None:
    """Not one word comes from bytes that are not those that were promised."""
    pieces: list[str] = []
    with LoopbackServer(folder, bytes_per_s=2e6) as server:
        spec = spec_of(cache, server.url, "F16.gguf", sha256="0" * 64)
        model = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
        try:
            with pytest.raises(DigestMismatchError):
                model.generate(job(), CancelScope(), lambda text, _tokens: pieces.append(text))
            with pytest.raises(DigestMismatchError):
                model.completion.result(BOUND_S)
            assert not model.is_alive()
        finally:
            model.close()
    assert pieces == []
    assert not spec.files[0].exists()
    assert not part_path(spec.files[0]).exists()


def test_the_right_digest_is_right(folder: Path, cache: ModelCache) -> None:
    """A model whose digest is known answers when it is as expected."""
    digest = hashlib.sha256((folder / "F16.gguf").read_bytes()).hexdigest()
    with LoopbackServer(folder) as server:
        spec = spec_of(cache, server.url, "F16.gguf", sha256=digest)
        model = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
        try:
            assert say(model)
            model.completion.result(BOUND_S)
        finally:
            model.close()
    (record,) = cache.records().values()
    assert (record.sha256, record.is_expected) == (digest, True)


def test_a_server_that_fails_halfway(folder: Path, cache: ModelCache, late: Any) -> None:
    """Whoever waits gets the download's error; a later load goes on from what arrived."""
    server, hook = late("F16.gguf", Misbehaviour(status=404))
    spec = spec_of(cache, server.url, "F16.gguf")
    model = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
    try:
        answer = Running(say, model)
        hook.let_go.set()
        with pytest.raises(DownloadError, match="404"):
            answer.join()
    finally:
        model.close()
    assert not spec.files[0].exists()
    with LoopbackServer(folder) as better:
        again = spec_of(cache, better.url, "F16.gguf")
        # Another address is another place in the cache: what arrived is where it was.
        assert again.files != spec.files
    hook.refusal = None
    sent = server.bytes_sent
    assert said_by_a_load(cache, spec) == said_by(folder / "F16.gguf")
    assert server.bytes_sent - sent < (folder / "F16.gguf").stat().st_size // 2


def test_no_model_at_all(folder: Path, cache: ModelCache) -> None:
    """A file that is no GGUF is refused by its first bytes, and thrown away."""
    (folder / "page.gguf").write_bytes(b"<!DOCTYPE html><html>Sign in</html>" * 30_000)
    with LoopbackServer(folder) as server:
        spec = spec_of(cache, server.url, "page.gguf")
        with pytest.raises(ModelCorruptError, match="web page"):
            backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
        assert server.bytes_sent < 3 << 20
    assert not part_path(spec.files[0]).exists()
    assert worker_processes() == []


@pytest.mark.parametrize(
    "settings",
    [{"is_progressive": False}, {"sharding": ShardingConfig(enabled=False)}],
    ids=["strategy", "sharding"],
)
def test_sequentially_when_asked(settings: dict[str, Any], folder: Path, cache: ModelCache) -> None:
    """Everything is fetched before anything is loaded, and the steps say so."""
    seen: list[LoadProgress] = []
    with LoopbackServer(folder, bytes_per_s=20e6) as server:
        spec = spec_of(cache, server.url, "F16.gguf")
        model = backend_of(cache, **settings).load(spec, CancelScope(), seen.append)
        try:
            assert spec.files[0].exists()
            assert model.completion.done()
            assert say(model) == said_by(folder / "F16.gguf")
        finally:
            model.close()
    assert {progress.mode for progress in seen} == {"sequential"}
    last = [progress for progress in seen if progress.phase == "downloading"][-1]
    assert last.bytes_loaded == last.bytes_total == spec.files[0].stat().st_size


def test_where_nothing_can_be_computed_early(
    folder: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that cannot (a GPU, an unknown build) is not asked to; the steps say why."""
    monkeypatch.setattr(LlamaModel, "why_no_gate", lambda *_: "weights are copied to the GPU")
    seen: list[LoadProgress] = []
    with LoopbackServer(folder) as server:
        spec = spec_of(cache, server.url, "F16.gguf")
        model = backend_of(cache).load(spec, CancelScope(), seen.append)
        try:
            assert say(model) == said_by(folder / "F16.gguf")
        finally:
            model.close()
    assert seen[-1].mode == "sequential"
    assert seen[-1].note == "weights are copied to the GPU"


def test_a_split_model_arrives(folder: Path, cache: ModelCache) -> None:
    """Its files are its shards; those that are here already are not fetched again."""
    names = sorted(path.name for path in folder.glob("split-*.gguf"))
    assert len(names) > 2
    seen: list[LoadProgress] = []
    with LoopbackServer(folder, bytes_per_s=16e6) as server:
        spec = spec_of(cache, server.url, *names)
        spec.files[1].parent.mkdir(parents=True)
        spec.files[1].write_bytes((folder / names[1]).read_bytes())
        model = backend_of(cache).load(spec, CancelScope(), seen.append)
        try:
            text = say(model)
            model.completion.result(BOUND_S)
            assert say(model) == text
        finally:
            model.close()
        assert not any(names[1] in request.path for request in server.requests)
    assert seen[-1].shards == len(names)
    assert seen[-1].mode == "progressive"
    assert all(file.exists() for file in spec.files)


def test_initial_shards_come_first(folder: Path, cache: ModelCache, late: Any) -> None:
    """With `initial_shards` nothing is loaded before so many are here."""
    server, hook = late("F16.gguf")
    spec = spec_of(cache, server.url, "F16.gguf")
    seen: list[LoadProgress] = []
    sharding = ShardingConfig(num_shards=4, initial_shards=4)
    load = Running(backend_of(cache, sharding=sharding).load, spec, CancelScope(), seen.append)
    assert hook.asked.wait(BOUND_S)
    assert load.is_running
    assert seen[-1].phase == "downloading"
    hook.let_go.set()
    model = load.join()
    try:
        first = next(progress for progress in seen if progress.phase == "loading_shard")
        assert first.shards_loaded == 4
    finally:
        model.close()


def test_a_cancel_while_it_arrives(folder: Path, cache: ModelCache, late: Any) -> None:
    """A cancelled answer ends at once; the model goes on arriving for others."""
    server, hook = late("F16.gguf")
    spec = spec_of(cache, server.url, "F16.gguf")
    model = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
    try:
        scope = CancelScope()
        answer = Running(model.generate, job(), scope, lambda _text, _tokens: None)
        assert hook.asked.wait(BOUND_S)
        scope.cancel(RequestCancelledError("not wanted"))
        with pytest.raises(RequestCancelledError):
            answer.join()
        other = Running(say, model)
        hook.let_go.set()
        assert other.join() == said_by(folder / "F16.gguf")
    finally:
        model.close()


def test_a_load_that_is_cancelled(folder: Path, cache: ModelCache, late: Any) -> None:
    """The load ends with the scope's error, its process and its download with it; what arrived
    is kept."""
    server, hook = late("F16.gguf")
    spec = spec_of(cache, server.url, "F16.gguf")
    scope = CancelScope()
    sharding = ShardingConfig(num_shards=1, initial_shards=1)
    load = Running(backend_of(cache, sharding=sharding).load, spec, scope, lambda _progress: None)
    assert hook.asked.wait(BOUND_S)
    scope.cancel(RequestCancelledError("not wanted"))
    with pytest.raises(RequestCancelledError):
        load.join()
    assert part_path(spec.files[0]).exists()
    wait_until(lambda: worker_processes() == [])
    hook.let_go.set()
    wait_until(lambda: not is_running("orion-"))


@pytest.mark.parametrize("ending", ["close", "kill"])
def test_an_end_while_it_arrives(ending: str, folder: Path, cache: ModelCache, late: Any) -> None:
    """A model that is unloaded, or whose process dies, takes its download with it."""
    server, hook = late("F16.gguf")
    spec = spec_of(cache, server.url, "F16.gguf")
    model = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
    answer = Running(say, model)
    assert hook.asked.wait(BOUND_S)
    if ending == "close":
        model.close(timeout_s=1.0)
        with pytest.raises(OrionError):
            answer.join()
    else:
        psutil.Process(model.pid).kill()
        with pytest.raises(WorkerCrashedError):
            answer.join()
    with pytest.raises(OrionError):
        model.completion.result(BOUND_S)
    hook.let_go.set()
    wait_until(lambda: not is_running("orion-"))
    assert said_by_a_load(cache, spec) == said_by(folder / "F16.gguf")


def test_two_at_once_share_one_download(folder: Path, cache: ModelCache) -> None:
    """Two backends that want one model fetch it once."""
    with LoopbackServer(folder, bytes_per_s=10e6) as server:
        spec = spec_of(cache, server.url, "F16.gguf")
        seen: list[LoadProgress] = []
        first = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
        second = backend_of(cache).load(spec, CancelScope(), seen.append)
        try:
            assert say(first) == say(second)
            size = spec.files[0].stat().st_size
            assert size <= server.bytes_sent < size + 100
        finally:
            first.close()
            second.close()
    assert "another process fetches it" in {progress.note for progress in seen}


def test_a_stream_goes_on_when_the_model_is_complete(smollm2: Path, cache: ModelCache) -> None:
    """An answer that began while the model arrived is, to the last word, that of a loaded one:
    it changes its context in the middle."""
    work = job("Tell me a story about a river.", max_tokens=150)
    with LoopbackServer(smollm2.parent, bytes_per_s=60e6) as server:
        spec = spec_of(cache, server.url, smollm2.name)
        model = backend_of(cache).load(spec, CancelScope(), lambda _progress: None)
        try:
            ended_when: list[bool] = []
            pieces: list[str] = []

            def on_text(text: str, _tokens: int) -> None:
                pieces.append(text)
                ended_when.append(model.completion.done())

            model.generate(work, CancelScope(), on_text)
            assert not ended_when[0]
            assert ended_when[-1]
        finally:
            model.close()
    assert "".join(pieces) == said_by(smollm2, work)


def test_a_slow_disk_is_read_in_the_order_of_the_forward_pass(
    folder: Path, cache: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is asked to read ahead what the first pass needs first."""
    asked: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def noted(descriptor: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((offset, length))
        advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    header = read_header(folder / "F16.gguf")
    order = forward_order([header], ShardingConfig())
    read_ahead([folder / "F16.gguf"], order.runs)
    wait_until(lambda: sum(length for _, length in asked) == sum(b - a for _, a, b in order.runs))
    assert asked[0][0] == 0
    starts = [start for _, start, _ in order.runs]
    assert [offset for offset, _ in asked if offset in starts] == starts
