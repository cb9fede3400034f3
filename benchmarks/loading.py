"""From nothing to the first token: models that arrive over HTTP, come back, and resume.

A loopback server in a process of its own limits the speed. The peer is what one does without the
engine: fetch the file, load it into a `llama_cpp.Llama`, read the prompt. Needs the smollm2 and
download extras; the larger model has random weights and is made here (600 MB of disk).
"""

import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from _peers import Peer
from _random_model import random_model
from _report import Row, extent_of, finish, options, row, show
from _subject import model_file

from orion_oie import (
    DownloadConfig,
    EngineConfig,
    InferenceResult,
    OrionInferenceEngine,
    ServingConfig,
)
from orion_oie.cancellation import CancelScope
from orion_oie.hardware.machine import usable_cores
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.downloads.fetch import CHUNK_BYTES
from orion_oie.models.formats.gguf import read_header
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import SourceSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import loopback

CONTEXT = 2048
SYSTEM = "You are a helpful assistant."
# With SmolLM2's template these are 512 tokens.
QUESTION = "Say hello. " + " ".join(f"word{i}" for i in range(149))
LONG_SYSTEM = "You answer questions about the sea. " + " ".join(
    f"Rule {i}: be kind." for i in range(64)
)
PULL = (
    "import sys; from orion_oie.models.downloads.cache import *; "
    "ModelCache(sys.argv[1]).pull(SourceSpec(url=sys.argv[2], shards=[sys.argv[3]]), "
    "DownloadConfig(), CancelScope())"
)


@dataclass(frozen=True)
class Size:
    """How much is measured. `megabytes` are those of the file that several connections fetch so
    often, `mb_per_s` is the speed at which SmolLM2 arrives, `settle_s` is left to a worker to end
    or to start, and `vocabulary` is the number of tokens of a header."""

    rounds: int
    vocabulary: int
    megabytes: int
    fetches: int
    kills: int
    evictions: int
    settle_s: float
    mb_per_s: float


FULL = Size(5, 150_000, 30, 3, 20, 7, 1.5, 30)
QUICK = Size(1, 150_000, 12, 3, 4, 2, 1.5, 30)
SMOKE = Size(1, 1_000, 1, 1, 1, 1, 0.5, 1)


@contextmanager
def served(
    folder: Path, *, mb_per_s: float | None = None, per_connection: float | None = None
) -> Iterator[str]:
    """The address of a server of a folder, in a process of its own."""
    command = [sys.executable, loopback.__file__, str(folder)]
    command += ["--mb-per-s", str(mb_per_s)] if mb_per_s else []
    command += ["--connection-mb-per-s", str(per_connection)] if per_connection else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def registry_of(source: dict[str, Any], system: str = SYSTEM) -> ModelRegistry:
    variant = {"quantization": "?", "size_mb": 1, "min_ram_gb": 1, "source": source}
    model = {"name": "m", "license": "?", "context_length": CONTEXT, "variants": {"v": variant}}
    agent = {"name": "a", "description": "a", "system_prompt": system, "models": {"primary": "m"}}
    content = {"version": "1", "models": {"m": model}, "agents": {"conversation": agent}}
    return ModelRegistry.parse(json.dumps(content), base=Path())


def engine_of(registry: ModelRegistry, cache: Path) -> OrionInferenceEngine:
    config = EngineConfig(
        serving=ServingConfig(context_length=CONTEXT, threads=usable_cores()),
        download=DownloadConfig(cache_dir=cache, auto=True),
    )
    return OrionInferenceEngine(registry, config)


class LastByte:
    """Notes when the last byte of a source is in the cache."""

    def __init__(self, cache: Path, source: SourceSpec) -> None:
        self._cache, self._source = ModelCache(cache), source
        self._at = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            arrived, total = self._cache.arrived(self._source)
            if total and arrived == total:
                self._at = time.perf_counter()
                return
            time.sleep(0.01)

    def seconds_since(self, moment: float) -> float:
        """Seconds from the last byte to a moment."""
        self._thread.join(60)
        return moment - self._at


def ask(engine: OrionInferenceEngine, **asked: Any) -> tuple[float, InferenceResult]:
    """When the first text came, and the result."""
    handle = engine.stream(QUESTION, temperature=0.0, max_tokens=32, **asked)
    first = 0.0
    for _ in handle:
        first = first or time.perf_counter()
    handle.complete_loading.result(120)
    return first, handle.result()


def progressive(
    url: str, file: Path, work: Path, **asked: Any
) -> tuple[float, float, InferenceResult]:
    """Seconds from the call and from the last byte to the first token, and the result."""
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    source = SourceSpec(url=url, shards=[file.name])
    registry = registry_of({"url": url, "shards": [file.name]})
    with engine_of(registry, cache) as engine:
        time.sleep(0.5)  # its idle worker starts
        last_byte = LastByte(cache, source)
        started = time.perf_counter()
        first, result = ask(engine, **asked)
    return first - started, last_byte.seconds_since(first), result


