"""The host's side of a worker: exchanges messages with its process, and notices when it dies.

Each loaded model has one process, and a reader and a writer thread in the host. No other thread
waits for the socket, so a worker that stopped reading delays neither a cancel nor a close. The
reader alone ends what waits for the worker, so that no text comes after the end; others only say
what it is to end with, and kill the process. The loader decides what to load, and when.
"""

import base64
import contextlib
import itertools
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from orion_oie.backends.base import (
    Completion,
    GenerationJob,
    LoadSpec,
    Occupancy,
    OnText,
)
from orion_oie.backends.llama.host.child import signal_name
from orion_oie.backends.llama.host.process import KILLED_GRACE_S, WorkerProcess
from orion_oie.backends.llama.host.threads import ThreadAllocator
from orion_oie.backends.llama.protocol import (
    CancelCommand,
    CloseCommand,
    Command,
    CompleteCommand,
    CompletedReport,
    Done,
    EmbedCommand,
    EmbeddedReport,
    FailedReport,
    GenerateCommand,
    HelloReport,
    LoadCommand,
    LoadedReport,
    LoadingReport,
    LogReport,
    OccupancyCommand,
    OccupancyReport,
    Report,
    StepReport,
    ThreadsCommand,
    encode_command,
    error_from_wire,
    receive_report,
)
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
)
from orion_oie.schemas.validation import encoded
from orion_oie.telemetry.callbacks import call_safely
from orion_oie.threads import Event, Future

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOG_LINES_KEPT = 20
_DYING_GRACE_S = 1.0  # for a worker that closed its socket
_BURIAL_S = 2 * _DYING_GRACE_S + KILLED_GRACE_S + 1.0  # the longest that an end takes the reader

OnLog = Callable[[str, str, str], None]
OnCrash = Callable[[str, WorkerCrashedError], None]


AnswerT = TypeVar("AnswerT")


def _ignore_text(_text: str, _tokens: int) -> None:
    pass


class _Pending(Generic[AnswerT]):
    """A request that waits for its worker. Ends once, on the reader thread."""

    def __init__(self, on_text: OnText = _ignore_text) -> None:
        self.on_text = on_text
        self.awake = Event()  # it ended, or it was cancelled
        self.ended = Event()
        self.answer: AnswerT | None = None
        self.error: BaseException | None = None

    def end(self, answer: AnswerT | None = None, error: BaseException | None = None) -> None:
        if not self.ended.is_set():
            self.answer, self.error = answer, error
            self.ended.set()
            self.awake.set()


class _Here(threading.local):
    """What the current thread is."""

    is_reader = False


_here = _Here()


