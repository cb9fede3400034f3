"""The process that holds one loaded model:

    python -m orion_oie.backends.llama.worker.main DESCRIPTOR HOST_PID NICE CORES

Three threads: the main one owns the model and runs the batches, one reads commands, one turns
conversations into tokens. An embedding model needs the first two. A model may be loaded while its
files are still arriving; when they have arrived, it continues in a context that waits for nothing.
The process writes nothing to stdout, ignores Ctrl-C, and ends at once when its parent is gone.

It may be started before its model is known: it imports everything and waits for a `LoadCommand`.
"""

import base64
import faulthandler
import gc
import json
import os
import queue
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from orion_oie.backends.llama.protocol import (
    CancelCommand,
    CloseCommand,
    Command,
    CompleteCommand,
    CompletedReport,
    EmbedCommand,
    EmbeddedReport,
    Ended,
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
    error_to_wire,
    receive_command,
    receive_load_command,
    send_report,
    warm_up,
)
from orion_oie.backends.llama.worker import native
from orion_oie.backends.llama.worker.batcher import Batcher
from orion_oie.backends.llama.worker.embedder import Embedder
from orion_oie.backends.llama.worker.gate import Gate
from orion_oie.backends.llama.worker.prefix_store import (
    PrefixStore,
    file_identity,
)
from orion_oie.backends.llama.worker.prepare import (
    NoForm,
    PromptForm,
    prepared,
    prompt_form,
)
from orion_oie.backends.llama.worker.tasks import Task
from orion_oie.backends.llama.worker.thread_choice import ThreadChoice
from orion_oie.errors import ModelError, OrionError, WorkerError, described
from orion_oie.hardware.load import CoreLoadMeter
from orion_oie.models.downloads.arrival import ArrivalMap

