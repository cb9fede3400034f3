"""The process that holds one loaded model: `python -m orion_oie.backends.llama.worker.main FD`.

Three threads: the main one owns the model and runs the batches, one reads commands, one turns
conversations into tokens. An embedding model needs the first two. A model may be loaded while its
files are still arriving; once they are here, it goes on in a context that waits for nothing. The
process writes nothing to stdout, ignores Ctrl-C, and ends at once when its parent is gone.

It may be started before it is known what for: it waits, with everything imported, for its "load".
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from orion_oie.backends.llama.protocol import Packet, error_to_wire, receive, send
from orion_oie.backends.llama.worker import native
from orion_oie.backends.llama.worker.batcher import Batcher
from orion_oie.backends.llama.worker.embedder import Embedder
from orion_oie.backends.llama.worker.gate import Gate
from orion_oie.backends.llama.worker.prefix_store import (
    Snapshots,
    file_identity,
)
from orion_oie.backends.llama.worker.prepare import (
    PromptForm,
    prepared,
    prompt_form,
)
from orion_oie.errors import ModelError, OrionError, WorkerError
from orion_oie.models.downloads.arrival import ArrivalMap

_PARENT_CHECK_S = 2.0
_LOG_LEVELS_SENT = frozenset({"warning", "error"})
_PROGRESS_STEP = 0.05
_LAST_WRITES_S = 2.0


class Worker:
    """Wires the three threads together."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._send_lock = threading.Lock()
        self._load_command: queue.SimpleQueue[Packet] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Packet] = queue.SimpleQueue()
        self._to_prepare: queue.SimpleQueue[Packet] = queue.SimpleQueue()
        self._preparing: set[int] = set()
        self._cancelled: set[int] = set()  # of the texts to embed; others are cancelled in order
        self._abort = native.AbortFlag()
        self._parent = os.getppid()
        self._snapshots: Snapshots | None = None
        self._model: native.NativeModel | None = None

    def run(self) -> None:
        """Load the model that the first command names, then serve until told to close."""
        native.capture_logs(self._on_native_log)
        threading.Thread(target=self._read_commands, name="commands", daemon=True).start()
        native.initialize()
        hello = {"ev": "hello", "why_no_gate": _why_no_gate(), "device": native.device()}
        self._send(hello)
        spec = self._load_command.get()
        try:
            if spec["is_embedding"]:
                embedder = self._load_embedder(spec)
            else:
                model = self._model = self._load(spec)
                form = prompt_form(model, spec)
                self._snapshots = self._snapshots_of(spec)
                batcher = Batcher(model, spec["parked_bytes"], self._snapshots)
        except Exception as error:  # noqa: BLE001 (the host decides what a failed load means)
            self._send({"ev": "failed", "error": error_to_wire(_as_orion(error))})
            return
        if spec["maps"] is None:
            # Beside: it takes a tenth of a second for each gigabyte.
            threading.Thread(target=_give_back, args=(spec,), name="give-back", daemon=True).start()
        if spec["is_embedding"]:
            self._send_loaded(spec, embedder.max_tokens)
            self._serve_embeddings(embedder)
            return
        threading.Thread(
            target=self._prepare_tasks, args=(model, form), name="prepare", daemon=True
        ).start()
        gc.freeze()  # what was made up to now stays: collections need not look at it
        self._send_loaded(spec, model.context_length)
        self._serve(spec, batcher)

    def _load(self, spec: Packet) -> native.NativeModel:
        files = [Path(file) for file in spec["files"]]
        gate = None
        if spec["maps"] is not None:
            maps = [path and ArrivalMap.open(Path(path)) for path in spec["maps"]]
            gate = Gate(files, maps, self._abort)
        model = self._loaded(spec, files, gate, self._progress_reporter())
        if not model.can_generate:
            raise ModelError(f"{spec['files'][0]} is not a model that writes text")
        return model

    def _loaded(
        self,
        spec: Packet,
        files: list[Path],
        gate: Gate | None,
        on_progress: Callable[[float], None],
    ) -> native.NativeModel:
        return native.NativeModel(
            files,
            slots=spec["slots"],
            context_length=spec["context_length"],
            threads=spec["threads"],
            abort=self._abort,
            on_progress=on_progress,
            gate=gate,
            gpu_layers=spec["gpu_layers"],
        )

    def _snapshots_of(self, spec: Packet) -> Snapshots | None:
        """Where the states of prefixes are kept. Those of a model that is still arriving have no
        place: its files cannot be told from others yet."""
        if not spec["snapshot_bytes"] or spec["maps"] is not None:
            return None
        try:
            facts = [file_identity([Path(file) for file in spec["files"]]), native.build()]
        except OSError as error:  # what is mapped goes on without them
            self._send({"ev": "log", "level": "warning", "line": f"no snapshots: {error}"})
            return None
        facts += [spec["slots"], spec["context_length"]]
        return Snapshots(
            Path(spec["snapshot_folder"]),
            json.dumps(facts),
            spec["snapshot_bytes"],
            lambda line: self._send({"ev": "log", "level": "warning", "line": line}),
        )

    def _load_embedder(self, spec: Packet) -> Embedder:
        native.return_large_blocks()  # it makes room for a long text, and gives it up again
        return Embedder(
            [Path(file) for file in spec["files"]],
            threads=spec["threads"],
            context_length=spec["context_length"],
            on_progress=self._progress_reporter(),
            gpu_layers=spec["gpu_layers"],
        )

    def _progress_reporter(self) -> Callable[[float], None]:
        shown = 0.0

        def on_progress(fraction: float) -> None:
            nonlocal shown
            if fraction - shown >= _PROGRESS_STEP:
                shown = fraction
                self._send({"ev": "loading", "fraction": fraction})

        return on_progress

    def _send_loaded(self, spec: Packet, context_length: int) -> None:
        self._send(
            {
                "ev": "loaded",
                "context_length": context_length,
                "threads": spec["threads"],
                "device": native.device() if spec["gpu_layers"] else "cpu",
            }
        )

    # -- main thread

    def _serve(self, spec: Packet, batcher: Batcher) -> None:
        while True:
            for command in self._commands(wait=not batcher.has_work):
                if command["op"] == "close":
                    if self._snapshots is not None:
                        self._snapshots.flush(_LAST_WRITES_S)
                    return
                if command["op"] == "complete":
                    spec = {**spec, "files": command["files"], "maps": None}
                    threading.Thread(
                        target=self._renew, args=(spec,), name="renew", daemon=True
                    ).start()
                elif command["op"] == "move":
                    self._move(command["model"], batcher)
                elif command["op"] == "threads":
                    assert self._model is not None
                    self._model.use_threads(command["threads"])
                else:
                    self._obey(command, batcher)
            output = batcher.step()
            if output:
                self._send(
                    {"ev": "step", "text": output.text, "done": output.done, "error": output.error}
                )

    def _commands(self, *, wait: bool) -> list[Packet]:
        commands = [self._inbox.get()] if wait else []
        while True:
            try:
                commands.append(self._inbox.get_nowait())
            except queue.Empty:
                return commands

    def _obey(self, command: Packet, batcher: Batcher) -> None:
        if command["op"] == "occupancy":
            self._send({"ev": "occupancy", "id": command["id"], **batcher.occupancy()})
            return
        if command["op"] == "cancel":
            self._abort.lower()
            # A task that is still being prepared is dropped when it comes out.
            self._preparing.discard(command["id"])
            self._cancelled.discard(command["id"])
            batcher.cancel(command["id"])
            self._send_end({"id": command["id"]})
            return
        if command["id"] not in self._preparing:
            if command["op"] == "task":
                command["task"].close()
            return
        self._preparing.discard(command["id"])
        if command["op"] == "task":
            batcher.add(command["task"])
        else:
            self._send_end({"id": command["id"], "error": command["error"]})

    def _renew(self, spec: Packet) -> None:
        """Give the weights that were arriving a context that waits for nothing."""
        assert self._model is not None
        try:
            model = self._model.without_gate()
        except Exception as error:  # noqa: BLE001 (what runs goes on with what it has)
            self._send({"ev": "completed", "error": error_to_wire(_as_orion(error))})
            return
        self._snapshots = self._snapshots_of(spec)
        self._inbox.put({"op": "move", "model": model})
        _give_back(spec)

    def _move(self, model: native.NativeModel, batcher: Batcher) -> None:
        assert self._model is not None
        model.use_threads(self._model.threads)  # they may have changed since it was made
        batcher.move_to(model, self._snapshots)
        self._model.close_context()
        self._model = model
        self._send({"ev": "completed", "error": None})

    def _serve_embeddings(self, embedder: Embedder) -> None:
        while True:
            for command in self._commands(wait=True):
                if command["op"] == "close":
                    return
                if command["op"] == "threads":
                    embedder.use_threads(command["threads"])
                elif command["op"] == "cancel":
                    self._abort.lower()
                    self._preparing.discard(command["id"])
                    self._cancelled.discard(command["id"])
                    self._send_end({"id": command["id"]})
                elif command["id"] in self._preparing:
                    self._preparing.discard(command["id"])
                    answer = _embedded(command, embedder, self._cancelled)
                    if answer is not None:
                        self._send(answer)

    # -- command thread

    def _read_commands(self) -> None:
        try:
            while True:
                while not self._connection.poll(_PARENT_CHECK_S):
                    if os.getppid() != self._parent:
                        os._exit(0)
                self._accept(receive(self._connection))
        except (EOFError, OSError):
            os._exit(0)
        except Exception:  # noqa: BLE001 (a worker that no longer listens must not live on)
            traceback.print_exc()
            os._exit(1)

    def _accept(self, command: Packet) -> None:
        if command["op"] == "generate":
            self._preparing.add(command["id"])
            self._to_prepare.put(command)
        elif command["op"] == "embed":
            self._preparing.add(command["id"])
            self._inbox.put(command)
        elif command["op"] == "load":
            self._load_command.put(command)
        elif command["op"] in ("occupancy", "complete", "threads"):
            self._inbox.put(command)
        else:
            if command["op"] == "cancel":
                self._cancelled.add(command["id"])
            self._abort.raise_()
            self._inbox.put(command)

    # -- preparing thread

    def _prepare_tasks(self, model: native.NativeModel, form: PromptForm) -> None:
        while True:
            command = self._to_prepare.get()
            if command["id"] not in self._preparing:
                continue  # cancelled while it waited
            try:
                task = prepared(command, model, form)
                self._inbox.put({"op": "task", "id": task.id, "task": task})
            except Exception as error:  # noqa: BLE001 (one bad request must not end the thread)
                wire = error_to_wire(_as_orion(error))
                self._inbox.put({"op": "rejected", "id": command["id"], "error": wire})

    # -- sending

    def _send_end(self, end: Packet) -> None:
        """Report that a task ended without an answer: with an error, or cancelled."""
        self._send({"ev": "step", "text": [], "done": [], "error": [end]})

    def _send(self, message: Packet) -> None:
        with self._send_lock:
            try:
                send(self._connection, message)
            except OSError:
                os._exit(0)

    def _on_native_log(self, level: str, line: str) -> None:
        # While a decode is being aborted, llama.cpp reports what was asked of it as errors.
        if level in _LOG_LEVELS_SENT and not self._abort.is_raised:
            self._send({"ev": "log", "level": level, "line": line})


