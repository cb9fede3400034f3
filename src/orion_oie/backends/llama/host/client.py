"""The host's side of a worker: speaks with its process, notices when it dies.

Each loaded model has one process, and a reader and a writer thread here: nobody else waits for the
socket, so that a worker that stopped reading holds up neither a cancel nor a close. What to load,
and when, is the loader's business.
"""

import base64
import contextlib
import itertools
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import TYPE_CHECKING, cast

from orion_oie.backends.base import (
    Completion,
    GenerationJob,
    LoadSpec,
    Occupancy,
    OnText,
    usable_context,
)
from orion_oie.backends.llama.host.process import (
    WorkerProcess,
    beginning_of,
)
from orion_oie.backends.llama.host.threads import ThreadGovernor
from orion_oie.backends.llama.protocol import Packet, error_from_wire, receive, send
from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    EngineClosedError,
    InvalidRequestError,
    OrionError,
    WorkerCrashedError,
    WorkerError,
    WorkerTimeoutError,
)
from orion_oie.hardware.machine import usable_cores
from orion_oie.models.formats.gguf import GGUFHeader
from orion_oie.schemas.loading import LoadProgress
from orion_oie.schemas.results import (
    ModelInfo,
    TokenAlternative,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOG_LINES_KEPT = 20
_DYING_GRACE_S = 1.0

OnLog = Callable[[str, str, str], None]
OnCrash = Callable[[str, WorkerCrashedError], None]


class _Pending:
    """A request that waits for its worker. Ends once, with an answer or an error."""

    def __init__(self, on_text: OnText) -> None:
        self.on_text = on_text
        self.awake = threading.Event()  # it ended, or it was cancelled
        self.ended = threading.Event()
        self.answer: object | None = None
        self.error: Exception | None = None

    def end(self, answer: object | None = None, error: Exception | None = None) -> None:
        if not self.ended.is_set():
            self.answer, self.error = answer, error
            self.ended.set()
            self.awake.set()


class LlamaModel:
    """A model in a worker process. See `LoadedModel`.

    `load` sends it on its way; `on_log(level, line, model_id)` and `on_crash(model_id, error)` are
    called on the reader thread. `governor` divides the cores among the models that compute.
    """

    def __init__(
        self,
        spec: LoadSpec,
        worker: WorkerProcess,
        governor: ThreadGovernor | None = None,
        cancel_grace_s: float = 5.0,
        on_log: OnLog = lambda _level, _line, _model_id: None,
        on_crash: OnCrash = lambda _model_id, _error: None,
    ) -> None:
        self._spec = spec
        self._info = spec.info
        self._governor = governor or ThreadGovernor(usable_cores())
        self._cancel_grace_s = cancel_grace_s
        self._on_log = on_log
        self._on_crash = on_crash
        self._on_loading: Callable[[float], None] = lambda _fraction: None
        self._on_buried: Callable[[], None] = lambda: None
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()
        self._pending: dict[int, _Pending] = {}
        self._is_closing = False
        self._death: OrionError | None = None
        self._buried = threading.Event()
        self._hello = threading.Event()
        self._why_no_gate = self._device = ""
        self._load_ended = threading.Event()
        self._load_error: OrionError | None = None
        self._log_lines: deque[str] = deque(maxlen=_LOG_LINES_KEPT)
        self._progress: Callable[[], LoadProgress] = lambda: LoadProgress("initializing")
        self.completion: Future[ModelInfo] = Future()
        self._process, self._connection, self._output = worker
        name = spec.info.model_id
        self._writer = threading.Thread(
            target=self._write, name=f"orion-writer-{name}", daemon=True
        )
        self._writer.start()
        threading.Thread(target=self._read, name=f"orion-reader-{name}", daemon=True).start()

    # -- the load

    def why_no_gate(self, scope: CancelScope, timeout_s: float) -> str:
        """Why this worker cannot compute while a model arrives; empty when it can."""
        self._await(self._hello, scope, timeout_s)
        return self._why_no_gate

    def device(self, scope: CancelScope, timeout_s: float) -> str:
        """ "gpu" when this worker could put layers on one, else "cpu"."""
        self._await(self._hello, scope, timeout_s)
        return self._device

    def load(
        self,
        headers: Sequence[GGUFHeader],
        scope: CancelScope,
        timeout_s: float,
        settings: Packet,
        on_loading: Callable[[float], None],
    ) -> None:
        """Load files, and wait until the worker can answer; on any error the process is ended
        first. `settings` go with the command as they are; `on_loading` gets the fraction."""
        spec = self._spec
        self._info = _described(spec, headers)
        self._on_loading = on_loading
        self._outbox.put(
            {
                "op": "load",
                "slots": spec.slots,
                "context_length": usable_context(spec.context_length, headers[0].context_length),
                "threads": spec.threads or usable_cores(),
                "parked_bytes": spec.parked_bytes,
                "is_embedding": spec.is_embedding,
                "prompt_format": spec.prompt_format and spec.prompt_format.model_dump(),
                **settings,
            }
        )
        self._await(self._load_ended, scope, timeout_s)

    def take_over(self, files: Sequence[Path]) -> None:
        """Let the worker go on in a context that waits for nothing, now that what was arriving lies
        at `files`; `completion` is done when it does."""
        self._outbox.put({"op": "complete", "files": [str(file) for file in files]})

    def fail(self, error: OrionError) -> None:
        """End the process, and with `error` what waits for it."""
        self._die(error)
        self._process.kill()

    def on_buried(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the process has ended; at once if it has."""
        self._on_buried = callback
        if self._buried.is_set():
            callback()

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def load_progress(self) -> LoadProgress:
        return self._progress()

    def show_progress(self, progress: Callable[[], LoadProgress]) -> None:
        """From now on, `progress()` says how far the load is."""
        self._progress = progress

    def is_alive(self) -> bool:
        return self._death is None and not self._is_closing

    def _await(self, event: threading.Event, scope: CancelScope, timeout_s: float) -> None:
        """Wait for a step of the load; on any error the process is ended first."""
        undo = scope.on_cancel(event.set)
        try:
            is_ended = event.wait(timeout_s)
        except BaseException:
            self.kill()  # interrupted here: nobody would ever close it
            raise
        finally:
            undo()
        error = scope.error or self._load_error
        if not is_ended:
            error = WorkerTimeoutError(
                f"{self._spec.key} was not loaded within {timeout_s:g} s; raise "
                "EngineConfig.loading.timeout_s",
                timeout_s=timeout_s,
            )
        if error is not None:
            self.close(timeout_s=0.0)
            raise error

    def generate(self, job: GenerationJob, scope: CancelScope, on_text: OnText) -> Completion:
        """See `LoadedModel.generate`."""
        if self._spec.is_embedding:
            raise InvalidRequestError(f"{self._spec.key} was loaded to embed, not to generate")
        request = {
            "op": "generate",
            "messages": [message.model_dump() for message in job.messages],
            "options": job.options.model_dump(),
            "session_id": job.session_id,
            "priority": job.priority,
            "is_streamed": job.is_streamed,
            "is_prefix_public": job.is_prefix_public,
        }
        with self._computing():
            return cast(Completion, self._ask(request, scope, on_text))

    def embed(self, texts: Sequence[str], scope: CancelScope) -> "NDArray[np.float32]":
        """See `EmbeddingModel.embed`."""
        if not self._spec.is_embedding:
            raise InvalidRequestError(f"{self._spec.key} was loaded to generate, not to embed")
        request = {"op": "embed", "texts": list(texts)}
        with self._computing():
            vectors = self._ask(request, scope, lambda _text, _tokens: None)
        return cast("NDArray[np.float32]", vectors)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        self._governor.join(self)
        try:
            yield
        finally:
            self._governor.leave(self)

    @property
    def most_threads(self) -> int | None:
        """See `governor.Member`."""
        return self._spec.threads

    def use_threads(self, threads: int) -> None:
        """See `governor.Member`."""
        self._outbox.put({"op": "threads", "threads": threads})

    def occupancy(self) -> Occupancy:
        """What the worker is busy with now. Raises `WorkerCrashedError`."""
        answer = self._ask({"op": "occupancy"}, CancelScope(), lambda _text, _tokens: None)
        return cast(Occupancy, answer)

    def _ask(self, request: Packet, scope: CancelScope, on_text: OnText) -> object:
        """Send a request and wait for its answer."""
        scope.check()
        pending = _Pending(on_text)
        with self._lock:
            if self._death is not None:
                raise self._death
            request_id = next(self._ids)
            self._pending[request_id] = pending

        def on_cancel() -> None:
            self._outbox.put({"op": "cancel", "id": request_id})
            pending.awake.set()

        self._outbox.put({**request, "id": request_id})
        undo = scope.on_cancel(on_cancel)
        try:
            pending.awake.wait()
            if not pending.ended.wait(self._cancel_grace_s):
                self._give_up()
        except BaseException:
            on_cancel()  # interrupted here: the worker must not go on for nobody
            raise
        finally:
            undo()
            with self._lock:
                self._pending.pop(request_id, None)
        if pending.error is not None:
            raise pending.error
        if pending.answer is None:
            scope.check()
            raise WorkerError(f"{self._spec.key} ended a request without an answer")
        return pending.answer

    def close(self, timeout_s: float = 10.0) -> None:
        """See `LoadedModel.close`."""
        with self._lock:
            self._is_closing = True
        if timeout_s > 0:
            self._outbox.put({"op": "close"})
        if not self._buried.wait(timeout_s):
            self.kill()
            self._buried.wait()

    def kill(self) -> None:
        """End the process at once, without waiting and without taking locks."""
        self._is_closing = True
        self._process.kill()

    def _give_up(self) -> None:
        """The worker did not confirm a cancel in time: it is stuck in native code."""
        self._die(
            WorkerTimeoutError(
                f"worker {self.pid} of {self._spec.key} did not confirm a cancel within "
                f"{self._cancel_grace_s:g} s and was ended",
                pid=self.pid,
            )
        )
        self._process.kill()

    # -- writer thread

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                send(self._connection, message)
        except OSError:
            return  # the worker is gone; the reader thread tells everyone who waits

    # -- reader thread

    def _read(self) -> None:
        try:
            while True:
                self._dispatch(receive(self._connection))
        except (EOFError, OSError):
            pass  # the worker is gone
        except Exception as error:
            self._die(
                WorkerError(f"worker {self.pid} of {self._spec.key} sent nonsense: {error!r}")
            )
            self._process.kill()
            raise
        finally:
            self._bury()

    def _exit_code(self) -> int:
        try:
            return self._process.wait(_DYING_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _dispatch(self, message: Packet) -> None:
        match message["ev"]:
            case "step":
                self._on_step(message)
            case "embedded":
                pending = self._pending.get(message["id"])
                if pending is not None:
                    pending.end(_vectors(message))
            case "occupancy":
                pending = self._pending.get(message.pop("id"))
                del message["ev"]
                if pending is not None:
                    pending.end(Occupancy(**message))
            case "hello":
                self._why_no_gate = message["why_no_gate"]
                self._device = message["device"]
                self._hello.set()
            case "loading":
                self._on_loading(message["fraction"])
            case "loaded":
                facts = {key: message[key] for key in ("context_length", "threads", "device")}
                self._info = self._info.model_copy(update=facts)
                self._load_ended.set()
            case "completed":
                if message["error"] is not None:
                    line = f"it keeps its first context: {message['error']['message']}"
                    self._on_log("warning", line, self._spec.info.model_id)
                self.complete()
            case "failed":
                error = error_from_wire(message["error"])
                error.details.setdefault("log", list(self._log_lines))
                self._load_error = error
                self._load_ended.set()
            case "log":
                self._log_lines.append(message["line"])
                self._on_log(message["level"], message["line"], self._spec.info.model_id)

    def _on_step(self, message: Packet) -> None:
        for request_id, text, tokens in message["text"]:
            pending = self._pending.get(request_id)
            if pending is not None and not pending.ended.is_set():
                self._deliver(request_id, pending, text, tokens)
        for done in message["done"]:
            pending = self._pending.get(done.pop("id"))
            if pending is not None:
                pending.end(_completion(done))
        for failed in message["error"]:
            pending = self._pending.get(failed["id"])
            if pending is not None:
                wire = failed.get("error")
                pending.end(error=error_from_wire(wire) if wire else None)

    def _deliver(self, request_id: int, pending: _Pending, text: str, tokens: int) -> None:
        try:
            pending.on_text(text, tokens)
        except Exception as error:  # noqa: BLE001 (the caller's code may raise anything)
            pending.end(error=error)
            self._outbox.put({"op": "cancel", "id": request_id})

    def _bury(self) -> None:
        code = self._exit_code()
        output = beginning_of(self._output)
        crash = None
        # A worker that could not load says so and ends: no crash.
        is_expected = self._is_closing or self._death or self._load_error
        if not is_expected:
            crash = self._crash_error(code, output)
        self._die(crash or EngineClosedError(f"{self._spec.key} was unloaded"))
        self._outbox.put(None)
        self._writer.join()
        self._connection.close()
        self._output.close()
        self._buried.set()
        self._on_buried()
        if crash is not None:
            self._on_crash(self._spec.info.model_id, crash)

    def _crash_error(self, code: int, output: str) -> WorkerCrashedError:
        name = signal.Signals(-code).name if code < 0 else None
        how = f"by {name}" if name else f"with exit code {code}"
        said = f", saying: {output.splitlines()[0][:300]}" if output else ""
        return WorkerCrashedError(
            f"worker {self.pid} of {self._spec.key} died {how}{said}",
            pid=self.pid,
            exit_code=code,
            signal=name,
            output=output,
            log=list(self._log_lines),
        )

    def _die(self, error: OrionError) -> None:
        with self._lock:
            if self._death is None:
                self._death = error
            waiting = list(self._pending.values())
        for pending in waiting:
            pending.end(error=self._death)
        if not self._load_ended.is_set():
            self._load_error = self._load_error or self._death
            self._load_ended.set()
        self._hello.set()
        self.complete(self._death)

    def complete(self, error: OrionError | None = None) -> None:
        """Let `completion` be done, unless it is. What waits for that may be anybody's code: it
        runs on a thread of its own, because this one may have to deliver what it waits for."""
        if not self.completion.done():
            threading.Thread(
                target=self._complete, args=(error,), name="orion-complete", daemon=True
            ).start()

    def _complete(self, error: OrionError | None) -> None:
        with contextlib.suppress(InvalidStateError):  # somebody was faster
            if error is None:
                self.completion.set_result(self._info)
            else:
                self.completion.set_exception(error)


def _completion(done: Packet) -> Completion:
    logprobs = tuple(
        TokenLogprob(
            text=text,
            token=token,
            logprob=logprob,
            top=[TokenAlternative(text=t, token=n, logprob=p) for t, n, p in top],
        )
        for text, token, logprob, top in done["logprobs"]
    )
    return Completion(**{**done, "usage": Usage(**done["usage"]), "logprobs": logprobs})


def _vectors(message: Packet) -> "NDArray[np.float32]":
    import numpy as np  # not needed by who embeds nothing

    data = np.frombuffer(base64.b64decode(message["data"]), "<f4")
    return data.reshape(message["shape"]).astype(np.float32)


def _described(spec: LoadSpec, headers: Sequence[GGUFHeader]) -> ModelInfo:
    return spec.info.model_copy(
        update={
            "architecture": headers[0].architecture,
            "quantization": headers[0].quantization,
            "size_bytes": sum(header.file_size for header in headers),
        }
    )
