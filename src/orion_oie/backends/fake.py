"""A backend without models, for tests of applications: it answers as its script says.

It passes the same suite as the real one. A token is a run of non-space characters with the white
space behind it.
"""

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from zlib import crc32

from orion_oie.backends.base import (
    DEFAULT_CONTEXT_LENGTH,
    Completion,
    Footprint,
    GenerationJob,
    LoadSpec,
    OnText,
)
from orion_oie.backends.text import TextAssembler
from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    ContextOverflowError,
    EngineClosedError,
    OrionError,
    WorkerCrashedError,
)
from orion_oie.schemas.loading import (
    LoadProgress,
    OnProgress,
)
from orion_oie.schemas.results import (
    FinishReason,
    ModelInfo,
    Usage,
)
from orion_oie.threads import Event, Future

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FAKE_BYTES = 1 << 20
FAKE_DIMENSIONS = 64
_TOKEN = re.compile(r"\s*\S+\s*|\s+")


@dataclass(frozen=True, slots=True)
class FakeAnswer:
    """The course of one generation: say `text` with `delay_s` before each token.

    Then raise `error` if there is one. With `crash_after`, the model dies after that many tokens
    instead.
    """

    text: str = "This is a fake answer."
    delay_s: float = 0.0
    error: OrionError | None = None
    crash_after: int | None = None


Script = Callable[[GenerationJob], FakeAnswer]


@dataclass
class FakeBackend:
    """Loads nothing. Scripts are by model id; "*" is for the others.

    A script is one answer for all jobs, several answers in turn (the last one stays), or a function
    of the job. `load_errors` are raised by the next loads of a model, in turn. `footprints` are the
    bytes that a model takes, by the key of its `LoadSpec` or by its model id; the others take
    `FAKE_BYTES` beside their `expected_bytes`.
    """

    scripts: Mapping[str, "FakeAnswer | Sequence[FakeAnswer] | Script"] = field(
        default_factory=dict
    )
    load_delay_s: float = 0.0
    load_errors: dict[str, list[OrionError]] = field(default_factory=dict)
    footprints: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loaded: list[str] = []
        self._models: list[FakeModel] = []
        self._makers: dict[str, Script] = {}
        self._lock = threading.Lock()

    def load(self, spec: LoadSpec, scope: CancelScope, on_progress: OnProgress) -> "FakeModel":
        """See `LocalBackend.load`."""
        on_progress(LoadProgress("initializing"))
        _pause(self.load_delay_s, scope, lambda: None)
        with self._lock:
            errors = self.load_errors.get(spec.info.model_id)
            if errors:
                raise errors.pop(0)
            self.loaded.append(spec.key)
            model = FakeModel(spec, self._script_of(spec.info.model_id))
            self._models.append(model)
        for phase in ("ready", "complete"):
            on_progress(replace(model.load_progress, phase=phase))
        return model

    def footprint(self, spec: LoadSpec) -> Footprint:
        """See `LocalBackend.footprint`."""
        size = self.footprints.get(spec.key, self.footprints.get(spec.info.model_id))
        if size is None:
            return Footprint(spec.expected_bytes or 0, 0, 0, process_bytes=FAKE_BYTES)
        return Footprint(weights_bytes=size, kv_bytes=0, compute_bytes=0, process_bytes=0)

    def warm_up(self) -> None:
        """See `LocalBackend.warm_up`."""

    def kill_all(self) -> None:
        """See `LocalBackend.kill_all`."""
        for model in self._models:
            model.close()

    def _script_of(self, model_id: str) -> Script:
        if model_id not in self._makers:
            script = self.scripts.get(model_id, self.scripts.get("*", FakeAnswer()))
            self._makers[model_id] = script if callable(script) else _in_turn(script)
        return self._makers[model_id]


