"""llama.cpp's own account of the memory that a model takes, from its log, in a process of its own.

Without weights it only works out what it would allocate; then it does not say what it copies.
"""

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FIGURES = {
    "kv": r"llama_kv_cache: size = +([\d.]+) MiB",
    "state": r"llama_memory_recurrent: size = +([\d.]+) MiB",
    "buffer": r"compute buffer size = +([\d.]+) MiB",
    "output": r"output buffer size = +([\d.]+) MiB",
    "repacked": r"CPU_REPACK model buffer size = +([\d.]+) MiB",
}
_INFO, _CONTINUED = 2, 5
_LOAD_MODE_PLAIN = 0


class DryRun:
    """Asks the process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ask(
        self,
        file: Path,
        *,
        context_length: int = 512,
        sequences: int = 6,
        batch_tokens: int = 512,
        has_weights: bool = False,
    ) -> dict[str, float]:
        """What a model takes, in MiB to two places."""
        request = [str(file), context_length, sequences, batch_tokens, has_weights]
        return self._said(request)

    def features(self) -> set[str]:
        """What llama.cpp was built for and found in the processor."""
        return {name for name, is_there in self._said([]).items() if is_there}

    def _said(self, request: list[Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def dry_run() -> Iterator[DryRun]:
    """A process to ask."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield DryRun(process)
    finally:
        process.communicate()  # the end of its input is its end


def _figures(lc: Any, request: list[Any]) -> dict[str, float]:
    file, context_length, sequences, batch_tokens, has_weights = request
    lines: list[str] = []

    def on_log(level: int, text: bytes, _data: object) -> None:
        if _INFO <= level <= _CONTINUED:
            lines.append(text.decode("utf-8", "replace"))

    callback = lc.llama_log_callback(on_log)
    lc.llama_log_set(callback, ctypes.c_void_p(0))
    model_params = lc.llama_model_default_params()
    if not has_weights:
        model_params.no_alloc = True
        model_params.load_mode = _LOAD_MODE_PLAIN
    model = lc.llama_model_load_from_file(file.encode(), model_params)
    params = lc.llama_context_default_params()
    params.n_ctx = context_length
    params.n_batch = params.n_ubatch = batch_tokens
    params.n_seq_max = params.n_outputs_max = sequences
    params.kv_unified = True
    context = lc.llama_init_from_model(model, params) if model else None
    log = "".join(lines)
    assert context, log
    lc.llama_free(context)
    lc.llama_model_free(model)
    lc.llama_log_set(lc.llama_log_callback(), ctypes.c_void_p(0))
    return {name: sum(map(float, re.findall(line, log))) for name, line in _FIGURES.items()}


def main() -> None:
    import llama_cpp as lc

    lc.llama_backend_init()
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            answer = _figures(lc, request)
        else:
            info = lc.llama_print_system_info().decode()
            answer = {name: value == "1" for name, value in re.findall(r"(\w+) = (\d)", info)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
