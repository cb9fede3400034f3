"""What models take in memory: what was told before the load, against what their workers take; many
models under a budget for two; what watching costs.

`--data FILE` writes what `scripts/plot_memory.py` draws. Needs the smollm2 extra, and Linux.
"""

import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _random_model import random_model, registry_of
from _report import Row, extent_of, options, report, row
from _subject import model_file

from orion_oie import (
    EngineConfig,
    Event,
    LoadingConfig,
    MemoryConfig,
    OrionInferenceEngine,
    ServingConfig,
)
from orion_oie.backends.base import GenerationJob, LoadSpec
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.hardware import probe
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)
from orion_oie.schemas.results import ModelInfo
from orion_oie.telemetry.events import ModelLoaded, PoolEvicted

BAR = 0.10
CONTEXT = 4096
LONG_PROMPT = "word " * 670  # read in pieces as large as they get
SETTLED_S = 0.3  # pages that are given back after a load have gone


def ask(model: LlamaModel, question: str) -> None:
    job = GenerationJob(
        (Message(role="user", content=question),), GenerationOptions(temperature=0.0, max_tokens=8)
    )
    model.generate(job, CancelScope(), lambda _text, _tokens: None)


def footprint(name: str, file: Path, rounds: int) -> list[Row]:
    """The footprint of a model, and what its worker takes after a long prompt and short ones."""
    info = ModelInfo(model_id=name, variant="v", name=name, version="1", license="?")
    # States outside the cache would be growth, which is not told apart from the outside.
    spec = LoadSpec(info, (file,), context_length=CONTEXT, host_cache_bytes=0)
    estimated, measured = [], []
    for _ in range(rounds):
        backend = LlamaBackend()
        estimated.append(backend.footprint(spec).total_bytes)
        model = backend.load(spec, CancelScope(), lambda _progress: None)
        try:
            ask(model, LONG_PROMPT)
            for number in range(3):
                ask(model, f"Hello {number}!")
            time.sleep(SETTLED_S)
            measured.append(probe.resident_bytes(model.pid) or 0)
        finally:
            model.close()
    errors = [abs(e / m - 1) for e, m in zip(estimated, measured, strict=True)]
    case = f"footprint, {name}"
    return [
        row(f"{case}: estimated", [e / 2**20 for e in estimated], "MiB", higher_is_better=False),
        row(f"{case}: measured", [m / 2**20 for m in measured], "MiB", higher_is_better=False),
        row(f"{case}: estimated / measured", errors, "from 1", bar=BAR, higher_is_better=False),
    ]


@dataclass(frozen=True)
class Size:
    """How much is measured. `files` are the models whose footprint is measured; `models` share
    little memory, and `watched_s` is how long the cost of watching them is."""

    rounds: int
    files: tuple[str, ...]
    models: int
    requests: int
    watched_s: float


FULL = Size(3, ("tiny", "smollm2", "1B"), 6, 300, 30)
QUICK = Size(1, ("tiny", "smollm2"), 6, 18, 4)
SMOKE = Size(1, ("tiny",), 3, 6, 0.5)


def footprints(work: Path, small: Path, size: Size) -> list[Row]:
    made: dict[str, Callable[[], Path]] = {
        "tiny": lambda: random_model(
            work / "tiny.gguf", layers=2, width=64, ffn=128, heads=4, kv_heads=2,
            tokenizer_from=small,
        ),
        "smollm2": lambda: small,
        "1B": lambda: random_model(
            work / "1b.gguf", layers=16, width=2048, ffn=8192, heads=32, kv_heads=8,
            tokenizer_from=small,
        ),
    }  # fmt: skip
    return [one for name in size.files for one in footprint(name, made[name](), size.rounds)]


# -- many models, little memory

CLIENTS = 4
ZIPF = 1.1
SAMPLE_S = 0.05