class LlamaModel:
    """A model in a worker process. See `LocalModel`.

    `load` must be called first. `on_log(level, line, model_id)` and `on_crash(model_id, error)` are
    called on the reader thread; what they raise is logged. `threads` divides the cores among the
    models that compute. Raises `WorkerError` when the system has no threads for it; the process is
    ended then.
    """

    def __init__(
        self,
        spec: LoadSpec,
        worker: WorkerProcess,
        threads: ThreadAllocator | None = None,
        cancel_grace_s: float = 5.0,
        on_log: OnLog = lambda _level, _line, _model_id: None,
        on_crash: OnCrash = lambda _model_id, _error: None,
    ) -> None:
        self._spec = spec
        self._info = spec.info
        self._threads = threads or ThreadAllocator(usable_cores())
        self._cancel_grace_s = cancel_grace_s
        self._on_log = on_log
        self._on_crash = on_crash
        self._on_loading: Callable[[float], None] = lambda _fraction: None
        self._on_exit: Callable[[], None] = lambda: None
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._pending: dict[int, _Pending[Any]] = {}  # of each kind of answer
        self._is_closing = False
        self._death: OrionError | None = None
        self._exited = Event()
        self._hello = Event()
        self._why_no_gate = self._device = ""
        self._load_ended = Event()
        self._load_error: OrionError | None = None
        self._log_lines: deque[str] = deque(maxlen=_LOG_LINES_KEPT)
        self._progress: Callable[[], LoadProgress] = lambda: LoadProgress("initializing")
        self.completion: Future[ModelInfo] = Future()
        self._process = worker
        name = spec.info.model_id
        self._writer = threading.Thread(
            target=self._write, name=f"orion-writer-{name}", daemon=True
        )
        self._reader = threading.Thread(target=self._read, name=f"orion-reader-{name}", daemon=True)
        try:
            self._writer.start()
            self._reader.start()
        except RuntimeError as error:
            self._outbox.put(None)
            worker.end(0.0)
            worker.close()
            raise WorkerError(f"the system gives no more threads: {error}") from error

    # -- the load

    def why_no_gate(self, scope: CancelScope, timeout_s: float) -> str:
        """The reason why this worker cannot compute while a model arrives; empty when it can."""
        self._await(self._hello, scope, timeout_s)
        return self._why_no_gate

    def device(self, scope: CancelScope, timeout_s: float) -> str:
        """ "gpu" when this worker could put layers on one, else "cpu"."""
        self._await(self._hello, scope, timeout_s)
        return self._device

    def load(
        self,
        headers: Sequence[GGUFHeader],
        command: LoadCommand,
        scope: CancelScope,
        timeout_s: float,
        on_loading: Callable[[float], None],
    ) -> None:
        """Load files, and wait until the worker can answer. `on_loading` gets the fraction. On any
        error the process is ended first."""
        self._info = _described(self._spec, headers)
        self._on_loading = on_loading
        try:
            self._send(command)
        except OrionError:
            self.close(timeout_s=0.0)
            raise
        self._await(self._load_ended, scope, timeout_s)

    def take_over(self, files: Sequence[Path]) -> None:
        """Make the worker continue in a context that waits for nothing: all weights have arrived,
        in `files`. `completion` is done when it has."""
        self._send(CompleteCommand(tuple(files)))

    def fail(self, error: OrionError) -> None:
        """End the process, and fail everything that waits for it with `error`. Returns at once."""
        with self._lock:
            self._death = self._death or error
        self._process.kill()

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the process has ended, or now if it has already."""
        with self._lock:
            has_exited = self._exited.is_set()
            if not has_exited:
                self._on_exit = callback
        if has_exited:
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
        """Set the source of `load_progress`."""
        self._progress = progress

    def is_alive(self) -> bool:
        return self._death is None and not self._is_closing

    def _await(self, event: Event, scope: CancelScope, timeout_s: float) -> None:
        """Wait for a step of the load; on any error the process is ended first."""
        undo = scope.on_cancel(event.set)
        try:
            is_ended = event.wait(timeout_s)
        except BaseException:
            self.kill()  # an interrupted caller never closes it
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
        """See `LocalModel.generate`."""
        if self._spec.is_embedding:
            raise InvalidRequestError(f"{self._spec.key} was loaded to embed, not to generate")
        with self._computing():
            return self._ask(
                lambda request_id: GenerateCommand(request_id, job),
                _Pending[Completion](on_text),
                scope,
            )

    def embed(self, texts: Sequence[str], scope: CancelScope) -> "NDArray[np.float32]":
        """See `EmbeddingModel.embed`."""
        if not self._spec.is_embedding:
            raise InvalidRequestError(f"{self._spec.key} was loaded to generate, not to embed")
        for index, text in enumerate(texts):
            encoded(text, f"text {index}", index=index)  # before a message of all of them
        with self._computing():
            return self._ask(
                lambda request_id: EmbedCommand(request_id, tuple(texts)),
                _Pending["NDArray[np.float32]"](),
                scope,
            )

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        self._threads.join(self)
        try:
            yield
        finally:
            self._threads.leave(self)

    @property
    def max_threads(self) -> int | None:
        """See `threads.Member`."""
        return self._spec.threads

    def use_threads(self, threads: int) -> None:
        """See `threads.Member`."""
        self._send(ThreadsCommand(threads))

    def occupancy(self) -> Occupancy:
        """The worker's current load. Raises `WorkerCrashedError`."""
        return self._ask(OccupancyCommand, _Pending[Occupancy](), CancelScope())

    def _ask(
        self,
        command_of: Callable[[int], Command],
        pending: _Pending[AnswerT],
        scope: CancelScope,
    ) -> AnswerT:
        """Send the command of a new request, and wait for its answer."""
        scope.check()
        if threading.current_thread() is self._reader:
            raise WorkerError(
                f"a callback of {self._spec.key} asks it something: its answer could not come "
                "before the callback returns; ask on another thread"
            )
        request_id = next(self._ids)
        undo: Callable[[], None] | None = None

        def on_cancel() -> None:
            self._send(CancelCommand(request_id))
            pending.awake.set()

        try:
            with self._lock:
                if self._death is not None:
                    raise self._death
                self._pending[request_id] = pending
            self._send(command_of(request_id))
            undo = scope.on_cancel(on_cancel)
            pending.awake.wait()
            if not pending.ended.wait(self._cancel_grace_s):
                self.fail(self._stuck_error())
                pending.ended.wait(_BURIAL_S)
        except BaseException:
            on_cancel()  # the caller was interrupted: nobody wants the answer
            raise
        finally:
            try:
                if undo is not None:
                    undo()
            finally:
                with self._lock:
                    self._pending.pop(request_id, None)
        if pending.error is not None:
            raise pending.error
        if not pending.ended.is_set() and self._death is not None:  # a callback holds the reader
            raise self._death
        if pending.answer is None:
            scope.check()
            raise WorkerError(f"{self._spec.key} ended a request without an answer")
        return pending.answer

    def close(self, timeout_s: float = 10.0) -> None:
        """See `LocalModel.close`. Takes some seconds longer for a process that outlives SIGKILL. In
        a callback of a worker it ends the process, and does not wait for the end, which comes after
        the callback. In a fork of the host it does nothing."""
        self._is_closing = True
        if _here.is_reader or not self._process.is_ours:
            self.kill()
            return
        if timeout_s > 0:
            self._send(CloseCommand())
        if not self._exited.wait(timeout_s):
            self.kill()
            self._exited.wait(_BURIAL_S)

    def kill(self) -> None:
        """End the process at once, without waiting. May be called from anywhere."""
        self._is_closing = True
        self._process.kill()

    def _stuck_error(self) -> WorkerTimeoutError:
        """The error for a worker that is stuck in native code."""
        return WorkerTimeoutError(
            f"worker {self.pid} of {self._spec.key} did not confirm a cancel within "
            f"{self._cancel_grace_s:g} s and was ended",
            pid=self.pid,
        )

    def _send(self, command: Command) -> None:
        """Hand a command to the writer thread; returns at once."""
        self._outbox.put(encode_command(command))

    # -- writer thread

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._process.send_bytes(message)
        except OSError:  # it reads no more: the reader thread ends it, and everything that waits
            self._process.hang_up()

    # -- reader thread

    def _read(self) -> None:
        _here.is_reader = True
        try:
            while True:
                self._dispatch(receive_report(self._process))
        except (EOFError, OSError):
            pass  # the worker is gone
        except WorkerError as error:  # a malformed report
            self.fail(
                WorkerError(f"worker {self.pid} of {self._spec.key}: {error.message}", pid=self.pid)
            )
        except Exception as error:
            self.fail(
                WorkerError(f"worker {self.pid} of {self._spec.key} was not understood: {error!r}")
            )
            raise
        finally:
            self._finish()

    def _dispatch(self, report: Report) -> None:
        match report:
            case StepReport():
                self._on_step(report)
            case EmbeddedReport():
                self._end(report.id, _vectors(report))
            case OccupancyReport():
                self._end(report.id, report.occupancy)
            case HelloReport(why_no_gate, device):
                self._why_no_gate, self._device = why_no_gate, device
                self._hello.set()
            case LoadingReport(fraction):
                call_safely(self._on_loading, fraction)
            case LoadedReport(context_length, threads, device):
                facts = {"context_length": context_length, "threads": threads, "device": device}
                self._info = self._info.model_copy(update=facts)
                self._load_ended.set()
            case CompletedReport(wire):
                if wire is not None:
                    line = f"it keeps its first context: {wire.message}"
                    self._log("warning", line)
                self.complete()
            case FailedReport(wire):
                error = error_from_wire(wire)
                error.details.setdefault("log", list(self._log_lines))
                self._load_error = error
                self._load_ended.set()
            case LogReport(level, line):
                self._log_lines.append(line)
                self._log(level, line)

    def _log(self, level: str, line: str) -> None:
        call_safely(self._on_log, level, line, self._spec.info.model_id)

    def _on_step(self, step: StepReport) -> None:
        for request_id, text, tokens in step.texts:
            pending = self._pending.get(request_id)
            if pending is not None and not pending.ended.is_set():
                self._deliver(request_id, pending, text, tokens)
        for done in step.done:
            self._end(done.id, _completion(done))
        for ended in step.ended:
            self._end(ended.id, error=error_from_wire(ended.error) if ended.error else None)

    def _end(
        self, request_id: int, answer: object | None = None, error: OrionError | None = None
    ) -> None:
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.end(answer, error)

    def _deliver(self, request_id: int, pending: _Pending[Any], text: str, tokens: int) -> None:
        try:
            pending.on_text(text, tokens)
        except BaseException as error:  # noqa: BLE001 (the caller's code may raise anything)
            pending.end(error=error)
            self._send(CancelCommand(request_id))

    def _finish(self) -> None:
        crash, is_gone = None, True
        try:
            is_gone = self._process.end(_DYING_GRACE_S)
            # A worker that could not load reports that and ends: this is no crash.
            if not (self._is_closing or self._death or self._load_error):
                crash = self._crash_error()
        finally:
            self._end_all(crash or EngineClosedError(f"{self._spec.key} was unloaded"))
            self._outbox.put(None)
            self._process.hang_up()
            self._writer.join(_DYING_GRACE_S)
            self._process.close()
            with self._lock:
                self._exited.set()
            call_safely(self._on_exit)
        if not is_gone:
            self._log("error", _outlived(self.pid))
        if crash is not None:
            call_safely(self._on_crash, self._spec.info.model_id, crash)

    def _crash_error(self) -> WorkerCrashedError:
        process, output = self._process, self._process.said()
        code, name = process.exit_code, None
        if process.was_killed and code in (None, -signal.SIGKILL):
            code, how = None, "closed its connection and was ended"
        elif code is None:
            how = "died; its exit status is not known: this program ignores SIGCHLD or took it"
        elif code < 0:
            name = signal_name(-code)
            how = f"died by {name}"
        else:
            how = f"died with exit code {code}"
        said = f", saying: {output.splitlines()[0][:300]}" if output else ""
        return WorkerCrashedError(
            f"worker {self.pid} of {self._spec.key} {how}{said}",
            pid=self.pid,
            exit_code=code,
            signal=name,
            output=output,
            log=list(self._log_lines),
        )

    def _end_all(self, error: OrionError) -> None:
        """End everything that waits, with `error` unless another one was given before."""
        with self._lock:
            death = self._death = self._death or error
            waiting = list(self._pending.values())
        for pending in waiting:
            pending.end(error=death)
        if not self._load_ended.is_set():
            self._load_error = self._load_error or death
            self._load_ended.set()
        self._hello.set()
        self.complete(death)

    def complete(self, error: OrionError | None = None) -> None:
        """Make `completion` done, unless it is. Its callbacks may be the application's code: they
        get a thread of their own if there is one, because this one may have to deliver what they
        wait for."""
        if self.completion.done():
            return
        try:
            threading.Thread(
                target=self._complete, args=(error,), name="orion-complete", daemon=True
            ).start()
        except RuntimeError:  # the system gives no more
            call_safely(self._complete, error)

    def _complete(self, error: OrionError | None) -> None:
        with contextlib.suppress(InvalidStateError):  # another thread was faster
            if error is None:
                self.completion.set_result(self._info)
            else:
                self.completion.set_exception(error)


def _outlived(pid: int) -> str:
    return (
        f"worker {pid} did not end within {KILLED_GRACE_S:g} s of SIGKILL: it hangs in the kernel, "
        "and its memory is not free yet"
    )


def _completion(done: Done) -> Completion:
    logprobs = tuple(
        TokenLogprob(
            text=text,
            token=token,
            logprob=logprob,
            top=[TokenAlternative(text=t, token=n, logprob=p) for t, n, p in top],
        )
        for text, token, logprob, top in done.logprobs
    )
    return replace(done.completion, logprobs=logprobs)


def _vectors(report: EmbeddedReport) -> "NDArray[np.float32]":
    import numpy as np  # generating needs no numpy in the host

    data = np.frombuffer(base64.b64decode(report.data), "<f4")
    return data.reshape(report.shape).astype(np.float32)


def _described(spec: LoadSpec, headers: Sequence[GGUFHeader]) -> ModelInfo:
    info, header = spec.info, headers[0]
    return info.model_copy(
        update={
            "name": info.name or header.name or info.model_id,
            "license": info.license or header.license or "unknown",
            "architecture": header.architecture,
            "quantization": header.quantization,
            "size_bytes": sum(header.file_size for header in headers),
        }
    )
