"""Hundreds of requests of all kinds against one worker: everything ends as it should, nothing is
left over, and what was answered in the crowd is what would have been answered alone. `make soak`
sends two thousand, to all layers of the model.

What may differ: see docs/numerics.md. The share that
differs is printed when ORION_SOAK_REPORT is set.
"""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from contracts import INFO

from orion_oie.backends.base import Completion, GenerationJob, LoadSpec
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope, DeadlineTimer
from orion_oie.errors import DeadlineExceededError, OrionError, RequestCancelledError
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)

REQUESTS = int(os.environ.get("ORION_SOAK_REQUESTS", "600"))
AT_ONCE = 24
SLOTS = 8
CONTEXT = 2048
AGENTS = [
    "You are a librarian. Answer in one short sentence and name one book.",
    "You are a sailor of few words. You like the sea, the wind and the stars, and say so often.",
    "You answer with a single word, whatever the question is about.",
]
SUBJECTS = [
    "rain",
    "chess",
    "bread",
    "ships",
    "stars",
    "birds",
    "paper",
    "salt",
    "trains",
    "maps",
    "wool",
    "ice",
]
SCHEMA = {
    "type": "object",
    "properties": {"is_good": {"type": "boolean"}, "grade": {"enum": ["low", "high"]}},
    "required": ["is_good", "grade"],
}
GRAMMAR = 'root ::= ("yes" | "no") "!"'


@dataclass
class Work:
    """One request: the job, what happens to it, and how it ended."""

    job: GenerationJob
    cancel_after: int | None = None
    deadline_s: float | None = None
    pieces: list[str] = field(default_factory=list)
    completion: Completion | None = None
    error: Exception | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def said(self) -> tuple[str, list[tuple[str, float]]]:
        """The text, and each token with its probability: those tell prompts apart that are
        answered alike."""
        assert self.completion is not None
        return self.text, [(one.token, one.logprob) for one in self.completion.logprobs or []]

    @property
    def is_comparable(self) -> bool:
        """Greedy, and left alone."""
        is_greedy = self.job.options.temperature == 0
        return is_greedy and self.cancel_after is None and self.deadline_s is None


def works() -> Iterator[Work]:
    """The same mixture each time."""
    chance = random.Random(7)
    for number in range(REQUESTS):
        subject = chance.choice(SUBJECTS)
        options: dict[str, object] = {
            "temperature": 0.0 if chance.random() < 0.8 else 0.9,
            "seed": number,
            "max_tokens": chance.choice([1, 2, 4, 6, 8, 12]),
            "logprobs": 1,
        }
        kind = chance.random()
        if kind < 0.06:
            options |= {"json_schema": SCHEMA, "max_tokens": 40}
        elif kind < 0.14:
            options |= {"grammar": GRAMMAR}
        elif kind < 0.2:
            options |= {"stop": ["e", "\n"]}
        history: tuple[Message, ...] = ()
        session = None
        if chance.random() < 0.3:
            session = f"session {chance.randrange(20)}"
            history = (
                Message(role="user", content=f"I like {session[8:]} things about {subject}."),
                Message(role="assistant", content="So do I."),
            )
        messages = (
            Message(role="system", content=chance.choice(AGENTS)),
            *history,
            Message(role="user", content=f"What of {subject} number {chance.randrange(400)}?"),
        )
        work = Work(GenerationJob(messages, GenerationOptions(**options), session))
        fate = chance.random()
        if fate < 0.06:
            work.cancel_after = chance.randrange(3)
        elif fate < 0.1:
            work.deadline_s = chance.choice([0.001, 0.05, 0.2])
        yield work


def answer(model: LlamaModel, work: Work, timer: DeadlineTimer) -> None:
    scope = CancelScope()
    if work.deadline_s is not None:
        timer.watch(scope, work.deadline_s)
    if work.cancel_after == 0:
        scope.cancel(RequestCancelledError("at once"))

    def on_text(text: str, _tokens: int) -> None:
        work.pieces.append(text)
        if work.cancel_after is not None and len(work.pieces) >= work.cancel_after:
            scope.cancel(RequestCancelledError("enough"))

    try:
        work.completion = model.generate(work.job, scope, on_text)
    except OrionError as error:
        work.error = error
    finally:
        timer.forget(scope)


def run(model: LlamaModel, chosen: list[Work], at_once: int) -> list[int]:
    """Answer everything; the worker's memory after each tenth of it, in bytes."""
    timer = DeadlineTimer()
    process = psutil.Process(model.pid)
    memory = []
    with ThreadPoolExecutor(at_once) as threads:
        tenth = -(-len(chosen) // 10)
        for start in range(0, len(chosen), tenth):
            part = chosen[start : start + tenth]
            list(threads.map(lambda work: answer(model, work, timer), part))
            memory.append(process.memory_info().rss)
    return memory


def loaded(path: Path, slots: int) -> LlamaModel:
    spec = LoadSpec(INFO, (path,), slots=slots, context_length=CONTEXT, host_cache_bytes=2**25)
    return LlamaBackend().load(spec, CancelScope(), lambda _fraction: None)


def check_end(work: Work) -> None:
    """A request ended as what happened to it allows."""
    if work.error is not None:
        allowed = (
            RequestCancelledError if work.cancel_after is not None else None,
            DeadlineExceededError if work.deadline_s is not None else None,
        )
        assert type(work.error) in allowed, work.error
        return
    completion = work.completion
    assert completion is not None
    usage, options = completion.usage, work.job.options
    assert 0 <= usage.cached_tokens < usage.prompt_tokens
    assert usage.completion_tokens <= options.max_tokens
    if completion.finish_reason == "length":
        assert usage.completion_tokens == options.max_tokens
    elif options.json_schema is not None:
        value = json.loads(work.text)
        assert isinstance(value["is_good"], bool)
        assert value["grade"] in ("low", "high")
    elif options.grammar is not None:
        assert work.text in ("yes!", "no!")
    assert not any(stop in work.text for stop in options.stop)


@pytest.mark.timeout(900)
def test_many_requests(request: pytest.FixtureRequest) -> None:
    """Sessions, three agents, grammars, stops, cancels and deadlines in a crowd: each request ends
    as it should, slots and cells are free, memory is flat in the second half, and 99 % of the
    greedy answers are to the letter those of a model with one slot, and as probable to the last
    bit."""
    model_name = "smollm2" if "ORION_SOAK_REQUESTS" in os.environ else "shallow_smollm2"
    file: Path = request.getfixturevalue(model_name)
    crowd = list(works())
    model = loaded(file, SLOTS)
    try:
        memory = run(model, crowd, AT_ONCE)
        for work in crowd:
            check_end(work)
        occupancy = model.occupancy()
        assert occupancy.busy_slots == 0
        assert occupancy.waiting == 0
        assert occupancy.held_cells == 0
        assert max(memory[5:]) <= 1.05 * min(memory[5:])
    finally:
        model.close()
    alone = [work for work in works() if work.is_comparable][::3]
    model = loaded(file, 1)
    try:
        run(model, alone, 1)
    finally:
        model.close()
    in_crowd = [work for work in crowd if work.is_comparable][::3]
    pairs = list(zip(in_crowd, alone, strict=True))
    other = [(a.said, b.said) for a, b in pairs if a.said != b.said]
    if "ORION_SOAK_REPORT" in os.environ:
        print(f"{len(crowd)} requests, {len(pairs)} compared, {len(other)} differ: {other}")
        print("memory in MB after each tenth:", [round(m / 1e6) for m in memory])
    assert len(pairs) > REQUESTS / 6
    assert len(other) <= 0.01 * len(pairs), other