def sequential(url: str, file: Path, work: Path) -> tuple[float, float]:
    """The same for a download that is followed by a `Llama`."""
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    source = SourceSpec(url=url, shards=[file.name])
    (path,) = ModelCache(cache).paths(source)
    peer = Peer("fresh", path, slots=1, context=CONTEXT, threads=usable_cores())
    try:
        last_byte = LastByte(cache, source)
        started = time.perf_counter()
        ModelCache(cache).pull(source, DownloadConfig(), CancelScope())
        asked_at = time.perf_counter()
        conversation = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION},
        ]
        first = asked_at + peer.run([conversation], 1, is_streamed=True)["firsts"][0]
    finally:
        peer.close()
    return first - started, last_byte.seconds_since(first)


def arriving(name: str, file: Path, mb_per_s: float, work: Path, rounds: int) -> list[Row]:
    """The first token of a model that arrives, against fetching it first."""
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with served(file.parent, mb_per_s=mb_per_s) as url:
        for turn in range(rounds):
            sides = [
                lambda: ours.append(progressive(url, file, work)[:2]),
                lambda: theirs.append(sequential(url, file, work)),
            ]
            for side in sides if turn % 2 else sides[::-1]:
                side()
    ratios = [a / b for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    case = f"{name} at {mb_per_s:g} MB/s"
    return [
        row(f"{case}: first token, progressive", [t for t, _ in ours], "s", higher_is_better=False),
        row(
            f"{case}: first token, then Llama", [t for t, _ in theirs], "s", higher_is_better=False
        ),
        row(
            f"{case}: after the last byte, progressive",
            [t for _, t in ours],
            "s",
            higher_is_better=False,
        ),
        row(
            f"{case}: after the last byte, Llama",
            [t for _, t in theirs],
            "s",
            higher_is_better=False,
        ),
        row(
            f"{case}: after the last byte, ratio", ratios, "ratio", bar=0.15, higher_is_better=False
        ),
    ]


def logits(file: Path, work: Path) -> list[Row]:
    """What the model says while it arrives, against what it says when it is loaded."""
    with served(file.parent, mb_per_s=60) as url:
        _, _, during = progressive(url, file, work, logprobs=20)
    with engine_of(registry_of({"path": str(file)}), work / "other") as engine:
        _, after = ask(engine, logprobs=20)
    assert during.receipt.load is not None
    assert during.receipt.load.mode == "progressive"
    pairs = list(zip(during.logprobs or [], after.logprobs or [], strict=True))
    equal = sum(a.token == b.token for a, b in pairs)
    differences = [0.0]
    for a, b in pairs:
        known = {t.token: t.logprob for t in b.top}
        differences += [abs(t.logprob - known[t.token]) for t in a.top if t.token in known]
    return [
        row("equal argmax, progressive and loaded", [equal], "of 32", bar=32),
        row(
            "logprobs, largest difference",
            [max(differences)],
            "nats",
            bar=1e-3,
            higher_is_better=False,
        ),
    ]


def moved(name: str, file: Path, mb_per_s: float, work: Path, rounds: int) -> list[Row]:
    """The longest pause of an answer in which the model moves to its last context."""
    longest, usual = [], []
    with served(file.parent, mb_per_s=mb_per_s) as url:
        for _ in range(rounds):
            cache = work / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            times: list[float] = []
            with engine_of(registry_of({"url": url, "shards": [file.name]}), cache) as engine:
                handle = engine.stream(QUESTION, temperature=0.0, max_tokens=96)
                for _event in handle:
                    times.append(time.perf_counter())
                handle.complete_loading.result(120)
            gaps = [(b - a) * 1e3 for a, b in pairwise(times)]
            longest.append(max(gaps))
            usual.append(statistics.median(gaps[-32:]))
    case = f"{name}: while the context changes"
    return [
        row(f"{case}, longest pause", longest, "ms", higher_is_better=False),
        row(f"{case}, usual pause after it", usual, "ms", higher_is_better=False),
    ]


def evicted(file: Path, work: Path, rounds: int, settle_s: float) -> list[Row]:
    """An agent that comes back, against a fresh `Llama` on the same warm file."""
    conversation = [
        {"role": "system", "content": LONG_SYSTEM},
        {"role": "user", "content": "Hello!"},
    ]
    peer = Peer("fresh", file, slots=1, context=CONTEXT, threads=usable_cores())
    ours, theirs = [], []
    cached = 0
    try:
        with engine_of(registry_of({"path": str(file)}, LONG_SYSTEM), work / "evicted") as engine:
            for turn in range(rounds + 1):
                started = time.perf_counter()
                handle = engine.stream("Hello!", max_tokens=4, temperature=0.0)
                events = iter(handle)
                next(events)
                took = time.perf_counter() - started
                result = handle.result()
                time.sleep(settle_s)
                engine.unload("conversation")
                time.sleep(settle_s)  # the next worker starts
                if turn:  # the first one makes the snapshot
                    ours.append(took)
                    cached = result.usage.cached_tokens
                    theirs.append(peer.run([conversation], 4, is_streamed=True)["firsts"][0])
    finally:
        peer.close()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    case = "evicted agent, first token"
    return [
        row("evicted agent, tokens from its snapshot", [cached], "tokens"),
        row(f"{case}, engine", [s * 1e3 for s in ours], "ms", higher_is_better=False),
        row(f"{case}, Llama", [s * 1e3 for s in theirs], "ms", higher_is_better=False),
        row(f"{case}, ratio", ratios, "ratio", bar=0.35, higher_is_better=False),
    ]


def parallel(work: Path, megabytes: int, rounds: int) -> list[Row]:
    """Several connections against one, where each is limited."""
    folder = work / "served"
    folder.mkdir(exist_ok=True)
    (folder / "blob").write_bytes(random.Random(1).randbytes(megabytes * 1_000_000))
    speeds: dict[int, list[float]] = {1: [], 4: []}
    with served(folder, per_connection=10) as url:
        source = SourceSpec(url=url, shards=["blob"])
        for turn in range(rounds):
            for connections in (1, 4) if turn % 2 else (4, 1):
                shutil.rmtree(work / "cache", ignore_errors=True)
                started = time.perf_counter()
                config = DownloadConfig(connections=connections)
                ModelCache(work / "cache").pull(source, config, CancelScope())
                speeds[connections].append(megabytes / (time.perf_counter() - started))
    ratios = [four / one for one, four in zip(speeds[1], speeds[4], strict=True)]
    return [
        row("10 MB/s a connection: 1 connection", speeds[1], "MB/s"),
        row("10 MB/s a connection: 4 connections", speeds[4], "MB/s"),
        row("10 MB/s a connection: 4 against 1", ratios, "ratio", bar=3),
    ]


def killed(work: Path, kills: int) -> list[Row]:
    """Downloads that are killed at a random byte and resumed."""
    folder = work / "served"
    folder.mkdir(exist_ok=True)
    chance = random.Random(2)
    content = chance.randbytes(24_000_000)
    (folder / "killed").write_bytes(content)
    right, twice = 0, []
    for _ in range(kills):
        cache = work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        with loopback.LoopbackServer(folder, bytes_per_s=60e6) as server:
            fatal = chance.randrange(1, len(content))
            process = subprocess.Popen(
                [sys.executable, "-c", PULL, str(cache), server.url, "killed"]
            )
            while server.bytes_sent < fatal and process.poll() is None:
                time.sleep(0.001)
            process.kill()
            process.wait()
            source = SourceSpec(url=server.url, shards=["killed"])
            (path,) = ModelCache(cache).pull(source, DownloadConfig(), CancelScope())
            digest = hashlib.sha256(path.read_bytes()).digest()
            right += digest == hashlib.sha256(content).digest()
            twice.append((server.bytes_sent - len(content)) / CHUNK_BYTES)
    return [
        row("killed and resumed: right in the end", [right / kills], "part", bar=1),
        row(
            "killed and resumed: fetched twice, at most",
            [max(twice)],
            "chunks",
            bar=1,
            higher_is_better=False,
        ),
    ]


def header(work: Path, tokens: int) -> list[Row]:
    """The header of a model with a large vocabulary, without and with as many merges."""
    import gguf

    rows = []
    for has_merges in (False, True):
        name = f"{tokens:,} tokens{' and merges' if has_merges else ''}"
        path = work / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list([f"token-{i}" for i in range(tokens)])
        writer.add_token_types([1] * tokens)
        if has_merges:
            writer.add_token_merges([f"a{i} b{i}" for i in range(tokens)])
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
            step()
        times = []
        for _ in range(15):
            started = time.perf_counter()
            read_header(path)
            times.append((time.perf_counter() - started) * 1e3)
        rows.append(row(f"header with {name}", times, "ms", bar=20, higher_is_better=False))
    return rows


def main() -> int:
    arguments = options("Models that arrive, come back and resume")
    size = extent_of(arguments, full=FULL, quick=QUICK, smoke=SMOKE)
    rows: list[Row] = []

    def add(new: list[Row]) -> None:
        rows.extend(new)
        show(new)

    with tempfile.TemporaryDirectory(prefix="orion-loading-") as name:
        work = Path(name)
        small = model_file(work, is_smoke=arguments.smoke)
        add(header(work, size.vocabulary))
        add(parallel(work, size.megabytes, size.fetches))
        add(killed(work, size.kills))
        add(evicted(small, work, size.evictions, size.settle_s))
        add(arriving("SmolLM2", small, size.mb_per_s, work, size.rounds))
        if size is FULL:
            add(logits(small, work))
            add(moved("SmolLM2", small, 60, work, 5))
            add(arriving("SmolLM2", small, 100, work, 5))
            (work / "large").mkdir()
            large = random_model(
                work / "large" / "1b.gguf", layers=16, width=2048, ffn=8192, heads=32, kv_heads=8,
                tokenizer_from=small,
            )  # fmt: skip
            add(arriving("1B", large, 100, work, 5))
            add(arriving("1B", large, 30, work, 3))
            add(moved("1B", large, 100, work, 3))
    return finish(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