class _ScriptedModel:
    """Answers by a script, on `slots` slots."""

    def __init__(self, info: ModelInfo, script: Script, slots: int) -> None:
        self.info = info
        self._script = script
        self._slots = threading.Semaphore(slots)
        self._death: OrionError | None = None

    def generate(self, job: GenerationJob, scope: CancelScope, on_text: OnText) -> Completion:
        """See `Model.generate`."""
        self._check(scope)
        prompt_tokens = sum(len(_tokens(message.content)) + 1 for message in job.messages)
        limit = self._limit(job, prompt_tokens)
        arrived = time.perf_counter()
        while not self._slots.acquire(timeout=0.01):
            self._check(scope)
        try:
            started = time.perf_counter()
            reason, count, first = self._say(job, limit, scope, on_text)
        finally:
            self._slots.release()
        return Completion(
            finish_reason=reason,
            usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=count),
            wait_ms=(started - arrived) * 1e3,
            prompt_ms=(first - started) * 1e3,
            decode_ms=(time.perf_counter() - first) * 1e3,
        )

    def _say(
        self, job: GenerationJob, limit: int, scope: CancelScope, on_text: OnText
    ) -> tuple[FinishReason, int, float]:
        answer = self._script(job)
        assembler = TextAssembler(job.options.stop)
        first = time.perf_counter()
        reason: FinishReason = "stop"
        count = unsent = 0
        for token in _tokens(answer.text):
            if answer.crash_after == count:
                self._crash()
            if count == limit:
                reason = "length"
                break
            _pause(answer.delay_s, scope, self._check_alive)
            self._check(scope)
            count += 1
            unsent += 1
            first = first if count > 1 else time.perf_counter()
            text = assembler.push(token.encode())
            if text:
                on_text(text, unsent)
                unsent = 0
            if assembler.is_stopped:
                break
        rest = assembler.finish()
        if rest or unsent:
            on_text(rest, unsent)
        if answer.crash_after is not None and answer.crash_after >= count:
            self._crash()
        self._check(scope)
        if answer.error is not None:
            raise answer.error
        return reason, count, first

    def _limit(self, job: GenerationJob, prompt_tokens: int) -> int:
        free: int = self.info.context_length - prompt_tokens
        requested = job.options.max_tokens if job.options.max_tokens_asked else 1
        if requested > free:
            raise ContextOverflowError(
                f"the prompt has {prompt_tokens} tokens and the answer may take {requested}, but "
                f"the context holds {self.info.context_length}",
                prompt_tokens=prompt_tokens,
                requested_tokens=requested,
                limit=self.info.context_length,
            )
        return min(job.options.max_tokens, free)

    def _crash(self) -> None:
        self._death = self._death or WorkerCrashedError(
            f"the fake worker of {self.info.model_id} crashed", pid=None, signal="SIGSEGV"
        )

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death

    def _check(self, scope: CancelScope) -> None:
        self._check_alive()
        scope.check()


class FakeRemoteModel(_ScriptedModel):
    """A fake that is somewhere else: it has nothing to load, measure or close. See `Model`."""

    def __init__(
        self, info: ModelInfo, script: "FakeAnswer | Sequence[FakeAnswer] | Script"
    ) -> None:
        super().__init__(info, script if callable(script) else _in_turn(script), slots=4)


class FakeModel(_ScriptedModel):
    """A fake in memory. See `LocalModel`."""

    pid = None

    def __init__(self, spec: LoadSpec, script: Script) -> None:
        context = spec.context_length or DEFAULT_CONTEXT_LENGTH
        update = {"architecture": "fake", "context_length": context, "threads": 1}
        update["name"] = spec.info.name or spec.info.model_id
        super().__init__(spec.info.model_copy(update=update), script, spec.slots)
        self.load_progress = LoadProgress("complete", fraction=1.0, shards_loaded=1)
        self.completion: Future[ModelInfo] = Future()
        self.completion.set_result(self.info)

    def is_alive(self) -> bool:
        return self._death is None

    def close(self, timeout_s: float = 10.0) -> None:  # noqa: ARG002 (nothing to wait for)
        """See `LocalModel.close`."""
        self._death = self._death or EngineClosedError(f"{self.info.model_id} was unloaded")

    def crash(self) -> None:
        """Die as a worker dies: everything that runs fails with `WorkerCrashedError`."""
        self._crash()

    def embed(self, texts: Sequence[str], scope: CancelScope) -> "NDArray[np.float32]":
        """See `EmbeddingModel.embed`. Texts are alike that have words in common."""
        import numpy as np  # who embeds nothing should not pay for it

        self._check(scope)
        rows = np.zeros((len(texts), FAKE_DIMENSIONS), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split() or [""]:
                row[crc32(word.encode()) % FAKE_DIMENSIONS] += 1
        vectors: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return vectors


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _in_turn(answers: "FakeAnswer | Iterable[FakeAnswer]") -> Script:
    listed = [answers] if isinstance(answers, FakeAnswer) else list(answers)
    turns = itertools.chain(listed, itertools.repeat(listed[-1]))
    lock = threading.Lock()

    def script(_job: GenerationJob) -> FakeAnswer:
        with lock:
            return next(turns)

    return script


def _pause(seconds: float, scope: CancelScope, check: Callable[[], None]) -> None:
    """Let time pass; a cancel ends it at once, a crash soon."""
    cancelled = Event()
    undo = scope.on_cancel(cancelled.set)
    try:
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0 and not cancelled.wait(min(left, 0.02)):
            check()
    finally:
        undo()
    scope.check()
