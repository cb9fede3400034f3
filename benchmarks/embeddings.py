"""What a shared embedding service saves in memory, how exact its cache is, what a hit costs, and
how long a short text takes beside `llama_cpp.Llama.embed`.

all-MiniLM-L6-v2, in worker processes (f16 GGUF, made here) and in sentence-transformers. Memory is
counted in pages, each once, whoever shares it (pss). Private memory alone (uss) leaves out shared
pages, and with them the weights of models that come from one file; so both are shown. Needs the dev
extra, and Linux.
"""

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _report import Row, extent_of, options, report, row
from llama_cpp import Llama

from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.embeddings.service import Embedder, EmbeddingService
from orion_oie.embeddings.vectors import halves, unit_rows
from orion_oie.schemas.results import ModelInfo

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gguf_embedder import GGUFEmbedder
from minilm import minilm_folder, write_minilm

MEMORY_BAR = 0.4
COSINE_BAR = 1e-3
SPEED_BAR = 1.15
NOT_COUNTED = 3
TENS = range(10)
SHORT_TOKENS = 18
USERS = ("router", "memory", "application")
INFO = ModelInfo(model_id="minilm", variant="f16", name="MiniLM", version="2", license="apache-2.0")
CACHE_ENTRIES = 200
TOPICS = ["the sea", "bread", "old clocks", "trains to Paris", "a compiler", "cats", "taxes", "tea"]
SENTENCES = [f"Question {n}: what should one know about {TOPICS[n % 8]}?" for n in range(64)]


@dataclass(frozen=True)
class Size:
    """How much is measured: rounds of random vectors, requests for texts by Zipf's law, misses of
    the cache, and turns beside `Llama.embed`."""

    rounds: int
    requests: int
    misses: int
    turns: int


FULL = Size(40, 50_000, 1000, 100)
QUICK = Size(4, 5_000, 100, 20)
SMOKE = Size(1, 500, 5, 1)

# A process of its own with so many sentence-transformers. It says when torch is there, waits for a
# line, and says when all have embedded.
CHILD = """
import sys
import sentence_transformers
from orion_oie.cancellation import CancelScope
from orion_oie.embeddings.sentence_transformer import SentenceTransformerEmbedder
from orion_oie.embeddings.service import EmbeddingService
folder, count, users = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
print("imported", flush=True)
sys.stdin.readline()
services = [EmbeddingService(SentenceTransformerEmbedder(folder)) for _ in range(count)]
for number, user in enumerate(users):
    texts = [f"a sentence number {n} of {user}" for n in range(8)]
    services[number % count].embed(texts, user=user)
print("embedded", flush=True)
sys.stdin.readline()
"""


def memory(pids: Sequence[int]) -> tuple[float, float]:
    """Pages with shared ones in parts (pss), and private memory (uss), of all processes, in MB."""
    infos = [psutil.Process(pid).memory_full_info() for pid in pids]
    return sum(info.pss for info in infos) / 1e6, sum(info.uss for info in infos) / 1e6


# -- models in workers


@contextmanager
def workers(*files: Path) -> Iterator[list[GGUFEmbedder]]:
    """An embedder for each file."""
    with ExitStack() as stack:
        embedders = []
        for file in files:
            spec = LoadSpec(INFO, (file,), is_embedding=True)
            embedders.append(GGUFEmbedder(LlamaBackend().load, spec))
            stack.callback(embedders[-1].close)
        yield embedders


def worker_memory(*files: Path) -> tuple[float, float]:
    """What three users take: each of its own file, or all of one service if there is one file."""
    with workers(*files) as embedders:
        services = [EmbeddingService(embedder) for embedder in embedders]
        for number, user in enumerate(USERS):
            texts = [f"a sentence number {n} of {user}" for n in range(8)]
            services[number % len(services)].embed(texts, user=user)
        return memory([embedder.pid for embedder in embedders if embedder.pid is not None])


