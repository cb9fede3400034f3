"""Every benchmark runs, and writes its rows. What they say of speed is not judged here."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("[a-z]*.py"))
COLUMNS = {"name", "value", "unit", "bar", "higher_is_better", "ok"}
# What each benchmark promises to measure: how the names of its rows begin.
PROMISED = {
    "beside": [
        "another program comes", "it ends", "alone, 1 stream, engine", "1 stream beside 1 busy",
        "prompt of 32 tokens beside 1 busy", "1 stream beside 1 busy, engine / xllamacpp",
        "first token p95",
    ],
    "cancel": [f"cancel during {phase}" for phase in ("load", "queue", "prefill", "decode")],
    "embeddings": [
        "3 users sharing a worker", "3 users sharing / 3 separate models, memory, workers",
        "3 users sharing one of sentence-transformers", "float16 cache: cosine error, MiniLM",
        "hit rate", "a miss", "a hit", "one text of 18 tokens, a worker / Llama.embed",
    ],
    "loading": [
        "header with 1,000 tokens", "10 MB/s a connection: 4 against 1",
        "killed and resumed: right in the end", "killed and resumed: fetched twice",
        "evicted agent, first token, ratio", "SmolLM2 at 1 MB/s: after the last byte, ratio",
    ],
    "memory": [
        "footprint, tiny: estimated / measured", "6 requests to 3 models, budget for 2: peak",
        "6 requests to 3 models, budget for 2: loads", "the thread that watches memory",
    ],
    "multimodel": [
        "2 models at once, engine / 2 Llama", "2 models at once, engine / best fixed split",
        "1 model, beside a loaded idle one / alone", "6 requests for 3 models in turn",
    ],
    "overhead": [
        "time to first token, engine - Llama", "end to end, engine / Llama", "import orion_oie",
        "heavy modules imported", "processor time of the engine per request", "requests through",
    ],
    "routing": [
        "own set, core, lenient", "own set, embeddings, lenient", "kinds, core,",
        "kinds, embeddings,",
        "own set, sentence-transformers and an 8-bit GGUF agree", "conversations, core",
        "conversations, embeddings", "core, a prompt, p95", "with embeddings, a prompt, p95",
        "embedding stage, memory", "core router, memory",
    ],
    "throughput": [
        "4 at once, engine / llama", "4 at once, engine / xllamacpp", "4 at once, engine / bare",
        "private memory, engine / xllamacpp", "2 requests to 1 agents, total, engine / xllamacpp",
        "second turn / whole prompt", "gap of a stream", "part of a 4-slot step",
    ],
    "waiting": [
        "order, one agent", "choice of the next", "paused_s", "availability", "deadline", "submit",
        "queue_position", "health()", "stats()", "cancel", "shutdown(0)", "answer of each",
    ],
}  # fmt: skip
# The units of figures that are 0 only where nothing was measured.
NEVER_ZERO = {"tokens/s", "MB/s", "MB", "MiB", "1/s"}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_writes_its_rows(path: Path, smollm2: Path, tmp_path: Path) -> None:
    """`--smoke --json FILE` writes all rows, which hold a figure each that can be one; the status
    is 1 if a bar is missed."""
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, str(path), "--smoke", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stderr == ""
    rows = json.loads(file.read_text())["rows"]
    names = [row["name"] for row in rows]
    for begin in PROMISED[path.stem]:
        assert any(name.startswith(begin) for name in names), f"no row {begin!r}"
    assert len(set(names)) == len(names)
    assert all(name in done.stdout for name in names)
    for row in rows:
        check_row(row)
    assert done.returncode == int(any(row["ok"] is False for row in rows))


def check_row(row: dict[str, Any]) -> None:
    """It has all columns, a figure that can be one, and says rightly if that meets the bar."""
    assert set(row) >= COLUMNS
    value, bar = row["value"], row["bar"]
    assert isinstance(row["unit"], str)
    assert math.isfinite(value), row
    assert value >= 0 or " - " in row["name"], row
    assert value > 0 or row["unit"] not in NEVER_ZERO, row
    if bar is None:
        assert row["ok"] is None, row
    else:
        assert row["ok"] is (value >= bar if row["higher_is_better"] else value <= bar), row
