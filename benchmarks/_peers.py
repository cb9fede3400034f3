"""The peers of the benchmarks, each in a process of its own: `python _peers.py KIND FILE ...`.

A peer reads one JSON request per line from its standard input and writes one line per answer:
{"conversations": [...], "max_tokens": n, "is_streamed": b} asks all of them at once and gives the
seconds in all, the tokens, and the seconds to each first text; {"memory": true} gives its private
memory. Not a benchmark itself.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Conversation = list[dict[str, str]]
OnFirst = Callable[[], None] | None
Ask = Callable[[Conversation, int, OnFirst], int]
"""Answers a conversation and returns the number of tokens. With a function to call at the first
text, the answer is streamed."""

MOST_AT_ONCE = 64
# Threads that stay, as those of an application's server do.
_threads = ThreadPoolExecutor(MOST_AT_ONCE)


def run_all(
    ask: Ask, conversations: list[Conversation], max_tokens: int, *, is_streamed: bool
) -> dict[str, Any]:
    """Ask everything at once; seconds in all, tokens in all, seconds to each first text."""
    barrier = threading.Barrier(len(conversations) + 1)

    def one(conversation: Conversation) -> tuple[int, float]:
        seen: list[float] = []
        barrier.wait()
        started = time.perf_counter()
        on_first = (lambda: seen.append(time.perf_counter())) if is_streamed else None
        tokens = ask(conversation, max_tokens, on_first)
        return tokens, (seen[0] if seen else time.perf_counter()) - started

    running = [_threads.submit(one, conversation) for conversation in conversations]
    barrier.wait()
    started = time.perf_counter()
    ended = [future.result() for future in running]
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": sum(tokens for tokens, _ in ended),
        "firsts": [first for _, first in ended],
    }


class Peer:
    """A peer process, seen from the benchmark."""

    def __init__(self, kind: str, file: Path, *, slots: int, context: int, threads: int) -> None:
        settings = json.dumps({"slots": slots, "context": context, "threads": threads})
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind, str(file), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._receive()

    def run(
        self, conversations: list[Conversation], max_tokens: int, *, is_streamed: bool
    ) -> dict[str, Any]:
        """`run_all` over there."""
        return self._ask(
            {
                "conversations": conversations,
                "max_tokens": max_tokens,
                "is_streamed": is_streamed,
            }
        )

    def memory_bytes(self) -> int:
        return int(self._ask({"memory": True})["bytes"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the peer died"
        answer: dict[str, Any] = json.loads(line)
        return answer


def private_bytes(pid: int) -> int:
    """Memory that only this process holds: what would come back if it ended."""
    import psutil

    return int(psutil.Process(pid).memory_full_info().uss)


def _llama(file: str, settings: dict[str, int]) -> Ask:
    """llama_cpp.Llama behind a lock."""
    from llama_cpp import Llama

    llama = Llama(
        file,
        n_ctx=settings["context"],
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        verbose=False,
    )
    lock = threading.Lock()

    def ask(conversation: Conversation, max_tokens: int, on_first: OnFirst) -> int:
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens}
        with lock:
            if on_first is None:
                whole = llama.create_chat_completion(conversation, **options)
                return int(whole["usage"]["completion_tokens"])
            tokens = 0
            for chunk in llama.create_chat_completion(conversation, stream=True, **options):
                if chunk["choices"][0]["delta"].get("content"):
                    if not tokens:
                        on_first()
                    tokens += 1
        return tokens

    return ask


def _xllamacpp(file: str, settings: dict[str, int]) -> Ask:
    """llama.cpp's own server loop, with its own defaults."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = settings["context"]
    params.n_parallel = settings["slots"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    server = xllamacpp.Server(params)

    def ask(conversation: Conversation, max_tokens: int, on_first: OnFirst) -> int:
        last: dict[str, Any] = {}
        is_first = True

        def on_chunk(chunk: str) -> None:
            nonlocal is_first
            part = json.loads(chunk)
            choices = part.get("choices") or [{}]
            if on_first and is_first and choices[0].get("delta", {}).get("content"):
                is_first = False
                on_first()
            if part.get("usage"):
                last.update(part["usage"])

        request: dict[str, Any] = {
            "messages": conversation,
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        if on_first is not None:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        server.handle_chat_completions(json.dumps(request), on_chunk)
        return int(last["completion_tokens"])

    return ask


def _fresh(file: str, settings: dict[str, int]) -> Ask:
    """llama_cpp.Llama, loaded anew for each question."""
    import llama_cpp  # noqa: F401 (imported before anything is timed)

    def ask(conversation: Conversation, max_tokens: int, on_first: OnFirst) -> int:
        return _llama(file, settings)(conversation, max_tokens, on_first)

    return ask


AskAll = Callable[[list[Conversation], int], int]
"""Answers conversations together and returns the number of tokens in all."""


def _bare(file: str, settings: dict[str, int]) -> AskAll:
    """llama_decode in a loop: all prompts are computed, then one token of each answer in every
    batch, the most probable one. No queue, no cache, no text."""
    import ctypes

    import llama_cpp as lc
    import numpy as np
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(file.encode(), lc.llama_model_default_params())
    vocab = lc.llama_model_get_vocab(model)
    size, end = lc.llama_vocab_n_tokens(vocab), lc.llama_vocab_eos(vocab)
    template = lc.llama_model_chat_template(model, None).decode()
    form = Jinja2ChatFormatter(template, eos_token="", bos_token="")
    params = lc.llama_context_default_params()
    params.n_ctx = settings["context"]
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = settings["slots"]
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = settings["threads"]
    context = lc.llama_init_from_model(model, params)
    batch = lc.llama_batch_init(512, 0, 1)

    def tokens_of(conversation: Conversation) -> list[int]:
        text = form(messages=conversation).prompt.encode()
        buffer = (lc.llama_token * (len(text) + 8))()
        count = lc.llama_tokenize(vocab, text, len(text), buffer, len(buffer), True, True)
        return list(buffer[:count])

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """The next tokens, in the order of the rows that ask for one."""
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = is_wanted
        if lc.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        wanted = [index for index, row in enumerate(rows) if row[3]]
        logits = ctypes.cast(lc.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        table = np.ctypeslib.as_array(logits, shape=(len(wanted), size))
        return [int(token) for token in table.argmax(axis=1)]

    def ask_all(conversations: list[Conversation], max_tokens: int) -> int:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        prompts = [tokens_of(conversation) for conversation in conversations]
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        firsts = [token for at in range(0, len(rows), 512) for token in decode(rows[at : at + 512])]
        running = {
            sequence: (token, len(prompt))
            for sequence, (token, prompt) in enumerate(zip(firsts, prompts, strict=True))
            if token != end
        }
        total = len(running)
        for _ in range(max_tokens - 1):
            if not running:
                break
            step = [(token, at, sequence, True) for sequence, (token, at) in running.items()]
            found = zip(step, decode(step), strict=True)
            running = {row[2]: (token, row[1] + 1) for row, token in found if token != end}
            total += len(running)
        return total

    return ask_all


_KINDS = {"llama": _llama, "xllamacpp": _xllamacpp, "fresh": _fresh}


def main() -> None:
    kind, file, settings = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints must not mix with the answers
    ask_all = _bare(file, json.loads(settings)) if kind == "bare" else None
    ask = None if ask_all else _KINDS[kind](file, json.loads(settings))
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "memory" in request:
            answer = {"bytes": private_bytes(os.getpid())}
        elif ask is None:
            started = time.perf_counter()
            tokens = ask_all(request["conversations"], request["max_tokens"])
            answer = {"seconds": time.perf_counter() - started, "tokens": tokens, "firsts": []}
        else:
            answer = run_all(ask, **request)
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