def _give_back(spec: Packet) -> None:
    """Let go of what was read for a load alone."""
    native.give_back([Path(file) for file in spec["files"]], spec["spent"])


def _why_no_gate() -> str:
    """Why nothing can be computed here while a model arrives; empty when it can."""
    if native.device() != "cpu":
        return "weights are copied to the GPU when they are loaded"
    if not Gate.is_supported():
        return "this build of llama.cpp has another layout of tensors than the one known"
    return ""


def _as_orion(error: Exception) -> OrionError:
    if isinstance(error, OrionError):
        return error
    return WorkerError(f"the worker met {type(error).__name__}: {error}")


def _embedded(command: Packet, embedder: Embedder, cancelled: set[int]) -> Packet | None:
    """The answer to an "embed" command; None when it was cancelled meanwhile."""
    try:
        vectors = embedder.embed(command["texts"], lambda: command["id"] in cancelled)
    except Exception as error:  # noqa: BLE001 (one bad request must not end the worker)
        end = {"id": command["id"], "error": error_to_wire(_as_orion(error))}
        return {"ev": "step", "text": [], "done": [], "error": [end]}
    if vectors is None:
        return None
    data = base64.b64encode(vectors.astype("<f4").tobytes()).decode()
    return {"ev": "embedded", "id": command["id"], "shape": vectors.shape, "data": data}


def main() -> None:
    """Entry point of the process."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    Worker(connection).run()
    # Freeing a context that other threads may still look at is not worth the risk.
    os._exit(0)


if __name__ == "__main__":
    main()
