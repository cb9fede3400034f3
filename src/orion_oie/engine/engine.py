"""OrionInferenceEngine: the public calls.

Each is a few lines: `pipeline.py` processes requests, `build.py` makes the parts.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from orion_oie.config import EngineConfig
from orion_oie.errors import EngineClosedError, InvalidRequestError, OrionError
from orion_oie.schemas.base import LONGEST_WAIT_S
from orion_oie.schemas.units import in_mib
from orion_oie.threads import is_nested, unbroken

if TYPE_CHECKING:  # imported with the first engine: see `build.py`
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Unpack

    import numpy as np
    from numpy.typing import NDArray

    from orion_oie.backends.base import LocalBackend
    from orion_oie.engine.answer_stream import AnswerStream
    from orion_oie.engine.build import Parts
    from orion_oie.engine.chat import Chat
    from orion_oie.engine.handle import RequestHandle
    from orion_oie.engine.streaming import ChunkBy
    from orion_oie.hardware.sample import MemorySample
    from orion_oie.models.registry import ModelRegistry
    from orion_oie.routing.base import Router
    from orion_oie.schemas.plans import Plan
    from orion_oie.schemas.requests import RequestOptionsDict
    from orion_oie.schemas.results import InferenceResult, ModelInfo, TokenEvent
    from orion_oie.schemas.stats import EngineStats, Health, ResidentModel
    from orion_oie.telemetry.event_log import Subscriber


_CALLS_S = 1.0  # how long a shutdown waits at least for the last callbacks


class OrionInferenceEngine:
    """Answers questions with local models, each in a process of its own.

    registry: a path to a models.json, a `ModelRegistry`, or None: the file that `ORION_REGISTRY`
    names, else the user's own, else the packaged one (`ModelRegistry.default`).
    model: every agent answers with this model, and with no other: a GGUF file (of a split model the
    first one), "hf:org/repo:Q4_K_M", "ollama:name", an https address, or the id of a model in the
    registry. A relative path starts at the working directory. The registry itself is not changed.
    config: see `EngineConfig`; also as a dictionary. backend, router and clock (seconds, for the
    breakers) may be replaced, e.g. by `orion_oie.backends.fake.FakeBackend` in tests of an
    application.

    Raises `RegistryError` with every problem of the registry, `UnknownAgentError` for a pinned
    agent that it does not know; for `model`, `ModelNotFoundError`, `ModelCorruptError`,
    `ModelError` and `DownloadError`.
    """

    def __init__(
        self,
        registry: str | os.PathLike[str] | ModelRegistry | None = None,
        config: EngineConfig | Mapping[str, Any] | None = None,
        *,
        model: str | os.PathLike[str] | None = None,
        backend: LocalBackend | None = None,
        router: Router | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Everything that answers questions: a mere `import orion_oie` should not pay for it.
        from orion_oie.engine.build import build, resolved
        from orion_oie.models.registry import registry_of

        self.config = resolved(_config_of(config))
        self.registry = registry_of(registry)
        if model is not None:
            from orion_oie.models.downloads.cache import ModelCache

            cache = ModelCache(self.config.download.cache_dir)
            self.registry = self.registry.answering_with(model, cache)
        for agent_id in self.config.memory.pinned:
            self.registry.agent(agent_id)
        self._parts = build(self.registry, self.config, backend, router, clock)
        self._pid = os.getpid()
        self._is_closed = False  # takes no more calls
        self._closing_s = math.inf  # the shortest time that a call of shutdown gives
        self._is_over = False
        self._ending = threading.Lock()
        # Requests under way refer to the pipeline. When nothing does any more, all workers end.
        self._finalizer = weakref.finalize(self._parts.pipeline, self._parts.backend.kill_all)

    @property
    def router(self) -> Router:
        """The router that chooses agents: a `HybridRouter` unless the application brought one."""
        return self._parts.pipeline.router

    # -- questions: all of these are views of submit()

    def infer(self, query: str, **options: Unpack[RequestOptionsDict]) -> InferenceResult:
        """Ask and wait for the answer. `RequestOptions` describes each option.

        Raises `InvalidRequestError` and its kin for a request that must be changed, `ModelError`
        and `WorkerError` when no model could answer, `CircuitOpenError`, `QueueFullError`,
        `DeadlineExceededError`, `EngineClosedError`.
        """
        handle = self._usable().pipeline.submit(query, options, is_streamed=False)
        try:
            return handle.result()
        except BaseException:
            handle.cancel()  # Ctrl-C while waiting: nobody wants the answer any more
            raise

    def submit(self, query: str, **options: Unpack[RequestOptionsDict]) -> RequestHandle:
        """Ask and go on. The handle raises what is wrong with the request, which is answered also
        if the handle is dropped.

        Raises `EngineClosedError`.
        """
        return self._usable().pipeline.submit(query, options)

    def stream(
        self,
        query: str,
        *,
        chunk_by: ChunkBy = "token",
        typewriter_delay: float = 0.0,
        on_event: Callable[[TokenEvent], None] | None = None,
        **options: Unpack[RequestOptionsDict],
    ) -> RequestHandle:
        """Ask and iterate over the answer while it is written.

        chunk_by: "token", "word", "sentence" or a `orion_oie.engine.streaming.Splitter`.
        typewriter_delay: pause in seconds after each piece that a reader takes.
            A function is called on the thread of each reader.
        on_event: called with every `TokenEvent`, on a thread of its own; if it raises, the
        request ends. `result()`, the end of a `with` block and `close` wait until it has all text.

        Leave a loop or a `with` block, or drop the handle, and the request ends: see
        `RequestHandle`. Raises at once what is
        wrong with the request: `InvalidRequestError` and its kin, `QueueFullError`,
        `EngineClosedError`; with `on_event`, `WorkerError` when the system gives no thread. The
        rest is raised by the handle.
        """
        handle = self._usable().pipeline.submit(
            query, options, is_read=True, chunk_by=chunk_by, typewriter_delay_s=typewriter_delay
        )
        if on_event is not None:
            try:
                handle.feed(on_event)
            except BaseException:  # no thread for it, or Ctrl-C
                handle.cancel()
                raise
        return handle

    async def ainfer(self, query: str, **options: Unpack[RequestOptionsDict]) -> InferenceResult:
        """`infer` for asynchronous callers; cancelling the task cancels the request."""
        await self._look_up(options)
        return await self._usable().pipeline.submit(query, options, is_streamed=False)

    def astream(
        self,
        query: str,
        *,
        chunk_by: ChunkBy = "token",
        typewriter_delay: float = 0.0,
        on_event: Callable[[TokenEvent], None] | None = None,
        **options: Unpack[RequestOptionsDict],
    ) -> AnswerStream:
        """`stream` for asynchronous callers: `async for event in stream`, then `await
        stream.result()`. Leaving the loop, or cancelling the task, cancels the request."""
        from orion_oie.engine.answer_stream import AnswerStream

        return AnswerStream(
            self.stream(
                query,
                chunk_by=chunk_by,
                typewriter_delay=typewriter_delay,
                on_event=on_event,
                **options,
            )
        )

    def chat(self, agent: str | None = None, system_prompt: str | None = None) -> Chat:
        """A conversation that keeps its history. None lets the router choose the agent of each
        question; `system_prompt` replaces the agent's.

        Raises `UnknownAgentError`, `InvalidRequestError`.
        """
        from orion_oie.engine.chat import Chat

        return Chat(self, agent, system_prompt)

    def plan(self, query: str, **options: Unpack[RequestOptionsDict]) -> Plan:
        """The plan of `infer` for the same arguments: the route, the model and its variant, the
        models to load and to evict. Does none of it.

        Raises what is wrong with the request, like `infer`.
        """
        return self._usable().pipeline.plan(query, options)

    def embed(self, texts: Sequence[str], *, user: str = "application") -> NDArray[np.float32]:
        """Unit vectors of texts, shape (texts, dimensions), by the one embedding model that all
        parts of the program share. `user` names the part that asks, for statistics.

        Raises `ModelNotFoundError` when there is none; else see `EmbeddingService.embed`.
        """
        return self._usable().embeddings.service().embed(texts, user=user)

    # -- models

    def preload(self, agent_id: str, *, pin: bool = False) -> ModelInfo:
        """Load the model that would answer for an agent now; returns what was loaded. With `pin` it
        is never evicted, until `unload`."""
        return self._usable().residents.preload(agent_id, pin=pin)

    def pull(self, name: str) -> tuple[Path, ...]:
        """Fetch the files of an agent's primary model, of a model, of `MODEL@VARIANT` or of a
        source such as "hf:org/repo:Q4_K_M", if they are not on this machine; returns their paths.
        `model.loading` events report the progress.

        Raises `ModelNotFoundError` for an unknown name, `DownloadError`, `DigestMismatchError`.
        """
        return self._usable().residents.pull(name)

    def unload(self, agent_id: str) -> bool:
        """Free the idle models that an agent itself names, in any variant, even if other agents
        share them or they are pinned.

        Returns False when none was loaded or all were in use.
        """
        residents = self._parts.residents
        return unbroken(lambda: residents.unload(agent_id), "orion-unload").result()

    # -- what happens, and how it goes

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call `callback(event)` for every event, one at a time and in order, on a thread of its
        own: it may ask the engine, and wait, and holds back its own events alone. It may hear of an
        event a little later than it happens; `close` waits for it, a second at most. When ten
        thousand events wait, the oldest are lost (`stats().lost_events`).

        Returns the function that ends the subscription: the events of before come through first,
        unless that takes longer than a second; after it no call begins."""
        return self._parts.events.subscribe(callback)

    def export_logs(self) -> list[dict[str, Any]]:
        """The recent events, oldest first, as JSON-compatible dictionaries."""
        return self._parts.events.export()

    def reset_breakers(self) -> None:
        """Close every circuit breaker and forget its counts."""
        self._parts.breakers.reset()

    def stats(self) -> EngineStats:
        """Counts of requests, models, memory, predictive loads, breakers, hardware."""
        parts = self._parts
        return parts.observer.stats(
            parts.pipeline.live(),
            parts.counters.snapshot(parts.pipeline.counts()),
            parts.preloader.stats(),
            parts.embeddings.stats(),
            parts.events,
        )

    def memory_history(self) -> list[MemorySample]:
        """Samples of memory, oldest first: the machine, this process, each worker. One every two
        seconds while there are workers, for the last twenty minutes."""
        return self._parts.memory.monitor.history()

    def health(self) -> Health:
        """`down` when it cannot be used; `degraded` while a breaker is not closed, the queue is
        full, memory is short, another model stands in for an agent's own, or a request makes no
        progress: the reasons name it and what stands in its way."""
        observer, pipeline = self._parts.observer, self._parts.pipeline
        try:
            self._usable()
        except EngineClosedError as error:
            return observer.down(error)
        return observer.health(pipeline.live())

    # -- its life

    def initialize(self) -> OrionInferenceEngine:
        """Check that the engine can be used, and prepare for its first load. Optional."""
        self._usable().backend.warm_up()
        return self

    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new requests, fail the waiting ones, give running ones `timeout` seconds, then
        end them, and end all workers. Every `on_event` gets what was written if it takes no longer
        than that; subscribers and done callbacks have a second. None takes
        `EngineConfig.shutdown_timeout_s`. Idempotent: a further call waits for the end too, and may
        shorten the time of running requests.

        An interrupted call, as by Ctrl-C, goes on without its caller. In a callback of the library,
        and in the handler of a signal that arrived during another call, it begins the end and
        returns.

        Raises `InvalidRequestError` for a timeout that is no such number.
        """
        if timeout is None:
            timeout = self.config.shutdown_timeout_s
        if isinstance(timeout, bool) or not (
            isinstance(timeout, (int, float)) and 0 <= timeout <= LONGEST_WAIT_S
        ):
            raise InvalidRequestError(
                f"timeout: allowed is a number of seconds >= 0 and <= {LONGEST_WAIT_S}, or None, "
                f"got {timeout!r}"
            )
        if os.getpid() != self._pid:
            return
        self._is_closed = True
        self._closing_s = min(self._closing_s, timeout)
        self._parts.pipeline.hurry(timeout)
        ending = unbroken(self._end, "orion-shutdown")
        if not is_nested():
            ending.result()

    def _end(self) -> None:
        """End everything, once. Each step may be repeated."""
        with self._ending:
            if self._is_over:
                return
            parts = self._parts
            parts.pipeline.close()
            parts.embeddings.close()
            parts.memory.close()
            parts.memory.pool.close(self._closing_s)
            parts.backend.kill_all()
            parts.pipeline.end_all(self.config.serving.cancel_grace_s)
            parts.calls.wait(max(self._closing_s, _CALLS_S))
            self._finalizer.detach()
            parts.pipeline.report_closed()
            parts.events.flush(_CALLS_S)
            self._is_over = True

    def close(self) -> None:
        """`shutdown` with the configured timeout."""
        self.shutdown()

    async def aclose(self) -> None:
        """`close` for asynchronous callers: the event loop goes on meanwhile."""
        import asyncio  # a tenth of the library's import time; only asynchronous callers need it

        await asyncio.to_thread(self.shutdown)

    def __repr__(self) -> str:
        loaded = len(self._parts.memory.pool.residents())
        state = "closed" if self._is_closed else f"{loaded} loaded"
        agents, models = len(self.registry.agents), len(self.registry.models)
        return f"<OrionInferenceEngine: {agents} agents, {models} models, {state}>"

    def __str__(self) -> str:
        if self._is_closed:
            return repr(self)
        residents = self._parts.memory.pool.residents()
        return "\n".join([repr(self), *map(_resident_line, residents.values())])

    def __enter__(self) -> OrionInferenceEngine:
        return self.initialize()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.shutdown(timeout=None if error is None else 0.0)

    async def __aenter__(self) -> OrionInferenceEngine:
        return self.initialize()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import asyncio  # a tenth of the library's import time; only asynchronous callers need it

        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    async def _look_up(self, options: RequestOptionsDict) -> None:
        """Look up the model that a request names, off the event loop: that may read files, and ask
        a hub."""
        name = options.get("model")
        if name is None or (isinstance(name, str) and name in self.registry.models):
            return
        import asyncio  # a tenth of the library's import time; only asynchronous callers need it

        with contextlib.suppress(OrionError):  # the request raises it
            await asyncio.to_thread(self._usable().pipeline.look_up, name)

    def _usable(self) -> Parts:
        """The parts of an engine that can be used. Raises `EngineClosedError`."""
        if self._is_closed:
            raise EngineClosedError("the engine was shut down; make a new one")
        if os.getpid() != self._pid:
            raise EngineClosedError(
                f"the engine belongs to process {self._pid}, and this is its fork {os.getpid()}; "
                "make an engine after forking"
            )
        return self._parts


def _config_of(config: EngineConfig | Mapping[str, Any] | None) -> EngineConfig:
    if isinstance(config, EngineConfig):
        return config
    try:
        return EngineConfig(**(config or {}))
    except TypeError:
        raise InvalidRequestError(
            f"config: an EngineConfig or a dictionary is needed, got {type(config).__name__}"
        ) from None


def _resident_line(one: ResidentModel) -> str:
    """A model in memory, in a line."""
    state = "is being loaded" if one.is_loading else "answers now" if one.users else "is idle"
    size = in_mib(one.reserved_bytes)
    return f"  {one.model.model_id}@{one.model.variant}: {size} of memory, {state}"