def worker_rows(file: Path) -> list[Row]:
    copies = [Path(shutil.copy(file, file.with_stem(f"copy-{n}"))) for n in range(3)]
    shared_pss, shared_uss = worker_memory(file)
    one_pss, one_uss = worker_memory(file, file, file)
    own_pss, _ = worker_memory(*copies)
    return [
        row("3 users sharing a worker, memory", [shared_pss], "MB", higher_is_better=False),
        row("3 workers, memory", [one_pss], "MB", higher_is_better=False),
        ratio("workers, a file each", shared_pss / own_pss, bar=MEMORY_BAR),
        ratio("workers of one file", shared_pss / one_pss),
        ratio("workers of one file, private memory only", shared_uss / one_uss),
    ]


# -- models in this kind of process


class Children:
    """Processes that have imported torch and wait."""

    def __init__(self, processes: int, models: int, users: Sequence[str]) -> None:
        command = [sys.executable, "-c", CHILD, str(minilm_folder()), str(models), ",".join(users)]
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(processes)
        ]

    def __enter__(self) -> "Children":
        self._expect("imported")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def embed(self) -> None:
        """Let them load their models, and wait until all have embedded."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        self._expect("embedded")

    def _expect(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != word:
                self.__exit__()
                raise SystemExit(f"a child ended before it had {word}")


def process_memory(
    processes: int, models: int, users: Sequence[str]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Memory after importing torch, and when all have embedded."""
    with Children(processes, models, users) as children:
        before = memory(children.pids)
        children.embed()
        return before, memory(children.pids)


def process_rows(size: Size) -> list[Row]:
    base, shared = process_memory(1, 1, USERS)
    name = "sentence-transformers"
    growth = f"3 users sharing one of {name}, growth"
    shared_pss, shared_uss = (now - before for before, now in zip(base, shared, strict=True))
    rows = [row(growth, [shared_pss], "MB", higher_is_better=False)]
    if size is SMOKE:
        return rows
    more_base, three = process_memory(1, 3, USERS)
    three_pss, three_uss = (now - before for before, now in zip(more_base, three, strict=True))
    rows += [
        row(f"3 of {name} in a process, growth", [three_pss], "MB", higher_is_better=False),
        ratio(name, shared_pss / three_pss),
        ratio(f"{name}, private memory only", shared_uss / three_uss),
    ]
    if size is FULL:
        _, (apart_pss, _) = process_memory(3, 1, USERS[:1])
        rows.append(ratio(f"{name}, a process each, torch included", shared[0] / apart_pss))
    return rows


def ratio(what: str, value: float, bar: float | None = None) -> Row:
    name = f"3 users sharing / 3 separate models, memory, {what}"
    return row(name, [value], "", bar=bar, higher_is_better=False)


# -- the cache


def cosine_errors(rounds: int, exact_rows: np.ndarray[Any, Any]) -> list[Row]:
    """The largest error that 16 bits make, of random vectors and of real ones."""
    dice = np.random.default_rng(1)
    worst = 0.0
    for dimensions in (2, 3, 16, 64, 384, 768, 1024, 4096):
        for _ in range(rounds):
            worst = max(worst, error_of(unit_rows(dice.standard_normal((50, dimensions)))))
    return [cosine_row("random vectors", worst), cosine_row("MiniLM", error_of(exact_rows))]


def cosine_row(whose: str, error: float) -> Row:
    name = f"float16 cache: cosine error, {whose}"
    return row(name, [error], "", bar=COSINE_BAR, higher_is_better=False)


def error_of(exact: Any) -> float:
    wide = exact.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    cached = unit_rows(halves(exact)).astype(np.float64)
    return float((1 - np.sum(wide * cached, axis=1) / lengths).max())


class Instant:
    """An embedder that takes no time: for the policy of the cache alone."""

    def embed(self, texts: Sequence[str], _scope: CancelScope) -> Any:
        return np.ones((len(texts), 384), np.float32)

    def close(self) -> None:
        pass


