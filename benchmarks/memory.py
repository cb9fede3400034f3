"""What models take in memory: what was told before the load, against what their workers take.

Needs the smollm2 extra, and Linux.
"""

import sys
import tempfile
import time
from pathlib import Path

from _random_model import random_model, smollm2_path
from _report import Row, options, report, row

from orion_oie.backends.base import GenerationJob, LoadSpec
from orion_oie.backends.llama.client import LlamaModel
from orion_oie.backends.llama.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.memory import probe
from orion_oie.schemas import GenerationOptions, Message, ModelInfo

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
    spec = LoadSpec(info, (file,), context_length=CONTEXT, parked_bytes=0)
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


def footprints(work: Path, *, is_quick: bool) -> list[Row]:
    small = smollm2_path()
    tiny = random_model(
        work / "tiny.gguf", layers=2, width=64, ffn=128, heads=4, kv_heads=2, tokenizer_from=small
    )
    rounds = 1 if is_quick else 3
    rows = footprint("tiny", tiny, rounds) + footprint("smollm2", small, rounds)
    if not is_quick:
        large = random_model(
            work / "1b.gguf", layers=16, width=2048, ffn=8192, heads=32, kv_heads=8,
            tokenizer_from=small,
        )  # fmt: skip
        rows += footprint("1B", large, rounds)
    return rows


def main() -> int:
    arguments = options("What models take in memory")
    with tempfile.TemporaryDirectory(prefix="orion-memory-") as name:
        rows = footprints(Path(name), is_quick=arguments.quick)
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