class Watch:
    """What the workers of this process take, 20 times a second, and who comes and goes."""

    def __init__(self, engine: OrionInferenceEngine) -> None:
        self._started = time.monotonic()
        self.samples: list[dict[str, Any]] = []
        self.loads: list[dict[str, Any]] = []
        self.evictions: list[dict[str, Any]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        engine.subscribe(self._note)
        self._thread.start()

    def _note(self, event: Event) -> None:
        t = time.monotonic() - self._started
        if isinstance(event, ModelLoaded):
            self.loads.append({"t": t, "key": event.key, "worker": str(event.pid)})
        elif isinstance(event, PoolEvicted):
            self.evictions.append({"t": t, "key": event.key})

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.samples.append(self._sample())

    def _sample(self) -> dict[str, Any]:
        """All workers count, also one that waits for a model or is being ended."""
        t = time.monotonic() - self._started
        found = {str(pid): probe.resident_bytes(pid) for pid in worker_pids()}
        return {"t": t, "workers": {pid: size for pid, size in found.items() if size}}

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def worker_pids() -> list[int]:
    """The workers of this process."""
    listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = {int(pid) for file in listed for pid in file.read_text().split()}
    return [pid for pid in children if b"llama.worker" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def models_of(work: Path, count: int, tokenizer_from: Path) -> dict[str, Path]:
    """Models of different sizes, by name."""
    return {
        f"model-{number}": random_model(
            work / f"model-{number}.gguf",
            layers=6 + 2 * number,
            width=384,
            ffn=1024,
            heads=6,
            kv_heads=2,
            tokenizer_from=tokenizer_from,
            seed=number,
        )
        for number in range(count)
    }


def turns(files: dict[str, Path], work: Path, data: Path | None, requests: int) -> list[Row]:
    """Requests to all models, the popular ones more often, under a budget for the two largest."""
    registry = registry_of(files, work)
    serving = ServingConfig(context_length=2048, slots=4)
    with OrionInferenceEngine(registry, EngineConfig(serving=serving)) as engine:
        plans = [engine.plan("Hello", agent=name) for name in files]
    needed = sorted(plan.model.needed_bytes or 0 for plan in plans if plan.model is not None)
    budget = sum(needed[-2:])
    dice = random.Random(1)
    weights = [1 / (rank + 1) ** ZIPF for rank in range(len(files))]
    asked = dice.choices(list(files), weights, k=requests)
    config = EngineConfig(serving=serving, memory=MemoryConfig(budget=budget))
    with OrionInferenceEngine(registry, config) as engine:
        watch = Watch(engine)
        started = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:

            def ask(name: str) -> bool:
                result = engine.infer("Say something.", agent=name, max_tokens=8)
                return result.usage.completion_tokens > 0

            answered = list(clients.map(ask, asked))
        seconds = time.monotonic() - started
        watch.end()
        stats = engine.stats()
    if data is not None:
        content = {
            "requests": requests,
            "budget_bytes": budget,
            "samples": watch.samples,
            "loads": watch.loads,
            "evictions": watch.evictions,
        }
        data.write_text(json.dumps(content))
    peak = max(sum(sample["workers"].values()) for sample in watch.samples)
    case = f"{requests} requests to {len(files)} models, budget for 2"
    return [
        row(f"{case}: budget", [budget / 2**20], "MiB"),
        row(f"{case}: peak of the workers", [peak / 2**20], "MiB", higher_is_better=False),
        row(f"{case}: peak / budget", [peak / budget], "ratio", bar=1.05, higher_is_better=False),
        row(
            f"{case}: requests that failed",
            [float(requests - sum(answered) + stats.requests.failed)],
            "requests",
            bar=0,
            higher_is_better=False,
        ),
        row(f"{case}: loads", [float(len(watch.loads))], "loads", higher_is_better=False),
        row(f"{case}: time", [seconds], "s", higher_is_better=False),
    ]


def monitoring(files: dict[str, Path], work: Path, seconds: float) -> list[Row]:
    """What the thread that watches memory costs, with a worker for each model."""
    config = EngineConfig(
        serving=ServingConfig(context_length=512, slots=1), loading=LoadingConfig(predictive=False)
    )
    with OrionInferenceEngine(registry_of(files, work), config) as engine:
        for name in files:
            engine.preload(name)
        thread = next(t for t in threading.enumerate() if t.name == "orion-memory")
        assert thread.native_id is not None
        before = thread_cpu_s(thread.native_id)
        time.sleep(seconds)
        used = thread_cpu_s(thread.native_id) - before
    label = f"the thread that watches memory, {len(files)} workers: CPU"
    return [row(label, [100 * used / seconds], "%", bar=0.2, higher_is_better=False)]


def thread_cpu_s(thread_id: int) -> float:
    """CPU time of one thread of this process, in nanosecond steps."""
    text = Path(f"/proc/self/task/{thread_id}/schedstat").read_text()
    return int(text.split()[0]) / 1e9


def main() -> int:
    arguments = options(__doc__ or "", data=True)
    size = extent_of(arguments, full=FULL, quick=QUICK, smoke=SMOKE)
    with tempfile.TemporaryDirectory(prefix="orion-memory-") as name:
        work = Path(name)
        small = model_file(work, is_smoke=arguments.smoke)
        rows = footprints(work, small, size)
        files = models_of(work, size.models, small)
        rows += turns(files, work, arguments.data, size.requests)
        rows += monitoring(files, work, size.watched_s)
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