def hit_rates(requests: int) -> list[Row]:
    """Texts drawn by Zipf's law from 2,000; the best that 200 entries could do without knowing
    the order is to hold the 200 most frequent."""
    weights = [1 / rank for rank in range(1, 2001)]
    stream = random.Random(1).choices(range(2000), weights, k=requests)
    embedder: Embedder = Instant()
    service = EmbeddingService(embedder, cache_entries=CACHE_ENTRIES)
    for number in stream:
        service.embed([f"text {number}"])
    best = sum(weights[:CACHE_ENTRIES]) / sum(weights)
    return [
        row("hit rate, Zipf's law, 200 of 2,000 texts", [service.stats().hit_rate], "of 1"),
        row("hit rate that the 200 most frequent texts would have", [best], "of 1"),
    ]


def timings(service: EmbeddingService, rounds: int) -> list[Row]:
    """One text a call, which was not there before and then is."""
    misses, hits = [], []
    for number in range(rounds):
        text = f"{SENTENCES[number % 64]} ({number})"
        for times in (misses, hits):
            started = time.perf_counter()
            service.embed([text])
            times.append((time.perf_counter() - started) * 1e3)
    return [
        row("a miss, one sentence of about 20 tokens", misses, "ms", higher_is_better=False),
        row("a hit", hits, "ms", higher_is_better=False),
        row("a miss / a hit", [statistics.median(misses) / statistics.median(hits)], ""),
    ]


def beside_llama_cpp(file: Path, embedder: GGUFEmbedder, turns: int) -> list[Row]:
    """One short text: a worker, and llama-cpp-python in this process, in turns of ten calls. The
    first calls of a turn do not count: the threads of the other one still spin for work."""
    peer = Llama(str(file), embedding=True, verbose=False)
    texts = [f"What should one know of old clocks and the night train to Paris, {n}?" for n in TENS]
    lengths = {len(peer.tokenize(text.encode())) for text in texts}
    if lengths != {SHORT_TOKENS}:
        raise SystemExit(f"the texts have {lengths} tokens, not {SHORT_TOKENS}")
    scope = CancelScope()
    ways: dict[str, Callable[[str], Any]] = {
        "a worker": lambda text: embedder.embed([text], scope),
        "Llama.embed": peer.embed,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, embed in ways.items():
            for number, text in enumerate(texts):
                started = time.perf_counter()
                embed(text)
                if number >= NOT_COUNTED:
                    times[way].append((time.perf_counter() - started) * 1e3)
    peer.close()
    rows = [
        row(f"one text of {SHORT_TOKENS} tokens, {way}", times[way], "ms", higher_is_better=False)
        for way in ways
    ]
    quotient = rows[0].value / rows[1].value
    each = [ours / theirs for ours, theirs in zip(*times.values(), strict=True)]
    spread = f"of medians; each pair {min(each):.3g} to {max(each):.3g}, n={len(each)}"
    name = f"one text of {SHORT_TOKENS} tokens, a worker / Llama.embed"
    is_met = quotient <= SPEED_BAR
    return [*rows, Row(name, quotient, "", SPEED_BAR, False, is_met, spread)]


def main() -> int:
    arguments = options("What the shared embedding service saves")
    size = extent_of(arguments, full=FULL, quick=QUICK, smoke=SMOKE)
    with tempfile.TemporaryDirectory() as folder:
        file = write_minilm(Path(folder) / "minilm.gguf")
        rows = worker_rows(file)
        rows += process_rows(size)
        with workers(file) as embedders:
            service = EmbeddingService(embedders[0], cache_entries=CACHE_ENTRIES)
            rows += cosine_errors(size.rounds, service.embed(SENTENCES))
            rows += hit_rates(size.requests)
            rows += timings(service, size.misses)
            rows += beside_llama_cpp(file, embedders[0], size.turns)
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
