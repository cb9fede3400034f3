"""The engine's own cost, over a backend that answers at once. Prints its figures as JSON.

Runs in a process of its own for each version of the library that is compared: `overhead.py` puts
one on the path. Not a benchmark itself.
"""

import asyncio
import inspect
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orion_oie import EngineConfig, ModelRegistry, OrionInferenceEngine
from orion_oie.backends.fake import FakeAnswer, FakeBackend

AGENT = "conversation"
WARM_UP = 100


def registry(folder: Path) -> ModelRegistry:
    (folder / "model.gguf").touch()
    source = {"path": str(folder / "model.gguf")}
    variant = {"quantization": "q4_k_m", "size_mb": 1, "min_ram_gb": 0.1, "source": source}
    model = {"name": "M", "license": "x", "context_length": 2048, "variants": {"q4": variant}}
    agent = {
        "name": "C",
        "description": "",
        "system_prompt": "You help.",
        "models": {"primary": "main"},
    }
    content = {"version": "1", "models": {"main": model}, "agents": {AGENT: agent}}
    return ModelRegistry.parse(json.dumps(content), base=folder)


def config(folder: Path, outstanding: int) -> EngineConfig:
    """The settings, in whatever form this version of the library takes them."""
    if "serving" in EngineConfig.model_fields:
        settings: dict[str, Any] = {
            "serving": {"slots": 16, "max_queue": outstanding},
            "download": {"cache_dir": folder},
        }
    else:
        settings = {"slots": 16, "max_queue": outstanding, "cache_dir": folder}
    return EngineConfig(**settings)


def one_by_one(engine: OrionInferenceEngine, requests: int) -> float:
    """Processor seconds per request of `infer`."""
    started = time.process_time()
    for _ in range(requests):
        engine.infer("Hello?", agent=AGENT)
    return (time.process_time() - started) / requests


def submitted(engine: OrionInferenceEngine, outstanding: int) -> float:
    """Requests per second, all of them submitted before the first is waited for."""
    started = time.perf_counter()
    for handle in [engine.submit("Hello?", agent=AGENT) for _ in range(outstanding)]:
        handle.result()
    return outstanding / (time.perf_counter() - started)


async def awaited(engine: OrionInferenceEngine, outstanding: int) -> float:
    """The same through `ainfer`."""
    started = time.perf_counter()
    await asyncio.gather(*(engine.ainfer("Hello?", agent=AGENT) for _ in range(outstanding)))
    return outstanding / (time.perf_counter() - started)


def main() -> None:
    requests, outstanding = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        backend = FakeBackend({"*": FakeAnswer("One fine answer.")})
        settings = config(Path(folder), outstanding)
        with OrionInferenceEngine(registry(Path(folder)), settings, backend=backend) as engine:
            one_by_one(engine, WARM_UP)
            figures = {
                "cpu_us": one_by_one(engine, requests) * 1e6,
                "submit_per_s": submitted(engine, outstanding),
                "ainfer_per_s": asyncio.run(awaited(engine, outstanding)),
            }
    print(json.dumps({"of": inspect.getfile(OrionInferenceEngine), **figures}))


if __name__ == "__main__":
    main()