_PARENT_CHECK_S = 2.0
_LOG_LEVELS_SENT = frozenset({"warning", "error"})
_PROGRESS_STEP = 0.05
_LAST_WRITES_S = 2.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A task that the preparing thread made."""

    task: Task


@dataclass(frozen=True, slots=True)
class _Rejected:
    """A request that cannot become a task."""

    id: int
    error: OrionError


@dataclass(frozen=True, slots=True)
class _NewContext:
    """The same weights in a context that waits for nothing."""

    model: native.NativeModel


_Item = Command | _Prepared | _Rejected | _NewContext
"""Work for the main thread."""


class Worker:
    """Connects the three threads."""

    def __init__(self, connection: "Connection[Any, Any]", host_pid: int | None = None) -> None:
        self._connection = connection
        # Given by the host: it may be gone by now, or have started this through a script.
        self._parent = os.getppid()
        self._host_pid = self._parent if host_pid is None else host_pid
        self._send_lock = threading.Lock()
        self._load_command: queue.SimpleQueue[LoadCommand] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._to_prepare: queue.SimpleQueue[GenerateCommand] = queue.SimpleQueue()
        self._preparing: set[int] = set()
        self._cancelled: set[int] = set()  # texts to embed; the inbox orders other cancels
        self._abort = native.AbortFlag()

    def run(self) -> None:
        """Load the model that the first command names, then serve until a `CloseCommand`."""
        native.capture_logs(self._on_native_log)
        threading.Thread(target=self._read_commands, name="commands", daemon=True).start()
        native.initialize()
        self._send(HelloReport(_why_no_gate(), native.device()))
        load = self._load_command.get()
        try:
            if load.is_embedding:
                embedder = self._load_embedder(load)
            else:
                generator = self._load_generator(load)
        except Exception as error:  # noqa: BLE001 (the host decides what a failed load means)
            self._send(FailedReport(error_to_wire(_as_orion(error))))
            return
        if load.arrival_maps is None:
            # On its own thread: it takes a tenth of a second for each gigabyte.
            threading.Thread(
                target=_release_pages, args=(load,), name="release-pages", daemon=True
            ).start()
        if load.is_embedding:
            self._send_loaded(load, embedder.max_tokens)
            self._serve_embeddings(embedder)
            return
        threading.Thread(
            target=self._prepare_tasks,
            args=(generator.model, generator.form),
            name="prepare",
            daemon=True,
        ).start()
        self._send_loaded(load, generator.model.context_length)
        self._serve(generator)

    def _load_generator(self, load: LoadCommand) -> "_Generator":
        gate = None
        if load.arrival_maps is not None:
            maps = [None if path is None else ArrivalMap.open(path) for path in load.arrival_maps]
            gate = Gate(load.files, maps, self._abort)
        model = native.NativeModel(
            load.files,
            slots=load.slots,
            context_length=load.context_length,
            threads=load.threads,
            abort=self._abort,
            on_progress=self._progress_reporter(),
            gate=gate,
            gpu_layers=load.gpu_layers,
        )
        if not model.can_generate:
            raise ModelError(f"{load.files[0]} is not a model that writes text")
        form = prompt_form(model, load.prompt_format, load.files[0])
        store = self._prefix_store(load)
        batcher = Batcher(model, load.host_cache_bytes, store, _thread_choice(load))
        return _Generator(load, model, form, batcher, store)

    def _prefix_store(self, load: LoadCommand) -> PrefixStore | None:
        """The store for prefix states on the disk. A model that is still arriving has none: its
        files cannot be told from others yet."""
        if not load.prefix_store_bytes or load.arrival_maps is not None:
            return None
        try:
            facts = [file_identity(load.files), native.build()]
        except OSError as error:  # the mapped model works without a store
            self._log_warning(f"no prefix store: {error}")
            return None
        identity = json.dumps([*facts, load.slots, load.context_length])
        return PrefixStore(load.prefix_folder, identity, load.prefix_store_bytes, self._log_warning)

    def _load_embedder(self, load: LoadCommand) -> Embedder:
        native.return_large_blocks()  # an embedder allocates for a long text, and frees it again
        return Embedder(
            load.files,
            threads=_thread_choice(load),
            context_length=load.context_length,
            on_progress=self._progress_reporter(),
            gpu_layers=load.gpu_layers,
        )

    def _progress_reporter(self) -> Callable[[float], None]:
        shown = 0.0

        def on_progress(fraction: float) -> None:
            nonlocal shown
            if fraction - shown >= _PROGRESS_STEP:
                shown = fraction
                self._send(LoadingReport(fraction))

        return on_progress

    def _send_loaded(self, load: LoadCommand, context_length: int) -> None:
        gc.freeze()  # what exists now stays: collections need not look at it
        device = native.device() if load.gpu_layers else "cpu"
        self._send(LoadedReport(context_length, load.threads, device))

    # -- main thread

    def _serve(self, generator: "_Generator") -> None:
        batcher = generator.batcher
        while True:
            for item in self._items(wait=not batcher.has_work):
                if isinstance(item, CloseCommand):
                    if generator.store is not None:
                        generator.store.flush(_LAST_WRITES_S)
                    return
                self._handle(item, generator)
            output = batcher.step()
            if output:
                self._send(output.report())

    def _items(self, *, wait: bool) -> list[_Item]:
        items = [self._inbox.get()] if wait else []
        while True:
            try:
                items.append(self._inbox.get_nowait())
            except queue.Empty:
                return items

    def _handle(self, item: _Item, generator: "_Generator") -> None:
        match item:
            case _Prepared(task):
                if self._is_wanted(task.id):
                    generator.batcher.add(task)
                else:
                    task.close()
            case _Rejected(request_id, error):
                if self._is_wanted(request_id):
                    self._send_end(request_id, error)
            case CancelCommand(request_id):
                self._drop(request_id)
                generator.batcher.cancel(request_id)
                self._send_end(request_id)
            case OccupancyCommand(request_id):
                self._send(OccupancyReport(request_id, generator.batcher.occupancy()))
            case ThreadsCommand(threads):
                generator.batcher.threads.most = threads
            case CompleteCommand(files):
                generator.load = replace(generator.load, files=files, arrival_maps=None)
                threading.Thread(
                    target=self._renew_context, args=(generator,), name="renew", daemon=True
                ).start()
            case _NewContext(model):
                self._move(generator, model)

    def _is_wanted(self, request_id: int) -> bool:
        """True unless the request was cancelled during its preparation."""
        is_wanted = request_id in self._preparing
        self._preparing.discard(request_id)
        return is_wanted

    def _drop(self, request_id: int) -> None:
        # A request that is still being prepared is dropped when it comes out.
        self._abort.lower()
        self._preparing.discard(request_id)
        self._cancelled.discard(request_id)

    def _renew_context(self, generator: "_Generator") -> None:
        """Give the weights that were arriving a context that waits for nothing."""
        try:
            model = generator.model.without_gate()
        except Exception as error:  # noqa: BLE001 (the first context goes on working)
            self._send(CompletedReport(error_to_wire(_as_orion(error))))
            return
        generator.store = self._prefix_store(generator.load)
        self._inbox.put(_NewContext(model))
        _release_pages(generator.load)

    def _move(self, generator: "_Generator", model: native.NativeModel) -> None:
        generator.batcher.move_to(model, generator.store)
        generator.model.close_context()
        generator.model = model
        self._send(CompletedReport())

    def _serve_embeddings(self, embedder: Embedder) -> None:
        while True:
            for item in self._items(wait=True):
                match item:
                    case CloseCommand():
                        return
                    case ThreadsCommand(threads):
                        embedder.threads.most = threads
                    case CancelCommand(request_id):
                        self._drop(request_id)
                        self._send_end(request_id)
                    case EmbedCommand(request_id):
                        if self._is_wanted(request_id):
                            self._embed(item, embedder)

    def _embed(self, command: EmbedCommand, embedder: Embedder) -> None:
        try:
            vectors = embedder.embed(command.texts, lambda: command.id in self._cancelled)
        except Exception as error:  # noqa: BLE001 (one bad request must not end the worker)
            self._send_end(command.id, _as_orion(error))
            return
        if vectors is not None:  # otherwise it was cancelled
            texts, dimensions = vectors.shape
            data = base64.b64encode(vectors.astype("<f4").tobytes()).decode()
            self._send(EmbeddedReport(command.id, (texts, dimensions), data))

    # -- command thread

    def _read_commands(self) -> None:
        try:
            self._await_message()
            self._load_command.put(receive_load_command(self._connection))
            warm_up()
            while True:
                self._await_message()
                self._accept(receive_command(self._connection))
        except (EOFError, OSError):
            os._exit(0)
        except WorkerError as error:  # a malformed command
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        except Exception:  # noqa: BLE001 (a worker that no longer reads must not live on)
            traceback.print_exc()
            os._exit(1)

    def _await_message(self) -> None:
        while True:
            if os.getppid() != self._parent or not _is_there(self._host_pid):
                os._exit(0)
            if self._connection.poll(_PARENT_CHECK_S):
                return

    def _accept(self, command: Command) -> None:
        match command:
            case GenerateCommand():
                self._preparing.add(command.id)
                self._to_prepare.put(command)
            case EmbedCommand():
                self._preparing.add(command.id)
                self._inbox.put(command)
            case CancelCommand():
                self._cancelled.add(command.id)
                self._abort.raise_()
                self._inbox.put(command)
            case CloseCommand():
                self._abort.raise_()
                self._inbox.put(command)
            case _:
                self._inbox.put(command)

    # -- preparing thread

    def _prepare_tasks(self, model: native.NativeModel, form: PromptForm | NoForm) -> None:
        while True:
            command = self._to_prepare.get()
            if command.id not in self._preparing:
                continue  # cancelled while it waited
            try:
                self._inbox.put(_Prepared(prepared(command, model, form)))
            except Exception as error:  # noqa: BLE001 (one bad request must not end the thread)
                self._inbox.put(_Rejected(command.id, _as_orion(error)))

    # -- sending

    def _send_end(self, request_id: int, error: OrionError | None = None) -> None:
        """Report that a request ended without an answer: with an error, or cancelled."""
        wire = None if error is None else error_to_wire(error)
        self._send(StepReport(ended=(Ended(request_id, wire),)))

    def _send(self, report: Report) -> None:
        with self._send_lock:
            try:
                send_report(self._connection, report)
            except OSError:
                os._exit(0)

    def _log_warning(self, line: str) -> None:
        self._send(LogReport("warning", line))

    def _on_native_log(self, level: str, line: str) -> None:
        # While a decode is being aborted, llama.cpp logs the abort as an error.
        if level in _LOG_LEVELS_SENT and not self._abort.is_raised:
            self._send(LogReport(level, line))


@dataclass
class _Generator:
    """A loaded model that writes text, and its parts."""

    load: LoadCommand
    model: native.NativeModel
    form: PromptForm | NoForm
    batcher: Batcher
    store: PrefixStore | None


def _thread_choice(load: LoadCommand) -> ThreadChoice:
    """The choice of threads for a model. With layers on a GPU, it would measure the GPU."""
    if load.gpu_layers or not load.is_adaptive:
        return ThreadChoice(load.threads, is_fixed=True)
    meter = CoreLoadMeter()
    return ThreadChoice(load.threads, meter.read if meter.is_supported else None)


def _release_pages(load: LoadCommand) -> None:
    """Release the pages that were read for the load alone."""
    native.release_pages(load.files, load.discardable)


def _why_no_gate() -> str:
    """The reason why this worker cannot compute while a model arrives; empty when it can."""
    if native.device() != "cpu":
        return "weights are copied to the GPU when they are loaded"
    if not Gate.is_supported():
        return "this build of llama.cpp has another layout of tensors than the known one"
    return ""


def _as_orion(error: Exception) -> OrionError:
    if isinstance(error, OrionError):
        return error
    return WorkerError(f"the worker met {described(error)}")


def _share_cores(nice: int, cores: set[int]) -> None:
    """Each thread has a niceness and an affinity of its own, and passes them on to those that it
    starts. Imports have started some already."""
    for thread in _threads() if nice or cores else ():
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)
            if cores:
                os.sched_setaffinity(thread, cores)


def _threads() -> list[int]:
    """The threads of this process, by the numbers that the system gives them."""
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:  # not Linux, where the process is a unit
        return [0]


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main() -> None:
    """Entry point of the process."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    descriptor, host_pid, nice, cores = sys.argv[1:]
    _share_cores(int(nice), {int(core) for core in cores.split(",") if core})
    # A process that a driver starts would keep it open.
    os.set_inheritable(int(descriptor), False)
    connection: Connection[Any, Any] = Connection(int(descriptor))
    Worker(connection, int(host_pid)).run()
    # Freeing a context that other threads may still use is not worth the risk.
    os._exit(0)


if __name__ == "__main__":
    main()
